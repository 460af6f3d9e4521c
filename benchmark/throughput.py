"""How close a training script comes to the arithmetic limit of the machine.

    python -m benchmark.throughput ppo_pfo_atari.py --rounds 3 --cores 0 1 -- --diagnostics-interval 33

Runs the script (with what stands behind ``--``) and a 2048 x 2048 float32 matrix product in turn, each in a process of
its own on the same cores, and prints the agent steps a second of each round, the rate of the product, and the share of
the limit: the limit is that rate over the floating point operations of an agent step, which PyTorch counts on the
script's own networks (actor and critic once forward in the rollout, then forward and backward in every epoch).
"""

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from common.run import check_range, fail, parse_args

ROOT = Path(__file__).resolve().parent.parent

PRODUCT = """
import statistics, time, torch
a, b = torch.randn(2, 2048, 2048)
times = []
for _ in range(30):
    start = time.perf_counter()
    a @ b
    times.append(time.perf_counter() - start)
print(2 * 2048**3 / statistics.median(times[5:]))
"""


@dataclass
class Args:
    script: tyro.conf.Positional[str]
    """the training script, as ppo_pfo_atari.py"""
    rounds: int = 3
    """how often to measure both"""
    iterations: int = 34
    """iterations of each run; the first is not timed"""
    cores: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (0, 1)
    """processor cores to run on; PyTorch gets a thread for each"""


def measured(command, cores, folder):
    """The last line that ``command`` prints, run on ``cores`` in ``folder``; its standard error if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "MKL_NUM_THREADS": str(len(cores))}
    pin = (lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None
    done = subprocess.run(
        command, cwd=folder, env=environment, preexec_fn=pin, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        fail(f"{' '.join(command)}: {done.stderr.strip() or 'failed without a word'}", code=1)
    return done.stdout.strip().splitlines()[-1]


def flops_of_agent_step(script, args):
    """Floating point operations of an agent step: forward once, and ``update_epochs`` times forward and backward."""
    agent = script.Agent(8, args)
    obs = torch.zeros((1, 84, 84, 4), dtype=torch.uint8)
    with FlopCounterMode(display=False) as forward:
        policy, value = agent(obs)
    with FlopCounterMode(display=False) as backward:
        (policy.output.sum() + value.output.sum()).backward()
    return forward.get_total_flops() + args.update_epochs * (forward.get_total_flops() + backward.get_total_flops())


def steps_per_second(folder):
    """Agent steps a second of the run in ``folder`` between the end of its first and of its last iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rates, frames = events.Scalars("charts/SPS"), events.Scalars("charts/FPS")
    # SPS counts from the start of training, so steps / SPS is the time at which an iteration ended.
    steps = [rate.step * rate.value / frame.value for rate, frame in zip(rates, frames, strict=True)]
    times = [step / rate.value for step, rate in zip(steps, rates, strict=True)]
    return (steps[-1] - steps[0]) / (times[-1] - times[0])


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    passed, sys.argv = sys.argv[split + 1 :], sys.argv[:split]
    args = parse_args(Args)
    check_range(args, "rounds", low=1)
    check_range(args, "iterations", low=2)
    if not (ROOT / args.script).is_file():
        fail(f"{args.script}: must be one of the training scripts in {ROOT}")
    script = importlib.import_module(Path(args.script).stem)
    script_args = tyro.cli(script.Args, args=passed)
    script.check_args(script_args)
    frames = args.iterations * script_args.batch_size * script_args.frame_skip
    flops = flops_of_agent_step(script, script_args)

    rates, speeds = [], []
    for turn in range(1, args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            rates.append(float(measured([sys.executable, "-c", PRODUCT], args.cores, folder)))
            command = [sys.executable, str(ROOT / args.script), *passed, "--total-timesteps", str(frames)]
            measured(command, args.cores, folder)
            speeds.append(steps_per_second(next(Path(folder).glob("runs/*"))))
        rates.append(float(measured([sys.executable, "-c", PRODUCT], args.cores, ".")))
        rate = statistics.mean(rates[-2:])  # of just before and just after the run
        share = speeds[-1] * flops / rate
        print(
            f"round {turn}: {speeds[-1]:.0f} agent steps/s, product {rate / 1e9:.0f} GFLOP/s, {share:.0%} of the limit"
        )
    rate, speed = statistics.median(rates), statistics.median(speeds)
    print(f"{flops / 1e6:.0f} MFLOP an agent step, {len(args.cores)} cores")
    print(
        f"median: {speed:.0f} agent steps/s, product {rate / 1e9:.0f} GFLOP/s, {speed * flops / rate:.0%} of the limit"
    )
