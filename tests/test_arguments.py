"""Every flag of every script, with values that it must refuse; a new flag has to be added to the table."""

import dataclasses
import importlib
import os
import subprocess
import sys

import pytest
from forked import ROOT, SCRIPTS, slow

from common.arguments import pick_device

COUNT = ["0", "-1", "1.5", "x", "1" + "0" * 400]
SIZE = ["-1", "1.5", "x", "1" + "0" * 400]
POSITIVE = ["0", "-1", "nan", "inf", "x"]
COEFFICIENT = ["-1", "nan", "inf", "x"]
SHARE = ["-0.1", "1.1", "nan", "x"]
SWITCH = ["yes", "1", "True"]  # a switch takes no value
NAMES = ["", "a/b", "../up", "two words", "line\nbreak", "x" * 200]
LAYERS = ["", "first", "Last", "1"]

WRONG = {
    "exp_name": NAMES,
    "seed": ["-1", "1.5", "x", "2147483648"],
    "device": ["tpu", "cuda:99", "cuda:007", "cuda:-1", "CPU", ""],
    "torch_deterministic": SWITCH,
    "compile": SWITCH,
    "cuda_graphs": SWITCH,
    "precision": ["", "bf16", "float16", "Float32"],
    "track": SWITCH,
    "wandb_project_name": ["", "a/b", "what?", "x" * 200],
    "wandb_entity": ["", "a/b", "two words"],
    "wandb_mode": ["", "Offline", "disabled"],
    "diagnostics_interval": SIZE,
    "stop_on": ["", "collapsed", "Collapse"],
    "eval_episodes": [*SIZE, "1025"],
    "eval_interval": SHARE,
    "capture_video": SWITCH,
    "checkpoint_interval": ["0", *SHARE],
    "resume": ["nowhere", "file", "empty", "automatic"],
    "env_id": ["Nothing-v5", "", "Pong-ram-v0", "../Phoenix-v5", "x" * 1000],
    "frame_skip": COUNT,
    "repeat_action_probability": SHARE,
    "noop_max": [*SIZE, "1001"],
    "fire_reset": SWITCH,
    "episodic_life": SWITCH,
    "total_timesteps": [*COUNT, "1"],
    "learning_rate": POSITIVE,
    "anneal_lr": SWITCH,
    "cosine_lr": SWITCH,
    "num_envs": [*COUNT, "1025"],
    "num_steps": [*COUNT, "100001"],
    "minibatch_size": [*COUNT, "100", "2000000"],
    "update_epochs": COUNT,
    "gamma": SHARE,
    "gae_lambda": SHARE,
    "norm_adv": SWITCH,
    "clip_coef": POSITIVE,
    "clip_objective": SWITCH,
    "clip_vloss": SWITCH,
    "ent_coef": COEFFICIENT,
    "vf_coef": COEFFICIENT,
    "max_grad_norm": POSITIVE,
    "adam_eps": POSITIVE,
    "activation": ["", "relu", "Swish"],
    "layer_init": ["", "zeros", "Orthogonal"],
    **dict.fromkeys(("pfo_coef", "critic_pfo_coef"), COEFFICIENT),
    "pfo_layers": LAYERS,
    "pfo_on": ["", "activations", "all"],
    "pfo_distance": ["", "l1", "L2"],
    "pfo_mode": ["", "regularise", "off"],
    "pfo_limit": POSITIVE,
    "reset_optimizer": SWITCH,
    "adam_beta1": ["-0.1", "1", "nan", "x"],
    "adam_beta2": ["-0.1", "1", "nan", "x"],
    "kl_coef": COEFFICIENT,
    "kl_target": POSITIVE,
    "target_kl": COEFFICIENT,
    # MuJoCo
    "seeds": ["-1", "x", "1 1", "2147483648", "1.5"],
    "record": SWITCH,
    "torch_threads": [*SIZE, "1025"],
    "obs_norm_steps": ["1", *COUNT],
    "hidden_sizes": ["0", "-1", "64 x", "64 0", "1.5", "100001"],
    "share_features": SWITCH,
}
# Of the scripts that train nothing: flags that the table above lacks, or that mean something else there
OTHERS = {
    "plasticity_probe": {
        "runs": ["nowhere", "file", "empty"],
        "checkpoints": ["-1", "1.5", "newest", ""],
        "networks": ["", "both", "Actor"],
        "data": ["", "all", "First"],
        "targets": ["", "zeros", "Random"],
        "target_seed": WRONG["seed"],
        "num_envs": [*SIZE, "1025"],
        "max_samples": SIZE,
        "epochs": SIZE,
        "curvature": SWITCH,
        "name": [*NAMES[:5], "checkpoints", ".hidden"],
    },
    "toy_problem": {
        "alpha": ["nan", "inf", "x", "1000001.0"],
        "lr": POSITIVE,
        "steps": [*COUNT, "1001"],
        "features": [*COUNT, "257"],
        "copied": [*SIZE, "2"],
        "optimizer": ["", "Adam", "rmsprop"],
        "sweep": SWITCH,
        "output": ["x.jpg", "nowhere/x.png", "file/x.png", "noending"],
    },
}
LISTS = ("seeds", "hidden_sizes", "alpha")


