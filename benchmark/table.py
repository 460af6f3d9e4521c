"""Tables of runs: scores with intervals over seeds, which runs collapsed and when, and whether rank fell before return:

python -m benchmark.table --runs runs/ --output figures

`benchmark/results/README.md` explains how to read them. Exit codes: 0, 1 if there is no finished run, 2 for a wrong
command line.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from benchmark.logs import (
    RETURN,
    SETTING,
    as_they_stood,
    order_of,
    print_left_out,
    read_runs,
    read_table,
    settings_table,
    writing,
)
from benchmark.measures import FINAL_MEASURES, collapse, final_values, rank_when_broken, ratio_broken, settled_return
from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

KEY = ("source", "env_id", "activation", "schedule", "intervention")  # of a row, but for the epochs


def interquartile_mean(scores, axis=-1):
    """Mean of the scores between the quartiles: a quarter of them, rounded down, is cut off at either end."""
    return stats.trim_mean(scores, 0.25, axis=axis)


def resampled(strata, rng, resamples):
    """Stratified bootstrap: (resamples, number of scores), each stratum resampled within itself."""
    return np.concatenate([rng.choice(scores, (resamples, len(scores))) for scores in strata], axis=1)


def interval(samples):
    """The 95 % percentile interval."""
    return tuple(np.percentile(samples, [2.5, 97.5]))


def probability_of_improvement(x, y):
    """P(X > Y) + P(X = Y) / 2 of the scores x (n,) and y (m,): Mann and Whitney's U over n·m (Agarwal et al. 2021)."""
    return stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y))


def improvement_interval(strata, rng, resamples):
    """The 95 % interval of the mean probability of improvement over strata, pairs (x, y) of scores, both resampled."""
    means = np.zeros(resamples)
    for x, y in strata:
        x, y = (rng.choice(scores, (resamples, len(scores))) for scores in (x, y))
        wins = (x[:, :, None] > y[:, None, :]) + 0.5 * (x[:, :, None] == y[:, None, :])  # (resamples, n, m)
        means += wins.mean(axis=(1, 2)) / len(strata)
    return interval(means)


def table_of_runs(runs):
    """A row for each run: its setting, the final values of figure 6, and the steps of its collapse."""
    rows = []
    for run in runs:
        setting = dict(zip(SETTING, run.setting, strict=True))
        head = {"run": run.name, **setting, "seed": run.seed, "finished": run.finished, "last_step": run.last_step}
        steps = {**collapse(run), "ratio_broken": ratio_broken(run)}
        score, rank = steps["return_halved"], steps["rank_tenth"]
        first = None
        if steps["collapsed"] is not None:
            first = "rank" if rank < score else "return" if score < rank else "together"
        best = {"max_return": settled_return(run)[0].max()}
        last = {"rank_when_broken": rank_when_broken(run), "first": first, "hours": run.hours}
        rows.append({**head, **final_values(run), **best, **steps, **last})
    table = pd.DataFrame(rows)
    for name in ("collapsed", "return_halved", "rank_tenth", "rank_halved", "ratio_broken"):
        table[name] = table[name].astype("Int64")
    return table.sort_values([*SETTING, "seed"], ignore_index=True)


def with_earlier(table, path):
    """``table``, with the rows of an earlier ``runs.csv`` for the runs of their names; ends the program where that file
    is another."""
    earlier = read_table("--earlier", path, table)
    rows = earlier.loc[earlier["run"].isin(table["run"]), list(table)].drop_duplicates("run", keep="last")
    try:
        rows = rows.astype(table.dtypes)
    except (TypeError, ValueError) as error:
        fail(f"--earlier {path}: must be a runs.csv of this command ({error})")
    print(f"{len(rows)} of {len(table)} runs as they are in {path}")
    table = table[~table["run"].isin(rows["run"])]
    return pd.concat([x for x in (table, rows) if len(x)], ignore_index=True)


