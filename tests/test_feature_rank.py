"""common/feature_rank.py against golden numbers, NumPy's float64 SVD and what the definitions imply."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.feature_rank import (
    RANKS,
    SIGMAS,
    dead_units,
    dormant_fraction,
    feature_ranks,
    feature_stats,
    mean_norm,
    policy_variance,
)

# Outputs of the paper's published code on small fixed inputs (float32, CPU).
GOLDEN = np.load(Path(__file__).parent / "golden" / "reference.npz")
GOLDEN_NAMES = {
    "effective_rank": "effective_rank_vetterli",
    "pca_rank": "approximate_rank_pca",
    "srank": "srank_kumar",
    "feature_rank": "feature_rank_lyle",
    "matrix_rank": "pytorch_rank",
    "sigma_max": "lambda_1",
    "sigma_2": "lambda_2",
    "sigma_min": "lambda_N",
}
COUNTS = ("pca_rank", "srank", "feature_rank", "matrix_rank")
HALF = (torch.bfloat16, torch.float16)

properties = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 24)


def golden_features(case):
    def rng(seed):
        return np.random.default_rng(seed)

    if case == "a":
        x = rng(101).standard_normal((1024, 512))
    elif case == "b":
        r = rng(102)
        u, v, noise = (r.standard_normal(shape) for shape in ((1024, 5), (5, 512), (1024, 512)))
        x = u @ v + 1e-3 * noise
    elif case == "d":
        r = rng(104)
        x = np.tanh(r.standard_normal((2048, 12)) @ r.standard_normal((12, 64)) * 0.5)
    else:
        x = np.zeros((1024, 64))
    x = x.astype(np.float32)
    assert x.sum(dtype=np.float64) == pytest.approx(float(GOLDEN[f"ranks/{case}/input_sum"]), rel=1e-6)
    return torch.from_numpy(x)


def by_definition(features):
    """The definitions word by word, from NumPy's SVD in float64, one singular value at a time."""
    n, d = features.shape
    eps = torch.finfo(features.dtype).eps
    s = np.linalg.svd(features.double().numpy(), compute_uv=False).tolist()
    p = [x / sum(s) for x in s]

    def smallest_k(mass):
        return next(k for k in range(1, len(mass) + 1) if sum(mass[:k]) >= 0.99 * (1 - 1e-12) * sum(mass))

    return {
        "effective_rank": math.exp(-sum(x * math.log(x) for x in p if x > 0)),
        "pca_rank": smallest_k([x * x for x in s]),
        "srank": smallest_k(s),
        "feature_rank": sum(x / math.sqrt(n) > 0.01 for x in s),
        "matrix_rank": sum(x > s[0] * max(n, d) * eps for x in s),
        "stable_rank": float(features.double().square().sum()) / s[0] ** 2,
        "sigma_max": s[0] / math.sqrt(n),
        "sigma_2": (s[1] if len(s) > 1 else 0.0) / math.sqrt(n),
        "sigma_min": (s[-1] if len(s) == d else 0.0) / math.sqrt(n),
    }


def with_spectrum(sigma, n, d, seed=0):
    """Features (n, d) in float64 with the given singular values and random singular vectors."""
    r = np.random.default_rng(seed)
    u = np.linalg.qr(r.standard_normal((n, len(sigma))))[0]
    v = np.linalg.qr(r.standard_normal((d, len(sigma))))[0]
    return torch.from_numpy(u * np.asarray(sigma) @ v.T)


def random_features(n, d, rank, seed):
    """Rank `rank`, singular values over two decades of which σ₁ is not tiny: no count hangs on float32's rounding."""
    rank = min(rank, n, d)
    sigma = np.sort(10 ** np.random.default_rng(seed).uniform(-2, 0, rank))[::-1]
    return with_spectrum(sigma, n, d, seed)


def orthogonal(n, seed):
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0])


def values(stats):
    return {key: value.item() for key, value in stats.items()}


