"""Draws the figures of "No Representation, No Trust" (Moalla et al. 2024) from the logs of runs:

python -m benchmark.figures --figure 1 2 --runs runs/ --output figures

Figure 5 is `toy_problem.py`. `--aggregate iqm` draws interquartile means with bootstrap bands in figures 1 and 2, `--x
hours` draws these over time, and `--normalise human` has Atari's returns in figures 1 and 6 in human units. Each figure
is written as PNG and PDF, with the numbers that it shows as CSV; a curve or box of the paper's own logs, given beside
other runs, is drawn over them. Exit codes: 0, 1 if a figure that was asked for can't be drawn from these runs, 2 for a
wrong command line.
"""

import itertools
import math
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats

from benchmark import human
from benchmark.logs import (
    INTERVENTIONS,
    PLASTICITY,
    RANKS,
    RETURN,
    SETTING,
    file_name,
    order_of,
    print_left_out,
    read_runs,
    settings_table,
    writing,
)
from benchmark.measures import (
    AGREEMENTS,
    WINDOW,
    collapse,
    correlations,
    final_values,
    iqm_over_seeds,
    lowest_windows,
    over_seeds,
    rank_agreement,
    ranks_of,
    smooth,
)
from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's palette, which the colour-blind can tell apart, in an order whose greys alternate; the line styles and
# markers serve a print in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,  # letters that can be searched and edited
    "figure.dpi": 150,
}


@dataclass
class Panel:
    tag: str
    label: str
    smoothed: bool = True
    log_from: float = math.inf  # times the least that the largest value is where the axis is logarithmic


ACTOR, CRITIC = "representation/{}/actor/{}", "representation/{}/critic/{}"
FIGURE_1 = (
    Panel(RETURN, "return"),
    Panel(ACTOR.format("after", "pca_rank"), "PCA rank of the\npolicy's features"),
    Panel(ACTOR.format("before", "preactivation_norm"), "norm of the policy's\npre-activations", log_from=1),
    Panel(PLASTICITY["actor"], "plasticity loss\nof the policy (nats)", smoothed=False, log_from=1000),
    Panel(CRITIC.format("after", "pca_rank"), "PCA rank of the\ncritic's features"),
    Panel(PLASTICITY["critic"], "plasticity loss of\nthe critic (value²)", smoothed=False, log_from=1000),
)
FIGURE_2 = (
    Panel("losses/first_minibatch/entropy", "entropy of the\npolicy (nats)"),
    Panel("representation/before/policy_variance", "variance of the\npolicy over states", log_from=1000),
    Panel(ACTOR.format("before", "dead_units"), "dead units\nof the policy"),
)
FIGURE_3 = (
    Panel(ACTOR.format("after", "pca_rank"), "PCA rank of the\npolicy's features"),
    Panel(PLASTICITY["actor"], "plasticity loss\nof the policy (nats)", smoothed=False, log_from=1000),
    Panel(RETURN, "return"),
    Panel("trust_region/ratio_below_mean", "mean ratio\nbelow 1 − ε"),
    Panel("representation/after/policy_variance", "variance of the\npolicy over states", log_from=1000),
    Panel("losses/last_minibatch/policy_loss", "clipped objective,\nlast minibatch"),
)
FIGURE_4 = {
    "dead_units": "dead units of the policy",
    "pca_rank": "PCA rank of the policy's features",
    "preactivation_norm": "norm of the policy's pre-activations",
}
FIGURE_6 = {
    "return": "return",
    "excess_ratio": "excess ratio",
    "dead_units": "dead units of the policy",
    "preactivation_norm": "norm of the policy's pre-activations",
    "pca_rank": "PCA rank of the policy's features",
    "plasticity_loss": "plasticity loss of the policy (nats)",
}
FIGURE_6_LOG_FROM = {"preactivation_norm": 1, "excess_ratio": 100, "plasticity_loss": 1000}  # as Panel.log_from
HUMAN = "return (a human's is 1)"
RANK_NAMES = ("effective", "PCA", "srank", "feature", "matrix")


