"""Which remedies stop the collapse? A table and a figure that order them, each against PPO without change:

    python -m benchmark.remedies --runs remedies/runs --output benchmark/results/remedies

All runs must be of one environment, activation, schedule and number of epochs. Exit codes: 0, 1 if there is nothing
to compare, 2 for a wrong command line.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats

from benchmark.figures import log_axis
from benchmark.logs import print_left_out, read_runs, read_table, writing
from benchmark.measures import last_of
from benchmark.table import improvement_interval, interval, probability_of_improvement, resampled, table_of_runs
from common.alarms import ALARMS
from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

PPO = "none"
# By column of the table: what it is, and whether it is averaged as a logarithm. At the end: the last 5 % of training.
MEASURES = {
    "return": ("return at the end", False),
    "max_return": ("largest return", False),
    "ratio_broken": ("bounds broken at step", False),
    "return_halved": ("return fallen for good at step", False),
    "pca_rank": ("PCA rank at the end", False),
    "dead_units": ("dead units at the end", False),
    "preactivation_norm": ("pre-activation norm at the end", True),
    "policy_variance": ("policy variance at the end", True),
    "plasticity_loss": ("plasticity loss at the end", True),
}
TESTED = ("return", "max_return")  # against PPO, with an allowance for the number of remedies
NEVER = ("ratio_broken", "return_halved")  # steps: a run in which it never happened counts with its last


def holm(p_values):
    """The p-values, adjusted for their number (Holm 1979): those up to 0.05 are wrong in at most 5 % of all studies.

    NaN, of what can't be tested, stays and doesn't count.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    adjusted = np.full(len(p), np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return adjusted


def different(x, y):
    """p of Welch's test that the logarithms of x and y have one mean; NaN if one is not positive, or has no variance.

    Ranks would not do: 5 seeds against 5 can't come below 0.008, and with 18 remedies no p would remain below 0.05.
    """
    if min(len(x), len(y)) < 2 or min(x.min(), y.min()) <= 0 or np.ptp(x) == 0 == np.ptp(y):
        return np.nan
    return stats.ttest_ind(np.log(x), np.log(y), equal_var=False).pvalue


def mean_and_interval(values, logarithmic, rng, resamples):
    """Mean, or geometric mean, and its 95 % bootstrap interval over seeds, which needs two of them."""
    if logarithmic:
        values = np.log(values[values > 0])
    if not len(values):
        return (np.nan,) * 3
    low, high = interval(resampled([values], rng, resamples).mean(axis=1)) if len(values) > 1 else (np.nan, np.nan)
    numbers = values.mean(), low, high
    return tuple(np.exp(numbers)) if logarithmic else numbers


def table_of_seeds(runs):
    """A row for each run, with all of MEASURES, and the steps at which its alarms rang, where its log has them."""
    table = table_of_runs(runs)
    variance = {run.name: last_of(run.get("representation/after/policy_variance"), run).mean() for run in runs}
    table["policy_variance"] = table["run"].map(variance)
    for name in NEVER:
        table[f"{name}_in"] = table[name].notna()
        table[name] = table[name].fillna(table["last_step"])
    for name in ALARMS:
        rang = {run.name: run.get(f"alarm/{name}").loc[lambda x: x > 0].index.min() for run in runs}
        table[f"rang_{name}"] = table["run"].map(rang)
    return table


def with_earlier(seeds, path):
    """``seeds`` and the rows of an earlier ``runs.csv`` whose remedy has no run among them; ends the program where that
    file is another, or of another setting."""
    earlier = read_table("--earlier", path, [name for name in seeds if not name.startswith("rang_")])
    for name in ("source", "env_id", "activation", "schedule", "epochs"):
        other = set(earlier[name]) - set(seeds[name])
        if other:
            fail(f"--earlier {path}: must be of the setting of --runs, and has {name} {other.pop()}")
    earlier = earlier[~earlier["intervention"].isin(seeds["intervention"])]
    return pd.concat([seeds, earlier.reindex(columns=seeds.columns)], ignore_index=True) if len(earlier) else seeds


def table_of_remedies(seeds, seed, resamples):
    """A row for each remedy, the highest return at the end first; ``seeds`` is of table_of_seeds."""
    rows, ppo = [], seeds[seeds["intervention"] == PPO]
    for remedy, part in seeds.groupby("intervention"):
        rng = np.random.default_rng(seed)
        row = {"remedy": remedy, "runs": len(part), "unfinished": int((~part["finished"].astype(bool)).sum())}
        for name, (_, logarithmic) in MEASURES.items():
            values = part[name].dropna().to_numpy(dtype=float)
            numbers = mean_and_interval(values, logarithmic, rng, resamples)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True))
        row |= {f"{name}_in": int(part[f"{name}_in"].sum()) for name in NEVER}
        if remedy != PPO:
            x, y = part["return"].to_numpy(), ppo["return"].to_numpy()
            row["improvement"] = probability_of_improvement(x, y)
            low, high = improvement_interval([(x, y)], rng, resamples) if min(len(x), len(y)) > 1 else (np.nan, np.nan)
            row |= {"improvement_low": low, "improvement_high": high}
            row |= {f"p_{name}": different(part[name].to_numpy(), ppo[name].to_numpy()) for name in TESTED}
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("return", ascending=False, ignore_index=True)
    remedies = table["remedy"] != PPO
    for name in TESTED:
        table.loc[remedies, f"p_{name}_adjusted"] = holm(table.loc[remedies, f"p_{name}"])
    return table


