"""Functions of tensors, run as a recording of their operations: without Python, and never other than the plain code.

Where networks are small, most of an operation's time goes into Python and autograd's bookkeeping. A recording has the
operations one after the other, those of a backward pass too, and reads weights where they are. What it can't see are
Python's values: they are as they were when it was made. So it is made anew when any of the values that a script's
functions can read by name has changed, it is compared with the plain code, and it gives way to it where they differ by
more than rounding does.
"""

import builtins
import contextlib
import dis
import inspect
import itertools
import operator
import types
import warnings
from functools import partial
from types import NoneType

import numpy as np
import torch
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.proxy import GraphAppendingTracer

from common.arguments import one_line

aten = torch.ops.aten
READABLE = (int, float, str, np.number, np.bool_, NoneType)
MAX_REMADE = 4  # recordings, before values that keep changing make the plain code the faster one


class Reads:
    """Python values that the functions of a script can read by name: called, it gives a dict of them as they now are.

    These are the fields of ``args``, and the numbers and strings among the globals that the code of any function or
    class of ``function``'s module names, or in a list or dict among these. What other globals hold isn't read.
    """

    def __init__(self, args, function):
        self.args, self.script = vars(args), inspect.unwrap(function).__globals__
        here = [x for x in self.script.values() if getattr(x, "__module__", None) == function.__module__]
        code = {name for x in (*here, function) for name in _globals_of(x, self.script)}
        found = {name: self.script.get(name) for name in code}  # None where the main block will make one
        readable = (*READABLE, list, dict)
        names = [name for name, x in found.items() if isinstance(x, readable) and not hasattr(builtins, name)]
        self.names = {f"global {name}": name for name in names}

    def __call__(self):
        found = self.args.copy()
        for key, name in self.names.items():
            value = self.script.get(name)
            found[key] = value if isinstance(value, READABLE) else _numbers_in(value)
        return found


def _numbers_in(x):
    """The numbers and strings among the first 100 of a list or dict, by their place; None of anything else."""
    places = enumerate(x) if isinstance(x, list) else x.items() if isinstance(x, dict) else None
    return places and [(at, value) for at, value in itertools.islice(places, 100) if isinstance(value, READABLE)]


def _globals_of(x, script):
    """The names of globals of ``script`` in the code of a function, of a class's methods, or of a code object."""
    if isinstance(x, type):
        return {name for method in vars(x).values() for name in _globals_of(method, script)}
    x = inspect.unwrap(getattr(x, "fget", x))  # of a property
    code = getattr(x, "__code__", x)
    if not isinstance(code, types.CodeType) or getattr(x, "__globals__", script) is not script:
        return set()
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(_globals_of(inner, script) for inner in code.co_consts))


