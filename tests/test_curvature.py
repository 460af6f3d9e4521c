"""Tangent kernel, gradients and Hessian against loops of autograd, closed forms, and what doesn't change them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from common import curvature
from common.curvature import gradient_cosine, hessian_max, hessian_product, hessian_trace, ntk, ntk_effective_rank


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(dtype=torch.float64, activation=torch.nn.Tanh, num_samples=7):
    """A small network with three outputs as a function, its parameters, observations and targets."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 5), activation(), torch.nn.Linear(5, 3)).to(dtype)
    obs, target = torch.randn(num_samples, 4).to(dtype), torch.randn(num_samples, 3).to(dtype)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    return lambda parameters, obs: functional_call(network, parameters, (obs,)), parameters, obs, target


def squared(function):
    return lambda parameters, obs, target: (function(parameters, obs) - target).square().sum(1)


def linear(parameters, obs):
    return obs @ parameters["weight"].unsqueeze(1)


def gradient(scalar, parameters):
    return torch.cat([x.flatten() for x in torch.autograd.grad(scalar, list(parameters.values()))])


@pytest.fixture(params=["whole", "in parts"])
def parts(request, monkeypatch):
    """What fits memory at once, and what is taken two states or vectors at a time: 43 numbers, 344 bytes each."""
    if request.param == "in parts":
        for name, size in (("BUDGET", 3 * 344), ("AT_ONCE", 2 * 344), ("MANY", 2 * 344)):
            monkeypatch.setattr(curvature, name, size)


def test_kernel_is_that_of_gradients_one_by_one(parts):
    function, parameters, obs, _ = perceptron()
    learnt = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    rows = [torch.cat([gradient(function(learnt, x[None])[0, k], learnt) for k in range(3)]) for x in obs]
    expected = torch.stack(rows) @ torch.stack(rows).T  # the sum over outputs of each one's products
    torch.testing.assert_close(ntk(function, parameters, obs), expected, rtol=1e-10, atol=1e-12)
    spectrum = torch.linalg.eigvalsh(expected)
    p = spectrum / spectrum.sum()
    rank = ntk_effective_rank(ntk(function, parameters, obs))
    assert rank.item() == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-9) and rank.dtype == torch.float64


def test_kernel_of_a_linear_model_is_that_of_its_inputs():
    """∇(w·x) = x, whatever w is: J Jᵀ = X Xᵀ, whose eigenvalues are 9, 4 and 1 here."""
    obs = torch.diag(torch.tensor([3.0, 2, 1])) @ torch.linalg.qr(torch.randn(3, 3, generator=generator()))[0]
    kernel = ntk(linear, {"weight": torch.randn(3, generator=generator(1))}, obs)
    torch.testing.assert_close(kernel, (obs @ obs.T).double(), rtol=1e-5, atol=1e-6)
    p = np.array([9, 4, 1]) / 14
    assert ntk_effective_rank(kernel).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


@pytest.mark.parametrize(
    "kernel, rank",
    [
        (torch.eye(5), 5),
        (torch.ones(5, 5), 1),
        (torch.diag(torch.tensor([2.0, 2, 0, 0])), 2),
        (torch.zeros(5, 5), 0),
        (torch.full((5, 5), 1e-30), 1),
        (torch.eye(2) * math.inf, math.nan),
        (torch.eye(2) * math.nan, math.nan),
        (torch.zeros(0, 0), math.nan),
        (torch.ones(1, 1), 1),
    ],
)
def test_effective_ranks_in_closed_form(kernel, rank):
    assert ntk_effective_rank(kernel).item() == pytest.approx(rank, rel=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.integers(1, 8), st.integers(1, 12), st.floats(-12, 12))
def test_effective_rank_is_bounded_and_has_no_scale(seed, n, d, power):
    x = torch.randn(n, d, generator=generator(seed)).double()
    rank, moved = ntk_effective_rank(x @ x.T).item(), torch.randperm(n, generator=generator(seed))
    assert 1 - 1e-9 <= rank <= min(n, d) + 1e-9
    assert ntk_effective_rank(10**power * x @ x.T).item() == pytest.approx(rank, rel=1e-6)
    assert ntk_effective_rank(x[moved] @ x[moved].T).item() == pytest.approx(rank, rel=1e-6)


