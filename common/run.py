"""A run's housekeeping: folder, event file, W&B, console, checkpoints, resuming, signals, and what is due when.

Nothing here knows an algorithm. A script from which every call of this module is deleted still learns.
"""

import atexit
import contextlib
import dataclasses
import functools
import glob
import importlib.metadata
import io
import math
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import time
import types
import typing
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map
from tqdm import tqdm

from common.alarms import Watch
from common.arguments import (
    check_precision,
    end_without_a_traceback_where_nobody_reads,
    fail,
    flag,
    keep_freed_memory,
    let_go,
    one_line,
    parse,
    pick_device,
    say,
    show_what_the_console_can,
)
from common.checkpoint import BadCheckpoint, Gone, check_like, load_checkpoint, write_file
from common.events import EventFile, drop_events

try:
    import fcntl
except ImportError:  # Windows has no such locks; there, nothing keeps two processes from resuming one run
    fcntl = None

# Flags that may differ from those of the run that is resumed: they leave what is learnt as it is, but for rounding.
MAY_DIFFER = {
    *("resume", "device", "torch_deterministic", "torch_threads", "compile", "track", "wandb_project_name"),
    *("wandb_entity", "wandb_mode", "diagnostics_interval", "checkpoint_interval", "eval_episodes", "eval_interval"),
    *("capture_video", "stop_on", "record", "cuda_graphs", "seeds"),
}
# Flags that every run has; what a checkpoint lacks of the others came after it, and their defaults are without effect.
ALWAYS = {"env_id", "exp_name", "seed", "seeds", "total_timesteps"}
# What the console shows of the diagnostics, by name, and tags that not every diagnosis has
SHOWN = {"rank": "representation/after/actor/pca_rank", "dead": "representation/after/actor/dead_units"}
RARE = {"losses/explained_variance": "losses/explained_variance is logged only where the returns of a rollout differ"}
for side in ("above", "below"):
    needs = f"trust_region/ratio_{side}_* and excess_ratio need ratios {side} the clip range (a std two)"
    RARE[f"trust_region/ratio_{side}_std"] = needs
_defaults = {}  # of the script's flags but for those, by name; parse_args finds them


def parse_args(args_class):
    """The command line as an instance of the dataclass ``args_class``; a wrong one costs one line and exit code 2.

    With ``--resume runs/RUN``, what the command line leaves out is as it was in that run.
    """
    show_what_the_console_can()
    end_without_a_traceback_where_nobody_reads()
    atexit.register(let_go)
    args = parse(args_class)
    _check_names(args)
    fields = [field for field in dataclasses.fields(args_class) if field.init and field.name not in ALWAYS]
    _defaults.clear()
    _defaults.update({field.name: field.default for field in fields})
    resume = getattr(args, "resume", "")
    folders = [resume] if isinstance(resume, str) else list(resume)
    if folders in ([], [""], ["auto"]):
        return args
    was = [_newest_checkpoint(Path(folder)) for folder in folders]
    values = {**_defaults, **was[0]["args"], "resume": resume, "seeds": ()}
    if len(was) > 1 or getattr(args, "seeds", ()):  # a batch of seeds goes on with a run of each
        values |= {"seed": args_class.seed, "seeds": tuple(one["args"].get("seed") for one in was)}
    kinds = {name: kind for name, kind in typing.get_type_hints(args_class).items() if hasattr(args, name)}
    for name, kind in kinds.items():
        if name not in values or not _fits(values[name], kind):
            others = f"{was[0]['script']} with other flags than these: {flag(name)}"
            fail(f"--resume {folders[0]}: was made by {others}"[:300])
    return parse(args_class, args_class(**{name: values[name] for name in kinds}))


def _check_names(args):
    variables = {"wandb_project_name": "WANDB_PROJECT", "wandb_entity": "WANDB_ENTITY", "wandb_mode": "WANDB_MODE"}
    for name, allowed, what in (
        ("exp_name", r"[\w.+-]{1,100}", "1 to 100 letters, digits and . _ + -, to be part of a folder's name"),
        ("wandb_project_name", r"[^/\\#?%:\x00-\x1f]{1,128}", "1 to 128 characters without / \\ # ? % :"),
        ("wandb_entity", r"[\w.-]{1,128}", "the name of a W&B team or account"),
        ("wandb_mode", "online|offline|disabled|shared|dryrun|run", "online, offline or disabled"),
    ):
        value, source = getattr(args, name, None), flag(name)
        if value is None and getattr(args, "track", False):
            value, source = os.environ.get(variables[name]) or None, variables[name]
        if value is not None and not re.fullmatch(allowed, value):
            fail(f"{source} {value!r}: must be {what}")


def milestones(num_iterations, share):
    """The iterations (of 1 … num_iterations) that end each ``share`` of a run, the last one included."""
    step = max(share * num_iterations, 1)
    return {round(k * step) for k in range(1, int(num_iterations / step + 1e-9) + 1)} | {num_iterations}


