"""The paper's claims as numbers with intervals: within each run from its start to its end, and between settings.

    python -m benchmark.claims --runs runs/ --output figures

Writes claims.md and claims.csv. An effect is a ratio (of what grows by orders of magnitude: geometric means) or a
difference (of means), with the 95 % percentile bootstrap interval over seeds; with five seeds it is too narrow rather
than too wide. The time to an event that some runs never saw is compared by its restricted mean, and by a log-rank test.
Exit codes: 0, 1 if there is no finished run in which an episode ended, 2 for a wrong command line.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmark.logs import (
    DIAGNOSED,
    PLASTICITY,
    RETURN,
    as_they_stood,
    order_of,
    print_left_out,
    read_runs,
    settings_table,
    writing,
)
from benchmark.measures import collapse, excess_ratio, final_values, last_of, settled, settled_return
from benchmark.survival import logrank, times_of
from benchmark.table import interval, probability_of_improvement, resampled
from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

# What is compared: its words, and whether an effect on it is a ratio or a difference
MEASURES = {
    "return": ("return", "difference"),
    "max_return": ("largest return", "difference"),
    "kept": ("return kept of the largest", "difference"),
    "step_of_max": ("step of the largest return, M", "difference"),
    "collapsed": ("share of runs that collapsed", "difference"),
    "halved": ("share of runs whose return fell below half for good", "difference"),
    "halved_step": ("restricted mean time to a return below half for good, M steps", "difference"),
    "broken_step": ("restricted mean time to an excess ratio above 10, M steps", "difference"),
    "pca_rank": ("PCA rank", "difference"),
    "max_rank": ("largest PCA rank", "difference"),
    "rank_kept": ("PCA rank kept of the largest", "difference"),
    "critic_rank": ("PCA rank of the critic", "difference"),
    "preactivation_norm": ("pre-activation norm", "ratio"),
    "dead_units": ("dead units", "difference"),
    "excess_ratio": ("excess ratio", "ratio"),
    "policy_variance": ("policy variance", "ratio"),
    "plasticity_loss": ("plasticity loss of the policy", "ratio"),
    "critic_plasticity_loss": ("plasticity loss of the critic", "ratio"),
}
TIMES = {"halved_step": "return_halved", "broken_step": "ratio_broken"}  # of MEASURES, to which of survival.EVENTS
WITHIN = ("pca_rank", "critic_rank", "preactivation_norm", "dead_units", "excess_ratio", "policy_variance")
WITHIN += ("plasticity_loss", "critic_plasticity_loss")


def values_of(run):
    """What a finished run is compared by: at its end, {name: value}, and over its first 5 %, {name: value}.

    Of TIMES the value is a Time, since a run that never saw the event has none.
    """
    score, _ = settled_return(run)
    times = times_of(run)
    rank = settled(run.get(DIAGNOSED), run)
    tags = {
        "pca_rank": DIAGNOSED,
        "critic_rank": "representation/after/critic/pca_rank",
        "preactivation_norm": "representation/after/actor/preactivation_norm",
        "dead_units": "representation/after/actor/dead_units",
        "policy_variance": "representation/after/policy_variance",
    }
    end = {name: last_of(run.get(tag), run).mean() for name, tag in tags.items()} | final_values(run)
    plasticity = {name: run.get(PLASTICITY[network]) for name, network in
                  (("plasticity_loss", "actor"), ("critic_plasticity_loss", "critic"))}  # fmt: skip
    late = plasticity["critic_plasticity_loss"]
    end |= {
        "critic_plasticity_loss": late[late.index > 0.925 * run.last_step].mean(),
        "max_return": score.max(),
        "kept": end["return"] / score.max() if score.max() > 0 else math.nan,
        "step_of_max": score.idxmax() / 1e6,
        "collapsed": float(collapse(run)["collapsed"] is not None),
        "halved": float(times["return_halved"].happened),
        **{name: times[event] for name, event in TIMES.items()},
        "max_rank": rank.max(),
        "rank_kept": end["pca_rank"] / rank.max(),
    }
    early = 0.05 * run.total_steps
    start = {name: run.get(tag)[lambda x: x.index <= early].mean() for name, tag in tags.items()}
    start["excess_ratio"] = excess_ratio(run)[lambda x: x.index <= early].mean()
    # Networks that are the targets, as those of a run with the targets' seed, have nothing to fit.
    start |= {
        name: x.iloc[0] if len(x) and x.index[0] == 0 and x.iloc[0] else math.nan for name, x in plasticity.items()
    }
    return end, start


def effect(values, reference, kind, paired, rng, resamples):
    """How ``values`` differ from ``reference``, arrays over runs: the effect, and the ends of its 95 % interval.

    kind: "difference" of means, or "ratio" of geometric means. paired: value i and reference i are of one run, and are
    drawn together.
    """
    x, y = (np.log(z) if kind == "ratio" else np.asarray(z, dtype=float) for z in (values, reference))
    back = np.exp if kind == "ratio" else lambda z: z
    if paired:
        draws = resampled([x - y], rng, resamples).mean(axis=1)
    else:
        draws = resampled([x], rng, resamples).mean(axis=1) - resampled([y], rng, resamples).mean(axis=1)
    low, high = interval(draws) if min(len(x), len(y)) > 1 else (math.nan, math.nan)
    return back(x.mean() - y.mean()), back(low), back(high)


def row_of(what, name, values, reference, paired, rng, resamples):
    """A row of the table, or None where less than one run on either side has the measure.

    The restricted mean time to an event, up to the end of the shortest run on either side, is the mean of min(time,
    end): all of ``values`` and ``reference`` are of finished runs, so that none is censored before.
    """
    words, kind = MEASURES[name]
    test = (math.nan, math.nan)
    if name in TIMES:
        test, end = logrank(values, reference), min(time.last_step for time in (*values, *reference))
        values, reference = ([min(time.step, end) / 1e6 for time in times] for times in (values, reference))
    values, reference = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    if paired:
        known = np.isfinite(values) & np.isfinite(reference)
        values, reference = values[known], reference[known]
    values, reference = values[np.isfinite(values)], reference[np.isfinite(reference)]
    if not (len(values) and len(reference)):
        return None
    if kind == "ratio" and min(values.min(), reference.min()) <= 0:
        kind = "difference"
    change, low, high = effect(values, reference, kind, paired, rng, resamples)
    middle = (lambda z: math.exp(np.log(z).mean())) if kind == "ratio" else np.mean
    row = {**what, "measure": words, "runs": len(values), "reference_runs": len(reference), "value": middle(values)}
    row |= {"reference": middle(reference), "effect_is": kind, "effect": change, "low": low, "high": high}
    row["probability"] = (
        float(np.mean((values > reference) + 0.5 * (values == reference)))
        if paired
        else probability_of_improvement(values, reference)
    )
    return row | {"logrank_p": test[0], "permutation_p": test[1]}


def claims(runs, seed, resamples):
    """The table of claims: a row for each comparison and measure of finished Runs.

    Each row's bootstrap begins from ``seed``, so that its interval is the same whatever other runs there are.
    """
    found = {}
    for run in runs:
        key = (run.source, run.env_id, run.activation, run.schedule)
        found.setdefault(key, {}).setdefault((run.intervention, run.epochs), []).append(values_of(run))
    rows = []
    for (source, env_id, activation, schedule), settings in sorted(found.items()):
        head = {"source": source, "env_id": env_id, "activation": activation, "schedule": schedule}
        order = sorted(settings, key=lambda x: (order_of(x[0]), x[1]))

        def ends(setting, name, settings=settings):
            return [end[name] for end, _ in settings[setting]]

        def add(comparison, names, values, references, paired, head=head):
            for name in names:
                what = {**head, "comparison": comparison}
                rng = np.random.default_rng(seed)
                rows.append(row_of(what, name, values(name), references(name), paired, rng, resamples))

        for setting in order:
            words = f"{setting[0] if setting[0] != 'none' else 'no intervention'}, {setting[1]} epochs"
            starts = [start for _, start in settings[setting]]
            add(
                *(f"{words}: end against start", WITHIN, lambda name, setting=setting: ends(setting, name)),
                *(lambda name, starts=starts: [start[name] for start in starts], True),
            )
        baselines = sorted(epochs for intervention, epochs in settings if intervention == "none")
        for epochs in baselines[1:]:
            add(
                *(f"no intervention: {epochs} epochs against {baselines[0]}", MEASURES),
                *(lambda name, epochs=epochs: ends(("none", epochs), name),),
                *(lambda name, least=baselines[0]: ends(("none", least), name), False),
            )
        for intervention, epochs in order:
            if intervention != "none" and epochs in baselines:
                add(
                    *(f"{intervention} against none, {epochs} epochs", MEASURES),
                    *(lambda name, setting=(intervention, epochs): ends(setting, name),),
                    *(lambda name, epochs=epochs: ends(("none", epochs), name), False),
                )
    return pd.DataFrame([row for row in rows if row])


def markdown(table):
    """The table as Markdown, a section for each comparison."""

    def number(x):
        return f"{x:.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.3g}"

    lines = []
    head = ("measure", "value", "reference", "effect (95 % interval)", "P(value > reference)", "runs", "log-rank p")
    groups = table.groupby(["source", "env_id", "activation", "schedule", "comparison"], sort=False)
    for (source, env_id, activation, schedule, comparison), part in groups:
        paper = "" if source == "runs" else " (the paper’s logs)"
        lines += [f"### {env_id}, {activation}, {schedule} learning rate{paper}: {comparison}", ""]
        columns = head if part["permutation_p"].notna().any() else head[:-1]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in part.to_dict("records"):
            sign = "× " if row["effect_is"] == "ratio" else "+ " if row["effect"] >= 0 else "− "
            size = row["effect"] if row["effect_is"] == "ratio" else abs(row["effect"])
            bounds = f" ({number(row['low'])} to {number(row['high'])})" if math.isfinite(row["low"]) else ""
            cells = (row["measure"], number(row["value"]), number(row["reference"]), f"{sign}{number(size)}{bounds}")
            cells += (f"{row['probability']:.2f}", f"{row['runs']} and {row['reference_runs']}")
            cells += ("–" if math.isnan(row["permutation_p"]) else f"{row['permutation_p']:.2g}",)
            lines.append(f"| {' | '.join(cells[: len(columns)])} |")
        lines.append("")
    return "\n".join(lines)


@dataclass
class Args:
    runs: tuple[str, ...] = ("runs",)
    """run folders, folders of runs, files of benchmark.logs, the paper's CSV logs, or quoted patterns of these"""
    output: Path = Path("figures")
    """folder of claims.md and claims.csv"""
    steps: int = 0
    """compare the runs as they stood at this environment step, those included that are in progress beyond it; 0 is the
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
    check_folder(args.output)
    runs, left_out, notes = read_runs(args.runs)
    runs = as_they_stood(runs, args.steps)
    left_out += [(run.name, "in progress: the claims are of the end of training") for run in runs if not run.finished]
    finished = [run for run in runs if run.finished]
    left_out += [(run.name, "no episode has ended in it") for run in finished if run.get(RETURN).empty]
    print_left_out(left_out, notes)
    finished = [run for run in finished if not run.get(RETURN).empty]
    if not finished:
        fail(f"--runs {' '.join(args.runs)}: no finished run in it, with an episode that ended, can be used", code=1)
    make_folder(args.output)
    print("\n".join([f"{len(finished)} runs used:", *settings_table(finished), ""]))
    table = claims(finished, args.seed, args.resamples)
    text = markdown(table)
    with writing(args.output / "claims.csv") as path:
        table.to_csv(path, index=False, float_format="%.6g")
    with writing(args.output / "claims.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)
    print("\n".join(str(args.output / name) for name in ("claims.md", "claims.csv")))
