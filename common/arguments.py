"""The command line: flags in groups with their bounds beside them, one line for what is wrong, and what to run on."""

import ast
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import typing
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro


class Range(NamedTuple):
    """The numbers that a flag takes, as in ``gamma: Annotated[float, Range(0, 1)]``; in a tuple, each of them."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf


@dataclasses.dataclass
class RunArgs:
    """The flags of every training script that leave what is learnt as it is, but for ``seed``."""

    # Run
    seed: Annotated[int, Range(0, 2**31 - 1)] = 1
    """seed of everything random: networks, actions, minibatches, environments"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes CUDA, then MPS, then the CPU"""
    torch_deterministic: bool = False
    """use deterministic kernels alone; it is slower on CUDA, and on a CPU runs repeat bit for bit without it"""
    compile: bool = False
    """run policy, losses and gradients through torch.compile (on CUDA as CUDA graphs); it takes a minute to start"""

    # Logging
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str | None = None
    """the W&B project; None is what WANDB_PROJECT in the environment says, else no-representation-no-trust"""
    wandb_entity: str | None = None
    """the W&B team; None is what WANDB_ENTITY in the environment says, else your own account"""
    wandb_mode: Literal["online", "offline"] | None = None
    """offline writes a W&B run into the run's folder, to be uploaded with `wandb sync`; None is what WANDB_MODE in the
    environment says, which may be disabled as well, else online"""
    diagnostics_interval: Annotated[int, Range(0, 10**9)] = 0
    """iterations between diagnostics, besides the first and the last one; 0 is 0.1 % of the run"""
    eval_episodes: Annotated[int, Range(0, 1024)] = 0
    """episodes of each evaluation, with sampled and with greedy actions, at the end of the run; 0 is no evaluation"""
    eval_interval: Annotated[float, Range(0, 1)] = 0.0
    """share of the run (0.1: every tenth of it) after which to evaluate as well; 0 evaluates at the end alone"""
    capture_video: bool = False
    """record the first episode of each evaluation as mp4"""
    stop_on: Literal["none", "collapse"] = "none"
    """collapse ends the run, after a checkpoint, when half of its return and half of its rank are lost for good"""

    # Checkpoints
    checkpoint_interval: Annotated[float, Range(above=0, high=1)] = 0.005
    """share of the run after which checkpoints/latest.pt is written anew; every 2.5 % it is kept under its own name"""
    resume: str = ""
    """go on with the run in this folder (flags left out are as they were), or auto: the newest unfinished run in runs/
    of the same arguments, else a new one; environments begin new episodes, and --total-timesteps may grow"""

    # Filled in from the others
    batch_size: int = dataclasses.field(init=False)
    """transitions in a rollout"""
    num_iterations: int = dataclasses.field(init=False)
    """rollouts in the run"""


def one_line(text):
    """``text`` without line breaks, and without the characters with which a file could control a terminal."""
    return "".join(filter(str.isprintable, " ".join(text.split())))


def say(line, file=None):
    """Print a line to standard output or ``file``; a console that is gone, or a full disk, is nowhere to say so."""
    try:
        print(line, file=file, flush=True)
    except BrokenPipeError:
        let_go(BrokenPipeError)
    except OSError:  # a disk may have room again
        pass


def let_go(kind=OSError):
    """Let what can't be printed, for an error of this kind, go nowhere: a flush at exit would change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except kind:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_without_a_traceback_where_nobody_reads():
    """From here on, an error of printing to a console that is gone, as with ``| head``, is one that needs no words."""
    before = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, BrokenPipeError):
            try:
                print(flush=True)  # it may have been another pipe's
            except BrokenPipeError:
                return let_go()
        before(kind, error, trace)

    sys.excepthook = hook


def show_what_the_console_can():
    """From here on, print a character that the console lacks as its escape, \\u2013: none is worth a run."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError):  # it is gone, or has become a pipe
                stream.reconfigure(errors="backslashreplace")


def fail(message, code=2):
    """Print one line and leave: exit code 2 for what the user can mend, 1 for a run that can't go on."""
    say(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def flag(name):
    """``num_envs`` as it is given: --num-envs."""
    return f"--{name.replace('_', '-')}"


def nearest(name, names):
    """Those of ``names`` that look most like ``name``, at most 3, as one string."""
    known = {x.lower(): x for x in names}
    return ", ".join(known[x] for x in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4))


