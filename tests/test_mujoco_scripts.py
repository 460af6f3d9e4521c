"""The MuJoCo scripts run for real; many seeds at once are the runs of the seeds alone."""

import copy
import dataclasses
import importlib
import math
import os
import subprocess
import sys
from functools import partial

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scripts import (
    DIAGNOSTICS,
    EVALUATION,
    EVERY_ITERATION,
    ROOT,
    SOMETIMES,
    diagnostics_of_layers,
    load,
    newest_run,
    refusal,
    run_script,
    same,
    scalars_of,
)

from common.batch import Batch, Optimizers
from common.evaluation import play
from common.replay import Reads, Replay

script = importlib.import_module("ppo_mujoco")
SEVERAL = ["--seeds", "1", "2"]
# Five iterations of 2 x 64 transitions
TINY = ["--num-steps", "64", "--minibatch-size", "32", "--update-epochs", "2", "--obs-norm-steps", "50"]
TINY += ["--total-timesteps", "700"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    evaluation = ["--eval-episodes", "2", "--eval-interval", "0.5"]
    return run_script("ppo_mujoco", tmp_path_factory.mktemp("mujoco"), *TINY, "--seed", "7", *evaluation)


def test_every_tag_is_logged(finished):
    scalars = scalars_of(finished[1])
    steps = [128 * i for i in range(1, 6)]
    own = ["policy/loc_abs_mean", "policy/scale_mean", "churn/policy_loc"]
    own += diagnostics_of_layers(2, "saturated_fraction")
    expected = {tag: steps for tag in EVERY_ITERATION + DIAGNOSTICS + own} | {tag: [256, 640] for tag in EVALUATION}
    assert {tag: [step for step, _ in scalars[tag]] for tag in expected if tag in scalars} == expected
    assert set(scalars) - set(expected) <= set(SOMETIMES)
    assert [tag for tag, points in scalars.items() if not all(math.isfinite(value) for _, value in points)] == []
    assert "/640 steps" in finished[0].stdout


def test_the_first_minibatch_starts_where_the_rollout_was(finished):
    scalars = scalars_of(finished[1])
    for name in ("old_approx_kl", "approx_kl", "clipfrac", "pfo_actor", "pfo_critic"):
        assert all(abs(value) < 1e-5 for _, value in scalars[f"losses/first_minibatch/{name}"]), name
        assert any(abs(value) > 1e-8 for _, value in scalars[f"losses/last_minibatch/{name}"]) or name == "clipfrac"


def test_returns_are_logged_once_an_episode(finished):
    scalars = scalars_of(finished[1])
    returns = scalars["charts/episodic_return"]
    assert len(returns) >= 5
    for step, mean in scalars["charts/rollout_return"]:
        ended = [value for at, value in returns if step - 128 < at <= step]
        assert mean == pytest.approx(sum(ended) / len(ended), rel=1e-5)
    assert load(finished[1] / "checkpoints" / "640.pt")["episodes"] == len(returns)


def test_checkpoints_hold_what_acting_needs(finished):
    paths = sorted(finished[1].glob("checkpoints/[0-9]*.pt"), key=lambda path: int(path.stem))
    assert [path.name for path in paths] == [f"{128 * i}.pt" for i in range(6)]
    for path in paths:
        state = load(path)
        fields = {field.name for field in dataclasses.fields(script.Args) if field.init}
        args = script.Args(**{key: value for key, value in state["args"].items() if key in fields})
        script.check_args(args)
        assert dataclasses.asdict(args) == {**state["args"], "hidden_sizes": tuple(state["args"]["hidden_sizes"])}
        assert state["script"] == "ppo_mujoco.py" and state["global_step"] == int(path.stem)
        agent = script.Agent(state["obs_dim"], state["action_low"], state["action_high"], args)
        agent.load_state_dict(state["agent"])
        normalizer = state["normalizer"]
        normalizer = script.Normalizer(normalizer["mean"].numpy(), normalizer["std"].numpy(), normalizer["time_limit"])
        assert normalizer.mean.shape == (11,) and (normalizer.std > 0).all() and normalizer.time_limit == 1000
    actor = partial(script.choose, agent, normalizer, (state["action_low"].numpy(), state["action_high"].numpy()))
    returns, _ = play(partial(script.make_envs, args), actor, torch.device("cpu"), 50, [1, 2], greedy=True)
    assert np.isfinite(returns).all()
    assert sum(len(o["state"]) for o in state["optimizers"]) == len(list(agent.parameters()))


def test_the_same_seed_gives_the_same_run_evaluated_or_not(finished, tmp_path):
    _, run = run_script("ppo_mujoco", tmp_path, *TINY, "--seed", "7")
    for path in run.glob("checkpoints/[0-9]*.pt"):
        one, other = load(path), load(finished[1] / "checkpoints" / path.name)
        for key in ("agent", "optimizers", "random_states", "episodes", "normalizer"):
            assert same(one[key], other[key]), key
    one, other = scalars_of(run), scalars_of(finished[1])
    timed = ("time/", "charts/SPS", "charts/FPS")
    for tag in one:
        assert tag.startswith(timed) or one[tag] == other[tag], tag


VARIANTS = {
    "plain": "",
    "held": "--pfo-coef 1 --pfo-layers all --critic-pfo-coef 1 --ent-coef 0.01 --activation ReLU --cosine-lr",
    "early stopping": "--kl-coef 1 --target-kl 3e-4 --no-clip-objective --reset-optimizer --activation GELU",
    "shared": "--share-features --pfo-coef 1 --pfo-mode clip --pfo-limit 1e-4 --clip-vloss --hidden-sizes 32 16 8",
    # Short, since a simulation of contacts turns a rounding error of 1e-7 into 1e-3 within 30 steps
    "cheetah": "--env-id HalfCheetah-v4 --num-envs 3 --num-steps 6 --minibatch-size 9 --total-timesteps 54 "
    "--layer-init orthogonal --adam-beta2 0.9",
}


def assert_same_run(alone, together):
    """Checkpoints, to a rounding error, and every logged number of a run alone and of the same seed among others."""
    assert alone.name.split("__")[:3] == together.name.split("__")[:3]

    names = [path.name for path in sorted(alone.glob("checkpoints/[0-9]*.pt"))]
    assert names == [path.name for path in sorted(together.glob("checkpoints/[0-9]*.pt"))]
    for name in names:
        one, other = load(alone / "checkpoints" / name), load(together / "checkpoints" / name)
        assert list(one) == list(other) and one["args"] == other["args"] and one["args"]["seeds"] == ()
        for key in ("script", "normalizer", "action_low", "iteration", "global_step", "episodes", "random_states"):
            assert same(one[key], other[key]), key
        assert one["kl_coef"] == pytest.approx(other["kl_coef"])
        for key in one["agent"]:
            torch.testing.assert_close(other["agent"][key], one["agent"][key], rtol=1e-4, atol=2e-5)
            assert other["agent"][key].untyped_storage().nbytes() == other["agent"][key].nbytes  # no other seed's
        for mine, theirs in zip(one["optimizers"], other["optimizers"], strict=True):
            assert mine["param_groups"] == theirs["param_groups"] and mine["state"].keys() == theirs["state"].keys()
            for i, moments in mine["state"].items():
                for moment, x in moments.items():
                    torch.testing.assert_close(theirs["state"][i][moment], x, rtol=1e-3, atol=1e-4)

    one, other = scalars_of(alone), scalars_of(together)
    assert one.keys() == other.keys()
    for tag, points in one.items():
        assert [step for step, _ in points] == [step for step, _ in other[tag]]
        if not tag.startswith(("time/", "charts/SPS", "charts/FPS")):
            mine, theirs = ([value for _, value in x] for x in (points, other[tag]))
            # A difference of two large numbers keeps few of their digits.
            assert theirs == pytest.approx(mine, rel=2e-3, abs=2e-2 if "delta" in tag else 2e-4), tag


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_seeds_are_the_runs_of_each_seed(variant, tmp_path):
    flags = [*TINY, *VARIANTS[variant].split()]
    _, _ = run_script("ppo_mujoco", tmp_path, "--seeds", "3", "7", "11", *flags)
    batched = {path.name.split("__")[2]: path for path in (tmp_path / "runs").iterdir()}
    assert batched.keys() == {"3", "7", "11"}
    for seed in batched if variant == "plain" else ["7"]:
        (tmp_path / seed).mkdir()
        _, alone = run_script("ppo_mujoco", tmp_path / seed, "--seed", seed, *flags)
        assert_same_run(alone, batched[seed])
    if variant == "early stopping":
        assert {value for _, value in scalars_of(batched["7"])["losses/early_stop"]} - {0, 1}
        stopped = {tuple(value for _, value in scalars_of(run)["losses/early_stop"]) for run in batched.values()}
        assert len(stopped) > 1  # the seeds stop at different minibatches


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("everything", [True, False])
def test_recorded_gradients_and_actions_are_the_eager_ones(variant, everything, monkeypatch):
    """Bit for bit, for minibatches and weights other than those that they were recorded with, and so is Adam's step."""
    monkeypatch.setattr(sys, "argv", ["x", *VARIANTS[variant].split()])
    args = script.parse_args(script.Args)
    script.check_args(args)
    everything |= bool(args.kl_coef or args.target_kl)
    torch.manual_seed(0)
    agent = script.Agent(11, -np.ones(3), np.ones(3), args)
    other = copy.deepcopy(agent)
    layers = args.pfo_layers == "all"

    def minibatch():
        obs = torch.randn(args.minibatch_size, 12)
        with torch.no_grad():
            actor, critic = agent(obs, layers)
            loc, scale = script.loc_and_scale(actor.output + 0.3)
            z = script.unsquash(script.sample(actor.output, torch.randn_like(loc)))
        mb = {"obs": obs, "z": z, "loc": loc, "scale": scale, "logprobs": script.normal_log_prob(z, loc, scale)}
        mb |= {name: torch.randn(len(obs)) for name in ("values", "advantages", "returns")}
        mb["actor_held"] = script.pfo_input(actor, args.pfo_layers, args.pfo_on) + 0.1
        mb["critic_held"] = script.pfo_input(critic, args.pfo_layers, args.pfo_on) - 0.1
        return mb | {"noise": torch.randn_like(z)}

    def learner(agent):
        together = Batch([agent])
        losses = together.each(lambda agent, mb, kl_coef: script.losses(agent, mb, kl_coef, args, everything))

        def gradients(mb, kl_coef, everything):
            return script.gradients(together, losses, mb, kl_coef, args)

        optimizers = script.make_optimizers(agent, args)
        return together, gradients, optimizers, Optimizers(together, lambda: [optimizers]).step

    together, eager, optimizers, _ = learner(agent)
    others, gradients, theirs, step = learner(other)
    differentiate = script.Differentiate(
        others, gradients, Reads(args, script.losses), others.state, pytest.fail, False
    )
    acting = Replay(
        lambda *x: (others.each(script.act)(*x),),
        "acting",
        Reads(args, script.losses),
        others.state,
        pytest.fail,
        False,
    )
    for k in range(3):
        mb, kl_coef = {name: x.unsqueeze(0) for name, x in minibatch().items()}, torch.tensor([0.5 * k])
        for optimizer in (*optimizers, *theirs):
            optimizer.param_groups[0]["lr"] = 1e-3 * (k + 1)
        row, logged = eager(mb, kl_coef, everything)
        grad, replayed = differentiate(mb, kl_coef, everything, plain=False, checked=False, trial=False)
        assert replayed.keys() == logged.keys()
        assert all(torch.equal(replayed[name], x) for name, x in logged.items())
        step(grad, [0])
        for p, grad in zip(agent.parameters(), together.pieces(row), strict=True):
            p.grad = grad[0]
        for optimizer in optimizers:
            optimizer.step()  # PyTorch's own, which rounds the last elements of a tensor otherwise
        for (name, p), q in zip(agent.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=name)
            p.data.copy_(q)
        obs, noise = torch.randn(1, 2, 12), torch.randn(1, 2, 3)
        with torch.no_grad():
            assert torch.equal(acting(obs, noise)[0][0], script.sample(agent.policy(obs[0]).output, noise[0]))
    assert differentiate.replays and acting.program is not None
    for mine, own in zip(optimizers, theirs, strict=True):
        mine, own = mine.state_dict(), own.state_dict()
        assert mine["param_groups"] == own["param_groups"]
        for i, moments in mine["state"].items():
            for name, x in moments.items():
                torch.testing.assert_close(x, own["state"][i][name], rtol=1e-4, atol=1e-9)


@settings(deadline=None)  # recording takes longest the first time
@given(
    activation=st.sampled_from(["Tanh", "ReLU"]),
    hidden=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    seeds=st.integers(1, 3),
    num_envs=st.integers(1, 4),
    action_dim=st.integers(1, 5),
    gain=st.sampled_from([0.1, 1.0, 100.0]),
    draw=st.integers(0, 2**31),
)
def test_numpy_acts_as_the_policy_does(activation, hidden, seeds, num_envs, action_dim, gain, draw):
    """For one seed and for a batch, with weights that have changed since, and inside the box."""
    torch.manual_seed(draw)
    args = script.Args(hidden_sizes=tuple(hidden), activation=activation)
    agents = [script.Agent(6, -np.ones(action_dim), np.ones(action_dim), args) for _ in range(seeds)]
    obs, noise = gain * torch.randn(seeds * num_envs, 7), torch.randn(seeds * num_envs, action_dim)

    batch = Batch(agents)  # the agents' weights are now views of the batch's
    recorded = Replay(
        torch.no_grad()(lambda *x: (batch.each(script.act)(*x),)), "acting", dict, batch.state, pytest.fail, False, True
    )
    rows = obs.view(seeds, num_envs, 7), noise.view(seeds, num_envs, action_dim)
    with np.errstate(all="ignore"):
        recorded(*rows)
        assert recorded.tolerance  # it is NumPy's
        for p in (p for agent in agents for p in agent.actor.parameters()):
            p.data.mul_(1.5).add_(0.1)
        together = recorded(*rows)[0]
    assert together.shape == rows[1].shape and (together.abs() < 1).all()
    for agent, own_obs, own_noise, of_batch in zip(agents, *rows, together, strict=True):
        with torch.no_grad():
            output = agent.policy(own_obs).output
            ours = script.sample(output, own_noise)
        # A rounding error is a share of the numbers before the tanh.
        torch.testing.assert_close(of_batch, ours, rtol=0, atol=2e-6 * max(output.abs().max().item(), 1))


@pytest.mark.parametrize("seeds", [[], SEVERAL])
def test_weights_that_change_behind_a_recording_s_back_end_the_run(seeds, tmp_path):
    """A policy that is not the one that learns, from the middle of a rollout on, has acted: nobody learns from that."""
    source, line = (ROOT / "ppo_mujoco.py").read_text(), "        dones[step] = done = terminated | truncated\n"
    start = "        transitions, ended = rollout("
    assert line in source and start in source
    source = source.replace(start, f"        ITERATION = iteration\n{start}")
    change = "        if ITERATION == 3 and step == 20:\n            SHIFT[0] = 0.5\n"
    source = source.replace(line, line + change).replace("def act(agent", "SHIFT = [0.0]\n\n\ndef act(agent")
    source = source.replace(
        "    return sample(agent.policy(obs).output, noise)",
        "    return sample(agent.policy(obs).output + SHIFT[0], noise)",
    )
    (tmp_path / "my_ablation.py").write_text(source)
    done = forked.finished("ppo_mujoco", tmp_path, [*TINY, *seeds], path=tmp_path / "my_ablation.py")
    assert done.returncode == 1 and "what changes within a rollout needs --no-record in iteration 3" in done.stderr
    assert done.stderr.count("\n") == len(list((tmp_path / "runs").iterdir())) == (len(seeds) - 1 if seeds else 1)


PATCHED = """
import envpool
make = envpool.make
def broken_make(*args, **kwargs):
    envs = make(*args, **kwargs)
    step, calls = envs.step, [0]
    def broken_step(actions, ids=None):
        result = step(actions) if ids is None else step(actions, ids)
        calls[0] += ids is None
        if calls[0] == WHEN and ids is None:
            result[WHICH][ROW] = float("nan")
        return result
    envs.step = broken_step
    return envs
envpool.make = broken_make
"""


def run_broken(folder, name, which, row, when, *flags):
    """A run whose simulations return NaN once: result ``which`` (0 observation, 1 reward) of ``row`` at a step."""
    code = PATCHED.replace("WHICH", str(which)).replace("ROW", str(row)).replace("WHEN", str(when))
    return forked.finished(name, folder, [*TINY, *flags], code)


# 20 iterations of 2 x 16 transitions, after the 12th of which no checkpoint is due
LONG = ["--num-steps", "16", "--minibatch-size", "16", "--total-timesteps", "640", "--checkpoint-interval", "1"]
BROKEN = 12 * 16 + 8  # the 8th step of the 13th rollout


@pytest.mark.parametrize("which, what", [(0, "observation"), (1, "reward")])
def test_a_broken_simulation_ends_the_run_at_its_last_good_state(which, what, tmp_path):
    done = run_broken(tmp_path, "ppo_mujoco", which, 1, BROKEN, *LONG)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"{what} of environment 1 in step 8 of the rollout is not finite in iteration 13" in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    state = load(run / "checkpoints" / "latest.pt")
    assert state["iteration"] == 12 and all(x.isfinite().all() for x in state["agent"].values())
    assert scalars_of(run)["losses/policy_loss"][-1][0] == state["global_step"] == 12 * 32


def test_a_broken_simulation_ends_its_own_seed_alone(tmp_path):
    flags = ["--seeds", "3", "7", "11", "--diagnostics-interval", "2", *LONG]
    done = run_broken(tmp_path, "ppo_mujoco", 0, 3, BROKEN, *flags)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "observation of environment 1 in step 8 of the rollout is not finite in iteration 13" in done.stderr
    for run in (tmp_path / "runs").iterdir():
        broken = run.name.split("__")[2] == "7"
        assert (run.name in done.stderr) == broken
        state = load(run / "checkpoints" / "latest.pt")
        assert state["iteration"] == (12 if broken else 20)
        assert all(x.isfinite().all() for x in state["agent"].values())
        points = [point for points in scalars_of(run).values() for point in points]
        assert all(math.isfinite(value) for _, value in points)
        # An episode in the rollout that broke may have ended before that.
        assert max(step for step, _ in points) <= state["global_step"] + (32 if broken else 0)


@pytest.mark.parametrize("seeds", [[], SEVERAL])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_last_good_state(seeds, tmp_path):
    flags = [*TINY, "--learning-rate", "1e6", "--activation", "ReLU", "--no-norm-adv", *seeds]
    done, _ = run_script("ppo_mujoco", tmp_path, *flags, code=1)
    runs = list((tmp_path / "runs").iterdir())
    assert done.stderr.count("\n") == len(runs) and done.stderr.count("is not finite in iteration") == len(runs)
    for run in runs:
        for path in run.glob("checkpoints/[0-9]*.pt"):
            assert all(x.isfinite().all() for x in load(path)["agent"].values())


def test_a_policy_that_is_not_finite_is_named_before_it_acts(tmp_path):
    flags = ["--learning-rate", "1e6", "--hidden-sizes", *["64"] * 8, "--activation", "ReLU", "--update-epochs", "1"]
    done, run = run_script("ppo_mujoco", tmp_path, *TINY, *flags, "--minibatch-size", "128", code=1)
    assert (
        done.stderr.startswith("error: the policy's output is not finite in iteration 1")
        and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "MUJOCO_LOG.TXT").exists()
    agent = script.Agent(11, -np.ones(3), np.ones(3), script.Args(hidden_sizes=(64,) * 8, activation="ReLU"))
    agent.load_state_dict(load(run / "checkpoints" / "0.pt")["agent"])
    assert agent.policy(torch.randn(9, 12)).output.isfinite().all()


def test_many_seeds_are_tracked_as_a_run_each(tmp_path):
    flags = ["--seeds", "1", "2", "--track", "--wandb-mode", "offline"]
    run_script("ppo_mujoco", tmp_path, *TINY, *flags)
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        (written,) = run.glob("wandb/offline-run-*/run-*.wandb")
        assert b"losses/policy_loss" in written.read_bytes()


@pytest.mark.parametrize("task", ["HalfCheetah-v4", "Ant-v4", "Humanoid-v4", "Ant-v5", "InvertedPendulum-v5"])
def test_other_tasks_train(task, tmp_path):
    _, run = run_script("ppo_mujoco", tmp_path, "--env-id", task, *TINY[:-1], "256")
    state = load(run / "checkpoints" / "256.pt")
    assert state["args"]["env_id"] == task and all(x.isfinite().all() for x in state["agent"].values())
    scalars = scalars_of(run)
    assert all(len(scalars[f"losses/{name}_loss"]) == 2 for name in ("policy", "value"))
    assert all(math.isfinite(value) for name in ("policy", "value") for _, value in scalars[f"losses/{name}_loss"])


def test_videos_or_one_line(tmp_path):
    """Where MuJoCo can render, films of the first episodes; elsewhere a line that says so, and the run goes on."""
    import imageio.v2 as imageio

    flags = ["--eval-episodes", "1", "--capture-video"]
    done, run = run_script("ppo_mujoco", tmp_path, *TINY, *flags)
    lengths = {kind: scalars_of(run)[f"eval/{kind}/episodic_length"][-1][1] for kind in ("sampled", "greedy")}
    assert load(run / "checkpoints" / "640.pt")
    if "--capture-video: MuJoCo can't render here" in done.stdout:
        assert not script.can_render("Hopper-v4") and not (run / "videos").exists()
        pytest.skip("no EGL here")
    for kind, length in lengths.items():
        with imageio.get_reader(run / "videos" / f"640-{kind}.mp4") as film:
            assert film.count_frames() == length


def test_without_opengl_there_is_one_line_and_no_video(tmp_path):
    """A machine with neither library: the dynamic loader finds none of them."""
    code = "import ctypes, runpy, sys; load = ctypes.CDLL\n"
    code += "def CDLL(name, *a, **k):\n    if name and 'EGL' in name: raise OSError(name)\n"
    code += "    return load(name, *a, **k)\n"
    (tmp_path / "sitecustomize.py").write_text(code + "ctypes.CDLL = CDLL\n")
    flags = [*TINY, "--eval-episodes", "1", "--capture-video"]
    command = [sys.executable, str(ROOT / "ppo_mujoco.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "EGL_PLATFORM": "none"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    run = newest_run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--capture-video: MuJoCo can't render here") == 1 and done.stderr == ""
    assert not (run / "videos").exists() and load(run / "checkpoints" / "640.pt")


WRONG = [
    ("--env-id Hoper-v4", "Hopper-v4"),
    ("--env-id Phoenix-v5", "must be one of Gymnasium's"),
    ("--env-id HopperHop-v1", "nearest: Hopper"),
    ("--hidden-sizes 64 0", "--hidden-sizes 64 0: must be"),
    ("--hidden-sizes 64 x", "--hidden-sizes"),
    ("--hidden-sizes -1", "--hidden-sizes"),
    ("--minibatch-size 100", "must divide num_envs x num_steps = 2048"),
    ("--total-timesteps 2047", "at least one rollout of 2048 steps"),
    ("--obs-norm-steps 1", "at least 2"),
    ("--torch-threads -1", "at least 0"),
    ("--pfo-layers all --pfo-on features", "do not exist"),
    ("--capture-video", "--eval-episodes"),
    ("--frame-skip 2", "--frame-skip"),
]
WRONG_SEEDS = [
    ("--seeds 1 1", "must be different numbers"),
    ("--seeds -1", "--seeds"),
    ("--seeds 3000000000", "at most 2147483647"),
    ("--seeds x", "--seeds"),
    ("--seed 9 --seeds 1 2", "--seed 9: must not go with --seeds"),
]


@pytest.mark.parametrize("flags, said", WRONG)
@pytest.mark.parametrize("seeds", [[], SEVERAL])
def test_bad_input_is_refused(monkeypatch, capsys, seeds, flags, said):
    message = refusal(monkeypatch, capsys, "ppo_mujoco", [*flags.split(), *seeds])
    assert said in message and flags.split()[0] in message


@pytest.mark.parametrize("flags, said", WRONG_SEEDS)
def test_bad_seeds_are_refused(monkeypatch, capsys, flags, said):
    assert said in refusal(monkeypatch, capsys, "ppo_mujoco", flags.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seeds", [[], SEVERAL])
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--torch-deterministic"]])
def test_runs_on_cuda(tmp_path, seeds, flags):
    _, run = run_script("ppo_mujoco", tmp_path, *TINY, *seeds, "--device", "cuda", *flags)
    assert load(run / "checkpoints" / "640.pt")["global_step"] == 640


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an MPS device")
@pytest.mark.parametrize("seeds", [[], SEVERAL])
def test_runs_on_mps(tmp_path, seeds):
    _, run = run_script("ppo_mujoco", tmp_path, *TINY, *seeds, "--device", "mps")
    assert load(run / "checkpoints" / "640.pt")["global_step"] == 640


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [[], SEVERAL])
def test_compiled_run(seeds, tmp_path):
    """The whole script compiled: the losses of its last minibatch are those of the plain run."""
    try:
        script.check_args(script.Args(compile=True))
    except SystemExit:
        pytest.skip("no C++ compiler here")
    last = []
    for kind, flags in (("plain", []), ("compiled", ["--compile"])):
        (tmp_path / kind).mkdir()
        _, run = run_script("ppo_mujoco", tmp_path / kind, *TINY[:-1], "256", *flags, *seeds)
        last.append([scalars_of(run)[f"losses/last_minibatch/{x}"][0][1] for x in ("policy_loss", "value_loss")])
    assert last[1] == pytest.approx(last[0], rel=1e-3, abs=1e-4)
