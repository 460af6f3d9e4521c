"""common/trust_region.py against golden numbers, torch.distributions and what the definitions imply."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

from common.trust_region import categorical_kl, feature_drift, normal_kl, ratio_stats

# Outputs of the paper's published code on small fixed inputs (float32, CPU).
GOLDEN = np.load(Path(__file__).parent / "golden" / "reference.npz")
HALF = (torch.bfloat16, torch.float16)
STATS = ("mean", "std", "min", "max")
GROUPS = ("ratio", "ratio_above", "ratio_below")
ALL_KEYS = {f"{group}_{stat}" for group in GROUPS for stat in STATS} | {
    "fraction_above",
    "fraction_below",
    "excess_ratio",
    "ratio_deviation",
    "kl_k1",
    "kl_k3",
}

properties = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
logratios = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=40)
clip_coefs = st.sampled_from([0.05, 0.1, 0.2, 0.5])


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def golden_logratio(case):
    return golden(f"{case}/new/log_prob") - golden(f"{case}/old/sample_log_prob")


def values(stats):
    return {key: value.item() for key, value in stats.items()}


# --- golden numbers


@pytest.mark.parametrize("case", ["disc", "cont"])
@pytest.mark.parametrize("clip_coef", [0.1, 0.2])
def test_golden_ratios(case, clip_coef):
    got = values(ratio_stats(golden_logratio(case), clip_coef))
    assert got.keys() == ALL_KEYS
    suffixes = {"ratio": "", "ratio_above": "_above_epsilon", "ratio_below": "_below_epsilon"}
    prefix = f"{case}/models_diff/eps{clip_coef}"
    for group, suffix in suffixes.items():
        for stat in STATS:
            name = f"{prefix}/{stat.replace('mean', 'avg')}_prob_ratio{suffix}"
            assert got[f"{group}_{stat}"] == pytest.approx(GOLDEN[name].item(), rel=1e-5), name
    excess = GOLDEN[f"{prefix}/avg_prob_ratio_above_epsilon"] / GOLDEN[f"{prefix}/avg_prob_ratio_below_epsilon"]
    assert got["excess_ratio"] == pytest.approx(excess.item(), rel=1e-5)
    assert got["kl_k1"] == pytest.approx(GOLDEN[f"{case}/kl_samples/kl_sample_naive"].item(), rel=1e-5)
    assert got["kl_k3"] == pytest.approx(GOLDEN[f"{case}/kl_samples/kl_sample_schulman"].item(), rel=1e-5)


def test_golden_share_of_clipped_samples():
    """The paper's clip fraction: above 1 + ε with a positive advantage, or below 1 − ε with a negative one."""
    logratio, advantage = golden_logratio("disc"), golden("disc/advantage_actor").squeeze(1)
    clipped = [
        len(logratio[sign]) / len(logratio) * ratio_stats(logratio[sign], 0.1)[key].item()
        for sign, key in ((advantage > 0, "fraction_above"), (advantage < 0, "fraction_below"))
    ]
    assert sum(clipped) == GOLDEN["disc/ppo/clip/clipped_fraction"].item()


@pytest.mark.parametrize("case", ["disc", "cont"])
@pytest.mark.parametrize("network", ["policy", "value"])
@pytest.mark.parametrize("layer", ["features", "features_preactivation", "all_preactivations"])
def test_golden_feature_drift(case, network, layer):
    before, after = (golden(f"{case}/{when}/{layer}_{network}") for when in ("old", "new"))
    got = values(feature_drift(before, after))
    prefix = f"{case}/models_diff/eps0.1/{layer}_{network}"
    assert got["l2"] == pytest.approx(GOLDEN[f"{prefix}_l2_batch"].item(), rel=1e-5)
    assert got["cosine"] == pytest.approx(GOLDEN[f"{prefix}_cosine"].item(), rel=1e-5)


def test_golden_categorical_kl():
    old, new = golden("disc/old/logits"), golden("disc/new/logits")
    forward, reverse = categorical_kl(old, new), categorical_kl(new, old)
    assert forward.shape == (64,)
    assert forward.mean().item() == pytest.approx(GOLDEN["disc/models_diff/eps0.1/kl_dist_batch"].item(), rel=1e-5)
    assert reverse.mean().item() == pytest.approx(GOLDEN["disc/models_diff/reverse_kl"].item(), rel=1e-5)