def assert_same_ranks(got, expected, rel=1e-4, keys=(*RANKS, *SIGMAS)):
    """Counts exactly; the others relative to their size, sigma_2 and sigma_min to that of sigma_max."""
    for key in keys:
        if key in COUNTS:
            assert got[key] == expected[key], key
        else:
            size = expected["sigma_max"] if key in SIGMAS else expected[key]
            assert got[key] == pytest.approx(expected[key], rel=0, abs=rel * size), key


# --- golden numbers


@pytest.mark.parametrize("case", ["a", "b", "d"])
def test_golden_ranks_and_singular_values(case):
    got = values(feature_ranks(golden_features(case)))
    golden = {key: GOLDEN[f"ranks/{case}/{name}"].item() for key, name in GOLDEN_NAMES.items()}
    golden["stable_rank"] = float((GOLDEN[f"ranks/{case}/svals"].astype(np.float64) ** 2).sum()) / (
        float(GOLDEN[f"ranks/{case}/svals"][0]) ** 2
    )
    assert_same_ranks(got, golden)
    assert got["sigma_max"] == pytest.approx(golden["sigma_max"], rel=1e-5)
    assert got["sigma_2"] == pytest.approx(golden["sigma_2"], rel=1e-5)
    # Golden singular values come from a float32 SVD, which is off by a few ε·σ₁.
    assert got["sigma_min"] == pytest.approx(golden["sigma_min"], rel=1e-5, abs=3e-7 * golden["sigma_max"])


def test_all_zero_features_have_rank_zero():
    """On purpose unlike the paper's code, whose numbers, given in feature_ranks' docstring, are checked here too."""
    paper = [GOLDEN[f"ranks/e/{GOLDEN_NAMES[key]}"].item() for key in RANKS[:5]]
    assert math.isnan(paper[0]) and paper[1:] == [1, 1, 0, 0]
    assert set(values(feature_ranks(golden_features("e"))).values()) == {0.0}


@pytest.mark.parametrize("case, activation", [("relu", "ReLU"), ("tanh", "Tanh"), ("leaky", "LeakyReLU")])
def test_golden_dead_units(case, activation):
    got = [dead_units(torch.from_numpy(x), activation).item() for x in GOLDEN[f"dead/{case}/features"]]
    assert got == GOLDEN[f"dead/{case}/out"].tolist()


def test_golden_feature_stats():
    features = torch.from_numpy(GOLDEN["fnorm/features"])
    got = values(feature_stats(features))
    assert got["feature_norm"] == pytest.approx(GOLDEN["fnorm/norm"].item(), rel=1e-5)
    assert got["feature_mean"] == pytest.approx(GOLDEN["fnorm/avg"].item(), rel=1e-5)
    assert got["feature_std"] == pytest.approx(GOLDEN["fnorm/std"].item(), rel=1e-5)
    assert mean_norm(features).item() == got["feature_norm"]


def forward(case, network, activation):
    """Outputs of a golden network, recomputed from its weights."""
    x = torch.from_numpy(GOLDEN[f"{case}/obs"])
    for layer in range(3):
        weight, bias = (torch.from_numpy(GOLDEN[f"{case}/{network}/{name}{layer}"]) for name in ("W", "b"))
        x = torch.nn.functional.linear(x, weight, bias)
        x = activation(x) if layer < 2 else x
    return x


def test_golden_policy_variance():
    probabilities = forward("disc", "policy_old", torch.relu).softmax(1)
    assert policy_variance(probabilities).item() == pytest.approx(GOLDEN["disc/div/policy_variance"].item(), rel=1e-5)
    loc, raw = forward("cont", "policy_old", torch.tanh).chunk(2, 1)
    scale = torch.nn.functional.softplus(raw + math.log(math.expm1(0.99))) + 0.01
    assert policy_variance(loc, scale).item() == pytest.approx(GOLDEN["cont/div/policy_variance"].item(), rel=1e-5)


# --- the Gram matrix's route against a float64 SVD

