"""Checkpoint files: written all or nothing, and read without believing anything in them."""

import collections
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


class BadCheckpoint(Exception):
    """A file that is no checkpoint, or one that is damaged, hostile or not of this script; the text says which."""


class _Inventory(pickle._Unpickler):
    """Goes through a checkpoint's pickle with nothing in reach that does anything, and checks what tensors claim.

    It comes before ``torch.load(weights_only=True)``, which runs no code either, but believes the sizes it reads.
    The unpickler written in Python, since the one in C allocates whatever memory a file asks for.
    """

    def __init__(self, content, sizes):
        super().__init__(io.BytesIO(content))
        self.sizes = sizes  # bytes by the name of a storage

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.check_tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise BadCheckpoint(f"it asks for {module}.{name}"[:200])

    def persistent_load(self, claim):
        _, dtype, key, _, count = claim
        if count < 0 or count * dtype.itemsize != self.sizes[key]:
            raise BadCheckpoint(f"a tensor claims {count} numbers and has {self.sizes[key]} bytes")
        return count

    def check_tensor(self, count, offset, shape, strides, requires_grad, hooks):
        numbers = [offset, *shape, *strides]
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min(numbers) < 0 or math.prod(shape) > count or (math.prod(shape) and last >= count):
            raise BadCheckpoint(f"a tensor claims the shape {shape} and has {count} numbers"[:200])


def load_checkpoint(path, **types):
    """The checkpoint at ``path`` as a dict, its tensors on the CPU, and under ``path`` where it lies.

    Nothing in the file is executed or believed: its records must be whole, hold tensors and plain values alone, and be
    as large as they claim. ``types`` are keys that a script needs beyond those of every checkpoint, and their types.
    Raises BadCheckpoint, with one line, for anything else.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise BadCheckpoint("there is no such file")
        size = path.stat().st_size
        if size > 2**32:
            raise BadCheckpoint(f"it has {size} bytes; no checkpoint has more than {2**32}")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type for record in records) or sum(record.file_size for record in records) > size:
                raise BadCheckpoint("its records claim more than the file holds")
            # Reading compares each record with its checksum.
            records = {record.filename.partition("/")[2]: archive.read(record) for record in records}
        _Inventory(
            records["data.pkl"],
            {name[len("data/") :]: len(content) for name, content in records.items() if name.startswith("data/")},
        ).load()
        # Packed anew: PyTorch's own reader of archives gets no chance to see another content in the file.
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in records.items():
                archive.writestr(f"archive/{name}", content)
        packed.seek(0)
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(packed, map_location="cpu", weights_only=True)
        _check_types(checkpoint, types)
    except BadCheckpoint:
        raise
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
        if kind is int and not 0 <= checkpoint[key] < 2**62:
            raise BadCheckpoint(f"its {key} is out of bounds")
    for name, tensor in checkpoint["agent"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadCheckpoint("its agent is more than tensors by name")
    for name, value in checkpoint["args"].items():
        plain = value if isinstance(value, tuple | list) else [value]
        if not isinstance(name, str) or not all(isinstance(x, str | int | float | None) for x in plain):
            raise BadCheckpoint("its args are more than plain values by name")
    if not all(isinstance(x, str) for x in itertools.chain(*checkpoint["versions"].items())):
        raise BadCheckpoint("its versions are more than strings by name")
    # Tried on generators that nobody uses; they refuse what is no state of theirs.
    states = checkpoint["random_states"]
    torch.Generator().set_state(states["cpu"])
    if "numpy" in states:
        np.random.PCG64().state = states["numpy"]


def check_like(what, given, wanted):
    """Raise BadCheckpoint unless the dict of tensors ``given`` has the names, shapes and dtypes of ``wanted``."""
    if other := given.keys() ^ wanted.keys():
        name = min(map(str, other))
        raise BadCheckpoint(f"its {what} {'lacks' if name in wanted else 'has an unknown'} {name}"[:200])
    for name, tensor in wanted.items():
        one, other = (f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
                      for x in (given[name], tensor))  # fmt: skip
        if one != other:
            raise BadCheckpoint(f"its {what} has {name} as {one}, where {other} is wanted"[:300])


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
