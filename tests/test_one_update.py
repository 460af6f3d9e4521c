"""One update phase of each script against a plain computation that shares no code with it, Atari in CleanRL's classic
setting, MuJoCo with PFO and an entropy bonus.

Float64; the independent side uses additions, products, powers, exponentials, logarithms and comparisons alone: its
convolutions are sums of products of shifted images, its gradients autograd's through these.
"""

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch

from common.batch import Batch, Optimizers

CLASSIC = "--frame-skip 4 --repeat-action-probability 0 --noop-max 30 --fire-reset --episodic-life "
CLASSIC += "--layer-init orthogonal --anneal-lr --clip-vloss --adam-eps 1e-5 --vf-coef 0.5 "
SIZES = "--env-id Breakout-v5 --num-envs 2 --num-steps 8 --minibatch-size 8 --update-epochs 2 --total-timesteps 64"


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def convolution(x, weight, bias, stride):
    """(N, C, H, W) by (K, C, R, R): a product and a sum for each offset of the kernel."""
    size = weight.shape[-1]
    out = (x.shape[-1] - size) // stride + 1
    total = bias[:, None, None] + torch.zeros(len(x), len(weight), out, out)
    for i in range(size):
        for j in range(size):
            patch = x[:, :, i : i + stride * (out - 1) + 1 : stride, j : j + stride * (out - 1) + 1 : stride]
            total = total + (patch.unsqueeze(1) * weight[:, :, i, j][:, :, None, None]).sum(2)
    return total


def positive(x):
    return x * (x > 0)


def forward(weights, prefix, head, images):
    """Output of the Nature network whose hidden layers are named ``prefix``, for (N, 84, 84, 4) uint8 images."""
    x = images.to(torch.float64).permute(0, 3, 1, 2) / 255
    for layer, stride in enumerate((4, 2, 1)):
        x = positive(convolution(x, weights[f"{prefix}.{layer}.weight"], weights[f"{prefix}.{layer}.bias"], stride))
    x = x.reshape(len(x), -1)
    x = positive(x @ weights[f"{prefix}.3.weight"].T + weights[f"{prefix}.3.bias"])
    return x @ weights[f"{head}.weight"].T + weights[f"{head}.bias"]


def log_probabilities(logits):
    peak = logits.max(1, keepdim=True).values
    return logits - peak - (logits - peak).exp().sum(1, keepdim=True).log()


def advantages_of(rewards, values, dones, gamma=0.99, gae_lambda=0.95):
    """GAE by its definition: the discounted sum of temporal differences up to the end of the episode."""
    steps, envs = rewards.shape
    result = torch.zeros(steps, envs)
    for i in range(envs):
        for t in range(steps):
            factor = 1.0
            for k in range(t, steps):
                following = 0.0 if dones[k, i] else values[k + 1, i]
                result[t, i] += factor * (rewards[k, i] + gamma * following - values[k, i])
                if dones[k, i]:
                    break
                factor *= gamma * gae_lambda
    return result


