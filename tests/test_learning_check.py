"""The two implementations that are compared play the same games, and what is reported of them is what they scored."""

import math
import subprocess
import sys
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import pytest
import torch
import tyro
from scipy import stats
from test_benchmark import program

import ppo_atari
from benchmark import learning_check

ROOT = Path(__file__).resolve().parent.parent
STEPS = {"Breakout-v5": 400, "Seaquest-v5": 400, "Boxing-v5": 100}


def our_args(env_id, *flags):
    return tyro.cli(ppo_atari.Args, args=["--env-id", env_id, *learning_check.CLASSIC.split(), *flags])


def ale_game(env_id, sticky):
    gymnasium.register_envs(ale_py)
    settings = {"frameskip": 1, "repeat_action_probability": sticky, "obs_type": "grayscale"}
    return gymnasium.make(f"ALE/{env_id}", disable_env_checker=True, **settings)


@pytest.mark.parametrize("env_id", STEPS)
def test_both_environments_give_the_same_frames_rewards_and_ends(env_id):
    """Without sticky actions and no-ops both are deterministic, through lost lives and new games."""
    pytest.importorskip("cv2")
    args = our_args(env_id, "--repeat-action-probability", "0", "--noop-max", "1")
    ours = ppo_atari.make_envs(args, 1, [3], episodic_life=True, reward_clip=True)
    theirs = learning_check.Classic(ale_game(env_id, 0.0), noop_max=1)
    rng, one = np.random.default_rng(0), np.zeros(1, dtype=np.int32)
    seen, (other, _) = ours.reset()[0], theirs.reset(seed=0)
    np.testing.assert_array_equal(seen[0].transpose(1, 2, 0), other)
    lives = games = 0
    for _ in range(STEPS[env_id]):
        action = rng.integers(ours.action_space.n)
        seen, reward, terminated, truncated, info = ours.step(np.array([action]))
        other, their_reward, done, their_truncated, _ = theirs.step(action)
        assert (reward[0], terminated[0] | truncated[0]) == (their_reward, done) and not their_truncated
        if done:  # the frame of such a step reaches no loss, and may differ
            games, lives = games + int(info["terminated"][0]), lives + 1
            seen, other = ours.step(one, one)[0], theirs.reset()[0]
        np.testing.assert_array_equal(seen[0].transpose(1, 2, 0), other)
    assert env_id == "Boxing-v5" or (lives > games > 0)


def test_actions_stick_frame_by_frame_in_both():
    """All four frames of a step keep the old action in 0.25^4 of the cases; a whole step would in a quarter of them."""
    pytest.importorskip("cv2")
    num, paddle = 60, 72  # its place in the game's RAM
    ours = learning_check.make_our_envs("Breakout-v5", num, list(range(num)))
    ours.reset()
    for _ in range(3):
        before = ours.step(np.zeros(num, dtype=np.int64))[4]["ram"][:, paddle].astype(int)
    moved = ours.step(np.full(num, 2))[4]["ram"][:, paddle] - before
    theirs = learning_check.Classic(ale_game("Breakout-v5", learning_check.STICKY))
    their_moved = []
    for i in range(num):
        theirs.over = True
        theirs.reset(seed=None if i else 0)
        for _ in range(3):
            theirs.step(0)
        before = int(theirs.unwrapped.ale.getRAM()[paddle])
        theirs.step(2)
        their_moved.append(int(theirs.unwrapped.ale.getRAM()[paddle]) - before)
    for moves in (moved, np.array(their_moved)):
        assert (moves == 0).mean() < 0.1 and len(np.unique(moves)) > 2


def test_no_ops_begin_every_life():
    """0 to 29 frames of them, then one of FIRE; by the mean of 100, within four standard errors of uniform."""
    pytest.importorskip("cv2")
    theirs = learning_check.Classic(ale_game("Breakout-v5", 0.0))
    theirs.reset(seed=0)
    numbers = []
    for _ in range(100):
        theirs.over = False  # a life is lost, the game isn't
        before = theirs.unwrapped.ale.getFrameNumber()
        theirs.reset()
        numbers.append(theirs.unwrapped.ale.getFrameNumber() - before)
    assert min(numbers) == 1 and max(numbers) == 30 and abs(np.mean(numbers) - 15.5) < 4 * 8.7 / 10


