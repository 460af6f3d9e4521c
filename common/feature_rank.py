"""Measures of a layer's features: ranks, the largest and smallest singular values, dead and dormant units, norms.

φ, shape (N, D), holds the outputs of a hidden layer for N samples; σ₁ ≥ … ≥ σ_D are its singular values, not centred.
Every function here is pure, takes float32, float64, bfloat16 or float16 on any device, gives no gradient and returns
0-dim float64 tensors on the input's device, or on the CPU for MPS, which has neither float64 nor decompositions.
What can't be measured is NaN: nothing here raises on numbers, only on a wrong shape, dtype or name.
"""

import math

import torch
import torch.nn.functional as F

RANKS = ("effective_rank", "pca_rank", "srank", "feature_rank", "matrix_rank", "stable_rank")
SIGMAS = ("sigma_max", "sigma_2", "sigma_min")


def layer_measures(network, activation):
    """All measures of this file for the last hidden layer of a network, and the norm of all hidden layers together.

    Args:
        network: its `features` (N, D), the outputs of `activation`, `preactivations` (N, D) and `all_preactivations`
            (N, all units).
        activation: as for `dead_units`.

    Returns a dict of 0-dim float64 tensors.
    """
    dead = dead_units(network.features, activation)
    return {
        **feature_ranks(network.features),
        "dead_units": dead,
        "dead_fraction": dead / network.features.shape[1],
        "dormant_fraction": dormant_fraction(network.features),
        **feature_stats(network.features),
        "preactivation_norm": mean_norm(network.preactivations),
        "all_preactivation_norm": mean_norm(network.all_preactivations),
    }


def split_layers(all_preactivations, shapes):
    """The pre-activations of each hidden layer, its samples in rows and its units in columns.

    Args:
        all_preactivations: (N, all units) of a network, its layers one after the other.
        shapes: of each layer's output for one sample, (units,) or (channels, height, width).

    Returns a list of (N, units), and of (N · height · width, channels), whose unit is the channel: all positions have
    its weights. The list is empty where the shapes are not those of the columns, as in a network with other layers.
    """
    if sum(map(math.prod, shapes)) != all_preactivations.shape[1]:
        return []
    parts = all_preactivations.split([math.prod(shape) for shape in shapes], dim=1)
    return [
        x.unflatten(1, (shape[0], -1)).transpose(1, 2).flatten(0, 1) for x, shape in zip(parts, shapes, strict=True)
    ]


def measures_by_layer(network, shapes, activation):
    """Which layer died: measures of each hidden layer, by `layer{k}/{measure}`, k from 1, and `activation_balance`.

    Args:
        network: its `all_preactivations` (N, all units), and `features`, the outputs of the last of its layers.
        shapes: as for `split_layers`.
        activation: as for `dead_units`.

    Returns a dict of 0-dim float64 tensors: dead_units and dormant_fraction of the layer's output, preactivation_norm,
    with Tanh saturated_fraction, the share of outputs beyond ±0.99, and activation_balance, the mean over layers.
    """
    function, layers = getattr(torch.nn, activation)(), split_layers(network.all_preactivations, shapes)
    measures, balances = {}, []
    columns = network.all_preactivations.split([math.prod(shape) for shape in shapes], dim=1) if layers else []
    for k, (units, whole) in enumerate(zip(layers, columns, strict=True), 1):
        features = network.features if k == len(layers) and units.shape == network.features.shape else function(units)
        measures[f"layer{k}/dead_units"] = dead_units(features, activation)
        measures[f"layer{k}/dormant_fraction"] = dormant_fraction(features)
        measures[f"layer{k}/preactivation_norm"] = mean_norm(whole)
        if activation == "Tanh":
            measures[f"layer{k}/saturated_fraction"] = saturated_fraction(features)
        balances.append(activation_balance(whole))
    return measures | ({"activation_balance": torch.stack(balances).mean()} if balances else {})