def test_golden_normal_kl():
    old, new = ([golden(f"cont/{when}/{name}") for name in ("loc", "scale")] for when in ("old", "new"))
    forward, reverse = normal_kl(*old, *new), normal_kl(*new, *old)
    assert forward.shape == (64,)
    assert forward.mean().item() == pytest.approx(GOLDEN["cont/models_diff/eps0.1/kl_dist_batch"].item(), rel=1e-5)
    assert reverse.mean().item() == pytest.approx(GOLDEN["cont/models_diff/reverse_kl"].item(), rel=1e-5)


# --- ratios


@properties
@given(logratio=logratios, clip_coef=clip_coefs)
def test_ratio_stats_partition_the_samples(logratio, clip_coef):
    """Against the definitions in plain Python: which samples are in which group, and which keys exist."""
    logratio = torch.tensor(logratio)
    ratios = logratio.exp()
    groups = {
        "ratio": ratios.tolist(),
        "ratio_above": [r.item() for r in ratios if r > 1 + clip_coef],
        "ratio_below": [r.item() for r in ratios if r < 1 - clip_coef],
    }
    got = values(ratio_stats(logratio, clip_coef))
    expected_keys = {"fraction_above", "fraction_below", "ratio_deviation", "kl_k1", "kl_k3"}
    for group, members in groups.items():
        if members:
            expected_keys |= {f"{group}_mean", f"{group}_min", f"{group}_max"}
            assert got[f"{group}_mean"] == pytest.approx(np.mean(members), rel=1e-6)
            assert (got[f"{group}_min"], got[f"{group}_max"]) == (min(members), max(members))
        if len(members) > 1:
            expected_keys |= {f"{group}_std"}
            assert got[f"{group}_std"] == pytest.approx(np.std(members, ddof=1), rel=1e-6, abs=1e-12)
    if groups["ratio_above"] and groups["ratio_below"]:
        expected_keys |= {"excess_ratio"}
        assert got["excess_ratio"] == got["ratio_above_mean"] / got["ratio_below_mean"] > 1 + clip_coef
    assert got.keys() == expected_keys

    assert got["fraction_above"] == len(groups["ratio_above"]) / len(ratios)
    assert got["fraction_below"] == len(groups["ratio_below"]) / len(ratios)
    assert got["fraction_above"] + got["fraction_below"] <= 1
    assert got.get("ratio_above_min", math.inf) > 1 + clip_coef
    assert got.get("ratio_below_max", -math.inf) < 1 - clip_coef
    assert got["ratio_min"] <= got["ratio_mean"] * (1 + 1e-12) and got["ratio_mean"] <= got["ratio_max"] * (1 + 1e-12)
    assert got["kl_k1"] == pytest.approx(-np.mean(logratio.tolist()), rel=1e-6, abs=1e-9)
    assert got["kl_k3"] >= 0


