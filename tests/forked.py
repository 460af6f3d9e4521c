"""Programs as processes of their own that start at once: forked from one that has imported what they need."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["ppo_atari", "ppo_atari_2models", "ppo_pfo_atari", "ppo_mujoco"]
MANY_SEEDS = "ppo_mujoco --seeds"  # ppo_mujoco.py with several seeds as one batch
KINDS = [*SCRIPTS, MANY_SEEDS]  # of runs
# Runs of 10 ms an iteration and more, at whose every iteration everything is logged
SMALL = {
    **dict.fromkeys(SCRIPTS[:3], "--num-envs 2 --num-steps 8 --minibatch-size 16 --update-epochs 1 --seed 7"),
    "ppo_mujoco": "--num-steps 32 --minibatch-size 32 --update-epochs 2 --obs-norm-steps 20 --seed 7",
    MANY_SEEDS: "--num-steps 32 --minibatch-size 32 --update-epochs 2 --obs-norm-steps 20 --seeds 7 3",
}
STEPS = {**dict.fromkeys(SCRIPTS[:3], 2 * 8 * 3), "ppo_mujoco": 64, MANY_SEEDS: 64}  # of an iteration

context = multiprocessing.get_context("forkserver")
# OpenGL comes before envpool, as in ppo_mujoco.py; the first optimizer imports torch._dynamo.
LIBRARIES = ["torch._dynamo", "pandas", "scipy.stats", "matplotlib.pyplot", "matplotlib.backends.backend_pdf"]
context.set_forkserver_preload(["ppo_mujoco", *LIBRARIES, "forked", "test_scripts", *SCRIPTS])


def slow(names, *some):
    """Parameters of a test: ``names``, of which ``some`` are left out by default, as others run what is the same."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in some else name for name in names]


def script_of(name):
    """The script that makes runs of the kind ``name``, without .py."""
    return name.split()[0]


def small(name, iterations):
    """The flags of a small run of the kind ``name``, one of KINDS."""
    return [*SMALL[name].split(), "--total-timesteps", str(iterations * STEPS[name]), "--diagnostics-interval", "1"]


def _main(path, folder, flags, code, environment, *logs):
    import torch

    os.chdir(folder)
    for number, log in enumerate(logs, 1):  # standard output, standard error
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    os.environ.update(environment)
    sys.argv = [path, *flags]
    torch.set_num_threads(1)
    exec(code, {})
    if path.endswith(".py"):
        runpy.run_path(path, run_name="__main__")
    else:
        runpy.run_module(path, run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def started(name, folder, flags, code="", path=None, logs=("log", "log"), **environment):
    """The process of a kind of run, or of the script or module ``path``; its output is in ``folder``/log.

    ``code`` runs in it before the script. logs: where its two streams go, if elsewhere.
    """
    path = str(path or ROOT / f"{script_of(name)}.py")
    process = context.Process(target=_main, args=(path, folder, flags, code, environment, *logs))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run(name, folder, flags, code="", path=None, **environment):
    """Run a script to its end; its exit code and what it printed."""
    before = (folder / "log").stat().st_size if (folder / "log").exists() else 0
    with started(name, folder, flags, code, path, **environment) as process:
        process.join(300)
        assert process.exitcode is not None, "still running"
    return process.exitcode, (folder / "log").read_bytes()[before:].decode()


def finished(name, folder, flags, code="", path=None, **environment):
    """As ``run``, with all that subprocess.run tells of a process, and nothing in ``folder`` but what it wrote."""
    with tempfile.TemporaryDirectory() as aside:
        logs = [Path(aside, stream) for stream in ("out", "err")]
        with started(name, folder, flags, code, path, logs, **environment) as process:
            process.join(300)
            assert process.exitcode is not None, "still running"
        return subprocess.CompletedProcess(flags, process.exitcode, *(log.read_bytes().decode() for log in logs))


def program(path, *flags, folder=ROOT, code=0, before=""):
    """The finished process of the script or module ``path``; its exit code must be ``code``, unless that is None."""
    done = finished("", folder, [str(flag) for flag in flags], before, path)
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.002)


def send(process, number):
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


__all__ = ["KINDS", "MANY_SEEDS", "ROOT", "SCRIPTS", "STEPS", "run", "script_of", "send", "signal", "small", "started"]
__all__ += ["wait_for"]