def git_revision():
    """The commit that the scripts were run from, with ``-dirty`` if they had been changed.

    Without git it is what GIT_REVISION in the environment says (a container has it from its build), else ``unknown``.
    """
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or the code was copied without its repository
        return os.environ.get("GIT_REVISION") or "unknown"


def library_versions():
    """Version strings of Python and of the packages that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "gymnasium", "ale-py", "envpool", "mujoco"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def random_states(device):
    """The states of PyTorch's generators that a run draws from, as tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def read_checkpoint(path, **types):
    """As ``load_checkpoint``, but a file that it refuses costs one line and exit code 2."""
    try:
        return load_checkpoint(path, **types)
    except BadCheckpoint as error:
        fail(f"{path}: can't be read, {error}")


def _fits(value, kind):
    """Whether a field annotated as ``kind`` may have the plain ``value``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return isinstance(value, str | int) and value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and ... in parts else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    return type(value) is kind or (kind is float and type(value) is int)


def _checkpoints(folder, types):
    """Yield the checkpoints in a run's folder, newest step first; those that can't be read are named and passed over.

    Raises BadCheckpoint if there is none.
    """
    damaged, found = [], False

    def read(path):
        try:
            checkpoint = load_checkpoint(path, **types)
            if path.stem.isdecimal() and checkpoint["global_step"] != int(path.stem):
                raise BadCheckpoint(f"it was made at step {checkpoint['global_step']}")
            return checkpoint
        except Gone:  # never there, or renamed by the process that is at this run
            return None
        except BadCheckpoint as error:
            damaged.append(f"{path.name} can't be read, {error}")

    # By step: a process that was killed between writing a snapshot and latest.pt leaves a newer snapshot.
    rolling = [read(folder / "checkpoints" / name) for name in ("latest.pt", "previous.pt")]
    candidates = [(x["global_step"], 1, x["path"], x) for x in rolling if x]
    candidates += [(int(x.stem), 0, x, None) for x in folder.glob("checkpoints/*.pt") if x.stem.isdecimal()]
    for _, _, path, checkpoint in sorted(candidates, key=lambda x: x[:2], reverse=True):
        checkpoint = checkpoint or read(path)
        if checkpoint is None:
            continue
        if damaged:
            others = f" (and {len(damaged) - 1} more)" if damaged[1:] else ""
            _say_once(f"{folder}: {damaged[0]}{others}; {path.name} is used instead")
            damaged.clear()
        found = True
        yield checkpoint
    if not found:
        if not damaged:
            raise BadCheckpoint("must be auto, or a run's folder with checkpoints in it")
        raise BadCheckpoint(f"none of its {len(damaged)} checkpoints can be read; {damaged[0]}")


def _whole(path, step):
    """Whether the checkpoint at ``path`` can be read and is of ``step`` or before."""
    try:
        return load_checkpoint(path)["global_step"] <= step
    except BadCheckpoint:
        return False


@functools.cache
def _say_once(line):
    say(one_line(line), file=sys.stderr)


def _newest_checkpoint(folder):
    try:
        return next(_checkpoints(folder, {}))
    except BadCheckpoint as error:
        fail(f"--resume {folder}: {error}")


_locks = {}  # by run folder, held until this process ends, however it ends


def _lock(folder):
    """Keep other processes from the run in ``folder``; False if one of them is at it."""
    if fcntl is None or folder.resolve() in _locks:
        return True
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # no folder, or one without access: whoever reads in it says so
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks, as some of the networked ones
        os.close(descriptor)
        return True
    _locks[folder.resolve()] = descriptor
    return True


def _unlock(folder):
    if folder.resolve() in _locks:
        os.close(_locks.pop(folder.resolve()))


def find_checkpoint(args, script, **types):
    """The checkpoint from which the run that ``--resume`` names goes on, or None for a new run.

    args: checked, with ``resume`` a run's folder, ``auto`` (the newest unfinished run of these arguments under runs/)
    or nothing. script: the name of the file that made it. types: the keys that the script restores, with their types.
    Arguments that contradict the checkpoint are refused by name; ``total_timesteps`` may grow. If the run is finished,
    this says so and ends the process with exit code 0.
    """
    return find_checkpoints([args], script, **types)[0]


def find_checkpoints(runs, script, **types):
    """As ``find_checkpoint`` for runs that are trained together: a list, all of the same iteration, or all None.

    runs: the arguments of each. Runs that a kill, or a disk that was full for some of them, left at different
    iterations go back to the newest that all of them have.
    """
    types = {"episodes": int, "recent_returns": list, **types}
    named = [args.resume if isinstance(args.resume, str) else "".join(args.resume) for args in runs]
    if not all(named):
        return [None] * len(runs)
    auto = set(named) == {"auto"}
    folders = [_newest_run(args, script, types, len(runs) == 1) for args in runs] if auto else [*map(Path, named)]
    nothing = "--resume auto: runs/ has no unfinished run of these arguments; a new one starts"
    if None in folders:
        say(nothing)
        return [None] * len(runs)
    candidates, checkpoints = [_checkpoints(folder, types) for folder in folders], []
    for args, folder, older in zip(runs, folders, candidates, strict=True):
        if not _lock(folder):
            fail(f"--resume {folder}: a process that is still alive is at this run")
        try:
            checkpoints.append({**next(older), "passed_over": []})
        except BadCheckpoint as error:
            fail(f"--resume {folder}: {error}")
        if checkpoints[-1]["script"] != script:
            fail(f"--resume {folder}: was made by {checkpoints[-1]['script']}, not by {script}"[:300])
        if name := _contradiction(args, checkpoints[-1]):
            now = getattr(args, name)
            was = {**_defaults, **checkpoints[-1]["args"]}.get(name)
            why = "may grow, not shrink; " if name == "total_timesteps" else "contradicts the run that is resumed: "
            fail(f"{flag(name)} {now}: {why}{folder} was started with {was}"[:300])
    newest = [checkpoint["iteration"] for checkpoint in checkpoints]
    while len({checkpoint["iteration"] for checkpoint in checkpoints}) > 1:
        i = max(range(len(runs)), key=lambda i: checkpoints[i]["iteration"])
        passed_over = [*checkpoints[i]["passed_over"], checkpoints[i]["path"]]
        checkpoints[i] = {**next(candidates[i], {"iteration": -1}), "passed_over": passed_over}
    least = checkpoints[0]["iteration"]
    # What is far ahead is not thrown away: it was trained alone, or another seed of the batch ended early.
    if least < 0 or max(newest) - least > 2 * max(0.025 * runs[0].num_iterations, 1):
        ahead = folders[newest.index(max(newest))]
        behind = folders[newest.index(min(newest))]
        fail(
            f"--resume {ahead}: stands too far ahead of {behind} to go on with it, at iteration {max(newest)}, not "
            f"{min(newest)}; resume them apart (--resume and --seeds take any of the seeds)"
        )
    for folder, iteration in zip(folders, newest, strict=True):
        if iteration > least:
            say(f"{folder}: goes back from iteration {iteration} to {least}, the last of all seeds")
    for args, checkpoint in zip(runs, checkpoints, strict=True):
        step, iteration = checkpoint["global_step"], checkpoint["iteration"]
        if step != iteration * args.batch_size * getattr(args, "frame_skip", 1):
            fail(f"{checkpoint['path']}: can't be resumed, step {step} is not the end of iteration {iteration}")
    if least >= runs[0].num_iterations:
        if auto:
            say(nothing)
            return [None] * len(runs)
        names = " ".join(map(str, folders))
        say(f"{names}: finished, nothing is left to do (a larger --total-timesteps goes on)")
        raise SystemExit(0)
    if auto:
        say(f"--resume auto: goes on with {' '.join(map(str, folders))}")
    return checkpoints


def _contradiction(args, checkpoint):
    """The first field of ``args`` that keeps the run of ``checkpoint`` from going on with them, or None."""
    was = {**_defaults, **checkpoint["args"]}
    for name, value in dataclasses.asdict(args).items():
        if name == "total_timesteps" and type(was.get(name)) is int:
            if value < was[name]:
                return name
        elif name not in MAY_DIFFER | {"num_iterations", "batch_size"} and (name not in was or was[name] != value):
            return name


def _newest_run(args, script, types, unfinished):
    """The folder of the newest run of the arguments ``args`` that no process is at, or None.

    If ``unfinished``, it has iterations left; of runs that were trained together one may be finished, others not.
    """
    pattern = glob.escape(f"{args.env_id}__{args.exp_name}__{args.seed}__") + "*"
    folders = [path for path in Path("runs").glob(pattern) if path.name.rpartition("__")[2].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("__")[2]), reverse=True):
        if not _lock(folder):
            _say_once(f"--resume auto passes over {folder}: a process that is still alive is at it")
            continue
        try:
            checkpoint = next(_checkpoints(folder, types))
            same = checkpoint["script"] == script and not _contradiction(args, checkpoint)
            same = same and checkpoint["args"]["total_timesteps"] == args.total_timesteps
            if same and not (unfinished and checkpoint["iteration"] >= args.num_iterations):
                return folder
        except BadCheckpoint as error:
            _say_once(f"--resume auto passes over {folder}: {error}")
        _unlock(folder)
    return None


def check_shapes(checkpoint, agent_class, *args):
    """Refuse a checkpoint whose weights don't fit ``agent_class(*args)``, before memory is taken for the latter."""
    try:
        with torch.device("meta"):
            check_like("agent", checkpoint["agent"], agent_class(*args).state_dict())
    except BadCheckpoint as error:
        fail(f"{checkpoint['path']}: can't be resumed, {error}")


