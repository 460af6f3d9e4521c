"""Recordings give what the plain code gives, or give way to it; a batch of modules is the modules one by one."""

import copy
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from common.batch import Batch, Optimizers
from common.replay import IN_NUMPY, MAX_REMADE, Differentiate, Reads, Replay, _within, simplify


def replay(plain, reads=None, state=list, **options):
    said = []
    return Replay(plain, "it", lambda: {} if reads is None else reads, state, said.append, False, **options), said


def test_a_value_that_was_named_is_read_anew():
    reads = {"a": 2.0}
    run, said = replay(lambda x: (reads["a"] * x,), reads)
    for a in (2.0, 3.0, 2.0):
        reads["a"] = a
        assert run(torch.ones(3))[0].tolist() == [a] * 3
    assert run.program is not None and not said
    for k in range(MAX_REMADE + 1):
        reads["a"] = 10.0 + k
        assert run(torch.ones(3))[0].tolist() == [10.0 + k] * 3
    assert run.off and said == ["it runs as plain code, which is slower: a keeps changing, and is no tensor"]


SCALE, SHIFT, POWER, KIND, TABLE, UNSEEN = 2.0, np.float32(1), 3, "tanh", {"a": 1.0}, 5.0


class Reader(nn.Module):
    @property
    def power(self):
        return POWER

    def forward(self, x):
        return sum(f(x) for f in (lambda x: SHIFT * x, getattr(torch, KIND)))


class Named(NamedTuple):  # of whose methods some are not of this module
    x: float = 1.0


@torch.no_grad()
def reader(x):
    return SCALE * x, TABLE["a"], NOT_YET  # noqa: F821


def test_what_functions_and_classes_of_a_script_can_read_by_name(monkeypatch):
    reads = Reads(SimpleNamespace(clip_coef=0.1), reader)
    found = {"SCALE": 2.0, "SHIFT": 1.0, "POWER": 3, "KIND": "tanh", "NOT_YET": None}
    expected = {"clip_coef": 0.1} | {f"global {name}": value for name, value in found.items()}
    assert reads().items() >= expected.items()
    assert not {"global UNSEEN", "global getattr", "global torch", "global _tuple_new"} & reads().keys()
    before = reads()
    monkeypatch.setitem(TABLE, "a", 7.0)  # in place
    assert reads() == before | {"global TABLE": [("a", 7.0)]} != before
    for name in ("SCALE", "SHIFT", "POWER", "KIND", "NOT_YET"):
        before = reads()
        monkeypatch.setitem(globals(), name, 7.0)
        assert reads() == before | {f"global {name}": 7.0} != before


def test_a_value_that_nobody_named_is_noticed():
    hidden = [2.0]
    run, said = replay(lambda x: (hidden[0] * x,))
    assert run.checked(torch.ones(3), trial=True)[0].tolist() == [2.0] * 3
    hidden[0] = 3.0
    assert not run.agrees(torch.ones(3))
    assert run.checked(torch.ones(3), trial=False)[0].tolist() == [3.0] * 3 and run(torch.ones(1)).__len__() == 1
    assert run.agrees(torch.ones(3)) and not said  # recorded anew
    hidden[0] = 4.0
    assert run.checked(torch.ones(3), trial=True)[0].tolist() == [4.0] * 3
    assert run.off and "reads what changes from call to call" in said[0]


