"""Copies of one module as a batch: their weights are the rows of one tensor, and one call serves all of them."""

import operator

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_map

from common.arguments import one_line

ALIGNED = 16  # floats: where a tensor of its own would begin, since products round by where their operands lie


class Batch:
    """``modules`` of one architecture, S of them, whose parameters become views of ``rows``, (S, width).

    Whoever changes a parameter of a module, in place or by giving it other data, changes its row. Between parameters
    there may be zeros. ``say`` prints a line where the modules have to be called one after the other.
    """

    def __init__(self, modules, say=print):
        self.modules, self.say = modules, say
        self.parameters = [list(module.parameters()) for module in modules]
        self.sizes = [p.numel() for p in self.parameters[0]]
        self.gaps = [-size % ALIGNED for size in self.sizes]
        self.rows = self.flat([torch.stack(of_each).detach() for of_each in zip(*self.parameters, strict=True)])
        stacked = self.pieces(self.rows)
        self.views = [[x[s] for x in stacked] for s in range(len(modules))]
        self.of_all = [p for own in self.parameters for p in own]
        self.addresses = [view.data_ptr() for own in self.views for view in own]
        self.adopt()
        self.leaves = [x.detach().requires_grad_() for x in stacked]
        by_id = {id(p): x for p, x in zip(self.parameters[0], self.leaves, strict=True)}
        # Each place that holds a parameter, once: places may share one, and modules may be in several places.
        self.stacked = {
            f"{path}.{name}".lstrip("."): by_id[id(p)]
            for path, module in modules[0].named_modules()
            for name, p in module.named_parameters(recurse=False)
        }
        names = [name for name, _ in modules[0].named_buffers()]
        self.buffers = {name: torch.stack([module.get_buffer(name) for module in modules]) for name in names}
        for name, x in self.buffers.items():
            for s, module in enumerate(modules):
                module.get_buffer(name).data = x[s]
        self.batched = len(modules) > 1
        self.gradient = None  # like rows: that of the last step of its Optimizers

    def flat(self, tensors):
        """Tensors (S, …), one for each parameter, as one like ``rows``."""
        parts = []
        for x, gap in zip(tensors, self.gaps, strict=True):
            parts += [x.flatten(1), *([torch.zeros((len(x), gap), dtype=x.dtype, device=x.device)] if gap else [])]
        return torch.cat(parts, dim=1)

    def pieces(self, x):
        """The views (S, …) of a tensor like ``rows`` that belong to each parameter."""
        parts = x.split([n for size, gap in zip(self.sizes, self.gaps, strict=True) for n in (size, gap)], dim=1)[::2]
        return [part.unflatten(1, p.shape) for part, p in zip(parts, self.parameters[0], strict=True)]

    def last_gradients(self, s):
        """Those of module s at the last step of its Optimizers, in the order of its parameters."""
        return [x[s] for x in self.pieces(self.gradient)]

    def columns(self, parts):
        """The columns of ``rows`` of each of ``parts(module)``, which are all of the module, one after the other."""
        names, begin, found = {id(p): i for i, p in enumerate(self.parameters[0])}, 0, []
        widths = [size + gap for size, gap in zip(self.sizes, self.gaps, strict=True)]
        for part in parts(self.modules[0]):
            end = begin + sum(widths[names[id(p)]] for p in part.parameters())
            found.append(slice(begin, end))
            begin = end
        if begin != self.rows.shape[1]:
            raise ValueError("the agent's parts must have each of its parameters, once and in their order")
        return found

    def state(self):
        """The buffers of all modules, which a call may change."""
        return [*self.buffers.values(), *(x for module in self.modules for x in module.buffers())]

    def adopt(self):
        """Take over the values of parameters that were given other data than their rows."""
        if list(map(torch.Tensor.data_ptr, self.of_all)) == self.addresses:  # a tenth of the time that the loop takes
            return
        for parameters, views in zip(self.parameters, self.views, strict=True):
            for p, view in zip(parameters, views, strict=True):
                if p.data_ptr() != view.data_ptr():
                    with torch.no_grad():
                        view.copy_(p)
                    p.data = view

    def each(self, function):
        """``function(module, *args)`` of one module as a function of all: from tensors (S, …) to tensors (S, …)."""
        bound = _Bound(self.modules[0], function)

        def of_one(parameters, buffers, *args):
            tensors = {f"module.{name}": x for name, x in (parameters | buffers).items()}
            return functional_call(bound, tensors, args, tie_weights=False)

        def call(*args):
            if self.batched:
                try:
                    return torch.vmap(of_one, randomness="different")(self.stacked, self.buffers, *args)
                except Exception as error:  # of code that somebody changed: whatever vmap has against it
                    self.batched = False
                    why = one_line(f"{type(error).__name__}: {error}")[:200]
                    self.say(f"the seeds are computed one after the other, which is slower ({why})")
            of_each = [function(m, *tree_map(lambda x, s=s: x[s], args)) for s, m in enumerate(self.modules)]
            return tree_map(_stack, *of_each)

        return call

    def gradients(self, loss):
        """Those of a loss (S,) of each module by its own parameters, in their order, (S, …) each."""
        leaves = self.leaves if self.batched else self.of_all
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
        if self.batched:
            return list(grads)
        of_each = [grads[i : i + len(self.sizes)] for i in range(0, len(grads), len(self.sizes))]
        return list(map(_stack, *of_each))