def restore(checkpoint, agent, optimizers, device, **others):
    """Put the networks, the optimisers' (Adam's) moments and PyTorch's random states back to where they were.

    ``others`` are further dicts that the script will restore itself, like those under their names in the checkpoint.
    A checkpoint that doesn't fit costs one line and exit code 2. Learning rates and the like are not taken from it.
    """
    try:
        for name, wanted in others.items():
            check_like(name, checkpoint[name], wanted)
        check_like("agent", checkpoint["agent"], agent.state_dict())
        agent.load_state_dict(checkpoint["agent"])
        if len(checkpoint["optimizers"]) != len(optimizers):
            raise BadCheckpoint(f"it has {len(checkpoint['optimizers'])} optimizers, not {len(optimizers)}")
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            moments = saved["state"] if isinstance(saved, dict) and isinstance(saved.get("state"), dict) else {None: {}}
            if moments and moments.keys() != set(range(len(params))):
                raise BadCheckpoint("its optimizers are not those of its agent")
            for i, ones in moments.items():
                wanted = {"step": torch.tensor(0.0), "exp_avg": params[i], "exp_avg_sq": params[i]}
                check_like("optimizers", ones, wanted)
                # Copied, to lie in memory as the parameters do
                moments[i] = {name: torch.empty_like(wanted[name]).copy_(ones[name]) for name in ones}
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        states = checkpoint["random_states"]
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        if device.type == "mps" and "mps" in states:
            torch.mps.set_rng_state(states["mps"])
    except (BadCheckpoint, AttributeError, RuntimeError, TypeError) as error:
        fail(f"{checkpoint['path']}: can't be resumed, {error}")


