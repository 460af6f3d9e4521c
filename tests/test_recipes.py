"""Recipes: every diff fits its script, what it makes runs, and does what its source says."""

import copy
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import envpool
import forked
import gymnasium
import numpy as np
import pytest
import torch
from test_scripts import ROOT

from benchmark import recipe

MUJOCO = [name for name in recipe.names() if recipe.read(name).script == "ppo_mujoco.py"]
ATARI = [name for name in recipe.names() if recipe.read(name).script == "ppo_pfo_atari.py"]
# Two iterations of 2 x 32 transitions, 8 minibatches each; three of 2 x 8
SMALL = {
    "ppo_mujoco.py": "--num-steps 32 --minibatch-size 16 --update-epochs 2 --obs-norm-steps 20 --total-timesteps 128",
    "ppo_pfo_atari.py": "--num-envs 2 --num-steps 8 --minibatch-size 8 --update-epochs 2 --total-timesteps 96",
}
# What makes a recipe show in so short a run
FLAGS = {
    "redo_mujoco": "--redo-interval 3 --redo-tau 0.5 --activation ReLU",
    "redo_atari": "--redo-interval 3 --redo-tau 0.5",
    "weight_clipping_mujoco": "--weight-clip 0.9",
    "soft_shrink_perturb_mujoco": "--shrink 0.99 --perturb 0.1",
}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the script of every recipe."""
    folder = tmp_path_factory.mktemp("copies")
    for name in recipe.names():
        (folder / f"{name}.py").write_text(recipe.made(name), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(copies, tmp_path_factory):
    """Run a recipe's script with further flags, each once; the last checkpoints by seed, and what it printed."""
    made = {}

    def train(name, *flags):
        if (name, *flags) not in made:
            script = "ppo_mujoco.py" if name == "none" else recipe.read(name).script
            path = ROOT / script if name == "none" else copies / f"{name}.py"
            folder = tmp_path_factory.mktemp(name)
            words = [*SMALL[script].split(), *FLAGS.get(name, "").split(), *flags]
            code, printed = forked.run(name, folder, words, path=path)
            assert code == 0, printed
            last, resumed = {}, flags[flags.index("--resume") + 1 :] if "--resume" in flags else ()
            for run_folder in resumed or folder.glob("runs/*"):
                checkpoint = torch.load(f"{run_folder}/checkpoints/latest.pt", weights_only=True)
                last[checkpoint["args"]["seed"]] = {**checkpoint, "folder": str(run_folder)}
            made[name, *flags] = last, printed
        return made[name, *flags]

    return train


@pytest.fixture(scope="module")
def module(copies):
    """The script of a recipe as a module."""
    modules = {}

    def load(name):
        if name not in modules:
            spec = importlib.util.spec_from_file_location(name, copies / f"{name}.py")
            sys.modules[name] = modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        return modules[name]

    return load


def apart(one, other):
    """The largest difference between the weights of two checkpoints."""
    return max((one["agent"][name] - other["agent"][name]).abs().max().item() for name in one["agent"])


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_fits_its_script_to_the_line(name):
    """It is what --refresh would write, so that any program for patches takes it."""
    one = recipe.read(name)
    source = (ROOT / one.script).read_text(encoding="utf-8")
    text = recipe.applied(one.hunks, source, strict=True)
    assert text != source
    assert recipe.diff(name, one.script, one.head, text) == recipe.path_of(name).read_text(encoding="utf-8")
    assert all(len(line) <= 118 for line in one.head)  # as comments they are two longer