class _Bound(torch.nn.Module):
    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args):
        return self.function(self.module, *args)


def _stack(first, *others):
    return torch.stack([first, *others]) if others else first.unsqueeze(0)


class Optimizers:
    """The optimizers of the modules of a Batch, a tuple for each module, which take their steps in one call.

    That call is the kernel of Adam and AdamW, on rows, without the bookkeeping of ``step()``, which on small networks
    takes longer than the step. Optimizers of another kind, or whose settings differ, take a step each.
    """

    def __init__(self, batch, optimizers):
        self.batch, self.optimizers = batch, optimizers
        self.rows = list(batch.rows)
        self.moments = {name: torch.zeros_like(batch.rows) for name in ("exp_avg", "exp_avg_sq")}
        self.of_each = [x.unbind() for x in self.moments.values()]
        self.counts = [torch.zeros((), device=batch.rows.device) for _ in self.rows]
        pieces = {name: batch.pieces(x) for name, x in self.moments.items()}
        self.states = []  # of each module, and of each of its parameters: its optimizer, and the views of its moments
        for s, own in enumerate(optimizers):
            owner = {p: optimizer for optimizer in own for group in optimizer.param_groups for p in group["params"]}
            if owner.keys() != set(batch.parameters[s]):
                raise ValueError("the optimizers must have every parameter of the agent, and no other")
            views = [{name: x[i][s] for name, x in pieces.items()} for i in range(len(batch.sizes))]
            self.states.append([(owner[p], p, x) for p, x in zip(batch.parameters[s], views, strict=True)])
        self.adopted = [None] * len(optimizers)  # what the state of each module's optimizers held when it was adopted

    @torch.no_grad()
    def step(self, grad, learning):
        """grad: like the batch's rows; learning: the modules that take the step, as indices."""
        self.batch.gradient = grad
        settings = self._settings()
        if settings is None or not all(self._adopt(s) for s in learning):
            pieces = self.batch.pieces(grad)
            for s in learning:
                for optimizer, p, _ in self.states[s]:
                    if p in optimizer.state and optimizer.state[p].get("step") is self.counts[s]:
                        optimizer.state[p]["step"] = self.counts[s].clone()  # step() counts for each parameter
                for p, x in zip(self.batch.parameters[s], pieces, strict=True):
                    p.grad = x[s]
                for optimizer in self.optimizers[s]:
                    optimizer.step()
            return
        lr, (beta1, beta2), eps, weight_decay, maximize, decoupled = settings
        lists = (self.rows, grad.unbind(), *self.of_each, self.counts)
        rows, grads, exp_avgs, exp_avg_sqs, counts = ([x[s] for s in learning] for x in lists)
        torch._foreach_add_(counts, 1)
        (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
            *(rows, grads, exp_avgs, exp_avg_sqs, [], counts),
            **{"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps},
            **{"amsgrad": False, "maximize": maximize},
        )

    def _settings(self):
        """What all optimizers have set, or None if one call can't serve them."""
        found = None
        for optimizer in (optimizer for own in self.optimizers for optimizer in own):
            if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or len(optimizer.param_groups) != 1:
                return None
            (group,) = optimizer.param_groups
            settings = _SETTINGS(group)
            if group["amsgrad"] or not group["fused"] or settings != (found or settings):
                return None
            found = settings
        return found

    def _adopt(self, s):
        """Make the state of module ``s``'s optimizers that of its row; False if its parameters have other counts."""
        held = self._held(s)
        if held == self.adopted[s]:
            return True
        count, others = self.counts[s], []
        for optimizer, p, views in self.states[s]:
            state = optimizer.state[p]
            if not (
                state.get("step") is count
                and state.get("exp_avg") is views["exp_avg"]
                and state.get("exp_avg_sq") is views["exp_avg_sq"]
            ):
                others.append((state, views))
        if others:
            steps = {float(optimizer.state[p].get("step", 0)) for optimizer, p, _ in self.states[s]}
            if len(steps) > 1:
                return False
            count.fill_(steps.pop())
            for state, views in others:
                for name, view in views.items():
                    view.copy_(state[name]) if name in state else view.zero_()
                state.update(views, step=count)
        self.adopted[s] = self._held(s)
        return True

    def _held(self, s):
        """Which objects the state of module ``s``'s optimizers holds, found without hashing a parameter.

        Those that were adopted are kept alive here, so that no other object comes to have their ids.
        """
        return [list(map(id, state.values())) for x in self.optimizers[s] for state in x.state.values()]


_SETTINGS = operator.itemgetter("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")
