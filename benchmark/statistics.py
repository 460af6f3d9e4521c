"""Statistics of runs that collapse or don't: when events came, what went with them, and which setting returns more.

    python -m benchmark.statistics --runs runs/ --output figures

Writes, for each environment (on MuJoCo and its activation) and learning rate schedule, Kaplan–Meier curves of the time
to each event and curves of all runs aligned at the step at which their ratios broke, as PNG, PDF and CSV; the log-rank
tests, survival.md and .csv; the probability that a run of one setting returns more than one of another, improvement.md
and .csv; and rliable_{suite}_scores.npz and _curves.npz, for https://github.com/google-research/rliable, whose library
and metrics have what is called here:

    file = np.load("rliable_Atari_scores.npz")
    scores = {name: file[name] for name in file.files if name != "tasks"}  # of each setting, (runs, tasks)
    points, intervals = get_interval_estimates(scores, lambda x: np.array([aggregate_iqm(x)]))

The curves are (runs, tasks, frames), with ``frames``, environment steps, as well. Exit codes: 0, 1 if no run can be
used, 2 for a wrong command line.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd

from benchmark import human
from benchmark.figures import STYLE, Drawn, curve_of, groups, legend, log_axis, look, place, spans, steps_axis, title_of
from benchmark.logs import (
    DIAGNOSED,
    INTERVENTIONS,
    RETURN,
    describe,
    file_name,
    order_of,
    print_left_out,
    read_runs,
    read_table,
    settings_table,
    writing,
)
from benchmark.measures import final_return, settled, settled_return, spacing
from benchmark.remedies import holm
from benchmark.survival import EVENTS, Time, kaplan_meier, logrank, median_time, restricted_mean, times_of
from benchmark.table import improvement_interval, probability_of_improvement
from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALIGNED = {
    RETURN: "return",
    DIAGNOSED: "PCA rank of the\npolicy's features",
    "representation/before/actor/preactivation_norm": "norm of the policy's\npre-activations",
    "representation/after/actor/dead_units": "dead units\nof the policy",
}


def by_figure(runs):
    """{(name of the files, title): runs} of each environment, activation, schedule and source."""
    found = {}
    for (key, schedule, source), members in groups_of(runs):
        name = file_name(f"{key}_{schedule}{'' if source == 'runs' else '_paper'}")
        words = [f"{schedule} learning rate", *(["the paper’s logs"] if source == "paper" else [])]
        found[name, title_of(members, *words)] = members
    return found


def groups_of(runs):
    keys = sorted({(place(run), run.schedule, run.source) for run in runs})
    return [(key, [run for run in runs if (place(run), run.schedule, run.source) == key]) for key in keys]


def by_setting(runs):
    """{(intervention, epochs): runs}, no intervention first."""
    found = groups(runs, "intervention", "epochs")
    return dict(sorted(found.items(), key=lambda item: (order_of(item[0][0]), item[0][1])))


def rows_of_epochs(runs, columns, height):
    """A figure with a row of panels for each number of epochs: (figure, {epochs: axes}, {intervention: its look})."""
    epochs = sorted({run.epochs for run in runs})
    shape = {"sharex": True, "sharey": "col", "squeeze": False, "layout": "constrained"}
    size = (3.3 * columns if columns < 4 else 11.6, height * len(epochs) + 0.7)
    figure, axes = plt.subplots(len(epochs), columns, figsize=size, **shape)
    # Each intervention of the paper has its colour, whichever others there are.
    names = list(dict.fromkeys([*INTERVENTIONS, *(intervention for intervention, _ in by_setting(runs))]))
    return figure, dict(zip(epochs, axes, strict=True)), {name: look(i) for i, name in enumerate(names)}


def read_times(path, runs):
    """{name of the run: {event: Time}} of each of ``runs`` from a ``runs.csv`` of benchmark.table, --events."""
    table = read_table("--events", path, ("run", "last_step", *EVENTS))
    numbers = table[["last_step", *EVENTS]].apply(pd.to_numeric, errors="coerce")
    if numbers["last_step"].isna().any() or (numbers[[*EVENTS]].isna() & table[[*EVENTS]].notna()).any(axis=None):
        fail(f"--events {path}: must have steps, as numbers, in the columns last_step, {', '.join(EVENTS)}")
    rows = dict(zip(table["run"], numbers.to_dict("records"), strict=True))
    if lacking := [run.name for run in runs if run.name not in rows]:
        fail(f"--events {path}: must have a row for each run of --runs, and has none for {lacking[0]}")
    times = {}
    for run in runs:
        last = int(rows[run.name]["last_step"])
        steps = {event: rows[run.name][event] for event in EVENTS}
        times[run.name] = {
            event: Time(last, False, last) if math.isnan(step) else Time(int(step), True, last)
            for event, step in steps.items()
        }
    return times


def draw_survival(runs, times):
    """Kaplan–Meier curves: a row of panels for each number of epochs, a column for each event, and their numbers.

    times: {name of the run: {event: Time}}.
    """
    figure, axes, looks = rows_of_epochs(runs, len(EVENTS), 2.3)
    numbers = []
    for (intervention, epochs), members in by_setting(runs).items():
        colour, dashes, _ = looks[intervention]
        for axis, (event, words) in zip(axes[epochs], EVENTS.items(), strict=True):
            curve = kaplan_meier([times[run.name][event] for run in members])
            style = {"color": colour, "linestyle": dashes, "linewidth": 1.5, "label": intervention}
            axis.step(curve["step"], curve["survival"], where="post", **style)
            axis.fill_between(curve["step"], curve["low"], curve["high"], step="post", color=colour, alpha=0.1, lw=0)
            ends = curve[curve["censored"] > 0]
            mark = {"linestyle": "", "marker": "|", "markersize": 9, "markeredgewidth": 1.6, "color": colour}
            axis.plot(ends["step"], ends["survival"], **mark)
            axis.set_ylim(-0.04, 1.04)
            row = {"event": words, "epochs": epochs, "intervention": intervention, "runs": len(members)}
            numbers.append(curve.assign(**row)[[*row, *curve.columns]])
    for axis, words in zip(next(iter(axes.values())), EVENTS.values(), strict=True):
        axis.set_title(words)
    for epochs, row in axes.items():
        row[0].set_ylabel(f"{epochs} epochs\nshare of runs without")
    for axis in list(axes.values())[-1]:
        steps_axis(axis, runs[0])
    grey = {"color": "0.3", "linestyle": ""}
    legend(
        figure,
        np.array(list(axes.values())),
        **{
            "censored": plt.Line2D([], [], marker="|", markersize=9, markeredgewidth=1.6, **grey),
            "95 % interval": plt.Rectangle((0, 0), 1, 1, color="0.9"),
        },
    )
    return figure, pd.concat(numbers, ignore_index=True)


def after_break(run, tag, step, width):
    """A run's series at multiples of ``width`` environment steps after ``step``, its last value at each.

    Of what noise leaves, as events are, so that falls stay where they were.
    """
    series = settled_return(run)[0] if tag == RETURN else settled(curve_of(run, tag).dropna(), run)
    if series.empty:
        return series
    series.index = series.index - step
    first, last = math.ceil(series.index[0] / width), math.floor(series.index[-1] / width)
    return series.reindex(width * np.arange(first, last + 1), method="ffill")


def draw_aligned(runs, times):
    """Curves of Runs whose ratios broke, over the steps since: each run, and a setting's mean where all its runs are.

    times: as for ``draw_survival``. Returns the figure and the numbers of the runs.
    """
    figure, axes, looks = rows_of_epochs(runs, len(ALIGNED), 2.2)
    broken = {run.name: times[run.name]["ratio_broken"].step for run in runs}
    width = max(int(max(spacing(run.grid) for run in runs)), 1)  # of the coarsest
    numbers = []
    for (intervention, epochs), members in by_setting(runs).items():
        colour, dashes, _ = looks[intervention]
        for axis, tag in zip(axes[epochs], ALIGNED, strict=True):
            curves = {run.name: after_break(run, tag, broken[run.name], width) for run in members}
            table = pd.DataFrame({name: curve for name, curve in curves.items() if len(curve)}).sort_index()
            axis.plot(table.index, table, color=colour, linewidth=0.6, alpha=0.35)
            mean = table[table.notna().all(axis=1)].mean(axis=1)
            axis.plot(mean.index, mean, color=colour, linestyle=dashes, linewidth=1.8, label=intervention)
            for run in members:
                curve = curves[run.name]
                row = {"tag": tag, "epochs": epochs, "intervention": intervention, "seed": run.seed}
                row["ratio_broken"] = broken[run.name]
                numbers.append(pd.DataFrame({**row, "steps_after": curve.index, "value": curve.to_numpy()}))
    numbers = pd.concat(numbers, ignore_index=True)
    for epochs, row in axes.items():
        for axis, (tag, label) in zip(row, ALIGNED.items(), strict=True):
            axis.axvline(0, color="0.2", linewidth=0.9, linestyle=":")
            values = numbers.loc[numbers["tag"] == tag, "value"]
            if tag.endswith("preactivation_norm") and len(values) and spans(values, 10):
                axis.set_yscale("log")
                log_axis(axis.yaxis)
            axis.set_ylabel(label)
        row[0].set_ylabel(f"{epochs} epochs\n{ALIGNED[RETURN]}")
    for axis in list(axes.values())[-1]:
        steps_axis(axis, runs[0])
        axis.set_xlabel("steps after the ratios broke")
    thin = plt.Line2D([], [], color="0.5", linewidth=0.6)
    legend(figure, np.array(list(axes.values())), **{"a run each; thick: mean of all runs of a setting": thin})
    figure.align_ylabels()
    return figure, numbers


# Log-rank tests

QUESTIONS = {"intervention": "against no intervention", "epochs": "against the fewest epochs"}


def comparisons(runs, times):
    """A row for each event and setting of ``runs``, which are of one place: how many, when, and the log-rank tests.

    Two questions are asked of a setting: whether its times differ from those without intervention at the same number of
    epochs, and from those with the same intervention at the fewest epochs. p_{question} is by permutation,
    p_asymptotic_{question} the usual approximation, and p_holm_{question} the first adjusted for the number of settings
    of which the question is asked.
    """
    settings = by_setting(runs)
    # The restricted means are up to where the curve of each setting is known.
    until = min(max(times[run.name][event].last_step for run in x for event in EVENTS) for x in settings.values())
    rows = []
    for event, words in EVENTS.items():
        of = {key: [times[run.name][event] for run in members] for key, members in settings.items()}
        part = []
        for (intervention, epochs), mine in of.items():
            row = {"event": words, "intervention": intervention, "epochs": epochs, "runs": len(mine)}
            row |= {"events": sum(time.happened for time in mine), "median": median_time(mine)}
            row |= {"restricted_mean": restricted_mean(mine, until), "until": until}
            fewest = min(count for name, count in of if name == intervention)
            references = {
                "intervention": of.get(("none", epochs)) if intervention != "none" else None,
                "epochs": of[intervention, fewest] if epochs > fewest else None,
            }
            for question, reference in references.items():
                p, permuted = logrank(mine, reference or [])
                row |= {f"p_{question}": permuted, f"p_asymptotic_{question}": p}
            part.append(row)
        for question in QUESTIONS:
            for row, adjusted in zip(part, holm([row[f"p_{question}"] for row in part]), strict=True):
                row[f"p_holm_{question}"] = adjusted
        rows += part
    return pd.DataFrame(rows)


def survival_markdown(tables):
    """{title: table of comparisons} as Markdown, a table for each event."""

    def number(p):
        return "–" if math.isnan(p) else f"{p:.2g}"

    lines = ["# Times to events, with runs to which they did not happen as censored", ""]
    for title, table in tables.items():
        for event, part in table.groupby("event", sort=False):
            head = ["intervention", "epochs", "runs", "events", "median time, M steps", "restricted mean, M steps"]
            asked = [question for question in QUESTIONS if part[f"p_{question}"].notna().any()]
            head += [f"log-rank p {QUESTIONS[question]} (asymptotic; Holm)" for question in asked]
            lines += [f"## {title}: {event}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
            for row in part.to_dict("records"):
                median = "not reached" if math.isnan(row["median"]) else f"{row['median'] / 1e6:.2f}"
                cells = [row[name] for name in ("intervention", "epochs", "runs", "events")]
                cells += [median, f"{row['restricted_mean'] / 1e6:.2f}"]
                for question in asked:
                    p, asymptotic, adjusted = (row[f"p{kind}_{question}"] for kind in ("", "_asymptotic", "_holm"))
                    known = f"{number(p)} ({number(asymptotic)}; {number(adjusted)})"
                    cells.append("–" if math.isnan(p) else known)
                lines.append(f"| {' | '.join(map(str, cells))} |")
            lines.append("")
    lines += [
        "Medians are Kaplan and Meier's: the first step from which on at most half of the runs are without the event; "
        "not reached where more than half stayed without. Restricted means are the areas under the curves, up to the "
        "step until which each setting of a table has been followed (in survival.csv). p: of the log-rank statistic "
        "among all ways to deal the runs to the two settings; in brackets that of its normal approximation, which is "
        "too small for few runs, and the first adjusted by Holm's method for the settings of which a table asks the "
        "same question. Nothing is adjusted for the number of tables.",
        "",
    ]
    return "\n".join(lines)


# Probabilities of improvement


def setting_words(run):
    return ", ".join(describe(run)[1:])


def improvements(runs, seed, resamples):
    """A row for any two settings of one environment: the probability that a run of the first returns more than one of
    the second, ties half, with its 95 % bootstrap interval over runs. ``runs`` are finished; returns are final_return.

    Each row's bootstrap begins from ``seed``, so that its interval is the same whatever other runs there are.
    """
    rows = []
    for (env_id,), members in groups(runs, "env_id").items():
        order = sorted(
            members, key=lambda run: (run.source, run.activation, run.schedule, run.epochs, order_of(run.intervention))
        )
        settings = list(dict.fromkeys(run.setting for run in order))
        returns = {x: np.array([final_return(run) for run in order if run.setting == x]) for x in settings}
        words = {run.setting: setting_words(run) for run in order}
        for x in settings:
            for y in settings:
                if x == y:
                    continue
                row = {"env_id": env_id, "setting": words[x], "other": words[y], "runs": len(returns[x])}
                row |= {
                    "other_runs": len(returns[y]),
                    "probability": probability_of_improvement(returns[x], returns[y]),
                }
                row["low"], row["high"] = math.nan, math.nan
                if min(len(returns[x]), len(returns[y])) > 1:
                    rng = np.random.default_rng(seed)
                    row["low"], row["high"] = improvement_interval([(returns[x], returns[y])], rng, resamples)
                rows.append(row)
    columns = ["env_id", "setting", "other", "runs", "other_runs", "probability", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def improvement_markdown(table):
    """The table of ``improvements`` as a matrix for each environment."""
    lines = ["# Probability that a run of the row's setting returns more at the end than one of the column's", ""]
    for env_id, part in table.groupby("env_id", sort=False):
        settings = list(dict.fromkeys(part["setting"]))
        cells = part.set_index(["setting", "other"])
        head = ["", "runs", *(f"{i}." for i in range(1, len(settings) + 1))]
        lines += [f"## {env_id}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for i, setting in enumerate(settings, 1):
            row = [f"{i}. {setting}", str(part.loc[part["setting"] == setting, "runs"].iloc[0])]
            for other in settings:
                if setting == other:
                    row.append("–")
                    continue
                found = cells.loc[(setting, other)]
                known = f" ({found['low']:.2f} to {found['high']:.2f})" if math.isfinite(found["low"]) else ""
                row.append(f"{found['probability']:.2f}{known}")
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    lines += [
        "0.5 is no difference; ties count half. In brackets: 95 % percentile bootstrap intervals over runs, not "
        "adjusted for the number of pairs. With five runs of each they are too narrow rather than too wide.",
        "",
    ]
    return "\n".join(lines)


# For rliable


def for_rliable(runs):
    """Scores and curves of finished runs of one suite, for rliable, and lines that say what is left out of them.

    A setting is an algorithm, an environment a task. rliable takes arrays without holes: of a setting with more runs of
    one task than of another those of the lowest seeds are taken, and one that lacks a task is left out.
    Returns {setting: (runs, tasks)} with "tasks", their names; {setting: (runs, tasks, frames)} with "tasks" and
    "frames", the environment steps of the coarsest run from which on all runs have a return, up to where the shortest
    ends, at each of which stands the mean return of the latest rollout in which an episode ended; and [line].
    """
    tasks = sorted({run.env_id for run in runs})
    coarsest = max(runs, key=lambda run: spacing(run.grid))
    first, last = max(run.get(RETURN).index[0] for run in runs), min(run.last_step for run in runs)
    frames = coarsest.grid[(coarsest.grid >= first) & (coarsest.grid <= last)].to_numpy()
    algorithms, lines = {}, []
    for run in sorted(runs, key=lambda run: (setting_words(run), run.seed)):
        algorithms.setdefault(setting_words(run), {}).setdefault(run.env_id, []).append(run)
    scores, curves = ({"tasks": np.array(tasks)} for _ in range(2))
    curves["frames"] = frames
    for name, by_task in algorithms.items():
        if lacking := [task for task in tasks if task not in by_task]:
            lines.append(f"{name}: not exported, without finished runs of {', '.join(lacking)}")
            continue
        count = min(map(len, by_task.values()))
        more = [f"{run.env_id} seed {run.seed}" for task in tasks for run in by_task[task][count:]]
        if more:
            lines.append(f"{name}: {count} runs of each task are exported, without {', '.join(more)}")
        chosen = [[by_task[task][i] for task in tasks] for i in range(count)]
        scores[name] = np.array([[final_return(run) for run in row] for row in chosen])
        curves[name] = np.array(
            [[run.carried_return().dropna().reindex(frames, method="ffill") for run in row] for row in chosen]
        )
    return scores, curves, lines


@dataclass
class Args:
    runs: tuple[str, ...] = ("runs",)
    """run folders, folders of runs, files of benchmark.logs, the paper's CSV logs, or quoted patterns of these"""
    output: Path = Path("figures")
    """folder of the figures, tables and arrays"""
    normalise: Literal["none", "human"] = "none"
    """human: export Atari's returns in human units, 0 random play and 1 a human's score; the rest has no units"""
    events: Path | None = None
    """runs.csv of benchmark.table on the whole logs, whose steps of events count in place of those found in --runs:
    from thinned curves, a step from which on something is low for good can be found early by much"""
    resamples: int = 10_000
    """bootstrap samples of each interval"""
    seed: int = 0
    """seed of the bootstrap"""


