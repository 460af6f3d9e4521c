"""How far the policy and the features moved in one update phase: probability ratios, KL divergences, feature drift.

Every function is pure and takes float32, float64, bfloat16 or float16 on any device. The statistics give no gradient
and return 0-dim float64 tensors on the input's device, or on the CPU for MPS, which has no float64; the two divergences
are differentiable, so that they also serve as a penalty.
"""

import math

import torch


def ratio_stats(logratio, clip_coef):
    """Statistics of r = π_after(a|s) / π_before(a|s), and of the samples that clipping was to keep inside 1 ± ε.

    Args:
        logratio: log r, any shape (one entry per sample). r is taken in this dtype (float32 for half precision), as the
            clipped loss does: a float32 log-ratio of 89 has an infinite ratio.
        clip_coef: ε, the clip coefficient.

    Returns a dict of 0-dim float64 tensors, without unit (the kl_ ones in nats):
        ratio_mean, ratio_std, ratio_min, ratio_max: over all samples; standard deviations are unbiased
        ratio_above_mean, …: the same over the samples with r > 1 + ε
        ratio_below_mean, …: the same over the samples with r < 1 − ε (figures 3 and 4: the mean)
        fraction_above, fraction_below: share of all samples
        excess_ratio: ratio_above_mean / ratio_below_mean (figure 6)
        ratio_deviation: mean of |r − 1|, an estimate of twice the total variation (SPO, Xie et al. 2024)
        kl_k1, kl_k3: means of −log r and (r − 1) − log r, estimates of KL(π_before ‖ π_after) for actions sampled from
            π_before (Schulman 2020, "Approximating KL divergence")
    What doesn't exist has no key: a group without samples, the std of a single sample, excess_ratio unless both groups
    exist; for an empty `logratio` the dict is empty. An infinite r is reported as it is: means, maxima and kl_k3 become
    inf, a std NaN. If any log-ratio is NaN, nobody knows which group it is in: every key is there and is NaN.
    """
    logratio = _prepare(logratio)
    if logratio.numel() == 0:
        return {}
    if logratio.isnan().any():
        keys = [f"{group}_{stat}" for group in _GROUPS for stat in ("mean", "std", "min", "max")]
        keys += ["fraction_above", "fraction_below", "excess_ratio", "ratio_deviation", "kl_k1", "kl_k3"]
        return {key: _nan(logratio) for key in keys}
    ratio = logratio.exp()
    above, below = ratio > 1 + clip_coef, ratio < 1 - clip_coef
    logratio, ratio = logratio.double(), ratio.double()  # sums over samples don't overflow before a ratio does

    stats = {}
    for group, members in zip(_GROUPS, (ratio, ratio[above], ratio[below]), strict=True):
        if members.numel() > 0:
            stats[f"{group}_mean"] = members.mean()
            stats[f"{group}_min"] = members.min()
            stats[f"{group}_max"] = members.max()
        if members.numel() > 1:
            stats[f"{group}_std"] = members.std()
    stats["fraction_above"] = above.double().mean()
    stats["fraction_below"] = below.double().mean()
    if "ratio_above_mean" in stats and "ratio_below_mean" in stats:
        stats["excess_ratio"] = stats["ratio_above_mean"] / stats["ratio_below_mean"]
    stats["ratio_deviation"] = ratio.where(ratio.isinf(), logratio.expm1()).abs().mean()
    stats["kl_k1"] = -logratio.mean()
    # expm1 keeps the digits that r − 1 loses for r near 1; an infinite r wins over log r, however large that is.
    stats["kl_k3"] = ratio.where(ratio.isinf(), logratio.expm1() - logratio).mean()
    return stats


def feature_drift(before, after):
    """How far features or pre-activations moved on the same samples.

    Args:
        before, after: (N, D) each, floating point.

    Returns a dict of 0-dim float64 tensors: l2, the mean squared difference over all N·D entries (what PFO penalises on
    pre-activations), in the features' unit squared; cosine, the mean over samples of the cosine similarity of the rows.
    A row that is all 0 before or after has no direction and counts as 0, also if it is 0 both times.
    Non-finite entries propagate. N = 0 or D = 0: NaN for both. Raises ValueError if the shapes differ or aren't 2-D.
    """
    _check_shapes(before, after)
    before, after = _prepare(before), _prepare(after)
    if before.ndim != 2:
        raise ValueError(f"expected features of shape (samples, units), got {tuple(before.shape)}")
    if before.numel() == 0:
        return {"l2": _nan(before), "cosine": _nan(before)}
    # Few and small temporaries: fetching fresh pages takes longer than the arithmetic.
    l2 = _norms(after - before).square().sum() / before.numel()
    if before.dtype == torch.float64:  # in which products of smaller floats can't over- or underflow
        before, after = _unit_peak(before), _unit_peak(after)
    norms = _norms(before) * _norms(after)
    dots = before.to(torch.float64, copy=True).mul_(after).sum(dim=1)
    cosine = dots / norms.where(norms != 0, 1.0)  # (N,)
    return {"l2": l2, "cosine": cosine.mean()}