@properties
@given(logratio=logratios, clip_coef=clip_coefs, seed=seeds)
def test_ratio_stats_do_not_depend_on_order_or_shape(logratio, clip_coef, seed):
    logratio = torch.tensor(logratio)
    expected = values(ratio_stats(logratio, clip_coef))
    shuffled = logratio[torch.randperm(len(logratio), generator=torch.Generator().manual_seed(seed))]
    assert values(ratio_stats(shuffled, clip_coef)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert values(ratio_stats(logratio[:, None], clip_coef)) == expected


def test_the_bounds_themselves_are_in_neither_group():
    at_the_bound = values(ratio_stats(torch.zeros(4), 0.0))
    assert (at_the_bound["fraction_above"], at_the_bound["fraction_below"]) == (0, 0)
    beyond = values(ratio_stats(torch.tensor([1e-6, 0.0, -1e-6, -1e-6]), 0.0))
    assert (beyond["fraction_above"], beyond["fraction_below"]) == (0.25, 0.5)


def test_absent_keys():
    def keys(*ratios):
        return ALL_KEYS - ratio_stats(torch.tensor(ratios).log(), 0.1).keys()

    above, below = ({f"ratio_{group}_{stat}" for stat in STATS} for group in ("above", "below"))
    assert keys(1.0, 1.0) == above | below | {"excess_ratio"}
    assert keys(1.0, 1.0, 2.0, 3.0) == below | {"excess_ratio"}
    assert keys(1.0, 1.0, 0.2, 0.3) == above | {"excess_ratio"}
    assert keys(2.0, 0.5) == {"ratio_above_std", "ratio_below_std"}
    assert keys(2.0, 3.0, 0.5, 0.6) == set()
    assert keys(1.0) == above | below | {"excess_ratio", "ratio_std"}
    assert ratio_stats(torch.zeros(0), 0.1) == {} == ratio_stats(torch.zeros(4, 0), 0.1)


def test_identical_policies():
    got = values(ratio_stats(torch.zeros(7), 0.1))
    assert got == {
        "ratio_mean": 1,
        "ratio_std": 0,
        "ratio_min": 1,
        "ratio_max": 1,
        "fraction_above": 0,
        "fraction_below": 0,
        "kl_k1": 0,
        "kl_k3": 0,
        "ratio_deviation": 0,
    }


def test_overflow_is_reported_as_it_is():
    got = values(ratio_stats(torch.tensor([100.0, 0.0, -1.0, 1.0]), 0.1))  # exp(100) is beyond float32
    for key in ("ratio_mean", "ratio_max", "ratio_above_mean", "ratio_above_max", "excess_ratio", "kl_k3"):
        assert got[key] == math.inf, key
    assert math.isnan(got["ratio_std"]) and math.isnan(got["ratio_above_std"])
    assert got["ratio_above_min"] == pytest.approx(math.e) and got["ratio_below_mean"] == pytest.approx(1 / math.e)
    assert (got["fraction_above"], got["fraction_below"]) == (0.5, 0.25)
    assert got["kl_k1"] == -25

    assert ratio_stats(torch.tensor([100.0], dtype=torch.float64), 0.1)["ratio_max"].item() == pytest.approx(
        math.exp(100)
    )
    both_infinite = values(ratio_stats(torch.tensor([math.inf, 0.0]), 0.1))
    assert (both_infinite["ratio_max"], both_infinite["kl_k3"], both_infinite["kl_k1"]) == (
        math.inf,
        math.inf,
        -math.inf,
    )
    impossible_now = values(ratio_stats(torch.tensor([-math.inf, 0.0]), 0.1))
    assert (impossible_now["ratio_min"], impossible_now["kl_k3"], impossible_now["kl_k1"]) == (0, math.inf, math.inf)
    vanished = values(ratio_stats(torch.tensor([-1000.0, 1.0]), 0.1))
    assert vanished["ratio_below_mean"] == 0 and vanished["excess_ratio"] == math.inf


def test_large_ratios_do_not_overflow_in_the_sums():
    got = values(ratio_stats(torch.full((100,), 88.0).index_fill(0, torch.tensor([0]), 0.0), 0.1))
    assert got["ratio_mean"] == pytest.approx(0.99 * math.exp(88), rel=1e-5)
    assert math.isfinite(got["ratio_std"]) and got["ratio_above_std"] == 0


def test_nan_propagates_to_every_key():
    for logratio in ([math.nan], [math.nan, 0.0, 5.0, -5.0], [0.0, math.inf, math.nan]):
        got = values(ratio_stats(torch.tensor(logratio), 0.1))
        assert got.keys() == ALL_KEYS
        assert all(math.isnan(x) for x in got.values())


def test_k3_keeps_its_digits_for_small_steps():
    """k3 ≈ (log r)²/2: in float32, r − 1 − log r is noise here."""
    assert ratio_stats(torch.full((64,), 1e-5), 0.1)["kl_k3"].item() == pytest.approx(5e-11, rel=1e-4)


def test_k1_and_k3_estimate_the_divergence():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 1, 5, generator=generator) * 0.3
    actions = Categorical(logits=old).sample((400_000,)).squeeze(1)
    logratio = (new.log_softmax(-1) - old.log_softmax(-1)).squeeze(0)[actions]
    kl = categorical_kl(old, new).item()
    got = values(ratio_stats(logratio, 0.1))
    assert got["kl_k1"] == pytest.approx(kl, abs=5 * logratio.std().item() / math.sqrt(400_000))
    assert got["kl_k3"] == pytest.approx(kl, rel=0.02)


# --- feature drift


def test_feature_drift_by_hand():
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert values(feature_drift(before, after)) == pytest.approx({"l2": (1 + 9 + 0 + 1) / 4, "cosine": 0.5})
    assert values(feature_drift(before, before)) == pytest.approx({"l2": 0, "cosine": 1})
    assert values(feature_drift(before, -before)) == pytest.approx({"l2": 20 / 4, "cosine": -1})


