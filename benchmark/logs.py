"""Reads the logs of runs for figures and statistics, and writes them thinned, small enough to be kept:

python -m benchmark.logs --runs runs/ --output curves/

What is read: folders of runs, in progress or finished; the CSV files that this command writes; and the combined CSV
logs of the paper's authors, whose keys `PAPER_KEYS` translates.
"""

import ast
import contextlib
import glob
import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from common.arguments import check_folder, check_range, fail, make_folder
from common.run import parse_args

RETURN = "charts/rollout_return"
RANKS = ("effective_rank", "pca_rank", "srank", "feature_rank", "matrix_rank")
DIAGNOSED = "representation/after/actor/pca_rank"  # its steps are the logged iterations: every diagnosis has it
PLASTICITY = {network: f"plasticity/{network}/last_minibatch_loss" for network in ("actor", "critic")}

# What is the same in the logs of the paper's authors, and its names there
_NETWORKS = {"actor": "policy", "critic": "value"}
_PAPER_RANKS = ("effective_rank_vetterli", "approximate_rank_pca", "srank_kumar", "feature_rank_lyle", "pytorch_rank")
PAPER_KEYS = {
    RETURN: "batch/perf/avg_return_raw",
    "trust_region/ratio_below_mean": "batch/diff/avg_prob_ratio_below_epsilon",
    "trust_region/ratio_above_mean": "batch/diff/avg_prob_ratio_above_epsilon",
    "losses/first_minibatch/entropy": "batch/first_epoch/first_minibatch/loss/entropy",
    "losses/last_minibatch/policy_loss": "batch/last_epoch/last_minibatch/loss/loss_policy",
}
for _when, _theirs in (("before", "start"), ("after", "end")):
    PAPER_KEYS[f"representation/{_when}/policy_variance"] = f"batch/{_theirs}/action_diversity/policy_variance"
    for _network, _theirs_network in _NETWORKS.items():
        _ours, _features = f"representation/{_when}/{_network}", f"features_{_theirs_network}_batch"
        for _rank, _paper_rank in zip(RANKS, _PAPER_RANKS, strict=True):
            PAPER_KEYS[f"{_ours}/{_rank}"] = f"batch/{_theirs}/SVD/{_paper_rank}/{_features}"
        PAPER_KEYS[f"{_ours}/dead_units"] = f"batch/{_theirs}/dead_neurons/{_features}"
        PAPER_KEYS[f"{_ours}/preactivation_norm"] = (
            f"batch/{_theirs}/feature_stats/norm_features_preactivation_{_theirs_network}_batch"
        )
PAPER_PLASTICITY_KEYS = {
    tag: f"capacity-checkpoint/last_capacity-epoch/last_capacity-minibatch/loss/{_NETWORKS[network]}"
    for network, tag in PLASTICITY.items()
}
# What figures and statistics need
TAGS = (
    *(RETURN, "charts/SPS", "losses/first_minibatch/entropy", "losses/last_minibatch/policy_loss"),
    *("trust_region/ratio_below_mean", "trust_region/ratio_above_mean"),
    *(f"representation/after/actor/{name}" for name in (*RANKS, "dead_units", "preactivation_norm")),
    *(f"representation/before/actor/{name}" for name in ("pca_rank", "dead_units", "preactivation_norm")),
    *("representation/after/critic/pca_rank", *PLASTICITY.values()),
    *("representation/before/policy_variance", "representation/after/policy_variance"),
    *(f"representation/after/{network}/activation_balance" for network in ("actor", "critic")),
)

