"""The scripts run for real: their logs, checkpoints, videos and refusals."""

import dataclasses
import importlib.metadata
import math
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.arguments import pick_device

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["ppo_atari", "ppo_atari_2models", "ppo_pfo_atari"]
# Five iterations of 2 x 32 transitions at frame skip 3
TINY = ["--num-envs", "2", "--num-steps", "32", "--minibatch-size", "32", "--update-epochs", "2"]
TINY += ["--total-timesteps", "1000", "--seed", "7"]

EVALUATED = [
    *TINY[:-4],
    "--total-timesteps",
    "10000",
    "--seed",
    "7",
    "--frame-skip",
    "30",
]  # games of 3 600 steps at most

RANKS = ["effective_rank", "pca_rank", "srank", "feature_rank", "matrix_rank", "stable_rank"]
SIGMAS = ["sigma_max", "sigma_2", "sigma_min"]
NORMS = ["feature_norm", "preactivation_norm", "all_preactivation_norm"]
LOSSES = ["policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"]
PFO_LOSSES = ["pfo_actor", "pfo_critic", "pfo_out_of_trust"]
STATISTICS = ["mean", "std", "min", "max"]
NETWORKS = ["actor", "critic"]

EVERY_ITERATION = (
    [f"losses/{part}{name}" for part in ("", "first_minibatch/", "last_minibatch/") for name in LOSSES + PFO_LOSSES]
    + ["losses/explained_variance", "losses/kl_coef", "losses/early_stop"]
    + ["charts/learning_rate", "charts/SPS", "charts/FPS"]
)
DIAGNOSTICS = (
    [
        f"representation/{when}/{network}/{name}"
        for when in ("before", "after")
        for network in NETWORKS
        for name in [
            *RANKS,
            *NORMS,
            *SIGMAS,
            "dead_units",
            "dead_fraction",
            "dormant_fraction",
            "feature_mean",
            "feature_std",
        ]
    ]
    + [f"representation/delta/{network}/{name}" for network in NETWORKS for name in [*RANKS, *NORMS, "dead_units"]]
    + [
        f"representation/{when}/{name}"
        for when in ("before", "after")
        for name in ("policy_variance", "value_mean", "value_std", "entropy")
    ]
    + ["representation/delta/policy_variance"]
    + [f"trust_region/ratio_{name}" for name in STATISTICS]
    + [
        f"trust_region/{name}"
        for name in ("fraction_above", "fraction_below", "ratio_deviation", "kl", "kl_k1", "kl_k3")
    ]
    + [
        f"trust_region/{network}_{layer}_{distance}"
        for network in NETWORKS
        for layer in ("feature", "preactivation", "all_preactivation")
        for distance in ("l2", "cosine")
    ]
    + [f"optim/{network}/{name}" for network in NETWORKS for name in ("grad_norm", "update_norm", "weight_norm")]
    + [f"optim/{network}/{name}" for network in NETWORKS for name in ("init_distance", "output_weight_norm")]
    + [f"churn/{end}_step/{name}" for end in ("first", "last") for name in ("policy", "value")]
    + [f"representation/{when}/{network}/activation_balance" for when in ("before", "after") for network in NETWORKS]
    + [f"alarm/{name}" for name in ("ratios", "norm", "units", "rank", "entropy", "return")]
    + ["time/rollout", "time/update", "time/diagnostics"]
)


def diagnostics_of_layers(hidden, *of_activation):
    """The tags of a script with so many hidden layers, whose activation has measures of its own."""
    measures = ["dead_units", "dormant_fraction", "preactivation_norm", *of_activation]
    layers = [(network, k) for network in NETWORKS for k in range(1, hidden + 1)]
    return (
        [f"representation/{w}/{x}/layer{k}/{y}" for w in ("before", "after") for x, k in layers for y in measures]
        + [f"representation/before/{x}/layer{k}/gradient_dormant_fraction" for x, k in layers]
        + [f"optim/{x}/layer{k}/relative_update" for x in NETWORKS for k in range(1, hidden + 2)]
    )