class Replay:
    """``plain(*tensors)``, which returns a tuple of tensors, by a recording of its operations.

    name: what it does, for messages. reads: gives a dict of the Python values that it reads, as Reads does. state:
    gives the tensors that it may change. say: prints a line. off: whether ``plain`` is to run alone. in_numpy: whether
    NumPy may run it, which has a fraction of PyTorch's overhead and rounds differently, where it has all of the
    operations and none is large. Gradients of several seeds round differently too, those of one seed don't. check: a
    Batch's, for ``plain`` that is of one.
    """

    def __init__(self, plain, name, reads, state, say, off, in_numpy=False, check=None):
        self.plain, self.name, self.reads, self.state, self.say = plain, name, reads, state, say
        self.off, self.in_numpy, self.check = off, in_numpy, check
        self.program, self.slower_than = None, set()
        self.tolerance = self.share = 0.0  # by which it may differ: absolutely, and of the largest number of a row
        self.remade = 0

    def __call__(self, *tensors):
        """What ``plain`` gives, by the recording where there is one."""
        if not self.off and self._stale():
            self._make(tensors)
        return self.plain(*tensors) if self.off else self.program(*tensors)

    def checked(self, *tensors, trial):
        """As a call, but ``plain`` runs too, and from then on alone if even a new recording differs from it.

        In a ``trial``, within which nothing that is read may change, it does so if the recording differs.
        """
        if self.check and not self.check(self.plain, *tensors):
            self.program = None  # it may have been of the batch
        if self.off:
            return self.plain(*tensors)
        fresh = self._stale()
        before = self._effects()
        expected = self.plain(*tensors)
        if self._effects() != before:
            self._give_up("it draws random numbers or changes buffers of its own")
            return expected
        result = self(*tensors)
        if not self._same(result, expected) and not fresh and not trial:
            self._make(tensors)
            result = expected if self.off else self.program(*tensors)
        if not self._same(result, expected):
            self._give_up("a recording gives other numbers, since it reads what changes from call to call")
        return expected if self.off else result

    def begin(self, *tensors, trial):
        """Compare the recording with ``plain`` once; how to call it from then on, in a ``trial`` compared each time."""
        self.checked(*tensors, trial=False)
        return partial(self.checked, trial=True) if trial else self

    def agrees(self, *tensors):
        """Whether the recording, if it is in use, still gives what ``plain`` gives."""
        return self.off or self.gives(self.plain(*tensors), *tensors)

    def gives(self, expected, *tensors):
        """Whether the recording, if it is in use, gives ``expected``."""
        return self.off or self._same(self(*tensors), expected)

    def _stale(self):
        return self.program is None or self.reads() != self.made_with

    def _same(self, result, expected):
        if self.off:
            return True
        return all(_within(self.tolerance, self.share, x, y) for x, y in zip(result, expected, strict=True))

    def _effects(self):
        return torch.get_rng_state().numpy().tobytes(), [x._version for x in self.state()]

    def _slower(self, other, error):
        if other not in self.slower_than:
            self.slower_than.add(other)
            why = f"{type(error).__name__}: {error}"
            self.say(one_line(f"{self.name} is recorded, but not for {other}, which would be faster: {why}"[:300]))

    def _give_up(self, why):
        self.off, self.program = True, None
        self.say(one_line(f"{self.name} runs as plain code, which is slower: {why}"[:300]))

    @torch.no_grad()
    def _make(self, tensors):
        self.remade += self.program is not None
        reads = self.reads()
        if self.remade > MAX_REMADE:
            changed = [name for name, value in reads.items() if value != self.made_with.get(name)]
            why = f"{' and '.join(changed) or 'a value that it reads'} keeps changing, and is no tensor"
            return self._give_up(why)
        self.made_with = dict(reads)
        try:
            with torch.enable_grad(), _no_numbers():
                graph = make_fx(self.plain)(*tensors)
            turned = simplify(graph)
            program = numpy_program(graph, tensors, self._slower) if self.in_numpy and small(graph) else None
            self.tolerance, self.share = (1e-4 if program else 0.0), (1e-4 if turned else 0.0)
            self.program = program or torch_program(graph, tensors, self._slower)
        except Exception as error:  # of a function that somebody changed: whatever recording it can raise
            self._give_up(f"it can't be recorded ({type(error).__name__}: {error})")


@contextlib.contextmanager
def _no_numbers():
    """Within it, what Python reads of a tensor's numbers is an error: a recording would keep them for ever."""

    def refuse(self, *args, **kwargs):
        raise RuntimeError("Python reads the numbers of a tensor")

    names = ("numpy", "tolist", "__array__")
    own = {name: vars(torch.Tensor)[name] for name in names if name in vars(torch.Tensor)}
    for name in names:
        setattr(torch.Tensor, name, refuse)
    try:
        yield
    finally:
        for name in names:
            setattr(torch.Tensor, name, own[name]) if name in own else delattr(torch.Tensor, name)


def _within(tolerance, share, x, y):
    """Whether the tensors are equal, or apart by no more than ``tolerance`` and a share of the largest number of a row.

    Rows are of seeds, of which one may have numbers that are not finite; two of these are equal.
    """
    same = (x == y) | ~(x.isfinite() | y.isfinite())
    if same.all():
        return True
    scale = torch.where(y.isfinite(), y.abs(), 0.0)
    scale = scale.amax(-1, keepdim=True) if y.ndim else scale
    return bool((same | ((x - y).abs() <= tolerance + share * scale)).all())


