"""Runs that were stopped, killed or robbed of their files go on, and nothing is lost or logged twice."""

import functools
import importlib
import itertools
import os
import random
import shutil
import signal
import struct

import pytest
import torch
from forked import KINDS, MANY_SEEDS, STEPS, run, script_of, send, slow, small, started, wait_for
from tensorboard.compat.proto.event_pb2 import Event
from test_scripts import load, same, scalars_of

from common.checkpoint import BadCheckpoint, load_checkpoint
from common.run import read_checkpoint

TIMED = ("time/", "charts/SPS", "charts/FPS")
MANY = 100_000  # iterations, more than any test waits for


def runs_in(folder):
    return sorted((folder / "runs").iterdir())


def resume(folder):
    return ["--resume", *(str(path.relative_to(folder)) for path in reversed(runs_in(folder)))]  # as in --seeds 7 3


@functools.lru_cache(16)
def iteration_of(path, inode, time):
    """The iteration of the checkpoint at ``path``, read once for each file that was there."""
    return load_checkpoint(path)["iteration"]


def latest(folder):
    """The iteration that a resumed run would go on from, of the run that is furthest behind; -1 if there is none."""
    found = []
    for path in (folder / "runs").glob("*"):
        newest = [-1]
        for name in ("latest.pt", "previous.pt"):
            try:
                stat = (path / "checkpoints" / name).stat()
                newest.append(iteration_of(path / "checkpoints" / name, stat.st_ino, stat.st_mtime_ns))
            except (BadCheckpoint, OSError):  # between two renames
                continue
        found.append(max(newest))
    return min(found, default=-1)


def check_logs(name, folder, iterations):
    """Every run has every iteration's scalars once, in order, up to ``iterations``."""
    for path in runs_in(folder):
        for tag, points in scalars_of(path).items():
            steps = [step for step, _ in points]
            if tag in ("losses/policy_loss", "representation/after/actor/pca_rank", "charts/SPS"):
                assert steps == [STEPS[name] * i for i in range(1, iterations + 1)], tag
            elif "episodic" in tag:  # several episodes may end at one step
                assert steps == sorted(steps)
            else:
                assert steps == sorted(set(steps)), tag
        state = load(path / "checkpoints" / "latest.pt")
        assert state["iteration"] == iterations
        episodes = scalars_of(path).get("charts/episodic_return", [])
        assert len(episodes) == state["episodes"]
        assert not list(path.rglob("*.tmp"))