# The groups of weights that are clipped and stepped as one, by the beginnings of their names
GROUPS = {
    "ppo_atari": [("",)],
    "ppo_atari_2models": [("actor",), ("critic",)],
    "ppo_pfo_atari": [("actor",), ("critic",)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_update_phase_against_a_plain_computation(name, monkeypatch, float64):
    script = importlib.import_module(name)
    flags = (CLASSIC + SIZES).split() + (["--pfo-coef", "0"] if "pfo" in name else [])
    monkeypatch.setattr(sys, "argv", [name, *flags])
    args = script.parse_args(script.Args)
    script.check_args(args)
    torch.manual_seed(3)
    envs = script.make_envs(args, 2, [5, 6], episodic_life=True, reward_clip=True)
    agent = script.Agent(4, args)
    with torch.no_grad():  # away from the orthogonal start, where logits are almost equal and nothing is clipped
        for p in agent.parameters():
            p += 0.03 * torch.randn_like(p)
    obs = torch.zeros((9, 2, 84, 84, 4), dtype=torch.uint8)
    obs[0] = torch.from_numpy(envs.reset()[0]).permute(0, 2, 3, 1)
    noise = torch.empty((8, 2, 4)).exponential_()
    transitions, _ = script.rollout(
        envs, torch.no_grad()(partial(script.act, agent)), obs, noise, np.zeros((2, 2)), False
    )
    rewards = torch.randn(8, 2)  # the game pays too seldom for a test
    dones = (torch.rand(8, 2) < 0.2).double()
    transitions = transitions._replace(rewards=rewards, dones=dones)

    # The script's side: its own functions, as its main block calls them
    with torch.no_grad():
        values = agent.value(obs.flatten(0, 1)).output.view(9, 2)
        advantages, returns = script.gae(rewards, values[:-1], values[1:], dones, args.gamma, args.gae_lambda)
    batch = {"obs": obs[:-1].flatten(0, 1), "actions": transitions.actions.flatten(), "values": values[:-1].flatten()}
    batch |= {"logits": transitions.policy.output.flatten(0, 1)}
    batch |= {"advantages": advantages.flatten(), "returns": returns.flatten()}
    if "pfo" in name:
        batch["actor_held"] = transitions.policy.preactivations.flatten(0, 1)
        batch["critic_held"] = torch.zeros(16, 512)
    start = {key: x.detach().clone() for key, x in agent.state_dict().items()}
    order = torch.cat([torch.randperm(16) for _ in range(args.update_epochs)]).split(8)
    rate = script.learning_rate(1, args)
    optimizers = script.make_optimizers(agent, args)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = rate
    logged = []
    for mb_inds in order:
        row = script.update(agent, script.losses, optimizers, batch, mb_inds, torch.tensor(0.0), args)
        logged.append({key: x.item() for key, x in row.items()})

    # The plain side
    weights = {key: x.clone().requires_grad_() for key, x in start.items()}
    shared = name == "ppo_atari"
    actor = ("trunk.hidden", "actor") if shared else ("actor.hidden", "actor.output")
    critic = ("trunk.hidden", "critic") if shared else ("critic.hidden", "critic.output")
    images, actions = obs[:-1].flatten(0, 1), transitions.actions.flatten()
    with torch.no_grad():
        old_values = forward(weights, *critic, obs.flatten(0, 1))[:, 0].view(9, 2)
        old_logprob = log_probabilities(forward(weights, *actor, images))[torch.arange(16), actions]
    plain_advantages = advantages_of(rewards, old_values, dones)
    targets = (plain_advantages + old_values[:-1]).flatten()
    plain_advantages, old_values = plain_advantages.flatten(), old_values[:-1].flatten()
    moments = {key: (torch.zeros_like(x), torch.zeros_like(x)) for key, x in weights.items()}
    for step, mb_inds in enumerate(order, 1):
        logp = log_probabilities(forward(weights, *actor, images[mb_inds]))
        value = forward(weights, *critic, images[mb_inds])[:, 0]
        ratio = (logp[torch.arange(8), actions[mb_inds]] - old_logprob[mb_inds]).exp()
        adv = plain_advantages[mb_inds]
        adv = (adv - adv.sum() / 8) / (((adv - adv.sum() / 8) ** 2).sum() / 8) ** 0.5
        bounded = ratio * ((ratio >= 0.9) & (ratio <= 1.1)) + 0.9 * (ratio < 0.9) + 1.1 * (ratio > 1.1)
        policy_loss = -torch.minimum(adv * ratio, adv * bounded).sum() / 8
        entropy = -(logp.exp() * logp).sum() / 8
        change = value - old_values[mb_inds]
        near = change * (change.abs() <= 0.1) + 0.1 * (change > 0.1) - 0.1 * (change < -0.1)
        target = targets[mb_inds]
        squared = torch.maximum((value - target) ** 2, (old_values[mb_inds] + near - target) ** 2)
        value_loss = 0.5 * squared.sum() / 8
        gradients = torch.autograd.grad(policy_loss - 0.01 * entropy + 0.5 * value_loss, list(weights.values()))
        gradients = dict(zip(weights, gradients, strict=True))
        theirs = logged[step - 1]
        assert theirs["policy_loss"] == pytest.approx(policy_loss.item(), rel=1e-9, abs=1e-12)
        assert theirs["value_loss"] == pytest.approx(value_loss.item(), rel=1e-9)
        assert theirs["entropy"] == pytest.approx(entropy.item(), rel=1e-9)
        norms = []
        for group in GROUPS[name]:
            members = [key for key in weights if key.startswith(group)]
            norms.append(sum((gradients[key] ** 2).sum() for key in members) ** 0.5)
            for key in members:
                gradient = gradients[key] * min(1.0, (0.5 / (norms[-1] + 1e-6)).item())
                first, second = moments[key]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                with torch.no_grad():
                    root = (second / (1 - 0.999**step)) ** 0.5
                    weights[key] -= rate * (first / (1 - 0.9**step)) / (root + 1e-5)
        assert theirs["actor_grad_norm"] == pytest.approx(norms[0].item(), rel=1e-8)
        assert theirs["critic_grad_norm"] == pytest.approx(norms[-1].item(), rel=1e-8)
    assert any(row["clipfrac"] > 0 for row in logged)
    for key, x in agent.state_dict().items():
        torch.testing.assert_close(x, weights[key].detach(), rtol=1e-7, atol=1e-10)
    assert max((weights[key].detach() - start[key]).abs().max() for key in weights) > 1e-4


def perceptron(weights, network, trunk, x):
    """Output and last pre-activations of a Tanh network with two hidden layers."""
    for i in range(2):
        z = x @ weights[f"{trunk}.hidden.{i}.weight"].T + weights[f"{trunk}.hidden.{i}.bias"]
        x = 1 - 2 / ((2 * z).exp() + 1)
    return x @ weights[f"{network}.output.weight"].T + weights[f"{network}.output.bias"], z


def softplus(x):
    return (1 + x.exp()).log()


@pytest.mark.parametrize("shared", [False, True])
def test_update_phase_on_mujoco_against_a_plain_computation(shared, monkeypatch, float64):
    script = importlib.import_module("ppo_mujoco")
    flags = "--num-envs 2 --num-steps 8 --minibatch-size 8 --update-epochs 3 --total-timesteps 64 --ent-coef 0.01 "
    flags += "--pfo-coef 0.7 --learning-rate 3e-3" + " --share-features" * shared
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    args = script.parse_args(script.Args)
    script.check_args(args)
    torch.manual_seed(3)
    agent = script.Agent(5, -0.5 * np.ones(3), 0.5 * np.ones(3), args).double()
    obs, rewards, dones = torch.randn(9, 2, 6), torch.randn(8, 2), (torch.rand(8, 2) < 0.2).double()

    # The script's side: its own functions, as its main block calls them, recorded as on a CPU
    with torch.no_grad():
        actions = script.sample(agent.policy(obs[:-1].flatten(0, 1)).output, torch.randn(16, 3))
        actor, critic = agent(obs.flatten(0, 1))
        values = critic.output.view(9, 2)
        advantages, returns = script.gae(rewards, values[:-1], values[1:], dones, args.gamma, args.gae_lambda)
        loc, scale = script.loc_and_scale(actor.output[:16])
        z = script.unsquash(actions)
    batch = {"obs": obs[:-1].flatten(0, 1), "z": z, "logprobs": script.normal_log_prob(z, loc, scale)}
    batch |= {"loc": loc, "scale": scale, "values": values[:-1].flatten(), "advantages": advantages.flatten()}
    batch |= {"returns": returns.flatten(), "actor_held": actor.preactivations[:16]}
    batch |= {"critic_held": critic.preactivations[:16], "noise": torch.randn(16, 3)}
    start = {key: x.detach().clone() for key, x in agent.named_parameters()}
    order = torch.cat([torch.randperm(16) for _ in range(args.update_epochs)]).split(8)
    optimizers = script.make_optimizers(agent, args)
    together = Batch([agent])
    of_one = together.each(lambda agent, mb, kl_coef: script.losses(agent, mb, kl_coef, args))
    step = Optimizers(together, lambda: [optimizers]).step
    differentiate = script.Differentiate(
        together,
        lambda mb, kl_coef, everything: script.gradients(together, of_one, mb, kl_coef, args),
        *(lambda: vars(args), together.state, pytest.fail, False),
    )
    logged = []
    for mb_inds in order:
        mb = {key: x[mb_inds].unsqueeze(0) for key, x in batch.items()}
        # Unchecked: TorchScript rounds the last digit of float64 otherwise, not that of float32
        grad, row = differentiate(mb, torch.zeros(1), True, plain=False, checked=False, trial=False)
        step(grad, [0])
        logged.append({key: x.item() for key, x in row.items()})

    # The plain side
    weights = {key: x.clone().requires_grad_() for key, x in start.items()}
    trunk = "actor" if shared else "critic"
    x, ln_2_pi = obs.flatten(0, 1), np.log(2 * np.pi)

    def policy(x):
        output, preactivations = perceptron(weights, "actor", "actor", x)
        return output[:, :3], softplus(output[:, 3:] + np.log(np.exp(0.99) - 1)) + 0.01, preactivations

    def log_density(loc, scale, u):
        z = 0.5 * ((1 + u) / (1 - u)).log()
        return -(((z - loc) / scale) ** 2 / 2 + scale.log() + ln_2_pi / 2 + (0.5 * (1 - u**2)).log()).sum(1)

    with torch.no_grad():
        old_values = perceptron(weights, "critic", trunk, x)[0][:, 0].view(9, 2)
        old_logprob, old_z = log_density(*policy(x[:16])[:2], actions), policy(x[:16])[2]
    plain_advantages = advantages_of(rewards, old_values, dones)
    targets, plain_advantages = (plain_advantages + old_values[:-1]).flatten(), plain_advantages.flatten()
    moments = {key: (torch.zeros_like(p), torch.zeros_like(p)) for key, p in weights.items()}
    for step, mb_inds in enumerate(order, 1):
        loc, scale, preactivations = policy(x[mb_inds])
        value = perceptron(weights, "critic", trunk, x[mb_inds])[0][:, 0]
        ratio = (log_density(loc, scale, actions[mb_inds]) - old_logprob[mb_inds]).exp()
        adv = plain_advantages[mb_inds]
        adv = (adv - adv.sum() / 8) / (((adv - adv.sum() / 8) ** 2).sum() / 8) ** 0.5
        bounded = ratio * ((ratio >= 0.8) & (ratio <= 1.2)) + 0.8 * (ratio < 0.8) + 1.2 * (ratio > 1.2)
        policy_loss = -torch.minimum(adv * ratio, adv * bounded).sum() / 8
        pfo = ((preactivations - old_z[mb_inds]) ** 2).sum() / (8 * 64)
        drawn = 1 - 2 / ((2 * (loc + scale * batch["noise"][mb_inds])).exp() + 1)
        entropy = -log_density(loc, scale, drawn).sum() / 8
        value_loss = 0.5 * ((value - targets[mb_inds]) ** 2).sum() / 8
        loss = policy_loss + 0.7 * pfo - 0.01 * entropy + value_loss
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        theirs, norms = logged[step - 1], []
        for name, expected in (("policy_loss", policy_loss), ("pfo_actor", pfo), ("entropy", entropy)):
            assert theirs[name] == pytest.approx(expected.item(), rel=1e-8, abs=1e-12)
        assert theirs["value_loss"] == pytest.approx(value_loss.item(), rel=1e-9)
        assert theirs["clipfrac"] == ((ratio - 1).abs() > 0.2).double().mean()
        for group in [""] if shared else ["actor", "critic"]:
            members = [key for key in weights if key.startswith(group)]
            norms.append(sum((gradients[key] ** 2).sum() for key in members) ** 0.5)
            for key in members:
                gradient = gradients[key] * min(1.0, (0.5 / (norms[-1] + 1e-6)).item())
                first, second = moments[key]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                with torch.no_grad():
                    root = (second / (1 - 0.999**step)) ** 0.5
                    weights[key] -= 3e-3 * (first / (1 - 0.9**step)) / (root + 1e-8)
        assert theirs["actor_grad_norm"] == pytest.approx(norms[0].item(), rel=1e-8)
        assert theirs["critic_grad_norm"] == pytest.approx(norms[-1].item(), rel=1e-8)
    assert any(row["clipfrac"] > 0 for row in logged) and any(row["critic_grad_norm"] > 0.5 for row in logged)
    for key, p in agent.named_parameters():
        torch.testing.assert_close(p.detach(), weights[key].detach(), rtol=1e-6, atol=1e-9)
    assert max((weights[key].detach() - start[key]).abs().max() for key in weights) > 1e-3
