"""What only looks at an agent neither ends a run nor costs a checkpoint."""

import subprocess
import sys

import forked
import pytest
import torch
from forked import ROOT
from test_scripts import scalars_of

ATARI = "--num-envs 2 --num-steps 8 --minibatch-size 16 --update-epochs 1 --total-timesteps 960 --frame-skip 30"
ATARI += " --env-id Boxing-v5"  # games of 240 such steps
MUJOCO = "--num-steps 32 --minibatch-size 32 --update-epochs 1 --obs-norm-steps 20 --total-timesteps 128"
EVALUATE = "--eval-episodes 1 --eval-interval 0.5 --capture-video"


@pytest.mark.parametrize("name, flags", [("ppo_atari", ATARI), ("ppo_mujoco", f"{MUJOCO} --seeds 1 2")])
def test_an_encoder_that_fails_costs_the_videos_alone(name, flags, tmp_path):
    # An encoder that is there and does not work
    done = forked.finished(name, tmp_path, f"{flags} {EVALUATE}".split(), IMAGEIO_FFMPEG_EXE="/bin/false")
    assert done.returncode == 0, done.stderr
    if "can't render here" in done.stdout:
        pytest.skip("MuJoCo can't render here")
    for run in tmp_path.glob("runs/*"):
        latest = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
        scalars = scalars_of(run)
        for kind in ("sampled", "greedy"):
            lines = [line for line in done.stdout.splitlines() if f"{run.name}/videos" in line and kind in line]
            assert len(lines) == 2 and all(line.endswith("it is left out") for line in lines)
            assert len(scalars[f"eval/{kind}/episodic_return"]) == 2
        assert latest["iteration"] == 2


def test_an_evaluation_that_fails_costs_its_numbers_alone(tmp_path):
    source = (ROOT / "ppo_atari.py").read_text()
    broken = source.replace("    logits = agent.policy(x).output\n", "    logits = agent.policy(x).output / (1 // 0)\n")
    (tmp_path / "ablation.py").write_text(broken)
    assert broken != source
    flags = f"{ATARI} --eval-episodes 1".split()
    done = forked.finished("ppo_atari", tmp_path, flags, path=tmp_path / "ablation.py")
    assert done.returncode == 0, done.stderr
    assert (
        "evaluation, greedy: failed (ZeroDivisionError: integer division or modulo by zero); it is left out"
        in done.stdout
    )
    (run,) = tmp_path.glob("runs/*")
    assert torch.load(run / "checkpoints" / "latest.pt", weights_only=True)["iteration"] == 2
    assert not any(tag.startswith("eval/") for tag in scalars_of(run))


@pytest.mark.parametrize("name", forked.slow(forked.SCRIPTS, "ppo_atari", "ppo_atari_2models"))
def test_scripts_find_common_in_python_s_safe_mode(name, tmp_path):
    """As ``python -P`` and PYTHONSAFEPATH, which leave the script's folder out of where modules are looked for."""
    command = [sys.executable, "-P", str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--env-id" in done.stdout


def test_observations_that_are_a_dict_are_refused(tmp_path):
    """In a copy whose tasks are dm_control's."""
    source = (ROOT / "ppo_mujoco.py").read_text()
    (tasks,) = (line for line in source.splitlines(keepends=True) if line.startswith("    tasks = "))
    (tmp_path / "ablation.py").write_text(source.replace(tasks, '    tasks = ["CheetahRun-v1"]\n'))
    flags = f"{MUJOCO} --env-id CheetahRun-v1".split()
    done = forked.finished("ppo_mujoco", tmp_path, flags, path=tmp_path / "ablation.py")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: --env-id CheetahRun-v1: its observations must be vectors")
    assert not (tmp_path / "runs").exists()