r = np.random.default_rng(0)
HARD_CASES = {
    "well conditioned": torch.from_numpy(r.standard_normal((1024, 256))),
    "wide": torch.from_numpy(r.standard_normal((100, 256))),
    "six decades": with_spectrum(10 ** -np.linspace(0, 6, 64), 1024, 64),
    "six decades, wide": with_spectrum(10 ** -np.linspace(0, 6, 40), 40, 300),
    "just above and below the threshold of matrix_rank": with_spectrum([1, 0.5, 1.3e-4, 1.1e-4, 2e-6], 1024, 64),
    "just above and below the threshold, small": with_spectrum([1, 3.2e-7, 1e-7], 3, 3),
    "rank 3": torch.from_numpy(r.standard_normal((512, 3)) @ r.standard_normal((3, 128))),
    "rank 1": torch.from_numpy(np.outer(r.standard_normal(512), r.standard_normal(128))),
    "one unit left": torch.from_numpy(np.abs(r.standard_normal((512, 128))) * (np.arange(128) == 5)),
    "half the units dead": torch.from_numpy(np.maximum(r.standard_normal((512, 128)), 0) * (np.arange(128) % 2)),
    "one sample repeated": torch.from_numpy(np.tile(r.standard_normal((1, 128)), (512, 1))),
    "collapsed onto one direction": torch.from_numpy(1e3 + 1e-2 * r.standard_normal((1024, 128))),
    "collapsed to near 0": torch.from_numpy(1e-30 * r.standard_normal((512, 64))),
    "exploded": torch.from_numpy(1e30 * r.standard_normal((512, 64))),
    "saturated tanh": torch.from_numpy(np.sign(r.standard_normal((512, 1))) * np.sign(r.standard_normal(64))),
}


