"""Checkpoint files: written all or nothing, and read without believing anything in them."""

import io
import itertools
import math
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

DTYPES = {
    **{"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
# The opcodes with which torch.save writes tensors and plain values; of the others some allocate what a file asks for.
OPCODES = (
    *("PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "GLOBAL"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID"),
    *("REDUCE", "BUILD"),
)


class BadCheckpoint(Exception):
    """A file that is no checkpoint, or one that is damaged, hostile or not of this script; the text says which."""


class Gone(BadCheckpoint):
    """There is no such file, or no longer: another process has renamed or deleted it."""


class _Dispatch(dict):
    def __missing__(self, code):
        raise BadCheckpoint(f"it is damaged, or no checkpoint (opcode {code})")


class _Inventory(pickle._Unpickler):
    """Goes through a checkpoint's pickle with nothing in reach that does anything, and checks what tensors claim.

    It comes before ``torch.load(weights_only=True)``, which runs no code either, but believes the sizes it reads.
    The unpickler written in Python, since the one in C allocates whatever memory a file asks for. Values that a small
    file can make enormous by reference, nested tuples and long products, are not hashed, compared, printed or
    multiplied before their types and sizes are known.
    """

    dispatch = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, x)[0] for x in OPCODES)})

    def __init__(self, content, sizes):
        super().__init__(io.BytesIO(content))
        self.sizes = sizes  # bytes by the name of a storage

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: {}
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.check_tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise BadCheckpoint(f"it asks for {module}.{name}"[:200])

    def set_items(self, items):
        if not all(type(key) is str or _is_count(key, 2**31) for key in items[::2]):
            raise BadCheckpoint("it has a dict with other keys than strings and small numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def load_build(self):
        attributes = self.stack.pop()
        if not (type(self.stack[-1]) is type(attributes) is dict and attributes.keys() <= {"_metadata"}):
            raise BadCheckpoint("it has attributes where none should be")

    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.BUILD[0]: load_build}

    def persistent_load(self, claim):
        kind, dtype, key, location, count = claim
        if not all(type(x) is str for x in (kind, key, location)) or kind != "storage" or not _is_count(count):
            raise BadCheckpoint("a tensor's numbers are not where they should be")
        if count * dtype.itemsize != self.sizes[key]:
            raise BadCheckpoint(f"a tensor claims {count} numbers and has {self.sizes[key]} bytes")
        return count

    def check_tensor(self, count, offset, shape, strides, requires_grad, hooks):
        if not (type(shape) is type(strides) is tuple and len(shape) == len(strides) <= 8):
            raise BadCheckpoint("a tensor claims more than 8 dimensions, or a shape that is none")
        if not all(map(_is_count, (count, offset, *shape, *strides))) or requires_grad is not False or hooks != {}:
            raise BadCheckpoint("a tensor claims what none has that was saved here")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if math.prod(shape) > count or (math.prod(shape) and last >= count):
            raise BadCheckpoint(f"a tensor claims the shape {shape} and has {count} numbers")


def _is_count(x, below=2**62):
    return type(x) is int and 0 <= x < below


