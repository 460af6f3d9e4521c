"""Runs a grid of experiments, each in a process of its own, on this machine's cores or on a Ray cluster:

    python -m benchmark.run --commands "python ppo_mujoco.py" "python ppo_mujoco.py --anneal-lr" \\
        --env-ids Hopper-v4 Ant-v4 --epochs 10 15 20 --seeds 25 7 64 27 4 -- --diagnostics-interval 30

Every command is run with every environment, number of epochs and seed, and with what stands behind ``--``. A run that
fails, or whose machine is lost, goes on from its last checkpoint; the same command given again does what is missing.
Runs are recognised by their folder's name, in which stand the flags that decide what is learnt, sorted:
runs/Hopper-v4__ppo_mujoco+anneal-lr+update-epochs-10__25__{time}.
"""

import dataclasses
import hashlib
import itertools
import logging
import os
import re
import shlex
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmark.attempt import GRACE, REFUSED, ROOT, Unit, defaults_of, flags_of, next_command, states_of, tail
from common.arguments import check_range, fail, say, usable_cores
from common.run import MAY_DIFFER, parse_args

# A script's line on its progress: steps, unit, and the return among what it shows
PROGRESS = re.compile(r"([\d,]+)/([\d,]+) \w+, \S+ a second, \S+ left(?:.*?, return (\S+))?")


@dataclass
class Args:
    commands: tuple[str, ...]
    """each is run on the whole grid, as "python ppo_mujoco.py --anneal-lr"; scripts lie beside the folder benchmark/"""
    env_ids: tuple[str, ...] = ()
    """environments"""
    seeds: tuple[int, ...] = (25, 7, 64, 27, 4)
    """a run for each; the paper's five"""
    epochs: tuple[int, ...] = ()
    """numbers of epochs per rollout (--update-epochs); none given is what the commands say"""
    runs: tuple[Path, ...] = ()
    """instead of a grid: run each command once on each of these runs' folders (plasticity_probe.py)"""
    folder: Path = Path(".")
    """runs/ and logs/ are kept in it; all machines of a cluster must see it, and the scripts, under the same path"""
    batch_seeds: bool = False
    """train the seeds that a command has in common as one batch, in one process, where its script takes --seeds"""
    cpus_per_run: int = 1
    """cores, and threads, of each process"""
    gpus_per_run: float = 0.0
    """GPUs of each process, or the share of one (0.25: four on each GPU); 0 hides the GPUs"""
    retries: int = 3
    """times that a run goes on from its last checkpoint after it failed, and as many after its machine was lost"""
    address: str = ""
    """a Ray cluster's address, host:port, or auto on one of its machines; none given is this machine alone"""
    num_cpus: int = 0
    """without --address: cores to use; 0 is all that this process may"""
    wandb_tags: tuple[str, ...] = ()
    """tags of the runs in W&B, whose groups are environment and experiment (with --track behind `--`)"""
    dry_run: bool = False
    """print the commands that would run and their number, and run nothing; where the seeds of a batch have come to
    different checkpoints, its first command"""


