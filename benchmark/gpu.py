"""What the scripts do on a GPU: tests, agreement with the CPU, speed, how many runs share it, what a full run takes.

    python -m benchmark.gpu --output benchmark/results/gpu
    python -m benchmark.gpu --device cpu --output gpu --seconds 120 -- --num-envs 2 --num-steps 32 --minibatch-size 64

Writes gpu.md and gpu.json, anew after each measurement, so that what was cut short keeps what it had. It takes at most
``--seconds``; what no time was left for, and what failed, is a line of its own. Flags behind ``--`` go to every run. A
run's speed is that between the end of its first iteration and the end of the last but one, agent steps a second; those
two are diagnosed, which a full run does in one iteration of 33. Without a GPU it runs on the CPU, and says so.
A machine without a network needs torch, numpy, tensorboard, tqdm, imageio, envpool, gymnasium and tyro for it, and
pytest with pygments and hypothesis for the tests; pandas, SciPy, W&B and Ray are not used.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from common.arguments import Range, check_folder, check_ranges, make_folder, one_line, pick_device, usable_cores
from common.run import git_revision, library_versions, parse_args

ROOT = Path(__file__).resolve().parent.parent
ATARI = ("ppo_pfo_atari", "ppo_atari_2models", "ppo_atari")
FRAMES_OF_A_RUN, RUNS_OF_A_SWEEP = 100_000_000, 180  # benchmark/atari_baselines.sh
LONGEST = 75  # seconds of one measurement of a speed


@dataclass
class Args:
    output: Path = Path("benchmark/results/gpu")
    """folder of the two files"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps, as the scripts take it"""
    seconds: Annotated[float, Range(10, 86_400)] = 480
    """the whole command ends after about this time"""
    iterations: Annotated[int, Range(4, 10_000)] = 12
    """of each run whose speed is measured"""
    parts: tuple[Literal["tests", "agreement", "speed", "sharing"], ...] = ("tests", "agreement", "speed", "sharing")
    """what to measure"""


class OutOfTime(Exception):
    """There is no time left for a measurement."""


class Report:
    """The results so far, a list of rows (dicts) by part, and their two files."""

    def __init__(self, args, device):
        self.args, self.device, self.rows = args, device, {}
        self.end = self.last = time.monotonic() + args.seconds
        self.about = {
            "date": datetime.date.today().isoformat(),
            "device": name_of(device),
            "driver": smi("driver_version", device),
        }
        self.about |= {"cores": usable_cores(), "system": platform.platform(), "commit": git_revision()}
        self.about |= library_versions() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}

    def begin(self, reserved):
        """Begin a part, which leaves the share ``reserved`` of the whole time to the parts after it."""
        self.end = self.last - reserved * self.args.seconds

    def left(self, least=5.0):
        """Seconds left to the part; raises OutOfTime where that is less than a measurement takes."""
        seconds = self.end - time.monotonic()
        if seconds < least:
            raise OutOfTime(f"{max(seconds, 0):.0f} s left")
        return seconds

    def add(self, part, what, measure):
        """Add the rows that ``measure()`` gives for ``what``, or a row with why it gave none."""
        try:
            rows = measure()
        except (OutOfTime, subprocess.TimeoutExpired) as error:
            rows = [{"result": f"no time for it ({error if isinstance(error, OutOfTime) else 'cut short'})"}]
        except (Exception, SystemExit) as error:  # a driver's, a compiler's, a script's: the rest is measured anyhow
            rows = [{"result": one_line(f"failed: {type(error).__name__}: {error}")[-300:]}]
        self.rows.setdefault(part, []).extend({"what": what, **row} for row in rows)
        self.write()
        for row in rows:
            print(f"{part}: {what}: {', '.join(f'{key} {shown(x)}' for key, x in row.items())}", flush=True)

    def write(self):
        kind = "a GPU" if self.device.type != "cpu" else "a CPU: none of these numbers is of a GPU"
        text = [f"# Measured on {kind}", "", "`python -m benchmark.gpu`", ""]
        text += [f"- {key}: {value}" for key, value in self.about.items() if value is not None]
        for part, rows in self.rows.items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            text += ["", f"## {part}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            text += [f"| {' | '.join(shown(row.get(key, '')) for key in columns)} |" for row in rows]
        for name, content in (("gpu.md", "\n".join(text) + "\n"), ("gpu.json", json.dumps(self._plain(), indent=1))):
            unfinished = self.args.output / f"{name}.tmp"
            unfinished.write_text(content, encoding="utf-8")
            unfinished.replace(self.args.output / name)

    def _plain(self):
        return {"about": self.about, "parts": self.rows}


def shown(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x).replace("|", "/")


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.processor()})"