@pytest.mark.parametrize("name", HARD_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_equal_those_of_a_float64_svd(name, dtype):
    features = HARD_CASES[name].to(dtype)
    assert_same_ranks(values(feature_ranks(features)), by_definition(features), rel=1e-5)


def test_what_the_gram_matrix_leaves_out_is_small():
    """The worst case of features below float64: every σ but the first just under what is told from rounding."""
    features = with_spectrum([1] + 511 * [4.7e-7], 1024, 512).float()
    got, expected = values(feature_ranks(features)), by_definition(features)
    assert 0 < expected["effective_rank"] - got["effective_rank"] < 4.5e-3
    assert_same_ranks(got, expected, rel=1e-6, keys={*RANKS, *SIGMAS} - {"effective_rank"})


def test_float64_counts_what_a_gram_matrix_would_lose():
    """σ = 1e-10·σ₁ is full rank in float64; its square is beneath the rounding of a float64 Gram matrix."""
    features = with_spectrum([1, 1e-2, 1e-10], 64, 3)
    got = values(feature_ranks(features))
    assert got["matrix_rank"] == 3
    assert got["sigma_min"] == pytest.approx(1e-10 / 8, rel=1e-4)
    assert feature_ranks(features.float())["matrix_rank"] == 2


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_measured_as_stored(dtype):
    features = torch.from_numpy(np.random.default_rng(1).standard_normal((96, 24))).to(dtype)
    assert_same_ranks(values(feature_ranks(features)), by_definition(features), rel=1e-6)
    exact = values(feature_ranks(features.float()))  # the same numbers, so only matrix_rank's ε differs
    assert_same_ranks(values(feature_ranks(features)), exact, rel=0, keys=set(exact) - {"matrix_rank"})
    assert exact["matrix_rank"] == 24


def test_matrix_rank_uses_the_epsilon_of_the_dtype():
    features = with_spectrum([1, 0.3, 1e-2], 32, 3)
    # thresholds: 32·2⁻⁷ = 0.25 and 32·2⁻¹⁰ = 0.03
    assert [feature_ranks(features.to(t))["matrix_rank"].item() for t in (torch.bfloat16, torch.float16)] == [2, 2]
    assert feature_ranks(with_spectrum([1, 0.1, 1e-2], 32, 3).bfloat16())["matrix_rank"] == 1
    assert feature_ranks(with_spectrum([1, 0.1, 1e-2], 32, 3).half())["matrix_rank"] == 2
    assert feature_ranks(torch.randn(128, 8).bfloat16())["matrix_rank"] == 0  # the threshold has passed σ₁
    assert feature_ranks(torch.randn(127, 8).bfloat16())["matrix_rank"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_do_not_hang_on_rounding(dtype):
    """Of 100 equal singular values 99 hold exactly 99 %, whatever the order and rounding of the sum."""
    for scale in (1.0, 0.1, 3e-7, 7e11):
        for features in (scale * torch.eye(100, dtype=dtype), scale * torch.eye(130, 100, dtype=dtype).flip(0)):
            got = values(feature_ranks(features))
            assert got["pca_rank"] == got["srank"] == 99
            assert got["effective_rank"] == pytest.approx(100, rel=1e-9)
            assert got["stable_rank"] == pytest.approx(100, rel=1e-9)
    for q in (5, 7, 9, 10, 14, 18):  # Σσ = 300/q, of which the last three hold 1 %; 1/q is not exact
        sigma = torch.tensor([1.0] + (300 - q) * [1 / q], dtype=torch.float64)
        assert feature_ranks(sigma.diag())["srank"] == 298 - q


def test_known_spectrum():
    got = values(feature_ranks(with_spectrum([4, 2, 2, 0.05], 100, 6)))
    p = np.array([4, 2, 2, 0.05]) / 8.05
    assert got["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert (got["pca_rank"], got["srank"], got["feature_rank"], got["matrix_rank"]) == (3, 3, 3, 4)
    assert got["stable_rank"] == pytest.approx(24.0025 / 16, rel=1e-9)
    assert (got["sigma_max"], got["sigma_2"]) == (pytest.approx(0.4, rel=1e-9), pytest.approx(0.2, rel=1e-9))
    assert got["sigma_min"] == pytest.approx(0, abs=1e-12)


# --- what the definitions imply


@properties
@given(n=sizes, d=sizes, rank=sizes, seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_orthogonal_maps_change_nothing(n, d, rank, seed, dtype):
    features = random_features(n, d, rank, seed)
    mapped = orthogonal(n, seed + 1) @ features @ orthogonal(d, seed + 2)
    expected, got = values(feature_ranks(features.to(dtype))), values(feature_ranks(mapped.to(dtype)))
    assert_same_ranks(got, expected, rel=1e-5)
    assert got["matrix_rank"] == min(n, d, rank)


@properties
@given(n=sizes, d=sizes, seed=seeds, exponent=st.integers(-60, 60))
def test_only_feature_rank_and_the_sigmas_depend_on_the_scale(n, d, seed, exponent):
    features = random_features(n, d, d, seed).float()
    got, expected = values(feature_ranks(features * 2.0**exponent)), values(feature_ranks(features))
    assert_same_ranks(got, expected, rel=1e-12, keys=set(RANKS) - {"feature_rank"})
    for key in SIGMAS:
        assert got[key] == pytest.approx(expected[key] * 2.0**exponent, rel=1e-12)
    assert got["feature_rank"] == by_definition(features * 2.0**exponent)["feature_rank"]
    assert got["feature_rank"] == {-60: 0, 60: min(n, d)}.get(exponent, got["feature_rank"])


def test_feature_rank_depends_on_the_scale():
    features = with_spectrum([1, 0.5], 16, 2).float()
    counts = [feature_ranks(c * features)["feature_rank"].item() for c in (1, 0.06, 0.01)]  # σ/√N: 0.25 and 0.125
    assert counts == [2, 1, 0]


@properties
@given(n=sizes, d=sizes, rank=sizes, seed=seeds, copies=st.integers(2, 4))
def test_repeated_samples_change_nothing(n, d, rank, seed, copies):
    """σ grows with √N. The rank is at most that of one copy, so padding with copies does not raise it."""
    features = random_features(n, d, rank, seed).float()
    assert_same_ranks(values(feature_ranks(features.repeat(copies, 1))), values(feature_ranks(features)), rel=1e-5)


@properties
@given(n=sizes, d=sizes, rank=sizes, seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64, *HALF]))
def test_bounds(n, d, rank, seed, dtype):
    features = random_features(n, d, rank, seed).to(dtype)
    got = values(feature_ranks(features))
    for key in RANKS:
        assert 0 <= got[key] <= min(n, d) * (1 + 1e-12), key
    # For p = σ/Σσ the stable rank, Σp²/max p², is at most 1/max p, and that at most exp of the entropy.
    assert 1 - 1e-12 <= got["stable_rank"] <= got["effective_rank"] * (1 + 1e-12)
    assert 1 <= got["pca_rank"] <= got["srank"]
    assert 0 <= got["sigma_min"] <= got["sigma_max"] and got["sigma_2"] <= got["sigma_max"]
    assert (got["sigma_min"] > 0) <= (n >= d)
    assert_same_ranks(got, by_definition(features), rel=1e-4)


@properties
@given(n=sizes, d=sizes, seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_transpose_keeps_what_does_not_count_samples(n, d, seed, dtype):
    features = random_features(n, d, 24, seed).to(dtype)
    keys = ("effective_rank", "pca_rank", "srank", "matrix_rank", "stable_rank")
    assert_same_ranks(values(feature_ranks(features.T)), values(feature_ranks(features)), rel=1e-9, keys=keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_samples_than_units_one_sample_one_unit(dtype):
    wide = values(feature_ranks(random_features(5, 20, 5, 0).to(dtype)))
    assert wide["matrix_rank"] == 5 and wide["sigma_2"] > 0 and wide["sigma_min"] == 0

    one_sample = values(feature_ranks(torch.tensor([[3.0, 0.0, 4.0]], dtype=dtype)))
    assert [one_sample[key] for key in RANKS] == pytest.approx([1] * 6)
    assert [one_sample[key] for key in SIGMAS] == pytest.approx([5, 0, 0])

    one_unit = values(feature_ranks(torch.tensor([[3.0], [4.0], [0.0], [0.0]], dtype=dtype)))
    assert [one_unit[key] for key in RANKS] == pytest.approx([1] * 6)
    assert [one_unit[key] for key in SIGMAS] == pytest.approx([2.5, 0, 2.5])

    assert set(values(feature_ranks(torch.zeros(1, 1, dtype=dtype))).values()) == {0.0}


@pytest.mark.parametrize("dtype, peak", [(torch.float32, 3e38), (torch.float64, 1e307), (torch.float16, 6e4)])
def test_the_largest_and_smallest_numbers_survive(dtype, peak):
    pattern = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    expected = values(feature_ranks(pattern))
    for scale in (peak, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).smallest_normal / 16):
        got = values(feature_ranks((pattern * scale).to(dtype)))
        assert_same_ranks(got, expected, rel=1e-6, keys=("effective_rank", "pca_rank", "srank", "stable_rank"))
        assert got["sigma_max"] == pytest.approx(expected["sigma_max"] * scale, rel=1e-2 if dtype in HALF else 1e-6)


# --- dead and dormant units, statistics


def test_dead_units_under_each_activation():
    features = torch.tensor(
        [
            # always 0, 0 once, always < 0, never > 0, constant, almost constant, varied
            [0.0, 0.0, -0.1, 0.0, 0.7, 0.7, 0.5],
            [0.0, 1.0, -0.2, -0.3, 0.7, 0.701, -0.5],
            [-0.0, 1.0, -0.3, -0.4, 0.7, 0.703, 0.9],
        ]
    )
    assert dead_units(features, "ReLU") == 1
    assert dead_units(features, "GELU") == 1
    assert dead_units(features, "LeakyReLU") == 1  # 0 is not negative
    assert dead_units(features, "Tanh") == 2  # 0.700, 0.701, 0.703 have an unbiased std of 0.0015
    assert dead_units(features[:2], "Tanh") == 3  # 0.700, 0.701 have 0.00071


def test_tanh_std_is_unbiased():
    features = torch.tensor([[0.0], [0.0019]])  # unbiased std 0.00134, biased 0.00095
    assert dead_units(features, "Tanh") == 0
    assert dead_units(features / 2, "Tanh") == 1


@properties
@given(seed=seeds, n=st.integers(2, 30), d=st.integers(1, 30), dead=st.integers(0, 30))
def test_dead_units_counts_the_units_that_were_killed(seed, n, d, dead):
    pre = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))
    pre[0], pre[1] = 1.0, -1.0  # every unit alive and varied, whatever the seed
    killed = torch.from_numpy(np.random.default_rng(seed).permutation(d)[: min(dead, d)].copy())
    pre[:, killed] = -30.0
    assert dead_units(torch.relu(pre), "ReLU") == len(killed)
    assert dead_units(torch.nn.functional.gelu(pre.float()), "GELU") == len(killed)
    assert dead_units(torch.nn.functional.leaky_relu(pre), "LeakyReLU") == len(killed)
    assert dead_units(torch.tanh(pre), "Tanh") == len(killed)


def test_dead_units_of_a_single_sample():
    features = torch.tensor([[0.0, -1.0, 1.0]])
    assert [dead_units(features, name).item() for name in ("ReLU", "GELU", "LeakyReLU")] == [1, 1, 1]
    assert dead_units(features, "Tanh").isnan()


def test_unknown_activation_names_the_known_ones():
    for name in ("relu", "Softplus", ""):
        with pytest.raises(ValueError, match="ReLU, GELU, LeakyReLU or Tanh") as error:
            dead_units(torch.zeros(2, 2), name)
        assert repr(name) in str(error.value)


def test_dormant_fraction():
    features = torch.tensor([[1.0, 0.0, -3.0, 0.05], [-1.0, 0.0, 3.0, -0.04]])  # mean |·| 1, 0, 3, 0.045; layer 1.011
    assert dormant_fraction(features) == 0.25
    assert dormant_fraction(features, tau=0.05) == 0.5
    assert dormant_fraction(features, tau=0.0) == 0.25
    assert dormant_fraction(torch.tensor([[1.0, 3.0]]), tau=0.5) == 0.5  # at the threshold is dormant
    assert dormant_fraction(torch.zeros(4, 3)) == 1
    assert dormant_fraction(torch.full((4, 3), 3e38)) == 0


@properties
@given(n=sizes, d=sizes, seed=seeds, dormant=st.integers(0, 24), scale=st.floats(1e-6, 1e6))
def test_dormant_fraction_counts_the_quiet_units_at_any_scale(n, d, seed, dormant, scale):
    features = torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 1, (n, d)))
    dormant = min(dormant, d - 1)
    features[:, :dormant] *= 0.01 / d  # at most 0.01/d against a mean of at least 0.5/d
    assert dormant_fraction(scale * features).item() == pytest.approx(dormant / d)