def saturated_fraction(features):
    """Share of the outputs of a Tanh, (N, D) floating point, beyond ±0.99, where its slope is under 2 %.

    Returns a 0-dim float64 tensor in [0, 1], NaN for empty or non-finite features. Raises ValueError if `features` is
    not 2-D or not floating point.
    """
    x = _check(features)
    return _nan(x) if _undefined(x) else (x.abs() > 0.99).sum().double() / x.numel()


def activation_balance(preactivations, samples=128):
    """OUI of a layer: how differently two samples switch its units on (Fernández-Hernández et al. 2025, arXiv
    2504.17160; arXiv 2603.09950 reads it at 10 % of a PPO run).

    A unit is on where its pre-activation is above 0. OUI is twice the mean over pairs of samples of min(d, 1/2), d the
    share of units that are on for one of the two alone: 0 for a layer that is linear on these samples, 1 where each
    pair differs in half of the units or more.

    Args:
        preactivations: (N, D), floating point; for a convolution, D are its channels at all positions.
        samples: at most so many are compared, evenly spaced among the N.

    Returns a 0-dim float64 tensor in [0, 1], NaN if the pre-activations are empty or not finite, or N = 1. Raises
    ValueError if they are not 2-D or not floating point.
    """
    x = _check(preactivations)
    if len(x) > samples:
        x = x[torch.linspace(0, len(x) - 1, samples).long().to(x.device)]
    if _undefined(x) or len(x) < 2:
        return _nan(x)
    on = (x > 0).float()  # sums of up to 2²⁴ ones are exact
    active = on.sum(dim=1)
    apart = (active.unsqueeze(0) + active.unsqueeze(1)).addmm_(on, on.T, alpha=-2)  # units; 0 on the diagonal
    total = apart.clamp_(max=x.shape[1] / 2).sum(dtype=torch.float64)
    return 2 * total / (x.shape[1] * len(x) * (len(x) - 1))


def gradient_dormant_fraction(gradient, tau=0.01):
    """GraMa: share of units whose incoming weights have next to no gradient (Liu et al. 2025, arXiv 2505.24061).

    Args:
        gradient: (D, …) of a layer's weights, floating point: a row for each of its D units.
        tau: a unit is dormant if the mean absolute gradient of its weights is at most `tau` times the layer's.

    Returns a 0-dim float64 tensor in [0, 1]: 1 for a gradient of 0, NaN for one that is empty or not finite.
    """
    x = _check(gradient.flatten(1))
    return dormant_fraction(x.T, tau)


def deltas(tags):
    """How far an update phase moved ranks, dead units, norms and the policy's variance: after minus before, by tag."""
    moved = [x for x in tags if x.endswith(("rank", "dead_units", "norm", "policy_variance")) and "/after/" in x]
    return {x.replace("/after/", "/delta/"): tags[x] - tags[x.replace("/after/", "/before/")] for x in moved}


