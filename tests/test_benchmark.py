"""The benchmark programs run; what they measure is not judged here."""

import os
import re
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from test_figures import DIAGNOSED, RETURN, write_run

from benchmark.throughput import PRODUCT
from common.arguments import _cpu_has_bfloat16

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--num-envs", "2", "--num-steps", "16", "--minibatch-size", "16"]
CORE = str(min(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "0"  # one that this process may use


def program(name, *flags, code=0, folder=ROOT):
    done = forked.program(f"benchmark.{name}", *flags, folder=folder, code=code)
    return done.stderr if code else done.stdout


@pytest.mark.parametrize("env_id", ["Breakout-v5", "Hopper-v5"])
def test_random_policy(env_id):
    out = program("random_policy", "--env-id", env_id, "--episodes", "3")
    assert out.startswith(f"{env_id}: random actions return ") and out.endswith("3 episodes\n")


@pytest.mark.parametrize(
    "script, mflop", [("ppo_pfo_atari.py", 434), pytest.param("ppo_atari.py", 217, marks=pytest.mark.slow)]
)
def test_throughput(script, mflop):
    """An agent step costs what the layers' shapes say: forward once, then forward and backward in each epoch."""
    out = program("throughput", script, "--rounds", "1", "--iterations", "2", "--cores", CORE, "--", *TINY)
    assert f"{mflop} MFLOP an agent step" in out and "median, 1 cores" in out and "% of the limit" in out


@pytest.mark.skipif(not _cpu_has_bfloat16(), reason="a product in bfloat16 would take this processor minutes")
@pytest.mark.slow
def test_throughput_in_two_precisions(monkeypatch):
    """Each has its own product; the ratios are those of the printed speeds, and one round is its own median."""
    monkeypatch.setattr(sys, "argv", ["-c", "bfloat16"])
    exec(PRODUCT, product := {})
    assert product["a"].dtype == product["b"].dtype == torch.bfloat16
    flags = ["--rounds", "1", "--iterations", "2", "--cores", CORE, "--no-stable-baselines3"]
    out = program("throughput", "ppo_atari.py", *flags, "--precisions", "float32", "bfloat16", "--", *TINY)
    lines = out.splitlines()
    named = [", float32", ", bfloat16", ""]
    starts = [f"round 1{name}: " for name in named] + ["median, 1 cores, float32: ", "median, 1 cores, bfloat16: "]
    assert all(line.startswith(start) for line, start in zip(lines, [*starts, "median: "], strict=True)), out
    one, other = (float(re.search(r": (\d+) steps/s", line)[1]) for line in lines[:2])
    ratio = re.search(r"bfloat16 is (\S+) times as fast as float32", lines[2])[1]
    assert float(ratio) == pytest.approx(other / one, rel=0.02, abs=0.01) and ratio in lines[-1]
    for line in lines[3:5]:
        speed, rate, mflop, share = map(int, re.findall(r"(\d+)(?: steps/s| GFLOP/s| MFLOP|% of the limit)", line))
        assert mflop == 217 and share == pytest.approx(100 * speed * 0.217 / rate, rel=0.1, abs=1)


def test_precisions_of_a_script_without_them_are_refused():
    flags = ["--precisions", "float32", "bfloat16"]
    said = program("throughput", "ppo_mujoco.py", "--cores", CORE, *flags, code=2)
    assert said == "error: --precisions float32 bfloat16: must be left out, since ppo_mujoco.py has no --precision\n"
    said = program("throughput", "ppo_atari.py", "--cores", CORE, "--precisions", "float32", "float32", code=2)
    assert said == "error: --precisions float32 float32: must name each precision once\n"


@pytest.mark.slow
def test_throughput_of_many_seeds():
    flags = ["--seeds", "1", "2", "--num-steps", "32", "--minibatch-size", "16", "--obs-norm-steps", "20"]
    flags = ["--rounds", "1", "--iterations", "3", "--cores", CORE, "--", *flags]
    out = program("throughput", "ppo_mujoco.py", *flags)
    assert "median, 1 cores" in out and "limit" not in out and "Stable-Baselines3" in out


def test_curves(tmp_path):
    flags = [*TINY, "--total-timesteps", "192"]
    forked.program(ROOT / "ppo_pfo_atari.py", *flags, folder=tmp_path)
    (run,) = tmp_path.glob("runs/*")
    program("curves", str(run), "--output", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One with runs/RUN, probed; file, which is one; and full.png, a folder."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "runs").mkdir()
    curves = {DIAGNOSED: {100: 1.0, 10_000: 2.0}, RETURN: {100: 1.0}, "charts/episodic_return": {100: 1.0, 200: 3.0}}
    run = write_run(folder / "runs", curves, seed=7).rename(folder / "runs" / "RUN")
    (run / "plasticity").mkdir()
    table = "global_step,network,final_loss\n0,actor,0.0\n0,critic,0.0\n"
    (run / "plasticity" / "plasticity.csv").write_text(table)
    (folder / "file").write_text("")
    (folder / "full.png").mkdir()
    return folder


@pytest.mark.parametrize("name", ["curves", "plasticity"])
def test_runs_by_any_name_are_drawn(name, folder, tmp_path):
    for run, path in (("renamed", "../renamed"), ("re__named", "."), ("Hopper-v4__ppo_mujoco__7__1", ".")):
        shutil.copytree(folder / "runs" / "RUN", tmp_path / run)
        out = program(name, path, "--output", tmp_path / f"{run}.PNG", folder=tmp_path / run)
        assert name == "plasticity" or out.startswith(f"{run}: last 2 episodes"), out
        assert (tmp_path / f"{run}.PNG").read_bytes().startswith(b"\x89PNG")


OUTPUTS = {
    **dict.fromkeys(("curves", "plasticity"), ("x.nope", "x", "nowhere/x.png", "file/x.png", "full.png")),
    **dict.fromkeys(("claims", "table", "logs", "figures", "statistics", "learning_check"), ("file", "file/x")),
    "soak": ("nowhere/x.md", "full.png"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cant_be_written_costs_a_line_before_any_work(name, folder):
    """Before the runs are looked at: here there are none."""
    flags = {"curves": ["nothing"], "plasticity": ["nothing"], "figures": ["--figure", "1", "--runs", "nothing"]}
    flags |= {key: ["--runs", "nothing"] for key in ("claims", "table", "logs", "statistics")}
    before = sorted(folder.rglob("*"))
    for output in OUTPUTS[name]:
        said = program(name, *flags.get(name, []), "--output", output, code=2, folder=folder)
        assert said.startswith(f"error: --output {output}: ") and said.count("\n") == 1, said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["claims", "table", "figures", "statistics"])
def test_a_file_in_the_way_costs_a_line(name, folder, tmp_path):
    file = {"figures": "figure1_runs.csv", "statistics": "survival.md"}.get(name, f"{name}.md")
    (tmp_path / file).mkdir()
    flags = ["--figure", "1"] if name == "figures" else ["--resamples", "100"]
    said = program(name, "--runs", folder / "runs", "--output", tmp_path, *flags, code=2)
    assert f"error: --output {tmp_path}: {file} can't be written in it (Is a directory)\n" in said
    assert said.count("\n") == 1, said


def test_curves_of_no_run_cost_a_line_before_any_work(folder):
    said = program("curves", "runs/RUN", "file", "--output", "x.png", code=2, folder=folder)
    assert said.startswith("error: file: must be a run's folder") and said.count("\n") == 1, said