PAPER_STEPS = {"Atari": 32_552 * 1024 * 3, "MuJoCo": 2_441 * 2048}  # environment steps of the paper's runs
# The last one is ppo_mujoco.py --seeds as older revisions called it.
SCRIPTS = ("ppo_atari", "ppo_atari_2models", "ppo_pfo_atari", "ppo_mujoco", "ppo_mujoco_multiseed")
INTERVENTIONS = ("none", "PFO last", "PFO all", "reset Adam", "Adam betas", "shared trunk")
# A run is of the curve that these name; what else its arguments say must agree within a curve.
SETTING = ("source", "suite", "env_id", "activation", "schedule", "epochs", "intervention")
# The arguments that leave what is learned alone, and those that SETTING stands for
_APART = {
    *("exp_name", "script", "seed", "seeds", "num_seeds", "device", "compile", "record", "cuda_graphs"),
    *("torch_deterministic", "torch_threads", "track", "save_model", "resume", "capture_video"),
    *("diagnostics_interval", "checkpoint_interval"),
    *("env_id", "activation", "anneal_lr", "cosine_lr", "update_epochs"),
    *("reset_optimizer", "adam_beta1", "adam_beta2", "share_features"),
}
_APART_PREFIXES = ("wandb_", "eval_")
# The settings of the plasticity probe that change what a loss means
_PROBE = ("targets", "target_seed", "data", "epochs", "num_envs", "steps_per_env", "seed", "anneal_lr", "max_grad_norm")


@dataclass
class Run:
    """One run: its setting, and the scalars of TAGS as series over environment steps.

    All but plasticity lies on the grid of the iterations with diagnostics. The return has values only where a rollout
    ended an episode since the grid's previous point: that of the latest such rollout, on Atari the mean of all.
    `carried_return` repeats them.
    """

    name: str
    source: str  # "runs", or "paper" for the logs of the paper's authors
    suite: str  # Atari or MuJoCo
    env_id: str
    activation: str
    schedule: str  # of the learning rate: constant, linear or cosine
    epochs: int  # passes over each rollout
    intervention: str  # "none", one of INTERVENTIONS, or several joined by " + "
    seed: int
    total_steps: int  # length of the finished run in environment steps
    every: float = 1.0  # logged iterations for which a point stands: 1, or more in a thinned file
    scalars: dict[str, pd.Series] = field(default_factory=dict, repr=False)
    args: dict = field(default_factory=dict, repr=False)  # the script's arguments, where they are known
    probe: dict = field(default_factory=dict, repr=False)  # settings of plasticity_probe.py, where they are known

    @property
    def setting(self):
        return tuple(getattr(self, name) for name in SETTING)

    @property
    def grid(self):
        """The environment steps of the iterations with diagnostics, ascending."""
        return self.scalars[DIAGNOSED].index

    @property
    def last_step(self):
        return int(self.grid[-1])

    @property
    def finished(self):
        return self.last_step >= 0.999 * self.total_steps

    def get(self, tag):
        """The series of a tag, empty if the run has none."""
        return self.scalars.get(tag, pd.Series(dtype=float, index=pd.Index([], dtype=np.int64)))

    def carried_return(self):
        """The latest return, at every step of the grid; NaN before one."""
        return self.get(RETURN).reindex(self.grid, method="ffill")

    @property
    def hours(self):
        """Hours that the run took: its agent steps over the rate that it logged last, which begins anew on resuming."""
        rate = self.get("charts/SPS")
        return self.last_step / self.args.get("frame_skip", 1) / rate.iloc[-1] / 3600 if len(rate) else math.nan

    def hours_at(self, steps):
        """Hours from the run's begin until each of ``steps``, ascending as they are; NaN where no rate was logged.

        The rate is agent steps over the time since the begin, so that waiting for diagnostics and checkpoints is in it;
        of a resumed run it is taken to have been the same before. Seeds that are one batch took these hours together.
        """
        rate = self.get("charts/SPS")
        if rate.empty:
            return np.full(len(steps), math.nan)
        taken = np.maximum.accumulate(rate.index / self.args.get("frame_skip", 1) / rate / 3600)
        return np.interp(steps, [0, *rate.index], [0.0, *taken])

    def __str__(self):
        return ", ".join(map(str, (*describe(self), f"seed {self.seed}")))


def order_of(intervention):
    """Where an intervention stands: in the order of the paper, then by name."""
    known = INTERVENTIONS.index(intervention) if intervention in INTERVENTIONS else len(INTERVENTIONS)
    return known, intervention


