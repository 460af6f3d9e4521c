"""Whether a long run leaks: memory, open files and threads of each script over thousands of iterations.

    python -m benchmark.soak

Runs each script in turn at a tiny size and reads, from /proc, what its process holds each time it reports on the
console, which it does every ``--interval`` iterations. Prints a table, writes it to benchmark/results/soak.md, and ends
with exit code 1 if resident memory grew by 20 MB or more after the first 100 iterations, or if the number of open files
or threads changed. Linux only.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common.arguments import check_output, check_range, fail
from common.run import git_revision, library_versions, parse_args

ROOT = Path(__file__).resolve().parent.parent
ATARI = "--num-envs 2 --num-steps 8 --minibatch-size 16 --update-epochs 1"
MUJOCO = "--num-steps 16 --minibatch-size 16 --update-epochs 1 --obs-norm-steps 50"
# What is run, the flags that make it tiny, and the environment steps of its iteration
RUNS = {
    "ppo_atari.py": (ATARI, 48),
    "ppo_atari_2models.py": (ATARI, 48),
    "ppo_pfo_atari.py": (f"{ATARI} --pfo-layers all", 48),
    "ppo_mujoco.py": (MUJOCO, 32),
    "ppo_mujoco.py --seeds 1 2 3": (MUJOCO, 32),
}
LIMIT = 20  # MB of growth


@dataclass
class Args:
    iterations: int = 2000
    """iterations of each script"""
    interval: int = 20
    """iterations between readings, each with the diagnostics"""
    output: str = str(ROOT / "benchmark" / "results" / "soak.md")
    """file that the table is written to"""


def held(process):
    """Resident memory (MB), open files and threads of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    memory = int(fields["VmRSS"].split()[0]) / 1000 * 1.024
    return memory, len(os.listdir(f"/proc/{process.pid}/fd")), int(fields["Threads"])


def readings(run, args):
    """``{iteration: held}`` of ``run``, one of RUNS, in a folder of its own."""
    flags, steps = RUNS[run]
    script, *more = run.split()
    command = [sys.executable, str(ROOT / script), *more, *flags.split()]
    command += ["--diagnostics-interval", str(args.interval)]
    found = {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as errors:
        command += ["--total-timesteps", str(args.iterations * steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        ) as process:
            for line in process.stdout:
                done, slash, _ = line.partition("/")
                if slash and done.replace(",", "").isdecimal():
                    iteration = int(done.replace(",", "")) // steps
                    if iteration < args.iterations:  # else it may be gone
                        found[iteration] = held(process)
        if process.returncode:
            errors.seek(0)
            fail(f"{run}: {errors.read().strip()[-500:]}", code=1)
    return found


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "iterations", low=200, high=10**7)
    check_range(args, "interval", low=1, high=100)
    check_output(Path(args.output))
    if not Path("/proc/self/status").is_file():
        fail("benchmark.soak: reads /proc, which only Linux has")
    rows, leaks = [], []
    for run in RUNS:
        start = time.time()
        found = readings(run, args)
        after = {iteration: x for iteration, x in found.items() if iteration >= 100}
        memory, files, threads = zip(*after.values(), strict=True)
        growth = max(memory) - memory[0]
        counts = [f"{min(x)}" if min(x) == max(x) else f"{min(x)} to {max(x)}" for x in (files, threads)]
        rows.append([f"`{run}`", f"{memory[0]:.0f}", f"{memory[-1]:.0f}", f"{growth:.1f}", *counts, len(after)])
        rows[-1].append(f"{time.time() - start:.0f}")
        if growth >= LIMIT or len({*files}) > 1 or len({*threads}) > 1:
            leaks.append(run)
        print(*rows[-1], sep="\t", flush=True)
    titles = [
        "script",
        "MB at iteration 100",
        "MB at the end",
        "most growth, MB",
        "open files",
        "threads",
        "readings",
        "s",
    ]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [titles, ["---"] * len(titles), *rows])
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    text = f"""# Memory, open files and threads over {args.iterations:,} iterations

`python -m benchmark.soak{"".join(f" --{name} {x}" for name, x in vars(args).items() if x != getattr(Args, name))}`,
one process at a time, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; {versions};
commit {git_revision()}.

{table}

Resident memory as Linux counts it. Growth is the most that any reading after iteration 100 has above the one there; it
must stay below {LIMIT} MB. Open files and threads must not change.
"""
    Path(args.output).write_text(text, encoding="utf-8")
    print(f"\n{text}")
    if leaks:
        fail(f"{', '.join(leaks)}: leaks", code=1)