@pytest.mark.parametrize(
    "plain, why",
    [
        (lambda x: (x * 2 if x.sum() > 0 else x,), "can't be recorded"),
        (lambda x: (x * torch.rand(()),), "draws random numbers"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(plain, why):
    run, said = replay(plain)
    torch.manual_seed(0)
    mine = run.checked(torch.ones(3), trial=True)[0]
    torch.manual_seed(0)
    assert torch.equal(mine, plain(torch.ones(3))[0]) and run.off
    assert len(said) == 1 and why in said[0]


def test_buffers_that_change_are_noticed():
    norm = nn.BatchNorm1d(4)
    run, said = replay(lambda x: (norm(x),), state=lambda: list(norm.buffers()))
    run.checked(torch.randn(8, 4), trial=True)
    assert norm.num_batches_tracked == 1 and run.off and "buffers of its own" in said[0]


@settings(deadline=None, max_examples=30)  # recording takes longest the first time
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 7),
    activation=st.sampled_from([torch.tanh, torch.relu, F.softplus, torch.exp]),
    seed=st.integers(0, 2**31),
)
def test_numpy_computes_what_torch_does(rows, columns, activation, seed):
    torch.manual_seed(seed)
    weight, bias = torch.randn(6, columns), torch.randn(6)

    def plain(x):
        a, b = activation(F.linear(x, weight, bias)).chunk(2, dim=-1)
        return (torch.addcmul(a, b, b).clamp(-3, 3) / 2 - 1, (a - b).unsqueeze(0))

    run, _ = replay(torch.no_grad()(plain), in_numpy=True)
    run(torch.randn(rows, columns))
    assert run.tolerance
    weight.mul_(0.5)
    x = torch.randn(rows, columns)
    for mine, theirs in zip(run(x), plain(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# Of tensors (N, 4), (4,) and (3, 4), each with another of NumPy's operations
OPERATIONS = {
    "products": lambda x, bias, weight: F.linear(x, weight) / F.linear(x, weight, weight.select(1, 0)).exp(),
    "batched": lambda x, bias, weight: torch.bmm((x * bias).unsqueeze(0), weight.exp().t().unsqueeze(0)),
    "vmap": lambda x, bias, weight: torch.vmap(F.linear)(x.exp().expand(2, *x.shape), weight.expand(2, 3, 4)),
    "parts": lambda x, bias, weight: torch.mul(*x.split(2, dim=1)) - (2 * x).select(1, -1).unsqueeze(1),
    "parts of weights": lambda x, bias, weight: x.split(2, dim=1)[0] * bias.split(2)[1] - bias.chunk(2)[0],
    "parts by rows": lambda x, bias, weight: (x + bias).exp().split(1)[-1].squeeze(0) * weight.select(0, -1),
    "shapes": lambda x, bias, weight: x.exp().view(2, -1).unsqueeze(1).expand(2, 3, 2 * len(x)).transpose(1, 2) + 1,
    "sums": lambda x, bias, weight: torch.add(x, bias, alpha=3).sub(0.5).addcmul(x, x),
    "bounds": lambda x, bias, weight: x.relu() + x.clamp(min=-0.5) + x.clamp(max=0.5) + (3 * x).clamp(-1, 1),
    "powers": lambda x, bias, weight: x.exp().log().tanh() + F.softplus(100 * x),
}


def in_numpy(function):
    """A recording of a function of one tensor and of two weights, which NumPy is to run, what it says, the weights."""
    weights = torch.randn(4), torch.randn(3, 4)
    return *replay(torch.no_grad()(lambda x: (function(x, *weights),)), in_numpy=True), weights


@settings(deadline=None, max_examples=50)  # recording takes longest the first time
@given(operation=st.sampled_from([*OPERATIONS]), rows=st.integers(1, 5), draw=st.integers(0, 2**31))
def test_each_operation_in_numpy_is_torch_s(operation, rows, draw):
    torch.manual_seed(draw)
    run, said, weights = in_numpy(OPERATIONS[operation])
    run(torch.randn(rows, 4))
    assert run.program is not None and not said and run.tolerance  # which PyTorch's programs don't need
    for weight in weights:
        weight.mul_(0.5)
    x = torch.randn(rows, 4)
    torch.testing.assert_close(run(x)[0], run.plain(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, *_: F.softplus(x, beta=2),
        lambda x, *_: x.unsqueeze(1).expand(-1, 2, -1) + 1,
        lambda x, *_: torch.sub(x, x.exp(), alpha=2),
        lambda x, bias, _: torch.addcmul(bias, x, x, value=0.5),
        lambda x, *_: x.exp().squeeze(0),
        lambda x, *_: x.exp().select(0, 0).select(0, 0),
    ],
)
def test_arguments_that_numpy_does_not_take_are_left_to_torch(function):
    run, said, weights = in_numpy(function)
    for x in torch.randn(2, 3, 4):
        torch.testing.assert_close(run(x)[0], function(x, *weights))
    assert run.program is not None and not run.tolerance
    (line,) = said
    assert line.startswith("it is recorded, but not for NumPy, which would be faster: ")


def test_every_operation_in_numpy_is_tested():
    reached = set()
    for function in OPERATIONS.values():
        graph = make_fx(function)(torch.randn(2, 4), torch.randn(4), torch.randn(3, 4))
        reached |= {node.target for node in graph.graph.nodes}
    assert {*IN_NUMPY} <= reached


@pytest.mark.parametrize("function", [lambda x, *_: x.sin(), lambda x, *_: x @ torch.ones(4, 2**17)])
def test_what_numpy_lacks_or_is_slow_at_is_left_to_torch(function):
    run, said, _ = in_numpy(function)
    x = torch.randn(3, 4)
    assert torch.equal(run(x)[0], function(x)) and run.program is not None and not run.tolerance
    assert not said


def modules(count, shared=False):
    torch.manual_seed(1)
    found = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(count)]
    for module in found if shared else ():  # a module in two places, and a parameter in two modules
        module.extend([module[1], nn.Linear(2, 2)])
        module[4].bias = module[2].bias
    return found, copy.deepcopy(found)


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_is_its_modules(shared):
    mine, theirs = modules(3, shared)
    batch, x = Batch(mine, pytest.fail), torch.randn(3, 7, 3)
    loss = batch.each(lambda module, x: module(x).square().mean())(x)
    grads = batch.gradients(loss)
    for s, module in enumerate(theirs):
        expected = module(x[s]).square().mean()
        own = torch.autograd.grad(expected, list(module.parameters()))
        assert loss[s].item() == pytest.approx(expected.item(), rel=1e-5)
        for grad, other in zip(grads, own, strict=True):
            torch.testing.assert_close(grad[s], other, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(p, q) for p, q in zip(mine[s].parameters(), module.parameters(), strict=True))
    pieces = batch.pieces(batch.flat(grads))
    assert all(torch.equal(one, other) for one, other in zip(pieces, grads, strict=True))
    mine[1][0].weight.data = torch.full((5, 3), 0.25)
    batch.adopt()
    changed = batch.each(lambda module, x: module(x).sum())(x)
    assert changed[1].item() == pytest.approx(mine[1](x[1]).sum().item(), rel=1e-4)
    assert (batch.pieces(batch.rows)[0][1] == 0.25).all()


def test_a_recording_lays_gradients_out_as_their_weights():
    mine, _ = modules(3)
    batch = Batch(mine, pytest.fail)
    loss = batch.each(lambda module, x, scale: scale * module(x).square().mean())
    run, said = replay(lambda x, scale: (batch.flat(batch.gradients(loss(x, scale))),))
    x, scale = torch.randn(2, 3, 7, 3), torch.ones(3)
    run.checked(x[0], scale, trial=True)
    graph = make_fx(run.plain)(x[0], scale)
    copies = [sum(node.target == torch.ops.aten.clone.default for node in graph.graph.nodes)]
    assert simplify(graph)
    copies += [sum(node.target == torch.ops.aten.clone.default for node in graph.graph.nodes)]
    assert copies == [2, 0]
    for scale in torch.tensor([[1.0] * 3, [1e-3] * 3, [1e3] * 3, [1.0, torch.nan, torch.inf]]):
        assert run.agrees(x[1], scale), scale
        torch.testing.assert_close(run(x[1], scale)[0], run.plain(x[1], scale)[0], equal_nan=True)
    assert not run.off and not said and run.share and not run.tolerance


def test_a_gradient_of_layer_norm_is_recorded_and_reads_weights_where_they_are():
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))
    run, said = replay(lambda x: torch.autograd.grad(module(x).square().mean(), list(module.parameters())))
    x = torch.randn(7, 3)
    run.checked(x, trial=True)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    assert run.agrees(x) and not run.off and not said
    assert isinstance(run.program.__wrapped__, torch.jit.ScriptModule)


