"""Does ppo_atari.py learn as fast as an implementation that nobody here wrote?

    pip install stable-baselines3==2.9.2 opencv-python-headless==5.0.0.93
    python -m benchmark.learning_check --env-id Breakout-v5 --check-environments
    python -m benchmark.learning_check --env-id Breakout-v5 --only ppo_atari.py --seeds 1
    python -m benchmark.learning_check --env-id Breakout-v5
    python -m benchmark.learning_check --env-id Breakout-v5 --report

Trains ppo_atari.py in CleanRL's classic setting, but with sticky actions and without clipping values, and
Stable-Baselines3's PPO with equal hyperparameters, some seeds each. Of clipped values the two make different things:
CleanRL takes the larger of two losses, Stable-Baselines3 the clipped one, which has no gradient where a value has moved
further. A run's games are a CSV; a run whose CSV is there is not repeated, and one that was stopped goes on. What is
there is drawn and tabulated after each run: means of the last 100 games, and the ratio of what the two have learnt,
which is their score above that of random actions.

Stable-Baselines3 plays on ALE by way of gymnasium, whose games `Classic` cuts into episodes and frames as envpool does:
--check-environments compares the two. What is left of differences: its advantages are divided by the unbiased
deviation, which is 0.2 % more.
"""

import csv
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import matplotlib
import numpy as np
import torch
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari
from benchmark.curves import bootstrap_interval, moving_average
from benchmark.logs import writing
from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parent.parent
STICKY, SKIP, NOOPS = 0.25, 4, 30
CLASSIC = f"--frame-skip {SKIP} --repeat-action-probability {STICKY} --noop-max {NOOPS} --fire-reset --episodic-life "
CLASSIC += "--layer-init orthogonal --anneal-lr --adam-eps 1e-5 --vf-coef 0.5"
IMPLEMENTATIONS = ("ppo_atari.py", "Stable-Baselines3")

LAST = 100  # games
RANDOM_GAMES = 100
SAVE_EVERY = 50  # rollouts, of Stable-Baselines3


@dataclass
class Args:
    env_id: str = "Breakout-v5"
    """an Atari game"""
    total_timesteps: int = 4_000_000
    """length of each run in emulator frames, floored to whole rollouts"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run of either implementation for each"""
    only: Literal["ppo_atari.py", "Stable-Baselines3"] | None = None
    """train this implementation alone"""
    report: bool = False
    """train nothing: write the table and the plot of the runs whose CSV is there"""
    check_environments: bool = False
    """train nothing: compare the two implementations' environments, and write a table of that"""
    check_steps: int = 4_000
    """agent steps of each of 8 environments in that comparison"""
    output: Path = Path("benchmark/results/learning")
    """folder of the CSVs, the plot and the tables; unfinished runs are in runs/ in it, of up to 0.9 GB each"""


class Classic(gymnasium.Wrapper):
    """An ALE game, of single grey frames, as the environment of ppo_atari.py in CleanRL's classic setting is.

    Observations are (84, 84, 4) uint8, the maximum over an action's last two frames resized by area, rewards are signs.
    A lost life ends an episode. An episode begins with 0 to ``noop_max`` - 1 frames of no-op and one of FIRE, after a
    lost life too, or with 1 to ``noop_max`` no-ops in games without FIRE. (Stable-Baselines3's own wrapper presses
    FIRE and then a direction for a whole step each, and gives no-ops at the beginning of a game alone.)
    """

    def __init__(self, env, noop_max=NOOPS):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.fire = "FIRE" in env.unwrapped.get_action_meanings()
        self.noop_max, self.over, self.lives = noop_max, True, 0

    def see(self, screen, everywhere=False):
        """Push a screen (210, 160) onto the stack, or fill all of it: a new game has no earlier frames."""
        import cv2

        frame = cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)[..., None]
        self.stack = np.repeat(frame, 4, 2) if everywhere else np.concatenate((self.stack[..., 1:], frame), 2)
        self.lives = self.unwrapped.ale.lives()
        return self.stack

    def reset(self, **kwargs):
        begun = self.over
        if begun:
            screen, _ = self.env.reset(**kwargs)
        noops = int(self.unwrapped.np_random.integers(self.noop_max)) + (not self.fire)
        for action in [0] * noops + [1] * self.fire:
            screen, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                (screen, _), begun = self.env.reset(), True
        self.over = False
        return self.see(screen, everywhere=begun), {}

    def step(self, action):
        total, screens = 0.0, []
        for _ in range(SKIP):
            screen, reward, terminated, truncated, info = self.env.step(action)
            screens.append(screen)
            total += reward
            self.over = terminated or truncated  # a time limit is a termination, as in ppo_atari.py
            if self.over:
                break
        lives = self.lives
        obs = self.see(np.max(screens[-2:], 0))
        return obs, float(np.sign(total)), self.over or 0 < self.lives < lives, False, info