def smi(query, device):
    """What nvidia-smi says of a ``torch.device``, or None without either."""
    if device.type != "cuda":
        return None
    # Its own numbers are not those of CUDA_VISIBLE_DEVICES.
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.splitlines()[0].strip()


def verdicts_in(said):
    """The verdicts and the names of tests in what ``pytest -v`` printed, with pytest-xdist or without."""
    kinds = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
    spread = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({kinds}) (tests/.*\S)", said, re.MULTILINE)
    alone = re.findall(rf"^(tests/\S*::.*?) ({kinds})\b.*\[ *\d+%\]$", said, re.MULTILINE)
    return spread + [(kind, name) for name, kind in alone]


def tests(report):
    """The verdicts of the tests that need a GPU; on a CPU each is skipped. Those not reached in time have none."""
    # pyproject.toml's options ask for pytest-xdist, which such a machine may lack.
    workers = ["-n", "auto", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", *workers, "-p", "no:cacheprovider"]
    command += ["-k", "(cuda or mps) and not refused"]
    with tempfile.TemporaryFile("w+") as log:
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen([*command, "tests"], cwd=ROOT, **options)
        try:
            process.wait(report.left())
            end = []
        except subprocess.TimeoutExpired:
            end = [{"result": "no time for the others"}]
        finally:
            with contextlib.suppress(ProcessLookupError):  # tests have workers and runs of their own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        said, verdicts = log.read(), {}
        for kind, name in verdicts_in(said):
            verdicts.setdefault(kind.lower(), []).append(name)
        if not end and (not verdicts or process.returncode > 1):
            end = [{"result": one_line(f"failed: {said.strip()[-300:] or process.returncode}")}]
    return [{"result": kind, "tests": len(x), "names": " ".join(x)} for kind, x in verdicts.items()] + end


def agreement(device):
    """Relative errors of losses, gradients and diagnostics on ``device`` against the CPU in float32."""
    import ppo_pfo_atari as script

    args = script.Args(pfo_layers="all")
    script.check_args(args)
    torch.manual_seed(0)
    agent, other = script.Agent(6, args), script.Agent(6, args)
    obs, actions = torch.randint(0, 256, (256, 84, 84, 4), dtype=torch.uint8), torch.arange(256) % 6
    mb = {"obs": obs, "actions": actions, "logits": torch.randn(256, 6) / 10}
    mb |= {name: torch.randn(256) for name in ("values", "advantages", "returns")}
    with torch.no_grad():
        mb |= dict(zip(("actor_held", "critic_held"), (x.all_preactivations for x in other(obs, True)), strict=True))

    def numbers(precision, where):
        args.precision = precision
        agent.to(where), other.to(where)
        on_it = {name: x.to(where) for name, x in mb.items()}
        agent.zero_grad()
        loss, logged = script.losses(
            agent, on_it, torch.arange(256, device=where), torch.tensor(0.0, device=where), args
        )
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in agent.parameters()]).double().cpu()
        with torch.no_grad():
            ends = [dict(zip(("actor", "critic"), x(on_it["obs"], True), strict=True)) for x in (other, agent)]
            tags = script.diagnose(*ends, on_it["actions"], args)
        return {"loss": loss.item(), **{name: x.item() for name, x in logged.items()}}, gradient, tags

    losses, gradient, tags = numbers("float32", torch.device("cpu"))
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    was, rows = (matmul.allow_tf32, cudnn.allow_tf32), []
    modes = [("float32", False), ("float32", True), ("bfloat16", True)] if device.type == "cuda" else []
    for precision, tf32 in modes or [("float32", None), ("bfloat16", None)]:
        if tf32 is not None:
            matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        theirs, other_gradient, other_tags = numbers(precision, device)
        apart = {name: abs(theirs[name] - x) / max(abs(x), 1e-6) for name, x in losses.items()}
        far = {tag: abs(other_tags[tag] - x) / max(abs(x), 1e-6) for tag, x in tags.items() if x == x}
        worst = max(far, key=far.get)
        row = {"precision": precision, "TF32": {None: "", True: "on", False: "off"}[tf32]}
        row |= {"loss": apart.pop("loss"), "worst part of it": max(apart.values())}
        row |= {"gradient": float((other_gradient - gradient).norm() / gradient.norm())}
        rows.append(row | {"worst diagnostic": far[worst], "which": worst})
    matmul.allow_tf32, cudnn.allow_tf32 = was
    return rows