def test_a_gradient_that_torchscript_does_not_take_is_run_by_python_and_says_so_once():
    module, reads = nn.LayerNorm(4), {"a": 1.0}

    def plain(x):
        y = torch.view_as_real(module(x).to(torch.complex64) * 1j)
        return torch.autograd.grad(reads["a"] * y.square().mean(), list(module.parameters()))

    run, said = replay(plain, reads)
    for a in (1.0, 2.0):
        reads["a"] = a
        x = torch.randn(7, 4)
        for mine, expected in zip(run(x), plain(x), strict=True):
            assert torch.equal(mine, expected)
    assert run.remade == 1 and not run.off and len(said) == 1
    assert said[0].startswith("it is recorded, but not for TorchScript, which would be faster: RuntimeError: ")


def test_what_differs_is_told_for_each_seed():
    nan, inf = torch.nan, torch.inf
    y = torch.tensor([[1.0, -1e-3], [1e6, 1.0], [nan, inf]])
    off = torch.tensor([[1e-5, -1e-5], [10.0, 10.0], [nan, nan]])
    assert _within(0.0, 0.0, y, y.clone()) and _within(0.0, 1e-4, y + off, y)
    assert not _within(0.0, 1e-6, y + off, y) and not _within(1e-4, 0.0, y + off, y)
    for wrong in (
        [[1e-3, 0.0], [0.0, 0.0], [0.0, 0.0]],
        [[0.0, 0.0], [200.0, 0.0], [0.0, 0.0]],
        [[inf, 0.0]] + [[0.0] * 2] * 2,
    ):
        assert not _within(0.0, 1e-4, y + torch.tensor(wrong), y)
    assert not _within(0.0, 1e-4, torch.where(y == 1e6, nan, y), y)
    assert _within(1e-4, 0.0, torch.tensor([[1e-5]]), torch.tensor([[0.0]]))  # an action near 0
    assert _within(0.0, 1e-4, torch.tensor(1.0), torch.tensor(1.00001)) and _within(0.0, 0.0, y[:0], y[:0])