def verdict(row):
    """What the returns allow to say of a remedy: words for the end of training, and for the largest return."""
    words = []
    for name, (better, worse) in zip(TESTED, (("helps", "harms"), ("reaches more", "reaches less")), strict=True):
        if row[f"p_{name}_adjusted"] <= 0.05:
            words.append(better if row[name] > row["of_ppo"][name] else worse)
    return ", ".join(words) or "no difference shown"


def markdown(table):
    """The table for people: means with 95 % intervals, and a verdict."""

    def number(x):
        return "–" if not np.isfinite(x) else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"

    def with_interval(row, name, scale=1):
        low, high = row[f"{name}_low"] / scale, row[f"{name}_high"] / scale
        return number(row[name] / scale) + (f" ({number(low)} to {number(high)})" if np.isfinite(low) else "")

    def count(row):
        return f"{row['runs']}" + (f" ({row['unfinished']} unfinished)" if row["unfinished"] else "")

    of_ppo = table[table["remedy"] == PPO].iloc[0]
    head = ["remedy", "runs", "probability of improvement", "p, adjusted", "verdict"]
    head += [label for label, _ in MEASURES.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in table.to_dict("records"):
        if row["remedy"] == PPO:
            cells = ["**PPO**", count(row), "–", "–", "–"]
        else:
            p = f"{row['p_return_adjusted']:.2g}" if np.isfinite(row["p_return_adjusted"]) else "–"
            cells = [row["remedy"], count(row), with_interval(row, "improvement"), p]
            cells.append(verdict({**row, "of_ppo": of_ppo}))
        for name in MEASURES:
            if name in NEVER:
                cells.append(f"{with_interval(row, name, 1e6)} M in {row[f'{name}_in']} of {row['runs']}")
            else:
                cells.append(with_interval(row, name))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(table, seeds):
    """A panel for each measure: a line for each remedy in the table's order, its seeds, mean and interval."""
    figure, axes = plt.subplots(3, 3, figsize=(12, 3 * (0.22 * len(table) + 0.9)), sharey=True, layout="constrained")
    (ppo,) = table[table["remedy"] == PPO].to_dict("records")
    for axis, (name, (label, logarithmic)) in zip(axes.flat, MEASURES.items(), strict=True):
        axis.axvspan(ppo[f"{name}_low"], ppo[f"{name}_high"], color="0.9", linewidth=0)
        for y, row in enumerate(table.to_dict("records")):
            points = seeds.loc[seeds["intervention"] == row["remedy"], name].dropna().to_numpy(dtype=float)
            axis.plot(points, np.full(len(points), y), "o", color="tab:blue", alpha=0.35, markersize=4)
            shown = name in TESTED and row["remedy"] != PPO and row[f"p_{name}_adjusted"] <= 0.05
            axis.plot([row[f"{name}_low"], row[f"{name}_high"]], [y, y], color="black", linewidth=1.2)
            axis.plot(row[name], y, "D", color="black", markerfacecolor="black" if shown else "white", markersize=5)
        if logarithmic and (seeds[name] > 0).any():
            axis.set_xscale("log")
            log_axis(axis.xaxis)
        if name in NEVER:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlabel(label)
        axis.set_yticks(range(len(table)), ["PPO" if x == PPO else x.rpartition(" + ")[2] for x in table["remedy"]])
        axis.set_ylim(len(table) - 0.5, -0.5)
    return figure


@dataclass
class Args:
    runs: tuple[str, ...] = ("remedies/runs",)
    """run folders, folders of runs, files of benchmark.logs, or quoted patterns of these"""
    earlier: Path | None = None
    """runs.csv of an earlier call, of which the remedies count that --runs has none of"""
    output: Path = Path("benchmark/results/remedies")
    """folder of remedies.md, .csv (a row for each remedy), .png and .pdf, and runs.csv (a row for each run)"""
    unfinished: bool = False
    """count unfinished runs by the last of what they have, as those that a number that is not finite ended"""
    resamples: int = 10_000
    """bootstrap samples of each interval"""
    seed: int = 0
    """seed of the bootstrap"""


def main(args):
    check_range(args, "resamples", low=100, high=1_000_000)
    check_range(args, "seed", low=0, high=2**31 - 1)
    check_folder(args.output)
    runs, left_out, notes = read_runs(args.runs, [f"alarm/{name}" for name in ALARMS])
    if not args.unfinished:
        left_out += [(run.name, "not finished, see --unfinished") for run in runs if not run.finished]
        runs = [run for run in runs if run.finished]
    print_left_out(left_out, notes)
    settings = {(run.source, run.env_id, run.activation, run.schedule, run.epochs) for run in runs}
    if len(settings) > 1:
        fail(
            f"--runs {' '.join(args.runs)}: must be of one environment and setting, and are of {len(settings)}", code=1
        )
    if not runs:
        fail(f"--runs {' '.join(args.runs)}: must hold finished runs", code=1)
    seeds = table_of_seeds(runs)
    if args.earlier:
        seeds = with_earlier(seeds, args.earlier)
    if len(set(seeds["intervention"]) | {PPO}) < 2 or PPO not in set(seeds["intervention"]):
        fail(f"--runs {' '.join(args.runs)}: must hold finished runs of PPO without change, and of a remedy", code=1)
    make_folder(args.output)
    table = table_of_remedies(seeds, args.seed, args.resamples)
    text, figure = markdown(table), draw(table, seeds)
    for name, write in (
        ("runs.csv", lambda path: seeds.to_csv(path, index=False, float_format="%.6g")),
        ("remedies.csv", lambda path: table.to_csv(path, index=False, float_format="%.6g")),
        ("remedies.md", lambda path: path.write_text(text + "\n", encoding="utf-8")),
        ("remedies.png", lambda path: figure.savefig(path, dpi=130, format="png")),
        ("remedies.pdf", lambda path: figure.savefig(path, metadata={"CreationDate": None}, format="pdf")),
    ):
        unfinished = args.output / f"{name}.tmp"
        with writing(args.output / name) as path:
            write(unfinished)
            unfinished.replace(path)
        print(args.output / name)
    plt.close(figure)


if __name__ == "__main__":
    main(parse_args(Args))