@dataclass
class Drawn:
    """What became of one figure: its files, the runs in it, and the other runs with the reason."""

    paths: list[Path] = field(default_factory=list)
    used: list = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def keep(self, runs, reason, condition):
        """The runs that fulfil the condition; the others are left out for this reason."""
        self.left_out += [(run.name, reason) for run in runs if not condition(run)]
        return [run for run in runs if condition(run)]

    def report(self, number, runs, refused, output, variant=""):
        """Say which runs the figure has used, and write of each whether, or why not, to ``figureN_runs.csv``.

        variant: what stands behind the figure's number in the names of its files.

        refused: [(run or file, why it was left out while reading)].
        """
        reasons, used = dict(self.left_out), {run.name for run in self.used}
        rows = [(run.name, *run.setting, run.seed, run.name in used, reasons.get(run.name, "")) for run in runs]
        rows += [(name, *[""] * len(SETTING), "", False, reason) for name, reason in refused]
        columns = ["run", *SETTING, "seed", "used", "reason"]
        path = output / f"figure{number}{variant}_runs.csv"
        with writing(path):
            pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
        print(f"figure {number}: {len(used)} of {len(runs)} runs used, listed in {path}")
        for reason, count in Counter(reason for name, reason in self.left_out if name not in used).items():
            print(f"  left out, {reason}: {count} run{'s' if count > 1 else ''}")
        print("\n".join(f"  {path}, .pdf, .csv" for path in self.paths) or "  nothing to draw")

    def save(self, figure, numbers, path, runs):
        """Write PNG, PDF and CSV, each under its own name only when it is whole."""
        for suffix in (".png", ".pdf", ".csv"):
            unfinished = path.with_name(f"{path.name}.tmp{suffix}")
            with writing(path.with_name(path.name + suffix)) as finished:
                if suffix == ".csv":
                    numbers.to_csv(unfinished, index=False, float_format="%.6g")
                else:
                    # Without the date in it, the same runs make the same file.
                    figure.savefig(unfinished, metadata={"CreationDate": None} if suffix == ".pdf" else None)
                    figure.set_layout_engine("none")  # found once, which takes longer than the drawing
                unfinished.replace(finished)
        plt.close(figure)
        self.paths.append(path.with_name(path.name + ".png"))
        self.used += runs


def groups(runs, *names):
    """{values of the runs' attributes ``names``: the runs that have them}, sorted."""
    found = defaultdict(list)
    for run in runs:
        found[tuple(getattr(run, name) for name in names)].append(run)
    return dict(sorted(found.items()))


def place(run):
    """Environment, and on MuJoCo the activation: what every figure is drawn for on its own."""
    return run.env_id if run.suite == "Atari" and run.activation == "ReLU" else f"{run.env_id}_{run.activation}"


def by_place(runs):
    return {key: [run for run in runs if place(run) == key] for key in sorted({place(run) for run in runs})}


def title_of(runs, *words):
    first = runs[0]
    return ", ".join([first.env_id, *([first.activation] if "_" in place(first) else []), *words])