@pytest.mark.skipif(not shutil.which("patch"), reason="no program patch here")
@pytest.mark.parametrize("name", recipe.names())
def test_the_program_patch_makes_the_same(name, copies, tmp_path):
    one = recipe.read(name)
    command = ["patch", "--fuzz=0", "-o", tmp_path / "made.py", ROOT / one.script, recipe.path_of(name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "offset" not in done.stdout, done.stdout + done.stderr
    head = "".join(f"# {line}\n" for line in one.head)
    assert head + (tmp_path / "made.py").read_text() == (copies / f"{name}.py").read_text()


@pytest.mark.parametrize("name", MUJOCO)
def test_seeds_at_once_are_the_runs_of_each(name, run):
    (several, said), (alone, _) = run(name, "--seeds", "1", "2"), run(name, "--seed", "2")
    assert several.keys() == {1, 2} and all(x["iteration"] == 2 for x in several.values())
    assert "which is slower" not in said
    assert apart(several[2], alone[2]) < 5e-5 < apart(several[1], alone[2])


@pytest.mark.parametrize("name", ATARI)
def test_an_atari_script_runs(name, run):
    (checkpoint,) = run(name, "--seed", "1")[0].values()
    assert checkpoint["iteration"] == 2
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


@pytest.mark.parametrize("name", recipe.names())
def test_what_is_made_is_formatted_as_the_scripts_are(name, copies):
    for command in (["check"], ["format", "--check"]):
        flags = ["--config", ROOT / "pyproject.toml", copies / f"{name}.py"]
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def new_agent(script, args=None, **flags):
    """An agent of a copy of ppo_mujoco.py for 5 observations and 2 actions, and its arguments."""
    torch.manual_seed(0)
    args = args or script.Args(**flags)
    return script.Agent(5, -np.ones(2), np.ones(2), args), args


def new_minibatch(script, agent, n=32, **more):
    """A minibatch whose recorded policy is another than the agent's."""
    obs, noise = torch.randn(n, 6), torch.randn(n, 2)
    old = copy.deepcopy(agent)
    with torch.no_grad():
        for p in old.parameters():
            p.add_(0.02 * torch.randn_like(p))
        policy, value = old(obs)
        loc, scale = script.loc_and_scale(policy.output)
    z = loc + scale * noise
    recorded = {"obs": obs, "z": z, "logprobs": script.normal_log_prob(z, loc, scale), "loc": loc, "scale": scale}
    recorded |= {"advantages": torch.randn(n), "returns": torch.randn(n), "values": value.output.squeeze(1)}
    held = {"actor_held": policy.preactivations, "critic_held": value.preactivations, "noise": torch.randn(n, 2)}
    return recorded | held | {name: x(policy) if callable(x) else x for name, x in more.items()}


def loss_and_gradient(script, agent, mb, args):
    agent.zero_grad()
    loss, logged = script.losses(agent, mb, torch.tensor(0.0), args)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in agent.parameters()], logged


@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_spo_has_its_optimum_at_one_plus_or_minus_epsilon(advantage, module):
    """And beyond it the gradient leads back, where PPO's is 0."""
    script = module("spo_mujoco")
    args = script.Args(norm_adv=False, clip_coef=0.2)
    ratios = torch.linspace(0.4, 1.6, 121).requires_grad_()
    output = torch.zeros(121, 4)
    loc, scale = script.loc_and_scale(output)
    z = torch.ones(121, 2)
    logprobs = script.normal_log_prob(z, loc, scale) - ratios.log()
    mb = {"z": z, "logprobs": logprobs, "loc": loc, "scale": scale, "advantages": torch.full((121,), advantage)}
    mb |= {"actor_held": output, "noise": z}
    loss, _ = script.actor_loss(output, output, mb, torch.ones(2), torch.tensor(0.0), args)
    (slope,) = torch.autograd.grad(loss * 121, ratios)
    expected = -(advantage - abs(advantage) * (ratios.detach() - 1) / 0.2)
    assert torch.allclose(slope, expected, atol=1e-4)
    best = 1 + np.sign(advantage) * 0.2
    assert torch.equal(slope.sign()[ratios < best - 0.005], torch.full(((ratios < best - 0.005).sum(),), -1.0))
    assert torch.equal(slope.sign()[ratios > best + 0.005], torch.full(((ratios > best + 0.005).sum(),), 1.0))


def test_spo_is_the_same_on_atari(module):
    script = module("spo_atari")
    args = script.Args(norm_adv=False, clip_coef=0.1, ent_coef=0.0, pfo_coef=0.0)
    logits = torch.randn(50, 4, requires_grad=True)
    old, actions, advantages = logits.detach() + 0.5 * torch.randn(50, 4), torch.arange(50) % 4, torch.randn(50)
    mb = {"actions": actions, "logits": old, "advantages": advantages, "actor_held": old}
    loss, _ = script.actor_loss(logits, logits.detach(), mb, torch.tensor(0.0), args)
    (gradient,) = torch.autograd.grad(loss, logits)
    rows = torch.arange(50)
    ratio = logits.softmax(1)[rows, actions] / old.softmax(1)[rows, actions]
    weight = (advantages - advantages.abs() * (ratio - 1) / 0.1).detach()  # of the ratio's gradient
    (expected,) = torch.autograd.grad(-(weight * ratio).mean(), logits)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_layers_are_normalised_before_the_activation(module):
    for name in ("layer_norm_mujoco", "nap_mujoco"):
        agent, args = new_agent(module(name))
        for output in agent(3 * torch.randn(20, 6), all_layers=True):
            for z in output.all_preactivations.split(64, dim=1):
                assert torch.allclose(z.mean(1), torch.zeros(20), atol=1e-5)
                assert torch.allclose(z.std(1, correction=0), torch.ones(20), atol=1e-2)
            assert torch.allclose(output.features, output.preactivations.tanh())
        held = {
            p for optimizer in module(name).make_optimizers(agent, args) for p in optimizer.param_groups[0]["params"]
        }
        assert held == set(agent.parameters()) and len(held) == 2 * (3 * 2 + 2 * 2)


def test_images_are_normalised_over_channels_and_pixels(module):
    script = module("layer_norm_atari")
    args = script.Args()
    agent = script.Agent(4, args)
    output, _ = agent(torch.randint(256, (3, 84, 84, 4), dtype=torch.uint8), all_layers=True)
    sizes = [32 * 20 * 20, 64 * 9 * 9, 64 * 7 * 7, 512]
    for z in output.all_preactivations.split(sizes, dim=1):
        assert torch.allclose(z.mean(1), torch.zeros(3), atol=1e-4)
        assert torch.allclose(z.std(1, correction=0), torch.ones(3), atol=2e-2)
    held = {p for optimizer in script.make_optimizers(agent, args) for p in optimizer.param_groups[0]["params"]}
    assert held == set(agent.parameters())


@pytest.mark.parametrize("name", ["adam_rel_mujoco", "adam_rel_atari"])
def test_adam_counts_a_rollouts_steps_and_keeps_its_moments(name, run):
    updates = {"adam_rel_mujoco": 8, "adam_rel_atari": 4}[name]
    ((kept,), _), ((emptied,), _) = (
        (list(x.values()), said)
        for x, said in (run(name, "--seed", "2"), run(name, "--seed", "2", "--reset-optimizer"))
    )
    for one, other in zip(kept["optimizers"], emptied["optimizers"], strict=True):
        for state, anew in zip(one["state"].values(), other["state"].values(), strict=True):
            assert state["step"] == anew["step"] == updates
            assert not torch.equal(state["exp_avg_sq"], anew["exp_avg_sq"])


def test_weight_decay_is_a_gradient_towards_zero(module):
    script = module("weight_decay_mujoco")
    agent, args = new_agent(script)
    before = [p.detach().clone() for p in agent.parameters()]
    for optimizer in script.make_optimizers(agent, args):
        (group,) = optimizer.param_groups
        assert group["weight_decay"] == 1e-3 and group["betas"] == (0.99, 0.99) and not group["decoupled_weight_decay"]
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for old, p in zip(before, agent.parameters(), strict=True):
        moved = (p - old).detach()
        large = old.abs() > 1e-3  # where Adam's epsilon is small beside the decay
        assert torch.allclose(moved[large], -3e-4 * old[large].sign(), rtol=0.05)


def test_weights_stay_within_their_bounds(run):
    weights = run("weight_clipping_mujoco", "--seeds", "1", "2")[0][1]["agent"]
    at_a_bound = 0
    for name, x in weights.items():
        if name != "half_width":
            fan_in = weights[name.replace("bias", "weight")].shape[1]
            bound = torch.tensor(0.9 / fan_in**0.5)
            assert (x.abs() <= bound).all(), name
            at_a_bound += (x.abs() == bound).sum()
    assert at_a_bound > 100


def test_shrink_and_perturb_draws_anew_at_each_step(module):
    agent, _ = new_agent(module("soft_shrink_perturb_mujoco"))
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(2):
        before = copy.deepcopy(agent)
        agent.shrink_and_perturb(0.5, 0.25, generator)
        drawn.append([(p - 0.5 * q) / 0.25 for p, q in zip(agent.parameters(), before.parameters(), strict=True)])
    for layer, (one, other) in zip([x for x in agent.layers for _ in range(2)], zip(*drawn, strict=True), strict=True):
        bound = layer.in_features**-0.5
        assert one.abs().max() <= bound + 1e-5 and not torch.equal(one, other)
        if one.numel() > 100:
            assert one.std().item() == pytest.approx(bound / 3**0.5, rel=0.1) and abs(one.mean()) < bound / 5
            assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).detach())[0, 1]) < 0.2