def test_a_number_that_is_changed_in_place_is_made_at_each_call():
    def plain(x):
        total = torch.scalar_tensor(0.0)
        total += x.sum()
        return (total,)

    run, said = replay(plain)
    x = torch.ones(3)
    assert [run.checked(x, trial=True)[0].item() for _ in range(3)] == [3.0] * 3 and not run.off and not said


def test_a_recording_that_rounds_is_told_from_one_that_is_wrong():
    mine, _ = modules(3)
    batch, factor = Batch(mine, pytest.fail), 1.0
    loss = batch.each(lambda module, x: factor * module(x).square().mean())
    run, said = replay(lambda x: (batch.flat(batch.gradients(loss(x))),))
    x = torch.randn(3, 7, 3)
    run.checked(x, trial=True)
    for factor, right in ((1.0, True), (1 + 1e-3, False), (0.5, False)):
        assert run.agrees(x) == right, factor
    run.checked(x, trial=False)  # recorded anew
    assert run.agrees(x) and not run.off and not said


def test_a_phase_that_ends_with_plain_code_was_compared_by_it(monkeypatch):
    (module,), _ = modules(1)
    batch, factor, shown = Batch([module], pytest.fail), 1.0, 1.0

    def gradients(mb, kl_coef, everything):
        loss = batch.each(lambda module, x: factor * module(x).square().mean())(mb["x"])
        return batch.flat(batch.gradients(loss)), {"loss": loss.detach(), "kl": shown * loss.detach()}

    differentiate = Differentiate(batch, gradients, dict, batch.state, pytest.fail, False)
    mb, kl = {"x": torch.randn(1, 7, 3)}, torch.zeros(1)
    compared = []
    agrees = Replay.agrees
    monkeypatch.setattr(Replay, "agrees", lambda self, *tensors: compared.append(1) or agrees(self, *tensors))

    def phase(last_is_plain, change=1.0, change_of_logged=1.0):
        nonlocal factor, shown
        for k in range(4):
            plain, factor = k == 0 or (k == 3 and last_is_plain), factor * (change if k == 3 else 1)
            shown *= change_of_logged if k == 3 else 1
            differentiate(mb, kl, everything=plain, plain=plain, checked=k == 1, trial=False)
        return differentiate.agrees(mb, kl)

    assert phase(True) and phase(True) and not compared
    assert phase(False) and len(compared) == 1  # as one that stops early
    assert phase(True) and len(compared) == 1
    assert not phase(True, change_of_logged=2.0) and len(compared) == 2
    assert phase(True) and len(compared) == 2  # recorded anew
    assert not phase(True, change=2.0) and len(compared) == 3


def adam(module):
    return (torch.optim.Adam(module.parameters(), lr=1e-2, fused=True),)


def two_adams(module):
    one = torch.optim.Adam(module[0].parameters(), lr=1e-2, fused=True, weight_decay=0.1)
    return one, torch.optim.Adam(module[2].parameters(), lr=1e-2, fused=True, weight_decay=0.1)


def adam_w(module):
    return (torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True, weight_decay=0.1),)


def other_rates(module):
    one = torch.optim.Adam(module[0].parameters(), lr=1e-2, fused=True)
    return one, torch.optim.Adam(module[2].parameters(), lr=1e-3, fused=True)


def momentum(module):
    return (torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9),)