def steps_axis(axis, run):
    axis.set_xlabel("environment steps" + (" (frames)" if run.suite == "Atari" else ""))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def log_axis(axis):
    """A logarithmic ``axis.xaxis`` or ``yaxis`` with labels that neither overlap nor are absent."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if low > 0 else 9
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(EngFormatter(sep=""))
    elif decades < 2.5:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3)))
        axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def spans(values, factor):
    """Whether ``values`` are all positive and the largest at least ``factor`` times the least."""
    return bool(values.min() > 0 and values.max() >= factor * values.min())


def whole_numbers(axis):
    """Widen an ``axis.xaxis`` or ``yaxis`` of counts that are all alike: 0 dead units lie at its end."""
    low, high = axis.get_view_interval()
    if high - low < 1:
        axis.set_view_interval(low - 0.5, high + 5, ignore=True)


def no_data(axis, tag):
    """Say in an empty panel why it is empty."""
    what = "run plasticity_probe.py" if tag.startswith("plasticity") else "not in these logs"
    axis.text(0.5, 0.5, f"no data: {what}", transform=axis.transAxes, ha="center", va="center", color="0.4")
    axis.tick_params(axis="x", length=0, labelbottom=False)
    axis.grid(False)


def legend(figure, axes, **more):
    """One legend below the panels, of everything that is labelled in any of them."""
    handles = {}
    for axis in axes.flat:
        handles |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles |= more
    if handles:
        # Some 140 letters fit below the panels, of which a line and its margin take eight.
        fitting = max(140 // (max(map(len, handles)) + 8), 1)
        columns = len(handles) if len(handles) <= fitting else min(fitting, 3)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def number_of(runs, what):
    """The number of runs in words, with those in progress."""
    unfinished = sum(not run.finished for run in runs)
    words = f"{len(runs)} {what}" + ("s" if len(runs) > 1 else "")
    return words + (f", {unfinished} in progress" if unfinished else "")


def curve_of(run, tag, x="steps"):
    series = run.carried_return().dropna() if tag == RETURN else run.get(tag)
    if x == "steps":
        return series
    series = series.set_axis(run.hours_at(series.index))
    return series[~series.index.duplicated(keep="last")]  # of a resumed run, whose rate begins anew


def draw_curves(curves, panels, columns, x="steps", aggregate="mean"):
    """A figure of panels with a curve for each entry of ``curves``, {(label, source): runs}, and its numbers.

    x: "steps", or "hours". aggregate: "mean" of seeds, with a band from minimum to maximum, or "iqm", the interquartile
    mean, with a 95 % bootstrap band.
    """
    combine, middle, low, high = {
        "mean": (over_seeds, "mean", "min", "max"),
        "iqm": (iqm_over_seeds, "iqm", "low", "high"),
    }[aggregate]
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 2.35 * rows + 0.5), layout="constrained")
    ours = [runs for (_, source), runs in curves.items() if source == "runs"]
    numbers, labels = [], list(dict.fromkeys(label for label, _ in curves))
    if any(label in INTERVENTIONS for label in labels):  # each has its colour, whichever others there are
        labels = list(dict.fromkeys([*INTERVENTIONS, *labels]))
    for axis, panel in zip(axes.flat, panels, strict=True):
        empty, fewer, shown = True, set(), []
        for (label, source), runs in curves.items():
            series = [curve_of(run, panel.tag, x) for run in runs]
            every = [run.every for run, one in zip(runs, series, strict=True) if len(one)]
            series = [one for one in series if len(one)]
            table = combine(series, panel.smoothed, every).dropna(subset=middle)
            if table.empty:
                continue
            empty = False
            shown.append(table[middle])  # not the least: a run whose untrained policy is the target has a loss of 0
            fewer |= {len(series)} if len(series) < len(runs) else set()
            colour, dashes, mark = look(labels.index(label))
            style = {"color": colour, "linestyle": dashes, "linewidth": 1.4}
            if source == "paper":  # thinner, with marks, and no band: it lies over or beside ours
                gap = max(len(table) // 8, 1)
                style |= {"linewidth": 0.8, "marker": mark, "markersize": 3.5, "markevery": (gap // 2, gap)}
                style |= {"markerfacecolor": "white"}
            else:
                axis.fill_between(table.index, table[low], table[high], color=colour, alpha=0.15, linewidth=0)
            if not panel.smoothed and len(table) < 60:
                style |= {"marker": mark, "markersize": 2.2}
            name = f"{label}{', the paper’s logs' if source == 'paper' else ''} ({number_of(runs, 'seed')})"
            axis.plot(table.index, table[middle], label=name, **style)
            numbers.append(
                table.rename_axis(x.removesuffix("s")).reset_index().assign(tag=panel.tag, curve=label, source=source)
            )
        axis.set_ylabel(panel.label)
        if fewer:
            axis.set_title(f"fewer seeds here, down to {min(fewer)}", color="0.4")
        if empty:
            no_data(axis, panel.tag)
            axis.set_yticks([])
        elif spans(pd.concat(shown), panel.log_from):
            axis.set_yscale("log")
            log_axis(axis.yaxis)
        if panel.tag.endswith("dead_units"):
            whole_numbers(axis.yaxis)
        if x == "hours":
            axis.set_xlabel("hours")
        else:
            steps_axis(axis, next(iter(curves.values()))[0])
    band = plt.Rectangle((0, 0), 1, 1, color="0.88")
    words = "minimum to maximum" if aggregate == "mean" else "95 % interval of the interquartile mean"
    legend(figure, axes, **({words: band} if any(len(runs) > 1 for runs in ours) else {}))
    figure.align_ylabels()
    columns = ["tag", "curve", "source", x.removesuffix("s"), middle, low, high, "seeds"]
    return figure, pd.concat(numbers)[columns]


def look(i):
    """Colour, dashes and marker of the curve or points number i; they come together again after 49."""
    mark = (i + i // len(COLOURS)) % len(MARKERS)
    return COLOURS[i % len(COLOURS)], DASHES[mark], MARKERS[mark]


def by_source(runs, label):
    """{(label, source): runs} with ours before the paper's, in the order of ``label(run)``."""
    found = defaultdict(list)
    for run in sorted(runs, key=lambda run: (label(run), run.source != "runs")):
        found[label(run), run.source].append(run)
    return found