class Differentiate:
    """``gradients`` by recordings, which know tensors alone: one with everything that is logged, one with less."""

    def __init__(self, agents, gradients, *of_replay):
        self.agents, self.gradients, self.of_replay, self.names, self.replays = agents, gradients, of_replay, {}, {}
        self.last = []  # the last tensors of the last phase, until they were compared in this one
        self.agreed = False  # whether the last minibatch was done as plain code, and the recordings agreed with it
        self.phases = 0  # that are done; the first is a trial

    def __call__(self, mb, kl_coef, everything, plain, checked, trial):
        """The gradients and what is logged; ``plain`` is without a recording, ``checked`` and ``trial`` are for one."""
        self.agents.adopt()
        self.agreed = False
        begins = checked and bool(self.last)
        by_itself = trial or (begins and self.phases % 8 == 1)  # it takes as long as a step of each seed
        if by_itself and not self.agents.check(self.gradients, mb, kl_coef, everything):
            self.replays.clear()  # they may have been of the batch
        if plain:
            grad, logged = self.gradients(mb, kl_coef, everything)
            self.agreed = not self.last and self._give(grad, logged, (kl_coef, *mb.values()))
            # Copied, since a CUDA graph writes its next results over these.
            logged = dict(zip(logged, torch.stack(list(logged.values())).unbind(), strict=True))
            return self.agents.hold(grad), logged
        if everything not in self.replays:
            self.replays[everything] = Replay(self._flat(everything, list(mb)), "a gradient", *self.of_replay)
        replay = self.replays[everything]
        replay.off |= any(other.off for other in self.replays.values())
        tensors = kl_coef, *mb.values()
        if begins and not replay.off and [x.shape for x in tensors] == [x.shape for x in self.last]:
            replay.checked(*self.last, trial=False)  # with clipped ratios, of which a phase has none at its beginning
            checked = False
        self.last = [] if begins else self.last
        if checked or trial:
            grad, logged = replay.checked(*tensors, trial=trial)
        else:
            grad, logged = replay(*tensors)
        return self.agents.hold(grad), dict(zip(self.names[everything], logged.unbind(), strict=True))

    def _give(self, grad, logged, tensors):
        """Whether the recordings give what plain code gave, as far as they have it."""
        for everything, replay in self.replays.items():
            names = self.names.get(everything, ())
            if not names or not {*names} <= logged.keys():
                return False
            if not replay.gives((grad, torch.stack([logged[name] for name in names])), *tensors):
                return False
        return True

    def _flat(self, everything, columns):
        def flat(kl_coef, *tensors):
            grad, logged = self.gradients(dict(zip(columns, tensors, strict=True)), kl_coef, everything)
            self.names[everything] = list(logged)
            return grad, torch.stack(list(logged.values()))

        return flat

    def agrees(self, mb, kl_coef):
        """Whether the recordings still give what the plain code gives, at the end of an update phase."""
        self.agents.adopt()
        self.phases += 1
        self.last = kl_coef, *mb.values()
        replays = self.replays.values()
        if self.agreed or any(replay.off for replay in replays):
            return True
        return all(replay.agrees(*self.last) for replay in replays)


def compiled(function, device):
    """``function`` through torch.compile with static shapes, on CUDA as CUDA graphs."""
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")

    def call(*args):
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be written over
        return fast(*args)

    return call


def simplify(graph):
    """Take from a recorded graph, in place, what does nothing: gradients are done, shapes are known, views cancel.

    Gradients of several seeds' linear layers are then computed as those of one seed are, in the layout of the weights.
    True if there are such, which round otherwise than the plain code.
    """
    for rewrite in (_constant, _same_as, _turned, _same_as):
        for node in graph.graph.nodes:
            same = node.op == "call_function" and rewrite(node)
            if same:
                node.replace_all_uses_with(same)
        graph.graph.eliminate_dead_code()
    graph.recompile()
    return any("turned" in node.meta for node in graph.graph.nodes)


def _constant(node):
    """For a number that vmap makes a tensor of, at each call, a tensor that is there, or None."""
    makes_tensors = (aten._to_copy.default, aten.scalar_tensor.default)
    if node.target not in makes_tensors or isinstance(node.args[0], torch.fx.Node):
        return None
    if any(getattr(getattr(user.target, "_schema", None), "is_mutable", False) for user in node.users):
        return None
    value, name = node.meta["val"], f"_{node.name}"
    number = torch.full((), node.args[0], dtype=value.dtype, device=value.device)
    node.graph.owning_module.register_buffer(name, number)
    with node.graph.inserting_before(node):
        same = node.graph.get_attr(name)
    same.meta["val"] = value
    return same