def test_feature_stats_by_hand():
    got = values(feature_stats(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, -1.0]])))
    assert got["feature_norm"] == pytest.approx((5 + 0 + math.sqrt(2)) / 3)
    assert got["feature_mean"] == pytest.approx(7 / 6)
    assert got["feature_std"] == pytest.approx((math.sqrt(0.5) + 0 + math.sqrt(2)) / 3)
    one_unit = values(feature_stats(torch.tensor([[3.0], [-4.0]])))
    assert (one_unit["feature_norm"], one_unit["feature_mean"]) == (3.5, -0.5) and math.isnan(one_unit["feature_std"])


def test_norms_do_not_overflow():
    assert mean_norm(torch.full((2, 4), 1e38)).item() == pytest.approx(2e38)
    assert feature_stats(torch.full((2, 4), 3e38))["feature_mean"].item() == pytest.approx(3e38)
    assert mean_norm(torch.full((2, 4), 6e4, dtype=torch.float16)).item() == pytest.approx(1.2e5, rel=1e-3)


def test_policy_variance_by_hand():
    loc, scale = torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[1.0], [4.0]])
    assert policy_variance(loc, scale).item() == pytest.approx((2 + 0 + 4.5) / 3)
    assert policy_variance(torch.full((8, 6), 1 / 6)).item() == pytest.approx(0, abs=1e-15)
    assert policy_variance(torch.tensor([[0.5, 0.5]])).isnan()
    assert policy_variance(loc, torch.full((2, 1), math.inf)).isnan()


