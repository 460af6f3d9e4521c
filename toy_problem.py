# Why clipping can't hold the probability ratios of states that share a feature: the toy problem of "No Representation,
# No Trust" (NeurIPS 2024, arXiv 2405.00662, figure 5), on a CPU in seconds.
# the paper's panel: y = alpha x, alpha = -2 and alpha = 3
#   python toy_problem.py
# the claim rather than two instances of it: how far the ratios get beyond 1 + epsilon, over alpha and feature norm
#   python toy_problem.py --sweep
# two features of which y copies one, and Adam
#   python toy_problem.py --alpha 3 --features 2 --copied 1 --optimizer adam --lr 0.05
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import torch

sys.path.append(str(Path(__file__).resolve().parent))  # which python -P leaves out
from common.arguments import check_output, check_range, fail
from common.run import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

SWEEP_SEEDS = 32
# Okabe and Ito's palette, which the colour-blind can tell apart; markers and line styles serve a print in grey.
STYLES = (("x", "#0072B2", "-", "o"), ("y", "#D55E00", "--", "s"))


@dataclass
class Args:
    alpha: tuple[float, ...] = ()
    """y copies alpha times x, in a panel for each alpha; with --sweep they are the axis's ends (none: -2 3, -4 4)"""
    seed: int = 1
    """seed of the initial weights, of x, and of what y doesn't copy"""
    lr: float = 1.5
    """learning rate"""
    clip_coef: float = 0.1
    """epsilon: a ratio beyond 1 + epsilon gives no further gradient on its own state"""
    steps: int = 20
    """minibatches, of x and y in turn"""
    features: int = 1
    """features of a state"""
    copied: int = 1
    """how many of them y copies from x, the first ones, times alpha; the others are y's own random numbers"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD without momentum, or Adam with PyTorch's default betas (the paper: SGD)"""
    sweep: bool = False
    """draw the ratios' excess over 1 + epsilon as a heat map over alpha and the norm of x's features, 0.01 to 1"""
    output: Path | None = None
    """the PNG to write, and a PDF beside it; None is toy_problem.png, with --sweep toy_problem_sweep.png"""


def check_args(args):
    """Refuse what can't run before anything is started, and fill in what follows from the arguments."""
    if not all(-1e6 <= alpha <= 1e6 for alpha in args.alpha):
        fail(f"--alpha {' '.join(map(str, args.alpha))}: must be numbers within -1e6 and 1e6")
    if len(args.alpha) > 8:
        fail(f"--alpha: must be at most 8 numbers, to be seen side by side, not {len(args.alpha)}")
    if args.sweep and args.alpha and (len(args.alpha) != 2 or args.alpha[0] == args.alpha[1]):
        alphas = " ".join(map(str, args.alpha))
        fail(f"--alpha {alphas}: must be two different numbers with --sweep, the ends of an axis")
    args.alpha = args.alpha or ((-4.0, 4.0) if args.sweep else (-2.0, 3.0))
    check_range(args, "seed", low=0, high=2**31 - 1)
    check_range(args, "lr clip_coef", above=0, high=1e6)
    check_range(args, "steps", low=1, high=1000)
    check_range(args, "features", low=1, high=256)
    if not 0 <= args.copied <= args.features:
        fail(f"--copied {args.copied}: must be at least 0 and at most --features, {args.features}")
    args.output = args.output or Path("toy_problem_sweep.png" if args.sweep else "toy_problem.png")
    if args.output.suffix not in (".png", ".pdf"):
        fail(f"--output {args.output}: must end in .png; the PDF is written beside it")
    for suffix in (".png", ".pdf"):
        check_output(args.output.with_suffix(suffix))


def initial_state(seed, args):
    """Weights (2, features), x (features,), and y (features,) for alpha = 1, as float64; the paper's order of draws."""
    torch.manual_seed(seed)
    weights = torch.nn.Linear(args.features, 2, bias=False).weight.detach()
    x = torch.randn(args.features)
    own = torch.randn(args.features - args.copied)
    return weights.double(), x.double(), torch.cat([x[: args.copied], own]).double()


def train(weights, x, y, args):
    """PPO's clipped objective on the states x and y in turn, advantage 1 for the first of the two actions in both.

    weights: (B, 2, features) float64, B problems that are independent of each other; x, y: (B, features).
    Returns π(first action) and its ratio to the initial policy's, (steps + 1, B, 2) each, the last axis x and y; row 0
    is before the first update, which is on x.
    """
    weights = weights.clone().requires_grad_()
    states = torch.stack([x, y], dim=1)  # (B, 2, features)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[args.optimizer]([weights], lr=args.lr)

    def logprobs():
        return (states @ weights.mT).log_softmax(-1)[..., 0]  # (B, 2)

    initial = logprobs().detach()
    history = [initial]
    for step in range(args.steps):
        ratio = (logprobs() - initial)[:, step % 2].exp()
        objective = torch.min(ratio, ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))
        optimizer.zero_grad()
        (-objective.sum()).backward()  # a sum, so that no problem's gradient depends on how many there are
        optimizer.step()
        history.append(logprobs().detach())
    logprobs = torch.stack(history)
    ratios = (logprobs - initial).exp()
    if not ratios.isfinite().all():
        fail(f"--lr {args.lr}: the ratios overflow; choose a smaller one, or an --alpha nearer to 0", code=1)
    return logprobs.exp(), ratios


