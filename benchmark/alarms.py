"""How long before a collapse which measure announces it, and how often it is wrong:

    python -m benchmark.alarms --runs benchmark/results/mujoco/ --output benchmark/results/alarms

Writes alarms.md, auc.csv, early.csv, alarms.csv and roc.png. A run is lost from the step on at which its return stays
below half of its maximum (`benchmark.measures.collapse`). The runs, sorted by setting and seed, are halved:
thresholds are chosen on the first, third, …, and all numbers are of the second, fourth, …, but those of 10 % of
training, which are of all, since nothing is chosen for them. Every value is one that was known at its step: the past
of a run decides, never its future. Intervals are 95 % percentile bootstraps over runs, not over the points of curves,
which are not independent. Exit codes: 0, 1 if a half lacks runs that were lost, 2 for a wrong command line.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd

from benchmark.figures import COLOURS, STYLE
from benchmark.logs import DIAGNOSED, RETURN, print_left_out, read_runs, writing
from benchmark.measures import collapse, excess_ratio
from common.alarms import ALARMS, CATEGORICAL, Watch, severity
from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOT_BLIND = (
    "The limits alone come from one half. Smoothing, the beginning that is left out, how long a condition has to last, "
    "the rule for ties and the candidates for *rank* were set with all of these runs in view, so that what is judged "
    "here is somewhat better than what a new study would see."
)
EARLY = 0.1  # share of training at which OUI is to know what becomes of a run (arXiv 2603.09950)
UNLOGGED = "not logged in these runs"
HORIZONS = (0.05, 0.1, 0.2)  # shares of training: 0.25, 0.5 and 1 M of 5 M steps
UNITS = {"MuJoCo": 64, "Atari": 512}  # of the last hidden layer, where a run doesn't say
NORM, DEAD = "representation/after/actor/preactivation_norm", "representation/after/actor/dead_units"
VARIANCE = "representation/after/policy_variance"
# Beside what the alarms watch, and for two of these, which pass over what may be noise, in its place: the tag, and what
# of it grows as things get worse, of a value, the first and the largest
OTHERS = {
    "PCA rank": (DIAGNOSED, lambda x, first, largest: -x / largest),
    "return": (RETURN, lambda x, first, largest: -x / largest),
    "effective rank": ("representation/after/actor/effective_rank", lambda x, first, largest: -x / largest),
    "srank": ("representation/after/actor/srank", lambda x, first, largest: -x / largest),
    "feature rank": ("representation/after/actor/feature_rank", lambda x, first, largest: -x / largest),
    "matrix rank": ("representation/after/actor/matrix_rank", lambda x, first, largest: -x / largest),
    "critic's PCA rank": ("representation/after/critic/pca_rank", lambda x, first, largest: -x / largest),
    "policy variance": (VARIANCE, lambda x, first, largest: x / first),
    "ratio below 1 − ε": ("trust_region/ratio_below_mean", lambda x, first, largest: -x),
    "norm, as it is": (NORM, lambda x, first, largest: x),
    # Those who read it early saw the best runs with a high one of the actor, and one of the critic that is neither high
    # nor low: an area below 0.5 of the critic's says that a high one is the bad sign.
    "actor's OUI": ("representation/after/actor/activation_balance", lambda x, first, largest: -x),
    "critic's OUI": ("representation/after/critic/activation_balance", lambda x, first, largest: -x),
}
WATCHED = {
    "excess ratio": "ratios",
    "pre-activation norm": "norm",
    "dead units": "units",
    "PCA rank": "rank",
    "entropy": "entropy",
    "return": "return",
}
# Limits to choose from. Those of the other two alarms, which tell a loss more than they announce it, are given.
CANDIDATES = {
    "ratios": (1.6, 2, 2.5, 3, 4, 5, 10, 100, 1e4, 1e8),
    "norm": (2, 3, 5, 8, 10, 12, 15, 20, 30, 50),
    "rank": (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "entropy": (1, 2, 3, 5, 8, 10, 15, 20, 30, 50),
}
AS_GOOD = 0.03  # a difference of Youden's index below this is none


class Told(NamedTuple):
    """What a run told of itself at the steps of its grid, and what became of it."""

    name: str
    total: int  # environment steps
    steps: np.ndarray
    scores: dict  # by measure: arrays like steps, NaN where there is none yet
    rings: dict  # by alarm: the step, or None
    stopped: int | None  # step at which --stop-on collapse would end it
    lost: int | None  # step from which the return is lost for good
    kept: float  # NaN, or the largest return after `stopped`, smoothed, over the largest before


def tags_of(run):
    """What a run logged, as the scripts log it today: a table with a row for each step of the grid."""
    columns = {TAG: run.get(TAG) for TAG in (DIAGNOSED, NORM)}
    columns["trust_region/excess_ratio"] = excess_ratio(run)
    columns["representation/after/entropy"] = run.get("losses/first_minibatch/entropy")
    units = run.args.get("hidden_sizes", (UNITS[run.suite],))[-1]
    columns["representation/after/actor/dead_fraction"] = run.get(DEAD) / units
    columns[RETURN] = run.get(RETURN)
    if run.suite == "Atari":  # what tells that a policy is categorical was not logged by all
        columns[CATEGORICAL] = pd.Series(dtype=float)
    return pd.DataFrame({tag: x.reindex(run.grid) for tag, x in columns.items()})


def watch(run, limits=None):
    """The rings of a run's alarms by name, with other ``limits`` than theirs if given, the scores of WATCHED, and the
    step at which it counts as collapsed, None for what never comes."""
    watcher, rings, stopped = Watch(limits), dict.fromkeys(ALARMS), None
    table = tags_of(run)
    scores = {name: np.full(len(table), math.nan) for name in WATCHED}
    for i, (step, tags) in enumerate(zip(table.index, table.to_dict("records"), strict=True)):
        for alarm in watcher(int(step), step / run.total_steps, tags):
            rings[alarm.name] = alarm.step
        for name, alarm in WATCHED.items():
            scores[name][i] = severity(alarm, watcher.signals[alarm])[0]
        if watcher.collapsed and stopped is None:
            stopped = int(step)
    return rings, scores, stopped


def tell(run, limits=None):
    """A run as Told."""
    rings, scores, stopped = watch(run, limits)
    scores["share of training"] = run.grid.to_numpy() / run.total_steps
    for name, (tag, worse) in OTHERS.items():
        series = run.get(tag).reindex(run.grid).ffill().rolling(5, min_periods=1).mean()
        first = series.dropna().iloc[:1].sum()
        scores[name] = worse(series, first, series.cummax()).replace([np.inf, -np.inf], np.nan).to_numpy()
    returns, kept = run.carried_return().rolling(5, min_periods=1).mean(), math.nan
    if stopped is not None and (returns.index > stopped).any():
        kept = returns[returns.index > stopped].max() / returns[returns.index <= stopped].max()
    lost = collapse(run)["return_halved"]
    return Told(str(run), run.total_steps, run.grid.to_numpy(), scores, rings, stopped, lost, kept)


def labelled(told, name, horizon):
    """Scores of the points of a run before it was lost: those with the loss within ``horizon``, and those without.

    What lies less than the horizon before the end of a run that was not lost is of neither.
    """
    ahead = horizon * told.total
    coming = told.lost if told.lost is not None else math.inf
    usable = ~np.isnan(told.scores[name]) & (told.steps < coming) & (told.steps > 0.03 * told.total)
    positive = usable & (told.steps + ahead >= coming)
    negative = usable & ~positive & ((told.lost is not None) | (told.steps + ahead <= told.steps[-1]))
    return told.scores[name][positive], told.scores[name][negative]


def roc(positive, negative):
    """False and true positive rates at every threshold, from none to all."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    rates = [1 - np.searchsorted(np.sort(x), thresholds, side="left") / len(x) for x in (negative, positive)]
    return tuple(np.concatenate([[0], rate]) for rate in rates)