def test_policy_variance_rejects_parameters_that_do_not_match():
    with pytest.raises(ValueError, match="same number of samples"):
        policy_variance(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="same number of samples"):
        policy_variance()
    with pytest.raises(ValueError, match="2-D"):
        policy_variance(torch.zeros(3, 2), torch.zeros(3))


# --- every function: what can't be measured, dtypes, devices, gradients


def measure(features):
    """Every number of the module, by name."""
    out = {**feature_ranks(features), **feature_stats(features)}
    out |= {f"dead_{name}": dead_units(features, name) for name in ("ReLU", "GELU", "LeakyReLU", "Tanh")}
    out |= {"dormant": dormant_fraction(features), "norm": mean_norm(features), "variance": policy_variance(features)}
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_non_finite_entry_makes_everything_nan(bad, dtype):
    features = torch.ones(6, 4, dtype=dtype)
    assert not any(math.isnan(x) for x in values(measure(features)).values())
    features[2, 3] = bad
    assert all(math.isnan(x) for x in values(measure(features)).values())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_features_make_everything_nan(shape):
    assert all(math.isnan(x) for x in values(measure(torch.zeros(shape))).values())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_small_shapes_give_no_warning(shape):
    assert not math.isnan(measure(torch.ones(shape))["norm"].item())