def describe(run):
    """The words that name a run's setting, for titles and messages."""
    words = [run.env_id, *([run.activation] if run.suite == "MuJoCo" else []), f"{run.schedule} learning rate"]
    words += [f"{run.epochs} epochs", "baseline" if run.intervention == "none" else run.intervention]
    return words + ([] if run.source == "runs" else ["the paper's logs"])


# Event files


def read_events(folder, tags):
    """The scalars of ``tags`` and the hyperparameters in a folder's event files, read whole.

    TensorBoard's own reader checks and converts each record, which makes it ten times slower than this one; the log of
    a full Atari run has more than a million.

    Where a resumed run wrote another file, that one counts from its first step on. Files of one step of the plasticity
    probe, which stands in their names, add up.
    Returns {tag: series over steps}, {parameter: value}, and [what was wrong with a file].
    """
    tags, scalars, parameters, problems, last = set(tags), {}, {}, [], None
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: (path.name.split(".")[3], path.name)):
        read, first_step = {}, None
        data, start = path.read_bytes(), 0
        while start + 12 <= len(data):
            # TFRecord: the length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, start)
            end = start + 12 + length
            if length == 0 or end > len(data):
                (checksum,) = struct.unpack_from("<I", data, start + 8)
                if length == 0 or checksum != masked_crc32c(data[start : start + 8]):
                    problems.append(f"{path.name} is damaged from byte {start} on; read up to there")
                break  # else the file is being written
            try:
                event = Event.FromString(data[start + 12 : end])
            except DecodeError:
                problems.append(f"{path.name} is damaged from byte {start} on; read up to there")
                break
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    first_step = event.step if first_step is None else min(first_step, event.step)
                    if value.tag in tags:
                        read.setdefault(value.tag, []).append((event.step, value.simple_value))
                elif value.tag == "hyperparameters/text_summary":
                    parameters |= _parameters(value.tensor.string_val[0].decode())
            start = end + 4
        stamp = path.name.split(".")[3]  # when it was begun, or the probe's step
        if first_step is not None and stamp != last:
            last = stamp
            scalars = {tag: [point for point in points if point[0] < first_step] for tag, points in scalars.items()}
        for tag, points in read.items():
            scalars.setdefault(tag, []).extend(points)
    return {tag: _series(*zip(*points, strict=True)) for tag, points in scalars.items() if points}, parameters, problems


def _series(steps, values):
    series = pd.Series(np.asarray(values, dtype=float), index=np.asarray(steps, dtype=np.int64))
    return series[~series.index.duplicated(keep="last")].sort_index()


def _parameters(table):
    """The arguments in the Markdown table that a run writes first."""
    parameters = {}
    for row in table.splitlines()[2:]:
        name, _, value = row.strip("|").partition("|")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            parameters[name] = value
    return parameters


def paper_coef(layers, suite, activation):
    """The coefficient of PFO in the paper, None where it has none."""
    of_paper = {("Atari", "ReLU"): 10 if layers == "all" else 1, ("MuJoCo", "Tanh"): 1, ("MuJoCo", "ReLU"): 10}
    return of_paper.get((suite, activation))


def pfo_name(layers, coef, suite, activation):
    """ "PFO last" or "PFO all", with the coefficient if it is not the paper's."""
    return f"PFO {layers}" + ("" if coef == paper_coef(layers, suite, activation) else f" (coefficient {coef:g})")


