"""The plasticity probe: its losses against golden numbers, its fit against a plain one, and probes of tiny runs."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plasticity_probe
import ppo_mujoco
import ppo_pfo_atari
from common.feature_rank import feature_ranks, mean_norm
from plasticity_probe import CURVATURE, LOGGED, MEASURES, Args, Atari, MuJoCo

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = np.load(Path(__file__).parent / "golden" / "reference.npz")
CPU = torch.device("cpu")
RUNS = {
    # Three rollouts of 2 x 32 transitions each
    "ppo_atari": ["--num-envs", "2", "--num-steps", "32", "--minibatch-size", "32", "--total-timesteps", "576"],
    "ppo_mujoco": ["--num-envs", "2", "--num-steps", "64", "--minibatch-size", "64", "--total-timesteps", "384"],
}
STEPS = {"ppo_atari": [0, 192, 384, 576], "ppo_mujoco": [0, 128, 256, 384]}


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def squashed_normal_outputs(name):
    x = golden("cont/obs")
    for i in range(3):
        x = torch.nn.functional.linear(x, golden(f"cont/{name}/W{i}"), golden(f"cont/{name}/b{i}"))
        x = x.tanh() if i < 2 else x
    return x


def test_losses_against_the_reference():
    old, new = golden("disc/old/logits"), golden("disc/new/logits")
    expected = GOLDEN["disc/models_diff/eps0.1/kl_dist_batch"]
    np.testing.assert_allclose(Atari.kl(ppo_pfo_atari, old, new).mean(), expected, rtol=1e-5)
    old, new = squashed_normal_outputs("policy_old"), squashed_normal_outputs("policy_new")
    expected = GOLDEN["cont/models_diff/eps0.2/kl_dist_batch"]
    np.testing.assert_allclose(MuJoCo.kl(ppo_mujoco, old, new).mean(), expected, rtol=1e-5)
    for case in ("disc", "cont"):
        loss = plasticity_probe.squared_error(
            None, golden(f"{case}/value_target_critic"), golden(f"{case}/new/state_value")
        )
        assert loss.shape == (64,)
        # The reference's critic loss is half of it.
        np.testing.assert_allclose(loss.mean(), 2 * GOLDEN[f"{case}/vloss/base/loss_critic"], rtol=1e-5)


def test_the_papers_defaults():
    """36 000 x 1 epoch is 140 minibatches of 256, and 4 x 1000 x 4 epochs 248 of 64."""
    for kind, script, steps in ((Atari, ppo_pfo_atari, 140), (MuJoCo, ppo_mujoco, 248)):
        per_epoch = kind.num_envs * kind.num_steps // script.Args.minibatch_size
        assert kind.epochs * per_epoch == steps


@pytest.mark.parametrize("anneal_lr", [False, True])
def test_fit_against_a_plain_one(anneal_lr):
    """Adam, gradient clip and annealing written out, on a linear network in float64."""
    torch.manual_seed(0)
    obs, target = torch.randn(23, 3).double(), 5 + torch.randn(23, 1).double()
    linear = torch.nn.Linear(3, 1).double()
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    run_args = SimpleNamespace(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-3, minibatch_size=5)
    losses = plasticity_probe.fit(
        *(lambda x, _: SimpleNamespace(output=linear(x)), list(linear.parameters()), obs, target),
        *(plasticity_probe.squared_error, SimpleNamespace(run_args=run_args, epochs=3, script=None)),
        *(Args(runs=(), anneal_lr=anneal_lr, max_grad_norm=0.7), torch.Generator().manual_seed(1), CPU),
    )

    generator, expected, step = torch.Generator().manual_seed(1), [], 0
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in (weight, bias)]
    for _ in range(3):
        order = torch.randperm(23, generator=generator)
        for mb in order[:20].view(4, 5):  # the last 3 make no minibatch
            error = obs[mb] @ weight.T + bias - target[mb]
            expected.append(error.square().mean().item())
            grads = [2 * error.T @ obs[mb] / 5, 2 * error.mean(0)]
            norm = sum(grad.square().sum() for grad in grads).sqrt()
            rate = 0.1 * (1 - step / 12 if anneal_lr else 1)
            step += 1
            for p, grad, (first, second) in zip((weight, bias), grads, moments, strict=True):
                grad = grad * min(0.7 / norm, 1)
                first.mul_(0.8).add_(0.2 * grad)
                second.mul_(0.9).add_(0.1 * grad.square())
                p -= rate * first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(linear.weight.detach(), weight, rtol=1e-5, atol=0)


def test_measures_in_chunks_are_those_of_the_whole():
    args = ppo_mujoco.Args(activation="ReLU")
    torch.manual_seed(0)
    agent = ppo_mujoco.Agent(5, -np.ones(2), np.ones(2), args)
    obs = torch.randn(plasticity_probe.CHUNK * 2 + 7, 6)
    outputs, measures, units = plasticity_probe.measure(agent.policy, obs, "ReLU", CPU)
    whole = agent.policy(obs, True)
    assert tuple(measures) == MEASURES and units == 64
    torch.testing.assert_close(outputs, whole.output)
    for name, x in feature_ranks(whole.features).items():
        assert measures[name] == pytest.approx(x.item(), rel=1e-6)
    for name in ("preactivation", "all_preactivation"):
        expected = mean_norm(getattr(whole, f"{name}s")).item()
        assert measures[f"{name}_norm"] == pytest.approx(expected, rel=1e-6)


def test_only_training_scripts_of_this_project_are_imported():
    names = plasticity_probe.training_scripts()
    assert {"ppo_atari.py", "ppo_atari_2models.py", "ppo_pfo_atari.py", "ppo_mujoco.py"} <= set(names)
    assert not {"plasticity_probe.py", "toy_problem.py"} & set(names)


# Probes of runs


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny run of a script with a shared trunk and of one with vectors: {script: folder}."""
    runs = {}
    for script, flags in RUNS.items():
        folder = tmp_path_factory.mktemp(script)
        forked.program(ROOT / f"{script}.py", *flags, "--seed", "7", "--device", "cpu", folder=folder)
        (runs[script],) = (folder / "runs").iterdir()
    return runs


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a trained run's folder, by its script's name."""

    def copied(script="ppo_mujoco", name="run"):
        shutil.copytree(trained[script] / "checkpoints", tmp_path / name / "checkpoints")
        (tmp_path / name / "checkpoints" / "latest.pt").write_text("a rolling checkpoint is none of the probe's")
        return tmp_path / name

    return copied


def probe(*runs, **flags):
    """Probe in this process; returns whether all was well, and raises SystemExit where nothing could be done.

    Without curvature, which takes most of the time where fits are this short.
    """
    args = Args(runs=runs, device="cpu", **{"max_samples": 150, "curvature": False, **flags})
    plasticity_probe.check_args(args)
    code = plasticity_probe.probe_runs(args, CPU)
    if code == 2:
        raise SystemExit(code)
    return code == 0


def program(*flags, code=0):
    return forked.program(ROOT / "plasticity_probe.py", *flags, "--device", "cpu", code=code)


def table(run, name="plasticity"):
    with open(run / name / "plasticity.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (int(row["global_step"]), row["network"]): {key: float(row[key]) for key in LOGGED if row[key]} for row in rows
    }


def events(run, name="plasticity"):
    accumulator = EventAccumulator(str(run / name), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.parametrize("script", RUNS)
def test_a_probe_of_a_run(run, script, capsys):
    folder = run(script)
    curved = script == "ppo_mujoco"
    out = program(folder, "--max-samples", "150", *([] if curved else ["--no-curvature"])).stdout
    rows, logged = table(folder), events(folder)
    assert list(rows) == [(step, name) for step in STEPS[script] for name in ("actor", "critic")]
    assert set(logged) == {f"plasticity/{name}/{key}" for name in ("actor", "critic") for key in LOGGED
                           if curved or key not in CURVATURE}  # fmt: skip
    for (step, network), row in rows.items():
        assert all(map(np.isfinite, row.values()))
        assert 0 < row["final_loss"] < row["initial_loss"]
        for key, x in row.items():
            assert dict(logged[f"plasticity/{network}/{key}"])[step] == np.float32(x)
    assert all([step for step, _ in points] == STEPS[script] for points in logged.values())
    assert f"4 checkpoints of {script}.py, 0 finished before" in out and out.count("; rank ") == 8
    # With a shared trunk the fits start from the same features and end with each network's own.
    first = [rows[STEPS[script][-1], name] for name in ("actor", "critic")]
    assert (first[0]["before/effective_rank"] == first[1]["before/effective_rank"]) == (script == "ppo_atari")
    assert first[0]["after/effective_rank"] != first[1]["after/effective_rank"]

    # Started anew it fits nothing, and into an empty folder everything to the bit.
    written = {path.name: path.read_bytes() for path in (folder / "plasticity").iterdir()}
    assert probe(folder, curvature=curved) and "4 finished before" in capsys.readouterr().out
    assert written == {path.name: path.read_bytes() for path in (folder / "plasticity").iterdir()}
    assert probe(folder, name="again", curvature=curved)
    assert written == {path.name: path.read_bytes() for path in (folder / "again").iterdir()}


def test_curvature_in_a_probe_against_loops(run):
    """Of the states that the seed chose, by plain autograd: tangent kernel, pairs of gradients, products with H."""
    folder = run()
    assert probe(folder, seed=3, checkpoints=("last",), curvature=True)
    args = Args(runs=(folder,), seed=3, max_samples=150)
    plan = plasticity_probe.make_plan(folder, args, CPU)
    random_agent = plasticity_probe.new_agent(plan.script, plan.kind, plan.run_args, 27, CPU)
    obs = plasticity_probe.collect(
        *plasticity_probe.load_agent(plan.first, plan, random_agent), plan, plasticity_probe.stream(3, "data"), CPU
    )
    agent, _ = plasticity_probe.load_agent(plan.paths[-1], plan, random_agent)

    def flat(tensors):
        return torch.cat([x.flatten() for x in tensors])

    for name, loss in (("actor", lambda x, y: ppo_mujoco.policy_kl(y, x)), ("critic", lambda x, y: (x - y)[:, 0] ** 2)):
        generator = torch.Generator().manual_seed(plasticity_probe.stream(3, "curvature"))
        states = obs[torch.randperm(len(obs), generator=generator)[:128]]
        network, wanted = getattr(agent, name), getattr(random_agent, name)(states, False).output.detach()
        weights = list(network.parameters())
        kernel, gradients = 0, []
        for k in range(wanted.shape[1]):
            rows = [flat(torch.autograd.grad(network(x[None], False).output[0, k], weights)) for x in states]
            kernel = kernel + (torch.stack(rows) @ torch.stack(rows).T).double()
        for x, y in zip(states, wanted, strict=True):
            each = torch.autograd.grad(loss(network(x[None], False).output, y[None])[0], weights)
            gradients.append(torch.nn.functional.normalize(flat(each).double(), dim=0))
        shares = torch.linalg.eigvalsh(kernel).clamp_min(0)
        shares = shares / shares.sum()
        cosines = torch.stack(gradients) @ torch.stack(gradients).T
        graph = flat(
            torch.autograd.grad(loss(network(states, False).output, wanted).mean(), weights, create_graph=True)
        )

        def times(v, graph=graph, weights=weights):
            return flat(torch.autograd.grad(graph @ v, weights, retain_graph=True))

        vector = torch.randn(len(graph), generator=generator)
        for _ in range(20):
            vector = vector / vector.norm()
            vector, value = times(vector), vector @ times(vector)
        signs = torch.randint(2, (50, len(graph)), generator=generator, dtype=torch.int8) * 2.0 - 1
        row = table(folder)[384, name]
        assert row["ntk_effective_rank"] == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=1e-2)
        assert row["gradient_cosine"] == pytest.approx((cosines.sum().item() - 128) / (128 * 127), abs=1e-4)
        assert row["hessian_max"] == pytest.approx(value.item(), rel=1e-3)
        assert row["hessian_trace"] == pytest.approx(np.mean([(v @ times(v)).item() for v in signs]), rel=1e-3)


ON_ATARI = {"marks": pytest.mark.slow}  # a network of 1.7 M parameters


@pytest.mark.parametrize("script, network", [pytest.param("ppo_atari", "critic", **ON_ATARI), ("ppo_mujoco", "actor")])
def test_curvature_is_added_to_fits_that_lack_it(run, script, network, monkeypatch, capsys):
    """Of an older revision, whose table had no such columns, or without it: nothing is fitted again."""
    monkeypatch.setattr(Atari, "curvature_states", 3)
    folder, whole, flags = run(script), run(script, "whole"), {"networks": (network,), "checkpoints": ("first", "last")}
    assert probe(whole, curvature=True, **flags)
    assert all(np.isfinite(row[key]) for row in table(whole).values() for key in CURVATURE)
    assert probe(folder, **flags)
    path, wanted = folder / "plasticity" / "plasticity.csv", (whole / "plasticity" / "plasticity.csv").read_bytes()
    skipped = path.read_bytes()
    assert all(set(row) == set(LOGGED) - set(CURVATURE) for row in table(folder).values())
    assert not {tag.split("/")[-1] for tag in events(folder)} & set(CURVATURE)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    older = [name for name in plasticity_probe.COLUMNS if name not in CURVATURE]
    for case in (None, older):
        path.write_bytes(skipped)
        if case:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, case, lineterminator="\n", extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        monkeypatch.setattr(plasticity_probe, "fit", None)
        before = path.read_bytes()
        assert probe(folder, **flags) and path.read_bytes() == before
        capsys.readouterr()
        assert probe(folder, curvature=True, **flags)
        said = capsys.readouterr().out
        assert "0 finished before" in said and said.count(f"{network:6}: fitted before; its tangent kernel") == 2
        assert path.read_bytes() == wanted and events(folder) == events(whole)
        assert probe(folder, curvature=True, **flags) and "2 finished before" in capsys.readouterr().out
    path.write_bytes(skipped.replace(b",,", b",much,", 1))
    assert not probe(folder, whole, **flags) and "is not as the probe wrote it" in capsys.readouterr().err


def test_a_network_without_curvature_says_so(run, monkeypatch, capsys):
    """As of a copy that asks for a number while it computes: a line, and how to go on."""
    folder, forward = run(), ppo_mujoco.Network.forward

    def asking(self, x, all_layers):
        return forward(self, x * float(x[0, 0] < 99), all_layers)

    monkeypatch.setattr(ppo_mujoco.Network, "forward", asking)
    assert not probe(folder, curvature=True)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder}: the curvature of the actor can't be measured (") and said.count("\n") == 1
    assert "--no-curvature" in said and not (folder / "plasticity" / "plasticity.csv").exists()
    assert probe(folder) and len(table(folder)) == 8


def test_curvature_of_a_shared_trunk_is_that_of_each_network():
    """Its parameters are the trunk's and the network's own output, once each, in every way of sharing."""
    for args in (ppo_mujoco.Args(share_features=True), ppo_mujoco.Args()):
        agent = ppo_mujoco.Agent(5, -np.ones(2), np.ones(2), args)
        for name in ("actor", "critic"):
            function, parameters = plasticity_probe.as_function(agent, name)
            assert sum(x.numel() for x in parameters.values()) == sum(
                x.numel() for x in agent.networks()[name].parameters()
            )
            obs = torch.randn(4, 6)
            assert function(parameters, obs).equal(agent.networks()[name](obs, False).output)
            assert function({key: 0 * x for key, x in parameters.items()}, obs).eq(0).all()


def test_neither_network_needs_the_other_and_checkpoints_come_in_any_order(run):
    folder = run()
    assert probe(folder)
    for flags in ({"checkpoints": ("last",), "networks": ("critic",)}, {"checkpoints": ("128", "first")}, {}):
        assert probe(folder, name="bit-by-bit", **flags)
    assert table(folder) == table(folder, "bit-by-bit") and events(folder) == events(folder, "bit-by-bit")


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize("data", ["first", "each"])
def test_networks_that_are_the_targets_start_at_loss_0(run, script, data):
    folder = run(script)
    assert probe(folder, targets="initial", data=data, checkpoints=("first", "last"))
    rows = table(folder)
    for network in ("actor", "critic"):
        assert rows[0, network]["initial_loss"] == 0 and rows[0, network]["final_loss"] < 1e-3
        assert rows[STEPS[script][-1], network]["initial_loss"] > 1e-6


@pytest.mark.parametrize("script, units", [pytest.param("ppo_atari", 512, **ON_ATARI), ("ppo_mujoco", 64)])
def test_dead_networks_cannot_fit_and_say_so(run, script, units, capsys):
    folder = run(script)
    path = folder / "checkpoints" / f"{STEPS[script][-1]}.pt"
    checkpoint = torch.load(path, weights_only=True)
    for name, x in checkpoint["agent"].items():
        if ".hidden." in name:
            x.fill_(0 if name.endswith("weight") else -100)  # 0 by ReLU, and -1 on every sample by Tanh
    torch.save(checkpoint, path)
    assert probe(folder, epochs=10 if script == "ppo_atari" else 40, checkpoints=("first", "last"))
    said = capsys.readouterr().out
    for network in ("actor", "critic"):
        reason = "0 on every observation" if script == "ppo_atari" else "constant within 0.001"
        assert said.count(f"{network:6}: all {units} units are dead, {reason}") == 1
        dead, live = table(folder)[STEPS[script][-1], network], table(folder)[0, network]
        assert dead["before/dead_units"] == dead["after/dead_units"] == units
        assert dead["after/pca_rank"] <= 1 and dead["final_loss"] > 2 * live["final_loss"]


def test_a_shared_trunk_is_split():
    agent = ppo_mujoco.Agent(5, -np.ones(2), np.ones(2), ppo_mujoco.Args(share_features=True))
    (actor, actor_parameters), (critic, critic_parameters) = (
        plasticity_probe.separate(agent, name) for name in ("actor", "critic")
    )
    kept = [{p.data_ptr() for p in parameters} for parameters in (actor_parameters, critic_parameters)]
    assert not kept[0] & kept[1] and not (kept[0] | kept[1]) & {p.data_ptr() for p in agent.parameters()}
    obs = torch.randn(8, 6)
    assert actor(obs).features.equal(critic(obs).features)
    actor(obs).output.sum().backward()
    assert all(p.grad is not None for p in actor_parameters) and all(p.grad is None for p in critic_parameters)


def test_the_losses_of_runs_are_drawn(run, tmp_path):
    runs = [run(name=name) for name in ("one__two__3__4", "one__two__5__6")]
    assert probe(*runs, checkpoints=("first", "last"))
    flags = [*runs, "--output", tmp_path / "drawn.png"]
    forked.program("benchmark.plasticity", *flags)
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    done = forked.program("benchmark.plasticity", *flags, "--loss", "best", code=2)
    assert "--loss" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_data_from_each_checkpoint_is_its_own(run):
    folder = run()
    for data in ("first", "each"):
        assert probe(folder, data=data, name=data)
    first, each = table(folder, "first"), table(folder, "each")
    assert first[0, "actor"] == each[0, "actor"]
    assert first[384, "actor"]["before/effective_rank"] != each[384, "actor"]["before/effective_rank"]


@pytest.mark.parametrize("script, shape", [("ppo_atari", (84, 84, 4)), ("ppo_mujoco", (12,))])
def test_data_of_several_environments(trained, script, shape):
    args = Args(runs=(trained[script],), num_envs=3, max_samples=100)
    plan = plasticity_probe.make_plan(trained[script], args, CPU)
    agent = plasticity_probe.new_agent(plan.script, plan.kind, plan.run_args, 27, CPU)
    obs = plasticity_probe.collect(*plasticity_probe.load_agent(plan.first, plan, agent), plan, 5, CPU)
    assert obs.shape == (99, *shape) and obs.dtype == (torch.uint8 if script == "ppo_atari" else torch.float32)
    if script == "ppo_mujoco":
        elapsed = ((obs[:, -1].double() + 1) * 1000 / 2).round().view(33, 3)
        assert (elapsed[0] == 0).all() and set((elapsed[1:] - elapsed[:-1])[elapsed[1:] > 0].tolist()) == {1.0}
        assert len({tuple(x) for x in obs[:3, :-1].tolist()}) == 3  # each environment has its own seed
    again = plasticity_probe.collect(*plasticity_probe.load_agent(plan.first, plan, agent), plan, 5, CPU)
    other = plasticity_probe.collect(*plasticity_probe.load_agent(plan.first, plan, agent), plan, 6, CPU)
    assert obs.equal(again) and not obs.equal(other)


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints_are_named_and_skipped(run, trained, tmp_path):
    """Damaged, foreign, hostile files among good ones: a line each, the rest done, exit code 1."""
    folder, whole = run(), run(name="whole")
    good = torch.load(folder / "checkpoints" / "128.pt", weights_only=True)

    def write(step, **changes):
        torch.save({**good, "global_step": step, **changes}, folder / "checkpoints" / f"{step}.pt")

    (folder / "checkpoints" / "128.pt").write_bytes((folder / "checkpoints" / "128.pt").read_bytes()[:5000])
    (folder / "checkpoints" / "1.pt").write_text("no checkpoint")
    (folder / "checkpoints" / "2.pt").write_bytes(b"")
    (folder / "checkpoints" / "3.pt").mkdir()
    torch.save([1, 2], folder / "checkpoints" / "4.pt")
    torch.save(Malice(tmp_path / "executed"), folder / "checkpoints" / "5.pt")
    torch.save({**good, "global_step": 6, "agent": Malice(tmp_path / "executed")}, folder / "checkpoints" / "6.pt")
    torch.save(good, folder / "checkpoints" / "7.pt")
    write(8, script="os.py")
    write(9, script="../evil.py")
    write(10, script="plasticity_probe.py")
    write(11, script="ppo_pfo_atari.py")
    write(12, args={**good["args"], "seed": 8})
    write(13, args={**good["args"], "env_id": "Nothing-v9"})
    write(14, args={**good["args"], "hidden_sizes": "x"})
    write(15, args={**good["args"], "unknown": 1})
    write(16, agent={name: x * float("nan") for name, x in good["agent"].items()})
    write(17, agent={name: x[..., :2] for name, x in good["agent"].items()})
    write(18, agent={1: 2})
    write(19, normalizer={"mean": torch.zeros(3), "std": torch.ones(3), "time_limit": 1000})
    write(20, normalizer=None)
    write(21, args={**good["args"], "learning_rate": -1.0})
    write(22, args=3)
    bad = [*range(1, 23), 128]
    done = program(folder, whole, "--max-samples", "150", "--no-curvature", code=1)
    lines = done.stderr.splitlines()
    assert [line.split(".pt: ")[0] for line in lines] == [f"error: {folder}/checkpoints/{step}" for step in bad]
    assert max(map(len, lines)) < 500 + len(str(folder)) and not (tmp_path / "executed").exists()
    assert list(table(folder)) == [(step, name) for step in (0, 256, 384) for name in ("actor", "critic")]
    assert table(folder).items() <= table(whole).items() and len(table(whole)) == 8

    # One run of several that can't be probed at all, and a file that is none
    (tmp_path / "README").write_text("no run")
    shutil.copytree(folder, tmp_path / "nothing", ignore=lambda *_: {"0.pt", "256.pt", "384.pt", "plasticity"})
    runs = (tmp_path / "README", tmp_path / "nothing", whole)
    assert not probe(*runs, name="several") and table(whole, "several") == table(whole)

    # What is broken stays so: it is named again, and nothing is fitted.
    before = (folder / "plasticity" / "plasticity.csv").read_bytes()
    assert not probe(folder)
    assert (folder / "plasticity" / "plasticity.csv").read_bytes() == before


def test_a_first_checkpoint_that_is_broken(run, capsys):
    """The next one makes the data. Files whose arguments ask for networks beyond their weights take no memory."""
    folder = run()
    path = folder / "checkpoints" / "0.pt"
    first = torch.load(path, weights_only=True)
    torch.save({**first, "agent": {name: x[..., :2] for name, x in first["agent"].items()}}, path)
    assert not probe(folder, checkpoints=("last",))
    printed = capsys.readouterr()
    assert printed.err == f"error: {path}: has weights that don't fit its arguments\n"
    assert "step 128 acts" in printed.out and list(table(folder)) == [(384, "actor"), (384, "critic")]
    assert json.loads((folder / "plasticity" / "settings.json").read_text())["settings"]["first_checkpoint"] == 128
    for path in folder.glob("checkpoints/[0-9]*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        torch.save({**checkpoint, "args": {**checkpoint["args"], "hidden_sizes": (100_000, 100_000)}}, path)
    with pytest.raises(SystemExit):
        probe(folder, name="none")
    assert capsys.readouterr().err.count("has weights that don't fit its arguments\n") == 4
    for path in folder.glob("checkpoints/*.pt"):
        path.write_text("x")
    with pytest.raises(SystemExit):
        probe(folder, name="none")
    assert "has no checkpoint that can be probed" in capsys.readouterr().err and not (folder / "none").exists()


def test_a_run_from_before_a_flag_is_probed_with_its_default(run, capsys):
    folder, whole = run(), run(name="whole")
    for path in folder.glob("checkpoints/[0-9]*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        for flag in ("layer_init", "eval_episodes"):
            del checkpoint["args"][flag]
        torch.save(checkpoint, path)
    assert probe(folder, checkpoints=("last",))
    default = ppo_mujoco.Args.layer_init
    assert f"the run is from before these flags, and is probed with --layer-init {default}\n" in capsys.readouterr().out
    assert probe(whole, checkpoints=("last",)) and table(whole) == table(folder)
    assert "from before" not in capsys.readouterr().out


def test_a_run_from_before_seeds_that_went_on_is_probed(run, capsys):
    """Its first checkpoints have the text ``resume``, and lack what the later ones have."""
    folder, whole = run(), run(name="whole")
    for step in (0, 128):
        path = folder / "checkpoints" / f"{step}.pt"
        checkpoint = torch.load(path, weights_only=True)
        args = {name: x for name, x in checkpoint["args"].items() if name not in ("seeds", "record")}
        torch.save({**checkpoint, "args": {**args, "resume": ""}}, path)
    for step in (256, 384):
        path = folder / "checkpoints" / f"{step}.pt"
        checkpoint = torch.load(path, weights_only=True)
        torch.save({**checkpoint, "args": {**checkpoint["args"], "resume": ("runs/RUN",)}}, path)
    assert probe(folder) and probe(whole) and table(folder) == table(whole) and len(table(folder)) == 8


@pytest.mark.parametrize("changes", [{"seed": 8}, {"activation": "ReLU"}, {"update_epochs": 20}])
def test_a_foreign_checkpoint_is_no_part_of_the_run(run, changes, capsys):
    """Not even as the first one, which would act for all: the run is what most checkpoints are of."""
    folder, whole = run(), run(name="whole")
    for step in (0, 256):
        path = folder / "checkpoints" / f"{step}.pt"
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["args"] |= changes
        path.unlink()
        if step == 0:
            torch.save(checkpoint, path)
        else:  # longer, as a run that was resumed: still the same one
            checkpoint["args"] = {**torch.load(folder / "checkpoints" / "384.pt", weights_only=True)["args"]}
            checkpoint["args"] |= {"total_timesteps": 1000, "num_iterations": 7}
            torch.save(checkpoint, path)
    assert not probe(folder)
    assert capsys.readouterr().err == f"error: {folder}/checkpoints/0.pt: is of another run than most in {folder}\n"
    (whole / "checkpoints" / "0.pt").unlink()
    assert probe(whole) and table(whole) == table(folder) and len(table(whole)) == 6


def test_another_checkpoint_of_the_same_step_is_fitted_again(run, capsys):
    """As where a run went back to an older checkpoint and came by again."""
    folder, other = run(), run(name="other")
    assert probe(folder)
    before = table(folder)
    for path in (folder, other):
        checkpoint = torch.load(path / "checkpoints" / "256.pt", weights_only=True)
        for x in checkpoint["agent"].values():
            x *= 1.01
        torch.save(checkpoint, path / "checkpoints" / "256.pt")
    capsys.readouterr()
    assert probe(folder) and probe(other)
    said = capsys.readouterr().out
    assert said.count("fitted before was that of another checkpoint") == 2
    assert table(folder) == table(other) and events(folder) == events(other)
    changed = {key for key, row in table(folder).items() if row != before[key]}
    assert changed == {(256, "actor"), (256, "critic")}


def test_two_probes_of_one_run_keep_apart(run, capsys):
    folder = run()
    with plasticity_probe.locked(folder / "plasticity"):
        assert not probe(folder)
    assert capsys.readouterr().err == f"error: {folder}/plasticity: another probe is at it\n"
    assert probe(folder)


def test_an_interrupted_probe_goes_on(run, tmp_path):
    folder, whole = run(), run(name="whole")
    # Where the tests themselves ignore it, in the background of a shell script
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    flags, logs = [str(folder), "--epochs", "8", "--device", "cpu"], (tmp_path / "printed", tmp_path / "errors")
    with forked.started("", tmp_path, flags, heeds, ROOT / "plasticity_probe.py", logs) as process:
        forked.wait_for(lambda: logs[0].exists() and "\nstep 256" in logs[0].read_text(), process)
        assert forked.send(process, signal.SIGINT) == 130
    said = logs[1].read_text()
    assert said.startswith("error: interrupted") and said.count("\n") == 1
    rows = list(table(folder))  # a slow reader's signal may come after the fit of the actor
    assert rows == [(step, name) for step in (0, 128, 256) for name in ("actor", "critic")][: len(rows)]
    assert len(rows) in (4, 5)
    assert {path.name for path in (folder / "plasticity").iterdir()} == {
        *("plasticity.csv", "settings.json"),
        *(f"events.out.tfevents.{step:012d}.{name}" for step, name in rows),
    }
    for path in (folder, whole):
        assert probe(path, epochs=8, max_samples=0, curvature=True)
    assert (folder / "plasticity/plasticity.csv").read_bytes() == (whole / "plasticity/plasticity.csv").read_bytes()
    assert events(folder) == events(whole)


def test_a_crash_between_files_is_healed(run, monkeypatch):
    """Events without their row in the CSV are written again, not twice."""
    folder = run()
    real = os.replace

    def crash(source, target):
        if target.name == "plasticity.csv" and "384" in "".join(path.name for path in target.parent.iterdir()):
            raise RuntimeError("crash")
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(RuntimeError, match="crash"):
        probe(folder)
    assert (384, "actor") not in table(folder) and not (folder / "plasticity" / "unfinished.tmp").exists()
    monkeypatch.undo()
    assert probe(folder)
    assert {tag: len(points) for tag, points in events(folder).items()} == dict.fromkeys(events(folder), 4)
    assert list(table(folder))[-1] == (384, "critic")


def refusal(capsys, run, **flags):
    with pytest.raises(SystemExit) as stop:
        probe(run, **flags)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    return printed.err


def test_results_of_other_settings_are_not_mixed(run, capsys):
    folder = run()
    assert probe(folder, checkpoints=("first",))
    before = (folder / "plasticity" / "plasticity.csv").read_bytes()
    capsys.readouterr()
    others = {"epochs": 2, "target_seed": 1, "seed": 3, "targets": "initial", "data": "each", "anneal_lr": True}
    for flag, value in (others | {"max_samples": 100, "num_envs": 2, "max_grad_norm": 1.0}).items():
        assert "holds a probe with" in refusal(capsys, folder, **{flag: value})
    assert (folder / "plasticity" / "plasticity.csv").read_bytes() == before
    assert probe(folder, epochs=2, name="two", checkpoints=("first",))
    capsys.readouterr()
    (folder / "plasticity" / "plasticity.csv").write_text("global_step,network\n0,actor\n")
    assert "plasticity.csv" in refusal(capsys, folder)
    (folder / "plasticity" / "settings.json").write_text("{")
    assert "settings.json" in refusal(capsys, folder)


WRONG = [
    ({"checkpoints": ("5",)}, "--checkpoints 5: is no checkpoint of"),
    ({"checkpoints": ("best",)}, "--checkpoints best"),
    ({"networks": ()}, "--networks"),
    ({"epochs": -1}, "--epochs -1: must be at least 0"),
    ({"num_envs": 2000}, "--num-envs 2000"),
    ({"max_samples": 63}, "--max-samples 63: must give at least one minibatch, which has 64 samples"),
    ({"target_seed": -1}, "--target-seed -1"),
    ({"max_grad_norm": float("nan")}, "--max-grad-norm nan"),
    ({"name": "../x"}, "--name '../x'"),
    ({"name": "checkpoints"}, "--name 'checkpoints'"),
]


@pytest.mark.parametrize("flags, said", WRONG)
def test_bad_input_is_refused(run, capsys, flags, said):
    folder = run()
    assert said in refusal(capsys, folder, **flags)
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]


def test_the_probe_of_a_run_against_a_plain_one(run):
    """Data, targets, losses and their direction, from environment to table, with PyTorch's own distributions."""
    folder = run()
    assert probe(folder, target_seed=5, seed=3, epochs=2, max_samples=256)
    rows = table(folder)
    first, last = (torch.load(folder / "checkpoints" / f"{step}.pt", weights_only=True) for step in (0, 384))
    args = ppo_mujoco.Args(minibatch_size=64)
    plain = {"obs_dim": first["obs_dim"], "low": first["action_low"].numpy(), "high": first["action_high"].numpy()}

    def agent_of(weights=None, seed=0):
        torch.manual_seed(seed)
        agent = ppo_mujoco.Agent(*plain.values(), args)
        if weights:
            agent.load_state_dict(weights)
        return agent

    # Data: 4 environments of 64 steps each, observed through the run's statistics, with sampled actions
    generator = torch.Generator().manual_seed(plasticity_probe.stream(3, "data"))
    seeds = torch.randint(2**31 - 1, (4,), generator=generator).tolist()
    noise = torch.randn((64, 4, 3), generator=generator)
    envs, actor = ppo_mujoco.make_envs(args, 4, seeds), agent_of(first["agent"])
    raw, elapsed, seen = envs.reset()[0], np.zeros(4), []
    mean, std = first["normalizer"]["mean"].numpy(), first["normalizer"]["std"].numpy()
    for step in range(64):
        x = np.concatenate([(raw - mean) / std, 2 * elapsed[:, None] / 1000 - 1], axis=1)
        seen.append(torch.from_numpy(x).float())
        with torch.no_grad():
            loc, raw_scale = actor.policy(seen[-1]).output.chunk(2, dim=-1)
        scale = torch.nn.functional.softplus(raw_scale + np.log(np.expm1(0.99))) + 0.01
        action = (loc + scale * noise[step]).tanh().clamp(-1 + 1e-6, 1 - 1e-6).numpy().astype(np.float64)
        raw, _, terminated, truncated, _ = envs.step(action)
        elapsed += 1
        ended = np.flatnonzero(terminated | truncated).astype(np.int32)
        if ended.size:
            raw[ended], elapsed[ended] = envs.reset(ended)[0], 0
    obs, target = torch.cat(seen), agent_of(seed=5)

    def normal(output):
        loc, raw_scale = output.chunk(2, dim=-1)
        return torch.distributions.Normal(loc, torch.nn.functional.softplus(raw_scale + np.log(np.expm1(0.99))) + 0.01)

    def kl(output, target):
        return torch.distributions.kl_divergence(normal(target), normal(output)).sum(-1)

    def squared_error(output, target):
        return (output - target)[:, 0] ** 2

    for name, loss in (("actor", kl), ("critic", squared_error)):
        network, wanted = getattr(agent_of(last["agent"]), name), getattr(target, name)(obs, False).output.detach()
        optimizer = torch.optim.Adam(network.parameters(), 3e-4)
        generator, losses = torch.Generator().manual_seed(plasticity_probe.stream(3, name)), []
        row = rows[384, name]
        assert row["initial_loss"] == pytest.approx(loss(network(obs, False).output, wanted).mean().item(), rel=1e-4)
        for _ in range(2):
            for mb in torch.randperm(256, generator=generator).split(64):
                losses.append(loss(network(obs[mb], False).output, wanted[mb]).mean())
                optimizer.zero_grad()
                losses[-1].backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()
        losses = [x.item() for x in losses]
        assert row["last_minibatch_loss"] == pytest.approx(losses[-1], rel=1e-4)
        assert row["loss_auc"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert row["final_loss"] == pytest.approx(loss(network(obs, False).output, wanted).mean().item(), rel=1e-4)


def test_folders_that_are_no_runs_are_refused(tmp_path, capsys):
    assert "must be a run's folder" in refusal(capsys, tmp_path)
    with pytest.raises(SystemExit):
        probe()
    assert capsys.readouterr().err == "error: RUNS: name at least one run's folder, as runs/*\n"


def test_every_measure_of_the_training_scripts_is_there(run):
    """The names of the features' measures are those of the scripts' own diagnostics."""
    args = ppo_mujoco.Args()
    layers = ppo_mujoco.NetworkOutput(*torch.randn(4, 8, 6))
    networks = {"actor": layers, "critic": layers}
    tags = ppo_mujoco.diagnose(networks, networks, *torch.randn(2, 8, 3), torch.ones(3), args)
    of_features = {tag.split("/")[-1] for tag in tags if re.match(r"representation/before/actor/\w+$", tag)}
    assert of_features - {"activation_balance"} == set(MEASURES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script", RUNS)
def test_probes_on_cuda(run, script):
    folder = run(script)
    args = dataclasses.replace(Args(runs=(folder,), max_samples=150), device="cuda")
    assert plasticity_probe.probe_runs(args, torch.device("cuda")) == 0
    assert all(row["final_loss"] < row["initial_loss"] for row in table(folder).values())