def write(path, kind, content):
    """Write a table (``csv``), a text (``md``) or arrays (``npz``), under its own name only when it is whole."""
    unfinished = path.with_name(f"{path.name}.tmp.{kind}")
    with writing(path):
        if kind == "csv":
            content.to_csv(unfinished, index=False, float_format="%.6g")
        elif kind == "md":
            unfinished.write_text(content, encoding="utf-8")
        else:
            np.savez_compressed(unfinished, **content)
        unfinished.replace(path)
    print(path)


def main(args):
    check_range(args, "resamples", low=100, high=1_000_000)
    check_range(args, "seed", low=0, high=2**31 - 1)
    check_folder(args.output)
    runs, left_out, notes = read_runs(args.runs)
    left_out += [(run.name, "no episode has ended in it") for run in runs if run.get(RETURN).empty]
    print_left_out(left_out, notes)
    runs = [run for run in runs if not run.get(RETURN).empty]
    if not runs:
        fail(f"--runs {' '.join(args.runs)}: no run in it, with an episode that ended, can be used", code=1)
    finished = [run for run in runs if run.finished]
    exported, without_score = human.normalise(finished) if args.normalise == "human" else (finished, [])
    if args.normalise == "human" and not exported:
        fail("--normalise human: must go with finished runs of Atari games that have a human score; --runs has none")
    times = read_times(args.events, runs) if args.events else {run.name: times_of(run) for run in runs}
    make_folder(args.output)
    print("\n".join([f"{len(runs)} runs used:", *settings_table(runs)]))
    in_progress = [run.name for run in runs if not run.finished]
    if in_progress:
        print(f"in progress, censored at their last step, and of no improvement or export: {', '.join(in_progress)}")
    print_left_out(without_score)

    drawn, tables = Drawn(), {}
    with plt.rc_context(STYLE):
        for (name, title), members in by_figure(runs).items():
            figure, numbers = draw_survival(members, times)
            figure.suptitle(title)
            drawn.save(figure, numbers, args.output / f"survival_{name}", members)
            tables[title] = comparisons(members, times)
            broken = [run for run in members if times[run.name]["ratio_broken"].happened]
            if held := [run.name for run in members if run not in broken]:
                print(f"aligned_{name}: left out, whose ratios never broke: {', '.join(held)}")
            if broken:
                figure, numbers = draw_aligned(broken, times)
                figure.suptitle(f"{title}: aligned at the step at which the excess ratio passed 10")
                drawn.save(figure, numbers, args.output / f"aligned_{name}", broken)
    print("\n".join(f"{path}, .pdf, .csv" for path in drawn.paths))
    write(args.output / "survival.md", "md", survival_markdown(tables))
    survival = pd.concat([table.assign(setting=title) for title, table in tables.items()], ignore_index=True)
    write(args.output / "survival.csv", "csv", survival[["setting", *survival.columns.drop("setting")]])
    table = improvements(finished, args.seed, args.resamples)
    if table.empty:
        print("improvement.md: not written, without finished runs of two settings of one environment")
    else:
        write(args.output / "improvement.md", "md", improvement_markdown(table))
        write(args.output / "improvement.csv", "csv", table)
    for (suite,), members in groups(exported, "suite").items():
        scores, curves, lines = for_rliable(members)
        print("\n".join(lines), end="\n" * bool(lines))
        write(args.output / f"rliable_{suite}_scores.npz", "npz", scores)
        write(args.output / f"rliable_{suite}_curves.npz", "npz", curves)


if __name__ == "__main__":
    main(parse_args(Args))
