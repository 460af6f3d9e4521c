"""Films a run's policy before, at and after its collapse, one episode each:

    python -m benchmark.film runs/RUN

Of the run's checkpoints it takes the one nearest to the largest return, the first at which the return has fallen below
half of that for good (`benchmark.measures.collapse`), and the last; of a run whose return didn't fall, the first of
these and the last. Writes RUN/videos/{step}-sampled.mp4 (or -greedy), as ``--capture-video`` does in training.
Atari, and MuJoCo where there is EGL. Exit codes: 0, 1 where one of several runs could not be filmed, 2 where the only
one could not, or for a wrong command line.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from benchmark.logs import read_run
from benchmark.measures import collapse, settled_return
from common.arguments import check_range, fail, one_line, pick_device
from common.checkpoint import BadCheckpoint
from common.evaluation import can_render, play
from common.run import parse_args
from plasticity_probe import Atari, MuJoCo, load_weights, new_agent, open_checkpoint, script_and_args


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, with their logs and checkpoints/"""
    checkpoints: tuple[str, ...] = ()
    """which checkpoints to film, by their global step, `first` or `last`; none given is those of the collapse"""
    greedy: bool = False
    """take the most likely action instead of sampling one"""
    seed: int = 1
    """seed of the episode's environment and actions, the same for all checkpoints"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes CUDA, then MPS, then the CPU"""


class Refused(Exception):
    """A run that can't be filmed; the message is for the user."""


def of_collapse(run, steps):
    """Those of the checkpoints at ``steps``, ascending, that show the collapse of a Run: ``{step: what it shows}``."""
    score, _ = settled_return(run)
    if score.empty:
        raise Refused("no episode has ended yet, so that there is no best policy; name --checkpoints")
    falls = collapse(run)
    lost = "return" if falls["return_halved"] is not None else "rank"
    fell = falls[f"{lost}_halved"]
    best = int(score[:fell].idxmax())
    shown = {min(steps, key=lambda step: abs(step - best)): "at the largest return"}
    after = [step for step in steps if fell is not None and step >= fell]
    if after:
        shown.setdefault(after[0], f"when the {lost} had fallen for good")
    shown.setdefault(steps[-1], "at the end")
    return shown


def chosen(folder, wanted):
    """Which of the run's checkpoints to film, ``{path: what it shows}`` in their order."""
    paths = {int(path.stem): path for path in folder.glob("checkpoints/*.pt") if path.stem.isdecimal()}
    steps = sorted(paths)
    if not steps:
        raise Refused("must be a run's folder, with checkpoints/ in it")
    if wanted:
        named = {"first": steps[0], "last": steps[-1]}
        for step in wanted:
            if step not in named and int(step) not in paths:
                nearest = min(steps, key=lambda x: abs(x - int(step)))
                raise Refused(f"--checkpoints {step}: it has none of that step; the nearest is {nearest}")
        shown = {named[step] if step in named else int(step): "as asked for" for step in wanted}
    else:
        try:
            shown = of_collapse(read_run(folder)[0], steps)
        except ValueError as error:
            raise Refused(f"its logs can't be read: {error}") from None
    return {paths[step]: shown[step] for step in sorted(shown)}


def film(path, video, args, device):
    """Record an episode of the policy at ``path`` to ``video``; returns its return and length (agent steps)."""
    checkpoint = open_checkpoint(path)
    script, run_args = script_and_args(checkpoint)
    kind = Atari if hasattr(run_args, "frame_skip") else MuJoCo
    if kind is MuJoCo and not can_render(run_args.env_id):
        raise Refused(f"{run_args.env_id} can't be rendered here, for want of EGL")
    agent = new_agent(script, kind, run_args, args.seed, device, checkpoint["agent"])
    agent, statistics = load_weights(checkpoint, agent, script, kind)
    make_envs = partial(script.make_envs, run_args)
    if kind is Atari:
        choose, fps = partial(script.choose, agent), 60 / run_args.frame_skip
    else:
        envs = make_envs(1, [0])
        box = envs.action_space.low, envs.action_space.high
        envs.close()
        choose, fps = partial(script.choose, agent, statistics, box), 50
    (score,), (length,) = play(make_envs, choose, device, fps, [args.seed], args.greedy, video)
    return score, length


def main(args):
    """Film each run, whatever becomes of the others; returns the exit code."""
    if not args.runs:
        fail("RUNS: name at least one run's folder, as runs/RUN")
    for step in args.checkpoints:
        if step not in ("first", "last") and not step.isdecimal():
            fail(f"--checkpoints {step}: must be global steps, first or last")
    check_range(args, "seed", low=0, high=2**31 - 1)
    device, code = pick_device(args.device), 0
    for folder in args.runs:
        try:
            for path, what in chosen(folder, args.checkpoints).items():
                video = folder / "videos" / f"{path.stem}-{'greedy' if args.greedy else 'sampled'}.mp4"
                score, length = film(path, video, args, device)
                print(f"{video}: {what}, return {score:.6g} in {length:.0f} agent steps", flush=True)
        except (Refused, BadCheckpoint, OSError) as error:
            print(f"error: {folder}: {one_line(str(error))}", file=sys.stderr, flush=True)
            code = 2 if len(args.runs) == 1 else 1
    return code


if __name__ == "__main__":
    sys.exit(main(parse_args(Args)))