def parse_command(command, more):
    """The script's file name of a command, and its flags, {name without dashes: [values]}; later ones count."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        fail(f"--commands {command!r}: {str(error).lower()}")
    if len(words) < 2 or words[0] not in ("python", "python3") or not words[1].endswith(".py"):
        fail(f"--commands {command!r}: must begin with python and a script's file name, as 'python ppo_mujoco.py'")
    if Path(words[1]).name != words[1] or not (ROOT / words[1]).is_file():
        fail(f"--commands {command!r}: there is no {words[1]} in {ROOT}")
    try:
        flags = flags_of([*words[2:], *more])
    except ValueError as error:
        fail(f"--commands {command!r}: {error}")
    if flags.get("exp-name") == []:
        fail(f"--commands {command!r}: --exp-name must have a value")
    return words[1], flags


def experiment_name(script, flags):
    """The --exp-name of a run, of letters, digits and - _ . +: the script, and its flags that change learning."""
    base = flags.get("exp-name", [script.removesuffix(".py")])[0]
    ignored = MAY_DIFFER | {"exp_name"}
    said = ["-".join([name, *values]) for name, values in sorted(flags.items())
            if name.removeprefix("no-").replace("-", "_") not in ignored]  # fmt: skip
    exact = "+".join([base, *said])
    name = re.sub(r"[^\w.+-]|__+", "-", exact, flags=re.ASCII).strip("_")
    if name != exact or len(name) > 100:  # the most that the scripts take
        name = f"{name[:91]}+{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return name


def grid(args, more):
    """The Units of the grid: all environments, commands and epochs of the first seed first, then of the second."""
    if not args.env_ids:
        fail("--env-ids: must name at least one environment")
    if not args.seeds or len({*args.seeds}) < len(args.seeds):
        fail(f"--seeds {' '.join(map(str, args.seeds))}: must be one number or more, all different")
    for seed in args.seeds:
        if not 0 <= seed < 2**31:
            fail(f"--seeds {seed}: must be at least 0 and at most {2**31 - 1}")
    for epochs in args.epochs:
        if not 1 <= epochs <= 100_000:
            fail(f"--epochs {epochs}: must be at least 1 and at most 100000")
    for env_id in args.env_ids:
        if not re.fullmatch(r"[\w-]+", env_id):
            fail(f"--env-ids {env_id!r}: must be letters, digits, _ and -, as Hopper-v4")
    units = {}
    batches = [args.seeds] if args.batch_seeds else [(seed,) for seed in args.seeds]
    settings = itertools.product(batches, args.commands, args.epochs or [None], args.env_ids)
    for seeds, command, epochs, env_id in settings:
        script, flags = parse_command(command, more)
        for name in ("env-id", "seed", "seeds", "resume", *(["update-epochs"] if args.epochs else [])):
            if name in flags:
                hint = "; for a batch of seeds give --batch-seeds" if name == "seeds" else ""
                line = f"--{name} is set for each run here, and must not stand in a command{hint}"
                fail(f"--commands {command!r}: {line}")
        flags |= {"update-epochs": [str(epochs)]} if epochs else {}
        exp_name = experiment_name(script, flags)
        names = tuple(f"{env_id}__{exp_name}__{seed}" for seed in seeds)
        if args.batch_seeds and "seeds" not in defaults_of(script):
            fail(f"--batch-seeds: {script} can't train several seeds at once, it has no --seeds")
        flags = {"env-id": [env_id], **flags, "exp-name": [exp_name]}
        words = itertools.chain(*([f"--{name}", *values] for name, values in flags.items()))
        log = f"{env_id}__{exp_name}__{'-'.join(map(str, seeds))[:60]}.log"
        group = f"{env_id}__{exp_name}"
        if names in units:
            fail(f"--commands {command!r}: makes the same runs as another of the commands")
        units[names] = Unit(("python", script, *words), log, names, seeds, batched=args.batch_seeds, group=group)
    return list(units.values())


def about_runs(args, more):
    """The Units that run each command on each of the runs."""
    if args.env_ids or args.epochs or args.batch_seeds:
        fail("--runs: must not go with --env-ids, --epochs and --batch-seeds, which make a grid")
    units, skipped = {}, [str(path) for path in args.runs if not (path / "checkpoints").is_dir()]
    if skipped:
        print(f"left out, no run's folder, for want of checkpoints/: {', '.join(skipped)}", file=sys.stderr, flush=True)
    for command, path in itertools.product(args.commands, args.runs):
        script, flags = parse_command(command, more)
        if str(path) in skipped:
            continue
        path = path.resolve()
        probed = os.path.relpath(path, args.folder.resolve())
        name = f"{path.name}__{experiment_name(script, flags)}"
        # Runs of one name may lie in several folders.
        log = name if path.parent == args.folder.resolve() / "runs" else f"{name}__{zlib.crc32(probed.encode()):08x}"
        if (path, name) in units:
            fail(f"--commands {command!r}: does the same on {path} as another, or this run is given twice")
        words = itertools.chain(*([f"--{flag}", *values] for flag, values in flags.items()))
        units[path, name] = Unit(("python", script, probed, *words), f"{log}.log", (name,), probed=probed)
    if not units:
        fail(f"--runs {' '.join(map(str, args.runs))}: none is a run's folder, with checkpoints/ in it"[:300])
    return list(units.values())


class Board:
    """What is shown: a table that changes on a terminal, elsewhere a line whenever something happens."""

    def __init__(self, units, folder):
        self.folder, self.units = folder, units
        self.status = dict.fromkeys(units, "waiting")
        self.sizes, self.progress = {}, {}
        self.console = Console(soft_wrap=True, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.next_line = time.monotonic() + 60

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live:
            self.live.update(self.counts(), refresh=True)
            self.live.stop()

    def set(self, unit, status, why=""):
        """Note the status of a unit, and say so where there is no table, or where it failed."""
        self.status[unit] = status
        self.sizes[unit] = self.log_size(unit)
        if not self.live or why:
            shown = ", ".join(unit.names) if len(unit.names) < 3 else f"{unit.names[0]} and {len(unit.names) - 1} more"
            self.console.print(f"{time.strftime('%H:%M:%S')} {status}: {shown}{why and f' ({why})'}", markup=False)

    def log_size(self, unit):
        try:
            return (self.folder / "logs" / unit.log).stat().st_size
        except FileNotFoundError:
            return 0

    def counts(self):
        counts = Counter(self.status.values())
        return ", ".join(f"{count} {status}" for status, count in counts.items()) + f" of {len(self.units)}"

    def update(self):
        """Read in the log files what is running and how far it is, and show it."""
        for unit, status in self.status.items():
            if status not in ("waiting", "running"):
                continue
            if status == "waiting" and self.log_size(unit) > self.sizes.get(unit, 0):
                self.set(unit, "running")
            if self.status[unit] == "running" and self.live:
                found = [match for line in tail(self.folder / "logs" / unit.log) if (match := PROGRESS.match(line))]
                self.progress[unit] = found[-1].groups() if found else ("", "", None)
        if self.live:
            self.live.update(self.table(), refresh=True)
        elif time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + 60
            self.console.print(f"{time.strftime('%H:%M:%S')} {self.counts()}", markup=False)

    def table(self):
        table = Table("running", "steps", "of", "return", title=self.counts(), box=None, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        running = [unit for unit, status in self.status.items() if status == "running"]
        shown = max(1, self.console.height - 6)
        for unit in running[:shown]:
            steps, total, score = self.progress.get(unit, ("", "", None))
            table.add_row(f"{unit.names[0]}{f' +{len(unit.names) - 1}' * unit.batched}", steps, total, score or "")
        if running[shown:]:
            table.add_row(f"and {len(running) - shown} more", "", "", "")
        return table


def start_ray(args):
    """Connect to the cluster, or start Ray on this machine, which is reached from nowhere else."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # attempt() decides; Ray warns of its own change
    import ray  # here because it takes a second, which a dry run should not spend

    options = {"logging_level": logging.ERROR, "log_to_driver": False}
    if args.address:
        try:
            ray.init(address=args.address, **options)
        except Exception as error:  # Ray has many for a cluster that isn't there
            reason = " ".join(str(error).split()) or type(error).__name__
            fail(f"--address {args.address}: no Ray cluster answers there ({reason[:150]})")
    else:
        options |= {"include_dashboard": False, "object_store_memory": 80 * 2**20, "_node_ip_address": "127.0.0.1"}
        folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))  # Ray's own order
        # Its sockets' paths, {folder}/ray/session_{time}_{process}/sockets/plasma_store, may have 107 bytes on Linux.
        if sys.platform == "linux" and len(os.fsencode(folder)) > 107 - 68:
            options["_temp_dir"] = "/tmp/ray"
        try:
            ray.init(address="local", num_cpus=args.num_cpus or usable_cores(), **options)
        except OSError as error:
            reason = " ".join(str(error).split())
            fail(f"Ray can't start ({reason[:300]}); RAY_TMPDIR may name a folder, of a short path, for its files")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": args.cpus_per_run, "GPU": args.gpus_per_run}
    if not any(all(node.get(name, 0) >= number for name, number in wanted.items()) for node in nodes):
        largest = " and ".join(f"{max(node.get(name, 0) for node in nodes):g} {name}s" for name in wanted)
        line = f"--cpus-per-run {args.cpus_per_run}, --gpus-per-run {args.gpus_per_run:g}: no machine has that"
        if not args.address:
            ray.shutdown()
            fail(f"{line}; this one has {largest}")
        print(f"{line} yet, at most {largest}; runs wait until one joins", file=sys.stderr, flush=True)
    return ray