def make_our_envs(env_id, num_envs, seeds):
    """envpool's games as ppo_atari.py plays them in the classic setting."""
    args = tyro.cli(ppo_atari.Args, args=["--env-id", env_id, *CLASSIC.split()])
    return ppo_atari.make_envs(args, num_envs, seeds, episodic_life=True, reward_clip=True)


def make_their_envs(env_id, num_envs):
    """The same for Stable-Baselines3. Its ``seed`` method must be called before the first reset."""
    import ale_py
    from stable_baselines3.common.env_util import make_vec_env

    gymnasium.register_envs(ale_py)
    settings = {"frameskip": 1, "repeat_action_probability": STICKY, "obs_type": "grayscale"}
    settings |= {"disable_env_checker": True}
    return make_vec_env(f"ALE/{env_id}", num_envs, wrapper_class=Classic, env_kwargs=settings)


def make_their_model(envs, seed, rollouts):
    """Stable-Baselines3's PPO with the hyperparameters of the classic setting, annealed over ``rollouts``."""
    from stable_baselines3 import PPO

    return PPO(
        "CnnPolicy",
        envs,
        learning_rate=lambda left: 2.5e-4 * (left + 1 / rollouts),  # which is asked after a rollout
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.1,
        clip_range_vf=None,
        ent_coef=0.01,
        vf_coef=0.25,  # of the mean squared error, of which ppo_atari.py takes the half
        max_grad_norm=0.5,
        policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}},
        seed=seed,
        device="cpu",
    )


# Runs


def path_of(args, name, seed):
    return args.output / f"{args.env_id}__{name.split('.')[0]}__{seed}.csv"


def train_ours(args, seed, folder):
    """(frames, return) of the games of a run of ppo_atari.py in the folder, where one that was stopped goes on."""
    started = sorted(path.parent.parent for path in folder.glob("runs/*/checkpoints/latest.pt"))
    command = [sys.executable, str(ROOT / "ppo_atari.py"), "--env-id", args.env_id, "--seed", str(seed)]
    command += [*CLASSIC.split(), "--total-timesteps", str(args.total_timesteps), "--diagnostics-interval", "100"]
    command += ["--resume", str(started[-1].relative_to(folder))] if started else []
    if subprocess.run(command, cwd=folder).returncode:
        fail(f"ppo_atari.py --seed {seed}: failed, as said above; the same command goes on with {folder}", code=1)
    run = sorted(folder.glob("runs/*"))[-1]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]