@pytest.mark.parametrize("share", [False, True])
def test_l2_init_adds_twice_the_distance_from_the_first_weights(share, module):
    script = module("l2_init_mujoco")
    agent, args = new_agent(script, l2_init_coef=0.5, share_features=share)
    first = [p.detach().clone() for p in agent.parameters()]
    mb = new_minibatch(script, agent)
    args_without = script.Args(l2_init_coef=0.0, share_features=share)
    assert loss_and_gradient(script, agent, mb, args)[0] == loss_and_gradient(script, agent, mb, args_without)[0]
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))
    agent.load_state_dict(copy.deepcopy(agent.state_dict()))  # where a checkpoint has the first weights from
    loss, gradients, _ = loss_and_gradient(script, agent, mb, args)
    plain_loss, plain, _ = loss_and_gradient(script, agent, mb, args_without)
    distance = sum((p - q).square().sum() for p, q in zip(agent.parameters(), first, strict=True)).item()
    assert loss - plain_loss == pytest.approx(0.5 * distance, rel=1e-4)
    for p, q, new, old in zip(agent.parameters(), first, gradients, plain, strict=True):
        assert torch.allclose(new - old, 2 * 0.5 * (p - q), atol=1e-5)


def test_parseval_is_zero_for_orthogonal_rows_of_its_norm(module):
    script = module("parseval_mujoco")
    agent, args = new_agent(script, hidden_sizes=(4, 16, 16))  # fewer units than inputs, and as many
    assert args.layer_init == "orthogonal"
    rows = [layer.weight @ layer.weight.T for layer in agent.actor.hidden]
    identity = [2.0 * torch.eye(len(x)) for x in rows]
    assert torch.allclose(rows[0], identity[0], atol=1e-5) and torch.allclose(rows[2], identity[2], atol=1e-5)
    by_hand = sum((64 / len(x)) ** 2 * (x - one).square().sum() for x, one in zip(rows, identity, strict=True))
    assert script.parseval_loss(agent.actor, 2.0).item() == pytest.approx(by_hand.item(), rel=1e-5)
    mb = new_minibatch(script, agent)
    with torch.no_grad():
        agent.critic.hidden[2].weight.add_(0.1 * torch.randn(16, 16))
    _, gradients, _ = loss_and_gradient(script, agent, mb, args)
    without = script.Args(parseval_coef=0.0, hidden_sizes=(4, 16, 16))
    _, plain, _ = loss_and_gradient(script, agent, mb, without)
    names = [name for name, _ in agent.named_parameters()]
    added = {name: new - old for name, new, old in zip(names, gradients, plain, strict=True)}
    w = agent.critic.hidden[2].weight.detach()
    expected = 1e-3 * (64 / 16) ** 2 * 4 * (w @ w.T - 2 * torch.eye(16)) @ w
    assert torch.allclose(added["critic.hidden.2.weight"], expected, atol=1e-5)
    assert not any(x.any() for name, x in added.items() if "output" in name or "bias" in name)