def test_both_implementations_have_the_same_advantages_and_gradients():
    """Of a rollout, by the same weights; but for the deviation of the advantages, which is biased or not."""
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("cv2")
    from stable_baselines3.common.logger import Logger

    torch.manual_seed(0)
    args = our_args("Breakout-v5")
    ppo_atari.check_args(args)
    agent = ppo_atari.Agent(4, args)
    model = learning_check.make_their_model(learning_check.make_their_envs("Breakout-v5", 8), 1, 10)
    model.batch_size, model.n_epochs, policy = 1024, 1, model.policy
    theirs = [policy.features_extractor.cnn[i] for i in (0, 2, 4)] + [policy.features_extractor.linear[0]]
    theirs += [policy.action_net, policy.value_net]
    layers = list(zip(theirs, [*agent.trunk.hidden, agent.actor, agent.critic], strict=True))
    for their_layer, layer in layers:
        their_layer.load_state_dict(layer.state_dict())

    obs = torch.randint(256, (129, 8, 84, 84, 4), dtype=torch.uint8)
    rewards, dones = torch.randint(2, (128, 8)).float(), (torch.rand(128, 8) < 0.1).float()
    with torch.no_grad():
        actor, critic = agent(obs.flatten(0, 1))
    logits, values = actor.output.view(129, 8, 4), critic.output.view(129, 8)
    actions = torch.randint(4, (128, 8))
    logprobs = logits[:-1].log_softmax(2).gather(2, actions[..., None])[..., 0]
    buffer, started = model.rollout_buffer, np.ones(8)
    for t in range(128):
        images = obs[t].permute(0, 3, 1, 2).numpy()
        buffer.add(images, actions[t, :, None].numpy(), rewards[t].numpy(), started, values[t, :, None], logprobs[t])
        started = dones[t].numpy()
    buffer.compute_returns_and_advantage(values[-1], started)
    advantages, returns = ppo_atari.gae(rewards, values[:-1], values[1:], dones, args.gamma, args.gae_lambda)
    np.testing.assert_allclose(buffer.advantages, advantages, rtol=1e-4, atol=1e-5)

    model.set_logger(Logger(None, []))
    model.train()
    batch = {"obs": obs[:-1], "logits": logits[:-1], "actions": actions, "values": values[:-1], "returns": returns}
    batch = {name: x.flatten(0, 1) for name, x in {**batch, "advantages": advantages}.items()}
    kl_coef = torch.tensor(0.0)
    optimizers, mb_inds = ppo_atari.make_optimizers(agent, args), torch.arange(len(batch["obs"]))
    ppo_atari.update(agent, ppo_atari.losses, optimizers, batch, mb_inds, kl_coef, args)
    for their_layer, layer in layers:
        error = (their_layer.weight.grad - layer.weight.grad).norm() / layer.weight.grad.norm()
        assert error < 5e-3


def write_runs(folder, seeds=(1, 2, 3)):
    """CSVs of made-up runs: random actions score 2, ppo_atari.py 10 + seed, Stable-Baselines3 8 + seed in the end."""
    args = learning_check.Args(output=folder)
    for name, score in (("random", 2), ("ppo_atari.py", 10), ("Stable-Baselines3", 8)):
        for seed in (0,) if name == "random" else seeds:
            games = [(800 * i, 0.0 if name != "random" and i < 50 else score + seed) for i in range(150)]
            path = learning_check.path_of(args, name, seed)
            learning_check.write_games(path, games, learning_check.settings_of(args, name))


def test_report_of_what_is_there(tmp_path):
    write_runs(tmp_path)
    learning_check.path_of(learning_check.Args(output=tmp_path), "Stable-Baselines3", 3).unlink()
    out = program("learning_check", "--report", "--output", tmp_path)
    assert out.startswith("# Breakout-v5, 4000000 frames, 5 of 6 runs\n")
    assert "| ppo_atari.py | 2 | 150 | 6.00 | 12.00 | 12.00 to 12.00 | 12 | – |" in out
    half = 12.706 * 0.5  # Student's t of one degree of freedom, times the standard error of 9 and 10
    assert f"- Stable-Baselines3: 9.50, 95 % interval {9.5 - half:.2f} to {9.5 + half:.2f} over runs" in out
    assert "- ratio of the scores above random actions: 1.33, 95 % interval " in out
    assert (tmp_path / "Breakout-v5.md").read_text(encoding="utf-8") == out
    assert (tmp_path / "Breakout-v5.png").read_bytes().startswith(b"\x89PNG")