def intervention_of(args, script, suite, activation):
    """What sets a run of ours apart from the paper's baseline, in INTERVENTIONS' words where they exist."""
    parts, usual = [], {"on": "preactivations", "distance": "l2", "mode": "regularize"}
    for network, prefix in (("", "pfo"), ("critic ", "critic_pfo")):
        if args.get(f"{prefix}_coef"):
            # The critic's form is the actor's, but in runs from when it had flags of its own.
            form = {key: args.get(f"{prefix}_{key}", args.get(f"pfo_{key}")) for key in ("layers", *usual)}
            name = network + pfo_name(form["layers"], args[f"{prefix}_coef"], suite, activation)
            changed = [form[key] for key, value in usual.items() if form[key] != value]
            parts.append(" ".join([name, *changed]))
    if args.get("reset_optimizer"):
        parts.append("reset Adam")
    betas = args.get("adam_beta1", 0.9), args.get("adam_beta2", 0.999)
    if betas != (0.9, 0.999):
        parts.append("Adam betas" if betas == (0.9, 0.9) else f"Adam betas {betas[0]:g}, {betas[1]:g}")
    if args.get("share_features") or script == "ppo_atari":
        parts.append("shared trunk")
    if args.get("kl_coef"):
        parts.append("KL penalty")
    if args.get("target_kl"):
        parts.append("early stopping")
    if script not in SCRIPTS:
        parts.append(script)
    return " + ".join(parts) or "none"


def read_run(folder, more_tags=(), whole=False):
    """The run in ``folder`` and [what was wrong with its files]; ValueError, saying why, if it can't be used.

    Its scalars are those of TAGS and ``more_tags``, on the grid of the iterations with diagnostics; if ``whole``, at
    every step at which they were logged.
    """
    scalars, args, problems = read_events(folder, (*TAGS, *more_tags))
    if "env_id" not in args:
        raise ValueError("its event files have no table of hyperparameters")
    plasticity, _, more_problems = read_events(folder / "plasticity", TAGS)
    probe = {}
    if plasticity and (path := folder / "plasticity" / "settings.json").exists():
        try:
            settings = json.loads(path.read_text())["settings"]
            probe = {name: settings.get(name) for name in _PROBE}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            more_problems.append("plasticity/settings.json can't be read")
    missing = {"seed", "update_epochs", "activation", "batch_size", "num_iterations"} - set(args)
    if missing:
        raise ValueError(f"its hyperparameters lack {', '.join(sorted(missing))}: not a run of these scripts")
    suite = "Atari" if "frame_skip" in args else "MuJoCo"
    script = str(args.get("script", args.get("exp_name"))).removesuffix(".py")
    run = Run(
        name=Path(os.path.abspath(folder)).name,  # also of a folder that is named "."
        source="runs",
        suite=suite,
        env_id=args["env_id"],
        activation=args["activation"],
        schedule="linear" if args.get("anneal_lr") else "cosine" if args.get("cosine_lr") else "constant",
        epochs=args["update_epochs"],
        intervention=intervention_of(args, script, suite, args["activation"]),
        seed=args["seed"],
        total_steps=args["num_iterations"] * args["batch_size"] * args.get("frame_skip", 1),
        scalars=scalars | plasticity,
        args=args,
        probe=probe,
    )
    if DIAGNOSED not in run.scalars:
        raise ValueError(f"it has no {DIAGNOSED} yet")
    if not whole:
        _put_on_grid(run, lambda carried, steps: steps != steps.shift())
    return run, problems + more_problems


def _put_on_grid(run, is_new):
    """Keep what was logged at the iterations with diagnostics; ``is_new(values, their steps)`` marks fresh returns.

    On Atari, where a rollout ends about one game, a run of ours has the mean of all rollouts since the last point.
    """
    grid = run.grid
    for tag, series in run.scalars.items():
        if tag == RETURN and run.suite == "Atari" and run.source == "runs":
            series = series[series.index <= grid[-1]].dropna()
            run.scalars[tag] = series.groupby(grid[grid.searchsorted(series.index)]).mean()
        elif tag == RETURN:
            carried = series.reindex(grid, method="ffill")
            steps = series.index.to_series().reindex(grid, method="ffill")
            run.scalars[tag] = carried[is_new(carried, steps) & carried.notna()]
        elif not tag.startswith("plasticity/"):
            run.scalars[tag] = series[series.index.isin(grid)]


# The logs of the paper's authors