def feature_ranks(features):
    """All rank measures of φ from one decomposition.

    Args:
        features: (N, D), floating point; N < D is fine.

    Returns a dict of 0-dim float64 tensors. The ranks count dimensions, the sigmas have the unit of the features:
        effective_rank: exp of the entropy of σ/Σσ, from 1 to min(N, D) (Roy & Vetterli 2007, "The effective rank")
        pca_rank: smallest k whose Σ_{i≤k} σ² is 99 % of Σσ² (Yang et al. 2020; "rank" in figures 1, 3, 4 and 6 of the
            PPO paper, Moalla et al. 2024)
        srank: smallest k whose Σ_{i≤k} σ is 99 % of Σσ (Kumar et al. 2021, "Implicit under-parameterization")
        feature_rank: number of σ/√N > 0.01; the only rank that depends on the scale (Lyle et al. 2022)
        matrix_rank: number of σ > σ₁·max(N, D)·ε, ε of the dtype of `features`, as NumPy and PyTorch have it. In
            bfloat16 (float16) that is 0 for any features once max(N, D) reaches 128 (1024).
        stable_rank: ‖φ‖_F²/σ₁² (Rudelson & Vershynin 2007)
        sigma_max, sigma_2, sigma_min: σ₁, σ₂, σ_D over √N; 0 where there are fewer than 2 or D singular values

    All-zero features, a dead layer, have rank 0 by every definition; the paper's code gives NaN, 1, 1, 0, 0 for
    effective_rank, pca_rank, srank, feature_rank, matrix_rank. Any NaN or infinity, or N = 0 or D = 0: NaN for all.

    Unless `features` is float64, the σ are roots of the eigenvalues of the smaller Gram matrix, computed in float64.
    Those under √(max(N, D)·2⁻⁵²)·σ₁, 5e-7·σ₁ for 1024 samples, count as 0. That is far below where matrix_rank stops in
    float32; 500 of them, just under that limit, would have added 0.4 % to effective_rank.

    Raises ValueError if `features` is not 2-D or not floating point.
    """
    x = _check(features)
    if _undefined(x):
        return {key: _nan(x) for key in (*RANKS, *SIGMAS)}
    num_samples, num_units = x.shape
    eps = torch.finfo(features.dtype).eps
    scale = x.abs().amax().double()
    divisor = scale.where(scale > 0, 1.0)
    x = x.to(torch.float64, copy=True).div_(divisor)  # entries within ±1: squares neither overflow nor all vanish

    if features.dtype == torch.float64:
        # matrix_rank's threshold in float64 lies far below the √ε a Gram matrix resolves.
        sigma = torch.linalg.svdvals(x)
    else:
        gram = x.T @ x if num_samples >= num_units else x @ x.T
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0)  # descending, (min(N, D),)
        # Rounding leaves ±ε·λ₁ where there should be 0, and the root of that would be a singular value of 1e-8·σ₁.
        noise = max(num_samples, num_units) * torch.finfo(torch.float64).eps * eigenvalues[0]
        sigma = eigenvalues.where(eigenvalues > noise, 0.0).sqrt()

    alive = sigma[0] > 0
    entropy = torch.special.entr(sigma / sigma.sum().where(alive, 1.0)).sum()
    variance = sigma.square()
    scaled = sigma / math.sqrt(num_samples) * divisor
    padded = F.pad(scaled, (0, max(num_units, 2) - len(sigma)))  # the singular values that N < D or D = 1 lacks
    return {
        "effective_rank": entropy.exp() * alive,
        "pca_rank": _cumulative_rank(variance),
        "srank": _cumulative_rank(sigma),
        "feature_rank": (scaled > 0.01).sum().double(),
        "matrix_rank": (sigma > sigma[0] * max(num_samples, num_units) * eps).sum().double(),
        "stable_rank": variance.sum() / variance[0].where(alive, 1.0),
        "sigma_max": padded[0],
        "sigma_2": padded[1],
        "sigma_min": padded[num_units - 1],
    }


def dead_units(features, activation):
    """Number of the layer's D units that are useless on all samples, by the paper's definitions (figure 2).

    Args:
        features: (N, D), floating point: the outputs of `activation`.
        activation: "ReLU" or "GELU": dead is exactly 0 on all samples; "LeakyReLU": negative on all samples, so that
            it is linear; "Tanh": an unbiased std over the samples under 0.001, so that it is saturated or constant.

    Returns a 0-dim float64 tensor; NaN for empty or non-finite features, and for Tanh on a single sample.
    Raises ValueError for another activation, or if `features` is not 2-D or not floating point.
    """
    if activation not in ("ReLU", "GELU", "LeakyReLU", "Tanh"):
        raise ValueError(f"activation must be ReLU, GELU, LeakyReLU or Tanh, got {activation!r}")
    x = _check(features)
    if _undefined(x) or (activation == "Tanh" and len(x) < 2):
        return _nan(x)
    # Sums and products, since `std` and `all` along a dimension take ten times as long.
    if activation == "Tanh":
        dead = _centred_norm(x, dim=0) / math.sqrt(len(x) - 1) < 0.001
    elif activation == "LeakyReLU":
        dead = (x >= 0).sum(dim=0) == 0
    else:
        dead = (x != 0).sum(dim=0) == 0
    return dead.sum().double()


