"""Losses, gradients, advantages and schedules against the numbers of an independent implementation."""

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

GOLDEN = np.load(Path(__file__).parent / "golden" / "reference.npz")
script = importlib.import_module("ppo_pfo_atari")


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def default_args(**changes):
    args = script.Args()
    args.batch_size = args.num_iterations = 0
    return dataclasses.replace(args, **changes)


class Mlp(torch.nn.Module):
    """The reference's network: two hidden layers of 16 with ReLU."""

    def __init__(self, name):
        super().__init__()
        self.weights = torch.nn.ParameterDict(
            {f"{kind}{i}": golden(f"disc/{name}/{kind}{i}").clone() for kind in "Wb" for i in range(3)}
        )

    def forward(self, x):
        preactivations = []
        for i in range(2):
            preactivations.append(torch.nn.functional.linear(x, self.weights[f"W{i}"], self.weights[f"b{i}"]))
            x = preactivations[-1].relu()
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


@pytest.mark.parametrize("variant", ACTOR_VARIANTS)
def test_actor_loss_and_gradient(variant):
    flags = {"ent_coef": 0.01, "clip_coef": 0.1, "pfo_limit": 0.1, **pfo_flags(variant)}
    flags |= {"noclip": {"clip_objective": False}, "nonorm": {"norm_adv": False}, "kl": {"kl_coef": 1.0}}.get(
        variant, {}
    )
    args = default_args(**flags)
    old, new = Mlp("policy_old"), Mlp("policy_new")
    obs = golden("disc/obs")
    with torch.no_grad():
        before = old(obs)
    now = new(obs)
    mb = {
        "actions": golden("disc/action").argmax(1),
        "logits": before.output,
        "advantages": golden("disc/advantage_actor").squeeze(1),
        "actor_held": script.pfo_input(before, args.pfo_layers, args.pfo_on),
    }
    held = script.pfo_input(now, args.pfo_layers, args.pfo_on)
    loss, logged = script.actor_loss(now.output, held, mb, torch.tensor(1.0), args)
    loss.backward()

    def expected(name):
        return GOLDEN[f"disc/ppo/{variant}/{name}"]

    close = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(logged["policy_loss"].detach(), expected("loss_policy"), **close)
    np.testing.assert_allclose(logged["entropy"].detach(), expected("entropy"), **close)
    np.testing.assert_allclose(logged["kl"].detach(), expected("kl"), rtol=1e-5)
    # The reference counts a sample as clipped where clipping changes its loss, CleanRL where its ratio is outside.
    assert logged["clipfrac"].item() >= expected("clipped_fraction")
    if variant.startswith("feat-"):
        np.testing.assert_allclose(logged["pfo_actor"].detach(), expected("features_policy_loss_no_coef"), rtol=1e-5)
        assert logged["pfo_out_of_trust"].item() == expected("features_policy_outoftrust_fraction")
    total = expected("loss_policy") + expected("loss_entropy") + expected("loss_kl")
    if "regularize" in variant:
        total = total + expected("loss_features_policy")
    np.testing.assert_allclose(loss.detach(), total, **close)

    norm = torch.cat([p.grad.flatten() for p in new.parameters()]).norm()
    np.testing.assert_allclose(norm, expected("grad_norm_policy"), rtol=1e-4)
    for name, p in new.weights.items():
        if f"disc/ppo/{variant}/grad/{name}" in GOLDEN:
            np.testing.assert_allclose(p.grad, expected(f"grad/{name}"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["base"] + [v for v in ACTOR_VARIANTS if v.startswith("feat-")])
def test_critic_loss_and_gradient(variant):
    flags = pfo_flags(variant)
    args = default_args(pfo_limit=0.1, critic_pfo_coef=flags.pop("pfo_coef"), **flags)
    old, new = Mlp("value_old"), Mlp("value_new")
    obs = golden("disc/obs")
    with torch.no_grad():
        before = old(obs)
    now = new(obs)
    mb = {
        "returns": golden("disc/value_target_critic").squeeze(1),
        "values": before.output.squeeze(1),
        "critic_held": script.pfo_input(before, args.pfo_layers, args.pfo_on),
    }
    held = script.pfo_input(now, args.pfo_layers, args.pfo_on)
    loss, logged = script.critic_loss(now.output.squeeze(1), held, mb, args)
    loss.backward()

    def expected(name):
        return GOLDEN[f"disc/vloss/{variant}/{name}"]

    np.testing.assert_allclose(logged["value_loss"].detach(), expected("loss_critic"), rtol=1e-5)
    np.testing.assert_allclose(logged["pfo_critic"].detach(), expected("features_value_loss_no_coef"), rtol=1e-5)
    total = expected("loss_critic") + (expected("loss_features_value") if "regularize" in variant else 0)
    np.testing.assert_allclose(loss.detach(), total, rtol=1e-5)
    norm = torch.cat([p.grad.flatten() for p in new.parameters()]).norm()
    np.testing.assert_allclose(norm, expected("grad_norm_value"), rtol=1e-4)
    for name, p in new.weights.items():
        if f"disc/vloss/{variant}/grad/{name}" in GOLDEN:
            np.testing.assert_allclose(p.grad, expected(f"grad/{name}"), rtol=1e-4, atol=1e-6)


def test_clipped_value_loss():
    """Where the value moved further than clip_coef, the loss is the larger of the two squared errors."""
    args = default_args(clip_vloss=True, clip_coef=0.1)
    mb = {"returns": torch.tensor([1.0, 1.0, 0.0]), "values": torch.zeros(3), "critic_held": torch.zeros(3, 2)}
    newvalue = torch.tensor([0.05, 0.5, 0.5], requires_grad=True)
    loss, _ = script.critic_loss(newvalue, torch.zeros(3, 2), mb, args)
    assert loss.item() == pytest.approx(0.5 * (0.95**2 + 0.9**2 + 0.5**2) / 3)
    loss.backward()
    assert newvalue.grad.tolist() == pytest.approx([-0.95 / 3, 0.0, 0.5 / 3])  # no gradient through the clip


def test_gae():
    """Truncations end an episode as terminations do: the reference's second pair of arrays."""
    names = ("reward", "value", "next_value", "done")
    arrays = [golden(f"gae/{name}").squeeze(-1).T.float() for name in names]
    assert (golden("gae/done") & ~golden("gae/terminated")).any()
    advantages, returns = script.gae(*arrays, gamma=0.99, gae_lambda=0.95)
    for ours, name in ((advantages, "advantage"), (returns, "value_target")):
        want = golden(f"gae/{name}_truncation_as_termination").squeeze(-1).T
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)