def auc(tolds, name, horizon, rng, resamples):
    """Area under the ROC, points of all runs together, and its interval over runs; NaN without points of both kinds."""
    parts = [labelled(told, name, horizon) for told in tolds]
    wins, pairs = np.zeros((2, len(parts), len(parts)))
    for i, (positive, _) in enumerate(parts):
        for j, (_, negative) in enumerate(parts):
            negative = np.sort(negative)
            below, upto = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
            wins[i, j], pairs[i, j] = (below + upto).sum() / 2, len(positive) * len(negative)
    return share_won(wins, pairs, rng, resamples)


def share_won(wins, pairs, rng, resamples):
    """The share of pairs that are won, and its interval, a bootstrap over runs; NaN without pairs.

    wins, pairs: (R, R), of the pairs that run i and run j make, in this order, how many i wins, and how many there are.
    """
    if not pairs.sum():
        return math.nan, math.nan, math.nan
    counts = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=resamples).astype(float)
    with np.errstate(invalid="ignore"):  # a sample of runs may have no pairs
        areas = np.einsum("ri,ij,rj->r", counts, wins, counts) / np.einsum("ri,ij,rj->r", counts, pairs, counts)
    return wins.sum() / pairs.sum(), *np.nanpercentile(areas, (2.5, 97.5))