PAPER_SETTINGS = {
    "env_id": "config/env/name",
    "seed": "config/seed",
    "epochs": "config/optim/num_epochs",
    "anneal": "config/optim/anneal_linearly",
    "reset": "config/optim/reset_state",
    "activation": "config/models/activation",
    "share": "config/models/share_features",
    "pfo_coef": "config/loss/policy/kwargs/feature_trust_region_coef",
    "pfo_all": "config/loss/policy/kwargs/feature_trust_all_layers",
}
# What no setting above tells is in the name of the sweep's folder.
PAPER_FOLDERS = {"adam-beta": "Adam betas", "ppo-kl": "KL penalty", "ppo-early-stop": "early stopping"}


def read_paper_runs(paths):
    """The runs in combined CSV logs, of training and of plasticity, and [(file or run, why it is left out)]."""
    runs, left_out = {}, []
    training, plasticity = [], []
    for path in paths:
        header = pd.read_csv(path, nrows=0).columns
        if "config/solve_dir" in header:
            needed = {"config/solve_dir", "capacity-counters/env_steps", *PAPER_PLASTICITY_KEYS.values()}
            tables, used, what = plasticity, needed, "plasticity logs"
        else:
            needed = {"global_step", "config/working_dir", *PAPER_SETTINGS.values(), PAPER_KEYS[DIAGNOSED]}
            tables, used, what = training, needed | set(PAPER_KEYS.values()), "logs"
        if missing := sorted(needed - set(header)):
            fail(f"{path}: must have the columns of the paper's {what}; {', '.join(missing)} not there")
        table = pd.read_csv(path, usecols=[name for name in header if name in used])
        folder = "config/solve_dir" if tables is plasticity else "config/working_dir"
        if nameless := int(table[folder].isna().sum()):
            left_out.append((str(path), f"rows without {folder}: {nameless}"))
        tables.append(table)
    # A run's rows may lie in several files.
    for folder, rows in _by_folder(training, "config/working_dir"):
        try:
            runs[folder] = _paper_run(folder, rows)
        except (ValueError, TypeError) as error:
            left_out.append((folder, str(error)))
    for folder, rows in _by_folder(plasticity, "config/solve_dir"):
        if folder not in runs:
            left_out.append((folder, "plasticity, of which no training log has this folder"))
            continue
        for tag, key in PAPER_PLASTICITY_KEYS.items():
            measured = rows.dropna(subset=[key])
            runs[folder].scalars[tag] = _series(measured["capacity-counters/env_steps"], measured[key])
    return list(runs.values()), left_out


def _by_folder(tables, column):
    """The rows of all tables by the run's folder in this column."""
    if tables:
        table = pd.concat(tables, ignore_index=True)
        yield from table.groupby(table[column].astype(str).where(table[column].notna()).str.rstrip("/"), sort=True)


def _paper_run(folder, rows):
    def flag(name):
        return str(settings[name]).lower() in ("true", "1", "1.0")

    first = rows.iloc[0]
    settings = {name: first[key] for name, key in PAPER_SETTINGS.items()}
    suite = "Atari" if str(settings["env_id"]).startswith("ALE/") else "MuJoCo"
    activation = {"relu": "ReLU", "tanh": "Tanh"}.get(str(settings["activation"]).lower(), str(settings["activation"]))
    parts = []
    if float(settings["pfo_coef"]) > 0:
        layers = "all" if flag("pfo_all") else "last"
        parts.append(pfo_name(layers, float(settings["pfo_coef"]), suite, activation))
    if flag("reset"):
        parts.append("reset Adam")
    if flag("share"):
        parts.append("shared trunk")
    parts += [name for part, name in PAPER_FOLDERS.items() if part in str(folder)]
    run = Run(
        name=str(folder),
        source="paper",
        suite=suite,
        env_id=str(settings["env_id"]).removeprefix("ALE/"),
        activation=activation,
        schedule="linear" if flag("anneal") else "constant",
        epochs=int(settings["epochs"]),
        intervention=" + ".join(parts) or "none",
        seed=int(settings["seed"]),
        total_steps=PAPER_STEPS[suite],
    )
    for tag, key in PAPER_KEYS.items():
        if key in rows and rows[key].notna().any():
            logged = rows.dropna(subset=[key])
            run.scalars[tag] = _series(logged["global_step"], logged[key])
    if DIAGNOSED not in run.scalars:
        raise ValueError(f"it has no {DIAGNOSED} yet")
    _put_on_grid(run, lambda carried, steps: carried != carried.shift())
    return run