def test_churn_is_what_the_last_step_changed_elsewhere(module, run):
    script = module("chain_mujoco")
    agent, args = new_agent(script)
    second = torch.randn(32, 6)
    with torch.no_grad():
        where = script.policy_loc(agent, second)
    mb = new_minibatch(script, agent, second_obs=second, second_loc=where)
    agent.chain_coef.fill_(0.0)
    plain = loss_and_gradient(script, agent, mb, args)[0]
    agent.chain_coef.fill_(3.0)
    assert loss_and_gradient(script, agent, mb, args)[0] == pytest.approx(plain, rel=1e-6)  # no step, no churn
    mb["second_loc"] = where + 0.5
    loss, _, logged = loss_and_gradient(script, agent, mb, args)
    assert loss - plain == pytest.approx(3 * 0.25, rel=1e-4) and logged["churn"].item() == pytest.approx(0.25)

    rng, losses = np.random.default_rng(0), []
    for iteration in range(1, 131):
        losses.append(rng.normal(size=2) ** [1, 2])
        agent.adapt_chain(*losses[-1], iteration, 0.1)
        if iteration < 50:
            assert agent.chain_coef == 3.0
        else:
            policy, churn = np.abs(losses[-100:]).mean(0)
            assert agent.chain_coef.item() == pytest.approx(0.1 * policy / (churn + 1e-8), rel=1e-4)
    for checkpoint in run("chain_mujoco", "--seeds", "1", "2")[0].values():
        churn = checkpoint["agent"]["chain_history"][1]
        assert checkpoint["agent"]["chain_coef"] == 100.0
        assert not churn[:98].any() and (churn[98:] > 0).all()


def test_crelu_has_both_signs_of_half_as_many_units(module):
    agent, _ = new_agent(module("crelu_mujoco"), hidden_sizes=(7, 10))
    output, _ = agent(torch.randn(20, 6), all_layers=True)
    assert [layer.weight.shape for layer in agent.actor.hidden] == [(4, 6), (5, 8)]
    assert torch.equal(output.features, torch.cat([output.preactivations.relu(), (-output.preactivations).relu()], 1))
    assert output.features.shape == (20, 10) and output.all_preactivations.shape == (20, 9)