def variant_of(args):
    """What stands behind the number of figure 1 or 2 in the names of its files, so that no option hides another."""
    parts = (
        ["iqm"] * (args.aggregate == "iqm") + ["hours"] * (args.x == "hours") + ["human"] * (args.normalise == "human")
    )
    return "".join(f"_{part}" for part in parts)


def curves_by_epochs(drawn, runs, output, number, panels, columns, args):
    """Baselines, a curve for each number of epochs, per environment and learning rate schedule."""
    lacking = f"none of figure {number}'s measures in its logs: {', '.join(panel.tag for panel in panels)}"
    runs = drawn.keep(runs, lacking, lambda run: any(curve_of(run, panel.tag).notna().any() for panel in panels))
    for key, members in by_place([run for run in runs if run.intervention == "none"]).items():
        for (schedule,), chosen in groups(members, "schedule").items():
            curves = {
                (f"{epochs} epochs", source): same
                for (epochs, source), same in by_source(chosen, lambda run: run.epochs).items()
            }
            figure, numbers = draw_curves(curves, panels, columns, args.x, args.aggregate)
            figure.suptitle(title_of(chosen, f"{schedule} learning rate"))
            path = output / file_name(f"figure{number}{variant_of(args)}_{key}_{schedule}")
            drawn.save(figure, numbers, path, chosen)


def timed(drawn, runs, args):
    """The runs that can be drawn over --x: all over steps, over hours those that logged how fast they were."""
    untimed = "no charts/SPS in its logs, which --x hours needs"
    return drawn.keep(runs, untimed, lambda run: args.x == "steps" or len(run.get("charts/SPS")))


def figure_1(drawn, runs, output, args):
    """Return, ranks, norm and plasticity over training, by epochs; and at each number of epochs by intervention."""
    panels = (replace(FIGURE_1[0], label=HUMAN), *FIGURE_1[1:]) if args.normalise == "human" else FIGURE_1
    curves_by_epochs(drawn, runs, output, 1, panels, 3, args)
    intervened = drawn.keep(
        runs,
        "an intervention with an annealed learning rate: figure 1 compares interventions at a constant one",
        lambda run: run.schedule == "constant" or run.intervention == "none",
    )
    intervened = [run for run in intervened if run.schedule == "constant"]
    for key, members in by_place(intervened).items():
        for (epochs,), chosen in groups(members, "epochs").items():
            if all(run.intervention == "none" for run in chosen):
                continue
            curves = {
                (name, source): same
                for ((_, name), source), same in by_source(chosen, lambda run: order_of(run.intervention)).items()
            }
            figure, numbers = draw_curves(curves, panels, 3, args.x, args.aggregate)
            figure.suptitle(title_of(chosen, f"{epochs} epochs", "constant learning rate"))
            path = output / file_name(f"figure1{variant_of(args)}_{key}_{epochs}epochs_interventions")
            drawn.save(figure, numbers, path, [run for run in chosen if run.intervention != "none"])