# Thinned files

_COLUMNS = ("run", *SETTING, "seed", "total_steps", "every")
_ONCE = ("args", "probe")  # dicts, in the first row of each run


def file_name(text):
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)


def write_thinned(runs, folder, points):
    """Write the runs' curves, at most ``points`` of each, to ``{env_id}_{activation}_{intervention}.csv.gz``; returns
    the paths."""

    def place_of(run):
        return run.env_id, run.activation, run.intervention, run.source

    paths = []
    for place in sorted({place_of(run) for run in runs}):
        tables = []
        for run in runs:
            if place_of(run) != place:
                continue
            chosen = np.unique(np.linspace(0, len(run.grid) - 1, min(points, len(run.grid))).round().astype(int))
            kept = run.grid[chosen]
            every = run.every * len(run.grid) / len(kept)
            head = dict(zip(_COLUMNS, (run.name, *run.setting, run.seed, run.total_steps, every), strict=True))
            parts = []
            for tag, series in ((tag, run.get(tag)) for tag in TAGS):
                if tag == RETURN:
                    # Which of two returns is the fresh one depends on the grid.
                    carried = series.reindex(kept, method="ffill")
                    steps = series.index.to_series().reindex(kept, method="ffill")
                    series = carried[(steps != steps.shift()) & carried.notna()]
                elif not tag.startswith("plasticity/"):
                    series = series[series.index.isin(kept)]
                parts.append(pd.DataFrame({**head, "tag": tag, "step": series.index, "value": series.to_numpy()}))
            tables.append(pd.concat(parts, ignore_index=True))
            for name, values in zip(_ONCE, (_other_args(run), run.probe), strict=True):
                tables[-1].loc[0, name] = repr(values)
        path = folder / f"{file_name('_'.join(place[:3]))}{'' if place[3] == 'runs' else '_paper'}.csv.gz"
        table = pd.concat(tables, ignore_index=True)
        # Without the time in it, the same curves make the same file.
        with writing(path):
            table.to_csv(path, index=False, float_format="%.5g", compression={"method": "gzip", "mtime": 0})
        paths.append(path)
    return paths


def read_thinned(path):
    """The runs in a file of `write_thinned`."""
    table = pd.read_csv(path, dtype={"run": str, "tag": str, "value": float}, keep_default_na=False, na_values=[""])
    if missing := [name for name in (*_COLUMNS, "tag", "step", "value", *_ONCE) if name not in table]:
        fail(f"{path}: must have the columns of a thinned file; {', '.join(missing)} not there")
    runs = []
    for _, rows in table.groupby("run", sort=False):
        head = {name: rows[name].iloc[0] for name in _COLUMNS}
        head = {name: value.item() if isinstance(value, np.generic) else value for name, value in head.items()}
        scalars = {tag: _series(part["step"], part["value"]) for tag, part in rows.groupby("tag", sort=False)}
        try:
            head |= {name: ast.literal_eval(rows[name].iloc[0]) for name in _ONCE}
        except (ValueError, SyntaxError):
            raise ValueError(f"its first row of {head['run']} doesn't hold the arguments") from None
        runs.append(Run(name=head.pop("run"), scalars=scalars, **head))
    return runs


# All of it


def read_runs(names, more_tags=()):
    """Every run that ``names`` lead to, of each setting those that can be pooled; the rest as ``read_each``."""
    runs, left_out, notes = read_each(names, more_tags=more_tags)
    runs, not_pooled = poolable(runs)
    return runs, left_out + not_pooled, notes + _same_probes(runs)


def until(run, steps):
    """The run as it stood at an environment step, as if it had ended there."""
    scalars = {tag: series[series.index <= steps] for tag, series in run.scalars.items()}
    width = np.diff(run.grid[:2])  # its last diagnosis may lie just before
    whole = len(width) and run.last_step + width[0] >= steps
    return replace(run, total_steps=int(scalars[DIAGNOSED].index[-1]) if whole else steps, scalars=scalars)


