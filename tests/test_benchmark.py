"""The benchmark programs run; what they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--num-envs", "2", "--num-steps", "16", "--minibatch-size", "16"]


def program(name, *flags):
    command = [sys.executable, "-m", f"benchmark.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("env_id", ["Breakout-v5", "Hopper-v5"])
def test_random_policy(env_id):
    out = program("random_policy", "--env-id", env_id, "--episodes", "3")
    assert out.startswith(f"{env_id}: random actions return ") and out.endswith("3 episodes\n")


@pytest.mark.parametrize("script, mflop", [("ppo_pfo_atari.py", 434), ("ppo_atari.py", 217)])
def test_throughput(script, mflop):
    """An agent step costs what the layers' shapes say: forward once, then forward and backward in each epoch."""
    out = program("throughput", script, "--rounds", "1", "--iterations", "2", "--cores", "0", "--", *TINY)
    assert f"{mflop} MFLOP an agent step" in out and "median, 1 cores" in out and "% of the limit" in out


def test_throughput_of_many_seeds():
    flags = ["--seeds", "1", "2", "--num-steps", "32", "--minibatch-size", "16", "--obs-norm-steps", "20"]
    flags = ["--rounds", "1", "--iterations", "3", "--cores", "0", "--", *flags]
    out = program("throughput", "ppo_mujoco_multiseed.py", *flags)
    assert "median, 1 cores" in out and "limit" not in out and "Stable-Baselines3" in out


def test_curves(tmp_path):
    flags = [*TINY, "--total-timesteps", "192"]
    subprocess.run([sys.executable, str(ROOT / "ppo_pfo_atari.py"), *flags], cwd=tmp_path, check=True)
    (run,) = tmp_path.glob("runs/*")
    program("curves", str(run), "--output", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
