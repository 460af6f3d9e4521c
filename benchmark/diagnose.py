"""Says of any run what became of it: a timeline of events, a verdict in one line, and what held that in measured runs:

    python -m benchmark.diagnose runs/RUN --report report.html

RUN: folders of runs of these scripts or of copies, in progress or finished; folders of runs; thinned curves
(benchmark/results/mujoco/); the paper's own CSV logs. Alarms are read as they ring in training (`common/alarms.py`).
Exit codes: 0, 2 for a wrong command line or where nothing can be read.
"""

import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tyro

import benchmark.claims
import benchmark.remedies
from benchmark.alarms import NORM, VARIANCE, tags_of
from benchmark.logs import DIAGNOSED, PLASTICITY, RETURN, describe, paper_coef, print_left_out, read_each
from benchmark.measures import collapse, settled, settled_return
from benchmark.report import write_report
from common.alarms import ALARMS, CATEGORICAL, COLLAPSED, DISCRETE_ENTROPY, Watch
from common.arguments import check_output, fail, flag
from common.run import parse_args

ROOT = Path(__file__).resolve().parent.parent
ENTROPY, FIRST_ENTROPY = ALARMS["entropy"].tag, "losses/first_minibatch/entropy"
EXCESS = ALARMS["ratios"].tag
BEFORE_NORM, DEAD = "representation/before/actor/preactivation_norm", "representation/after/actor/dead_units"
READ = (*(kind.tag for kind in ALARMS.values()), CATEGORICAL)  # what the alarms are of
# What a run should have logged: the words for it, its tags (any of them), and why it may not be there
LOGGED = {
    "return": ((RETURN,), "no episode has ended yet"),
    "norm of the actor's pre-activations": ((NORM, BEFORE_NORM), ""),
    "entropy": ((ENTROPY, FIRST_ENTROPY), ""),
    "ratios beyond the bounds of clipping": (
        ("trust_region/ratio_above_mean", EXCESS),
        "logged where some samples are beyond either bound",
    ),
    "PCA rank of the actor's features": ((DIAGNOSED,), ""),
    "dead units of the actor": ((DEAD,), ""),
    "PCA rank of the critic's features": (("representation/after/critic/pca_rank",), ""),
    "variance of the policy over states": ((VARIANCE,), ""),
    "plasticity": (tuple(PLASTICITY.values()), "python plasticity_probe.py measures it from checkpoints"),
}
# By alarm, and for a return that is lost: the measures of benchmark.claims and of benchmark.remedies that say whether
# an intervention held it, and whether more of each is better
HOLDS = {
    "ratios": (("broken_step", "ratio_broken", True),),
    "norm": (("preactivation_norm", "preactivation_norm", False),),
    "units": (("dead_units", "dead_units", False),),
    "rank": (("pca_rank", "pca_rank", True),),
    "entropy": (("policy_variance", "policy_variance", False),),
    "return": (("halved_step", "return_halved", True), ("return", "return", True)),
}
FLAGS = {
    "reset Adam": "--reset-optimizer",
    "Adam betas": "--adam-beta2 0.9",
    "shared trunk": "--share-features (on Atari ppo_atari.py)",
    "KL penalty": "--kl-coef",
    "early stopping": "--target-kl",
}
STATES = ("healthy", "bounds lost", "collapsing", "collapsed")


class Event(NamedTuple):
    """What happened at an environment step: the name of an alarm or of a fact, and a measure from what to what."""

    step: int
    name: str
    tag: str
    was: float
    now: float
    words: str

    def __str__(self):
        return f"{self.step:>13,}  {self.name}: {self.tag} {self.was:.4g} -> {self.now:.4g}; {self.words}"


class Held(NamedTuple):
    """What an intervention did to a measure in committed runs, compared with none."""

    alarm: str
    intervention: str
    flags: str
    setting: str
    measure: str
    value: float
    reference: float
    interval: str  # of the effect, or of either value
    runs: int
    held: bool  # the interval excludes that it made no difference, or a worse one
    source: str  # the file

    def __str__(self):
        return (
            f"{self.intervention}{f' ({self.flags})' if self.flags else ''}: {self.measure} {self.value:.4g}, "
            f"not {self.reference:.4g}; {self.interval}, {self.runs} runs of {self.setting}"
        )


@dataclass
class Diagnosis:
    """What is said of a run."""

    run: object
    state: str  # one of STATES
    since: int | None  # environment step, None of a healthy run
    verdict: str
    events: list  # of Event, by step
    first: str
    unlogged: list
    held: list = field(default_factory=list)  # of Held

    def as_dict(self):
        """For JSON: what can't be said, or is infinite, is null."""
        run = self.run
        known = {
            "run": run.name,
            "setting": dict(zip(("environment", "setting"), (run.env_id, ", ".join(describe(run))), strict=True)),
            "seed": run.seed,
            "last_step": run.last_step,
            "total_steps": run.total_steps,
            "finished": run.finished,
            "state": self.state,
            "since": self.since,
            "verdict": self.verdict,
            "events": [event._asdict() for event in self.events],
            "first": self.first,
            "held_in_measured_runs": [held._asdict() for held in self.held],
            "not_logged": self.unlogged,
        }
        return _plain(known)