@pytest.mark.parametrize("make", [adam, two_adams, adam_w, other_rates, momentum])
def test_optimizers_of_a_batch_take_the_steps_of_each(make):
    mine, theirs = modules(3)
    batch = Batch(mine)
    own, other = [make(module) for module in mine], [make(module) for module in theirs]
    optimizers = Optimizers(batch, lambda: own)
    for k in range(6):
        grads = [torch.randn_like(x) for x in batch.pieces(batch.rows)]
        learning = [0, 1, 2] if k < 3 else [0, 2]
        if k == 2:
            for optimizer in (*own[0], *other[0]):
                optimizer.state.clear()
        if k == 4:  # a state given by somebody else, as a checkpoint gives it
            for optimizer, copied in zip(own[2], other[2], strict=True):
                optimizer.load_state_dict(copy.deepcopy(copied.state_dict()))
        optimizers.step(batch.flat(grads), learning)
        for s in learning:
            for p, grad in zip(theirs[s].parameters(), grads, strict=True):
                p.grad = grad[s].clone()
            for optimizer in other[s]:
                optimizer.step()
        for one, two in zip(mine, theirs, strict=True):
            for p, q in zip(one.parameters(), two.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    fused = make in (adam, two_adams, adam_w)
    states = [(s, state) for s in range(3) for x in own[s] for state in x.state.values()]
    assert fused == all(state.get("step") is optimizers.counts[s] for s, state in states)


def test_optimizers_of_modules_with_other_settings_or_states():
    """Each takes its own step until they agree."""
    mine, theirs = modules(2)
    batch = Batch(mine)
    own, other = [adam(module) for module in mine], [adam(module) for module in theirs]
    own[1][0].param_groups[0]["lr"] = other[1][0].param_groups[0]["lr"] = 1e-3
    optimizers = Optimizers(batch, lambda: own)
    for k in range(5):
        if k == 3:  # from here on one call serves both, with the moments that each of them has
            own[1][0].param_groups[0]["lr"] = other[1][0].param_groups[0]["lr"] = 1e-2
            for p in (*mine[0].parameters(), *mine[1].parameters()):
                p.grad = None
        if k == 4:
            for optimizer, module in ((own[0][0], mine[0]), (other[0][0], theirs[0])):
                optimizer.state[module[0].weight]["exp_avg"] = torch.full((5, 3), 0.5)
        grads = [torch.randn_like(x) for x in batch.pieces(batch.rows)]
        optimizers.step(batch.flat(grads), [0, 1])
        for s in (0, 1):
            for p, grad in zip(theirs[s].parameters(), grads, strict=True):
                p.grad = grad[s].clone()
            other[s][0].step()
            for p, q in zip(mine[s].parameters(), theirs[s].parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
                assert (p.grad is None) == (k >= 3)


@pytest.mark.parametrize("make", [adam, two_adams, momentum])
def test_optimizers_that_are_made_anew_take_the_next_step(make):
    mine, theirs = modules(2)
    own, other = [adam(module) for module in mine], [adam(module) for module in theirs]
    batch = Batch(mine)
    optimizers = Optimizers(batch, lambda: own)
    for k in range(5):
        if k == 2:
            own, other = [make(module) for module in mine], [make(module) for module in theirs]
        grads = [torch.randn_like(x) for x in batch.pieces(batch.rows)]
        optimizers.step(batch.flat(grads), [0, 1])
        for s in (0, 1):
            for p, grad in zip(theirs[s].parameters(), grads, strict=True):
                p.grad = grad[s].clone()
            for optimizer in other[s]:
                optimizer.step()
            for p, q in zip(mine[s].parameters(), theirs[s].parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["rate", "state"])
def test_optimizers_that_come_to_differ_count_their_steps(what):
    """An actor whose rate is annealed beside a critic's that isn't, or that forgets its moments alone."""
    mine, theirs = modules(2)
    batch = Batch(mine)
    own, other = [two_adams(module) for module in mine], [two_adams(module) for module in theirs]
    optimizers = Optimizers(batch, lambda: own)
    for k in range(8):
        for one, _ in (*own, *other):
            if what == "rate":
                one.param_groups[0]["lr"] = 1e-2 if k < 3 or k > 5 else 1e-3
            elif k == 3:
                one.state.clear()
        grads = [torch.randn_like(x) for x in batch.pieces(batch.rows)]
        optimizers.step(batch.flat(grads), [0, 1])
        for s in (0, 1):
            for p, grad in zip(theirs[s].parameters(), grads, strict=True):
                p.grad = grad[s].clone()
            for one, two in zip(own[s], other[s], strict=True):
                two.step()
                assert [x["step"] for x in one.state.values()] == [x["step"] for x in two.state.values()]
            for p, q in zip(mine[s].parameters(), theirs[s].parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_optimizers_must_have_all_parameters():
    (module,), _ = modules(1)
    with pytest.raises(ValueError, match="every parameter"):
        Optimizers(Batch([module]), lambda: [(torch.optim.Adam(module[0].parameters(), fused=True),)])
    assert np.isfinite(module[0].weight.detach().numpy()).all()