def as_they_stood(runs, steps):
    """The runs at the environment step that ``--steps`` names, 0 for their ends; ends the program where it is too early
    for one of them."""
    if not steps:
        return runs
    first = max((int(run.grid[0]) for run in runs), default=0)
    if steps < first:
        fail(f"--steps {steps}: must be at least {first}, where each run has been diagnosed once")
    return [until(run, steps) for run in runs]


def read_each(names, flag="--runs", more_tags=(), whole=False):
    """Every run that ``names`` lead to: folders of a run or of runs, CSV files, or patterns of either.

    A name that leads nowhere, or is a file that can't be read, ends the program with one line, which calls it by
    ``flag``. more_tags, whole: as for ``read_run``. Returns the runs, and [(run, or file that was not named itself, why
    it is left out)], and [what was wrong with a run that was read all the same].
    """
    runs, left_out, notes, papers = [], [], [], []
    seen = set()
    if not names:
        fail(f"{flag}: must name at least one folder, file or pattern")
    for name in names:
        found = [Path(name)] if Path(name).exists() else [Path(path) for path in sorted(glob.glob(name))]
        if not found:
            fail(f"{flag} {name}: must be a run's folder, a folder of runs, a CSV of curves, or a pattern of these")
        sources = [source for path in found for source in _sources(path)]
        if not sources:
            fail(f"{flag} {name}: there is no run in it, neither a folder with an event file nor a CSV")
        for source in sources:
            if source.resolve() in seen:
                continue
            seen.add(source.resolve())
            try:
                if source.is_dir():
                    run, problems = read_run(source, more_tags, whole)
                    runs.append(run)
                    notes += [f"{source}: {problem}" for problem in problems]
                    continue
                header = pd.read_csv(source, nrows=0).columns
                if "tag" in header:
                    runs += read_thinned(source)
                elif source == Path(name) or any(str(column).startswith("config/") for column in header):
                    papers.append(source)
                else:
                    left_out.append((str(source), "neither a run nor a CSV of curves"))
            except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError, EOFError) as error:
                if source == Path(name):
                    fail(f"{source}: can't be read ({error})")
                left_out.append((str(source), f"can't be read ({error})"))
            except ValueError as error:
                left_out.append((str(source), str(error)))
    paper_runs, paper_left_out = read_paper_runs(papers)
    return runs + paper_runs, left_out + paper_left_out, notes


def _same_probes(runs):
    """Take from runs the plasticity that was measured otherwise than that of most others; lines that say so."""
    notes = []
    for suite in sorted({(run.source, run.suite) for run in runs}):
        probed = [run for run in runs if (run.source, run.suite) == suite and {*PLASTICITY.values()} & {*run.scalars}]
        prints = Counter(repr(run.probe) for run in probed)
        usual = next((run.probe for run in probed if repr(run.probe) == prints.most_common(1)[0][0]), {})
        for run in (run for run in probed if run.probe != usual):
            pairs = [f"{name} {run.probe.get(name)}, not {usual.get(name)}" for name in {**usual, **run.probe}
                     if run.probe.get(name) != usual.get(name)]  # fmt: skip
            notes.append(f"{run.name}: its plasticity is left out, probed unlike most with {'; '.join(pairs)}")
            for tag in PLASTICITY.values():
                run.scalars.pop(tag, None)
    return notes


def _sources(path):
    """The run folders and CSV files that a path names, or the run folders and .csv.gz files in it."""
    if path.is_file():
        return [path]
    if any(path.glob("events.out.tfevents.*")):
        return [path]
    inside = sorted(path.iterdir())
    folders = [child for child in inside if child.is_dir() and any(child.glob("events.out.tfevents.*"))]
    return folders + [child for child in inside if child.name.endswith(".csv.gz")]


