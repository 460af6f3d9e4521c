"""Copies of one module as a batch: their weights are the rows of one tensor, and one call serves all of them."""

import operator
from itertools import chain

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from common.arguments import one_line

ALIGNED = 16  # floats: where a tensor of its own would begin, since products round by where their operands lie


class Batch:
    """``modules`` of one architecture, S of them, whose parameters become views of ``rows``, (S, width).

    Whoever changes a parameter of a module, in place or by giving it other data, changes its row; buffers likewise.
    Between parameters there may be zeros. A batch knows tensors alone, so that `check` compares it with the modules,
    each by itself; ``say`` prints a line where they have to be called one after the other.
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
        self.places = []  # of each buffer of each module: the dict that holds it, its name there, and itself
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
        for path, x in self.buffers.items():
            owner, _, name = path.rpartition(".")
            for s, module in enumerate(modules):
                held = module.get_submodule(owner)._buffers
                held[name].data = x[s]
                self.places.append((held, name, held[name]))
        self.batched = len(modules) > 1
        self.gradient = torch.zeros_like(self.rows)  # those of the last step, each parameter's ``grad``
        for i, x in enumerate(self.pieces(self.gradient)):
            for s, own in enumerate(self.parameters):
                own[i].grad = x[s]

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

    def hold(self, grad):
        """The gradients ``grad``, like rows, as what the parameters have for ``grad``."""
        return self.gradient if grad is self.gradient else self.gradient.copy_(grad)

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
        """Take over the values of parameters and buffers that were given other data than their rows."""
        for held, name, own in self.places:
            if held[name] is not own:
                own.copy_(held[name])
                held[name] = own
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
                    self._part(f"{type(error).__name__}: {error}")
            of_each = [function(m, *tree_map(lambda x, s=s: x[s], args)) for s, m in enumerate(self.modules)]
            return tree_map(_stack, *of_each)

        return call

    def _part(self, why):
        self.batched = False
        self.say(f"the seeds are computed one after the other, which is slower ({one_line(why)[:200]})")

    @torch.no_grad()
    def check(self, function, *args):
        """Whether ``function(*args)``, of what `each` gives, is of the batch what it is of each module by itself.

        Where it isn't, as with what a module holds beside parameters and buffers, the batch is not used any more. How
        far rounding may part them is seen by arguments that are a millionth off.
        """
        if not self.batched:
            return True
        state, buffers = torch.get_rng_state(), [x.clone() for x in self.buffers.values()]
        results = []
        for batched in (True, False):
            was, self.batched = self.batched, batched
            with torch.enable_grad():
                results.append([x.clone() for x in tree_leaves(function(*args))])  # a CUDA graph writes over them
            same = torch.equal(state, torch.get_rng_state())
            torch.set_rng_state(state)
            for x, before in zip(self.buffers.values(), buffers, strict=True):
                x.copy_(before)
            if not was:  # vmap had something against it
                return False
        self.batched = True
        if not same:
            self._part("random numbers are drawn, which a batch draws otherwise")
        elif not all(map(_alike, *results)):
            self.batched = False
            with torch.enable_grad():
                moved = tree_leaves(function(*tree_map(_moved, args)))
            if all(map(_alike, *results, moved)):
                self.batched = True
            else:
                self._part("as a batch they give other numbers")
            for x, before in zip(self.buffers.values(), buffers, strict=True):
                x.copy_(before)
        return self.batched

    def gradients(self, loss):
        """Those of a loss (S,) of each module by its own parameters, in their order, (S, …) each; 0 of frozen ones."""
        free = [p.requires_grad for p in self.of_all]
        if self.batched:
            grads = torch.autograd.grad(loss.sum(), self.leaves, allow_unused=True, materialize_grads=True)
            if all(free):
                return list(grads)
            grads = [x[s] for s in range(len(self.modules)) for x in grads]
        else:
            leaves = [p for p in self.of_all if p.requires_grad]
            found = iter(torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True))
            grads = [next(found) if own else p for p, own in zip(self.of_all, free, strict=True)]
        grads = [x if own else torch.zeros_like(x) for x, own in zip(grads, free, strict=True)]
        of_each = [grads[i : i + len(self.sizes)] for i in range(0, len(grads), len(self.sizes))]
        return list(map(_stack, *of_each))


class _Bound(torch.nn.Module):
    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args):
        return self.function(self.module, *args)


def _moved(x):
    """An argument with its numbers a millionth off, by draws of a generator of its own."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return x * (1 + 1e-6 * noise)