def train_stable_baselines3(args, seed, folder):
    """The same of Stable-Baselines3's PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    saved, list_of_games = folder / "model.zip", folder / "games.csv"

    class Games(BaseCallback):
        """Keeps the returns of whole games, which the monitor below the wrapper reports, and saves now and then."""

        def __init__(self, games):
            super().__init__()
            self.games, self.rollouts, self.start = games, 0, None

        def _on_rollout_start(self):
            self.start = self.start or (time.time(), self.num_timesteps)
            if self.rollouts and self.rollouts % SAVE_EVERY == 0:
                write_games(list_of_games, self.games, "")
                self.model.save(folder / "unfinished.zip")
                (folder / "unfinished.zip").rename(saved)
                speed = (self.num_timesteps - self.start[1]) / (time.time() - self.start[0])
                last = np.mean([score for _, score in self.games[-LAST:]] or [math.nan])
                print(
                    f"{SKIP * self.num_timesteps:,} frames, {SKIP * speed:.0f} a second, return {last:.2f}", flush=True
                )
            self.rollouts += 1

        def _on_step(self):
            ended = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            self.games += [(SKIP * self.num_timesteps, float(score)) for score in ended]
            return True

    rollouts = args.total_timesteps // (SKIP * 1024)
    envs = make_their_envs(args.env_id, 8)
    games = []
    if saved.is_file():
        model = PPO.load(saved, envs, device="cpu")
        model.set_random_seed(1000 * seed + model.num_timesteps)
        games = [game for game in read_games(list_of_games)[1] if game[0] <= SKIP * model.num_timesteps]
        print(f"{saved}: goes on at {SKIP * model.num_timesteps:,} frames", flush=True)
    else:
        model = make_their_model(envs, seed, rollouts)
    model.policy.to(memory_format=torch.channels_last)  # faster; it changes the rounding alone
    # The environments get consecutive seeds; those of two runs must have none in common.
    envs.seed(1_000_003 * seed + model.num_timesteps)
    callback = Games(games)
    model.learn(1024 * rollouts - model.num_timesteps, callback=callback, reset_num_timesteps=False)
    return callback.games


def random_games(args):
    """(frames, return) of games of uniformly random actions, equally many of each of some environments."""
    rng, num_envs = np.random.default_rng(0), 50
    player = Player(OurGames(args.env_id, num_envs, rng.integers(2**31, size=num_envs).tolist()), rng)
    games = [[] for _ in range(num_envs)]
    while min(map(len, games)) < RANDOM_GAMES // num_envs:  # the first to end alone would be the short ones
        for game in player.step():
            games[game.env].append((SKIP * game.length, game.score))
    return [game for of_env in games for game in of_env[: RANDOM_GAMES // num_envs]]


def write_games(path, games, settings):
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")  # another process may write the random games as well
    with writing(path):
        with open(unfinished, "w", newline="") as file:
            file.write(f"# {settings}\n")
            csv.writer(file).writerows([("frames", "return"), *((int(step), f"{score:g}") for step, score in games)])
        unfinished.rename(path)


def read_games(path):
    """The line of settings in a CSV of a run, and its games, [(frames, return)]."""
    with open(path, newline="") as file:
        settings = file.readline().removeprefix("# ").strip()
        rows = list(csv.reader(file))[1:]
    return settings, [(int(step), float(score)) for step, score in rows]


def settings_of(args, name):
    """What must be the same in the runs of one table."""
    frames = f"{args.total_timesteps} frames" if name in IMPLEMENTATIONS else f"{RANDOM_GAMES} games"
    return f"{name}, {args.env_id}, {frames}, sticky actions {STICKY}, values not clipped"


TRAINERS = dict(zip(IMPLEMENTATIONS, (train_ours, train_stable_baselines3), strict=True))


def train(args, name, seed):
    """Write the CSV of a run, unless it is there."""
    path = path_of(args, name, seed)
    if path.is_file():
        return
    folder = (args.output / "runs" / path.stem).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    games = TRAINERS[name](args, seed, folder)
    write_games(path, games, settings_of(args, name))
    print(f"{path}: {len(games)} games, {time.time() - start:.0f} s", flush=True)
    shutil.rmtree(folder)


# Report


def read_run(args, name, seed):
    """Frames and returns of a finished run, or None."""
    path = path_of(args, name, seed)
    if not path.is_file():
        return None
    settings, games = read_games(path)
    if settings != settings_of(args, name):
        fail(f"{path}: is of other settings ({settings}) than asked for; another --output keeps them apart"[:300])
    if not games:
        fail(f"{path}: has no game; --total-timesteps {args.total_timesteps} is too short for {args.env_id}")
    return np.array(games).T


def report(args):
    """Write the table and the plot of the runs that are there; returns the table's text."""
    rng = np.random.default_rng(0)
    random = read_run(args, "random", 0)[1]
    runs = {name: {} for name in IMPLEMENTATIONS}
    for name, seed in itertools.product(IMPLEMENTATIONS, args.seeds):
        if (run := read_run(args, name, seed)) is not None:
            runs[name][seed] = run
    found, wanted = sum(map(len, runs.values())), len(IMPLEMENTATIONS) * len(args.seeds)
    low, high = bootstrap_interval(random, rng)
    lines = [
        f"# {args.env_id}, {args.total_timesteps} frames, {found} of {wanted} runs\n",
        f"`python -m benchmark.learning_check --env-id {args.env_id} --total-timesteps {args.total_timesteps} "
        f"--seeds {' '.join(map(str, args.seeds))}`\n",
        f"Sticky actions {STICKY}, frame skip {SKIP}. Random actions return {random.mean():.2f} "
        f"({low:.2f} to {high:.2f}, {len(random)} games).\n",
        f"| implementation | seed | games | mean of the first {LAST} | of the last {LAST} | 95 % interval over games "
        "| median | mean of the last tenth of the frames |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, of_seed in runs.items():
        for seed, (frames, returns) in of_seed.items():
            late = returns[frames > 0.9 * args.total_timesteps]
            low, high = bootstrap_interval(returns[-LAST:], rng)
            lines.append(
                f"| {name} | {seed} | {len(returns)} | {returns[:LAST].mean():.2f} | {returns[-LAST:].mean():.2f} "
                f"| {low:.2f} to {high:.2f} | {np.median(returns[-LAST:]):.0f} "
                f"| {f'{late.mean():.2f}, {len(late)} games' if len(late) else '–'} |"
            )
    lines.append("")
    means = {name: np.array([returns[-LAST:].mean() for _, returns in of.values()]) for name, of in runs.items() if of}
    for name, of_runs in means.items():
        line = f"- {name}: {of_runs.mean():.2f}"
        if len(of_runs) > 1:
            low, high = stats.ttest_1samp(of_runs, 0).confidence_interval()
            line += f", 95 % interval {low:.2f} to {high:.2f} over runs"
        lines.append(line if len(of_runs) > 1 else f"{line}, one run")
    if len(means) == 2:
        lines.append(f"- {ratio_line(*means.values(), random.mean())}")
    text = "\n".join(lines) + "\n"
    with writing(args.output / f"{args.env_id}.md") as path:
        path.write_text(text, encoding="utf-8")
    draw(args, runs, random)
    return text


def ratio_line(ours, theirs, random):
    """The ratio of two scores above random play, from runs' returns: of geometric means, Welch's interval over runs.

    A bootstrap over three runs would be too narrow.
    """
    for name, of_runs in zip(IMPLEMENTATIONS, (ours, theirs), strict=True):
        if of_runs.min() <= random:
            return f"ratio: none, since {name} has a run that is not above random actions"
    ours, theirs = np.log(ours - random), np.log(theirs - random)
    line = f"ratio of the scores above random actions: {np.exp(ours.mean() - theirs.mean()):.2f}"
    if min(len(ours), len(theirs)) < 2:
        return line + ", without an interval, which takes two runs each"
    low, high = np.exp(stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval())
    return line + f", 95 % interval {low:.2f} to {high:.2f} over runs"


def draw(args, runs, random):
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, of_seed), (colour, style) in zip(runs.items(), (("#0072B2", "-"), ("#D55E00", "--")), strict=True):
        for i, (frames, returns) in enumerate(of_seed.values()):
            label = None if i else f"{name}, {len(of_seed)} run{'s' * (len(of_seed) > 1)}"
            axis.plot(frames, moving_average(returns, LAST), color=colour, linestyle=style, label=label)
    axis.axhline(random.mean(), color="grey", linestyle=":", label="random actions")
    axis.set(xlabel="environment steps (frames)", ylabel=f"return, mean of {LAST} games")
    axis.set_title(f"{args.env_id}, CleanRL's classic setting with sticky actions, values not clipped")
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.grid(alpha=0.3)
    axis.legend()
    with writing(args.output / f"{args.env_id}.png") as path:
        figure.savefig(path, dpi=110)
    plt.close(figure)