def _turned(node):
    """For the transpose of a batched product x^T y, the product y^T x, or None."""
    product = node.args[0] if node.args else None
    if node.target != aten.transpose.int or not _is(product, aten.bmm.default) or len(product.users) > 1:
        return None
    turned, y = product.args
    if not (_is(turned, aten.transpose.int) and turned.args[1:] == node.args[1:] == (1, 2)):
        return None
    with node.graph.inserting_before(node):
        other = node.graph.call_function(aten.transpose.int, (y, 1, 2))
        other.meta["val"] = y.meta["val"].transpose(1, 2)
        same = node.graph.call_function(aten.bmm.default, (other, turned.args[0]))
    same.meta.update(val=node.meta["val"].contiguous(), turned=True)
    return same


def _is(node, target):
    return isinstance(node, torch.fx.Node) and node.target == target


def _same_as(node):
    """A node before ``node`` that has the same values, shape and strides, or None."""
    target, x = node.target, node.args[0] if node.args else None
    if not isinstance(x, torch.fx.Node):
        return None
    if target == aten.detach.default:
        return x
    if target == aten.clone.default and x.target == aten.bmm.default and len(x.users) == 1:
        return x  # it was to lay out what is laid out already, and nobody else has it
    if target in (aten.view.default, aten.expand.default, aten._unsafe_view.default):
        if target == aten.view.default and x.target == aten.unsqueeze.default:
            node.args = (x.args[0], *node.args[1:])
        return x if x.meta["val"].shape == node.meta["val"].shape else None
    if target == aten.mul.Scalar:
        return x if node.args[1] == 1 and x.meta["val"].dtype == node.meta["val"].dtype else None
    if (
        target == aten.select.int
        and node.args[1:] == (0, 0)
        and x.target in (aten.unsqueeze.default, aten.view.default)
    ):
        return x.args[0] if (1, *x.args[0].meta["val"].shape) == x.meta["val"].shape else None
    inverse = target in (aten.t.default, aten.transpose.int) or (
        target == aten.permute.default and node.args[1] == [0, 2, 1]
    )
    return x.args[0] if inverse and x.target == target and x.args[1:] == node.args[1:] else None


def torch_program(graph, tensors, slower):
    """The graph as TorchScript's interpreter runs it, or Python where that lacks an operation.

    slower: called with the name of what would have been faster and the error, if there was one.
    """
    # Deprecated, and still the fastest way to run operations as they are. AOTInductor takes half the time for a
    # seed's gradient, but a C++ compiler and half a minute for each recording, and its rounding can't be told from a
    # program that is wrong; torch.compile has these faults and gains a tenth; Python costs what recording saves.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)  # of annotations that FX writes
        try:
            program = torch.jit.trace(graph, tensors, check_trace=False)
        except RuntimeError:  # of arguments that are lists of booleans, as the gradient of a LayerNorm has
            program = _scripted(graph, slower)
    return torch.no_grad()(program)


