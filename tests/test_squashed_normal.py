"""The squashed normal policy, its losses and its gradients against the numbers of an independent implementation."""

import dataclasses
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference.npz")
script = importlib.import_module("ppo_mujoco")
BOXES = {"unit": (-1.0, 1.0), "sym04": (-0.4, 0.4), "asym": (0.0, 2.0)}


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def log_prob(actions, loc, scale, low, high):
    """log π of ``actions`` (…, A) in the box, made of the script's parts."""
    half_width = torch.full(actions.shape[-1:], (high - low) / 2)
    z = script.unsquash((actions - (high + low) / 2) / half_width)
    return script.normal_log_prob(z, loc, scale) - script.log_det_squash(z, half_width)


def test_loc_and_scale():
    loc, scale = script.loc_and_scale(golden("tanhnormal/extractor_in"))
    torch.testing.assert_close(loc, golden("tanhnormal/extractor_loc"))
    torch.testing.assert_close(scale, golden("tanhnormal/extractor_scale"), rtol=1e-6, atol=1e-7)
    assert script.loc_and_scale(torch.zeros(1, 2))[1].item() == pytest.approx(1, abs=1e-6)
    extreme = script.loc_and_scale(torch.tensor([[0.0, -1e4], [0.0, 1e4]]))[1]
    assert extreme.flatten().tolist() == pytest.approx([0.01, 1e4], rel=1e-4)


@pytest.mark.parametrize("box", BOXES)
def test_log_probabilities_on_a_grid(box):
    low, high = BOXES[box]
    midpoint, half_width = (high + low) / 2, (high - low) / 2
    actions, locs, scales = (golden(f"tanhnormal/{name}") for name in ("acts", "locs", "scales"))
    grid = torch.meshgrid(actions * half_width + midpoint, locs + midpoint, scales, indexing="ij")
    ours = log_prob(*(x.unsqueeze(-1) for x in grid), low, high)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, golden(f"tanhnormal/logp_{box}"), rtol=1e-4, atol=1e-4)
    modes = script.squash(locs + midpoint).unsqueeze(1) * half_width + midpoint  # the greedy action
    torch.testing.assert_close(modes.expand(-1, len(scales)), golden(f"tanhnormal/mode_{box}"), rtol=1e-5, atol=1e-6)


@given(
    z=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=8),
    loc=st.floats(-50, 50, width=32),
    scale=st.floats(0.015625, 64, width=32),
    box=st.tuples(st.floats(-2, 2), st.floats(0.001953125, 4)).map(lambda pair: (pair[0], pair[0] + pair[1])),
)
def test_actions_stay_in_the_box_and_their_log_probabilities_finite(z, loc, scale, box):
    z = torch.tensor(z)
    u = script.squash(z)
    low, high = np.float64(box[0]), np.float64(box[1])
    actions = u.numpy() * ((high - low) / 2) + (high + low) / 2  # as the rollout stretches them
    assert (actions > low).all() and (actions < high).all()
    back = script.unsquash(u)
    assert back.isfinite().all() and (back.abs() < 8).all()
    near = z.abs() < 3
    torch.testing.assert_close(back[near], z[near], rtol=1e-3, atol=1e-4)
    loc, scale = torch.full_like(z, loc), torch.full_like(z, scale)
    half_width = torch.full_like(z, (high - low) / 2)
    for at in (back, z):
        assert torch.isfinite(script.normal_log_prob(at, loc, scale) - script.log_det_squash(at, half_width))
    assert torch.isfinite(script.entropy_estimate(loc, scale, torch.linspace(-6, 6, len(z)), half_width))


def test_density_integrates_to_one():
    u = torch.linspace(-1 + 1e-5, 1 - 1e-5, 200_001, dtype=torch.float64).unsqueeze(1)
    for loc, scale, (low, high) in ((0.3, 0.5, (-0.4, 0.4)), (-1.0, 1.0, (0.0, 2.0))):
        actions = u * (high - low) / 2 + (high + low) / 2
        loc, scale = torch.full_like(u, loc), torch.full_like(u, scale)
        density = log_prob(actions, loc, scale, low, high).exp()
        assert torch.trapezoid(density, actions.squeeze(1)).item() == pytest.approx(1, abs=2e-3)


