"""Draws what matters of some runs of one setting over training, a line for each run, and prints their last returns:

python -m benchmark.curves runs/Phoenix-v5__ppo_pfo_atari__* --output curves.png
"""

import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.arguments import check_output, check_range, fail
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

PANELS = (
    ("charts/episodic_return", "return, mean of the last episodes"),
    ("representation/after/actor/pca_rank", "PCA rank of the policy's features"),
    ("representation/after/actor/dead_units", "dead units of the policy's features"),
    ("representation/before/actor/preactivation_norm", "norm of the policy's pre-activations"),
    ("trust_region/excess_ratio", "excess ratio, median of 10 rollouts"),
    ("losses/entropy", "entropy of the policy in nats"),
)
# Okabe and Ito's palette, which the colour-blind can tell apart; the line styles serve a print in grey.
COLOURS, STYLES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), ("-", "--", ":", "-.")


FORMATS = (".png", ".pdf", ".svg")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of the runs"""
    output: Path = Path("curves.png")
    """the file to write, a .png, .pdf or .svg"""
    title: str = ""
    """title of the figure; empty is the runs' common name"""
    last: int = 30
    """episodes that a drawn return is the mean of, and that the printed return is the mean of at the end of a run"""


def moving_average(values, width):
    """Mean of the last ``width`` values, or of as many as there are."""
    total = np.concatenate([[0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return (total[last] - total[first]) / (last - first)


def bootstrap_means(samples, rng, resamples=10_000):
    """``resamples`` means of ``samples`` drawn with replacement, as an array.

    A list of arrays is resampled twice, the arrays and the values in each: for games of several runs.
    """
    if isinstance(samples, list):
        chosen = rng.integers(len(samples), size=(resamples, len(samples)))
        return np.array([np.mean([rng.choice(samples[i], len(samples[i])).mean() for i in row]) for row in chosen])
    return rng.choice(samples, (resamples, len(samples))).mean(1)


def bootstrap_interval(samples, rng, resamples=10_000):
    """95 % percentile bootstrap interval of the mean of ``samples``, which are as in ``bootstrap_means``."""
    return np.percentile(bootstrap_means(samples, rng, resamples), [2.5, 97.5])


def name_of(run):
    """The name of a run's folder, also of one that is named ``.``."""
    return Path(os.path.abspath(run)).name


def label_of(run):
    """What to call a run in a legend: its seed, or its folder's name where that doesn't hold it."""
    parts = name_of(run).split("__")
    return f"seed {parts[-2]}" if len(parts) > 3 and parts[-2].isdecimal() else name_of(run)


def title_of(runs):
    """The runs' common name, by the first."""
    return "__".join(name_of(runs[0]).split("__")[:2])


def save(figure, path):
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        fail(f"--output {path}: can't be written ({error.strerror})")


if __name__ == "__main__":
    args = parse_args(Args)
    if not args.runs:
        fail("RUNS: name at least one run's folder, as runs/*")
    check_range(args, "last", low=1)
    check_output(args.output, *FORMATS)
    for run in args.runs:
        if not list(run.glob("events.out.tfevents.*")):
            fail(f"{run}: must be a run's folder, with an event file in it")
    last_returns, rng = [], np.random.default_rng(0)
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for i, run in enumerate(args.runs):
        name = name_of(run)
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        for axis, (tag, label) in zip(axes.flat, PANELS, strict=True):
            axis.set(xlabel="environment steps (Atari: frames)", ylabel=label)
            axis.xaxis.set_major_formatter(EngFormatter())
            axis.grid(alpha=0.3)
            if tag in events.Tags()["scalars"]:
                steps, values = zip(*((event.step, event.value) for event in events.Scalars(tag)), strict=True)
                style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 1.3}
                if tag == "charts/episodic_return":
                    values = moving_average(values, args.last)
                if tag == "trust_region/excess_ratio":  # a single one may be 1e20, or infinite
                    values = [np.median(values[max(0, k - 9) : k + 1]) for k in range(len(values))]
                    axis.set_yscale("log")
                axis.plot(steps, values, label=label_of(run), **style)
        if "charts/episodic_return" in events.Tags()["scalars"]:
            last_returns.append(
                np.array([event.value for event in events.Scalars("charts/episodic_return")][-args.last :])
            )
            low, high = bootstrap_interval(last_returns[-1], rng)
            mean, episodes = last_returns[-1].mean(), len(last_returns[-1])
            print(f"{name}: last {episodes} episodes return {mean:.0f}, 95 % interval {low:.0f} to {high:.0f}")
        else:
            print(f"{name}: no episode has ended in it")
    if len(last_returns) > 1:
        (low, high), mean = bootstrap_interval(last_returns, rng, 2_000), np.mean([x.mean() for x in last_returns])
        print(f"{len(last_returns)} runs: {mean:.0f}, 95 % interval {low:.0f} to {high:.0f} over runs and episodes")
    figure.suptitle(args.title or title_of(args.runs))
    labelled = [axis for axis in axes.flat if axis.get_legend_handles_labels()[0]]
    if labelled:
        max(labelled, key=lambda axis: len(axis.get_legend_handles_labels()[0])).legend()
    save(figure, args.output)
    print(args.output)