def _may_be_written(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def prepare(args):
    """The device that ``args`` names, and this process made ready for it, until training begins ended by one Ctrl-C."""
    quit_on_interrupt()
    device = pick_device(args.device)
    check_precision(getattr(args, "precision", "float32"), device)
    keep_freed_memory()
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    # TF32 has 10 bits, whose rounding would pass for directions of features where ranks are measured.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def quit_on_interrupt():
    """Let Ctrl-C end the process in one line, until ``StopRequest`` takes over: there is nothing to save yet."""
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted before training began", code=130))


class StopRequest:
    """SIGTERM and Ctrl-C, noted for the training loop, which finishes its iteration and saves; one for the process.

    ``exit_code`` is 0 until a signal comes, then 128 + its number: 143 or 130. A second one ends the process at once.
    """

    def __init__(self):
        self.exit_code = 0
        self.newline = "\n" if sys.stderr.isatty() else ""  # the progress bar's line has none
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.exit_code = 128 + number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        # Not print, which may itself be what the signal interrupted
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # nobody is there to read it
            line = f"{name}: finishing this iteration, then a checkpoint; a second one ends the process at once"
            os.write(2, f"{self.newline}{line}\n".encode())

    def __bool__(self):
        return self.exit_code != 0


class Run:
    """The folder ``runs/{env_id}__{exp_name}__{seed}__{time}`` and everything that is written to it.

    Iterated over, it gives the iterations of its training (``Runs`` those of several runs), and at the end of each does
    what is due: it logs ``scalars``, shows progress, saves checkpoints, evaluates, and ends where a signal asks for it.

    args: the script's, checked. Its fields env_id, exp_name, seed and those of ``RunArgs`` are read here, and where one
    of W&B's is None, W&B's own variable; all of them go into the hyperparameter table, W&B's config and every
    checkpoint. Environment steps, by which everything is logged, are frames where args has a ``frame_skip``.
    state: returns what a checkpoint holds of the script's own, with its name under ``script``.
    checkpoint: of ``find_checkpoint``, whose folder and W&B run go on; what they have of later steps goes.
    play: ``play(seeds, greedy, video)``, as ``common.evaluation.play`` with its other arguments given; film: whether
    it can make videos.
    console: whether this run shows the progress bar, which of several runs in one process one does.
    """

    def __init__(self, args, state=None, checkpoint=None, play=None, film=True, console=True):
        _check_names(args)
        self.args = dataclasses.asdict(args)
        self.state, self.play, self.film = state, play, film and getattr(args, "capture_video", False)
        self.frame_skip = getattr(args, "frame_skip", 1)
        self.steps = args.batch_size * self.frame_skip  # of an iteration
        self.total_steps = args.num_iterations * self.steps
        self.unit = "frame" if hasattr(args, "frame_skip") else "step"
        self.group, self.ended, self.exit_code = [self], False, 0  # the runs that are trained together
        self.done = checkpoint["iteration"] if checkpoint else 0  # iterations before this process
        self.episodes = checkpoint["episodes"] if checkpoint else 0
        self.recent_returns = deque(checkpoint["recent_returns"] if checkpoint else (), maxlen=100)
        self.scalars, self.shown, self.watch = {}, {}, Watch()
        try:
            self.watch.load_state_dict((checkpoint or {}).get("alarms", {}))
        except ValueError as error:
            fail(f"{checkpoint['path']}: can't be resumed, {error}")
        # Read now: whoever edits the code while this runs doesn't change what was run.
        self.origin = {"args": self.args, "versions": library_versions(), "git_revision": git_revision()}
        self.said = set()
        self.bar = self.wandb = None
        self.saved = True  # whether the last checkpoint could be written
        start = checkpoint["global_step"] if checkpoint else 0
        if checkpoint:
            self._go_on(checkpoint)
        else:
            self._make_folder(args)
        try:
            self.events = EventFile(self.folder, after=start if checkpoint else None)
            # The script too: --exp-name may be anything.
            table = {"script": Path(sys.argv[0]).name, **self.args}
            rows = "\n".join(f"|{key}|{value}|" for key, value in table.items())
            step = start + 1 if checkpoint else 0
            self.events.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", step)
        except OSError as error:
            fail(f"{self.folder}: can't be written to ({error.strerror}); runs/ must be writable")
        wandb_id = str((checkpoint or {}).get("wandb_id"))
        self.origin["wandb_id"] = wandb_id if re.fullmatch(r"[0-9a-f]{8}", wandb_id) else None
        self.wandb_start = -1
        if args.track:
            self._start_wandb(args)
        # A bar redraws its line, which makes a mess of a log file.
        if console and sys.stderr.isatty():
            options = {"unit": self.unit, "unit_scale": True, "dynamic_ncols": True, "smoothing": 0.05}
            self.bar = tqdm(total=self.total_steps, initial=start, **options)
        self.say(f"{self.folder}")
        if checkpoint:
            self.say(f"resumed from {checkpoint['path'].name} at {start:,} steps; the environments begin new episodes")
            for given, lacking, words in (
                (self.args, checkpoint["args"], "the checkpoint is from before these flags, and the run goes on with"),
                (checkpoint["args"], self.args, "the checkpoint has flags unknown here, and the run goes on without"),
            ):
                others = {name: x for name, x in given.items() if name not in lacking and x != ()}
                if others:
                    flags = ", ".join(f"{flag(name)} {x}" for name, x in others.items())
                    self.say(one_line(f"{words} {flags}"[:1000]))
            was, now = checkpoint["args"].get("total_timesteps"), self.args.get("total_timesteps")
            if was != now:
                self.say(f"--total-timesteps grew from {was:,} to {now:,}: from here on, schedules and grids follow it")
            was, now = ({**x["versions"], "code": x["git_revision"]} for x in (checkpoint, self.origin))
            others = [f"{x} {now.get(x)} (was {was.get(x)})" for x in now | was if now.get(x) != was.get(x)]
            if others:
                self.say(one_line(f"not what it was saved with: {', '.join(others)}"[:1000]))

    def _make_folder(self, args):
        while True:
            self.name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
            self.folder = Path("runs") / self.name
            try:
                self.folder.mkdir(parents=True)
                (self.folder / "checkpoints").mkdir()
                break
            except FileExistsError:
                if not self.folder.is_dir():
                    fail(f"{Path('runs')}: is not a folder; runs are kept under it")
                time.sleep(0.2)  # another run took this second's name
            except OSError as error:
                fail(f"{self.folder}: can't be created ({error.strerror}); runs/ must be writable")
        _lock(self.folder)

    def _go_on(self, checkpoint):
        """Take over the folder of ``checkpoint``, and drop from it what was logged and kept after it."""
        self.folder = checkpoint["path"].parent.parent
        self.name = self.folder.resolve().name
        step = checkpoint["global_step"]
        try:
            drop_events(self.folder, step)
            for path in [*self.folder.glob("checkpoints/*"), *self.folder.glob("videos/*")]:
                number = re.match(r"\d+", path.name)
                later = bool(number) and int(number[0]) > step
                if path.suffix == ".tmp" or path in checkpoint["passed_over"] or (later and path.suffix == ".mp4"):
                    path.unlink()
                elif path.suffix != ".pt" or path == checkpoint["path"]:
                    continue
                elif later or not (number or _whole(path, step)):
                    path.rename(f"{path}.damaged")  # kept: what can't be read here and now may still be of use
        except OSError as error:
            fail(f"{self.folder}: can't be written to ({error.strerror}); runs/ must be writable")

    def _start_wandb(self, args):
        import wandb  # here because it takes a second, which only those who track should spend

        self.origin["wandb_id"] = self.origin["wandb_id"] or secrets.token_hex(4)
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # W&B would refuse it
        # W&B's process keeps a log in the user's cache, and without one writes all of it to the console.
        home = os.environ.get("HOME") and os.path.join(os.environ["HOME"], ".cache")
        cache = os.environ.get("WANDB_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or home
        if sys.platform == "linux" and not (cache and _may_be_written(Path(cache, "wandb", "logs"))):
            os.environ["WANDB_CACHE_DIR"] = str(self.folder.resolve() / "wandb")
        # A short wait: an unreachable server must not hold up training. Nor may it at the end of the run.
        options = {
            "project": args.wandb_project_name or os.environ.get("WANDB_PROJECT") or "no-representation-no-trust",
            "entity": args.wandb_entity,
            "name": os.environ.get("WANDB_NAME") or self.name,
            "id": self.origin["wandb_id"],
            "resume": "allow",
            "config": self.args,
            "dir": str(self.folder),
            "save_code": True,
            "settings": wandb.Settings(init_timeout=10, finish_timeout=60),
            "reinit": "create_new" if wandb.run else "default",  # several runs may be in one process
        }
        with self._tracking():
            try:
                self.wandb = wandb.init(mode=args.wandb_mode, **options)
            except wandb.errors.Error as error:
                reason = str(error).partition("\n")[0]
                self.say(
                    f"W&B can't be reached and this run is tracked offline ({reason}); `wandb sync` uploads it later"
                )
                # The attempt that failed holds its id until W&B's process ends, which other runs may be using.
                if wandb.run:
                    options["id"] = self.origin["wandb_id"] = secrets.token_hex(4)
                else:
                    wandb.teardown()
                self.wandb = wandb.init(mode="offline", **options)
            # What W&B has of steps after the checkpoint can't be taken back; it is not logged a second time.
            if self.wandb.resumed:
                self.wandb_start = self.wandb.summary.get("global_step", -1)
            self.wandb.config.update(self.args, allow_val_change=True)
            self.wandb.define_metric("global_step")
            self.wandb.define_metric("*", step_metric="global_step")

    @contextlib.contextmanager
    def _tracking(self):
        """Whatever W&B raises costs a line and the tracking, not the run."""
        try:
            yield
        except Exception as error:  # its errors are of many kinds, and none of them is a reason to stop training
            self.wandb = None
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.say(f"W&B failed and tracks this run no further ({reason}); the event file has everything")

    @contextlib.contextmanager
    def _logging(self):
        """An event file that can't be written to, or that had to be made anew, costs a line."""
        try:
            yield
        except OSError as error:
            lost = "until then a kill would lose them, also those from before a checkpoint"
            self.say_once(f"{self.events.path} can't be written to ({error.strerror}): logs wait until it can; {lost}")
        if self.events.remade:
            self.events.remade = False
            _unlock(self.folder)  # that was the deleted folder's
            _lock(self.folder)
            self.say(f"{self.folder} was deleted; it is made anew, with all that was logged since this process began")

    def log(self, scalars, step):
        """Write ``{tag: number}`` at ``step`` (environment steps) to the event file and to W&B."""
        if not scalars:
            return
        with self._logging():
            self.events.add_scalars(scalars, step)
        if self.wandb and step > self.wandb_start:
            with self._tracking():
                self.wandb.log({**scalars, "global_step": step})

    def log_video(self, tag, path, step):
        """Show the mp4 at ``path`` in W&B; without ``--track`` the file in the run's folder is all there is."""
        if self.wandb and step > self.wandb_start:
            import wandb

            with self._tracking():
                self.wandb.log({tag: wandb.Video(str(path), format="mp4"), "global_step": step})

    def begin(self, iteration, diagnosed):
        """Begin an iteration: its steps are known, nothing is logged yet, and the state is one to come back to."""
        self.iteration, self.diagnosed, self.scalars, self.times = iteration, diagnosed, {}, {}
        self.previous_step, self.global_step = (iteration - 1) * self.steps, iteration * self.steps
        self.good = self._whole_state(iteration - 1)
        self.last_lap = time.time()

    def _whole_state(self, iteration):
        counters = {"iteration": iteration, "global_step": iteration * self.steps, "episodes": self.episodes}
        returns = {"recent_returns": list(map(float, self.recent_returns)), "alarms": self.watch.state_dict()}
        # Cloned: training goes on in the tensors, and one may be a part of a larger one, which would be saved whole.
        return tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, {**self.state(), **counters, **returns})

    def find_untrained(self):
        """Save a new run's checkpoint 0; its weights stay as ``untrained``, None where a resumed run has lost it."""
        if not self.done:
            state = self._whole_state(0)
            self.save_checkpoint(0, state)
        else:
            try:
                state = load_checkpoint(self.folder / "checkpoints" / "0.pt")
                check_like("agent", state["agent"], self.state()["agent"])
            except BadCheckpoint as error:
                self.say(f"optim/*/init_distance is not logged: checkpoints/0.pt can't be read, {error}")
                state = {"agent": None}
        self.untrained = state["agent"]

    def lap(self, name):
        """Log the time since the last lap as ``time/{name}``, in seconds, where the iteration is diagnosed."""
        now = time.time()
        self.times[f"time/{name}"], self.last_lap = now - self.last_lap, now

    def log_episodes(self, episodes):
        """Log the episodes that ended in a rollout: tuples of agent steps into it, return, length in agent steps."""
        for steps, episode_return, length in episodes:
            scalars = {"charts/episodic_return": episode_return, "charts/episodic_length": length}
            self.log(scalars, self.previous_step + steps * self.frame_skip)
            self.recent_returns.append(episode_return)
        if episodes:
            self.episodes += len(episodes)
            self.scalars["charts/rollout_return"] = np.mean([episode[1] for episode in episodes])
            self.scalars["charts/rollout_length"] = np.mean([episode[2] for episode in episodes])

    def require_finite(self, numbers):
        """End the run where one of ``numbers``, lists by name, is not finite."""
        for name, x in numbers.items():
            if not all(map(math.isfinite, x)):
                self.log(self.scalars, self.global_step)
                return self.stop(f"the {name} is not finite")

    def stop(self, why):
        """End the run with exit code 1, after a checkpoint of the last good state; the process too, if none is left."""
        holds = "holds" if self.save_checkpoint(self.previous_step, self.good) else "lacks"
        self.ended = True
        others = [run for run in self.group if not run.ended]
        self.exit_code = self.close(exit_code=1, keep_bar=bool(others))
        line = one_line(f"{why} in iteration {self.iteration}; {self.folder} {holds} the state before it")
        self.group[0].say(f"error: {line}", file=sys.stderr)
        if not others:
            raise SystemExit(1)

    def log_iteration(self, agent_steps_per_second):
        """Log ``scalars``, and keep of them what the console shows."""
        speed = {"charts/SPS": agent_steps_per_second, "charts/FPS": agent_steps_per_second * self.frame_skip}
        alarms = self.watch(self.global_step, self.global_step / self.total_steps, self.scalars)
        if self.diagnosed or alarms:
            self.scalars |= {f"alarm/{name}": rang for name, rang in self.watch.ringing.items()}
        self.log({**self.scalars, **(self.times if self.diagnosed else {}), **speed}, self.global_step)
        for alarm in alarms:
            self.raise_alarm(alarm)
        for name, tag in SHOWN.items():
            if tag in self.scalars:
                self.shown[name] = self.scalars[tag]
        if self.recent_returns:
            self.shown["return"] = np.mean(self.recent_returns)
        for tag, when in RARE.items():
            if self.diagnosed and tag not in self.scalars:
                self.group[0].say_once(when)

    def raise_alarm(self, alarm):
        """Say an alarm on the console, in the event file and to W&B."""
        whose = f"seed {self.args['seed']}: " if len(self.group) > 1 else ""
        self.group[0].say(f"{whose}{alarm}")
        with self._logging():
            self.events.add_text("alarms", str(alarm), alarm.step)
        if self.wandb and alarm.step > self.wandb_start:
            with self._tracking():
                self.wandb.alert(title=f"{alarm.name}: {self.name}", text=str(alarm))

    def end_on_collapse(self):
        """End the run, its last state saved; the last one of its process is left for the script to close."""
        say, step = self.group[0].say, f"{self.global_step:,} {self.unit}s"
        say(f"--stop-on collapse: {self.folder} ends at {step}; its return and its rank are lost for good")
        if sum(not run.ended for run in self.group) > 1:
            self.ended = True
            self.exit_code = self.close(keep_bar=True)

    def evaluate(self):
        """Log the returns and lengths of ``--eval-episodes`` episodes, sampled and greedy, with a video of each kind.

        Whatever fails costs a line and what it was to show, not the run.
        """
        step, say = self.global_step, self.group[0].say
        seeds = np.random.SeedSequence([self.args["seed"], step]).generate_state(self.args["eval_episodes"]) // 2
        for kind in ("sampled", "greedy"):
            path = self.folder / "videos" / f"{step}-{kind}.mp4"
            for video in (path, None) if self.film else (None,):
                try:
                    returns, lengths = self.play(seeds.tolist(), kind == "greedy", video)
                except Exception as error:  # of encoders, drivers and simulators, which raise what they like
                    what = f"{video}: can't be written" if video else f"evaluation, {kind}: failed"
                    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".rstrip(": ")
                    say(f"{what} ({one_line(reason)[:200]}); it is left out")
                    continue
                means = {"episodic_return": returns.mean(), "episodic_length": lengths.mean()}
                self.log({f"eval/{kind}/{name}": mean for name, mean in means.items()}, step)
                seed = f"seed {self.args['seed']}, {kind}"
                say(f"evaluation of {seed}: mean return {means['episodic_return']:.1f} of {len(returns)} episodes")
                if video:
                    self.log_video(f"eval/{kind}/video", video, step)
                break

    def __iter__(self):
        return iter(Runs([self]))

    def say(self, message, file=None):
        """Print a line without breaking the progress bar; ``file`` is standard output where there is none."""
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self.bar.write(message, file=sys.stderr)
        else:
            say(message, file)

    def say_once(self, message):
        """Print a line the first time it comes."""
        if message not in self.said:
            self.said.add(message)
            self.say(message)

    def progress(self, step, **shown):
        """Move the bar to ``step`` environment steps and show ``shown``, numbers by name."""
        if self.bar is not None:
            self.bar.set_postfix({key: f"{value:.4g}" for key, value in shown.items()}, refresh=False)
            self.bar.update(step - self.bar.n)

    def report(self, step, fps, **shown):
        """Print the same as a line where there is no bar; ``fps`` is environment steps a second."""
        if self.bar is None:
            left = tqdm.format_interval((self.total_steps - step) / fps)
            shown = "".join(f", {key} {value:.4g}" for key, value in shown.items())
            self.say(f"{step:,}/{self.total_steps:,} {self.unit}s, {fps:.0f} a second, {left} left{shown}")

    def save_checkpoint(self, step, state, snapshot=True):
        """Write ``state`` and where it comes from to ``checkpoints/latest.pt``, and a snapshot to ``{step}.pt`` first.

        Each is written all or nothing, and the ``latest.pt`` before it stays as ``previous.pt``. ``state`` holds
        tensors, numbers, strings, and dicts and lists of them, so that ``torch.load(path, weights_only=True)`` reads
        the file: opening a checkpoint never runs code. Where it can't be written, the ones before it stay, and a line
        says so, once until it can again. Returns whether it was written.
        """
        content = io.BytesIO()
        torch.save({**state, **self.origin}, content)
        folder = self.folder / "checkpoints"
        latest = folder / "latest.pt"
        with self._logging():
            self.events.sync()  # no checkpoint is ahead of its logs
        was_saved, self.saved = self.saved, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if snapshot:
                write_file(folder / f"{step}.pt", content.getbuffer())
            write_file(latest, content.getbuffer(), before=folder / "previous.pt")
            self.saved = True
        except OSError as error:
            if was_saved:
                self.say(f"{folder}: can't be written to ({error.strerror}), so there is no checkpoint of step {step}")
        return self.saved

    def close(self, exit_code=None, keep_bar=False):
        """Finish the event file, the bar and the W&B run, which shows the exit code.

        Returns the exit code: ``exit_code``, by default that of the signal that ended the training, or 0; and 1 if the
        last checkpoint or the last logs could not be written. ``keep_bar`` is for a run that ends before others of its
        process, whose bar it has.
        """
        exit_code = self.exit_code if exit_code is None else exit_code
        if not self.saved:
            self.say(f"{self.folder}: the last checkpoint could not be written; the one before it is the newest")
            exit_code = 1
        try:
            self.events.close()
        except OSError as error:
            self.say(f"{self.events.path} can't be written to ({error.strerror}): the last logs are lost")
            exit_code = 1
        if self.bar is not None and not keep_bar:
            self.bar.close()
        if self.wandb:
            with self._tracking():
                self.wandb.finish(exit_code=exit_code)
        return exit_code


class Runs:
    """Runs that are trained together, one step of training for all of them; iterated over as a ``Run`` is."""

    def __init__(self, runs):
        self.runs = []
        for run in runs:
            self.add(run)

    def add(self, run):
        self.runs.append(run)
        run.group = self.runs

    def __getitem__(self, s):
        return self.runs[s]

    @property
    def training(self):
        """The indices of those that have not ended on a fault, or a collapse, of their own."""
        return [s for s, run in enumerate(self.runs) if not run.ended]

    @property
    def first(self):
        """The first iteration of this process."""
        return self.runs[0].done + 1

    def lap(self, name):
        for run in self.runs:
            run.lap(name)

    def __iter__(self):
        first, args = self.runs[0], self.runs[0].args
        last = args["num_iterations"]
        interval = args["diagnostics_interval"] or math.ceil(last / 1000)
        snapshots = milestones(last, 0.025) | {0}
        checkpoints = milestones(last, args["checkpoint_interval"]) | snapshots
        evaluations = milestones(last, args["eval_interval"] or 1) if args["eval_episodes"] else set()
        for run in self.runs:
            run.find_untrained()
        interrupted = StopRequest()
        start_time = time.time()
        for iteration in range(self.first, last + 1):
            self.diagnosed = diagnosed = (iteration - 1) % interval == 0 or iteration == last
            for s in self.training:
                self.runs[s].begin(iteration, diagnosed)
            yield iteration

            # Agent steps a second of each run; together they make as many times that
            speed = (iteration - first.done) * args["batch_size"] / (time.time() - start_time)
            training = [self.runs[s] for s in self.training]
            for run in training:
                run.log_iteration(speed)
            names = training[0].shown
            shown = {name: np.mean([run.shown[name] for run in training if name in run.shown]) for name in names}
            first.progress(training[0].global_step, **shown)
            if diagnosed:
                first.report(training[0].global_step, speed * first.frame_skip, **shown)
            # After logging, since what was logged up to a checkpoint is what a resumed run keeps
            collapsed = [run for run in training if run.args.get("stop_on") == "collapse" and run.watch.collapsed]
            for run in training if iteration in checkpoints or interrupted else collapsed:
                run.save_checkpoint(run.global_step, run._whole_state(iteration), iteration in snapshots)
            if iteration in evaluations:  # with the checkpoints saved: what only looks at an agent can't cost them
                for run in training:
                    run.evaluate()
            for run in collapsed if iteration < last else ():
                run.end_on_collapse()
            if interrupted or len(collapsed) == len(training):
                for s in self.training:
                    self.runs[s].exit_code = interrupted.exit_code
                return

    def close(self):
        """Close those that are training; returns the exit code of the process."""
        exit_codes = {self.runs[s].close() for s in self.training}
        ended = max((run.exit_code for run in self.runs if run.ended), default=0)
        return min(exit_codes - {0}, default=ended)