def load_checkpoint(path, **types):
    """The checkpoint at ``path`` as a dict, its tensors on the CPU, and under ``path`` where it lies.

    Nothing in the file is executed or believed: its records must be whole, hold tensors and plain values alone, and be
    as large as they claim. ``types`` are keys that a script needs beyond those of every checkpoint, and their types; a
    list holds floats. Raises BadCheckpoint, with one line, for anything else.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise Gone("there is no such file")
        size = path.stat().st_size
        if size > 2**32:
            raise BadCheckpoint(f"it has {size} bytes; no checkpoint has more than {2**32}")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type for record in records) or sum(record.file_size for record in records) > size:
                raise BadCheckpoint("its records claim more than the file holds")
            records = {record.filename.partition("/")[2]: record for record in records}
            sizes = {name[len("data/") :]: x.file_size for name, x in records.items() if name.startswith("data/")}
            _Inventory(archive.read(records["data.pkl"]), sizes).load()
            # Packed anew: PyTorch's own reader of archives gets no chance to see another content in the file. One by
            # one, so that little is held twice; reading compares each record with its checksum.
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as copy:
                for name, record in records.items():
                    copy.writestr(f"archive/{name}", archive.read(record))
        packed.seek(0)
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(packed, map_location="cpu", weights_only=True)
        _check_types(checkpoint, types)
    except BadCheckpoint:
        raise
    except OSError as error:
        kind = Gone if isinstance(error, FileNotFoundError) else BadCheckpoint
        raise kind(error.strerror or "it can't be read") from None
    except Exception as error:  # damage has no end of kinds, and each is a file that can't be read
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadCheckpoint(f"it is damaged, or no checkpoint ({reason[:200]})") from None
    return {**checkpoint, "path": path}


def _check_types(checkpoint, types):
    """Refuse a checkpoint that lacks a key, or has a value of another type than it should."""
    common = {"script": str, "agent": dict, "optimizers": list, "iteration": int, "global_step": int}
    common |= {"random_states": dict, "args": dict, "versions": dict, "git_revision": str}
    if not isinstance(checkpoint, dict):
        raise BadCheckpoint(f"it holds a {type(checkpoint).__name__}, not a dict")
    for key, kind in (common | types).items():
        if key not in checkpoint:
            raise BadCheckpoint(f"it has no {key}")
        if type(checkpoint[key]) is not kind and not (kind is dict and isinstance(checkpoint[key], dict)):
            raise BadCheckpoint(f"its {key} is a {type(checkpoint[key]).__name__}, not a {kind.__name__}")
        if (kind is int and not _is_count(checkpoint[key])) or (kind is float and not abs(checkpoint[key]) < 2.0**127):
            raise BadCheckpoint(f"its {key} is out of bounds")
    for key in (key for key, kind in types.items() if kind is list):
        if not all(type(x) is float for x in checkpoint[key]):
            raise BadCheckpoint(f"its {key} are more than numbers")
    for name, tensor in checkpoint["agent"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadCheckpoint("its agent is more than tensors by name")
    for name, value in checkpoint["args"].items():
        plain = value if isinstance(value, tuple | list) else [value]
        if not isinstance(name, str) or not all(isinstance(x, str | int | float | None) for x in plain):
            raise BadCheckpoint("its args are more than plain values by name")
        if len(plain) > 1000:
            raise BadCheckpoint("its args have a list of more than 1000 values")
    if not all(isinstance(x, str) for x in itertools.chain(*checkpoint["versions"].items())):
        raise BadCheckpoint("its versions are more than strings by name")
    # Tried on generators that nobody uses; they refuse what is no state of theirs.
    states = checkpoint["random_states"]
    for name in ("cpu", "numpy"):
        if name not in states:
            raise BadCheckpoint(f"its random_states have no {name}")
    torch.Generator().set_state(states["cpu"])
    np.random.PCG64().state = states["numpy"]


def check_like(what, given, wanted):
    """Raise BadCheckpoint unless the dict of tensors ``given`` has the names, shapes and dtypes of ``wanted``.

    Its tensors must be finite; integers, which are counts of something, must be above 0.
    """
    if other := given.keys() ^ wanted.keys():
        name = min(map(str, other))
        raise BadCheckpoint(f"its {what} {'lacks' if name in wanted else 'has an unknown'} {name}"[:200])
    for name, tensor in wanted.items():
        one, other = (f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
                      for x in (given[name], tensor))  # fmt: skip
        if one != other:
            raise BadCheckpoint(f"its {what} has {name} as {one}, where {other} is wanted"[:300])
        if isinstance(tensor, torch.Tensor) and not given[name].isfinite().all():
            raise BadCheckpoint(f"its {what} has numbers in {name} that are not finite")
        if isinstance(tensor, int) and not 0 < given[name] < 2**62:
            raise BadCheckpoint(f"its {what} has a {name} out of bounds")


def write_file(path, content, before=None):
    """Write ``content`` to ``path``, all or nothing; what was there moves to the path ``before``, if one is given."""
    unfinished = path.with_name(f"{path.name.replace('tfevents', 'unfinished')}.tmp")  # no name that TensorBoard reads
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave a whole name on half a file
        if before and path.exists():
            os.replace(path, before)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