def dormant_fraction(features, tau=0.025):
    """Share of units whose mean absolute activation is at most `tau` times the layer's (Sokar et al. 2023).

    Args:
        features: (N, D), floating point.
        tau: the dormancy threshold, without unit.

    Returns a 0-dim float64 tensor in [0, 1]: 1 for all-zero features, NaN for empty or non-finite ones.
    Raises ValueError if `features` is not 2-D or not floating point.
    """
    x = _check(features)
    if _undefined(x):
        return _nan(x)
    activity = x.abs().mean(dim=0, dtype=torch.float64)  # (D,)
    return (activity <= tau * activity.mean()).double().mean()


def feature_stats(features):
    """Norm, mean and spread of the features (N, D), floating point, in the unit of the features.

    Returns a dict of 0-dim float64 tensors: feature_norm, the mean over samples of the L2 norm; feature_mean, over all
    entries; feature_std, the mean over samples of the unbiased standard deviation across units (NaN for a single unit).
    NaN for empty or non-finite features. Raises ValueError if `features` is not 2-D or not floating point.
    """
    x = _check(features)
    if _undefined(x):
        return {key: _nan(x) for key in ("feature_norm", "feature_mean", "feature_std")}
    return {
        "feature_norm": mean_norm(x),
        "feature_mean": x.mean(dtype=torch.float64),
        "feature_std": (_centred_norm(x, dim=1) / math.sqrt(x.shape[1] - 1)).mean() if x.shape[1] > 1 else _nan(x),
    }


def mean_norm(x):
    """Mean over samples of the L2 norm of x (N, D), floating point: figure 1's pre-activation norm, in the unit of x.

    Returns a 0-dim float64 tensor, NaN if x is empty or not finite. Raises ValueError if x is not 2-D floating point.
    """
    x = _check(x)
    if x.numel() == 0:
        return _nan(x)
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).mean()
    return norm.where(norm.isfinite(), math.nan)  # spares x, which may have 20 000 columns, a pass of isfinite


def policy_variance(*parameters):
    """How much the policy varies with the state: unbiased variance over samples, mean over the parameters (figure 2).

    Args:
        parameters: one or more (N, K_i), floating point: the action probabilities, or a normal's loc and scale.

    Returns a 0-dim float64 tensor, in the parameters' unit squared: NaN if anything is empty or not finite, or N = 1.
    Raises ValueError if a parameter is not 2-D floating point, if there is none, or if their N differ.
    """
    checked = [_check(p) for p in parameters]
    if len({len(p) for p in checked}) != 1:
        raise ValueError(f"need parameters with the same number of samples, got {[tuple(p.shape) for p in parameters]}")
    if any(_undefined(p) for p in checked) or len(checked[0]) < 2:
        return _nan(checked[0])
    return torch.cat([p.double() for p in checked], dim=1).var(dim=0).mean()


def _check(x):
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"expected a 2-D floating-point tensor (samples, units), got {x.dtype} of {tuple(x.shape)}")
    return x.detach().cpu() if x.device.type == "mps" else x.detach()


def _undefined(x):
    # In float64, no sum of smaller floats overflows: it is finite if all of them are, and faster than looking at each.
    if x.dtype == torch.float64:
        return x.numel() == 0 or not x.isfinite().all()
    return x.numel() == 0 or not math.isfinite(x.sum(dtype=torch.float64).item())


def _centred_norm(x, dim):
    """Norm along ``dim`` of what is left of ``x`` when its mean along it is taken off, float64."""
    x = x.to(torch.float64, copy=True)
    return torch.linalg.vector_norm(x.sub_(x.mean(dim=dim, keepdim=True)), dim=dim)


def _nan(x):
    return torch.tensor(math.nan, dtype=torch.float64, device=x.device)


def _cumulative_rank(mass):
    """Smallest k whose first k entries of `mass` hold 99 % of it; 0 if it is all 0."""
    cumulative = mass.cumsum(0)
    # The slack keeps a tie, 99 of 100 equal singular values, from hanging on the rounding of the sum.
    short = cumulative < 0.99 * (1 - 1e-12) * cumulative[-1]
    return (short.sum() + (mass[0] > 0)).double()