def atari_id(env_id, games):
    """The id of one of envpool's ``games`` (as "space_invaders"), given it in any capitals, with or without ALE/."""
    names = ["".join(map(str.capitalize, game.split("_"))) + "-v5" for game in games]
    known = {name.lower(): name for name in names}  # ALE's and envpool's capitals differ in one: TicTacToe3D
    env_id = env_id.removeprefix("ALE/")
    if env_id.lower() not in known:
        some = nearest(env_id.removesuffix("-v5") + "-v5", names) or "Breakout-v5, Phoenix-v5, Qbert-v5"
        fail(f"--env-id {env_id}: must be one of envpool's {len(known)} Atari games; nearest: {some}")
    return known[env_id.lower()]


def parse(args_class, default=None):
    """The command line as an instance of the dataclass ``args_class``; a wrong one costs one line and exit code 2.

    Comments of one line between its fields (``# Logging``) are the groups of ``--help``.
    """
    whole, groups = _grouped(args_class)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            if not groups:
                return tyro.cli(args_class, default=default)
            if default is not None:
                of_groups = {part: {name: getattr(default, name) for name in texts} for part, texts in groups.items()}
                default = whole(**{part: whole.parts[part](**values) for part, values in of_groups.items()})
            parts = tyro.cli(whole, default=default)
            values = {name: x for part in groups for name, x in vars(getattr(parts, part)).items()}
            return args_class(**values)
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


def _groups(args_class):
    """The fields of each group of a dataclass and of those that it extends, and their help: {group: {name: help}}."""
    found = {}  # of each field: its group and its help, by the class that has the last word on it
    for owner in reversed([x for x in args_class.__mro__ if dataclasses.is_dataclass(x)]):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):  # a class that was made without any
            return {}
        titles = {i: line.strip("# ").lower() for i, line in enumerate(source.splitlines(), 1) if line[:6] == "    # "}
        for node, text in itertools.pairwise(ast.parse(source).body[0].body):
            above = [i for i in titles if i < node.lineno]
            if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr):
                group = titles[above[-1]] if above else "run"
                found[node.target.id] = group.replace(" ", "_"), inspect.cleandoc(text.value.value).replace("\n", " ")
    groups = {}
    for field in dataclasses.fields(args_class):
        if field.init and field.name in found:
            group, text = found[field.name]
            groups.setdefault(group, {})[field.name] = text
    complete = sum(map(len, groups.values())) == sum(field.init for field in dataclasses.fields(args_class))
    return groups if complete and len(groups) > 1 else {}


@functools.cache  # since a class that tyro has seen is parsed in a fraction of the time
def _grouped(args_class):
    """The same flags as a dataclass of dataclasses, as tyro has it for groups, and the fields of each of its parts."""
    groups, kinds, parts = _groups(args_class), typing.get_type_hints(args_class), {}
    fields = {field.name: field for field in dataclasses.fields(args_class)}
    for group, texts in groups.items():
        options = []
        for name, text in texts.items():
            kind = Annotated[kinds[name], tyro.conf.arg(help=text)]
            options.append((name, kind, dataclasses.field(default=fields[name].default)))
        parts[group] = dataclasses.make_dataclass(group, options)
    wholes = [
        (
            group,
            Annotated[tyro.conf.OmitArgPrefixes[part], tyro.conf.arg(help="")],
            dataclasses.field(default_factory=part),
        )
        for group, part in parts.items()
    ]
    whole = dataclasses.make_dataclass(args_class.__name__, wholes)
    whole.parts = parts
    return whole, groups


def check_ranges(args):
    """Refuse a number of ``args`` that is outside of the Range beside its flag, or not finite."""
    for name, kind in typing.get_type_hints(type(args), include_extras=True).items():
        for bounds in (x for x in getattr(kind, "__metadata__", ()) if isinstance(x, Range)):
            check_range(args, name, *bounds)