# Environments


@dataclass
class Game:
    """A game that ended."""

    env: int
    score: float  # raw
    length: int  # agent steps


class OurGames:
    """envpool's games, stepped as ppo_atari.py's rollout steps them."""

    def __init__(self, env_id, num_envs, seeds):
        self.envs = make_our_envs(env_id, num_envs, seeds)
        self.num_actions, self.num_envs = int(self.envs.action_space.n), num_envs
        self.scores = np.zeros(num_envs)

    def reset(self):
        return self.envs.reset()[0].transpose(0, 2, 3, 1)

    def step(self, actions):
        """Observations (N, 84, 84, 4), rewards, whether episodes ended, and {environment: score of its ended game}."""
        obs, rewards, terminated, truncated, info = self.envs.step(actions)
        done = terminated | truncated
        self.scores += info["reward"]
        over = np.flatnonzero(info["terminated"].astype(bool) | truncated)
        scores = {int(i): float(self.scores[i]) for i in over}
        self.scores[over] = 0
        if done.any():
            ended = np.flatnonzero(done).astype(np.int32)
            obs[ended] = self.envs.step(np.zeros_like(ended), ended)[0]
        return obs.transpose(0, 2, 3, 1), rewards, done, scores


class TheirGames:
    """ALE's games, as Stable-Baselines3 steps them."""

    def __init__(self, env_id, num_envs, seed):
        self.envs = make_their_envs(env_id, num_envs)
        self.envs.seed(seed)
        self.num_actions, self.num_envs = int(self.envs.action_space.n), num_envs

    def reset(self):
        return self.envs.reset()

    def step(self, actions):
        obs, rewards, done, infos = self.envs.step(actions)
        scores = {i: float(info["episode"]["r"]) for i, info in enumerate(infos) if "episode" in info}
        return obs, rewards, done, scores