class Memory:
    """The most memory of a GPU in use, in MB, beyond what was when it began, as nvidia-smi sees it twice a second."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.start, self.most, self.over = smi("memory.used", self.device), 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self):
        while self.start and not self.over.wait(0.5):
            self.most = max(self.most, int(smi("memory.used", self.device) or 0) - int(self.start))

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def train(report, script, flags, processes=1):
    """Train ``script`` in so many processes at once: agent steps a second of all, the parts of an iteration, memory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frames = report.args.iterations * steps_of_iteration(script, flags)
    options = ["--device", str(report.device), "--total-timesteps", str(frames), "--checkpoint-interval", "1"]
    options += ["--diagnostics-interval", str(report.args.iterations)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    deadline = time.monotonic() + min(report.left(10), LONGEST)
    with tempfile.TemporaryDirectory() as folder, Memory(report.device) as memory:
        command, running = [sys.executable, str(ROOT / f"{script}.py"), *options, *flags], []
        try:
            for i in range(processes):
                place = Path(folder) / str(i)
                place.mkdir()
                log = open(place / "log", "w")  # noqa: SIM115
                running.append(subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log))
            for i, process in enumerate(running):
                if process.wait(max(deadline - time.monotonic(), 1)):
                    said = (Path(folder) / str(i) / "log").read_text().strip().splitlines()
                    raise RuntimeError(said[-1] if said else f"exit code {process.returncode}")
        finally:
            for process in running:
                process.kill()
                process.wait()
        speeds, parts = [], {}
        for run in Path(folder).glob("*/runs/*"):
            events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
            # SPS counts from the start of training: the time at which an iteration ended, over its agent steps
            ends = [i / x.value for i, x in enumerate(events.Scalars("charts/SPS"), 1)]
            speeds.append((len(ends) - 2) / (ends[-2] - ends[0]))
            for part in ("rollout", "update", "diagnostics"):
                parts.setdefault(part, []).append(events.Scalars(f"time/{part}")[-1].value)
    row = {"steps/s": sum(speeds)} | {f"{part}, s": statistics.mean(x) for part, x in parts.items()}
    return [row | ({"memory, MB": memory.most} if memory.start else {})]


def arguments(script, flags):
    """The checked arguments of a script with these flags."""
    module, argv = importlib.import_module(script), sys.argv
    sys.argv = [f"{script}.py", *flags]
    try:
        args = parse_args(module.Args)
        module.check_args(args)
    finally:
        sys.argv = argv
    return args


def steps_of_iteration(script, flags):
    args = arguments(script, flags)
    return args.batch_size * getattr(args, "frame_skip", 1)


def in_turn(pools, act, num_steps):
    """Seconds in which ``num_steps`` steps of envpools are taken, one of which steps while another's actions are made.

    A single pool waits for its actions: the script's own rollout.
    """
    count = len(pools[0].all_env_ids)
    for pool in pools:
        pool.reset()
    for pool in pools[1:]:
        pool.send(act(count))
    start = time.perf_counter()
    for _ in range(num_steps):
        for i, pool in enumerate(pools):
            pool.send(act(count))
            pools[(i + 1) % len(pools)].recv()
    seconds = time.perf_counter() - start
    for pool in pools[1:]:
        pool.recv()
    return seconds