def test_projected_weights_have_the_norm_they_began_with(run):
    weights = run("nap_mujoco", "--seeds", "1", "2")[0][2]["agent"]
    matrices = [x for name, x in weights.items() if "hidden" in name and name.endswith("weight") and "norm" not in name]
    assert len(matrices) == 4
    assert torch.allclose(torch.stack([x.norm() for x in matrices]), weights["initial_norms"], rtol=1e-6)
    gains = [x for name, x in weights.items() if name.endswith("norm.weight")]
    assert len(gains) == 4 and all((x != 1).all() for x in gains)


@pytest.mark.parametrize("share", [False, True])
def test_redo_initialises_dormant_units_anew_and_no_others(share, module):
    script = module("redo_mujoco")
    agent, args = new_agent(script, activation="ReLU", share_features=share)
    optimizers = script.make_optimizers(agent, args)
    with torch.no_grad():
        for network in (agent.actor, agent.critic):  # all units are active, but for three
            for layer, bias in zip(network.hidden, (1.0, 5.0), strict=True):
                layer.bias.fill_(bias)
        agent.actor.hidden[0].bias[3] = agent.actor.hidden[1].bias[[5, 8]] = -100.0
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    before = {p: [x.clone() for x in (p.detach(), states[p]["exp_avg"], states[p]["exp_avg_sq"])] for p in states}
    obs = torch.randn(64, 6)
    agent.recycle(obs, 1e-6, optimizers, torch.Generator().manual_seed(2))
    (first, second), following = agent.actor.hidden, [agent.actor.output] + [agent.critic.output] * share
    for p, then in before.items():
        new = torch.zeros(p.shape, dtype=torch.bool)  # what was initialised anew, and what was emptied
        emptied = new.clone()
        if p is first.weight or p is first.bias:
            new[3] = True
        if p is second.weight or p is second.bias:
            new[[5, 8]] = True
        if p is second.weight:
            emptied[:, 3] = True
        if p.ndim == 1:  # biases
            emptied |= new
        if any(p is layer.weight for layer in following):
            emptied[:, [5, 8]] = True
        now = [p.detach(), states[p]["exp_avg"], states[p]["exp_avg_sq"]]
        assert not now[0][emptied].any() and (now[0] != then[0])[new & ~emptied].all()
        assert now[0][new].abs().amax() <= 6**-0.5 if new.any() else True
        assert not any(x[new | emptied].any() for x in now[1:])
        assert all(torch.equal(x[~(new | emptied)], y[~(new | emptied)]) for x, y in zip(now, then, strict=True))
    after = copy.deepcopy(agent.state_dict())
    agent.recycle(obs, 1e-6, optimizers, torch.Generator().manual_seed(1))  # the new units, as drawn, are active
    assert all(torch.equal(x, after[name]) for name, x in agent.state_dict().items())


def test_output_pfo_holds_the_policys_output(module):
    script = module("output_pfo_mujoco")
    agent, args = new_agent(script, output_pfo_coef=3.0)
    mb = new_minibatch(script, agent, output=lambda policy: policy.output)
    loss, _, logged = loss_and_gradient(script, agent, mb, args)
    plain = loss_and_gradient(script, agent, mb, script.Args(output_pfo_coef=0.0))[0]
    moved = (agent.policy(mb["obs"]).output - mb["output"]).square().mean().item()
    assert moved > 1e-4 and logged["pfo_output"].item() == pytest.approx(moved)
    assert loss - plain == pytest.approx(3 * moved, rel=1e-3)
    assert args.pfo_coef == 1.0