def _plain(x):
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


def readings(run):
    """What the alarms would have been given of a run, step by step: (step, {tag: value})."""
    usual = tags_of(run)  # what older logs have in place of a tag
    columns = {tag: run.get(tag) if len(run.get(tag)) else usual.get(tag) for tag in READ}
    table = pd.DataFrame({tag: x for tag, x in columns.items() if x is not None}).sort_index()
    categorical = {CATEGORICAL: math.nan} if CATEGORICAL in table else {}
    for step, values in zip(table.index, table.to_dict("records"), strict=True):
        yield int(step), categorical | {tag: x for tag, x in values.items() if not math.isnan(x)}


def watch(run):
    """The Watch that has seen all of a run, its alarms, and the step at which --stop-on collapse would end it."""
    watcher, alarms, stopped = Watch(), [], None
    for step, tags in readings(run):
        alarms += watcher(step, step / run.total_steps, tags)
        stopped = step if stopped is None and watcher.collapsed else stopped
    return watcher, alarms, stopped


def facts(run):
    """The largest return, the falls for good (`benchmark.measures.collapse`), as events by name."""
    found = {}
    score, _ = settled_return(run)
    if len(score):
        peak = int(score.idxmax())
        smoothed = "running mean" if run.suite == "Atari" else "running median"
        found["largest return"] = Event(peak, "largest return", RETURN, score.iloc[0], score.max(), smoothed)
    steps = collapse(run)
    for name, tag, words in (
        ("return_halved", RETURN, "for good below half of its largest"),
        ("rank_halved", DIAGNOSED, "for good below half of its largest"),
        ("rank_tenth", DIAGNOSED, "for good below a tenth of its largest"),
    ):
        if steps[name] is not None:
            series = score if tag == RETURN else settled(run.get(DIAGNOSED).dropna(), run)
            was, now = series[: steps[name]].max(), series.loc[steps[name]]
            what = "return" if tag == RETURN else "rank"
            found[name] = Event(steps[name], f"{what} lost", tag, was, now, words)
    return found


def judge(run, watcher, rings, found):
    """State, since which step, and why, of a run whose alarms rang at ``rings`` {name: step}."""

    def beyond(name):
        discrete = name == "entropy" and (run.suite == "Atari" or len(run.get(CATEGORICAL)))
        return name in rings and watcher.signals[name].worse >= (DISCRETE_ENTROPY if discrete else watcher.limits[name])

    lost = found.get("return_halved")
    score, _ = settled_return(run)
    best, last = (score.max(), score.iloc[-1]) if len(score) else (math.nan, math.nan)
    words = f"its return is {last:.4g}, of a largest {best:.4g}"
    rank = settled(run.get(DIAGNOSED).dropna(), run)
    ranks = f"its rank {rank.iloc[-1]:.3g}, of {rank.max():.3g}" if len(rank) else "its rank is unknown"
    if watcher.collapsed or (lost and run.last_step - lost.step >= COLLAPSED * run.total_steps):
        since = lost.step if lost else round(watcher.both_since * run.total_steps)
        alone = ": the rank has not gone with the return" if rank.iloc[-1] >= rank.max() / 2 else ""
        return "collapsed", since, f"{words}; {ranks}{alone}"
    if lost:
        return "collapsing", lost.step, f"{words}, and may come back; {ranks}"
    losing = [name for name in ("return", "rank", "units") if beyond(name)]
    if beyond("ratios") and losing:
        since = min(rings[name] for name in losing)
        return "collapsing", since, f"{' and '.join(losing)} went beside the bounds; {words}; {ranks}"
    if beyond("ratios"):
        return "bounds lost", rings["ratios"], f"clipping doesn't hold the ratios; {words}; {ranks}"
    still, past = ([name for name in rings if beyond(name) == ring] for ring in (True, False))
    words += f"; {', '.join(still)} out of bounds" if still else ""
    return "healthy", None, words + (f"; {', '.join(past)} rang and came back" if past else "")


def first_of(rings, found):
    """What came first, in words."""
    if not rings:
        return "no alarm rang"
    order = sorted(rings.items(), key=lambda ring: ring[1])
    lost = found.get("return_halved")
    words = f"{order[0][0]}, at step {order[0][1]:,}"
    if lost:
        lead = (lost.step - order[0][1]) / 1e6
        words += f", {abs(lead):.2f} M steps {'before' if lead >= 0 else 'after'} the return was lost for good"
    rest = ", then ".join(f"{name} at {step:,}" for name, step in order[1:])
    return words + (f"; then {rest}" if rest else "")


