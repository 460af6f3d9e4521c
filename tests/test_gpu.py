"""benchmark.gpu on a CPU: what it measures there is real, and what fails or finds no time is a row of its own."""

import json
import subprocess
import sys
from types import SimpleNamespace

import forked
import pytest
import torch
from test_scripts import ROOT

from benchmark import gpu

CPU = torch.device("cpu")
MUJOCO = ["--num-steps", "32", "--minibatch-size", "32", "--update-epochs", "1", "--obs-norm-steps", "20"]


@pytest.fixture
def report(tmp_path):
    return gpu.Report(SimpleNamespace(output=tmp_path, seconds=200, iterations=4), CPU)


@pytest.mark.slow
def test_speeds_of_processes_and_seeds_add_up(report):
    report.add("speed", "one", lambda: gpu.train(report, "ppo_mujoco", MUJOCO))
    report.add("speed", "several", lambda: gpu.train(report, "ppo_mujoco", [*MUJOCO, "--seeds", "1", "2"], 2))
    report.add("speed", "failing", lambda: gpu.train(report, "ppo_mujoco", ["--nonsense"]))
    one, several, failing = report.rows["speed"]
    assert one["steps/s"] > 0 and several["steps/s"] > 0 and one["update, s"] > 0
    assert "failed" in failing["result"]
    assert json.loads((report.args.output / "gpu.json").read_text())["parts"]["speed"][0] == one
    table = (report.args.output / "gpu.md").read_text()
    assert "none of these numbers is of a GPU" in table and table.count("\n| ") == 4


def test_without_time_nothing_is_started(report):
    report.end = 0
    report.add("speed", "late", lambda: gpu.train(report, "ppo_mujoco", MUJOCO))
    assert report.rows["speed"] == [{"what": "late", "result": "no time for it (0 s left)"}]


def test_the_cpu_agrees_with_itself_and_bfloat16_nearly():
    same, rounded = gpu.agreement(CPU)
    assert same["loss"] == same["gradient"] == same["worst diagnostic"] == 0
    assert 0 < rounded["loss"] < 0.01 and 1e-3 < rounded["gradient"] < 0.2


@pytest.mark.parametrize("flags", [["-n", "1"], ["-p", "no:xdist"]], ids=["with_xdist", "without_xdist"])
def test_verdicts_are_read_from_what_pytest_prints(flags, tmp_path):
    (tmp_path / "tests").mkdir()
    lines = ["import pytest", "def test_good(): pass", "def test_bad(): assert False"]
    lines += ["@pytest.mark.skip(reason='says FAILED')", "@pytest.mark.parametrize('x', ['a b'])"]
    lines += ["def test_not(x): pass"]
    (tmp_path / "tests/test_some.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *flags, "tests"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100).stdout
    verdicts = {name.removeprefix("tests/test_some.py::"): kind for kind, name in gpu.verdicts_in(said)}
    assert verdicts == {"test_good": "PASSED", "test_bad": "FAILED", "test_not[a b]": "SKIPPED"}


def test_halves_of_the_environments_take_all_steps():
    """Each pool steps as often as it is given actions, and what it was given is what it is asked to do."""
    log = []

    class Pool:
        all_env_ids = (0, 1)

        def __init__(self, name):
            self.name, self.sent = name, 0

        def reset(self):
            log.append(f"reset {self.name}")

        def send(self, actions):
            assert self.sent == 0 and len(actions) == 2
            self.sent = 1
            log.append(f"send {self.name}")

        def recv(self):
            assert self.sent == 1
            self.sent = 0
            log.append(f"recv {self.name}")

    assert gpu.in_turn([Pool("a"), Pool("b")], lambda count: [0] * count, 2) > 0
    steps = ["send b", "send a", "recv b", "send b", "recv a", "send a", "recv b", "send b", "recv a", "recv b"]
    assert log == ["reset a", "reset b", *steps]
    log.clear()
    gpu.in_turn([Pool("a")], lambda count: [0] * count, 2)
    assert log == ["reset a", "send a", "recv a", "send a", "recv a"]


def test_the_pieces_of_an_iteration_are_measured(report):
    flags = ["--num-envs", "2", "--num-steps", "4", "--minibatch-size", "4"]
    report.add("pieces", "real", lambda: gpu.pieces(CPU, flags))
    (row,) = report.rows["pieces"]
    names = ("environments", "acting", "copies", "together", "in two halves")
    assert all(row[f"{name}, s"] > 0 for name in names)
    assert row["environments, s"] < 2 * row["together, s"]


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path):
    """It measures what there is time for, names the rest, and marks all of it as of a CPU."""
    parts = ["--parts", "agreement", "speed", "sharing", "--iterations", "4", "--seconds", "90"]
    flags = ["--num-envs", "2", "--num-steps", "8", "--minibatch-size", "8", "--update-epochs", "1"]
    command = [sys.executable, "-m", "benchmark.gpu", "--device", "cpu", "--output", str(tmp_path), *parts]
    done = subprocess.run([*command, "--", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {*found["parts"]} == {"agreement", "pieces of an iteration", "speed", "sharing", "projection"}
    assert found["parts"]["speed"][0]["steps/s"] > 0 and found["about"]["commit"]
    rows = [row for rows in found["parts"].values() for row in rows]
    assert not any("failed" in str(row.get("result")) for row in rows), rows
    assert "none of these numbers is of a GPU" in (tmp_path / "gpu.md").read_text()


def test_a_full_run_is_projected_from_the_best_speed(report):
    report.rows["speed"] = [{"what": "ppo_pfo_atari, eager", "steps/s": x} for x in (1000.0, 2000.0)]
    (row,) = gpu.projection(report, [])
    assert row["hours"] == pytest.approx(100e6 / 6000 / 3600)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--seconds", "1"], "--seconds 1.0: must be at least 10"),
        (["--device", "tpu"], "--device tpu: must be"),
        (["--parts", "nothing"], "--parts"),
        (["--", "--minibatch-size", "100"], "--minibatch-size 100: must divide"),
    ],
)
def test_wrong_flags_are_refused(flags, said, tmp_path):
    done = forked.program("benchmark.gpu", "--output", tmp_path / "out", *flags, code=2)
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