def table_of_settings(table, seed, resamples):
    """A row for each setting and, where it has several numbers of epochs, for all of them, stratified by them.

    Each row's bootstrap begins from ``seed``, so that its intervals are the same whatever other runs there are.
    """
    rows = []
    for key, members in table.groupby(list(KEY), sort=False):
        by_epochs = {epochs: part for epochs, part in members.groupby("epochs")}
        rest = dict(zip(KEY, key, strict=True))
        same = [table[name] == value for name, value in rest.items() if name != "intervention"]
        baselines = table[np.logical_and.reduce(same) & (table["intervention"] == "none")]
        subsets = [(str(epochs), [epochs]) for epochs in by_epochs]
        if len(by_epochs) > 1:
            subsets.append(("+".join(map(str, by_epochs)), list(by_epochs)))
        for label, chosen in subsets:
            rng = np.random.default_rng(seed)
            part = members[members["epochs"].isin(chosen)]
            strata = [by_epochs[epochs]["return"].dropna().to_numpy() for epochs in chosen]
            row = {**rest, "epochs": label, "runs": len(part), **summary_of(strata, rng, resamples)}
            if rest["intervention"] != "none":
                pairs = [
                    (by_epochs[epochs]["return"].dropna().to_numpy(), base["return"].dropna().to_numpy())
                    for epochs in chosen
                    if len(base := baselines[baselines["epochs"] == epochs])
                ]
                pairs = [(x, y) for x, y in pairs if len(x) and len(y)]
                row["improvement"], row["improvement_low"], row["improvement_high"] = (math.nan,) * 3
                # All strata or none: over some of the epochs it would not be what the row says.
                if len(pairs) == len(chosen):
                    row["improvement"] = np.mean([probability_of_improvement(x, y) for x, y in pairs])
                    if all(min(len(x), len(y)) > 1 for x, y in pairs):
                        row["improvement_low"], row["improvement_high"] = improvement_interval(pairs, rng, resamples)
            collapsed = part[part["collapsed"].notna()]
            row["collapsed"] = len(collapsed)
            row["median_collapse_step"] = collapsed["collapsed"].median() if len(collapsed) else math.nan
            row |= {f"mean_{name}": part[name].mean() for name in FINAL_MEASURES if name != "return"}
            row["rank_first"] = int((collapsed["first"] == "rank").sum())
            rows.append(row)
    return pd.DataFrame(rows)


def summary_of(strata, rng, resamples):
    """Mean, median and interquartile mean of all scores, with intervals where each stratum has more than one."""
    scores = np.concatenate(strata)
    row = {}
    for name, function in (("mean", np.mean), ("median", np.median), ("iqm", interquartile_mean)):
        row[name] = function(scores) if len(scores) else math.nan
        row[f"{name}_low"], row[f"{name}_high"] = (math.nan,) * 2
        if all(len(stratum) > 1 for stratum in strata):
            row[f"{name}_low"], row[f"{name}_high"] = interval(function(resampled(strata, rng, resamples), axis=1))
    return row


def claims(table):
    """The paper's claim as numbers: of the runs that collapsed, in how many did the rank fall before the return?

    A line each for baselines and interventions of each suite, ours and the paper's.
    """
    lines = []
    intervened = (table["intervention"] != "none").rename("intervened")
    for (source, suite, with_intervention), part in table.groupby(["source", "suite", intervened], sort=True):
        collapsed = part[part["collapsed"].notna()]
        what = f"{suite}, {'interventions' if with_intervention else 'baselines'}"
        what += "" if source == "runs" else ", the paper’s logs"
        words = [f"{what}: {len(collapsed)} of {len(part)} runs collapsed."]
        if len(collapsed):
            words += [
                "The rank was below a tenth of its maximum before the return was below half of its own "
                f"in {share(collapsed['first'] == 'rank')};",
                "at equal thresholds, the rank was below half of its maximum before the return was "
                f"in {share(collapsed['rank_halved'] < collapsed['return_halved'])}.",
            ]
        fell = part[part["return_halved"].notna()]
        if len(fell):
            before = fell[["rank_halved", "ratio_broken"]].lt(fell["return_halved"], axis=0).fillna(False)
            words += [
                f"The return fell below half of its maximum for good in {len(fell)}:",
                f"before that, the rank had in {share(before['rank_halved'])},",
                f"and the excess ratio had passed 10 in {share(before['ratio_broken'])}.",
            ]
        lines.append(" ".join(words))
    return lines