def early(tolds, name, rng, resamples):
    """What a measure at EARLY of training says of what becomes of a run, of those that have it and are not lost yet.

    Returns a dict: runs, how many of them are lost afterwards, and two shares of pairs in which the run that fares
    worse has the worse score, with their intervals: `auc` of those lost afterwards and those never lost (area under
    the ROC of runs; NaN with fewer than two of either, on which no interval could stand), `concordance` of any two of
    which one is lost before the other (Harrell's, in shares of training).
    """
    scores, losts = [], []
    for told in tolds:
        known = np.flatnonzero(told.steps <= EARLY * told.total)
        coming = math.inf if told.lost is None else told.lost
        if len(known) and not np.isnan(told.scores[name][known[-1]]) and coming > told.steps[known[-1]]:
            scores.append(told.scores[name][known[-1]])
            losts.append(coming / told.total)
    scores, losts = np.array(scores), np.array(losts)
    wins = (scores[:, None] > scores) + (scores[:, None] == scores) / 2.0
    found = {"runs": len(scores), "lost": int(np.isfinite(losts).sum())}
    sooner = (losts[:, None] < losts).astype(float)
    apart = sooner * np.isinf(losts) * (min(found["lost"], found["runs"] - found["lost"]) > 1)
    for share_of, pairs in (("auc", apart), ("concordance", sooner)):
        found |= dict(zip((share_of, f"{share_of}_low", f"{share_of}_high"),
                          share_won(wins * pairs, pairs, rng, resamples), strict=True))  # fmt: skip
    return found


def chosen_limits(runs, horizon=HORIZONS[-1]):
    """The limit of each alarm: of CANDIDATES that are as good as the best, the one in the middle.

    Good is what has a large sum of two shares (Youden's index), of points of ``runs`` within ``horizon`` of the loss at
    which the alarm had rung, and of points further from it at which it had not.
    """
    limits, found = {name: kind.limit for name, kind in ALARMS.items()}, {name: {} for name in CANDIDATES}
    for values in zip(*CANDIDATES.values(), strict=True):
        tried = limits | dict(zip(CANDIDATES, values, strict=True))
        tolds = [tell(run, tried) for run in runs]
        for name in CANDIDATES:
            parts = []
            for told in tolds:
                rung = told.steps >= (told.rings[name] or math.inf)
                parts.append(labelled(told._replace(scores={name: rung.astype(float)}), name, horizon))
            positive, negative = (np.concatenate(x) for x in zip(*parts, strict=True))
            found[name][tried[name]] = positive.mean() - negative.mean()
    good = {name: [x for x, y in of.items() if y > max(of.values()) - AS_GOOD] for name, of in found.items()}
    best = {name: values[len(values) // 2] for name, values in good.items()}
    return limits | best


def share(part, whole):
    """``part`` of ``whole`` with Wilson's interval."""
    if not whole:
        return "0 of 0"
    z, p = 1.96, part / whole
    middle, width = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + z * z / (4 * whole * whole))
    low, high = ((middle + sign * width) / (1 + z * z / whole) for sign in (-1, 1))
    return f"{part} of {whole} ({100 * max(low, 0):.0f} to {100 * min(high, 1):.0f} %)"


def lead(tolds, name, rng, resamples):
    """Steps from ring to loss, in millions, of the lost runs in which the alarm rang: median, its interval, range."""
    leads = np.array([(t.lost - t.rings[name]) / 1e6 for t in tolds if t.lost and t.rings[name] is not None])
    if not len(leads):
        return "–"
    low, high = np.percentile(np.median(rng.choice(leads, (resamples, len(leads))), axis=1), (2.5, 97.5))
    return f"{np.median(leads):.2f} ({low:.2f} to {high:.2f}), {leads.min():.2f} to {leads.max():.2f}"


def alarm_table(tolds, limits, rng, resamples):
    """Of each alarm a row of Markdown cells."""
    lost, others = [t for t in tolds if t.lost], [t for t in tolds if not t.lost]
    rows = []
    for name, limit in limits.items():
        before = [t for t in lost if t.rings[name] is not None and t.rings[name] < t.lost]
        soon = [t for t in before if t.lost - t.rings[name] <= HORIZONS[-1] * t.total]
        wrong = sum(t.rings[name] is not None for t in others)
        never = sum(t.rings[name] is None for t in lost)
        cells = (name, f"{limit:g}", share(len(before), len(lost)), share(len(soon), len(lost)))
        rows.append((*cells, lead(tolds, name, rng, resamples), f"{never}", f"{wrong} of {len(others)}"))
    return rows


def markdown(head, rows):
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(x)} |" for x in rows)])


