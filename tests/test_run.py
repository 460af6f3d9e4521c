"""A run's housekeeping: where checkpoints fall, how they are written, what the console says."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.run import Run, library_versions, milestones, parse_args, random_states


@dataclasses.dataclass
class Args:
    env_id: str = "Env-v5"
    exp_name: str = "test"
    seed: int = 3
    track: bool = False
    rate: float = 0.5
    """a number"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(Args(), total_steps=100)
    yield run
    run.close()


def test_the_papers_grid_has_41_checkpoints():
    points = sorted(milestones(32_552, 0.025))
    assert len(points) == 40 and points[0] == 814 and points[-1] == 32_552
    assert {b - a for a, b in itertools.pairwise(points)} == {813, 814}


@given(st.integers(1, 10_000), st.floats(1e-9, 1))
def test_milestones_are_iterations_and_end_with_the_last(num_iterations, share):
    points = sorted(milestones(num_iterations, share))
    assert points[0] >= 1 and points[-1] == num_iterations
    assert len(points) <= min(num_iterations, 1 / share + 2)
    gaps = [b - a for a, b in itertools.pairwise([0, *points])]
    assert max(gaps) <= max(share * num_iterations, 1) + 1


def test_checkpoints_load_without_running_code_and_carry_their_origin(run):
    state = {"weights": torch.randn(3), "numpy": {"state": 2**127 + 1}, "rng": random_states(torch.device("cpu"))}
    run.save_checkpoint(42, state)
    folder = Path("runs") / run.name / "checkpoints"
    assert (folder / "42.pt").read_bytes() == (folder / "latest.pt").read_bytes()
    loaded = torch.load(folder / "42.pt", weights_only=True)
    assert torch.equal(loaded["weights"], state["weights"]) and loaded["numpy"] == state["numpy"]
    assert loaded["args"] == dataclasses.asdict(Args()) and loaded["versions"] == library_versions()
    assert torch.equal(loaded["rng"]["cpu"], torch.get_rng_state())


def test_a_failed_checkpoint_leaves_the_old_one_and_no_rubbish(run):
    run.save_checkpoint(1, {"x": 1})
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        run.save_checkpoint(1, {"x": (i for i in range(3))})  # a generator can't be pickled
    folder = Path("runs") / run.name / "checkpoints"
    assert torch.load(folder / "1.pt", weights_only=True)["x"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["1.pt", "latest.pt"]


def test_the_rolling_checkpoint_keeps_the_one_before_it(run):
    for step in (1, 2, 3):
        run.save_checkpoint(step, {"x": step}, snapshot=step == 2)
    folder = Path("runs") / run.name / "checkpoints"
    found = {path.name: torch.load(path, weights_only=True)["x"] for path in folder.iterdir()}
    assert found == {"2.pt": 2, "latest.pt": 3, "previous.pt": 2}


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [Run(Args(), total_steps=1) for _ in range(2)]
    assert runs[0].folder != runs[1].folder and len(list(Path("runs").iterdir())) == 2
    for run in runs:
        run.close()


@pytest.mark.parametrize("name", ["", "a/b", "../up", "two\nlines", "a b"])
def test_names_that_are_no_folder_are_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        Run(Args(exp_name=name), total_steps=1)
    assert stop.value.code == 2 and "--exp-name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_lines_instead_of_a_bar(run, capsys):
    run.say_once("only once")
    run.say_once("only once")
    run.progress(50, rank=3)
    run.report(50, fps=10, rank=3.14159)
    out = capsys.readouterr().out
    assert out.count("only once") == 1
    assert "50/100 frames, 10 a second, 00:05 left, rank 3.142" in out


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_bar_in_a_terminal(tmp_path, monkeypatch):
    termios = pytest.importorskip("termios")
    main, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stderr", stderr)
        run = Run(Args(), total_steps=100)
        run.progress(50, rank=12, dead=3)
        run.bar.refresh()
        run.close()
        shown = ""
        while "frame/s" not in shown or "50%" not in shown:  # a terminal hands on in pieces
            shown += os.read(main, 100_000).decode()
    os.close(main)
    assert "50%" in shown and "rank=12" in shown and "dead=3" in shown and "frame/s" in shown


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--seed", "x"], "--seed"),
        (["--seed"], "--seed"),
        (["--rate", "half"], "--rate"),
        (["--sed", "1"], "--seed"),
        (["nonsense"], "nonsense"),
        (["--track", "yes"], "yes"),
        (["--seed", ""], "--seed"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_wrong_command_line_costs_one_line(monkeypatch, capsys, flags, said, columns):
    """In a narrow terminal too."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    with pytest.raises(SystemExit) as stop:
        parse_args(Args)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert said in printed.err and "─" not in printed.err and "│" not in printed.err


def test_a_wrong_command_line_without_unicode():
    """tyro frames its messages with ASCII where it must."""
    code = "import dataclasses, sys; from common.run import parse_args\n"
    code += "parse_args(dataclasses.make_dataclass('A', [('seed', int, 1)]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--seed", "x"],
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--seed" in done.stderr and "---" not in done.stderr and "Argument helptext" not in done.stderr
