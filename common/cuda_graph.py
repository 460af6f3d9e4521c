"""Functions of tensors through CUDA graphs: one launch for all of their kernels, without Python in between.

At small batches a GPU waits for Python to launch one kernel after the other. A CUDA graph is a recording of the
launches, which the device goes through by itself, at fixed addresses. As with `common/replay.py`, a recording can't see
Python's values: it is made anew when any that a script's functions can read by name has changed, and its numbers are
compared with those of the plain code.
"""

import weakref

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from common.arguments import one_line
from common.replay import Reads

WARM_UP = 3  # calls as plain code before a graph is made: kernels are chosen and moments allocated in them
MAX_REMADE = 4  # sets of graphs, before values that keep changing make the plain code the faster one
MAX_KINDS = 16  # kinds of arguments, before those that keep changing make the plain code the faster one
EVERY = 16  # calls of which one is compared: in the paper's setting, once in an update phase
TOLERANCE = {"rtol": 1e-2, "atol": 1e-3, "equal_nan": True}  # of what is compared: kernels may round differently


class Cuda:
    """How CUDA warms a function up, and records it."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def warm_up(self, function):
        """``function()``, on a stream other than that of plain code, as graphs are recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, function):
        """A function that launches what ``function()`` launches, which is not run, and what it returns then."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = function()
        return graph.replay, result


class Graphed:
    """``plain(*args)``, whose work is on tensors alone, by a CUDA graph for each kind of arguments.

    args: nests of dicts, lists and tuples. Their tensors are copied to where the graph reads them, and may differ from
    call to call; one that is as it was at the call before is not copied again. What else they hold, and the tensors'
    shapes, make the kind. Of modules and optimizers, the tensors are read and written where they are: given others, or
    another number in an optimizer's settings, they are of another kind. What ``plain`` returns is written over by the
    next call of the kind.

    name: what it does, for messages. args: the script's, which it reads; elsewhere than on a CUDA device, with
    ``--compile`` and with ``--no-cuda-graphs``, ``plain`` runs alone. run: is told what goes wrong. expected(*args):
    some of the dict of tensors that ``plain`` returns, by plain code that changes nothing; compared once in EVERY.
    """

    def __init__(self, plain, name, args, device, run, expected=None, backend=Cuda):
        self.plain, self.name, self.run, self.expected = plain, name, run, expected
        self.off = device.type != "cuda" or args.compile or not args.cuda_graphs
        self.backend = None if self.off else backend()
        self.graphs, self.calls, self.since, self.remade = {}, {}, 0, 0
        self.reads = dict if self.off else Reads(args, plain)
        self.made_with = self.reads()

    def __call__(self, *args):
        """What ``plain`` gives, by a graph where there is one."""
        if not self.off and (reads := self.reads()) != self.made_with:
            self._forget(reads)
        if self.off:
            return self.plain(*args)
        leaves, spec = tree_flatten(args)
        kind = (spec, *map(_kind, leaves))
        if self.calls.setdefault(kind, 0) == 0 and len(self.calls) > MAX_KINDS:
            self._give_up("tensors or settings that it reads where they are keep being replaced")
            return self.plain(*args)
        if self.calls[kind] < WARM_UP:
            self.calls[kind] += 1
            return self.backend.warm_up(lambda: self.plain(*args))
        if kind not in self.graphs and not self._record(kind, leaves, spec):
            return self.plain(*args)
        replay, inputs, copied, result = self.graphs[kind]
        self.since += 1
        expected = torch.no_grad()(self.expected)(*args) if self.expected and self.since % EVERY == 1 else {}
        for i, x in enumerate(x for x in leaves if isinstance(x, torch.Tensor)):
            given, version = copied[i]
            if given() is not x or version != x._version:  # which each writing into it or into a view of it raises
                inputs[i].copy_(x, non_blocking=True)
                copied[i] = _state(x)
        replay()
        for name, x in expected.items():
            if not torch.allclose(result[name], x, **TOLERANCE):
                why = f"{name} is {result[name].item():.6g} in its CUDA graph, and {x.item():.6g} without"
                self.run.stop(f"{self.name} reads what changes from call to call, which needs --no-cuda-graphs: {why},")
        return result

    def _record(self, kind, leaves, spec):
        inputs = [x.clone() if isinstance(x, torch.Tensor) else None for x in leaves]
        own = [x if buffer is None else buffer for x, buffer in zip(leaves, inputs, strict=True)]
        try:
            replay, result = self.backend.record(lambda: self.plain(*tree_unflatten(own, spec)))
        except Exception as error:  # of code that somebody changed: whatever a recording has against it
            self._give_up(f"it can't be recorded ({type(error).__name__}: {error})")
            return False
        inputs, given = ([x for x in xs if isinstance(x, torch.Tensor)] for xs in (inputs, leaves))
        self.graphs[kind] = replay, inputs, list(map(_state, given)), result
        return True

    def _forget(self, reads):
        changed = [name for name, value in reads.items() if value != self.made_with.get(name)]
        self.made_with, self.graphs = reads, {}
        self.remade += 1
        if self.remade > MAX_REMADE:
            self._give_up(f"{' and '.join(changed)} keeps changing, and is no tensor")

    def _give_up(self, why):
        self.off, self.graphs = True, {}
        self.run.say(one_line(f"{self.name} runs without CUDA graphs, which is slower: {why}"[:300]))


def _kind(x):
    """What a graph depends on of an argument: of a tensor how it is laid out, of a plain value itself.

    Of a module and of an optimizer it is where their tensors are, and an optimizer's settings.
    """
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, torch.nn.Module):
        return id(x), tuple(_place(p) for p in (*x.parameters(), *x.buffers()))
    if isinstance(x, torch.optim.Optimizer):
        settings = (value for group in x.param_groups for name, value in group.items() if name != "params")
        moments = (value for state in x.state.values() for value in state.values())
        return id(x), tuple(map(_place, settings)), tuple(map(_place, moments))
    return x if isinstance(x, bool | int | float | str | None) else id(x)


def _state(x):
    """Which tensor it is, even where another comes to lie in its place, and what has been written into it."""
    return weakref.ref(x), x._version


def _place(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def fused_adam(learning_rate, agent):
    """Settings of Adam for one fused step; on CUDA with a learning rate and counts that are tensors of the device's."""
    device = next(agent.parameters()).device
    if device.type != "cuda":
        return {"lr": learning_rate, "fused": True}
    return {"lr": torch.tensor(learning_rate, device=device), "fused": True, "capturable": True}


def set_learning_rate(optimizers, learning_rate):
    """Give all parameters of ``optimizers`` a learning rate, where a CUDA graph reads it too."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def reset(optimizers):
    """Forget the moments and steps of ``optimizers``: all are 0, where a CUDA graph reads them too."""
    for state in (state for optimizer in optimizers for state in optimizer.state.values()):
        for x in state.values():
            x.zero_()