@pytest.fixture(scope="module", params=slow(KINDS, "ppo_atari_2models"))
def finished(request, tmp_path_factory):
    """A finished run of each script, of five iterations: its name and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    code, said = run(request.param, folder, [*small(request.param, 5), "--anneal-lr", "--kl-coef", "1"])
    assert code == 0, said
    return request.param, folder


@pytest.fixture
def finished_once(finished):
    """As ``finished``; of the Atari scripts, whose blocks are the same to the letter, one alone."""
    if finished[0] in ("ppo_atari_2models", "ppo_pfo_atari"):
        pytest.skip("as ppo_atari")
    return finished


def copied(folder, to):
    shutil.copytree(folder / "runs", to / "runs", copy_function=shutil.copy)
    return to


def test_a_finished_run_is_finished(finished):
    name, folder = finished
    before = {path: path.read_bytes() for path in folder.glob("runs/**/*") if path.is_file()}
    code, said = run(name, folder, resume(folder))
    assert code == 0 and "finished, nothing is left to do" in said and said.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.glob("runs/**/*") if path.is_file()} == before


def test_a_run_grows_twice_alike(finished, tmp_path):
    """A finished run goes on for five more iterations; from the same checkpoint, twice the same bits."""
    name, folder = finished
    total = ["--total-timesteps", str(10 * STEPS[name])]
    grown = []
    for to in (tmp_path / "one", tmp_path / "two"):
        to.mkdir()
        code, said = run(name, copied(folder, to), [*resume(folder), *total])
        assert code == 0 and "environments begin new episodes" in said, said
        assert f"--total-timesteps grew from {5 * STEPS[name]:,} to {10 * STEPS[name]:,}" in said
        assert [path.name for path in runs_in(to)] == [path.name for path in runs_in(folder)]
        check_logs(name, to, 10)
        grown.append(to)
    for old, *both in zip(runs_in(folder), *map(runs_in, grown), strict=True):
        assert {path.name for path in both[0].glob("checkpoints/*")} == {p.name for p in both[1].glob("checkpoints/*")}
        for path in both[0].glob("checkpoints/*"):
            assert same(*(load(one / "checkpoints" / path.name) for one in both))
        scalars, others = map(scalars_of, both)
        assert {tag: x for tag, x in scalars.items() if not tag.startswith(TIMED)} == {
            tag: x for tag, x in others.items() if not tag.startswith(TIMED)
        }
        for tag, points in scalars_of(old).items():  # the curves begin as they were
            assert scalars[tag][: len(points)] == points
        rates = [value for _, value in scalars["charts/learning_rate"]]
        expected = [1 - i / 5 for i in range(5)] + [1 - i / 10 for i in range(5, 10)]
        assert rates == pytest.approx([rates[0] * x for x in expected])
        coefficients = [value for _, value in scalars["losses/kl_coef"]]
        state = load(both[0] / "checkpoints" / "latest.pt")
        factors = {b / a for a, b in itertools.pairwise([*coefficients, state["kl_coef"]])}
        assert factors <= {0.5, 1, 2} and factors != {1}  # no jump back to where it began
        assert state["iteration"] == state["args"]["num_iterations"] == 10
        (steps,) = {x["step"].item() for optimizer in state["optimizers"] for x in optimizer["state"].values()}
        assert steps == 10 * (2 * 2 if "mujoco" in name else 1)
        # The environments got seeds of their own, not those with which they began.
        before = load(old / "checkpoints" / "latest.pt")["random_states"]["numpy"]
        assert state["random_states"]["numpy"] != before


def test_restoring_gives_back_what_was_saved(finished):
    name, folder = finished
    script = importlib.import_module(script_of(name))
    state = read_checkpoint(runs_in(folder)[0] / "checkpoints" / "latest.pt", kl_coef=float)
    args = script.Args()
    torch.manual_seed(0)
    sizes = [state["obs_dim"], state["action_low"].numpy(), state["action_high"].numpy()] if "obs_dim" in state else []
    agent = script.Agent(*(sizes or [state["num_actions"]]), args).to(memory_format=torch.channels_last)
    optimizers = script.make_optimizers(agent, args)
    script.restore(state, agent, optimizers, torch.device("cpu"))
    assert same(dict(agent.state_dict()), dict(state["agent"]))
    for optimizer, saved in zip(optimizers, load(state["path"])["optimizers"], strict=True):
        assert same(optimizer.state_dict()["state"], saved["state"]) and saved["state"]
        assert optimizer.param_groups[0]["lr"] == args.learning_rate  # what args say, not what the file says
    assert torch.equal(torch.get_rng_state(), state["random_states"]["cpu"])


def test_auto_without_an_unfinished_run_starts_one(finished_once, tmp_path):
    name, folder = finished_once
    copied(folder, tmp_path)
    code, said = run(name, tmp_path, [*small(name, 2), "--resume", "auto"])
    assert code == 0 and "no unfinished run of these arguments" in said
    assert len(runs_in(tmp_path)) == 2 * len(runs_in(folder))


@pytest.mark.parametrize("name", slow(KINDS, "ppo_atari_2models", "ppo_pfo_atari"))
def test_a_signal_ends_a_run_in_order(tmp_path, name):
    flags = [*small(name, MANY), "--checkpoint-interval", "1e-5"]
    with started(name, tmp_path, flags) as process:
        wait_for(lambda: latest(tmp_path) >= 2, process)
        assert send(process, signal.SIGTERM) == 143
    iteration = latest(tmp_path)
    check_logs(name, tmp_path, iteration)  # whole, and nothing that is not saved
    said = (tmp_path / "log").read_text()
    assert said.count("SIGTERM: finishing this iteration") == 1 and "Traceback" not in said

    # The same command with auto goes on with it, and lets no other process at it.
    before = runs_in(tmp_path)
    with started(name, tmp_path, [*flags, "--resume", "auto"]) as process:
        wait_for(lambda: latest(tmp_path) >= iteration + 2, process)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "runs").symlink_to(tmp_path / "runs")
        code, said = run(name, tmp_path / "other", [*flags, *resume(tmp_path)])
        assert code == 2 and "still alive" in said and said.count("\n") == 1
        assert send(process, signal.SIGINT) == 130
    assert f"--resume auto: goes on with runs/{before[-1].name}" in (tmp_path / "log").read_text()
    assert runs_in(tmp_path) == before
    check_logs(name, tmp_path, latest(tmp_path))


def test_a_second_signal_ends_at_once(tmp_path):
    with started("ppo_mujoco", tmp_path, [*small("ppo_mujoco", 5), "--update-epochs", "10000"]) as process:
        wait_for(lambda: latest(tmp_path) >= 0, process)
        process.join(0.5)
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: "finishing this iteration" in (tmp_path / "log").read_text(), process)
        assert send(process, signal.SIGTERM) == -signal.SIGTERM


def logged(path):
    """The last step whose losses are in a run's event files, of which the last record may be cut off."""
    last = 0
    for file in path.glob("events*"):
        content, start = file.read_bytes(), 0
        while start + 12 <= len(content):
            end = start + 12 + struct.unpack_from("<Q", content, start)[0]
            if end + 4 <= len(content):
                event = Event.FromString(content[start + 12 : end])
                if any(value.tag == "losses/policy_loss" for value in event.summary.value):
                    last = max(last, event.step)
            start = end + 4
    return last


