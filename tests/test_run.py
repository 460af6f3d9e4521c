"""A run's housekeeping: where checkpoints fall, how they are written, what the console says."""

import dataclasses
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scripts import scalars_of

from common import run as housekeeping
from common.events import EventFile, drop_events
from common.run import Run, find_checkpoint, find_checkpoints, library_versions, milestones, parse_args, random_states


@dataclasses.dataclass
class Args:
    env_id: str = "Env-v5"
    exp_name: str = "test"
    seed: int = 3
    track: bool = False
    rate: float = 0.5
    """a number"""
    frame_skip: int = 1
    batch_size: int = 1
    num_iterations: int = 100


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(Args())
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
    runs = [Run(Args()) for _ in range(2)]
    assert runs[0].folder != runs[1].folder and len(list(Path("runs").iterdir())) == 2
    for run in runs:
        run.close()


@dataclasses.dataclass
class LongArgs(Args):
    """Of a run of 10 iterations of 8 steps."""

    resume: str = ""
    total_timesteps: int = 80
    batch_size: int = 8
    num_iterations: int = 10


def state(iteration):
    """The least that a checkpoint needs."""
    states = {**random_states(torch.device("cpu")), "numpy": np.random.default_rng(1).bit_generator.state}
    counters = {"iteration": iteration, "global_step": 8 * iteration, "episodes": 0, "recent_returns": []}
    return {"script": "x.py", "agent": {}, "optimizers": [], "random_states": states, **counters}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that makes a run of so many iterations, each logged and saved with a snapshot; gives its folder."""
    monkeypatch.chdir(tmp_path)
    housekeeping._say_once.cache_clear()
    monkeypatch.setattr(housekeeping, "_locks", {})

    def make(iterations, seed=3):
        run = Run(LongArgs(seed=seed))
        for i in range(1, iterations + 1):
            run.log({"x": i}, 8 * i)
            assert run.save_checkpoint(8 * i, state(i))
        assert run.close() == 0
        housekeeping._unlock(run.folder)
        return run.folder

    return make


def resumed(folder):
    """The iteration that the run in ``folder`` goes on from, and what then is in its folder of checkpoints."""
    args = LongArgs(resume=str(folder))
    checkpoint = find_checkpoint(args, "x.py")
    Run(args, checkpoint=checkpoint).close()
    return checkpoint["iteration"], sorted(path.name for path in folder.glob("checkpoints/*"))


SNAPSHOTS = ["16.pt", "24.pt", "32.pt", "40.pt", "8.pt"]


def test_a_snapshot_is_newer_than_a_checkpoint_from_before_it(made, capsys):
    """latest.pt is damaged, and the one before it is older than the last snapshot."""
    folder = made(5)
    (folder / "checkpoints" / "latest.pt").write_bytes(b"PK")
    assert resumed(folder) == (5, [*SNAPSHOTS, "latest.pt.damaged", "previous.pt"])
    assert "latest.pt can't be read" in capsys.readouterr().err


def test_a_snapshot_without_its_latest_is_not_lost(made, monkeypatch):
    """Whatever comes between the two writes of a checkpoint: a kill, or a disk that is full."""
    folder = made(4)
    args = LongArgs(resume=str(folder))
    run = Run(args, checkpoint=find_checkpoint(args, "x.py"))
    write, calls = housekeeping.write_file, []

    def once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(housekeeping, "write_file", once)
    run.log({"x": 5}, 40)
    assert not run.save_checkpoint(40, state(5))
    assert run.close(143) == 1
    monkeypatch.setattr(housekeeping, "write_file", write)
    assert resumed(folder) == (5, [*SNAPSHOTS, "latest.pt", "previous.pt"])
    assert [value for _, value in scalars_of(folder)["x"]] == [1, 2, 3, 4, 5]


def test_newer_checkpoints_that_are_not_used_are_kept(made, capsys):
    folder = made(5)
    checkpoints = folder / "checkpoints"
    shutil.copy(checkpoints / "40.pt", checkpoints / "48.pt")  # claims another step than its own
    (checkpoints / "56.pt").write_bytes(b"")
    rolling = ["latest.pt", "previous.pt"]
    assert resumed(folder) == (5, sorted([*SNAPSHOTS, *rolling, "48.pt.damaged", "56.pt.damaged"]))
    assert "56.pt can't be read, it is damaged" in (said := capsys.readouterr().err) and "(and 1 more)" in said


def test_a_checkpoint_that_is_being_renamed_is_no_damage(made, monkeypatch, capsys):
    folder = made(5)
    is_file, gone = Path.is_file, folder / "checkpoints" / "latest.pt"
    monkeypatch.setattr(Path, "is_file", lambda path: path != gone and is_file(path))
    assert find_checkpoint(LongArgs(resume=str(folder)), "x.py")["iteration"] == 5  # 40.pt
    assert capsys.readouterr().err == ""


def test_seeds_go_back_to_the_last_iteration_that_all_have(made, capsys):
    folders = [made(5, seed=1), made(3, seed=2)]
    runs = [LongArgs(seed=seed, resume=str(folder)) for seed, folder in zip((1, 2), folders, strict=True)]
    checkpoints = find_checkpoints(runs, "x.py")
    assert [checkpoint["iteration"] for checkpoint in checkpoints] == [3, 3]
    assert f"{folders[0]}: goes back from iteration 5 to 3" in capsys.readouterr().out
    for args, checkpoint in zip(runs, checkpoints, strict=True):
        Run(args, checkpoint=checkpoint).close()
    names = ["16.pt", "24.pt", "8.pt"]
    assert sorted(path.name for path in folders[0].glob("checkpoints/*")) == names
    assert sorted(path.name for path in folders[1].glob("checkpoints/*")) == [*names, "latest.pt", "previous.pt"]


@pytest.mark.parametrize("far, near", [(9, 3), (5, 4)])
def test_seeds_without_a_common_iteration_are_refused(made, capsys, far, near):
    """Those that stand far apart, and those that have none in common; nothing of either is touched."""
    folders = [made(near, seed=1), made(far, seed=2)]
    if far == 5:
        for path in folders[0].glob("checkpoints/*.pt"):
            if path.name != "latest.pt":
                path.unlink()
        (folders[1] / "checkpoints" / "32.pt").unlink()
        (folders[1] / "checkpoints" / "previous.pt").unlink()
    before = sorted(Path("runs").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        find_checkpoints([LongArgs(seed=i + 1, resume=str(folder)) for i, folder in enumerate(folders)], "x.py")
    assert stop.value.code == 2
    assert f"{folders[1]}: stands too far ahead of {folders[0]}" in capsys.readouterr().err
    assert sorted(Path("runs").rglob("*")) == before


def test_other_code_and_libraries_are_named(made, monkeypatch, capsys):
    folder = made(1)
    resumed(folder)
    assert "not what it was saved with" not in capsys.readouterr().out
    monkeypatch.setattr(housekeeping, "library_versions", lambda: {**library_versions(), "torch": "0.0"})
    monkeypatch.setattr(housekeeping, "git_revision", lambda: "abc")
    resumed(folder)
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("not what it was saved with"))
    assert f"torch 0.0 (was {library_versions()['torch']})" in line and "code abc (was" in line and "numpy" not in line


def test_a_checkpoint_that_fails_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Run(Args())
    run.save_checkpoint(1, {"x": 1})
    checkpoints = run.folder / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.write_text("in the way")
    assert not run.save_checkpoint(2, {"x": 2}) and not run.save_checkpoint(3, {"x": 3})
    assert capsys.readouterr().out.count("so there is no checkpoint of step 2") == 1
    checkpoints.unlink()
    assert run.save_checkpoint(4, {"x": 4}) and run.close(143) == 143
    assert "could not be written" not in capsys.readouterr().out


def test_a_last_checkpoint_that_fails_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Run(Args())
    shutil.rmtree(run.folder / "checkpoints")
    (run.folder / "checkpoints").write_text("in the way")
    run.save_checkpoint(2, {"x": 2})
    assert run.close(0) == 1 and "the last checkpoint could not be written" in capsys.readouterr().out


def test_a_folder_that_is_made_anew_is_locked_again(run):
    fcntl = pytest.importorskip("fcntl")
    shutil.rmtree(run.folder)
    run.log({"x": 1}, 1)
    descriptor = os.open(run.folder, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_logs_that_waited_are_written_before_a_checkpoint(run, monkeypatch, capsys):
    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    size = run.events.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        run.log({"x": 1}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "a kill would lose them" in capsys.readouterr().out
    assert "x" not in scalars_of(run.folder)
    run.save_checkpoint(1, {"x": 1})
    assert scalars_of(run.folder)["x"] == [(1, 1)]


def events_of(folder, steps):
    folder.mkdir()
    events = EventFile(folder)
    ends = [events.path.stat().st_size]
    for step in steps:
        events.add_scalars({"x": step}, step)
        ends.append(events.path.stat().st_size)
    events.close()
    return events.path, ends


@pytest.mark.parametrize("at, lost", [(14, {3}), (-2, {3}), (3, {3, 4, 5}), (9, {3, 4, 5})])
def test_a_flipped_bit_in_the_logs_costs_what_it_must(tmp_path, capsys, at, lost):
    """In a record's content or the content's checksum, that record; in its length or the length's, all after it."""
    path, ends = events_of(tmp_path / "run", range(1, 6))
    content = bytearray(path.read_bytes())
    content[ends[3] + at if at < 0 else ends[2] + at] ^= 4
    path.write_bytes(content)
    drop_events(path.parent, 4)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"byte {ends[2]}" in said and "is damaged" in said
    assert [step for step, _ in scalars_of(path.parent)["x"]] == sorted({1, 2, 3, 4} - lost)
    assert path.with_name(path.name.replace("tfevents", "damaged")).read_bytes() == content