def test_entropy_estimate_is_unbiased():
    """Its mean over many samples is the entropy, here by numerical integration over the box."""
    generator = torch.Generator().manual_seed(0)
    loc, scale, half_width = 0.4, 0.7, 0.4
    noise = torch.randn((400_000, 1), generator=generator)
    estimate = script.entropy_estimate(
        torch.full_like(noise, loc), torch.full_like(noise, scale), noise, torch.tensor([half_width])
    ).mean()
    actions = (torch.linspace(-1 + 1e-5, 1 - 1e-5, 400_001, dtype=torch.float64) * half_width).unsqueeze(1)
    logp = log_prob(actions, torch.full_like(actions, loc), torch.full_like(actions, scale), -half_width, half_width)
    assert estimate.item() == pytest.approx(-torch.trapezoid(logp.exp() * logp, actions.squeeze(1)).item(), abs=5e-3)


class Mlp(torch.nn.Module):
    """The reference's network: two hidden layers of 16 with Tanh."""

    def __init__(self, name):
        super().__init__()
        self.weights = torch.nn.ParameterDict(
            {f"{kind}{i}": golden(f"cont/{name}/{kind}{i}").clone() for kind in "Wb" for i in range(3)}
        )

    def forward(self, x):
        preactivations = []
        for i in range(2):
            preactivations.append(torch.nn.functional.linear(x, self.weights[f"W{i}"], self.weights[f"b{i}"]))
            x = preactivations[-1].tanh()
        output = torch.nn.functional.linear(x, self.weights["W2"], self.weights["b2"])
        return script.NetworkOutput(output, x, preactivations[-1], torch.cat(preactivations, dim=1))


def pfo_flags(variant):
    """The flags of the reference's variant names, as feat-l2-regularize-preall."""
    if not variant.startswith("feat-"):
        return {"pfo_coef": 0.0}
    _, distance, mode, where = variant.split("-")
    return {
        "pfo_coef": 1.0,
        "pfo_distance": distance,
        "pfo_mode": mode,
        "pfo_layers": "all" if where == "preall" else "last",
        "pfo_on": "features" if where == "post" else "preactivations",
    }


ACTOR_VARIANTS = ["clip", "noclip", "nonorm", "kl"] + [
    f"feat-{distance}-{mode}-{where}"
    for distance in ("l2", "cosine")
    for mode in ("regularize", "clip")
    for where in ("pre", "preall", "post")
]


def default_args(**changes):
    args = script.Args()
    args.batch_size = args.num_iterations = 0
    return dataclasses.replace(args, **changes)


def before_and_now(kind):
    old, new = Mlp(f"{kind}_old"), Mlp(f"{kind}_new")
    with torch.no_grad():
        before = old(golden("cont/obs"))
    return before, new(golden("cont/obs")), new


def recorded(before):
    """What the rollout records of the actor, from the reference's actions in the box ±1."""
    loc, scale = script.loc_and_scale(before.output)
    z = script.unsquash(golden("cont/action"))
    return {"z": z, "loc": loc, "scale": scale, "logprobs": script.normal_log_prob(z, loc, scale)}