def print_table(alpha, x, y, probabilities, ratios, args):
    """The policy and the ratios after each update; a star is a ratio beyond 1 + epsilon."""
    x, y = (", ".join(f"{number:.4g}" for number in state[:8]) + ", …" * (len(state) > 8) for state in (x, y))
    print(f"alpha = {alpha:g}, 1 + epsilon = {1 + args.clip_coef:g}: x = ({x}), y = ({y})")
    print("minibatch  of    pi(x)    pi(y)  ratio(x)   ratio(y)")
    for step, (pi, ratio) in enumerate(zip(probabilities[1:], ratios[1:], strict=True)):
        cells = [f"{r:.4f}" if r < 1e4 else f"{r:.3g}" for r in ratio]
        cells = [cell + ("*" if r > 1 + args.clip_coef else " ") for cell, r in zip(cells, ratio, strict=True)]
        print(f"{step + 1:9d}   {'xy'[step % 2]}   {pi[0]:.4f}   {pi[1]:.4f}    {'    '.join(cells)}".rstrip())
    print()


def draw_panels(results, args):
    """The ratios over the minibatches, a panel for each alpha; a marker is an update on that very state."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(1 + 3.6 * len(results), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (alpha, ratios) in zip(axes[0], results.items(), strict=True):
        for i, (state, colour, line, marker) in enumerate(STYLES):
            own = range(1 + i, args.steps + 1, 2)
            axis.plot(
                ratios[:, i], line, color=colour, marker=marker, markevery=list(own), ms=4.5, label=f"ratio of {state}"
            )
        bound = 1 + args.clip_coef
        axis.axhline(bound, color="black", linestyle=":", linewidth=1.2, label="1 + ε")
        shared = "" if args.copied == args.features else f", {args.copied} of {args.features} features"
        axis.set(title=f"y = {alpha:g} x{shared}".replace("-", "−"), xlabel="minibatch, of x and y in turn")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("probability ratio of the good action")
    axes[0, 0].legend(title="marker: update on it", fontsize="small", title_fontsize="small")
    return figure


def sweep(alphas, norms, args):
    """Each state's largest ratio − (1 + epsilon), the median over initialisations, (norms, alphas, 2), x and y last.

    alphas: (A,) float64; norms: (N,) float64, of x's features.
    """
    excess = []
    for seed in range(args.seed, args.seed + SWEEP_SEEDS):
        weights, x, copy = initial_state(seed, args)
        x, copy = (norms.view(-1, 1, 1) * state / x.norm() for state in (x, copy))  # (norms, 1, features)
        scale = torch.ones(len(alphas), args.features).double()
        scale[:, : args.copied] = alphas.unsqueeze(1)
        x, y = x.expand(-1, len(alphas), -1).flatten(0, 1), (scale * copy).flatten(0, 1)
        _, ratios = train(weights.expand(len(x), 2, -1), x, y, args)
        excess.append((ratios.amax(0) - (1 + args.clip_coef)).view(len(norms), len(alphas), 2))
    # Not the mean: an action whose initial probability is 1e-5 has a ratio of 1e5 in the end.
    return torch.stack(excess).quantile(0.5, dim=0)


def draw_sweep(args):
    """Heat maps of ``sweep`` over alpha and ‖x‖."""
    alphas, norms = torch.linspace(min(args.alpha), max(args.alpha), 121).double(), torch.logspace(-2, 0, 101).double()
    excess = sweep(alphas, norms, args)
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.4), sharey=True, layout="constrained")
    for i, (axis, state) in enumerate(zip(axes, "xy", strict=True)):
        image = axis.pcolormesh(
            alphas, norms, excess[..., i], cmap="cividis", vmin=excess.min(), vmax=excess.max(), rasterized=True
        )
        if excess[..., i].min() < 0 < excess[..., i].max():
            lines = axis.contour(alphas, norms, excess[..., i], levels=[0], colors="white", linewidths=1.5)
            axis.clabel(lines, fmt="0: the bound", fontsize="small")
        axis.set(
            title=f"ratio of {state}",
            xlabel="α, with y = αx" if args.copied == args.features else "α, of what y copies",
            yscale="log",
        )
    axes[0].set_ylabel("feature norm ‖x‖")
    figure.colorbar(image, ax=axes, label="largest ratio − (1 + ε)")
    optimizer = {"sgd": "SGD", "adam": "Adam"}[args.optimizer]
    shared = "" if args.copied == args.features else f", y copies {args.copied} of {args.features} features"
    figure.suptitle(
        f"Largest excess of the probability ratio over 1 + ε = {1 + args.clip_coef:g} in {args.steps} minibatches,\n"
        f"median of {SWEEP_SEEDS} initialisations, {optimizer} with learning rate {args.lr:g}{shared}"
    )
    return figure


def save(figure, path):
    """Write PNG and PDF; the same figure gives the same bytes."""
    try:
        figure.savefig(path.with_suffix(".png"), dpi=110)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    except OSError as error:
        fail(f"--output {path}: can't be written ({error.strerror})")
    print(path.with_suffix(".png"), path.with_suffix(".pdf"))


if __name__ == "__main__":
    args = parse_args(Args)
    check_args(args)
    if args.sweep:
        figure = draw_sweep(args)
    else:
        weights, x, copy = initial_state(args.seed, args)
        results = {}
        for alpha in args.alpha:
            y = torch.cat([alpha * copy[: args.copied], copy[args.copied :]])
            probabilities, ratios = (z[:, 0].numpy() for z in train(weights[None], x[None], y[None], args))
            print_table(alpha, x, y, probabilities, ratios, args)
            results[alpha] = ratios
        figure = draw_panels(results, args)
    save(figure, args.output)