def _alike(x, y, moved=None):
    """Whether tensors (S, …) are by row the same, but for rounding or three times what ``moved`` is off."""
    x, y, moved = (z.detach().reshape(len(z), -1) for z in (x, y, y if moved is None else moved))
    finite = x.isfinite() & y.isfinite()
    size, off = (torch.where(finite, z.abs(), 0).amax(1, keepdim=True) for z in (y, moved - y))
    near = (x - y).abs() <= 1e-3 * size + 3 * off.nan_to_num(torch.inf) + 1e-6
    return bool(torch.where(finite, near, x.isfinite() == y.isfinite()).all())


def _stack(first, *others):
    return torch.stack([first, *others]) if others else first.unsqueeze(0)


class Optimizers:
    """The optimizers of the modules of a Batch, which take their steps in one call.

    That call is the kernel of Adam and AdamW, on rows, without the bookkeeping of ``step()``, which on small networks
    takes longer than the step. Optimizers of another kind, or whose settings differ, take a step each. find: gives the
    optimizers as they now are, a tuple for each module.
    """

    def __init__(self, batch, find):
        self.batch, self.find = batch, find
        self.rows = list(batch.rows)
        self.moments = {name: torch.zeros_like(batch.rows) for name in ("exp_avg", "exp_avg_sq")}
        self.of_each = [x.unbind() for x in self.moments.values()]
        self.counts = [torch.zeros((), device=batch.rows.device) for _ in self.rows]
        self.all = None  # of them, one after the other
        self._take_over()

    def _take_over(self):
        """Look which optimizers there are now."""
        self.optimizers = self.find()
        found = list(chain(*self.optimizers))
        if found == self.all:
            return
        self.all = found
        pieces = {name: self.batch.pieces(x) for name, x in self.moments.items()}
        self.states = []  # of each module, and of each of its parameters: its optimizer, and the views of its moments
        for s, own in enumerate(self.optimizers):
            owner = {p: optimizer for optimizer in own for group in optimizer.param_groups for p in group["params"]}
            if owner.keys() != set(self.batch.parameters[s]):
                raise ValueError("the optimizers must have every parameter of the agent, and no other")
            views = [{name: x[i][s] for name, x in pieces.items()} for i in range(len(self.batch.sizes))]
            self.states.append([(owner[p], p, x) for p, x in zip(self.batch.parameters[s], views, strict=True)])
        self.adopted = [(None,) for _ in self.optimizers]  # what the state of a module's optimizers held when adopted

    @torch.no_grad()
    def step(self, grad, learning):
        """grad: like the batch's rows, and then each parameter's ``grad``; learning: the modules that take the step."""
        grad = self.batch.hold(grad)
        self._take_over()
        settings = self._settings()
        if settings is None or not all(self._adopt(s) for s in learning):
            pieces = self.batch.pieces(grad)
            for s in learning:
                for optimizer, p, _ in self.states[s]:
                    if p in optimizer.state and optimizer.state[p].get("step") is self.counts[s]:
                        optimizer.state[p]["step"] = self.counts[s].clone()  # step() counts for each parameter
                for p, x in zip(self.batch.parameters[s], pieces, strict=True):
                    p.grad = x[s] if p.requires_grad else None
                for optimizer in self.optimizers[s]:
                    optimizer.step()
            return
        lr, (beta1, beta2), eps, weight_decay, maximize, decoupled, _, _ = settings
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
        if not all(map(_REQUIRES_GRAD, self.batch.of_all)):  # weight decay would move frozen ones
            return None
        known = _ADAMS.issuperset(map(type, self.all))
        if not known or any(map(_PRE_HOOKS, self.all)) or any(map(_POST_HOOKS, self.all)):
            return None
        groups = list(map(_GROUPS, self.all))
        if any(len(x) != 1 for x in groups):
            return None
        settings = [_SETTINGS(group) for (group,) in groups]
        *_, amsgrad, fused = settings[0]
        return settings[0] if fused and not amsgrad and settings.count(settings[0]) == len(settings) else None

    def _adopt(self, s):
        """Make the state of module ``s``'s optimizers that of its row; False if its parameters have other counts."""
        if all(map(operator.is_, self._held(s), self.adopted[s])):
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
        self.adopted[s] = list(self._held(s))
        return True

    def _held(self, s):
        """What the state of module ``s``'s optimizers holds, found without hashing a parameter, and an end."""
        states = chain.from_iterable(x.state.values() for x in self.optimizers[s])
        return chain(chain.from_iterable(map(dict.values, states)), _END)


_SETTINGS = operator.itemgetter(
    *("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay", "amsgrad", "fused")
)
_END = (object(),)
_ADAMS = {torch.optim.Adam, torch.optim.AdamW}
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_GROUPS = operator.attrgetter("param_groups")
_PRE_HOOKS = operator.attrgetter("_optimizer_step_pre_hooks")
_POST_HOOKS = operator.attrgetter("_optimizer_step_post_hooks")