def pieces(device, passed):
    """Seconds that an iteration's environments, acting and copies take alone, and those of all of them together: of all
    environments at once, and of two halves in turn."""
    import ppo_pfo_atari as script

    args = arguments("ppo_pfo_atari", passed)

    def make_envs(count):
        return script.make_envs(args, count, list(range(count)), reward_clip=True)

    envs = make_envs(args.num_envs)
    agent = script.Agent(int(envs.action_space.n), args).to(device)
    envs.reset()
    actions = torch.zeros(args.num_envs, dtype=torch.int32).numpy()
    images = torch.zeros((args.num_envs, 84, 84, 4), dtype=torch.uint8)
    if device.type == "cuda":
        images = images.pin_memory()
    on_it = images.to(device)

    @torch.no_grad()
    def act(count=args.num_envs):
        return agent.policy(on_it[:count]).output.argmax(1).int().cpu().numpy()

    def copy(count=args.num_envs):
        on_it[:count].copy_(images[:count], non_blocking=True)

    def copy_and_wait():
        copy()
        return on_it[0, 0, 0].cpu()

    def copy_and_act(count):
        copy(count)
        return act(count)

    seconds = {}
    for name, piece in (("environments", lambda: envs.step(actions)), ("acting", act), ("copies", copy_and_wait)):
        piece()
        start = time.perf_counter()
        for _ in range(args.num_steps):
            piece()
        seconds[f"{name}, s"] = time.perf_counter() - start
    seconds["together, s"] = in_turn([envs], copy_and_act, args.num_steps)
    envs.close()
    if args.num_envs % 2 == 0:
        pools = [make_envs(args.num_envs // 2) for _ in range(2)]
        seconds["in two halves, s"] = in_turn(pools, copy_and_act, args.num_steps)
        for pool in pools:
            pool.close()
    return [seconds]


def speed(report, passed):
    report.add("pieces of an iteration", "ppo_pfo_atari", lambda: pieces(report.device, passed))
    kinds = {"eager": ["--no-cuda-graphs"], "compiled": ["--compile"]}  # compiling takes longest, and comes last
    if report.device.type == "cuda":
        kinds = {"CUDA graphs": [], **kinds}
    modes = [(kind, precision) for kind in kinds for precision in ("float32", "bfloat16")]
    for kind, precision in modes:
        mode, flags = f"{kind}, {precision}", [*kinds[kind], "--precision", precision]
        if mode == "compiled, float32":
            for seeds in (1, 5, 32):
                several = [*passed, "--seeds", *map(str, range(1, seeds + 1))]
                report.add("speed", f"ppo_mujoco, {seeds} seeds", lambda f=several: train(report, "ppo_mujoco", f))
        for script in ATARI:
            report.add("speed", f"{script}, {mode}", lambda s=script, f=flags: train(report, s, [*passed, *f]))


def sharing(report, passed):
    for processes in (1, 2, 4, 8):
        what = f"{processes} x ppo_pfo_atari"
        report.add("sharing", what, lambda n=processes: train(report, "ppo_pfo_atari", passed, n))


def projection(report, passed):
    """What a full run, and the paper's sweep, would take at the speeds that were measured."""
    frame_skip, rows = arguments("ppo_pfo_atari", passed).frame_skip, []
    for part, frames, what in (("speed", FRAMES_OF_A_RUN, "a run"), ("sharing", FRAMES_OF_A_RUN * RUNS_OF_A_SWEEP, "")):
        measured = [row for row in report.rows.get(part, ()) if row.get("steps/s") and "pfo_atari" in row["what"]]
        if measured:
            best = max(measured, key=lambda row: row["steps/s"])
            what = what or f"{RUNS_OF_A_SWEEP} runs"
            hours = frames / (best["steps/s"] * frame_skip) / 3600
            rows.append({"length": f"{what} of {FRAMES_OF_A_RUN:,} frames", "by": best["what"], "hours": hours})
    return rows or [{"result": "no speed was measured"}]


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    passed, sys.argv = sys.argv[split + 1 :], sys.argv[:split]
    args = parse_args(Args)
    check_ranges(args)
    device = pick_device(args.device)
    check_folder(args.output)
    arguments("ppo_pfo_atari", passed)  # which refuses what it can't take
    make_folder(args.output)
    report = Report(args, device)
    if "tests" in args.parts:
        report.begin(0.7)
        report.add("tests", "those that need a GPU", lambda: tests(report))
    report.begin(0.25 if "sharing" in args.parts else 0)
    if "agreement" in args.parts:
        report.add("agreement", "relative error", lambda: agreement(device))
    if "speed" in args.parts:
        speed(report, passed)
    report.begin(0)
    if "sharing" in args.parts:
        sharing(report, passed)
    report.add("projection", "at the best speed", lambda: projection(report, passed))
    print(args.output / "gpu.md")