def draw(tolds, folder):
    """The ROC of each watched measure and horizon, in the order of their area."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(HORIZONS), figsize=(9.9, 3.7), layout="constrained", sharey=True)
        for axis, horizon in zip(axes, HORIZONS, strict=True):
            for colour, name in zip(COLOURS, (*WATCHED, "share of training"), strict=True):
                parts = [labelled(told, name, horizon) for told in tolds]
                positive, negative = (np.concatenate(x) for x in zip(*parts, strict=True))
                style = {"color": colour, "linewidth": 1.4, "linestyle": "--" if name not in WATCHED else "-"}
                axis.plot(*roc(positive, negative), label=name, **style)
            axis.plot((0, 1), (0, 1), color="0.7", linewidth=0.8)
            axis.set(title=f"lost within {100 * horizon:.0f} % of training", xlabel="false alarms", aspect="equal")
        axes[0].set_ylabel("announced")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        with writing(folder / "roc.png") as path:
            figure.savefig(path, dpi=130)
        plt.close(figure)


def interval(x, low, high):
    return "–" if math.isnan(x) else f"{x:.2f} ({low:.2f} to {high:.2f})"


def early_table(table):
    """Of each measure a row of Markdown cells, the best first; ``table`` has what ``early`` gives, by measure."""
    rows = []
    for name, of in table.sort_values(["concordance", "runs"], ascending=False, kind="stable").iterrows():
        areas = [interval(*of[[part, f"{part}_low", f"{part}_high"]]) for part in ("auc", "concordance")]
        rows.append((name, f"{of.lost:.0f} of {of.runs:.0f}", *areas) if of.runs else (name, UNLOGGED, "", ""))
    return rows


def report(chosen, judged, limits, areas, soon, rng, resamples):
    """The text of alarms.md."""
    lost = [sum(told.lost is not None for told in half) for half in (chosen, judged)]
    head = ("measure", *(f"within {100 * horizon:.0f} %" for horizon in HORIZONS))
    at_10 = areas[areas.horizon == 0.1].sort_values("auc", ascending=False, kind="stable")  # NaN last
    rows = []
    for name in at_10.measure:
        of = areas[areas.measure == name].set_index("horizon")
        logged = any(not np.isnan(told.scores[name]).all() for told in judged)
        rows.append((name, *(interval(*of.loc[h, ["auc", "low", "high"]]) if logged else UNLOGGED for h in HORIZONS)))
    steps = [f"{told.lost / 1e6:.2f} M" for told in judged if told.lost]
    ended = [told for told in judged if told.stopped is not None]
    back = [told for told in ended if told.kept >= 0.5]
    saved = [100 * (1 - told.stopped / told.total) for told in ended]
    alarms = ("alarm", "limit", "rang before the loss", f"at most {100 * HORIZONS[-1]:.0f} % of training before")
    alarms += ("steps before it, M: median (interval), range", "never rang", "rang in runs not lost")
    lines = [
        "# Which measure announces a collapse, how long before, and how often it is wrong",
        "`python -m benchmark.alarms` writes this file. A run is lost from where its return stays below half of its "
        "maximum. Limits were chosen on one half of the runs and judged on the other; intervals (95 %) are bootstraps "
        "over runs, of shares Wilson's.",
        f"Chosen on {len(chosen)} runs, of which {lost[0]} were lost: " + "; ".join(told.name for told in chosen) + ".",
        f"Judged on {len(judged)} runs, of which {lost[1]} were lost, at {', '.join(sorted(steps))}: "
        + "; ".join(told.name for told in judged)
        + ".",
        f"{lost[1]} of the {len(judged)} judged runs are lost in the end. Where that is nearly all, a false ring is "
        "one that comes long before the loss, and the last column of the alarms says next to nothing.",
        "## Area under the ROC",
        "Of every point before the loss: does it come within so much of training? 0.5 is chance; *share of training* "
        "is what a clock alone knows.",
        markdown(head, rows),
        "![ROC](roc.png)",
        "## Alarms",
        markdown(alarms, alarm_table(judged, limits, rng, resamples)),
        "Of limits that are as good on the first half, by Youden's index for the last horizon, the middle one is "
        "taken; "
        "*units* and *return* have theirs by definition. The scripts have "
        + ", ".join(f"{name} {kind.limit:g}" for name, kind in ALARMS.items())
        + ".",
        NOT_BLIND,
        "A negative number of steps is a ring after the loss, which is the case of an alarm that tells it, not of one "
        "that announces it.",
        f"## At {100 * EARLY:.0f} % of training",
        f"Does what a measure is at {100 * EARLY:.0f} % of training say what becomes of a run, as arXiv 2603.09950 "
        "has it of OUI? Of all runs, of both halves, that were not lost by then: share of pairs, of a run that is "
        "lost afterwards and one that never is, in which the first has the worse value (the area under the ROC of "
        "runs; – with fewer than two of either), and of pairs in which one is lost sooner than the other "
        "(concordance). 0.5 is chance; below it, the other sign would be the worse. Runs of all settings are "
        "compared with each other. Worse is a low OUI; of the critic's, of which that paper finds the middle "
        "best, these shares say no more than which side is worse.",
        markdown(
            ("measure", "lost afterwards", "lost or never: area", "sooner or later: concordance"), early_table(soon)
        ),
        "## `--stop-on collapse`",
        f"It would have ended {share(len(ended), len(judged))} of the judged runs"
        + (f", {np.median(saved):.0f} % of training (median) before their end" if ended else "")
        + f". In {share(len(back), len(ended))} of these the return was to reach half of its maximum again"
        + (f"; the largest came back to {100 * max(told.kept for told in ended):.0f} %." if ended else "."),
    ]
    return "\n\n".join(lines) + "\n"


@dataclass
class Args:
    runs: tuple[str, ...] = ("runs",)
    """run folders, folders of runs, files of benchmark.logs, the paper's CSV logs, or quoted patterns of these"""
    output: Path = Path("alarms")
    """folder of alarms.md, auc.csv, early.csv, alarms.csv and roc.png"""
    resamples: int = 10_000
    """bootstrap samples of each interval"""
    seed: int = 0
    """seed of the bootstrap"""


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "resamples", low=100, high=1_000_000)
    check_range(args, "seed", low=0, high=2**31 - 1)
    check_folder(args.output)
    runs, left_out, notes = read_runs(args.runs)
    left_out += [(run.name, "in progress: nobody knows yet whether it is lost") for run in runs if not run.finished]
    left_out += [(run.name, "no episode has ended in it") for run in runs if run.finished and run.get(RETURN).empty]
    print_left_out(left_out, notes)
    runs = sorted(
        (run for run in runs if run.finished and not run.get(RETURN).empty),
        key=lambda run: (*map(str, run.setting), run.seed),
    )
    if len(runs) < 4:
        fail(f"--runs {' '.join(args.runs)}: must have at least 4 finished runs, and has {len(runs)}", 1)
    limits = chosen_limits(runs[::2])
    chosen, judged = [tell(run, limits) for run in runs[::2]], [tell(run, limits) for run in runs[1::2]]
    if not all(any(told.lost for told in half) for half in (chosen, judged)):
        fail(f"--runs {' '.join(args.runs)}: each half of its {len(runs)} finished runs must have one that was lost", 1)
    make_folder(args.output)
    rng = np.random.default_rng(args.seed)
    names = (*dict.fromkeys((*WATCHED, *OTHERS)), "share of training")
    areas = [(name, h, *auc(judged, name, h, rng, args.resamples)) for name in names for h in HORIZONS]
    areas = pd.DataFrame(areas, columns=("measure", "horizon", "auc", "low", "high"))
    with writing(args.output / "auc.csv") as path:
        areas.dropna().to_csv(path, index=False, float_format="%.4g")
    soon_rng = np.random.default_rng(args.seed)  # of its own: what else is drawn doesn't depend on it
    soon = {name: early(chosen + judged, name, soon_rng, args.resamples) for name in names[:-1]}  # a clock says nothing
    soon = pd.DataFrame.from_dict(soon, orient="index")
    with writing(args.output / "early.csv") as path:
        soon[soon.runs > 0].to_csv(path, index_label="measure", float_format="%.4g")
    rows = [
        {"run": told.name, "half": half, "lost": told.lost, **told.rings, "stopped": told.stopped, "kept": told.kept}
        for half, tolds in (("chosen on", chosen), ("judged", judged))
        for told in tolds
    ]
    with writing(args.output / "alarms.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
    text = report(chosen, judged, limits, areas, soon, rng, args.resamples)
    with writing(args.output / "alarms.md") as path:
        path.write_text(text, encoding="utf-8")
    draw(judged, args.output)
    print(text)