def test_a_time_limit_shows_the_last_observation(module):
    script = module("bootstrap_truncation_mujoco")
    args = script.Args(env_id="HalfCheetah-v4")
    envs = script.make_envs(args, 2, [1, 2])
    normalizer = script.Normalizer(np.zeros(17), np.ones(17), 1000)
    obs, noise = torch.empty(1003, 2, 18), torch.randn(1002, 2, 6)
    obs[0] = normalizer(envs.reset()[0], np.zeros(2))
    act = lambda obs, noise: (noise.tanh(),)  # noqa: E731
    transitions, ended = script.rollout(envs, act, normalizer, obs, noise, np.zeros((2, 2)))
    assert [(i, step) for i, step, *_ in ended] == [(0, 1000), (1, 1000)]
    assert torch.equal(transitions.truncations.sum(1), torch.tensor([0.0] * 999 + [2.0] + [0.0] * 2))
    assert torch.equal(transitions.dones, transitions.truncations)
    assert (transitions.last_obs[999, :, -1] == 1).all() and (obs[1000, :, -1] == -1).all()
    others = torch.arange(1002) != 999
    assert torch.equal(transitions.last_obs[others], obs[1:][others])
    for i, seed in enumerate((1, 2)):
        single = script.make_envs(args, 1, [seed])
        single.reset()
        for action in transitions.actions[:1000, i].double().numpy():
            last = single.step(action[None])[0]
        assert torch.equal(transitions.last_obs[999, i, :-1], torch.from_numpy(last[0]).float())
    assert (transitions.last_obs[999] != obs[1000]).float().mean() > 0.9


def test_bootstrapping_changes_returns_at_time_limits_alone(run):
    name, size = "bootstrap_truncation_mujoco", "--num-envs 1 --num-steps 1001 --minibatch-size 1001 --update-epochs 1"
    flags = [*size.split(), "--total-timesteps", "1001", "--env-id", "HalfCheetah-v4", "--seed", "2"]
    limited, free = run(name, *flags)[0][2], run("none", *flags)[0][2]
    assert apart(limited, free) > 1e-4
    assert apart(run(name, "--seed", "2")[0][2], run("none", "--seed", "2")[0][2]) == 0


@pytest.mark.parametrize("name", ["l2_init_mujoco", "nap_mujoco", "chain_mujoco", "redo_mujoco"])
def test_what_a_recipe_keeps_is_resumed(name, run):
    kept = {"l2_init_mujoco": "initial_weights", "nap_mujoco": "initial_norms"}.get(name)
    first, _ = run(name, "--seeds", "1", "2")
    folders = [checkpoint["folder"] for checkpoint in first.values()]
    longer = ["--total-timesteps", "192"]
    resumed, said = run(name, *longer, "--resume", *folders)
    assert all(x["iteration"] == 3 for x in resumed.values()), said
    for seed in (1, 2):
        if kept:
            assert torch.equal(resumed[seed]["agent"][kept], first[seed]["agent"][kept])
    if name == "chain_mujoco":
        histories = [x[1]["agent"]["chain_history"] for x in (first, resumed)]
        assert torch.equal(histories[1][:, -3:-1], histories[0][:, -2:])


def test_redo_knows_which_weights_leave_a_channel(module):
    script = module("redo_atari")
    torch.manual_seed(0)
    args = script.Args()
    agent = script.Agent(4, args)
    optimizers = script.make_optimizers(agent, args)
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    dead = {0: 7, 2: 11, 3: 500}  # a channel of the first and of the last convolution, a unit
    with torch.no_grad():
        for network in (agent.actor, agent.critic):
            for layer, bias in zip(network.hidden, (2.0, 9.0, 40.0, 150.0), strict=True):
                layer.bias.fill_(bias)  # all others are active
        for i, unit in dead.items():
            agent.actor.hidden[i].bias[unit] = -1000.0
    before = copy.deepcopy(agent.state_dict())
    agent.recycle(torch.randint(256, (2, 84, 84, 4), dtype=torch.uint8), 1e-6, optimizers)
    state = {
        name: optimizers[0].state[p]["exp_avg"] for name, p in agent.named_parameters() if name.startswith("actor")
    }
    for name, x in agent.state_dict().items():
        new, emptied = torch.zeros(x.shape, dtype=torch.bool), torch.zeros(x.shape, dtype=torch.bool)
        for i, unit in dead.items():
            if name.startswith(f"actor.hidden.{i}."):
                new[unit] = True
        if name == "actor.hidden.1.weight":
            emptied[:, 7] = True
        if name == "actor.hidden.3.weight":
            emptied[:, 49 * 11 : 49 * 12] = True
        if name == "actor.output.weight":
            emptied[:, 500] = True
        if name.endswith("bias"):
            emptied |= new
        assert not x[emptied].any() and (x != before[name])[new & ~emptied].all(), name
        assert torch.equal(x[~(new | emptied)], before[name][~(new | emptied)]), name
        if name in state:
            assert (state[name] == 0).equal(new | emptied), name