def feature_drifts(before, after):
    """``feature_drift`` of a network's `features`, `preactivations` and `all_preactivations`, (N, D) each.

    before, after: what the network gave for the same samples at the two ends of an update phase. Returns a dict of
    0-dim float64 tensors by `{feature,preactivation,all_preactivation}_{measure}`.
    """
    layers = ("features", "preactivations", "all_preactivations")
    drifts = {layer[:-1]: feature_drift(getattr(before, layer), getattr(after, layer)) for layer in layers}
    return {f"{layer}_{name}": x for layer, drift in drifts.items() for name, x in drift.items()}


def of_logits(before, after):
    """What a categorical policy puts out at the two ends of an update phase, by tag, 0-dim float64 tensors.

    Args:
        before, after: logits (N, A) each, floating point.

    `policy/logit_norm`: mean over samples of the L2 norm of the logits after, less their mean, which no probability
    depends on. `churn/policy_greedy`: share of samples whose most probable action is another (Schaul et al. 2022, "The
    phenomenon of policy churn"). Raises ValueError if the shapes differ.
    """
    _check_shapes(before, after)
    before, after = _prepare(before), _prepare(after)
    centred = after.double() - after.double().mean(dim=1, keepdim=True)
    changed = before.argmax(dim=1) != after.argmax(dim=1)
    return {"policy/logit_norm": centred.norm(dim=1).mean(), "churn/policy_greedy": changed.double().mean()}


def of_normals(before, after):
    """What a normal policy puts out at the two ends of an update phase, by tag, 0-dim float64 tensors.

    Args:
        before, after: loc and scale, (N, A) each, floating point.

    `policy/loc_abs_mean` and `policy/scale_mean`: over samples and dimensions, after. `churn/policy_loc`: mean squared
    change of loc, the greedy action before the tanh (after Schaul et al. 2022). Raises ValueError if shapes differ.
    """
    _check_shapes(*before, *after)
    loc, (new_loc, new_scale) = _prepare(before[0]), map(_prepare, after)
    return {
        "policy/loc_abs_mean": new_loc.double().abs().mean(),
        "policy/scale_mean": new_scale.double().mean(),
        "churn/policy_loc": (new_loc.double() - loc.double()).square().mean(),
    }


def categorical_kl(logits_p, logits_q):
    """KL(p ‖ q) of two categorical distributions per sample, in nats.

    Args:
        logits_p, logits_q: (N, A) each, floating point; log-probabilities up to a constant per sample. Any may be −inf:
            an action impossible under p adds 0, one impossible under q only makes the divergence inf.

    Returns (N,), differentiable, float64 for float64 inputs, else float32; may be below 0 by a rounding error.
    Raises ValueError if the shapes differ.
    """
    _check_shapes(logits_p, logits_q)
    logp, logq = _float32_or_64(logits_p).log_softmax(-1), _float32_or_64(logits_q).log_softmax(-1)
    p = logp.exp()
    return (p * (logp - logq).where(p > 0, 0.0)).sum(-1)


def normal_kl(loc_p, scale_p, loc_q, scale_q):
    """KL(p ‖ q) of two diagonal normal distributions per sample, summed over the dimensions, in nats.

    An invertible map leaves the divergence as it is: for squashed normals, pass the base normals'.

    Args:
        loc_p, scale_p, loc_q, scale_q: (N, K) each, floating point; scales are standard deviations > 0.

    Returns (N,), differentiable, float64 for float64 inputs, else float32. Raises ValueError if the shapes differ.
    """
    _check_shapes(loc_p, scale_p, loc_q, scale_q)
    loc_p, scale_p, loc_q, scale_q = map(_float32_or_64, (loc_p, scale_p, loc_q, scale_q))
    relative_scale = scale_p / scale_q
    distance = (loc_p - loc_q) / scale_q
    return (0.5 * (relative_scale.square() + distance.square() - 1) - relative_scale.log()).sum(-1)


_GROUPS = ("ratio", "ratio_above", "ratio_below")


def _float32_or_64(x):
    return x if x.dtype == torch.float64 else x.float()


def _prepare(x):
    x = _float32_or_64(x.detach())
    return x.cpu() if x.device.type == "mps" else x


def _norms(x):
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)


def _unit_peak(x):
    """Rows divided by their largest magnitude: the cosine stays, and its norms neither overflow nor vanish."""
    return x / x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _check_shapes(first, *others):
    if any(other.shape != first.shape for other in others):
        raise ValueError(f"expected equal shapes, got {[tuple(x.shape) for x in (first, *others)]}")


def _nan(x):
    return torch.tensor(math.nan, dtype=torch.float64, device=x.device)