class Player:
    """Plays games by ``policy(obs, rng)``, or uniformly random actions, and counts what two environments must share."""

    def __init__(self, games, rng, policy=None):
        self.games, self.rng, self.policy = games, rng, policy
        self.obs = games.reset()
        self.game_lengths, self.life_lengths = np.zeros((2, games.num_envs), dtype=int)
        self.seen = {name: [] for name in ("return of a game", "steps of a game", "steps of a life")}
        self.seen |= {name: [] for name in ("reward of a step", "mean of a frame", "deviation of a frame")}
        self.seen |= {name: [] for name in ("mean of a first frame", "change between frames")}
        self.seen |= {f"share of action {i}": [] for i in range(games.num_actions)} if policy else {}

    def step(self, look=False):
        """One step of all environments; returns the games that ended in it."""
        n = self.games.num_envs
        actions = self.policy(self.obs, self.rng) if self.policy else self.rng.integers(self.games.num_actions, size=n)
        self.obs, rewards, done, scores = self.games.step(actions)
        self.game_lengths += 1
        self.life_lengths += 1
        ended = [Game(i, score, int(self.game_lengths[i])) for i, score in scores.items()]
        self.seen["return of a game"] += [game.score for game in ended]
        self.seen["steps of a game"] += [game.length for game in ended]
        self.seen["steps of a life"] += self.life_lengths[done].tolist()
        self.game_lengths[list(scores)] = 0
        self.life_lengths[done] = 0
        if look:
            frames = self.obs.astype(np.float32)
            self.seen["reward of a step"].append(rewards.mean())
            self.seen["mean of a frame"].append(frames[..., -1].mean())
            self.seen["deviation of a frame"].append(frames[..., -1].std((1, 2)).mean())
            self.seen["mean of a first frame"] += frames[done][..., -1].mean((1, 2)).tolist()
            self.seen["change between frames"].append(np.abs(frames[..., -1] - frames[..., -2]).mean())
            for i in range(self.games.num_actions if self.policy else 0):
                self.seen[f"share of action {i}"].append((actions == i).mean())
        return ended