def flags(name):
    return [field.name for field in dataclasses.fields(importlib.import_module(name).Args) if field.init]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The flags of all Atari scripts are among ppo_pfo_atari's.
@pytest.mark.parametrize("name", slow([*SCRIPTS, *OTHERS], "ppo_atari", "ppo_atari_2models"))
def test_every_flag_refuses_what_it_must(name, folder, monkeypatch, capsys):
    script, tried, table = importlib.import_module(name), 0, WRONG | OTHERS.get(name, {})
    for flag in flags(name):
        assert len(table[flag]) >= 3, flag
        for value in table[flag]:
            option = f"--{flag.replace('_', '-')}"
            values = [option, *(value.split(" ") if flag in LISTS else [value])]
            if name == "plasticity_probe":
                values, option = ([value], value) if flag == "runs" else (["run", *values], option)
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *values])
            with pytest.raises(SystemExit) as stop:
                args = script.parse_args(script.Args)
                script.check_args(args)
                if hasattr(args, "device"):
                    pick_device(args.device)
                if flag == "runs":
                    raise SystemExit(script.probe_runs(args, pick_device("cpu")))
                pytest.fail(f"{name}.py {option} {value!r} was taken")
            printed = capsys.readouterr()
            assert stop.value.code == 2, (option, value, printed)
            assert printed.out == "" and printed.err.startswith("error: "), (option, value, printed)
            assert printed.err.count("\n") == 1 and len(printed.err) < 2000, (option, value, printed)
            if value and table[flag] is not SWITCH:
                assert option in printed.err, (option, value, printed)
            assert all(part in printed.err for part in value[:50].split()), (option, value, printed)
            tried += 1
    assert tried > (30 if name in OTHERS else 150)
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "file"]


def test_the_table_has_no_flag_that_is_gone():
    assert set(WRONG) == {flag for name in SCRIPTS for flag in flags(name)}
    assert all(set(table) <= set(flags(name)) for name, table in OTHERS.items())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_takes_its_default(name, monkeypatch):
    """The table is not refused for another reason: a flag with its default value passes."""
    script = importlib.import_module(name)
    defaults = script.Args()
    for flag in flags(name):
        value, option = getattr(defaults, flag), f"--{flag.replace('_', '-')}"
        if isinstance(value, bool):
            given = [option if value else option.replace("--", "--no-", 1)]
        elif value in (None, "", ()):
            continue
        else:
            given = [option, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        args = script.parse_args(script.Args)
        script.check_args(args)
        assert getattr(args, flag) == value


def test_a_seed_beside_seeds_is_refused(folder, monkeypatch, capsys):
    script = importlib.import_module("ppo_mujoco")
    monkeypatch.setattr(sys, "argv", ["ppo_mujoco.py", "--seed", "8", "--seeds", "7", "3"])
    with pytest.raises(SystemExit) as stop:
        script.check_args(script.parse_args(script.Args))
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2 and said == "error: --seed 8: must not go with --seeds; they are all the seeds there are\n"
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_python_that_leaves_the_scripts_folder_out(name, tmp_path):
    """As ``python -P`` and PYTHONSAFEPATH do."""
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
