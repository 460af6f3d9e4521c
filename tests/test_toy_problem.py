"""The toy problem against an independent implementation's numbers, what the paper reads off it, and the program."""

import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy_problem

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = np.load(Path(__file__).parent / "golden" / "reference.npz")


def solved(alpha, seed=1, **flags):
    """Probabilities and ratios of x and y, (steps + 1, 2) each."""
    args = toy_problem.Args(alpha=(float(alpha),), seed=seed, **flags)
    toy_problem.check_args(args)
    weights, x, copy = toy_problem.initial_state(seed, args)
    y = torch.cat([alpha * copy[: args.copied], copy[args.copied :]])
    return (z[:, 0].numpy() for z in toy_problem.train(weights[None], x[None], y[None], args))


@pytest.mark.parametrize("alpha", [3, -1])
def test_against_the_reference(alpha):
    weights, x, copy = toy_problem.initial_state(1, toy_problem.Args())
    for ours, name in ((weights, "W0"), (x[None], "x"), (alpha * copy[None], "y")):
        np.testing.assert_allclose(ours, GOLDEN[f"toy/seed1_alpha{alpha}/{name}"], rtol=1e-6)
    probabilities, ratios = solved(alpha)
    out = np.concatenate([probabilities, ratios], axis=1)
    assert out[0, 2:].tolist() == [1, 1]
    np.testing.assert_allclose(out[1:], GOLDEN[f"toy/seed1_alpha{alpha}/out"], rtol=1e-6)


def test_what_the_paper_reads_off_its_figure():
    _, ratios = solved(-2)
    assert ratios[-1, 0] == pytest.approx(0.941, abs=5e-4)
    assert (ratios[:8, 1] < 1.1).all() and ratios[8, 1] > 1.1
    assert ratios[8:, 1].min() > 1.075 and ratios[8:, 1].max() < 1.155
    _, ratios = solved(3)
    assert ratios[-1] == pytest.approx([1.103, 1.253], abs=5e-4)


@given(st.integers(0, 1000), st.floats(0.05, 3), st.floats(0.05, 0.5))
@settings(max_examples=25, deadline=None)
def test_clipping_holds_a_state_whose_features_nobody_shares(seed, lr, clip_coef):
    """With y = 0 only updates on x move x, and clipping ends them: no update moves a ratio already beyond the bound."""
    _, ratios = solved(0, seed, lr=lr, clip_coef=clip_coef)
    assert (ratios[:, 1] == 1).all()
    beyond = ratios[:-1, 0] > 1 + clip_coef
    assert (ratios[1:, 0][beyond] == ratios[:-1, 0][beyond]).all()
    assert (np.diff(ratios[:, 0]) >= 0).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_problems_in_a_batch_do_not_touch_each_other(optimizer):
    args = toy_problem.Args(features=3, copied=2, optimizer=optimizer, lr=0.3)
    drawn = [torch.stack(z) for z in zip(*(toy_problem.initial_state(seed, args) for seed in range(4)), strict=True)]
    for together, alone in zip(
        toy_problem.train(*drawn, args),
        zip(*(toy_problem.train(*(z[i : i + 1] for z in drawn), args) for i in range(4)), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-12, atol=0)


def test_features_that_y_does_not_copy_are_its_own():
    _, x, y = toy_problem.initial_state(5, toy_problem.Args(features=4, copied=2))
    assert x[:2].equal(y[:2]) and (x[2:] != y[2:]).all()
    two = [list(solved(alpha, features=2, copied=0))[1] for alpha in (3, -2)]
    assert (two[0] == two[1]).all()


def program(folder, *flags, code=0):
    return forked.program(ROOT / "toy_problem.py", *flags, folder=folder, code=code)


@pytest.mark.slow
def test_without_arguments_it_draws_the_papers_panel(tmp_path):
    out = program(tmp_path).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy_problem.pdf", "toy_problem.png"]
    assert "alpha = -2" in out and "alpha = 3" in out and out.endswith("toy_problem.png toy_problem.pdf\n")
    rows = [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]
    assert len(rows) == 40 and rows[-1] == ["20", "y", "0.5823", "0.7303", "1.1032*", "1.2534*"]
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert first["toy_problem.png"].startswith(b"\x89PNG") and first["toy_problem.pdf"].startswith(b"%PDF")
    program(tmp_path)
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_sweep(tmp_path):
    program(tmp_path, "--sweep", "--alpha", "-1", "1", "--features", "2", "--steps", "4", "--output", "s.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.pdf", "s.png"]


def test_sweep_is_each_problem_alone():
    """Cells of the heat map, one seed after the other: which axis is which, the bound, the median."""
    args = toy_problem.Args(steps=7, clip_coef=0.2, seed=3)
    alphas, norms = torch.tensor([-3.0, 0.0, 2.0]).double(), torch.tensor([0.05, 0.8]).double()
    excess = toy_problem.sweep(alphas, norms, args)
    assert excess.shape == (2, 3, 2)
    for i, norm in enumerate(norms):
        for j, alpha in enumerate(alphas):
            largest = []
            for seed in range(3, 3 + toy_problem.SWEEP_SEEDS):
                weights, x, _ = toy_problem.initial_state(seed, args)
                x = norm * x / x.norm()
                _, ratios = toy_problem.train(weights[None], x[None], alpha * x[None], args)
                largest.append(ratios[:, 0].amax(0) - 1.2)
            torch.testing.assert_close(excess[i, j], torch.stack(largest).quantile(0.5, dim=0))
    assert excess[1, 2, 1] > 0 > excess[0, 2, 1]  # large features that y shares break the bound, small ones do not


WRONG = [
    ("--copied 2", "--copied 2: must be at least 0 and at most --features, 1"),
    ("--alpha nan", "--alpha nan"),
    ("--alpha 1 2 3 4 5 6 7 8 9", "at most 8"),
    ("--sweep --alpha 1", "two different"),
    ("--sweep --alpha -1 0 1", "two different"),
    ("--lr 0", "--lr 0.0: must be above 0"),
    ("--steps 0", "--steps 0: must be at least 1"),
    ("--seed -1", "--seed -1"),
    ("--clip-coef inf", "--clip-coef inf"),
    ("--optimizer rmsprop", "--optimizer"),
    ("--output x.svg", "--output x.svg: must end in .png"),
    ("--output nowhere/x.png", "a folder that exists"),
]


@pytest.mark.parametrize("flags, said", WRONG)
def test_bad_input_is_refused(monkeypatch, capsys, flags, said):
    monkeypatch.setattr(sys, "argv", ["toy_problem.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        toy_problem.check_args(toy_problem.parse_args(toy_problem.Args))
    printed = capsys.readouterr()
    assert stop.value.code == 2 and said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_ratios_that_overflow_are_said(tmp_path):
    done = program(tmp_path, "--seed", "5", "--lr", "1e3", "--alpha", "1e6", code=1)
    assert done.stderr.startswith("error: --lr") and list(tmp_path.iterdir()) == []
