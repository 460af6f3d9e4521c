"""Draws diagnoses of runs as one HTML page that opens from a disk without a network: `benchmark.diagnose --report`."""

import math
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pandas as pd
from bokeh.embed import components
from bokeh.models import ColumnDataSource, CustomJSTickFormatter, DataRange1d, HoverTool, Span
from bokeh.plotting import figure
from bokeh.resources import Resources

from benchmark.alarms import NORM, VARIANCE
from benchmark.logs import DIAGNOSED, PLASTICITY, RETURN, describe
from benchmark.measures import excess_ratio, settled
from common.alarms import ALARMS
from common.arguments import fail

LIMIT = 2_000_000  # bytes of a page, of which BokehJS takes two thirds
POINTS = 24_000  # values that fit beside it, at 16 bytes each in base64
LIGHT = ("#0072b2", "#c04f00", "#00795a", "#a33e7c", "#7a6400", "#4b4bb5")  # by run, on white
DARK = ("#56b4e9", "#ff9248", "#2ec4a0", "#e79ac9", "#e0c52e", "#a9a9ff")  # the same on black
DASHES = ("solid", (7, 2), (2, 2), (8, 2, 2, 2))
MARKERS = ("circle", "triangle", "square", "diamond", "inverted_triangle", "star")


class Panel(NamedTuple):
    """One measure over training, and its tags, of which the first that a run has logged is drawn."""

    title: str
    tags: tuple[str, ...]
    log_from: float = math.inf  # logarithmic where the largest value is so many times the least


# By the alarm that watches it, if one does; in the order of docs/diagnostics.md, from cause to effect
PANELS = {
    "norm": Panel("Norm of the actor's pre-activations", (NORM, "representation/before/actor/preactivation_norm"), 1),
    "entropy": Panel("Entropy of the policy", (ALARMS["entropy"].tag, "losses/first_minibatch/entropy")),
    "ratios": Panel("Excess of the ratios over the bounds", (ALARMS["ratios"].tag,), 1),
    "return": Panel("Return", (RETURN,)),
    "rank": Panel("PCA rank of the actor's features", (DIAGNOSED,)),
    "units": Panel("Dead units of the actor", ("representation/after/actor/dead_units",)),
    "critic": Panel("PCA rank of the critic's features", ("representation/after/critic/pca_rank",)),
    "variance": Panel("Variance of the policy over states", (VARIANCE,), 1000),
    "plasticity": Panel("Plasticity loss of the actor", (PLASTICITY["actor"],), 1000),
}


def curve_of(run, panel):
    """The tag that is drawn of a run in a panel, and its series over environment steps, empty without any."""
    for tag in panel.tags:
        series = run.get(tag).dropna()
        if tag == ALARMS["ratios"].tag and series.empty:  # older logs have the two that it is the quotient of
            series = excess_ratio(run).dropna()
        if len(series):
            return tag, series
    return panel.tags[0], series


def labels_of(runs):
    """What to call each run beside the others: its number, what not all have in common, and its seed."""
    settings = [describe(run) for run in runs]
    common = set.intersection(*map(set, settings))
    own = [[word for word in words if word not in common] for words in settings]
    return [
        f"{i}. {', '.join([*words, f'seed {run.seed}'])}"
        for i, (run, words) in enumerate(zip(runs, own, strict=True), 1)
    ]


def thin(series, points):
    """At most ``points`` of a series, evenly spaced, first and last included."""
    return series.iloc[np.unique(np.linspace(0, len(series) - 1, min(points, len(series))).round().astype(int))]


def _source(series, **more):
    steps = series.index.to_numpy()
    small = np.int32 if steps.max() < 2**31 else float  # JavaScript has no arrays of 64-bit integers
    return ColumnDataSource({"x": steps.astype(small), "y": series.to_numpy(float), **more})