def test_residual_layers_add_to_the_preactivations_before_them(module):
    script = module("residual_atari")
    agent = script.Agent(4, script.Args(residual_layers=2))
    obs = torch.randint(256, (3, 84, 84, 4), dtype=torch.uint8)
    output = agent.policy(obs, all_layers=True)
    *_, first, second, third = output.all_preactivations.split(
        [32 * 20 * 20, 64 * 9 * 9, 64 * 7 * 7, *[512] * 3], dim=1
    )
    for z, following, layer in ((first, second, agent.actor.hidden[4]), (second, third, agent.actor.hidden[5])):
        assert torch.allclose(following, z + z.relu() @ layer.weight.T + layer.bias, atol=1e-5)
    assert torch.equal(output.preactivations, third) and len(agent.actor.hidden) == 6


def same_transitions(script, args, make_single, num_steps):
    """A rollout of two environments is what single ones make of its actions; their episodes that ended."""
    seeds = [11, 5]
    envs = script.make_envs(args, 2, seeds)
    size, action_dim = envs.observation_space.shape[0], len(envs.action_space.low)
    low, high = envs.action_space.low, envs.action_space.high
    normalizer = script.Normalizer(np.zeros(size), np.ones(size), 1000)
    obs = torch.empty(num_steps + 1, 2, size + 1)
    obs[0] = normalizer(envs.reset()[0], np.zeros(2))
    noise = torch.randn(num_steps, 2, action_dim, generator=torch.Generator().manual_seed(0))
    outputs = 1 if not hasattr(script, "loc_and_scale") else 2
    act = lambda x, noise: (script.sample(torch.zeros(len(x), outputs * action_dim), noise),)  # noqa: E731
    transitions, ended = script.rollout(envs, act, normalizer, obs, noise, np.zeros((2, 2)))
    for i, seed in enumerate(seeds):
        reset, step = make_single(seed)
        seen, length = reset(), 0
        for t, action in enumerate(transitions.actions[:, i].numpy()):
            expected = torch.from_numpy(np.asarray(seen)).float()
            assert torch.equal(obs[t, i, :-1], expected) and obs[t, i, -1].item() == pytest.approx(length / 500 - 1)
            seen, reward, done = step(action * (high - low) / 2 + (high + low) / 2)
            assert transitions.rewards[t, i] == np.float32(reward) and transitions.dones[t, i] == done
            length += 1
            if done:
                seen, length = reset(), 0
        assert torch.equal(obs[-1, i, :-1], torch.from_numpy(np.asarray(seen)).float())
    return ended


def of_envpool(join, act, *task):
    """Single environments of envpool, for same_transitions."""

    def make_single(seed):
        envs = envpool.make(*task, env_type="gymnasium", num_envs=1, seed=[seed])
        first = []

        def reset():
            # After an episode, the next step is spent on the reset
            obs = envs.step(act(np.zeros(8)))[0] if first else envs.reset()[0]
            first.append(obs)
            return join(obs)

        def step(action):
            obs, reward, terminated, truncated, _ = envs.step(act(action))
            return join(obs), reward[0], terminated[0] | truncated[0]

        return reset, step

    return make_single


def test_dm_control_has_real_transitions_alone(module):
    script = module("ppo_dm_control")
    join = lambda obs: np.concatenate([obs["position"][0], obs["velocity"][0]])  # noqa: E731
    single = of_envpool(join, lambda action: action[None, :6], "CheetahRun-v1")
    ended = same_transitions(script, script.Args(env_id="CheetahRun-v1"), single, 1003)
    assert [(i, step, length) for i, step, _, length in ended] == [(0, 1000, 1000), (1, 1000, 1000)]
    for task in ("HumanoidCMURun-v1", "FingerSpin-v1"):
        args = script.Args(env_id=task)
        script.check_args(args)
        envs = script.make_envs(args, 2, [1, 2])
        assert envs.reset()[0].shape == (2, *envs.observation_space.shape)


@pytest.mark.parametrize("task", ["CartPole-v1", "Acrobot-v1"])
def test_classic_control_has_real_transitions_alone(task, module):
    script = module("ppo_classic_control")
    num_actions = {"CartPole-v1": 2, "Acrobot-v1": 3}[task]
    single = of_envpool(lambda obs: obs[0], lambda action: np.array([action[:num_actions].argmax()]), task)
    ended = same_transitions(script, script.Args(env_id=task), single, 600)
    assert len(ended) >= 2