def figure_2(drawn, runs, output, args):
    """Entropy, policy variance and dead units over training, by epochs."""
    runs = drawn.keep(runs, "an intervention: figure 2 is of baselines", lambda run: run.intervention == "none")
    curves_by_epochs(drawn, runs, output, 2, FIGURE_2, 3, args)


def figure_3(drawn, runs, output, args):
    """Each run on its own: what falls first."""
    for run in runs:
        figure, axes = plt.subplots(2, 3, figsize=(9.9, 5.2), layout="constrained", sharex=True)
        numbers, when = [], collapse(run)["collapsed"]
        for axis, panel in zip(axes.flat, FIGURE_3, strict=True):
            series = curve_of(run, panel.tag) * (-1 if panel.tag.endswith("policy_loss") else 1)
            if series.empty:
                no_data(axis, panel.tag)
                axis.set_yticks([])
            elif panel.smoothed:
                axis.plot(series, color="0.75", linewidth=0.7, label="logged")
                axis.plot(smooth(series, run.every), color=COLOURS[0], linewidth=1.4, label="moving average")
            else:
                axis.plot(series, color=COLOURS[0], linewidth=1.4, marker="o", markersize=2.5)
            if when is not None:
                axis.axvline(when, color=COLOURS[3], linestyle="--", linewidth=1.1, label="collapsed")
            axis.set_ylabel(panel.label)
            if spans(series[series > 0], panel.log_from):
                axis.set_yscale("log")
                log_axis(axis.yaxis)
            shown = smooth(series, run.every) if panel.smoothed else series
            table = pd.DataFrame({"logged": series, "drawn": shown}).rename_axis("step").reset_index()
            numbers.append(table.assign(tag=panel.tag))
        for axis in axes[-1]:
            steps_axis(axis, run)
        legend(figure, axes)
        figure.align_ylabels()
        figure.suptitle(str(run))
        path = output / file_name(f"figure3_{run.name if run.source == 'runs' else str(run)}")
        drawn.save(figure, pd.concat(numbers)[["tag", "step", "logged", "drawn"]], path, [run])


def constant_baselines(drawn, runs, number):
    """The baselines with a constant learning rate."""
    runs = drawn.keep(runs, f"an intervention: figure {number} is of baselines", lambda run: run.intervention == "none")
    return drawn.keep(
        runs,
        f"its learning rate is annealed: figure {number} is of constant ones",
        lambda run: run.schedule == "constant",
    )


