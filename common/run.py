"""A run's housekeeping: command line, device, folder, event file, W&B, console and checkpoints.

Nothing here knows an algorithm. A script from which every call of this module is deleted still learns.
"""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import io
import itertools
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def fail(message, code=2):
    """Print one line and leave: exit code 2 for what the user can mend, 1 for a run that can't go on."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def parse_args(args_class):
    """The command line as an instance of the dataclass ``args_class``; a wrong one costs one line and exit code 2."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(args_class)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    # tyro frames its message: a title, what is wrong, and below a rule help on the flag.
    title, *lines = (line.strip("│| ") for line in printed.getvalue().splitlines())
    paragraphs = [
        list(group) for worded, group in itertools.groupby(lines, lambda line: bool(re.search(r"\w", line))) if worded
    ]
    wrong = " ".join(paragraphs[0]) if paragraphs else title
    flags = re.findall(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(lines))
    hint = f"; perhaps you meant {flags[0]}" if flags else ""
    fail(f"{wrong.rstrip('.')}{hint} (--help lists every flag)")


def check_range(args, names, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """Refuse a number of ``args`` that is not finite, or outside [low, high] or (above, below).

    ``names`` are the fields to check, separated by spaces.
    """
    bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
    allowed = " and ".join(f"{word} {bound}" for word, bound in bounds if math.isfinite(bound))
    for name in names.split():
        value = getattr(args, name)
        if not (low <= value <= high and above < value < below and abs(value) != math.inf):
            fail(f"--{name.replace('_', '-')} {value}: must be {allowed or 'finite'}")


def pick_device(name):
    """The ``torch.device`` that ``--device`` names: ``auto`` takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9][0-9]?))?", name):
        fail(f"--device {name}: must be auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {name}: PyTorch sees no MPS device here; use auto or cpu")
    return device


def keep_freed_memory():
    """Have the process keep the memory that it frees, for its next tensors.

    glibc hands blocks over 32 MB back to the kernel and gets them anew, page by page, which on a CPU costs more than
    some of the arithmetic done in them. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2**30):  # M_MMAP_THRESHOLD; an old glibc refuses so much
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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


class Run:
    """The folder ``runs/{env_id}__{exp_name}__{seed}__{time}`` and everything that is written to it.

    ``args`` is the script's dataclass. Its fields env_id, exp_name, seed, track, wandb_project_name, wandb_entity and
    wandb_mode are read here; all of them go into the hyperparameter table, W&B's config and every checkpoint.
    ``total_steps`` is the run's length in environment steps, for the progress bar.
    """

    def __init__(self, args, total_steps):
        if not re.fullmatch(r"[\w.+-]+", args.exp_name):
            fail(f"--exp-name {args.exp_name!r}: must be letters, digits and . _ + -, to be part of a folder's name")
        self.args = dataclasses.asdict(args)
        # Read now: whoever edits the code while this runs doesn't change what was run.
        self.origin = {"args": self.args, "versions": library_versions(), "git_revision": git_revision()}
        self.said = set()
        self.bar = None
        while True:
            self.name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
            self.folder = Path("runs") / self.name
            try:
                (self.folder / "checkpoints").mkdir(parents=True)
                break
            except FileExistsError:
                if not self.folder.is_dir():
                    fail(f"{Path('runs')}: is not a folder; runs are kept under it")
                time.sleep(0.2)  # another run took this second's name
            except OSError as error:
                fail(f"{self.folder}: can't be created ({error.strerror}); runs/ must be writable")
        self.writer = SummaryWriter(str(self.folder), flush_secs=20)
        rows = "\n".join(f"|{key}|{value}|" for key, value in self.args.items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        self.wandb = self._start_wandb(args) if args.track else None
        # A bar redraws its line, which makes a mess of a log file.
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, unit="frame", unit_scale=True, dynamic_ncols=True, smoothing=0.05)
        self.total_steps = total_steps
        self.say(f"{self.folder}")

    def _start_wandb(self, args):
        import wandb  # here because it takes a second, which only those who track should spend

        # A short wait: an unreachable server must not hold up training. Nor may it at the end of the run.
        options = {
            "project": args.wandb_project_name,
            "entity": args.wandb_entity,
            "name": self.name,
            "config": self.args,
            "dir": str(self.folder),
            "save_code": True,
            "settings": wandb.Settings(init_timeout=10, finish_timeout=60),
        }
        try:
            tracked = wandb.init(mode=args.wandb_mode, **options)
        except wandb.errors.Error as error:
            reason = str(error).partition("\n")[0]
            self.say(f"W&B can't be reached and this run is tracked offline ({reason}); `wandb sync` uploads it later")
            tracked = wandb.init(mode="offline", **options)
        tracked.define_metric("global_step")
        tracked.define_metric("*", step_metric="global_step")
        return tracked

    def log(self, scalars, step):
        """Write ``{tag: number}`` at ``step`` (environment steps) to the event file and to W&B."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        if self.wandb and scalars:
            self.wandb.log({**scalars, "global_step": step})

    def log_video(self, tag, path, step):
        """Show the mp4 at ``path`` in W&B; without ``--track`` the file in the run's folder is all there is."""
        if self.wandb:
            import wandb

            self.wandb.log({tag: wandb.Video(str(path), format="mp4"), "global_step": step})

    def say(self, message):
        """Print a line without breaking the progress bar."""
        if self.bar is not None:
            self.bar.write(message, file=sys.stderr)
        else:
            print(message, flush=True)

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
            self.say(f"{step:,}/{self.total_steps:,} frames, {fps:.0f} FPS, {left} left{shown}")

    def save_checkpoint(self, step, state):
        """Write ``state`` and where it comes from to ``checkpoints/{step}.pt``, all or nothing.

        ``state`` holds tensors, numbers, strings, and dicts and lists of them, so that
        ``torch.load(path, weights_only=True)`` reads the file: opening a checkpoint never runs code.
        """
        path = self.folder / "checkpoints" / f"{step}.pt"
        unfinished = path.with_suffix(".tmp")
        try:
            with open(unfinished, "wb") as file:
                torch.save({**state, **self.origin}, file)
                file.flush()
                os.fsync(file.fileno())  # else a crash of the machine could leave a whole name on half a file
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    def close(self, exit_code=0):
        """Finish the event file, the bar and the W&B run, which shows ``exit_code``."""
        self.writer.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            self.wandb.finish(exit_code=exit_code)