def test_ratio_and_its_interval():
    """Geometric means, and Welch's interval from its textbook formula."""
    ours, theirs, random = np.array([31.0, 26.0, 40.0]), np.array([22.0, 19.0, 30.0]), 1.0
    line = learning_check.ratio_line(ours, theirs, random)
    ratio, low, high = (float(x) for x in line.replace(",", "").split() if x[0].isdigit() and "." in x)
    x, y = np.log(ours - random), np.log(theirs - random)
    errors = x.var(ddof=1) / 3, y.var(ddof=1) / 3
    freedom = sum(errors) ** 2 / sum(error**2 / 2 for error in errors)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(errors))
    expected = np.exp(x.mean() - y.mean() + np.array([0, -half, half]))
    assert (ratio, low, high) == pytest.approx(expected, abs=0.005)
    assert "without an interval" in learning_check.ratio_line(ours[:1], theirs, random)
    for a, b, name in (
        (ours, np.array([0.5, 9.0]), "Stable-Baselines3"),
        (np.array([1.0, 9.0]), theirs, "ppo_atari.py"),
    ):
        assert f"none, since {name} has a run" in learning_check.ratio_line(a, b, random)


@pytest.mark.parametrize(
    "flag, values",
    [
        ("seeds", {"seeds": (1, 1)}),
        ("seeds", {"seeds": (-1,)}),
        ("env-id", {"env_id": "Nothing-v5"}),
        ("total-timesteps", {"total_timesteps": 100}),
        ("report", {"report": True, "check_environments": True}),
    ],
)
def test_bad_input_costs_a_line(flag, values, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        learning_check.check_args(learning_check.Args(output=tmp_path / "new", **values))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: --{flag}") and said.count("\n") == 1


def test_runs_of_other_settings_are_refused(tmp_path):
    write_runs(tmp_path, seeds=(1,))
    said = program("learning_check", "--report", "--total-timesteps", "8192", "--output", tmp_path, code=2)
    assert "is of other settings (ppo_atari.py, Breakout-v5, 4000000 frames" in said and said.count("\n") == 1


@pytest.mark.slow
def test_one_run_goes_on_where_it_was_stopped(tmp_path):
    write_runs(tmp_path, seeds=())
    folder = tmp_path / "runs" / "Breakout-v5__ppo_atari__1"
    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "ppo_atari.py"), "--env-id", "Breakout-v5", *learning_check.CLASSIC.split()]
    command += ["--total-timesteps", "4096", "--diagnostics-interval", "100"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    flags = ["--only", "ppo_atari.py", "--seeds", "1", "--total-timesteps", "8192", "--output", tmp_path]
    out = program("learning_check", *flags)
    assert "resumed from latest.pt at 4,096 steps" in out and "# Breakout-v5, 8192 frames, 1 of 2 runs" in out
    frames, _ = np.array(learning_check.read_games(tmp_path / "Breakout-v5__ppo_atari__1.csv")[1]).T
    assert len(frames) and frames.max() > 4096 and (frames <= 8192).all()
    args = learning_check.Args(total_timesteps=8192, output=tmp_path)
    learning_check.train(args, "ppo_atari.py", 1)  # which is done: it leaves no folder of a new run
    assert not folder.exists()


def test_stable_baselines3_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("cv2")
    monkeypatch.setattr(learning_check, "SAVE_EVERY", 1)
    args = learning_check.Args(total_timesteps=8192)
    first = learning_check.train_stable_baselines3(args, 1, tmp_path)
    saved = learning_check.read_games(tmp_path / "games.csv")[1]  # after the first of two rollouts
    second = learning_check.train_stable_baselines3(args, 1, tmp_path)
    assert "model.zip: goes on at 4,096 frames" in capsys.readouterr().out
    assert saved == [game for game in first if game[0] <= 4096] == [game for game in second if game[0] <= 4096]
    assert all(4096 < frames <= 8192 for frames, _ in second[len(saved) :])


def test_environments_are_compared(tmp_path):
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("cv2")
    flags = ["--env-id", "Boxing-v5", "--check-environments", "--check-steps", "60", "--output", tmp_path]
    out = program("learning_check", *flags)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| random", "| network"))]
    assert {row[1] for row in rows} >= {"mean of a frame", "steps of a life", "share of action 17"}
    assert (tmp_path / "Boxing-v5_environments.md").is_file() and not list(tmp_path.glob("*.csv"))
