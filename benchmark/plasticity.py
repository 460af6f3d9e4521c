"""Draws the plasticity losses of probed runs of one environment over training, a line for each run:

python -m benchmark.plasticity runs/Hopper-v4__ppo_mujoco__* --output plasticity.png
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import tyro

from benchmark.curves import COLOURS, FORMATS, STYLES, label_of, save, title_of
from common.arguments import check_output, fail
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

# What fits what: the units are those of the networks' outputs.
NETWORKS = {"actor": "policy: KL divergence in nats", "critic": "critic: mean squared error"}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of the runs, each probed"""
    name: str = "plasticity"
    """--name of the probe"""
    loss: Literal["initial_loss", "final_loss", "last_minibatch_loss", "loss_auc"] = "final_loss"
    """which loss to draw; the paper's is last_minibatch_loss"""
    labels: tuple[str, ...] = ()
    """what to call the runs, in their order; none given is their seeds"""
    title: str = ""
    """title of the figure; empty is the runs' common name"""
    output: Path = Path("plasticity.png")
    """the file to write, a .png, .pdf or .svg"""


def read_losses(run, args):
    """Steps and losses by network."""
    path = run / args.name / "plasticity.csv"
    losses = {network: ([], []) for network in NETWORKS}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                steps, values = losses[row["network"]]
                steps.append(int(row["global_step"]))
                values.append(float(row[args.loss]))
    except FileNotFoundError:
        fail(f"{run}: must be a run's folder that plasticity_probe.py has seen; there is no {path}")
    except OSError as error:
        fail(f"{path}: can't be read ({error.strerror})")
    except (KeyError, TypeError, ValueError, csv.Error):
        fail(f"{path}: is not as plasticity_probe.py wrote it")
    return losses


if __name__ == "__main__":
    args = parse_args(Args)
    if not args.runs:
        fail("RUNS: name at least one run's folder, as runs/*")
    if args.labels and len(args.labels) != len(args.runs):
        fail(f"--labels: must be as many as runs, {len(args.runs)}, not {len(args.labels)}")
    check_output(args.output, *FORMATS)
    losses = [read_losses(run, args) for run in args.runs]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, (network, label) in zip(axes, NETWORKS.items(), strict=True):
        for i, run in enumerate(args.runs):
            steps, values = losses[i][network]
            name = args.labels[i] if args.labels else label_of(run)
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "marker": "osD^v"[i % 5]}
            axis.plot(steps, values, label=name, linewidth=1.3, markersize=3.5, **style)
        axis.set(xlabel="environment steps", ylabel=f"{args.loss.replace('_', ' ')} of the {label}", yscale="log")
        above_0 = [x for of_run in losses for x in of_run[network][1] if x > 0]
        if any(0 in values for values in (of_run[network][1] for of_run in losses)):
            axis.set_yscale("symlog", linthresh=min(above_0, default=1.0))
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(args.title or title_of(args.runs))
    save(figure, args.output)
    print(args.output)