def test_event_files_are_in_order_though_the_clock_was_set_back(tmp_path, monkeypatch):
    paths = [EventFile(tmp_path).path]
    for now in (10**9, 10**9 + 1):
        monkeypatch.setattr("time.time", lambda now=now: now)
        paths.append(EventFile(tmp_path).path)
    assert paths == sorted(paths)


@pytest.mark.parametrize("name", ["", "a/b", "../up", "two\nlines", "a b"])
def test_names_that_are_no_folder_are_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        Run(Args(exp_name=name))
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
        run = Run(Args())
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


def test_a_console_with_few_characters_gets_their_escapes(tmp_path):
    """Of a choice made for the stream, as PYTHONIOENCODING=ascii:replace, nothing is taken back."""
    code = "import dataclasses; from common.run import parse_args\n"
    code += "print(parse_args(dataclasses.make_dataclass('A', [('name', str, '')])).name)"
    for encoding, shown in (("ascii", "caf\\xe9 \\u2013"), ("latin-1", "caf\xe9 \\u2013"), ("ascii:replace", "caf? ?")):
        done = subprocess.run(
            [sys.executable, "-c", code, "--name", "café –"],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert (done.returncode, done.stderr, done.stdout.decode("latin-1").rstrip()) == (0, b"", shown)