@pytest.mark.parametrize("variant", ACTOR_VARIANTS)
def test_actor_loss_and_gradient(variant):
    flags = {"ent_coef": 0.0, "clip_coef": 0.2, "pfo_limit": 0.1, **pfo_flags(variant)}
    changes = {"noclip": {"clip_objective": False}, "nonorm": {"norm_adv": False}, "kl": {"kl_coef": 1.0}}
    args = default_args(**flags, **changes.get(variant, {}))
    before, now, new = before_and_now("policy")
    mb = {
        **recorded(before),
        "advantages": golden("cont/advantage_actor").squeeze(1),
        "actor_held": script.pfo_input(before, args.pfo_layers, args.pfo_on),
        "noise": torch.randn((64, 3), generator=torch.Generator().manual_seed(0)),
    }
    held = script.pfo_input(now, args.pfo_layers, args.pfo_on)
    loss, logged = script.actor_loss(now.output, held, mb, torch.ones(3), torch.tensor(1.0), args)
    loss.backward()

    def expected(name):
        return GOLDEN[f"cont/ppo/{variant}/{name}"]

    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(logged["policy_loss"].detach(), expected("loss_policy"), **close)
    np.testing.assert_allclose(logged["kl"].detach(), expected("kl"), rtol=1e-5)
    assert logged["clipfrac"].item() >= expected("clipped_fraction")
    if variant.startswith("feat-"):
        np.testing.assert_allclose(logged["pfo_actor"].detach(), expected("features_policy_loss_no_coef"), rtol=1e-5)
        assert logged["pfo_out_of_trust"].item() == expected("features_policy_outoftrust_fraction")
    total = expected("loss_policy") + expected("loss_kl")
    if "regularize" in variant:
        total = total + expected("loss_features_policy")
    np.testing.assert_allclose(loss.detach(), total, **close)

    norm = torch.cat([p.grad.flatten() for p in new.parameters()]).norm()
    np.testing.assert_allclose(norm, expected("grad_norm_policy"), rtol=1e-4)
    for name, p in new.weights.items():
        if f"cont/ppo/{variant}/grad/{name}" in GOLDEN:
            np.testing.assert_allclose(p.grad, expected(f"grad/{name}"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["base"] + [v for v in ACTOR_VARIANTS if v.startswith("feat-")])
def test_critic_loss_and_gradient(variant):
    flags = pfo_flags(variant)
    args = default_args(pfo_limit=0.1, critic_pfo_coef=flags.pop("pfo_coef"), **flags)
    before, now, new = before_and_now("value")
    mb = {
        "returns": golden("cont/value_target_critic").squeeze(1),
        "values": before.output.squeeze(1),
        "critic_held": script.pfo_input(before, args.pfo_layers, args.pfo_on),
    }
    held = script.pfo_input(now, args.pfo_layers, args.pfo_on)
    loss, logged = script.critic_loss(now.output.squeeze(1), held, mb, args)
    loss.backward()

    def expected(name):
        return GOLDEN[f"cont/vloss/{variant}/{name}"]

    np.testing.assert_allclose(logged["value_loss"].detach(), expected("loss_critic"), rtol=1e-5)
    np.testing.assert_allclose(logged["pfo_critic"].detach(), expected("features_value_loss_no_coef"), rtol=1e-5)
    total = expected("loss_critic") + (expected("loss_features_value") if "regularize" in variant else 0)
    np.testing.assert_allclose(loss.detach(), total, rtol=1e-5)
    norm = torch.cat([p.grad.flatten() for p in new.parameters()]).norm()
    np.testing.assert_allclose(norm, expected("grad_norm_value"), rtol=1e-4)
    for name, p in new.weights.items():
        if f"cont/vloss/{variant}/grad/{name}" in GOLDEN:
            np.testing.assert_allclose(p.grad, expected(f"grad/{name}"), rtol=1e-4, atol=1e-6)


def test_log_ratios_are_clamped():
    """Beyond [ln 1e-7, ln 1e9] the ratio is held, and gives no gradient."""
    args = default_args(norm_adv=False, clip_objective=False)
    mb = {"z": torch.zeros(2, 1), "loc": torch.zeros(2, 1), "scale": torch.ones(2, 1), "advantages": torch.ones(2)}
    mb |= {"logprobs": torch.tensor([-300.0, 300.0]), "noise": torch.zeros(2, 1), "actor_held": torch.zeros(2, 1)}
    output = torch.zeros((2, 2), requires_grad=True)
    loss, logged = script.actor_loss(output, torch.zeros(2, 1), mb, torch.ones(1), torch.tensor(0.0), args)
    loss.backward()
    assert logged["policy_loss"].item() == pytest.approx(-(1e9 + 1e-7) / 2, rel=1e-5)
    assert logged["old_approx_kl"].item() == pytest.approx(-(math.log(1e9) + math.log(1e-7)) / 2, rel=1e-5)
    assert not output.grad.any()


def test_entropy_bonus_reaches_the_gradient():
    args = default_args(ent_coef=1.0, norm_adv=False)
    mb = {"z": torch.zeros(8, 1), "loc": torch.zeros(8, 1), "scale": torch.ones(8, 1), "advantages": torch.zeros(8)}
    mb |= {"logprobs": torch.zeros(8), "noise": torch.linspace(-1, 1, 8).unsqueeze(1), "actor_held": torch.zeros(8, 1)}
    output = torch.zeros((8, 2), requires_grad=True)
    loss, logged = script.actor_loss(output, torch.zeros(8, 1), mb, torch.ones(1), torch.tensor(0.0), args)
    loss.backward()
    assert loss.item() == pytest.approx(-logged["entropy"].item())
    assert output.grad[:, 1].any()


@pytest.mark.parametrize("loc", [-20.0, 0.5, 20.0])
def test_entropy_in_the_diagnostics_is_that_of_the_rollouts_noise(loc):
    """Also where the policy is saturated, and the actions no longer tell the noise that they were made of."""
    torch.manual_seed(0)
    output = torch.cat([torch.full((500, 3), loc), torch.zeros(500, 3)], dim=1)
    noise = torch.randn(500, 3)
    z = script.unsquash(script.sample(output, noise))
    layers = torch.randn(500, 4)
    networks = {"actor": script.NetworkOutput(output, layers, layers, layers)}
    networks["critic"] = script.NetworkOutput(output[:, :1], layers, layers, layers)
    tags = script.diagnose(networks, networks, z, noise, torch.ones(3), default_args(activation="Tanh"))
    base = torch.distributions.Normal(loc, 1.0)
    drawn = loc + noise.double()  # tanh' is 4 exp(-2|z|) far out
    slope = 2 * (math.log(2) - drawn.abs() - torch.nn.functional.softplus(-2 * drawn.abs()))
    expected = (slope - base.log_prob(drawn)).sum(1).mean().item()
    for when in ("before", "after"):
        assert tags[f"representation/{when}/entropy"] == pytest.approx(expected, rel=1e-4)
    assert expected < 3 * math.log(2)  # the uniform policy's


@pytest.mark.parametrize("epsilon", [0.1, 0.2])
def test_diagnostics_of_the_trust_region(epsilon):
    actor, new_actor, _ = before_and_now("policy")
    critic, new_critic, _ = before_and_now("value")
    z = script.unsquash(golden("cont/action"))
    args = default_args(clip_coef=epsilon, activation="Tanh")
    with torch.no_grad():
        before = {"actor": actor, "critic": critic}
        after = {"actor": new_actor, "critic": new_critic}
        tags = script.diagnose(before, after, z, torch.randn_like(z), torch.ones(3), args)

    def expected(name):
        return GOLDEN[f"cont/models_diff/eps{epsilon}/{name}"]

    for side, theirs in (("", ""), ("_above", "_above_epsilon"), ("_below", "_below_epsilon")):
        for stat, prefix in (("mean", "avg"), ("std", "std"), ("min", "min"), ("max", "max")):
            ours = tags[f"trust_region/ratio{side}_{stat}"]
            np.testing.assert_allclose(ours, expected(f"{prefix}_prob_ratio{theirs}"), rtol=2e-5)
    np.testing.assert_allclose(tags["trust_region/kl"], expected("kl_dist_batch"), rtol=1e-5)
    np.testing.assert_allclose(tags["trust_region/kl_k1"], GOLDEN["cont/kl_samples/kl_sample_naive"], rtol=1e-4)
    np.testing.assert_allclose(tags["trust_region/kl_k3"], GOLDEN["cont/kl_samples/kl_sample_schulman"], rtol=1e-4)
    for ours, theirs in (("actor", "policy"), ("critic", "value")):
        for distance, suffix in (("l2", "l2_batch"), ("cosine", "cosine")):
            np.testing.assert_allclose(
                tags[f"trust_region/{ours}_feature_{distance}"], expected(f"features_{theirs}_{suffix}"), rtol=1e-5
            )
            np.testing.assert_allclose(
                tags[f"trust_region/{ours}_all_preactivation_{distance}"],
                expected(f"all_preactivations_{theirs}_{suffix}"),
                rtol=1e-5,
            )


def test_policy_variance_and_values():
    """The reference's case ``div``: which of the two networks it took is found by the value."""
    values = {name: before_and_now("value")[i].output.detach() for i, name in enumerate(("old", "new"))}
    mean = GOLDEN["cont/div/avg_state_value"]
    (name,) = (name for name, value in values.items() if abs(value.mean().item() - mean) < 1e-5)
    output = before_and_now("policy")[0 if name == "old" else 1].output.detach()
    ours = script.policy_variance(*script.loc_and_scale(output))
    np.testing.assert_allclose(ours, GOLDEN["cont/div/policy_variance"], rtol=1e-5)
    np.testing.assert_allclose(values[name].std(), GOLDEN["cont/div/std_state_value"], rtol=1e-5)