def interrupt(*_):
    raise KeyboardInterrupt


def run_all(args, units, board):
    """Run the Units to their ends; {unit: why it failed}, and whether Ctrl-C or SIGTERM came before."""
    ray = start_ray(args)
    signal.signal(signal.SIGTERM, interrupt)
    root, folder = str(ROOT), str(args.folder.resolve())

    # Pickled whole, since it is defined in here; the module that it imports is then that of the machine.
    def task(values):
        if root not in sys.path:
            sys.path.insert(0, root)
        from benchmark.attempt import attempt, unit_of

        return attempt(unit_of(values), root, folder, args.cpus_per_run, args.gpus_per_run, args.wandb_tags)

    resources = {"num_cpus": args.cpus_per_run, "num_gpus": args.gpus_per_run}
    remote = ray.remote(max_retries=args.retries, **resources)(task)  # these retries are for lost machines
    failed, left, pending = {}, dict.fromkeys(units, args.retries), {}
    try:
        for unit in units:
            board.sizes[unit] = board.log_size(unit)
            pending[remote.remote(dataclasses.asdict(unit))] = unit
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1)
            board.update()
            for ref in ready:
                unit = pending.pop(ref)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split())[:200]
                    result = {"code": REFUSED, "message": f"Ray gave it up: {type(error).__name__}, {reason}"}
                if result["code"] == 0:
                    board.set(unit, "finished")
                elif result["code"] == REFUSED or not left[unit]:
                    failed[unit] = result["message"]
                    board.set(unit, "failed", result["message"])
                else:
                    left[unit] -= 1
                    board.set(unit, "waiting", f"again after {result['message']}")
                    pending[remote.remote(dataclasses.asdict(unit))] = unit
        return failed, False
    except KeyboardInterrupt:
        print("stopping: runs save a checkpoint first; Ctrl-C again ends them at once", file=sys.stderr, flush=True)
        try:
            for ref in pending:
                ray.cancel(ref)
            ray.wait(list(pending), num_returns=len(pending), timeout=GRACE + 10)
        except KeyboardInterrupt:
            pass
        return failed, True
    finally:
        ray.shutdown()