def check_range(args, names, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf):
    """Refuse a number of ``args`` that is not finite, or outside [low, high] or (above, below).

    ``names`` are the fields to check, separated by spaces.
    """
    bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
    allowed = " and ".join(f"{word} {bound}" for word, bound in bounds if math.isfinite(bound))
    for name in names.split():
        value = getattr(args, name)
        several = isinstance(value, tuple)
        if not all(
            low <= x <= high and above < x < below and abs(x) != math.inf for x in (value if several else [value])
        ):
            shown = " ".join(map(str, value)) if several else value
            fail(f"{flag(name)} {shown}: must be {'each ' if several else ''}{allowed or 'finite'}")


def check_run_args(args):
    """Refuse numbers out of their Range and what can't run here, and fill in what follows from the size of a run.

    args: a ``RunArgs`` with total_timesteps, num_envs, num_steps, minibatch_size and, on Atari, frame_skip.
    """
    check_ranges(args)
    args.batch_size = args.num_envs * args.num_steps
    steps, unit = args.batch_size * getattr(args, "frame_skip", 1), "frames" if hasattr(args, "frame_skip") else "steps"
    args.num_iterations = args.total_timesteps // steps
    if args.batch_size == 1:
        fail("--num-steps 1: must make rollouts of at least 2 transitions, with more steps or --num-envs")
    if args.batch_size % args.minibatch_size:
        fail(f"--minibatch-size {args.minibatch_size}: must divide num_envs x num_steps = {args.batch_size}")
    if not args.num_iterations:
        fail(f"--total-timesteps {args.total_timesteps}: must be at least one rollout of {steps} {unit}")
    if args.anneal_lr and args.cosine_lr:
        fail("--cosine-lr: must not go with --anneal-lr; choose one schedule")
    if (args.capture_video or args.eval_interval) and not args.eval_episodes:
        given = "--capture-video" if args.capture_video else f"--eval-interval {args.eval_interval}"
        fail(f"{given}: needs --eval-episodes of at least 1")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if args.compile and not shutil.which(compiler):
        fail(f"--compile: torch.compile needs a C++ compiler, and {compiler} is not there; CXX may name another one")


def of_each_seed(args):
    """The arguments of the run of each seed."""
    runs = [copy.copy(args) for _ in args.seeds or (args.seed,)]
    resumed = args.resume if args.resume != ("auto",) else len(runs) * args.resume
    for s, run_args in enumerate(runs):
        run_args.seed, run_args.seeds, run_args.resume = (args.seeds or (args.seed,))[s], (), resumed[s : s + 1]
    return runs


def check_output(path, *endings, name="output"):
    """Refuse a file, of the flag ``name``, that can't be written, or has none of the ``endings``, if some are given."""
    if endings and path.suffix.lower() not in endings:
        fail(f"{flag(name)} {path}: must end in {' or '.join(endings)}")
    try:
        if not path.parent.is_dir():
            fail(f"{flag(name)} {path}: must be in a folder that exists")
        new = not path.exists()
        with open(path, "ab"):  # what is there stays
            pass
        if new:
            path.unlink()
    except OSError as error:
        fail(f"{flag(name)} {path}: can't be written ({error.strerror})")


def check_folder(path):
    """Refuse a folder ``--output`` that can't be written or created, before there is anything to write."""
    there = next(x for x in (path, *Path(os.path.abspath(path)).parents) if os.path.exists(x))
    if not os.path.isdir(there):
        fail(f"--output {path}: can't be a folder, since {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        fail(f"--output {path}: can't be written, without the right to write in {there}")


def make_folder(path):
    """The folder ``--output``, created if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {path}: can't be created ({error.strerror})")
    check_folder(path)


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


def check_precision(precision, device):
    """Say where the device computes ``bfloat16`` without instructions for it, which is slower than ``float32``."""
    native = {"cpu": _cpu_has_bfloat16, "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False)}
    if precision == "bfloat16" and not native.get(device.type, lambda: True)():
        say("--precision bfloat16: this device has no instructions for it, and float32 would be faster")


def _cpu_has_bfloat16():
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def usable_cores():
    """Number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def keep_freed_memory():
    """Have the process keep the memory that it frees, for its next tensors.

    glibc hands blocks over 32 MB back to the kernel and gets them anew, page by page, which on a CPU costs more than
    some of the arithmetic done in them. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(-3, 2**30):  # M_MMAP_THRESHOLD; an old glibc refuses so much
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
