"""How fast a training script is, against the arithmetic limit of the machine and against Stable-Baselines3.

    python -m benchmark.throughput ppo_pfo_atari.py --rounds 3 --cores 0 1 -- --diagnostics-interval 33
    python -m benchmark.throughput ppo_pfo_atari.py --precisions float32 bfloat16 -- --diagnostics-interval 33
    pip install stable-baselines3==2.9.2 opencv-python-headless==5.0.0.93 mujoco==4.0.0
    python -m benchmark.throughput ppo_mujoco.py --cores 0 -- --diagnostics-interval 3
    python -m benchmark.throughput ppo_mujoco.py --cores 0 -- --diagnostics-interval 3 --seeds 25 7 64 27 4

Runs the script (with what stands behind ``--``), a 2048 x 2048 matrix product in the script's precision and, where it
is installed, Stable-Baselines3's PPO with the same sizes in turn, each in a process of its own on the same cores, and
prints the steps a second of each round (agent steps on Atari; all seeds together), the rate of the product and the
ratio to Stable-Baselines3. On Atari, where arithmetic takes the time, it prints the share of the limit as well: the
limit is that rate over the floating point operations of an agent step, which PyTorch counts on the script's own
networks (actor and critic once forward in the rollout, then forward and backward in every epoch).
With two ``--precisions`` every round measures all that in the one and then in the other, and it prints how many times
as fast the second is, round by round and in the median.
"""

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from common.arguments import check_range, fail
from common.run import parse_args

ROOT = Path(__file__).resolve().parent.parent

PRODUCT = """
import statistics, sys, time, torch
a, b = torch.randn(2, 2048, 2048).to(getattr(torch, sys.argv[1]))
times = []
while len(times) < 30 and sum(times) < 4:
    start = time.perf_counter()
    a @ b
    times.append(time.perf_counter() - start)
print(2 * 2048**3 / statistics.median(times[len(times) // 6 :]))
"""

# The whole of Stable-Baselines3's PPO, with the script's sizes and its own defaults elsewhere. The first iteration is
# not timed; the hook is called as each rollout begins, and once more when the last update is done.
STABLE_BASELINES3 = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import gymnasium
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

args, iterations = json.loads(sys.argv[1]), int(sys.argv[2])
common = dict(n_steps=args["num_steps"], batch_size=args["minibatch_size"], n_epochs=args["update_epochs"],
              device="cpu", seed=1)
if "frame_skip" in args:
    import ale_py
    gymnasium.register_envs(ale_py)
    settings = {"frameskip": 1, "repeat_action_probability": args["repeat_action_probability"]}
    envs = make_atari_env("ALE/" + args["env_id"], n_envs=args["num_envs"], env_kwargs=settings,
                          wrapper_kwargs={"frame_skip": args["frame_skip"]})
    model = PPO("CnnPolicy", VecFrameStack(envs, 4), **common)
else:
    envs = make_vec_env(args["env_id"], n_envs=args["num_envs"])
    model = PPO("MlpPolicy", envs, policy_kwargs={"net_arch": args["hidden_sizes"]}, **common)

class Times(BaseCallback):
    def _on_rollout_start(self):
        times.append(time.perf_counter())
    def _on_step(self):
        return True