def test_a_categorical_policy_draws_what_it_says(module):
    script = module("ppo_classic_control")
    logits = torch.tensor([1.0, -0.5, 0.2]).expand(100_000, 3)
    noise = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    actions = script.sample(logits, noise)
    assert torch.equal(actions.sum(1), torch.ones(100_000)) and set(actions.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(actions.mean(0), logits[0].softmax(0), atol=0.006)  # four standard errors
    assert torch.equal(script.sample(logits[:1], torch.zeros(1, 3)), torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.allclose(script.log_prob(actions, logits).exp().mean(), logits[0].softmax(0).square().sum(), atol=0.01)


def test_a_categorical_policy_has_the_loss_of_the_atari_scripts(module):
    script, atari = module("ppo_classic_control"), importlib.import_module("ppo_pfo_atari")
    torch.manual_seed(0)
    logits, old, held = torch.randn(64, 3, requires_grad=True), torch.randn(64, 3), torch.randn(64, 8)
    actions = torch.arange(64) % 3
    one_hot = torch.nn.functional.one_hot(actions).float()
    common = {"advantages": torch.randn(64), "actor_held": torch.randn(64, 8), "logits": old}
    flags = {"ent_coef": 0.1, "kl_coef": 1.0, "pfo_coef": 1.0, "clip_coef": 0.2}
    mine = {**common, "actions": one_hot, "logprobs": script.log_prob(one_hot, old)}
    loss, logged = script.actor_loss(logits, held, mine, torch.tensor(0.5), script.Args(**flags))
    theirs = {**common, "actions": actions}
    expected, others = atari.actor_loss(logits, held, theirs, torch.tensor(0.5), atari.Args(**flags))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {name: x.item() for name, x in logged.items()} == pytest.approx(
        {name: x.item() for name, x in others.items()}, rel=1e-4, abs=1e-6
    )
    one, other = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("task, num_steps", [("Pendulum-v1", 410), ("Hopper-v5", 120)])
def test_gymnasium_has_real_transitions_alone(task, num_steps, module):
    script = module("ppo_gymnasium")

    def make_single(seed):
        env = gymnasium.make(task)
        env.reset(seed=seed)  # as make_envs does; the rollout begins with another

        def step(action):
            obs, reward, terminated, truncated, _ = env.step(action)
            return obs, reward, terminated or truncated

        return lambda: env.reset()[0], step

    ended = same_transitions(script, script.Args(env_id=task), make_single, num_steps)
    assert len(ended) >= 4


REFUSED = [
    ("ppo_gymnasium", "CartPole-v1", "--env-id CartPole-v1: its actions must be a box of vectors, and are Discrete(2)"),
    ("ppo_gymnasium", "NoTask-v0", "--env-id NoTask-v0: can't be made, NameNotFound: "),
    ("ppo_dm_control", "cheetahrun", "must be one of dm_control's 51 tasks; nearest: CheetahRun-v1"),
    ("ppo_classic_control", "Pong-v5", "--env-id Pong-v5: must be CartPole-v1 or Acrobot-v1"),
]


@pytest.mark.parametrize("name, env_id, line", REFUSED)
def test_other_environments_cost_one_line(name, env_id, line, module, capsys):
    with pytest.raises(SystemExit) as stop:
        module(name).check_args(module(name).Args(env_id=env_id))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and line in said and said.startswith("error: ") and said.count("\n") == 1


def test_runs_of_recipes_are_probed(copies, run, tmp_path):
    """With networks, policies and environments that are other than the scripts'."""
    probed = ["layer_norm_mujoco", "crelu_mujoco", "l2_init_mujoco", "ppo_classic_control", "ppo_dm_control"]
    probed += ["ppo_gymnasium"]
    shutil.copytree(ROOT / "common", tmp_path / "common")
    shutil.copy(ROOT / "plasticity_probe.py", tmp_path)
    folders = []
    for name in probed:
        shutil.copy(copies / f"{name}.py", tmp_path)
        folders.append(run(name, "--seed", "2")[0][2]["folder"])
    flags = ["--checkpoints", "last", "--max-samples", "64", "--num-envs", "1"]
    command = [sys.executable, tmp_path / "plasticity_probe.py", *folders, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in folders:
        lines = (Path(folder) / "plasticity" / "plasticity.csv").read_text().splitlines()
        assert len(lines) == 3 and "nan" not in lines[1].lower()


def test_the_main_readme_shows_a_recipe_as_it_is():
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("```diff\n")[1].split("```")[0]
    assert shown == recipe.path_of("spo_mujoco").read_text(encoding="utf-8")


def test_the_readme_shows_a_recipe_as_it_is_and_names_all():
    text = (recipe.RECIPES / "README.md").read_text(encoding="utf-8")
    shown = text.split("```diff\n")[1].split("```")[0]
    assert shown == recipe.path_of("weight_clipping_mujoco").read_text(encoding="utf-8")
    assert [name for name in recipe.names() if f"`{name}`" not in text] == []