def _scripted(graph, slower):
    """The graph as TorchScript that is made of its source, or Python where that can't be."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket  # which TorchScript's language knows by name
    graph.recompile()
    try:
        return torch.jit.script(graph)
    except Exception as error:  # of operations that somebody's change brought: whatever TorchScript has against them
        slower("TorchScript", error)
        return graph.forward


def small(graph):
    """Whether no matrix product of the graph is worth more than the overhead of its call."""
    for node in graph.graph.nodes:
        if node.target in (aten.addmm.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default):
            x, weight = (arg.meta["val"] for arg in node.args[-2:])
            if x.numel() * weight.shape[-1] >= 2**17:
                return False
    return True


def _call(function):
    """``function`` of arrays for what stands for an array of the program, as its operators and methods are for it."""

    def call(*args):
        if isinstance(args[0], Proxy):
            return args[0].tracer.create_proxy("call_function", function, args, {})
        return function(*args)

    return call


_maximum, _minimum = _call(np.maximum), _call(np.minimum)


def _clamp(x, low=None, high=None):
    x = x if low is None else _maximum(x, low)
    return x if high is None else _minimum(x, high)


def _split(x, size, dim=0):
    before = (slice(None),) * (dim % len(x.shape))
    return [x[(*before, slice(i, i + size))] for i in range(0, x.shape[dim], size)]


def _select(x, dim, i):
    return x[(slice(None),) * (dim % len(x.shape)) + (i,)]


def _softplus_of_float32(x):
    return np.logaddexp(x, np.float32(0))


# PyTorch's operations in NumPy, as far as they agree in shapes and types
VIEWS = {
    aten.t.default: lambda x: x.transpose(),
    aten.transpose.int: lambda x, *dims: x.swapaxes(*dims),
    aten.view.default: lambda x, shape: x.reshape(shape),
    aten._unsafe_view.default: lambda x, shape: x.reshape(shape),
    aten.expand.default: _call(np.broadcast_to),
    aten.unsqueeze.default: _call(np.expand_dims),
    aten.squeeze.dim: lambda x, dim: x.squeeze(dim),
    aten.select.int: _select,
}
IN_NUMPY = {
    **VIEWS,
    operator.getitem: operator.getitem,
    aten.split.Tensor: _split,
    aten.addmm.default: lambda bias, x, weight: x @ weight + bias,
    aten.mm.default: operator.matmul,
    aten.bmm.default: operator.matmul,
    aten.add.Tensor: lambda x, y, alpha=1: x + (y if alpha == 1 else alpha * y),
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.addcmul.default: lambda x, y, z: x + y * z,
    aten.tanh.default: _call(np.tanh),
    aten.relu.default: lambda x: _maximum(x, 0),
    aten.exp.default: _call(np.exp),
    aten.log.default: _call(np.log),
    aten.softplus.default: _call(_softplus_of_float32),
    aten.clamp.default: _clamp,
}


def numpy_program(graph, tensors, slower):
    """The graph as a function of tensors by NumPy, or None if it has an operation that isn't known in it.

    It is tried on ``tensors``, since PyTorch's operations may be called with arguments that NumPy's don't have; then
    ``slower`` is called, as in torch_program.
    """
    try:
        program = _in_numpy(graph)
        if program:
            program(*tensors)
    except Exception as error:  # of operations or arguments that NumPy has otherwise: PyTorch's program takes them
        slower("NumPy", error)
        return None
    return program


def _in_numpy(graph):
    ours, root = Graph(), torch.nn.Module()
    tracer = GraphAppendingTracer(ours)
    values = {}  # by node: what stands for an array at each call, or the array itself where it is there already

    def stand_in(node):
        return Proxy(node, tracer)

    def constant(x, name):
        setattr(root, name, x)
        found = stand_in(ours.get_attr(name))
        found.shape = x.shape
        return found

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = stand_in(ours.placeholder(node.name))
        elif node.op == "get_attr":  # weights: shared with the tensor, and so as they are at each call
            values[node] = operator.attrgetter(node.target)(graph).detach().numpy()
        elif node.op == "output":
            outputs = [values[x] for x in node.args[0]]
            outputs = [constant(x, f"output{i}") if isinstance(x, np.ndarray) else x for i, x in enumerate(outputs)]
            ours.output(tuple(x.node for x in outputs))
        else:
            if node.target not in IN_NUMPY:
                return None
            args = [values[x] if isinstance(x, torch.fx.Node) else x for x in node.args]
            if node.target in VIEWS and isinstance(args[0], np.ndarray):
                values[node] = VIEWS[node.target](*args)
                if not np.shares_memory(values[node], args[0]):
                    return None
                continue
            args = [constant(x, f"{node.name}_{i}") if isinstance(x, np.ndarray) else x for i, x in enumerate(args)]
            values[node] = IN_NUMPY[node.target](*args, **node.kwargs)
        if isinstance(values.get(node), Proxy):
            values[node].shape = tuple(node.meta["val"].shape)  # which its own would be known at each call alone
    ours.eliminate_dead_code()
    run = GraphModule(root, ours).forward

    def program(*tensors):
        return [torch.from_numpy(x) for x in run(*[x.numpy() for x in tensors])]

    return program