def figure_4(drawn, runs, output, args):
    """How far the ratios fall below 1 − ε against the representation, in the windows in which they fall furthest."""
    runs = constant_baselines(drawn, runs, 4)
    runs = drawn.keep(runs, "no ratio below 1 − ε", lambda run: len(run.get("trust_region/ratio_below_mean")))
    for key, members in by_place(runs).items():
        for (source,), chosen in groups(members, "source").items():
            width = args.window or WINDOW[chosen[0].suite]
            tables = [lowest_windows(run, width).assign(run=run.name, epochs=run.epochs) for run in chosen]
            numbers = pd.concat(tables).reset_index()
            epochs = sorted(numbers["epochs"].unique())
            figure, axes = plt.subplots(1, 3, figsize=(9.9, 3.3), layout="constrained", sharey=True)
            statistics = []
            for axis, (name, label) in zip(axes, FIGURE_4.items(), strict=True):
                points = numbers[[name, "ratio_below", "epochs"]].replace([np.inf, -np.inf], np.nan).dropna()
                log = name == "preactivation_norm" and bool((points[name] > 0).all())
                for i, count in enumerate(epochs):
                    x, y = points.loc[points["epochs"] == count, [name, "ratio_below"]].to_numpy().T
                    colour, _, mark = look(i)
                    style = {"color": colour, "marker": mark, "s": 14, "linewidths": 0.7}
                    axis.scatter(x, y, facecolors="none" if i % 2 else None, label=f"{count} epochs", **_edge(style, i))
                x, y = points[name].to_numpy(), points["ratio_below"].to_numpy()
                if len(np.unique(x)) > 1:
                    on_axis = np.log10(x) if log else x
                    fit = stats.linregress(on_axis, y)
                    ends = np.array([on_axis.min(), on_axis.max()])
                    line = fit.intercept + fit.slope * ends
                    axis.plot(10**ends if log else ends, line, color="black", linewidth=1.4, label="regression line")
                    tau, rho = correlations(x, y)
                    axis.set_title(f"Kendall's τ = {tau:.2f}, Spearman's ρ = {rho:.2f}".replace("-", "−"))
                    x_is = f"log10 {name}" if log else name
                    statistics.append((name, len(x), tau, rho, x_is, fit.slope, fit.intercept))
                else:
                    axis.set_title("τ and ρ undefined: constant")
                if log:
                    axis.set_xscale("log")
                    log_axis(axis.xaxis)
                if name == "dead_units":
                    whole_numbers(axis.xaxis)
                axis.set_xlabel(label)
            low, high = points["ratio_below"].min(), points["ratio_below"].max()
            if low < high:  # the points' axis: where the line would leave what ratios there are, it ends
                axes[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
            axes[0].set_ylabel("mean ratio below 1 − ε")
            legend(figure, axes)
            words = [number_of(chosen, "run"), f"windows of {width:,} environment steps".replace(",", "\u2009")]
            words += ["the paper’s logs"] if source == "paper" else []
            figure.suptitle(title_of(chosen, *words))
            path = output / file_name(f"figure4_{key}{'' if source == 'runs' else '_paper'}")
            drawn.save(figure, numbers[["run", "epochs", "window_start", "ratio_below", *FIGURE_4]], path, chosen)
            columns = ["measure", "points", "kendall_tau", "spearman_rho", "regressed_on", "slope", "intercept"]
            table = pd.DataFrame(statistics, columns=columns)
            with writing(path.with_name(f"{path.name}_statistics.csv")) as path:
                table.to_csv(path, index=False, float_format="%.6g")


def _edge(style, i):
    """A hollow marker needs its colour as the edge's."""
    return {"edgecolors": style.pop("color"), **style} if i % 2 else style


def figure_6(drawn, runs, output, args):
    """The end of training by intervention, all epochs together."""
    labels = {**FIGURE_6, "return": HUMAN} if args.normalise == "human" else FIGURE_6
    runs = drawn.keep(runs, "in progress: figure 6 is of the end of training", lambda run: run.finished)
    runs = drawn.keep(
        runs, "its learning rate is annealed: figure 6 is of constant ones", lambda run: run.schedule == "constant"
    )
    for key, chosen in by_place(runs).items():
        numbers = pd.DataFrame(
            [
                {
                    "intervention": run.intervention,
                    "source": run.source,
                    "epochs": run.epochs,
                    "seed": run.seed,
                    "run": run.name,
                    **final_values(run),
                }
                for run in chosen
            ]
        )
        boxes = sorted(
            set(zip(numbers["intervention"], numbers["source"], strict=True)),
            key=lambda box: (order_of(box[0]), box[1] != "runs"),
        )
        epochs = sorted(numbers["epochs"].unique())
        sizes = numbers.groupby(["intervention", "source"]).size()
        height = 0.31 * len(boxes) + 0.75
        figure, axes = plt.subplots(2, 3, figsize=(9.9, 2 * height + 0.7), layout="constrained", sharey=True)
        for axis, (name, label) in zip(axes.flat, labels.items(), strict=True):
            axis.set_xlabel(label)
            finite = numbers[np.isfinite(numbers[name])]
            infinite = int(np.isinf(numbers[name]).sum())
            if infinite:
                axis.set_title(f"{infinite} infinite, not drawn", color="0.4")
            if finite.empty:
                if not infinite:
                    no_data(axis, name)
                continue
            if spans(finite[name], FIGURE_6_LOG_FROM.get(name, math.inf)):
                axis.set_xscale("log")
            for y, (intervention, source) in enumerate(boxes):
                box = finite[(finite["intervention"] == intervention) & (finite["source"] == source)]
                if len(box) < sizes[intervention, source]:
                    place_of = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "center", "color": "0.4"}
                    place_of |= {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
                    axis.text(1, y - 0.36, f"here {len(box)}", fontsize=7, **place_of)
                if box.empty:
                    continue
                axis.boxplot(
                    [box[name]],
                    positions=[y],
                    orientation="horizontal",
                    widths=0.62,
                    showmeans=True,
                    showfliers=False,  # every run is a point
                    patch_artist=True,
                    boxprops={"facecolor": COLOURS[5 if source == "paper" else 4], "alpha": 0.45, "linewidth": 0.8},
                    medianprops={"color": "black", "linewidth": 1.6},
                    meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black", "markersize": 5},
                )
                for i, count in enumerate(epochs):
                    values = np.sort(box.loc[box["epochs"] == count, name])
                    offset = 0.2 * (i - (len(epochs) - 1) / 2)
                    style = {
                        "marker": MARKERS[i % len(MARKERS)],
                        "s": 9,
                        "color": "0.15",
                        "linewidths": 0.5,
                        "zorder": 3,
                    }
                    axis.scatter(values, np.full(len(values), y + offset), label=f"{count} epochs", alpha=0.7, **style)
            if name == "dead_units":
                whole_numbers(axis.xaxis)
            if axis.get_xscale() == "log":
                log_axis(axis.xaxis)
        of_box = numbers.groupby(["intervention", "source"])["epochs"].unique().map(sorted).map(tuple)
        names = []
        for box in boxes:
            # Pools of different epochs are not alike, which has to be seen.
            words = [str(sizes[box]), *([f"{'+'.join(map(str, of_box[box]))} epochs"] if of_box.nunique() > 1 else [])]
            names.append(f"{box[0]}{', the paper’s logs' if box[1] == 'paper' else ''} ({', '.join(words)})")
        axes[0, 0].set_yticks(range(len(boxes)), names)
        axes[0, 0].invert_yaxis()
        mean = plt.Line2D([], [], marker="D", markerfacecolor="white", markeredgecolor="black", linestyle="")
        legend(figure, axes, median=plt.Line2D([], [], color="black", linewidth=1.6), mean=mean)
        figure.suptitle(title_of(chosen, "the last 5 % of training (number of runs in brackets)"))
        drawn.save(figure, numbers, output / file_name(f"figure6{variant_of(args)}_{key}"), chosen)


def figure_7(drawn, runs, output, args):
    """How the five definitions of rank agree within a run: the mean over runs and the worst run."""
    runs = constant_baselines(drawn, runs, 7)
    runs = drawn.keep(runs, "it lacks ranks in two iterations", lambda run: len(ranks_of(run)) > 1)
    if not args.keep_constant_ranks:
        for rank in RANKS:
            reason = f"its {rank} is constant; --keep-constant-ranks would keep it"
            runs = drawn.keep(runs, reason, lambda run, rank=rank: ranks_of(run)[rank].nunique() > 1)
    for (suite, activation, source), chosen in groups(runs, "suite", "activation", "source").items():
        found = np.stack([rank_agreement(ranks_of(run)) for run in chosen])  # (runs, 4, 5, 5)
        figure, axes = plt.subplots(2, 4, figsize=(10.5, 5.4), layout="constrained", sharex=True, sharey=True)
        numbers = []
        with warnings.catch_warnings():  # of a rank that is constant in every run, whose cells stay empty
            warnings.simplefilter("ignore", RuntimeWarning)
            rows = {"mean": np.nanmean(found, 0), "minimum": np.nanmin(found, 0)}
        for row, (over_runs, matrices) in enumerate(rows.items()):
            for axis, measure, matrix in zip(axes[row], AGREEMENTS, matrices, strict=True):
                image = axis.imshow(matrix, cmap="cividis", vmin=min(0, np.nanmin(found)), vmax=1)
                for i, j in itertools.product(range(len(RANKS)), repeat=2):
                    value = matrix[i, j]
                    dark = image.norm(value) < 0.55  # false for an empty, white cell
                    text = f"{value:.2f}".replace("-", "−").replace("nan", "–")
                    axis.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
                    numbers.append((over_runs, measure, RANKS[i], RANKS[j], value))
                if row == 0:
                    axis.set_title(measure)
                axis.set_xticks(range(len(RANKS)), RANK_NAMES, rotation=45)
                axis.set_yticks(range(len(RANKS)), RANK_NAMES)
                axis.grid(False)
                axis.spines[:].set_visible(False)
                axis.tick_params(length=0)
            axes[row, 0].set_ylabel(f"{over_runs} over runs")
        figure.colorbar(image, ax=axes, label="agreement (1 is equal)", shrink=0.7)
        envs = sorted({run.env_id for run in chosen})
        words = [suite, activation, f"{number_of(chosen, 'run')}, {', '.join(envs)}"]
        figure.suptitle(", ".join(words + (["the paper’s logs"] if source == "paper" else [])))
        table = pd.DataFrame(numbers, columns=["over_runs", "measure", "rank", "other_rank", "value"])
        path = output / f"figure7_{suite}_{file_name(activation)}{'' if source == 'runs' else '_paper'}"
        drawn.save(figure, table, path, chosen)


FIGURES = {1: figure_1, 2: figure_2, 3: figure_3, 4: figure_4, 6: figure_6, 7: figure_7}


@dataclass
class Args:
    figure: tuple[Literal[1, 2, 3, 4, 6, 7], ...] = ()
    """numbers of the figures to draw, those of the paper; at least one"""
    runs: tuple[str, ...] = ("runs",)
    """run folders, folders of runs, files of benchmark.logs, the paper's CSV logs, or quoted patterns of these"""
    output: Path = Path("figures")
    """folder of the PNG, PDF and CSV files"""
    window: int = 0
    """environment steps of figure 4's windows; 0 is the paper's, 1 M on Atari and 50 k on MuJoCo"""
    x: Literal["steps", "hours"] = "steps"
    """what figures 1 and 2 are drawn over; hours are of runs that logged charts/SPS"""
    aggregate: Literal["mean", "iqm"] = "mean"
    """what figures 1 and 2 draw of the seeds: mean and range, or interquartile mean and its 95 % bootstrap interval"""
    normalise: Literal["none", "human"] = "none"
    """human: draw Atari's returns in figures 1 and 6 in human units, 0 random play and 1 a human's score"""
    keep_constant_ranks: bool = False
    """keep in figure 7 the runs in which a rank is constant, without that rank (the paper leaves these runs out)"""


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "window", low=0, high=10**9)
    check_folder(args.output)
    if not args.figure:
        fail(f"--figure: must be given, as one or more of {', '.join(map(str, FIGURES))}")
    for name, usual, of in (("x", "steps", {1, 2}), ("aggregate", "mean", {1, 2}), ("normalise", "none", {1, 6})):
        if (value := getattr(args, name)) != usual and not {*args.figure} <= of:
            others = ", ".join(map(str, sorted({*args.figure} - of)))
            fail(f"--{name} {value}: must go with --figure {' and '.join(map(str, sorted(of)))} alone, not {others}")
    runs, left_out, notes = read_runs(args.runs)
    if args.normalise == "human":
        runs, without = human.normalise(runs)
        left_out += without
    print_left_out(left_out, notes)
    if not runs:
        fail(f"--runs {' '.join(args.runs)}: no run in it can be used", code=1)
    make_folder(args.output)
    print("\n".join([f"{len(runs)} runs read:", *settings_table(runs)]))
    missing = []
    with plt.rc_context(STYLE):
        for number in dict.fromkeys(args.figure):
            drawn = Drawn()
            FIGURES[number](drawn, timed(drawn, runs, args), args.output, args)
            drawn.report(number, runs, left_out, args.output, variant_of(args))
            missing += [number] * (not drawn.paths)
    if missing:
        fail(f"--figure {' '.join(map(str, missing))}: these runs have nothing to draw for it", code=1)