def _axes(name, log, x_range):
    plot = figure(
        title=PANELS[name].title,
        name=name,
        x_range=x_range,
        y_axis_type="log" if log else "linear",
        height=240,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,xwheel_zoom,save,reset",
        active_scroll=None,  # or the page could not be scrolled over a plot
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.formatter = CustomJSTickFormatter(
        code="return tick >= 1e6 ? tick / 1e6 + ' M' : tick >= 1e3 ? tick / 1e3 + ' k' : '' + tick"
    )
    plot.title.text_font_size = "13px"
    plot.yaxis.axis_label_text_font_size = "10px"
    return plot


def draw(diagnoses):
    """The figures of what any run has logged, by panel, and notes on what is not drawn.

    A run's values are a faint line, which tells them on hovering, below their running median over 2 % of the run, which
    is what verdicts are of. Events have a sign in the panel of their measure. Of a single run they stand in all panels
    at their step, of several only that since when it is as its verdict says.
    """
    labels = labels_of([x.run for x in diagnoses])
    curves = {name: [curve_of(x.run, panel) for x in diagnoses] for name, panel in PANELS.items()}
    curves = {name: found for name, found in curves.items() if any(len(series) for _, series in found)}
    points = max(POINTS // (2 * len(curves) * len(diagnoses)), 20)
    figures, notes, x_range = {}, [], DataRange1d(range_padding=0.02)
    for name, found in curves.items():
        seen = pd.concat([series for _, series in found])
        seen = seen[np.isfinite(seen) & (seen > 0)]
        log = len(seen) > 0 and seen.max() >= PANELS[name].log_from * seen.min()
        plot = figures[name] = _axes(name, log, x_range)
        plot.yaxis.axis_label = " or ".join(dict.fromkeys(tag for tag, series in found if len(series)))
        lines, signs = [], []
        for i, (diagnosis, label, (tag, series)) in enumerate(zip(diagnoses, labels, found, strict=True)):
            run, ink = diagnosis.run, {"line_color": LIGHT[i % len(LIGHT)], "name": label}
            steps = {x.step for x in diagnosis.events} if len(diagnoses) == 1 else {diagnosis.since} - {None}
            for step in sorted(steps):
                plot.add_layout(Span(location=step, dimension="height", line_dash=(3, 3), line_alpha=0.6, **ink))
            if series.empty:
                continue
            there = series[np.isfinite(series) & ((series > 0) | (not log))]
            if len(there) < len(series):
                why = "infinite, or 0 on a logarithmic axis" if log else "infinite"
                notes.append(f"{label}: {len(series) - len(there)} of {len(series)} values of {tag} are {why}")
            if there.empty:
                continue
            kept, dash = thin(there, points), DASHES[i // len(LIGHT) % len(DASHES)]
            if len(kept) < len(there):
                notes.append(f"{label}: {len(kept)} of {len(there)} values of {tag} are drawn, evenly spaced")
            smooth = name != "plasticity" and len(there) > 20
            wide = {"line_width": 1, "line_alpha": 0.45} if smooth else {"line_width": 2}
            lines.append(plot.line("x", "y", source=_source(kept), line_dash=dash, tags=["values"], **wide, **ink))
            if smooth:
                median = _source(thin(settled(there, run), points))
                plot.line("x", "y", source=median, line_dash=dash, line_width=2.2, **ink)
            own = [x for x in diagnosis.events if x.tag in PANELS[name].tags or x.name == f"alarm {name}"]
            heights = there.reindex(sorted(x.step for x in own), method="ffill").bfill()
            if own:
                words = [f"{x.name}: {x.was:.4g} → {x.now:.4g}; {x.words}" for x in own]
                style = {"size": 11, "marker": MARKERS[i % len(MARKERS)], "line_width": 2, "fill_alpha": 0}
                signs.append(plot.scatter("x", "y", source=_source(heights, words=words), **style, **ink))
        values = [*([("", "$name")] if len(diagnoses) > 1 else []), ("step", "@x{0,0}"), ("", "@y{%.5g}")]
        plot.add_tools(HoverTool(renderers=lines, tooltips=values, formatters={"@y": "printf"}, mode="vline"))
        if signs:
            plot.add_tools(HoverTool(renderers=signs, tooltips=[("step", "@x{0,0}"), ("", "@words")]))
    return figures, notes


def page(diagnoses):
    """The HTML of a page about some Diagnosis objects; raises ValueError where no run has logged any measure."""
    figures, notes = draw(diagnoses)
    if not figures:
        raise ValueError("none of the measures that are drawn has been logged")
    script, plots = components(figures)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        bokeh=Resources(mode="inline", components=["bokeh"]).render(),
        script=script,
        plots=plots,
        titles={name: PANELS[name].title for name in plots},
        diagnoses=diagnoses,
        labels=labels_of([x.run for x in diagnoses]),
        settings=[", ".join(describe(x.run)) for x in diagnoses],
        notes=notes,
        colours={"light": LIGHT, "dark": DARK},
    )


def write_report(diagnoses, path):
    """Write the page about some Diagnosis objects to ``path``, whole or not at all; ends the program where it can't."""
    try:
        text = page(diagnoses).encode()
    except ValueError as error:
        fail(f"--report {path}: {error}")
    if len(text) > LIMIT:
        fail(f"--report {path}: {len(diagnoses)} runs would make {len(text) / 1e6:.1f} MB, and a page is to have less "
             f"than {LIMIT / 1e6:g}; name fewer, or choose some by --only")  # fmt: skip
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_bytes(text)
        unfinished.replace(path)
    except OSError as error:
        fail(f"--report {path}: can't be written ({error.strerror})")