def share(condition):
    """In how many of the runs a condition holds, in words, with Wilson's interval."""
    count = int(condition.sum())
    low, high = stats.binomtest(count, len(condition)).proportion_ci(0.95, method="wilson")
    percent = f"{100 * count / len(condition):.0f} %, 95 % interval {100 * low:.0f} to {100 * high:.0f} %"
    return f"{count} of {len(condition)} ({percent})"


def markdown(table):
    """The table of settings as Markdown, for people."""

    def number(x):
        return "–" if not math.isfinite(x) else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"

    def with_interval(row, name):
        known = math.isfinite(row.get(f"{name}_low", math.nan))
        bounds = f" ({number(row[f'{name}_low'])} to {number(row[f'{name}_high'])})" if known else ""
        return number(row.get(name, math.nan)) + bounds

    head = ("environment", "activation", "schedule", "intervention", "epochs", "runs", "mean return", "median")
    head += ("interquartile mean", "probability of improvement", "collapsed", "median step of collapse", "rank first")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in table.to_dict("records"):
        source = "" if row["source"] == "runs" else " (the paper’s logs)"
        step = row["median_collapse_step"]
        cells = (
            row["env_id"] + source,
            *(row[name] for name in ("activation", "schedule", "intervention", "epochs")),
            row["runs"],
            *(with_interval(row, name) for name in ("mean", "median", "iqm", "improvement")),
            row["collapsed"],
            "–" if math.isnan(step) else f"{step / 1e6:.2f} M",
            f"{row['rank_first']} of {row['collapsed']}" if row["collapsed"] else "–",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@dataclass
class Args:
    runs: tuple[str, ...] = ("runs",)
    """run folders, folders of runs, files of benchmark.logs, the paper's CSV logs, or quoted patterns of these"""
    earlier: Path | None = None
    """runs.csv of an earlier call, whose rows count for the runs in it: of whole logs, where --runs has thinned ones"""
    output: Path = Path("figures")
    """folder of table.md, table.csv (both a row for each setting) and runs.csv (a row for each run)"""
    steps: int = 0
    """take the runs as they stood at this environment step, those included that are in progress beyond it; 0 is the
    end of each"""
    resamples: int = 10_000
    """bootstrap samples of each interval"""
    seed: int = 0
    """seed of the bootstrap"""


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "resamples", low=100, high=1_000_000)
    check_range(args, "seed", low=0, high=2**31 - 1)
    check_range(args, "steps", low=0)
    if args.steps and args.earlier:
        fail("--steps: must not go with --earlier, whose rows are of the end of each run")
    check_folder(args.output)
    runs, left_out, notes = read_runs(args.runs)
    runs = as_they_stood(runs, args.steps)
    left_out += [(run.name, "in progress: the table is of the end of training") for run in runs if not run.finished]
    finished = [run for run in runs if run.finished]
    notes += [f"{run.name}: no episode has ended in it; its return counts nowhere, and it can't have collapsed"
              for run in finished if run.get(RETURN).empty]  # fmt: skip
    print_left_out(left_out, notes)
    if not finished:
        fail(f"--runs {' '.join(args.runs)}: no finished run in it can be used", code=1)
    print("\n".join([f"{len(finished)} runs used:", *settings_table(finished)]))
    each = table_of_runs(finished)
    if args.earlier:
        each = with_earlier(each, args.earlier)
    each = each.sort_values(
        ["source", "env_id", "activation", "schedule", "intervention", "epochs", "seed"],
        key=lambda column: column.map(order_of) if column.name == "intervention" else column,
        ignore_index=True,
    )
    make_folder(args.output)
    settings = table_of_settings(each, args.seed, args.resamples)
    text = "\n".join([markdown(settings), "", *(f"- {line}" for line in claims(each))])
    for name, write in (
        ("runs.csv", lambda path: each.to_csv(path, index=False, float_format="%.6g")),
        ("table.csv", lambda path: settings.to_csv(path, index=False, float_format="%.6g")),
        ("table.md", lambda path: path.write_text(text + "\n", encoding="utf-8")),
    ):
        unfinished = args.output / f"{name}.tmp"
        with writing(args.output / name) as path:
            write(unfinished)
            unfinished.replace(path)
    print(f"\n{text}\n")
    print("\n".join(str(args.output / name) for name in ("table.md", "table.csv", "runs.csv")))