def test_rows_of_zeros_count_as_no_similarity():
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert feature_drift(rows, rows)["cosine"].item() == pytest.approx(0.5)
    assert feature_drift(rows, rows[[0, 2, 1, 3]])["cosine"].item() == pytest.approx(0.25)
    assert values(feature_drift(torch.zeros(3, 2), torch.zeros(3, 2))) == {"l2": 0, "cosine": 0}


@properties
@given(
    n=st.integers(1, 20),
    d=st.integers(1, 20),
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.float64, *HALF]),
)
def test_feature_drift_properties(n, d, seed, dtype):
    before, after = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    got, swapped = values(feature_drift(before, after)), values(feature_drift(after, before))
    assert got == pytest.approx(swapped, rel=1e-6)
    x, y = before.double().numpy(), after.double().numpy()
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert got["l2"] == pytest.approx(((x - y) ** 2).mean(), rel=1e-5)
    assert got["cosine"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert abs(got["cosine"]) <= 1 + 1e-6
    lengths = torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None]
    stretched = values(feature_drift(before.double() * lengths, after.double()))
    assert stretched["cosine"] == pytest.approx(got["cosine"], abs=1e-5)
    doubled = values(feature_drift(2 * before, 2 * after))
    assert doubled["l2"] == pytest.approx(4 * got["l2"], rel=1e-5)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e-9, 1e9, 1e19, 1e37])
def test_cosine_of_tiny_and_huge_rows(scale):
    before, after = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert feature_drift(before * scale, after)["cosine"].item() == pytest.approx(0.6, rel=1e-4)
    assert feature_drift(before * scale, after * scale)["cosine"].item() == pytest.approx(0.6, rel=1e-4)
    l2 = feature_drift(before * scale, after * scale)["l2"].item()
    assert l2 == pytest.approx(10 * float(np.float32(scale)) ** 2, rel=1e-4)


def test_feature_drift_of_non_finite_and_empty_features():
    x = torch.ones(3, 2)
    for bad in (math.nan, math.inf):
        y = x.clone()
        y[1, 1] = bad
        for got in (values(feature_drift(x, y)), values(feature_drift(y, x))):
            assert not math.isfinite(got["l2"]) and math.isnan(got["cosine"])
    for shape in ((0, 4), (4, 0)):
        assert all(math.isnan(v) for v in values(feature_drift(torch.zeros(shape), torch.zeros(shape))).values())


@pytest.mark.parametrize("shapes", [((3, 2), (2, 3)), ((3, 2), (1, 2)), ((3, 2), (3, 1)), ((3, 2), (2,)), ((3,), (3,))])
def test_feature_drift_rejects_shapes(shapes):
    with pytest.raises(ValueError, match="expected"):
        feature_drift(*(torch.ones(shape) for shape in shapes))


# --- KL divergences


@properties
@given(n=st.integers(1, 8), actions=st.integers(1, 10), seed=seeds, scale=st.sampled_from([1e-3, 1.0, 10.0]))
def test_categorical_kl_properties(n, actions, seed, scale):
    p, q = scale * torch.randn(2, n, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = categorical_kl(p, q)
    assert got.shape == (n,)
    torch.testing.assert_close(got, kl_divergence(Categorical(logits=p), Categorical(logits=q)), rtol=1e-7, atol=1e-12)
    assert (got >= -1e-14).all()
    assert torch.equal(categorical_kl(p, p), torch.zeros_like(got))
    assert actions == 1 or (got > 0).all()
    torch.testing.assert_close(categorical_kl(p + 7, q - 3), got, rtol=1e-7, atol=1e-12)  # unnormalised logits


def test_categorical_kl_of_impossible_actions():
    inf = math.inf
    p = torch.tensor([[0.0, -inf, 0.0], [0.0, 0.0, 0.0], [0.0, -inf, -inf], [0.0, -200.0, -300.0]], requires_grad=True)
    q = torch.tensor([[0.0, -inf, 0.0], [0.0, -inf, 0.0], [0.0, 0.0, -inf], [0.0, -300.0, -inf]], requires_grad=True)
    kl = categorical_kl(p, q)
    assert kl.tolist() == pytest.approx([0, inf, math.log(2), 0])
    kl[[0, 2, 3]].sum().backward()  # not the infinite one
    finite = [0, 2, 3]
    assert p.grad[finite].isfinite().all() and q.grad[finite].isfinite().all()
    assert categorical_kl(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2)).isnan().all()
    assert categorical_kl(torch.zeros(1, 2), torch.tensor([[0.0, math.nan]])).isnan().all()