def test_cosine_is_that_of_all_pairs(parts):
    function, parameters, obs, target = perceptron()
    loss, learnt = squared(function), {name: p.clone().requires_grad_() for name, p in parameters.items()}
    rows = [gradient(loss(learnt, obs[i : i + 1], target[i : i + 1])[0], learnt) for i in range(len(obs))]
    pairs = [torch.cosine_similarity(x, y, dim=0).item() for i, x in enumerate(rows) for y in rows[:i]]
    assert gradient_cosine(loss, parameters, obs, target).item() == pytest.approx(np.mean(pairs), rel=1e-10)


def losses_with(gradients):
    """A loss whose gradients on samples are these (N, P)."""
    return lambda parameters, obs, _: obs @ parameters["weight"], {"weight": torch.zeros(gradients.shape[1])}, gradients


def cosine_of(*gradients):
    loss, parameters, obs = losses_with(torch.tensor(gradients))
    return gradient_cosine(loss, parameters, obs, torch.zeros(len(obs))).item()


def test_cosine_at_its_ends():
    assert cosine_of([1.0, 0], [3, 0], [2, 0]) == pytest.approx(1)
    assert cosine_of([1.0, 0], [-5, 0]) == pytest.approx(-1)
    assert cosine_of([1.0, 0], [0, 2]) == pytest.approx(0)
    triangle = [[math.cos(2 * math.pi * i / 3), math.sin(2 * math.pi * i / 3)] for i in range(3)]
    assert cosine_of(*triangle) == pytest.approx(-1 / 2)  # no mean of three is lower
    assert cosine_of([1e-30, 0], [1e30, 1e30]) == pytest.approx(math.sqrt(0.5))  # whose squares no float holds


def test_cosine_without_directions():
    assert cosine_of([1.0, 0], [0, 0], [1, 1]) == pytest.approx(math.sqrt(0.5))  # that of the two that have one
    assert math.isnan(cosine_of([0.0, 0], [0, 0])) and math.isnan(cosine_of([0.0, 0], [1, 0]))
    assert math.isnan(cosine_of([1.0, 0]))
    assert math.isnan(cosine_of([1.0, 0], [math.nan, 0])) and math.isnan(cosine_of([1.0, 0], [math.inf, 0], [1, 1]))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9999), st.integers(2, 9), st.integers(1, 6), st.floats(-15, 15))
def test_cosine_is_bounded_and_has_no_scale(seed, n, p, power):
    loss, parameters, obs = losses_with(torch.randn(n, p, generator=generator(seed)))
    cosine = gradient_cosine(loss, parameters, obs, torch.zeros(n)).item()
    assert -1 / (n - 1) - 1e-6 <= cosine <= 1 + 1e-6
    scaled = gradient_cosine(loss, parameters, 10**power * obs, torch.zeros(n)).item()
    assert scaled == pytest.approx(cosine, abs=1e-5)


def hessian_of(loss, parameters):
    """The whole matrix, by PyTorch's own."""
    names, shapes = list(parameters), [p.shape for p in parameters.values()]

    def of_flat(flat):
        pieces = flat.split([shape.numel() for shape in shapes])
        return loss({name: x.view(shape) for name, x, shape in zip(names, pieces, shapes, strict=True)})

    return torch.autograd.functional.hessian(of_flat, torch.cat([p.flatten() for p in parameters.values()]))


@pytest.mark.parametrize("activation", [torch.nn.Tanh, torch.nn.ReLU])
def test_hessian_against_the_whole_matrix(parts, activation):
    function, parameters, obs, target = perceptron(activation=activation)

    def loss(parameters):
        return squared(function)(parameters, obs, target).mean()

    whole, product = hessian_of(loss, parameters), hessian_product(loss, parameters)
    torch.testing.assert_close(product(torch.eye(43).double()), whole, rtol=1e-9, atol=1e-10)
    largest = torch.linalg.eigvalsh(whole)
    largest = largest[largest.abs().argmax()].item()
    assert hessian_max(product, parameters, generator(), steps=300).item() == pytest.approx(largest, rel=1e-6)
    assert hessian_max(product, parameters, generator()).item() == pytest.approx(largest, rel=0.05)
    trace = hessian_trace(product, parameters, generator(), draws=4000).item()
    off_diagonal = whole.square().sum() - whole.diagonal().square().sum()
    assert abs(trace - whole.trace().item()) < 4 * math.sqrt(2 * off_diagonal / 4000)
    few = hessian_trace(product, parameters, generator()).item()
    assert abs(few - whole.trace().item()) < 4 * math.sqrt(2 * off_diagonal / 50)