def blocks(values, length=50):
    """Means of successive blocks of ``values``, which are more nearly independent than the values."""
    values = np.array(values, dtype=float)
    count = max(len(values) // length, 1)
    return np.array([block.mean() for block in np.array_split(values, count)])


def sharp_policy(num_actions):
    """Actions of ppo_atari.py's network, its output layer made a hundred times larger to have preferences untrained."""
    torch.manual_seed(0)
    args = tyro.cli(ppo_atari.Args, args=CLASSIC.split())
    agent = ppo_atari.Agent(num_actions, args)
    agent.actor.weight.data *= 100

    @torch.no_grad()
    def act(obs, rng):
        logits = agent.policy(torch.from_numpy(np.ascontiguousarray(obs))).output
        noise = torch.from_numpy(rng.standard_exponential(logits.shape)).float()
        return ppo_atari.sample(logits, noise).numpy()

    return act


def check_environments(args):
    """A table of what random actions and one fixed network meet in the two environments; returns its text."""
    lines = [
        f"# {args.env_id}, the two implementations' environments\n",
        f"`python -m benchmark.learning_check --env-id {args.env_id} --check-environments "
        f"--check-steps {args.check_steps}`\n",
        "Means, with standard errors over games and lives, and over blocks of 50 steps.\n",
        "| policy | measure | envpool (ppo_atari.py) | ALE (Stable-Baselines3) | difference in standard errors |",
        "|---|---|---|---|---|",
    ]
    for policy in ("random", "network"):
        seen = []
        for k, games in enumerate((OurGames(args.env_id, 8, list(range(8))), TheirGames(args.env_id, 8, 1000))):
            player = Player(
                games, np.random.default_rng(k), sharp_policy(games.num_actions) if policy != "random" else None
            )
            for _ in range(args.check_steps):
                player.step(look=True)
            seen.append(player.seen)
        for name in seen[0]:
            samples = [np.array(x[name], float) if name.endswith(("game", "life")) else blocks(x[name]) for x in seen]
            if min(map(len, samples)) < 2:
                lines.append(f"| {policy} | {name} | too few | too few | |")
                continue
            errors = [sample.std(ddof=1) / math.sqrt(len(sample)) for sample in samples]
            cells = [f"{x.mean():.4g} ± {error:.2g}" for x, error in zip(samples, errors, strict=True)]
            error = math.hypot(*errors)
            apart = (samples[0].mean() - samples[1].mean()) / error if error else 0.0
            lines.append(f"| {policy} | {name} | {cells[0]} | {cells[1]} | {apart:.1f} |")
    text = "\n".join(lines) + "\n"
    with writing(args.output / f"{args.env_id}_environments.md") as path:
        path.write_text(text, encoding="utf-8")
    return text


def check_args(args):
    args.env_id = args.env_id.removeprefix("ALE/")
    games = ppo_atari.Args(env_id=args.env_id)
    ppo_atari.check_args(games)
    args.env_id = games.env_id
    check_range(args, "total_timesteps", low=1024 * SKIP, high=10**12)
    check_range(args, "check_steps", low=1, high=10**9)
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        fail(f"--seeds {' '.join(map(str, args.seeds))}: must name at least one seed, each once")
    if wrong := [seed for seed in args.seeds if not 0 <= seed < 2000]:
        fail(f"--seeds {wrong[0]}: must be at least 0 and below 2000")
    if args.report and args.check_environments:
        fail("--report: must not go with --check-environments")
    check_folder(args.output)
    if not args.report and args.only != "ppo_atari.py":
        try:
            import cv2  # noqa: F401
            import stable_baselines3  # noqa: F401
        except ImportError as error:
            fail(
                f"{error.name} is not installed; pip install stable-baselines3==2.9.2 opencv-python-headless==5.0.0.93"
            )


if __name__ == "__main__":
    args = parse_args(Args)
    check_args(args)
    make_folder(args.output)
    if args.check_environments:
        print(check_environments(args), end="")
        raise SystemExit
    if not path_of(args, "random", 0).is_file():
        write_games(path_of(args, "random", 0), random_games(args), settings_of(args, "random"))
    if not args.report:
        for seed in args.seeds:
            for name in [args.only] if args.only else IMPLEMENTATIONS:
                if not path_of(args, name, seed).is_file():
                    train(args, name, seed)
                    report(args)
    print(report(args), end="")