def unlogged(run):
    """What the run has not logged, and why if that is known."""
    lines = []
    for words, (tags, why) in LOGGED.items():
        if not any(len(run.get(tag)) for tag in tags):
            lines.append(words + (f" ({why})" if why else ""))
    return lines


def diagnose(run, evidence=()):
    """The Diagnosis of a Run. evidence: as of ``read_evidence``."""
    watcher, alarms, stopped = watch(run)
    found = facts(run)
    rings = {alarm.name: alarm.step for alarm in alarms}
    events = [
        Event(a.step, f"alarm {a.name}", ALARMS[a.name].tag, a.was, a.now, ALARMS[a.name].means.split(" (")[0])
        for a in alarms
    ]
    events += found.values()
    if stopped is not None:
        rank = watcher.signals["rank"]
        words = "return and rank lost for a tenth of training: --stop-on collapse ends a run here"
        events.append(Event(stopped, "collapsed", DIAGNOSED, rank.high, rank.now, words))
    state, since, why = judge(run, watcher, rings, found)
    share = f"at {100 * run.last_step / run.total_steps:.0f} % of training"
    at = f" since step {since:,} ({100 * since / run.total_steps:.0f} % of training)" if since is not None else ""
    verdict = f"{state}{at}{'' if run.finished else ', ' + share}: {why}"
    wrong = list(rings) + (["return"] if "return_halved" in found and "return" not in rings else [])
    return Diagnosis(
        run,
        *(state, since, verdict, sorted(events), first_of(rings, found), unlogged(run)),
        relevant(run, wrong, evidence) if state != "healthy" else [],
    )


# What held it


def flags_of(intervention, suite, activation):
    """The flags, or the recipe, behind an intervention's name in `benchmark.logs`; empty where neither is known."""
    parts = []
    for part in intervention.split(" + "):
        words = part.removeprefix("critic ").split()
        if words[0] == "PFO":
            prefix = "--critic-pfo" if part.startswith("critic ") else "--pfo"
            coef = paper_coef(words[1], suite, activation)
            coef = words[words.index("(coefficient") + 1].rstrip(")") if "(coefficient" in words else f"{coef:g}"
            parts.append(f"{prefix}-coef {coef}" + (" --pfo-layers all" if words[1] == "all" else ""))
        elif part in FLAGS:
            parts.append(FLAGS[part])
        elif (ROOT / "recipes" / f"{part}.diff").exists():
            parts.append(f"python -m benchmark.recipe {part}")
    return " ".join(parts)


def _name(path):
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def read_evidence(folder):
    """Every comparison with no intervention, of several runs, in the claims.csv and remedies.csv of the folders in
    ``folder``: a list of (env_id, activation, epochs, Held), none of whose numbers is from anywhere else."""
    evidence = []
    for path in sorted(folder.glob("*/claims.csv")):
        table = pd.read_csv(path)
        against = table[table["comparison"].str.contains(" against none, ") & (table["source"] == "runs")]
        against = against[against["low"].notna()]  # of one run each there is no interval, and nothing to go by
        for row in against.to_dict("records"):
            intervention, _, rest = row["comparison"].partition(" against none, ")
            epochs, suite = int(rest.split()[0]), "Atari" if row["env_id"].endswith("-v5") else "MuJoCo"
            for alarm, (name, _, more) in ((a, x) for a, measures in HOLDS.items() for x in measures):
                if benchmark.claims.MEASURES[name][0] == row["measure"]:
                    null = 1.0 if row["effect_is"] == "ratio" else 0.0
                    held = row["low"] > null if more else row["high"] < null
                    sign = "× " if row["effect_is"] == "ratio" else ""
                    interval = f"{sign}{row['effect']:.3g} (95 % interval {row['low']:.3g} to {row['high']:.3g})"
                    setting = f"{row['env_id']}, {row['activation']}, {epochs} epochs"
                    evidence.append(
                        (
                            *(row["env_id"], row["activation"], epochs),
                            Held(
                                *(alarm, intervention, flags_of(intervention, suite, row["activation"]), setting),
                                *(row["measure"], row["value"], row["reference"], interval, int(row["runs"])),
                                *(bool(held), _name(path)),
                            ),
                        )
                    )
    for path in sorted(folder.glob("*/remedies.csv")):
        evidence += _of_remedies(path)
    return evidence