@pytest.mark.parametrize(
    "features",
    [torch.zeros(4), torch.zeros(2, 3, 4), torch.tensor(1.0), torch.zeros(2, 3, dtype=torch.int64)],
    ids=["1-D", "3-D", "0-D", "integer"],
)
def test_wrong_shape_or_dtype_raises(features):
    functions = (
        feature_ranks,
        feature_stats,
        dormant_fraction,
        mean_norm,
        policy_variance,
        lambda x: dead_units(x, "ReLU"),
    )
    for function in functions:
        with pytest.raises(ValueError, match="2-D floating-point"):
            function(features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_results_are_float64_scalars_without_gradient(dtype):
    features = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    before = features.detach().clone()
    got = measure(features)
    assert all(x.ndim == 0 and x.dtype == torch.float64 and not x.requires_grad for x in got.values())
    assert torch.equal(features, before)
    # The same numbers in float64 give the same measures, but for matrix_rank, whose threshold knows the dtype.
    exact = values(measure(before.double()))
    for key in exact.keys() - {"matrix_rank"}:
        assert got[key].item() == pytest.approx(exact[key], rel=1e-9), key


def test_non_contiguous_input():
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    view = features.T[::2, ::3]
    assert values(measure(view)) == pytest.approx(values(measure(view.contiguous())), rel=1e-12)


def compare_with_cpu(device, result_device):
    features = torch.relu(torch.randn(256, 64, generator=torch.Generator().manual_seed(0))) * (torch.arange(64) > 9)
    for case in (features, features.T.contiguous(), torch.zeros(8, 4), torch.full((8, 4), math.nan)):
        got, expected = measure(case.to(device)), measure(case)
        assert {x.device.type for x in got.values()} == {result_device}
        assert values(got) == pytest.approx(values(expected), rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    compare_with_cpu("cuda", "cuda")


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an MPS device")
def test_mps_agrees_with_cpu():
    compare_with_cpu("mps", "cpu")