# Absent from an iteration in which no ratio lies there, or no game ended.
SOMETIMES = (
    [f"trust_region/ratio_{side}_{name}" for side in ("above", "below") for name in STATISTICS]
    + ["trust_region/excess_ratio", "charts/episodic_return", "charts/episodic_length"]
    + ["charts/rollout_return", "charts/rollout_length"]
)
EVALUATION = [
    f"eval/{kind}/{name}" for kind in ("sampled", "greedy") for name in ("episodic_return", "episodic_length")
]


def run_script(script, folder, *flags, code=0, **environment):
    """Run a script in an empty folder; its finished process, and its run's folder if there is one."""
    done = forked.finished(script, folder, flags, WANDB_SILENT="true", **environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done, newest_run(folder)


def newest_run(folder):
    runs = sorted((folder / "runs").glob("*")) if (folder / "runs").is_dir() else []
    return runs[-1] if runs else None


def scalars_of(run):
    """Every scalar of a run's event file: {tag: [(step, value)]}."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def load(path):
    return torch.load(path, weights_only=True)


def same(one, other):
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)  # NaN


@pytest.fixture(scope="module", params=forked.slow(SCRIPTS, "ppo_atari_2models"))
def finished(request, tmp_path_factory):
    """A tiny run of each script with evaluation and video: its name, process, folder."""
    evaluation = ["--eval-episodes", "1", "--eval-interval", "0.5", "--capture-video"]
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, str(ROOT / f"{request.param}.py"), *EVALUATED, *evaluation]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, done, newest_run(folder)


def test_every_tag_is_logged(finished):
    script, _, run = finished
    scalars = scalars_of(run)
    steps = [1920 * i for i in range(1, 6)]
    own = ["policy/logit_norm", "churn/policy_greedy", *diagnostics_of_layers(4)]
    expected = {tag: steps for tag in EVERY_ITERATION + DIAGNOSTICS + own} | {tag: [3840, 9600] for tag in EVALUATION}
    if "pfo" not in script:
        expected = {tag: steps for tag, steps in expected.items() if "pfo" not in tag}
    assert {tag: [step for step, _ in scalars[tag]] for tag in expected if tag in scalars} == expected
    assert set(scalars) - set(expected) <= set(SOMETIMES)
    assert [tag for tag, points in scalars.items() if not all(math.isfinite(value) for _, value in points)] == []


def test_the_first_minibatch_starts_where_the_rollout_was(finished):
    """Before the first step of an update phase nothing has moved, but for the rounding of another batch size."""
    _, _, run = finished
    scalars = scalars_of(run)
    for name in ("old_approx_kl", "approx_kl", "clipfrac", "pfo_actor", "pfo_critic"):
        if f"losses/{name}" not in scalars:
            assert name in PFO_LOSSES and finished[0] != "ppo_pfo_atari"
            continue
        assert all(abs(value) < 1e-6 for _, value in scalars[f"losses/first_minibatch/{name}"]), name
        assert any(abs(value) > 1e-9 for _, value in scalars[f"losses/last_minibatch/{name}"]) or name == "clipfrac"


def test_returns_are_logged_once_a_game(tmp_path):
    """Some games of the real thing: one point each, at the frame in which it ended, and their mean at the iteration."""
    flags = ["--total-timesteps", "9600", "--env-id", "ALE/Breakout-v5", "--diagnostics-interval", "50"]
    _, run = run_script("ppo_pfo_atari", tmp_path, *TINY[:-4], *flags, "--frame-skip", "15")
    scalars = scalars_of(run)
    returns, lengths = scalars["charts/episodic_return"], scalars["charts/episodic_length"]
    assert len(returns) >= 2 and [step for step, _ in returns] == [step for step, _ in lengths]
    assert all(step % (2 * 15) == 0 for step, _ in returns)
    for step, mean in scalars["charts/rollout_return"]:
        ended = [value for at, value in returns if step - 960 < at <= step]
        assert mean == pytest.approx(sum(ended) / len(ended))
    assert load(run / "checkpoints" / "9600.pt")["episodes"] == len(returns)


def test_diagnostics_at_their_interval(tmp_path):
    flags = ["--diagnostics-interval", "3", "--activation", "Tanh", "--pfo-layers", "all"]
    done, run = run_script("ppo_pfo_atari", tmp_path, *TINY, *flags)
    scalars = scalars_of(run)
    assert [step for step, _ in scalars["representation/after/actor/pca_rank"]] == [192, 768, 960]
    assert len(scalars["losses/policy_loss"]) == 5
    lines = [line for line in done.stdout.splitlines() if "/960 frames" in line]
    assert len(lines) == 3 and all("a second" in line and "rank" in line and "dead" in line for line in lines)


def test_checkpoints(finished):
    name, _, run = finished
    paths = sorted(run.glob("checkpoints/[0-9]*"), key=lambda path: int(path.stem))
    assert [path.name for path in paths] == [f"{1920 * i}.pt" for i in range(6)]
    assert {path.name for path in run.glob("checkpoints/*")} == {*(p.name for p in paths), "latest.pt", "previous.pt"}
    assert (run / "checkpoints" / "latest.pt").read_bytes() == paths[-1].read_bytes()
    script = importlib.import_module(name)
    for path in paths:
        state = load(path)
        fields = {field.name for field in dataclasses.fields(script.Args) if field.init}
        args = script.Args(**{key: value for key, value in state["args"].items() if key in fields})
        script.check_args(args)
        assert dataclasses.asdict(args) == state["args"]
        assert args.num_envs == 2 and args.seed == 7 and args.env_id == "Phoenix-v5"
        assert state["script"] == f"{name}.py" and state["global_step"] == int(path.stem)
        assert state["versions"]["torch"] == importlib.metadata.version("torch") and state["git_revision"]
        assert state["random_states"]["cpu"].dtype == torch.uint8
        agent = script.Agent(state["num_actions"], args)
        agent.load_state_dict(state["agent"])
    assert sum(len(o["state"]) for o in state["optimizers"]) == len(list(agent.parameters()))
    assert len(state["optimizers"]) == (1 if name == "ppo_atari" else 2)
    assert not same(load(paths[0])["agent"], state["agent"])


def test_videos(finished):
    import imageio.v2 as imageio

    _, _, run = finished
    lengths = {(tag.split("/")[1], step): value for tag, points in scalars_of(run).items() for step, value in points
               if tag.startswith("eval/") and tag.endswith("length")}  # fmt: skip
    videos = sorted(path.name for path in run.glob("videos/*"))
    assert videos == sorted(f"{step}-{kind}.mp4" for kind, step in lengths)
    for (kind, step), length in lengths.items():
        with imageio.get_reader(run / "videos" / f"{step}-{kind}.mp4") as film:
            assert film.get_meta_data()["size"] == (160, 210)
            assert film.count_frames() == length


def test_the_same_seed_gives_the_same_run_evaluated_or_not(finished, tmp_path):
    name, _, evaluated = finished
    _, run = run_script(name, tmp_path, *EVALUATED)
    for path in run.glob("checkpoints/*"):
        one, other = load(path), load(evaluated / "checkpoints" / path.name)
        for key in ("agent", "optimizers", "random_states", "episodes"):
            assert same(one[key], other[key]), key
    one, other = scalars_of(run), scalars_of(evaluated)
    timed = ("time/", "charts/SPS", "charts/FPS")
    for tag in one:
        assert tag.startswith(timed) or one[tag] == other[tag], tag


def test_a_shared_trunk_is_measured_under_both_names(finished):
    name, _, run = finished
    scalars = scalars_of(run)
    for measure in (*RANKS, *NORMS, "dead_units"):
        both = [scalars[f"representation/after/{network}/{measure}"] for network in NETWORKS]
        if name == "ppo_atari":
            assert [step for step, _ in both[0]] == [step for step, _ in both[1]]
            assert [x for _, x in both[0]] == pytest.approx([x for _, x in both[1]])
    norms = [scalars[f"representation/after/{network}/preactivation_norm"] for network in NETWORKS]
    assert (norms[0] == norms[1]) == (name == "ppo_atari")


@pytest.mark.parametrize("name", forked.slow(SCRIPTS, "ppo_atari_2models", "ppo_pfo_atari"))
def test_cleanrls_classic_setting_runs(name, tmp_path):
    """The command of the script's first lines, on a game with a FIRE reset, cut short."""
    flags = "--frame-skip 4 --repeat-action-probability 0 --noop-max 30 --fire-reset --episodic-life "
    flags += "--layer-init orthogonal --anneal-lr --clip-vloss --adam-eps 1e-5 --vf-coef 0.5 --env-id Breakout-v5"
    done, run = run_script(name, tmp_path, *TINY, *flags.split())
    assert "--noop-max" not in done.stdout  # said only of 0, which can't be had
    state = load(run / "checkpoints" / "768.pt")
    assert state["optimizers"][0]["param_groups"][0]["eps"] == 1e-5
    rates = [value for _, value in scalars_of(run)["charts/learning_rate"]]
    assert rates == pytest.approx([2.5e-4, 1.6667e-4, 0.8333e-4], rel=1e-3)


def test_interventions_run(tmp_path):
    flags = ["--kl-coef", "1", "--target-kl", "1e-9", "--no-clip-objective", "--reset-optimizer", "--anneal-lr"]
    flags += ["--adam-beta2", "0.9", "--critic-pfo-coef", "1", "--pfo-layers", "all", "--pfo-mode", "clip"]
    flags += ["--activation", "LeakyReLU", "--layer-init", "orthogonal", "--episodic-life"]
    _, run = run_script("ppo_pfo_atari", tmp_path, *TINY, *flags, "--torch-deterministic")
    scalars = scalars_of(run)
    # Four minibatches make an update phase; it ends after the step of the first one whose KL exceeds the target: never
    # after none, and never after all four, since one step moves the policy by more than that.
    assert {value for _, value in scalars["losses/early_stop"]} <= {0.25, 0.5, 0.75}
    assert [value for _, value in scalars["losses/kl_coef"]] == [1, 0.5, 0.25, 0.125, 0.0625]
    rates = [value for _, value in scalars["charts/learning_rate"]]
    assert rates == pytest.approx([2.5e-4 * (1 - i / 5) for i in range(5)])
    taken = 4 * (1 - scalars["losses/early_stop"][-1][1])
    for state in load(run / "checkpoints" / "960.pt")["optimizers"]:
        assert all(moments["step"] == taken for moments in state["state"].values())  # forgotten before the last phase
        assert state["param_groups"][0]["lr"] == pytest.approx(2.5e-4 / 5)


def test_offline_tracking_writes_a_run(tmp_path):
    _, run = run_script("ppo_pfo_atari", tmp_path, *TINY, "--track", "--wandb-mode", "offline")
    (written,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for tag in ("representation/after/actor/pca_rank", "losses/policy_loss", "global_step", "update_epochs"):
        assert tag.encode() in content, tag


@pytest.mark.slow
def test_unreachable_tracking_does_not_stop_training(tmp_path):
    flags = [*TINY, "--track"]
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    done, run = run_script("ppo_pfo_atari", tmp_path, *flags, **nowhere)
    assert done.stdout.count("tracked offline") == 1
    assert (run / "checkpoints" / "960.pt").is_file()
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))


