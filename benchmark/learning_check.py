"""Does ppo_atari.py learn as fast as an implementation that nobody here wrote?

    pip install stable-baselines3==2.9.2 opencv-python-headless==5.0.0.93
    python -m benchmark.learning_check --env-id Breakout-v5 --total-timesteps 400000 --seeds 1 2 3

Trains ppo_atari.py in CleanRL's classic setting and Stable-Baselines3's PPO with equal hyperparameters, some seeds
each, and writes the games' returns (CSV), a plot, and a table of the means of the last 100 games. A run whose CSV is
there is not repeated. What is not equal: Stable-Baselines3 clips the value alone where ppo_atari.py, as CleanRL, takes
the larger of two losses; it resizes frames with OpenCV; and its environments are ALE's own, stepped one by one.
"""

import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.curves import bootstrap_interval, moving_average
from benchmark.logs import check_folder, make_folder
from common.arguments import check_range, fail
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parent.parent
CLASSIC = "--frame-skip 4 --repeat-action-probability 0 --noop-max 30 --fire-reset --episodic-life "
CLASSIC += "--layer-init orthogonal --anneal-lr --clip-vloss --adam-eps 1e-5 --vf-coef 0.5"

LAST = 100  # games


@dataclass
class Args:
    env_id: str = "Breakout-v5"
    """an Atari game"""
    total_timesteps: int = 400_000
    """length of each run in emulator frames"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run of either implementation for each"""
    output: Path = Path("benchmark/results/learning_check")
    """folder of the CSVs, the plot and the table"""


def train_ours(args, seed):
    """(frames, return) of the games of a run of ppo_atari.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo_atari.py"), "--env-id", args.env_id, "--seed", str(seed)]
        command += [*CLASSIC.split(), "--total-timesteps", str(args.total_timesteps), "--diagnostics-interval", "100"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (run,) = Path(folder).glob("runs/*")
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        return [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]


def train_stable_baselines3(args, seed):
    """The same of Stable-Baselines3's PPO."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Games(BaseCallback):
        """Keeps the returns of whole games, which the monitor below the wrappers reports."""

        def __init__(self):
            super().__init__()
            self.games = []

        def _on_step(self):
            ended = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            self.games += [(4 * self.num_timesteps, float(score)) for score in ended]
            return True

    gymnasium.register_envs(ale_py)
    settings = {"frameskip": 1, "repeat_action_probability": 0.0}
    envs = VecFrameStack(make_atari_env(f"ALE/{args.env_id}", n_envs=8, seed=seed, env_kwargs=settings), 4)
    model = PPO(
        "CnnPolicy",
        envs,
        learning_rate=lambda left: 2.5e-4 * left,
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.1,
        clip_range_vf=0.1,
        ent_coef=0.01,
        vf_coef=0.25,  # of the mean squared error, of which ppo_atari.py takes the half
        max_grad_norm=0.5,
        policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}},
        seed=seed,
        device="cpu",
    )
    callback = Games()
    model.learn(args.total_timesteps // 4, callback=callback)
    return callback.games


def commonest(returns):
    """The commonest return above the median and how often it stands: games that repeat each other show in it."""
    values, counts = np.unique(returns[returns > np.median(returns)], return_counts=True)
    return f"{values[counts.argmax()]:.0f}, {counts.max()} times" if len(values) else "–"


IMPLEMENTATIONS = {"ppo_atari.py": train_ours, "Stable-Baselines3": train_stable_baselines3}


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "total_timesteps", low=4096)
    check_folder(args.output)
    try:
        import cv2  # noqa: F401
        import stable_baselines3  # noqa: F401
    except ImportError as error:
        fail(f"{error.name} is not installed; pip install stable-baselines3==2.9.2 opencv-python-headless==5.0.0.93")
    make_folder(args.output)
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows, means, rng = [], {}, np.random.default_rng(0)
    styles = zip(IMPLEMENTATIONS.items(), (("#0072B2", "-"), ("#D55E00", "--")), strict=True)
    for (name, train), (colour, style) in styles:
        finals = []
        for seed in args.seeds:
            path = args.output / f"{args.env_id}__{name.split('.')[0]}__{seed}.csv"
            if not path.is_file():
                games = train(args, seed)
                unfinished = path.with_suffix(".tmp")
                with open(unfinished, "w", newline="") as file:
                    csv.writer(file).writerows([("frames", "return"), *games])
                unfinished.rename(path)
            frames, returns = np.loadtxt(path, delimiter=",", skiprows=1, unpack=True)
            low, high = bootstrap_interval(returns[-LAST:], rng)
            finals.append(returns[-LAST:].mean())
            first, median, share = returns[:LAST].mean(), np.median(returns[-LAST:]), commonest(returns[-LAST:])
            rows.append(
                f"| {name} | {seed} | {len(returns)} | {first:.2f} | {finals[-1]:.2f} | {low:.2f} to {high:.2f} "
                f"| {median:.0f} | {share} |"
            )
            label = name if seed == args.seeds[0] else None
            axis.plot(frames, moving_average(returns, LAST), color=colour, linestyle=style, label=label)
        means[name] = np.mean(finals)
    axis.set(xlabel="environment steps (frames)", ylabel=f"return, mean of {LAST} games")
    axis.set_title(f"{args.env_id}, CleanRL's classic setting, {len(args.seeds)} seeds each")
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(args.output / f"{args.env_id}.png", dpi=110)
    ours, theirs = means.values()
    table = [
        f"# {args.env_id}, {args.total_timesteps} frames, the last {LAST} games of each run\n",
        f"`python -m benchmark.learning_check --env-id {args.env_id} --total-timesteps {args.total_timesteps} "
        f"--seeds {' '.join(map(str, args.seeds))}`\n",
        f"| implementation | seed | games | mean of the first {LAST} | of the last {LAST} | 95 % interval over games "
        "| median | commonest return above the median |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        f"\nMean over seeds: ppo_atari.py {ours:.2f}, Stable-Baselines3 {theirs:.2f}, ratio {ours / theirs:.2f}.",
    ]
    (args.output / f"{args.env_id}.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