@pytest.mark.parametrize(
    "name, kills, total",
    [
        ("ppo_mujoco", 5, 100),
        pytest.param(MANY_SEEDS, 8, 160, marks=pytest.mark.slow),
        pytest.param("ppo_pfo_atari", 5, 60, marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_moments_lose_nothing_that_was_saved(tmp_path, name, kills, total):
    """kill -9 at any moment, from the start of the process on; each time the run goes on, and then to its end."""
    chance, reached = random.Random(7), 0
    flags = [*small(name, total), "--checkpoint-interval", str(2 / total)]  # each other iteration
    flags += ["--episodic-life"] if "atari" in name else []
    for kill in range(kills):
        with started(name, tmp_path, [*flags, *(resume(tmp_path) if kill else [])]) as process:
            if kill % 3 == 2:
                process.join(chance.uniform(0, 0.3))  # in the start
            else:
                goal = reached + chance.randint(1, 2)
                wait_for(lambda goal=goal: latest(tmp_path) >= goal, process)
                process.join(chance.uniform(0, 0.04))
            assert process.is_alive()
            process.kill()
            process.join()
        assert latest(tmp_path) >= reached, "work was lost that had been saved"
        reached = latest(tmp_path)
        # The iteration that was cut off comes on top.
        assert all(logged(path) <= (reached + 2) * STEPS[name] for path in runs_in(tmp_path))
    assert kills / 2 < reached < total
    code, said = run(name, tmp_path, [*flags, *resume(tmp_path)])
    assert code == 0, said
    check_logs(name, tmp_path, total)
    assert "Traceback" not in (tmp_path / "log").read_text()


# Kills the process at the nth of the calls that write, rename, sync or delete.
AT_CALL = """
import os, signal
from pathlib import Path
calls = [0]
def deadly(function):
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
Path.unlink, Path.rename = deadly(Path.unlink), deadly(Path.rename)
"""


@pytest.mark.parametrize("name", ["ppo_mujoco", pytest.param(MANY_SEEDS, marks=pytest.mark.slow)])
def test_a_kill_between_any_two_steps_of_a_checkpoint(tmp_path, name):
    """One after the other, at each call with which a checkpoint or a resumed run's cleaning up changes files."""
    flags = [*small(name, MANY), "--checkpoint-interval", "1e-5"]
    with started(name, tmp_path, flags) as process:
        wait_for(lambda: latest(tmp_path) >= 1, process)
        process.kill()
        process.join()
    for at in range(1, 13):
        reached = latest(tmp_path)
        with started(name, tmp_path, [*flags, *resume(tmp_path)], AT_CALL.replace("AT", str(at), 1)) as process:
            process.join(120)
            assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert latest(tmp_path) >= reached
    with started(name, tmp_path, [*flags, *resume(tmp_path)]) as process:
        wait_for(lambda: latest(tmp_path) > reached + 1, process)
        assert send(process, signal.SIGINT) == 130
    check_logs(name, tmp_path, latest(tmp_path))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished_once, tmp_path):
    name, folder = finished_once
    copied(folder, tmp_path)
    total = ["--total-timesteps", str(7 * STEPS[name])]
    for path in runs_in(tmp_path):
        newest = path / "checkpoints" / "latest.pt"
        newest.write_bytes(newest.read_bytes()[:-1000])
        (path / "checkpoints" / "previous.pt").write_bytes(b"\0" * 100)
        (path / "checkpoints" / f"{5 * STEPS[name]}.pt").write_text("")
    code, said = run(name, tmp_path, [*resume(tmp_path), *total])
    assert code == 0 and said.count("latest.pt can't be read") == len(runs_in(tmp_path)), said
    assert f"{4 * STEPS[name]}.pt is used instead" in said
    check_logs(name, tmp_path, 7)
    for path in runs_in(tmp_path):  # kept, under names that nothing reads
        assert len(list(path.glob("checkpoints/*.damaged"))) == 3


def test_arguments_that_contradict_are_refused_by_name(finished_once):
    name, folder = finished_once
    before = {path: path.read_bytes() for path in folder.glob("runs/**/*") if path.is_file()}
    wrong = [["--gamma", "0.5"], ["--total-timesteps", str(4 * STEPS[name])], ["--no-anneal-lr"], ["--exp-name", "x"]]
    wrong += [["--num-envs", "4"], ["--seeds", "1", "2"] if name == MANY_SEEDS else ["--seed", "8"]]
    for flags in wrong:
        code, said = run(name, folder, [*resume(folder), *flags])
        assert code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
        assert (flags[0].replace("no-", "").rstrip("s") in said and "contradicts" in said) or "not shrink" in said, said
    assert {path: path.read_bytes() for path in folder.glob("runs/**/*") if path.is_file()} == before


def test_checkpoints_of_other_revisions(finished_once, tmp_path):
    """What an older one lacks has its default, unless that is contradicted; what a newer one has is named."""
    name, folder = finished_once
    copied(folder, tmp_path)
    for path in tmp_path.glob("runs/*/checkpoints/*.pt"):
        state = load(path)
        args = {name: x for name, x in state["args"].items() if name not in ("layer_init", "eval_interval")}
        torch.save({**state, "args": {**args, "new_coef": 0.5}}, path)
    total, count = ["--total-timesteps", str(6 * STEPS[name])], len(runs_in(tmp_path))
    code, said = run(name, tmp_path, [*resume(tmp_path), *total, "--layer-init", "orthogonal"])
    default = importlib.import_module(script_of(name)).Args.layer_init
    assert code == 2 and "--layer-init orthogonal: contradicts" in said and f"with {default}\n" in said, said
    code, said = run(name, tmp_path, [*resume(tmp_path), *total])
    older = f"from before these flags, and the run goes on with --eval-interval 0.0, --layer-init {default}\n"
    newer = "has flags unknown here, and the run goes on without --new-coef 0.5\n"
    assert code == 0 and said.count(older) == said.count(newer) == count, said
    check_logs(name, tmp_path, 6)
    code, said = run(name, tmp_path, [*resume(tmp_path), "--total-timesteps", str(7 * STEPS[name])])
    assert code == 0 and "these flags" not in said and "flags unknown" not in said, said


def test_a_checkpoint_whose_arguments_are_no_runs_is_refused(finished_once, tmp_path):
    name, folder = finished_once
    copied(folder, tmp_path)
    for path in tmp_path.glob("runs/*/checkpoints/*.pt"):
        torch.save({**load(path), "args": {}}, path)
    code, said = run(name, tmp_path, resume(tmp_path))
    assert code == 2 and "with other flags than these: --" in said and said.count("\n") == 1, said


def test_flags_that_may_differ(finished_once, tmp_path):
    name, folder = finished_once
    flags = ["--diagnostics-interval", "3", "--checkpoint-interval", "0.5", "--eval-episodes", "1"]
    total = ["--total-timesteps", str(8 * STEPS[name])]
    code, said = run(name, copied(folder, tmp_path), [*resume(tmp_path), *total, *flags])
    assert code == 0, said
    for path in runs_in(tmp_path):
        assert "eval/greedy/episodic_return" in scalars_of(path)


def test_a_run_of_several_seeds_and_runs_of_one_are_exchangeable(tmp_path):
    assert run(MANY_SEEDS, tmp_path, small(MANY_SEEDS, 3))[0] == 0
    total = ["--total-timesteps", str(4 * STEPS[MANY_SEEDS])]
    for path in runs_in(tmp_path):
        code, said = run("ppo_mujoco", tmp_path, ["--resume", f"runs/{path.name}", *total])
        assert code == 0 and "resumed from latest.pt" in said, said
        args = load(path / "checkpoints" / "latest.pt")["args"]
        assert (args["seed"], args["seeds"]) == (int(path.name.split("__")[2]), ())
    total = ["--total-timesteps", str(5 * STEPS[MANY_SEEDS])]
    code, said = run(MANY_SEEDS, tmp_path, [*resume(tmp_path), *total])
    assert code == 0 and said.count("resumed from latest.pt") == 2, said
    check_logs(MANY_SEEDS, tmp_path, 5)


def older(folder):
    """Make the checkpoints of the runs in ``folder`` those of a revision before --seeds and --record."""
    for path in folder.glob("runs/*/checkpoints/*.pt"):
        state = load(path)
        args = {name: x for name, x in state["args"].items() if name not in ("seeds", "record")}
        torch.save({**state, "args": {**args, "resume": ""}}, path)


@pytest.mark.parametrize("name", ["ppo_mujoco", MANY_SEEDS])
def test_a_run_of_a_revision_before_seeds_goes_on(tmp_path, name):
    """By its folder and by auto, where ``resume`` was text, and ``seeds`` and ``record`` were not there."""
    assert run(name, tmp_path, small(name, 3))[0] == 0
    before = runs_in(tmp_path)
    for path in before:  # as if it had been killed in its last iteration
        for last in ("latest", str(3 * STEPS[name])):
            (path / "checkpoints" / f"{last}.pt").unlink()
    older(tmp_path)
    code, said = run(name, tmp_path, [*small(name, 3), "--resume", "auto"])
    assert code == 0 and f"--resume auto: goes on with runs/{before[-1].name}" in said, said
    check_logs(name, tmp_path, 3)
    older(tmp_path)
    code, said = run(name, tmp_path, [*resume(tmp_path), "--total-timesteps", str(4 * STEPS[name])])
    assert code == 0 and said.count("resumed from latest.pt") == len(before), said
    assert runs_in(tmp_path) == before
    check_logs(name, tmp_path, 4)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--seed", "8"], "--seed 8: contradicts the run that is resumed: runs/RUN was started with 7"),
        (["--seeds", "8"], "--seed 8: contradicts the run that is resumed: runs/RUN was started with 7"),
        (["--seeds", "7", "8"], "--resume runs/RUN: must be auto, or a run's folder for each of 2 seeds"),
        (["--seed", "8", "--seeds", "7", "3"], "--seed 8: must not go with --seeds"),
    ],
)
def test_a_run_of_one_seed_goes_on_with_no_other(tmp_path, flags, said):
    assert run("ppo_mujoco", tmp_path, small("ppo_mujoco", 2))[0] == 0
    (folder,) = runs_in(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    total = ["--total-timesteps", str(4 * STEPS["ppo_mujoco"])]
    code, printed = run("ppo_mujoco", tmp_path, ["--resume", f"runs/{folder.name}", *total, *flags])
    assert code == 2 and said.replace("RUN", folder.name) in printed and printed.count("\n") == 1, printed
    assert runs_in(tmp_path) == [folder]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_seeds_that_stand_apart_are_refused(tmp_path):
    assert run(MANY_SEEDS, tmp_path, small(MANY_SEEDS, 3))[0] == 0
    ahead = runs_in(tmp_path)[0]
    total = ["--total-timesteps", str(9 * STEPS[MANY_SEEDS])]
    assert run("ppo_mujoco", tmp_path, ["--resume", f"runs/{ahead.name}", *total])[0] == 0
    code, said = run(MANY_SEEDS, tmp_path, [*resume(tmp_path), *total])
    assert code == 2 and f"{ahead.name}: stands too far ahead" in said and said.count("\n") == 1, said


def test_a_damaged_event_file_costs_a_line_and_its_rest(finished_once, tmp_path):
    name, folder = finished_once
    copied(folder, tmp_path)
    (events,) = runs_in(tmp_path)[0].glob("events*")
    content = events.read_bytes()
    middle = len(content) // 2
    events.write_bytes(content[:middle] + bytes(100) + content[middle + 100 :])
    code, said = run(name, tmp_path, [*resume(tmp_path), "--total-timesteps", str(7 * STEPS[name])])
    assert code == 0 and said.count(f"{events.name} is damaged") == 1, said
    kept = events.with_name(events.name.replace("tfevents", "damaged"))
    assert kept.read_bytes()[:middle] == content[:middle] and len(kept.read_bytes()) == len(content)
    steps = [step for step, _ in scalars_of(runs_in(tmp_path)[0])["losses/policy_loss"]]
    assert steps[-2:] == [6 * STEPS[name], 7 * STEPS[name]] and steps == sorted(set(steps))