@pytest.mark.parametrize("values", [(1.0, -8.0, 3.0, 0.0), (9.0, -8.0, 3.0, 0.0)])
def test_hessian_of_a_quadratic(values):
    """½ Σ h w²: its trace is exact by one draw, and the largest eigenvalue keeps its sign."""
    h = torch.tensor(values)
    parameters = {"weight": torch.randn(4, generator=generator(1))}
    product = hessian_product(lambda parameters: (h * parameters["weight"].square()).sum() / 2, parameters)
    assert hessian_trace(product, parameters, generator(), draws=1).item() == pytest.approx(sum(values), rel=1e-6)
    largest = max(values, key=abs)
    assert hessian_max(product, parameters, generator(), steps=100).item() == pytest.approx(largest, rel=1e-5)
    assert abs(hessian_max(product, parameters, generator()).item()) <= abs(largest) * (1 + 1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.floats(0.01, 100))
def test_hessian_has_the_scale_of_the_loss(seed, scale):
    function, parameters, obs, target = perceptron()
    loss = squared(function)
    found = []
    for factor in (1, scale, -scale):
        product = hessian_product(lambda p, factor=factor: factor * loss(p, obs, target).mean(), parameters)
        found.append([measure(product, parameters, generator(seed)).item() for measure in (hessian_max, hessian_trace)])
    assert found[1] == pytest.approx([scale * x for x in found[0]], rel=1e-8)
    assert found[2] == pytest.approx([-scale * x for x in found[0]], rel=1e-8)


def test_curvature_of_what_has_none():
    parameters = {"weight": torch.ones(3)}
    for loss, expected in (
        (lambda parameters: parameters["weight"].sum(), 0),
        (lambda parameters: (parameters["weight"] * math.nan).square().sum(), math.nan),
        (lambda parameters: (parameters["weight"] * 1e30).square().sum(), math.nan),
    ):
        product = hessian_product(loss, parameters)
        for measure in (hessian_max, hessian_trace):
            assert measure(product, parameters, generator()).item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("fill", [0.0, -1e3, math.nan, math.inf])
def test_dead_and_broken_networks_raise_nothing(fill):
    """All that a dead network can still learn is the output's bias, the same for every sample."""
    function, parameters, obs, target = perceptron(torch.float32, torch.nn.ReLU)
    for name in ("0.weight", "0.bias"):
        parameters[name] = torch.zeros_like(parameters[name])
    parameters["0.bias"].fill_(fill)
    loss = squared(function)
    product = hessian_product(lambda parameters: loss(parameters, obs, target).mean(), parameters)
    rank, cosine = ntk_effective_rank(ntk(function, parameters, obs)), gradient_cosine(loss, parameters, obs, target)
    sharpness, trace = (measure(product, parameters, generator()) for measure in (hessian_max, hessian_trace))
    if math.isfinite(fill):
        # With respect to the bias the Hessian is 2·I, and 0 otherwise.
        assert (rank.item(), sharpness.item(), trace.item()) == pytest.approx((1, 2, 6), rel=1e-5)
        assert -1 / 6 <= cosine <= 1
    else:
        assert all(x.isnan() for x in (rank, cosine, sharpness, trace))
    silent = {name: torch.zeros_like(p) for name, p in parameters.items()}
    assert gradient_cosine(lambda p, x, y: 0 * loss(p, x, y), silent, obs, target).isnan()


def test_the_generator_decides_and_float32_is_near_float64():
    found = {}
    for dtype in (torch.float32, torch.float64):
        function, parameters, obs, target = perceptron(dtype)
        loss, was = squared(function), {name: p.clone() for name, p in parameters.items()}
        product = hessian_product(lambda p, a=loss, b=obs, c=target: a(p, b, c).mean(), parameters)
        found[dtype] = [ntk_effective_rank(ntk(function, parameters, obs)).item()]
        found[dtype] += [gradient_cosine(loss, parameters, obs, target).item()]
        for measure in (hessian_max, hessian_trace):
            again = [measure(product, parameters, generator(seed)).item() for seed in (3, 3, 4)]
            assert again[0] == again[1] != again[2]
            found[dtype].append(again[0])
        assert all(p.equal(was[name]) and not p.requires_grad for name, p in parameters.items())
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-3)