def report(units, folder, failed):
    """Print a line for each run; True if all are finished."""
    rows, good = [("run", "status", "steps", "return", "log file")], True
    for unit in units:
        for name, state in zip(unit.names, states_of(unit, folder), strict=True):
            begun = "interrupted" if state.steps is not None else "not begun"
            status = "finished" if state.finished else "failed" if unit in failed else begun
            steps = "–" if state.steps is None else f"{state.steps:,}"
            score = "–" if state.score is None else f"{state.score:.4g}"
            rows.append((name, status, steps, score, f"logs/{unit.log}"))
            good = good and state.finished
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, status, steps, score, log in rows:
        cells = name.ljust(widths[0]), status.ljust(widths[1]), steps.rjust(widths[2]), score.rjust(widths[3]), log
        print("  ".join(cells))
    for unit, message in failed.items():
        print(f"failed: {unit.names[0]}{f' and {len(unit.names) - 1} more' * unit.batched}: {message}")
    return good


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, more = sys.argv[:split], sys.argv[split + 1 :]
    args = parse_args(Args)
    check_range(args, "cpus_per_run", low=1, high=10_000)
    check_range(args, "gpus_per_run num_cpus", low=0, high=10_000)
    check_range(args, "retries", low=0, high=1000)
    if args.gpus_per_run > 1 and args.gpus_per_run % 1:
        fail(f"--gpus-per-run {args.gpus_per_run}: must be a whole number, or at most 1")
    if args.address and args.num_cpus:
        fail(f"--num-cpus {args.num_cpus}: must not go with --address, whose machines have said what they have")
    if args.folder.exists() and not args.folder.is_dir():
        fail(f"--folder {args.folder}: is not a folder; runs/ and logs/ are kept in it")
    if not args.commands:
        fail("--commands: must have at least one, as 'python ppo_mujoco.py'")
    units = about_runs(args, more) if args.runs else grid(args, more)
    states = {unit: states_of(unit, args.folder) for unit in units}
    missing = {unit: next_command(unit, states[unit]) for unit in units}
    missing = {unit: command for unit, command in missing.items() if command}
    finished = sum(state.finished for unit in units for state in states[unit])
    total = sum(len(unit.names) for unit in units)
    processes = f" in {len(missing)} processes" if args.batch_seeds else ""
    counts = f"{total} runs: {finished} finished, {total - finished} to run{processes}"
    if args.dry_run:
        say("\n".join([*map(shlex.join, missing.values()), f"# {counts}"]))
        return
    print(counts, flush=True)
    try:
        (args.folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--folder {args.folder}: logs/ can't be created in it ({error.strerror})")
    failed, interrupted = {}, False
    if missing:
        with Board(list(missing), args.folder) as board:
            failed, interrupted = run_all(args, list(missing), board)
    good = report(units, args.folder, failed)
    if interrupted:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        raise SystemExit(130)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
