"""One attempt at some runs, on whichever machine the scheduler of `benchmark.run` gives it.

A training script is started as a process of its own in the shared folder, from the last checkpoint if there is one.
Its log file is locked from the attempt's start until every process that writes to it is dead, so that a run which moved
to another machine never trains twice at the same time.
"""

import ast
import contextlib
import dataclasses
import functools
import glob
import operator
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import BadCheckpoint, load_checkpoint
from common.run import MAY_DIFFER

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
GRACE = 90  # seconds that a script may take to end its iteration and save, once it is asked to
PATIENCE = 300  # seconds that an attempt waits for another process to leave its runs alone
MARK = "=== "  # begins the lines that an attempt itself writes to the log file
REFUSED, BUSY = 2, 75  # exit codes: the user has to mend something; another process is at the run

# Becomes the script, but dies with the process that starts it (a worker of Ray, whose SIGINT is blocked): where a run
# loses its machine, nothing of it may go on. Only Linux has this; elsewhere the lock keeps the next attempt waiting.
BECOME = """
import ctypes, os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, [])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Unit:
    """What one process does: a run, several runs that differ in their seed, or something about a finished run."""

    command: tuple[str, ...]  # python, a script's file name, and its flags
    log: str  # file name in logs/
    names: tuple[str, ...]  # what is shown; of runs that are trained, {env_id}__{exp_name}__{seed}
    seeds: tuple[int, ...] = ()  # those of ``names``, if runs are trained
    batched: bool = False  # one process for several seeds
    probed: str = ""  # else the folder of the run that the command is about
    group: str = ""  # W&B's group


@dataclass(frozen=True)
class State:
    """Where a run stands: its folder under runs/, environment steps done, mean of its recent returns, and whether it is
    finished; all but the last are None for one without a checkpoint."""

    folder: str | None = None
    steps: int | None = None
    iteration: int | None = None
    before: int | None = None  # iteration of the checkpoint before the last one, to which a run can go back
    score: float | None = None
    finished: bool = False


def newest_checkpoints(folder):
    """Yield the checkpoints of a run's folder that can be read, newest first."""
    numbered = sorted((int(path.stem), path) for path in folder.glob("*.pt") if path.stem.isdecimal())
    for path in [folder / "latest.pt", folder / "previous.pt", *(path for _, path in reversed(numbered))]:
        with contextlib.suppress(BadCheckpoint):
            yield load_checkpoint(path)


def flags_of(words):
    """The flags of a command line, {name without dashes: [values]}; later ones count. ValueError for a stray word."""
    flags, values = {}, None
    for word in words:
        if re.match(r"--\w", word):
            name, equals, value = word[2:].partition("=")
            name = name.replace("_", "-")
            values = [value] if equals else []
            flags.pop(name.removeprefix("no-"), None)
            flags.pop(f"no-{name}", None)
            flags[name] = values
        elif values is None or word == "--":
            raise ValueError(f"{word!r} belongs to no flag")
        else:
            values.append(word)
    return flags


@functools.cache
def defaults_of(script):
    """The defaults in a script's ``Args``, {field: value}; the script is read, not run."""
    defaults = {}
    for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
        for line in node.body if isinstance(node, ast.ClassDef) and node.name == "Args" else ():
            with contextlib.suppress(ValueError):  # a field that is filled in at runtime
                if isinstance(line, ast.AnnAssign) and line.value:
                    defaults[line.target.id] = ast.literal_eval(line.value)
    return defaults


def means(words, value, same=operator.eq):
    """Whether the words behind a flag stand for this value of a run's arguments."""
    if isinstance(value, tuple):
        return len(words) == len(value) and all(means([word], x) for word, x in zip(words, value, strict=True))
    if isinstance(value, bool):
        return value and not words
    try:
        return same(float(*words), value) if isinstance(value, int | float) else words == [str(value)]
    except (TypeError, ValueError):  # no number, or several words
        return False


def is_of(unit, seed, checkpoint):
    """Whether a checkpoint was made by the unit's command, or by one for fewer steps that can go on.

    A folder's name doesn't tell: a run that was started by hand may have the name, and other arguments.
    """
    was, script = checkpoint["args"], unit.command[1]
    if checkpoint["script"] != script:
        return False
    said = {name.replace("-", "_"): words for name, words in flags_of(unit.command[2:]).items()}
    apart = MAY_DIFFER | {"seeds"}
    for name, value in {**defaults_of(script), "seed": seed}.items():
        # A run from before the script had a flag did without it.
        if not {name, f"no_{name}"} & {*said, *apart} and was.get(name, value) != value:
            return False
    for name, words in said.items():
        plain, same = name.removeprefix("no_"), operator.ge if name == "total_timesteps" else operator.eq
        right = was.get(plain) is False if plain != name else plain in was and means(words, was[plain], same)
        if not right and plain not in apart:
            return False
    return True


def state_of(unit, name, seed, folder):
    """The State of the unit's run ``name`` in ``folder``/runs; of several such runs, that of the furthest."""
    states = [State()]
    total = flags_of(unit.command[2:]).get("total-timesteps")
    for path in sorted((folder / "runs").glob(glob.escape(name) + "__*")):
        checkpoints = newest_checkpoints(path / "checkpoints")
        last = next(checkpoints, None)
        if not path.name.rpartition("__")[2].isdecimal() or last is None or not is_of(unit, seed, last):
            continue
        args = last["args"]
        iterations = args.get("num_iterations", 0)
        if total:  # may be more than the run was started with
            iterations = int(float(*total)) // (args["batch_size"] * args.get("frame_skip", 1))
        finished = last["iteration"] >= iterations
        before = None if finished else next(checkpoints, {"iteration": None})["iteration"]
        returns = last.get("recent_returns")
        score = float(np.mean(returns)) if returns else None
        relative = f"runs/{path.name}"
        states.append(State(relative, last["global_step"], last["iteration"], before, score, finished))
    return max(states, key=lambda state: (state.finished, -1 if state.iteration is None else state.iteration))