def poolable(runs):
    """Of each setting, the runs whose other arguments are those of most, and one of each seed; the rest with reasons.

    A mean over runs that differ in more than their seed would be of nothing.
    """
    kept, left_out = [], []
    for setting in dict.fromkeys(run.setting for run in runs):
        members = [run for run in runs if run.setting == setting]
        others = [_other_args(run) for run in members]
        common = sorted(set.intersection(*(set(args) for args in others)))
        prints = [tuple((key, repr(args[key])) for key in common) for args in others]
        usual = Counter(prints).most_common(1)[0][0]
        of_seed = {}
        for run, found in zip(members, prints, strict=True):
            if found != usual:
                pairs = zip(found, usual, strict=True)
                differs = [f"{mine[0]} {mine[1]}, not {theirs[1]}" for mine, theirs in pairs if mine != theirs]
                left_out.append((run.name, f"differs from most of its setting in {'; '.join(differs)}"))
            else:
                of_seed.setdefault(run.seed, []).append(run)
        for same in of_seed.values():
            *rest, best = sorted(same, key=lambda run: (run.last_step, run.name))
            kept.append(best)
            left_out += [(run.name, f"same setting and seed as {best.name}, which is longer or later") for run in rest]
    return kept, left_out


def _other_args(run):
    unused = ["critic_pfo"] if not run.args.get("critic_pfo_coef") else []
    unused += ["pfo"] if not run.args.get("pfo_coef") and not run.args.get("critic_pfo_coef") else []
    return {
        name: value
        for name, value in run.args.items()
        if name not in _APART
        and not name.startswith(_APART_PREFIXES)
        and not any(name.startswith(f"{prefix}_") for prefix in unused)
    }


def settings_table(runs):
    """Lines that say how many runs, and which seeds, there are of each setting."""
    lines = []
    for setting in sorted({run.setting for run in runs}, key=str):
        members = sorted((run for run in runs if run.setting == setting), key=lambda run: run.seed)
        seeds = ", ".join(
            f"{run.seed}" + ("" if run.finished else f" (at {100 * run.last_step // run.total_steps} %)")
            for run in members
        )
        lines.append(f"  {', '.join(describe(members[0]))}: {len(members)} runs, seeds {seeds}")
    return lines


def print_left_out(left_out, notes=()):
    """Name the runs that are left out under their reason, and the files that are damaged."""
    for reason in dict.fromkeys(reason for _, reason in left_out):
        names = [name for name, why in left_out if why == reason]
        print(f"left out, {reason}: {', '.join(names)}")
    for note in notes:
        print(f"note: {note}")


def read_table(flag, path, columns):
    """The runs.csv that ``flag`` names; ends the program if it can't be read, or lacks one of ``columns``."""
    try:
        table = pd.read_csv(path, dtype={"run": str})
    except (OSError, ValueError) as error:  # pandas' and Unicode's errors are ValueErrors
        fail(f"{flag} {path}: can't be read as CSV ({error})")
    if missing := [name for name in columns if name not in table]:
        fail(f"{flag} {path}: must be a runs.csv; it has no column {', '.join(missing)}")
    return table


@contextlib.contextmanager
def writing(path):
    """What writes ``path`` into the folder ``--output`` stands in here; if it can't, that costs one line."""
    try:
        yield path
    except OSError as error:
        fail(f"--output {path.parent}: {path.name} can't be written in it ({error.strerror})")


@dataclass
class Args:
    runs: tuple[str, ...] = ("runs",)
    """run folders, folders of runs, files of benchmark.logs, the paper's CSV logs, or quoted patterns of these"""
    output: Path = Path("curves")
    """folder of the CSV files, one for each environment, activation and intervention"""
    points: int = 200
    """most points of each curve, evenly spaced, first and last included"""


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "points", low=2)
    check_folder(args.output)
    runs, left_out, notes = read_runs(args.runs)
    print_left_out(left_out, notes)
    if not runs:
        fail(f"--runs {' '.join(args.runs)}: no run in it can be used", code=1)
    make_folder(args.output)
    print("\n".join([f"{len(runs)} runs used:", *settings_table(runs)]))
    for path in write_thinned(runs, args.output, args.points):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