def test_categorical_kl_gradient():
    """d KL(p ‖ q) / d logits_q = q − p."""
    p, q = (
        torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_().unbind()
    )
    (gradient,) = torch.autograd.grad(categorical_kl(p, q).sum(), q)
    torch.testing.assert_close(gradient, q.softmax(-1) - p.softmax(-1))
    assert torch.autograd.gradcheck(categorical_kl, (p, q))


@properties
@given(n=st.integers(1, 8), dims=st.integers(1, 10), seed=seeds)
def test_normal_kl_properties(n, dims, seed):
    draws = torch.randn(4, n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loc_p, loc_q, scale_p, scale_q = draws[0], draws[1], (0.7 * draws[2]).exp(), (0.7 * draws[3]).exp()
    got = normal_kl(loc_p, scale_p, loc_q, scale_q)
    assert got.shape == (n,)
    expected = kl_divergence(Normal(loc_p, scale_p), Normal(loc_q, scale_q)).sum(-1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (got > 0).all()
    assert torch.equal(normal_kl(loc_p, scale_p, loc_p, scale_p), torch.zeros_like(got))
    # An affine map of the space changes nothing.
    torch.testing.assert_close(normal_kl(3 * loc_p + 1, 3 * scale_p, 3 * loc_q + 1, 3 * scale_q), got)


def test_normal_kl_by_hand_and_gradient():
    one = torch.ones(1, 2, dtype=torch.float64)
    assert normal_kl(0 * one, one, 3 * one, one).item() == pytest.approx(9)  # 2 dimensions of 3²/2
    assert normal_kl(0 * one, 2 * one, 0 * one, one).item() == pytest.approx(2 * (1.5 - math.log(2)))
    inputs = [x.requires_grad_() for x in (0.1 * one, 0.5 * one, -0.2 * one, 0.8 * one)]
    assert torch.autograd.gradcheck(normal_kl, inputs)


def test_kl_rejects_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="equal shapes"):
        categorical_kl(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="equal shapes"):
        normal_kl(torch.zeros(3, 2), torch.ones(2), torch.zeros(3, 2), torch.ones(3, 2))


# --- dtypes, devices, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_dtypes(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(32, 6, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    scale = (torch.rand(32, 6, generator=generator) + 0.5).to(dtype)
    statistics = ratio_stats(x, 0.1) | feature_drift(x, y)
    assert all(v.ndim == 0 and v.dtype == torch.float64 and not v.requires_grad for v in statistics.values())
    exact = ratio_stats(x.double(), 0.1) | feature_drift(x.double(), y.double())
    assert values(statistics) == pytest.approx(values(exact), rel=1e-5, abs=1e-6)

    kls = categorical_kl(x, y), normal_kl(x, scale, y, scale.flip(0))
    exact = categorical_kl(x.double(), y.double()), normal_kl(*(v.double() for v in (x, scale, y, scale.flip(0))))
    for got, expected in zip(kls, exact, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.requires_grad
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def compare_with_cpu(device, result_device):
    x, y = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))

    def measure(x, y):
        return ratio_stats(x[:, 0], 0.1) | feature_drift(x, y)

    got = measure(x.to(device), y.to(device))
    assert {v.device.type for v in got.values()} == {result_device}
    assert values(got) == pytest.approx(values(measure(x, y)), rel=1e-5)
    empty, nan = torch.zeros(0, 2, device=device), torch.full((2,), math.nan, device=device)
    assert {v.device.type for v in (feature_drift(empty, empty) | ratio_stats(nan, 0.1)).values()} == {result_device}
    for function, arguments in ((categorical_kl, (x, y)), (normal_kl, (x, y.exp(), y, x.exp()))):
        on_device = function(*(v.to(device) for v in arguments))
        assert on_device.device.type == device
        torch.testing.assert_close(on_device.cpu(), function(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    compare_with_cpu("cuda", "cuda")


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an MPS device")
def test_mps_agrees_with_cpu():
    compare_with_cpu("mps", "cpu")