def states_of(unit, folder):
    """The State of each of the unit's runs; a run that is probed is finished if that was since its last checkpoint."""
    if unit.seeds:
        return [state_of(unit, name, seed, folder) for name, seed in zip(unit.names, unit.seeds, strict=True)]
    log, checkpoints = folder / "logs" / unit.log, list((folder / unit.probed / "checkpoints").glob("*.pt"))
    done = [line for line in tail(log) if line.startswith(MARK)][-1:] == [f"{MARK}done: {shlex.join(unit.command)}"]
    done = done and all(path.stat().st_mtime <= log.stat().st_mtime for path in checkpoints)
    if unit.command[1] == "plasticity_probe.py":
        name = flags_of(unit.command[3:]).get("name", ["plasticity"])
        done = done and folder.joinpath(unit.probed, *name, "plasticity.csv").is_file()
    return [State(unit.probed, finished=done)]


def next_command(unit, states):
    """The command that brings the unit's runs forward, or None if all are finished.

    Of a batch, those that stand at the same checkpoint go on together; the others have their turn after them.
    """
    if all(state.finished for state in states):
        return None
    if not unit.seeds:
        return list(unit.command)
    begun = [state.iteration for state in states if not state.finished and state.iteration is not None]
    chosen, resume = [], []
    for seed, state in zip(unit.seeds, states, strict=True):
        if not state.finished and (not begun or min(begun) in (state.iteration, state.before)):
            chosen.append(str(seed))
            resume += [state.folder] if begun else []
    command = [*unit.command, *(["--seeds", *chosen] if unit.batched else ["--seed", *chosen])]
    return command + (["--resume", *resume] if resume else [])


def tail(path, size=8192):
    """The last lines of a text file, none if there is no such file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def attempt(unit, root, folder, cpus, gpus, tags):
    """Run the Unit ``unit`` to its end; a dict of exit ``code``, ``node``, and a ``message`` where it failed.

    root: folder of the scripts, folder: that of runs/ and logs/, both as every machine sees them. cpus: cores, gpus: 0
    hides the GPUs. tags: for W&B. If the task is cancelled, so is the script, which saves a checkpoint first.
    """
    # A study in the background of a shell script ignores SIGINT, and its workers with it; Ray cancels by nothing else.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root, folder, node = Path(root), Path(folder), socket.gethostname()
    script = root / unit.command[1]
    for path in (script, folder):
        if not path.exists():
            message = f"{path} is not there on {node}: all machines must share one file system"
            return {"code": REFUSED, "node": node, "message": message}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.update({"OMP_NUM_THREADS": str(cpus)})
    environment.setdefault("WANDB_RUN_GROUP", unit.group)
    if tags:
        environment.setdefault("WANDB_TAGS", ",".join(tags))
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log_path = folder / "logs" / unit.log
    log_path.parent.mkdir(parents=True, exist_ok=True)
    tried = set()
    with open(log_path, "ab", buffering=0) as log:
        if not lock(log):
            message = f"another process has been at it for {PATIENCE} s"
            return {"code": BUSY, "node": node, "message": message}
        while True:
            states = states_of(unit, folder)
            command = next_command(unit, states)
            if command is None:
                return {"code": 0, "node": node, "message": ""}
            shown = shlex.join(command)
            if (shown, *states) in tried:
                message = "it ended with exit code 0, but without a last checkpoint"
                return {"code": 1, "node": node, "message": message}
            tried.add((shown, *states))
            log.write(f"{MARK}{time.strftime('%Y-%m-%d %H:%M:%S')} {node}: {shown}\n".encode())
            start = log.seek(0, os.SEEK_END)
            code = run_script([str(script), *command[2:]], folder, environment, log)
            with open(log_path, "rb") as written:
                written.seek(start)
                said = written.read().decode(errors="replace").splitlines()
            errors = [line for line in said if line.startswith("error: ")] or [line for line in said if line.strip()]
            log.write(f"{MARK}{f'exit code {code}' if code else 'done: ' + shlex.join(unit.command)}\n".encode())
            if code:
                message = ", ".join([f"exit code {code}", *errors[-1:]])[:300]
                return {"code": code, "node": node, "message": message}
            if not unit.seeds:
                return {"code": 0, "node": node, "message": ""}


def lock(log):
    """Wait until no other process has the log file open for an attempt, and keep others out; False if none leaves it.

    The script inherits the lock with its output, so that it holds as long as either of the two processes lives. On a
    network file system it counts for all machines if that has POSIX or BSD locks; one that has none lets everybody in.
    """
    deadline = time.monotonic() + PATIENCE
    while fcntl:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        except OSError:  # a file system without locks
            break
    return True


def run_script(command, folder, environment, log):
    """Run a Python command in a session of its own, its output in ``log``; the exit code, 128 + n for signal n."""
    process = subprocess.Popen(
        [sys.executable, "-c", BECOME, str(os.getpid()), *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while process.poll() is None:  # no long wait in C, since cancelling a task waits for Python
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    code = process.returncode
    return code if code >= 0 else 128 - code


def unit_of(values):
    """The Unit that ``dataclasses.asdict`` took apart."""
    return Unit(**{field.name: values[field.name] for field in dataclasses.fields(Unit)})