def test_adaptive_kl_coefficient():
    args, coef = SimpleNamespace(kl_target=0.01), 1.0
    for kl, expected in zip(GOLDEN["adaptive_kl/kl"], GOLDEN["adaptive_kl/beta"], strict=True):
        coef = script.adapted_kl_coef(coef, float(kl), args)
        assert coef == expected


def test_adaptive_kl_coefficient_never_vanishes_nor_overflows():
    args = SimpleNamespace(kl_target=0.01)
    for kl, bound in ((0.0, 1e-6), (1.0, 1e6)):
        coef = 1.0
        for _ in range(200):
            coef = script.adapted_kl_coef(coef, kl, args)
        assert coef == bound
    assert script.adapted_kl_coef(1e-6, 1.0, args) == 2e-6


def test_sampling_follows_the_policy():
    """Gumbel's trick draws actions as often as the softmax says."""
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    actions = script.sample(logits.expand(100_000, 4), torch.empty(100_000, 4).exponential_())
    frequencies = torch.bincount(actions, minlength=4) / 100_000
    torch.testing.assert_close(frequencies, logits.softmax(0), rtol=0, atol=0.006)


def test_diagnose_against_the_reference():
    """Before and after are not confused: golden trust region measures, and the sign of every delta."""
    obs = golden("disc/obs")
    with torch.no_grad():
        before, after = (
            {"actor": Mlp(f"policy_{when}")(obs), "critic": Mlp(f"value_{when}")(obs)} for when in ("old", "new")
        )
    tags = script.diagnose(before, after, golden("disc/action").argmax(1), default_args(clip_coef=0.1))
    names = {
        "kl": "kl_dist_batch",
        "ratio_mean": "avg_prob_ratio",
        "ratio_above_mean": "avg_prob_ratio_above_epsilon",
        "ratio_below_mean": "avg_prob_ratio_below_epsilon",
        "actor_feature_l2": "features_policy_l2_batch",
        "critic_feature_cosine": "features_value_cosine",
        "actor_preactivation_l2": "features_preactivation_policy_l2_batch",
        "critic_all_preactivation_l2": "all_preactivations_value_l2_batch",
    }
    for ours, theirs in names.items():
        assert tags[f"trust_region/{ours}"] == pytest.approx(GOLDEN[f"disc/models_diff/eps0.1/{theirs}"], rel=1e-5)
    assert tags["representation/before/policy_variance"] == pytest.approx(GOLDEN["disc/div/policy_variance"], rel=1e-5)
    assert tags["representation/before/value_mean"] == pytest.approx(GOLDEN["disc/div/avg_state_value"], rel=1e-5)
    assert tags["representation/before/value_std"] == pytest.approx(GOLDEN["disc/div/std_state_value"], rel=1e-5)
    norm = before["critic"].preactivations.norm(dim=1).mean().item()
    assert tags["representation/before/critic/preactivation_norm"] == pytest.approx(norm, rel=1e-6)
    deltas = [tag for tag in tags if "/delta/" in tag]
    assert len(deltas) == 2 * 10 + 1
    for tag in deltas:
        old, new = (tags[tag.replace("/delta/", f"/{when}/")] for when in ("before", "after"))
        assert tags[tag] == pytest.approx(new - old, abs=1e-12)
    assert any(tags[tag] for tag in deltas)


def test_update_clips_each_network_on_its_own():
    args = default_args(max_grad_norm=1e-3)
    torch.manual_seed(0)
    agent = script.Agent(4, args)
    optimizers = script.make_optimizers(agent, args)
    mb = {"obs": torch.randint(0, 256, (8, 84, 84, 4), dtype=torch.uint8), "actions": torch.arange(8) % 4}
    mb |= {"logits": torch.randn(8, 4), "advantages": torch.randn(8), "returns": 50 + torch.randn(8)}
    mb |= {"values": torch.zeros(8), "actor_held": torch.randn(8, 512), "critic_held": torch.zeros(8, 512)}
    logged = script.update(agent, script.losses, optimizers, mb, torch.randperm(8), torch.tensor(0.0), args)
    for network, name in ((agent.actor, "actor"), (agent.critic, "critic")):
        assert logged[f"{name}_grad_norm"] > 1e-2  # before clipping
        after = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        assert after.item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_schedules():
    args = default_args(learning_rate=1e-3)
    args.num_iterations = 4
    assert [script.learning_rate(i, args) for i in range(1, 5)] == [1e-3] * 4
    args.anneal_lr = True
    assert [script.learning_rate(i, args) for i in range(1, 5)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    args.anneal_lr, args.cosine_lr = False, True
    assert [script.learning_rate(i, args) for i in (1, 3)] == pytest.approx([1e-3, 5e-4])
    assert script.learning_rate(4, args) < 2.5e-4