def refusal(monkeypatch, capsys, name, flags):
    """What a script says of wrong flags, up to the point where it would start its run."""
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        args = script.parse_args(script.Args)
        script.check_args(args)
        pick_device(args.device)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


WRONG = [
    ("--env-id Phenix-v5", "Phoenix-v5"),
    ("--env-id ALE/Qbrt-v5", "Qbert-v5"),
    ("--env-id Hopper-v4", "must be one of envpool's"),
    ("--num-envs 0", "at least 1"),
    ("--num-steps -3", "at least 1"),
    ("--num-steps 1.5", "--num-steps"),
    ("--minibatch-size 0", "at least 1"),
    ("--minibatch-size 100", "must divide num_envs x num_steps = 1024"),
    ("--total-timesteps 3071", "at least one rollout of 3072 frames"),
    ("--update-epochs 0", "at least 1"),
    ("--frame-skip 0", "at least 1"),
    ("--seed -1", "at least 0"),
    ("--seed x", "--seed"),
    ("--learning-rate nan", "above 0"),
    ("--learning-rate 0", "above 0"),
    ("--learning-rate inf", "above 0"),
    ("--gamma 1.1", "at most 1"),
    ("--adam-beta1 1", "below 1"),
    ("--repeat-action-probability -0.1", "at least 0"),
    ("--pfo-coef -1", "at least 0"),
    ("--pfo-layers all --pfo-on features", "do not exist"),
    ("--pfo-distance l1", "--pfo-distance"),
    ("--activation Swish", "--activation"),
    ("--anneal-lr --cosine-lr", "one schedule"),
    ("--eval-interval 0.1", "--eval-episodes"),
    ("--capture-video", "--eval-episodes"),
    ("--eval-interval 2 --eval-episodes 1", "at most 1"),
    ("--diagnostics-interval -1", "at least 0"),
    ("--device tpu", "must be auto, cpu, cuda, cuda:N or mps"),
    ("--device cuda:99", "CUDA devices"),
    ("--device cuda:007", "must be auto"),
    ("--clip-coef 1e300", "at most"),
    ("--num-envs 1" + "0" * 400, "at most"),
    ("--eval-episodes 100000", "at most 1024"),
    ("--num-envs 1 --num-steps 1 --minibatch-size 1", "at least 2 transitions"),
    ("--pfo-coeff 1", "--pfo-coef"),
]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flags, said", WRONG)
def test_bad_input_is_refused(monkeypatch, capsys, name, flags, said):
    if "pfo" in flags and "pfo" not in name:
        pytest.skip("no flag of this script")
    message = refusal(monkeypatch, capsys, name, flags.split())
    assert said in message
    assert flags.split()[0].removesuffix("f") in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that must be absent")