times = []
batch = args["num_envs"] * args["num_steps"]
model.learn(batch * iterations, callback=Times())
times.append(time.perf_counter())
print(batch * (iterations - 1) / (times[-1] - times[1]))
"""


# What of the script's arguments the other implementation is given
SIZES = ("env_id", "num_envs", "num_steps", "minibatch_size", "update_epochs", "hidden_sizes", "frame_skip")
SIZES += ("repeat_action_probability",)


@dataclass
class Args:
    script: tyro.conf.Positional[str]
    """the training script, as ppo_pfo_atari.py"""
    rounds: int = 3
    """how often to measure each"""
    iterations: int = 34
    """iterations of each run; the first is not timed"""
    cores: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N")] = (0, 1)
    """processor cores to run on; PyTorch gets a thread for each"""
    precisions: tuple[Literal["float32", "bfloat16"], ...] = ()
    """measure the script with each of these as its --precision; without, once, as what stands behind -- says"""
    stable_baselines3: bool = True
    """measure Stable-Baselines3 too, if it is installed"""


def measured(command, cores, folder):
    """The last line that ``command`` prints, run on ``cores`` in ``folder``; its standard error if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "MKL_NUM_THREADS": str(len(cores))}
    pin = (lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    done = subprocess.run(command, cwd=folder, env=environment, preexec_fn=pin, **streams)
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
    training = sorted(path.name for path in ROOT.glob("ppo_*.py"))
    if args.script not in training:
        fail(f"{args.script}: must be one of {', '.join(training)}")
    there = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()))
    if not args.cores or not set(args.cores) <= there:
        fail(f"--cores {' '.join(map(str, args.cores))}: must be one or more of {' '.join(map(str, sorted(there)))}")
    script = importlib.import_module(Path(args.script).stem)
    sys.argv = [args.script, *passed]
    script_args = parse_args(script.Args)
    precisions = args.precisions or (getattr(script_args, "precision", "float32"),)
    if args.precisions and not hasattr(script_args, "precision"):
        fail(f"--precisions {' '.join(precisions)}: must be left out, since {args.script} has no --precision")
    if len(set(precisions)) < len(precisions):
        fail(f"--precisions {' '.join(precisions)}: must name each precision once")
    script.check_args(script_args)
    frames = args.iterations * script_args.batch_size * getattr(script_args, "frame_skip", 1)
    flops = flops_of_agent_step(script, script_args) if hasattr(script_args, "frame_skip") else None
    needed = ["stable_baselines3", "cv2" if flops else "mujoco"]  # its Atari wrappers resize with OpenCV
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    compared = args.stable_baselines3 and not missing

    speeds, rates, theirs = ({precision: [] for precision in precisions} for _ in range(3))
    for turn in range(1, args.rounds + 1):
        for precision in precisions:
            product = [sys.executable, "-c", PRODUCT, precision]
            flags = [*passed, "--precision", precision] if args.precisions else passed
            rates[precision].append(float(measured(product, args.cores, ".")))
            with tempfile.TemporaryDirectory() as folder:
                # One checkpoint in the middle, as a whole run has one in a dozen iterations
                run = ["--device", "cpu", "--total-timesteps", str(frames), "--checkpoint-interval", "0.5"]
                measured([sys.executable, str(ROOT / args.script), *run, *flags], args.cores, folder)
                speeds[precision].append(sum(map(steps_per_second, Path(folder).glob("runs/*"))))
            rates[precision].append(float(measured(product, args.cores, ".")))
            speed, rate = speeds[precision][-1], statistics.mean(rates[precision][-2:])  # of just before and just after
            line = f"round {turn}{f', {precision}' if args.precisions else ''}: {speed:.0f} steps/s"
            line += f", product {rate / 1e9:.0f} GFLOP/s"
            if flops:
                line += f", {speed * flops / rate:.0%} of the limit"
            if compared:
                sizes = json.dumps({name: x for name, x in vars(script_args).items() if name in SIZES})
                command = [sys.executable, "-c", STABLE_BASELINES3, sizes, str(args.iterations)]
                theirs[precision].append(float(measured(command, args.cores, ".")))
                other = theirs[precision][-1]
                line += f", Stable-Baselines3 {other:.0f} steps/s, ratio {speed / other:.2f}"
            print(line, flush=True)
        if len(precisions) == 2:
            one, other = (speeds[precision][-1] for precision in precisions)
            print(f"round {turn}: {precisions[1]} is {other / one:.2f} times as fast as {precisions[0]}", flush=True)
    for precision in precisions:
        speed, rate = statistics.median(speeds[precision]), statistics.median(rates[precision])
        line = f"median, {len(args.cores)} cores{f', {precision}' if args.precisions else ''}: {speed:.0f} steps/s"
        line += f", product {rate / 1e9:.0f} GFLOP/s"
        if flops:
            line += f", {flops / 1e6:.0f} MFLOP an agent step, {speed * flops / rate:.0%} of the limit"
        if compared:
            ratio = statistics.median(x / y for x, y in zip(speeds[precision], theirs[precision], strict=True))
            line += f", Stable-Baselines3 {statistics.median(theirs[precision]):.0f} steps/s, ratio {ratio:.2f}"
        elif args.stable_baselines3:
            line += f"; not compared with Stable-Baselines3, for want of {' and '.join(missing)}"
        print(line)
    if len(precisions) == 2:
        ratio = statistics.median(y / x for x, y in zip(*speeds.values(), strict=True))
        print(f"median: {precisions[1]} is {ratio:.2f} times as fast as {precisions[0]}")