def _of_remedies(path):
    """Of benchmark.remedies' table, with the setting from runs.csv beside it."""
    table, (run,) = pd.read_csv(path), pd.read_csv(path.with_name("runs.csv")).iloc[:1].to_dict("records")
    (ppo,) = table[table["remedy"] == benchmark.remedies.PPO].to_dict("records")
    found = []
    for row in table[table["remedy"] != benchmark.remedies.PPO].to_dict("records"):
        for alarm, (_, name, more) in ((a, x) for a, measures in HOLDS.items() for x in measures):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            apart = low > ppo[f"{name}_high"] if more else high < ppo[f"{name}_low"]
            interval = f"{low:.3g} to {high:.3g}, not {ppo[f'{name}_low']:.3g} to {ppo[f'{name}_high']:.3g}"
            found.append(
                (
                    *(run["env_id"], run["activation"], int(run["epochs"])),
                    Held(
                        *(alarm, row["remedy"], flags_of(row["remedy"], run["suite"], run["activation"])),
                        f"{run['env_id']}, {run['activation']}, {run['epochs']} epochs",
                        *(benchmark.remedies.MEASURES[name][0], row[name], ppo[name], f"95 % intervals {interval}"),
                        *(int(row["runs"]), bool(apart), _name(path)),
                    ),
                )
            )
    return found


def relevant(run, alarms, evidence):
    """Of the evidence on these alarms that of the setting nearest to the run's, but for what the run has already."""

    def distance(env_id, activation, epochs):
        return (env_id != run.env_id, activation != run.activation, abs(epochs - run.epochs))

    chosen = []
    for alarm in dict.fromkeys(alarms):
        of_alarm = [x for x in evidence if x[3].alarm == alarm and x[3].intervention not in run.intervention]
        if of_alarm:
            nearest = min(distance(*x[:3]) for x in of_alarm)
            chosen += [x[3] for x in of_alarm if distance(*x[:3]) == nearest]
    return chosen


# What is printed


def text_of(diagnosis):
    """A Diagnosis for the console."""
    lines = [f"{diagnosis.run.name} ({', '.join(describe(diagnosis.run))}, seed {diagnosis.run.seed})"]
    lines += [f"  {diagnosis.verdict}", "  events, by environment step:"]
    lines += [str(event) for event in diagnosis.events] or ["  none"]
    lines.append(f"  first: {diagnosis.first}")
    by_alarm = itertools.groupby(diagnosis.held, key=lambda held: held.alarm)
    for alarm, group in by_alarm:
        group = list(group)
        held = [x for x in group if x.held]
        others = sorted({x.intervention for x in group} - {x.intervention for x in held})
        lines.append(f"  {alarm}, held in the runs that were measured by:" + ("" if held else " nothing"))
        lines += [f"    {x}" for x in held]
        if others:
            lines.append(f"    not shown to hold it, in {group[0].setting}: {', '.join(others)}")
    if diagnosis.held:
        lines.append(f"  numbers are of {', '.join(sorted({x.source for x in diagnosis.held}))}")
    elif diagnosis.state != "healthy":
        lines.append("  there are no measured runs of what held that")
    lines.append(f"  not logged: {'; '.join(diagnosis.unlogged) or 'nothing that is looked at'}")
    return "\n".join(lines)


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders, folders of runs, files of benchmark.logs, the paper's CSV logs, or quoted patterns of these"""
    only: tuple[str, ...] = ()
    """words that a run's name or setting must all have, as ReLU "20 epochs" "seed 4"; none given is all runs"""
    json: bool = False
    """print a JSON list with an object for each run, and nothing else, to standard output"""
    report: Path | None = None
    """an .html file to write beside that: one page with the panels, which opens without a network"""
    results: Path = ROOT / "benchmark" / "results"
    """folder of folders with claims.csv or remedies.csv, which say what held a fault in the runs that were measured"""


def main(args):
    if not args.runs:
        fail("RUNS: name at least one run's folder, as runs/*")
    if not args.results.is_dir():
        fail(f"{flag('results')} {args.results}: must be a folder")
    if args.report:
        check_output(args.report, ".html", name="report")
    runs, left_out, notes = read_each(args.runs, "RUNS", READ, whole=True)
    found = [run for run in runs if all(word in f"{run.name}, {run}" for word in args.only)]
    if not runs:
        name, why = left_out[0] if left_out else (" ".join(args.runs), "no run in it")
        fail(f"RUNS {name}: {why}")
    if not found:
        fail(f"--only {' '.join(args.only)}: must be in a run's name or setting, and are in none of {len(runs)}")
    evidence = read_evidence(args.results)
    diagnoses = [diagnose(run, evidence) for run in found]
    if args.json:
        print(json.dumps([x.as_dict() for x in diagnoses], indent=2, allow_nan=False))
    else:
        print("\n\n".join(map(text_of, diagnoses)))
        print_left_out(left_out, notes)
    if args.report:
        write_report(diagnoses, args.report)
        print(args.report, file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    main(parse_args(Args))