def test_absent_cuda_is_refused(monkeypatch, capsys):
    assert "--device cuda" in refusal(monkeypatch, capsys, "ppo_pfo_atari", ["--device", "cuda"])


def test_refusals_leave_nothing_behind(tmp_path):
    done, run = run_script("ppo_pfo_atari", tmp_path, "--env-id", "Nothing-v5", code=2)
    assert run is None and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: --env-id Nothing-v5") and done.stderr.count("\n") == 1


def test_runs_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    done, _ = run_script("ppo_pfo_atari", tmp_path, *TINY, code=2)
    assert done.stderr.startswith("error: runs") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are POSIX's")
def test_unwritable_runs_folder_is_refused(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    code = f"""
import dataclasses, os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.run import Run
if os.geteuid() == 0:
    os.setuid(65534)  # root writes where it may not
Args = dataclasses.make_dataclass("Args", ["env_id", "exp_name", "seed", "track", "batch_size", "num_iterations"])
Run(Args("E-v5", "x", 1, False, 1, 1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: runs/E-v5__x__1__"), done.stderr
    assert "writable" in done.stderr and done.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done, run = run_script("ppo_pfo_atari", tmp_path, *TINY, "--learning-rate", "1e6", code=1)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "is not finite in iteration" in done.stderr and str(run.relative_to(tmp_path)) in done.stderr
    assert load(run / "checkpoints" / "0.pt")["global_step"] == 0
    last = scalars_of(run)["losses/policy_loss"][-1][0]  # the iteration that failed is logged
    assert f"iteration {last // 192};" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--torch-deterministic"]])
def test_runs_on_cuda(tmp_path, flags):
    _, run = run_script("ppo_pfo_atari", tmp_path, *TINY, "--device", "cuda", *flags)
    assert load(run / "checkpoints" / "960.pt")["global_step"] == 960


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an MPS device")
def test_runs_on_mps(tmp_path):
    _, run = run_script("ppo_pfo_atari", tmp_path, *TINY, "--device", "mps")
    assert load(run / "checkpoints" / "960.pt")["global_step"] == 960


@pytest.mark.slow
def test_compiled_run(tmp_path):
    """The whole script compiled: the losses after some gradient steps are those of the plain run."""
    try:
        importlib.import_module("ppo_pfo_atari").check_args(importlib.import_module("ppo_pfo_atari").Args(compile=True))
    except SystemExit:
        pytest.skip("no C++ compiler here")
    first = []
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        (tmp_path / name).mkdir()
        _, run = run_script("ppo_pfo_atari", tmp_path / name, *TINY[:-4], "--total-timesteps", "384", *flags)
        first.append([scalars_of(run)[f"losses/last_minibatch/{loss}"][0][1] for loss in LOSSES])
    assert first[1] == pytest.approx(first[0], rel=1e-3, abs=1e-4)
