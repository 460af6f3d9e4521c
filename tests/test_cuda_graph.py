"""Calls through CUDA graphs do what plain code does: what is around the graphs on any machine, the rest on CUDA."""

import dataclasses
import importlib
from types import SimpleNamespace

import forked
import pytest
import torch
from test_scripts import LOSSES, TINY, load, newest_run, run_script, same, scalars_of

from common.cuda_graph import EVERY, MAX_KINDS, MAX_REMADE, WARM_UP, Graphed, fused_adam, reset, set_learning_rate

SCRIPTS = forked.SCRIPTS[:3]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Again:
    """In CUDA's place: what was recorded runs again, on the tensors that it was recorded with."""

    def __init__(self):
        self.recorded = 0

    def warm_up(self, function):
        return function()

    def record(self, function):
        self.recorded += 1
        result = {}

        def replay():
            for name, x in function().items():
                result.setdefault(name, torch.empty_like(x)).copy_(x)

        return replay, result


class Frozen(Again):
    """As a graph, it doesn't see what has changed in Python since."""

    def record(self, function):
        return lambda: None, function()


def graphed(plain, expected=None, backend=Again, **values):
    """Graphed, its arguments, and what it said and why it stopped the run."""
    args = SimpleNamespace(compile=False, cuda_graphs=True, **values)
    said, stopped = [], []
    run = SimpleNamespace(say=said.append, stop=stopped.append)
    return Graphed(plain, "it", args, torch.device("cuda"), run, expected, backend), args, said, stopped


@pytest.mark.parametrize("name", SCRIPTS)
def test_gradient_steps_are_those_of_plain_code(name):
    script = importlib.import_module(name)
    args = script.Args(num_envs=2, num_steps=8, minibatch_size=8, kl_coef=1.0)
    script.check_args(args)
    updates, agents, rows = [script.update], [], [[], []]
    updates.append(graphed(script.update, lambda agent, losses, _, *x: losses(agent, *x)[1])[0])
    for update, found in zip(updates, rows, strict=True):
        torch.manual_seed(0)
        agent = script.Agent(4, args)
        optimizers, kl_coef = script.make_optimizers(agent, args), torch.tensor(1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = torch.tensor(args.learning_rate)  # as on CUDA
        for k in range(WARM_UP + 4):
            mb = {"obs": torch.randint(0, 256, (8, 84, 84, 4), dtype=torch.uint8), "actions": torch.arange(8) % 4}
            mb |= {name: torch.randn(8) for name in ("values", "advantages", "returns")}
            mb |= {"logits": torch.randn(8, 4), "actor_held": torch.randn(8, 512), "critic_held": torch.randn(8, 512)}
            set_learning_rate(optimizers, 1e-3 / (k + 1))
            kl_coef.fill_(k)
            if k == WARM_UP + 2:
                reset(optimizers)
            stats = update(agent, script.losses, optimizers, mb, torch.randperm(8), kl_coef, args)
            found.append({name: x.item() for name, x in stats.items()})
        agents.append(agent.state_dict())
    assert rows[0] == rows[1] and same(*agents)
    # The first call has made the moments, which are elsewhere than none.
    assert updates[1].backend.recorded == 1 and updates[1].since == 3


def test_what_has_not_changed_is_not_copied_again():
    """A batch, of which each minibatch takes some samples; whatever is written into it is seen."""
    it = graphed(lambda x, indices: {"y": x["a"].index_select(0, indices)})[0]
    batch, k = {"a": torch.arange(8.0)}, torch.tensor([1, 2])
    for _ in range(WARM_UP + 2):
        it(batch, k)
    (buffer, _) = it.graphs[next(iter(it.graphs))][1]
    buffer.fill_(-1.0)
    assert it(batch, k)["y"].tolist() == [-1, -1] == it(batch, k + 1)["y"].tolist()
    batch["a"][:4].add_(10)  # by a view
    assert it(batch, k)["y"].tolist() == [11, 12]
    batch["a"] = batch["a"] * 2  # another tensor
    assert it(batch, k)["y"].tolist() == [22, 24]
    del batch  # and one that may lie where it was
    assert it({"a": torch.zeros(8)}, k)["y"].tolist() == [0, 0]


def replaced(module):
    module.weight.data = module.weight.data.clamp(-0.1, 0.1)


PLACES = {
    "weights": lambda module, optimizer: replaced(module),
    "moments": lambda module, optimizer: optimizer.state.clear(),
    "learning rate": lambda module, optimizer: optimizer.param_groups[0].update(lr=0.5),
    "weight decay": lambda module, optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_graph_is_not_used_where_what_it_reads_in_place_was_replaced(what):
    def step(module, optimizer, x):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    it, _, said, _ = graphed(step)
    for _ in range(WARM_UP + 3):
        it(module, optimizer, torch.randn(4, 3))
    assert it.backend.recorded == 1 and it.since == 2
    PLACES[what](module, optimizer)
    it(module, optimizer, torch.randn(4, 3))
    assert it.since == 2  # by plain code, before a graph of the new places
    for _ in range(WARM_UP + 1):
        it(module, optimizer, torch.randn(4, 3))
    assert it.backend.recorded == 2 and said == []


def test_weights_that_are_replaced_each_time_are_left_to_plain_code():
    module, kept = torch.nn.Linear(3, 2), []
    it, _, said, _ = graphed(lambda module, x: {"y": module(x).detach()})
    for k in range(MAX_KINDS + 2):
        kept.append(module.weight.data)  # so that each is elsewhere
        module.weight.data = torch.full((2, 3), float(k))
        x = torch.randn(4, 3)
        assert torch.equal(it(module, x)["y"], module(x))
    assert it.off and len(said) == 1 and "keep being replaced" in said[0]


def test_acting_has_a_graph_for_each_kind_of_arguments():
    script = importlib.import_module("ppo_pfo_atari")
    agent = script.Agent(4, script.Args())

    @torch.no_grad()
    def act(agent, obs, noise, all_layers):
        network, actions = script.act(agent, obs, noise, all_layers)
        return {"actions": actions} | {k: x for k, x in network._asdict().items() if x is not None}

    acting = graphed(act)[0]
    for k in range(2 * WARM_UP + 4):
        obs, noise = torch.randint(0, 256, (2, 84, 84, 4), dtype=torch.uint8), torch.rand(2, 4)
        assert same(acting(agent, obs, noise, k % 2 == 0), act(agent, obs, noise, k % 2 == 0))
    assert acting.backend.recorded == 2
    obs, noise = torch.zeros((3, 84, 84, 4), dtype=torch.uint8), torch.rand(3, 4)
    assert same(
        acting(agent, obs, noise, True), act(agent, obs, noise, True)
    )  # of another batch size: neither of these graphs
    assert acting.backend.recorded == 2


def test_a_changed_argument_is_recorded_anew():
    it, args, said, _ = graphed(lambda x: {"y": args.clip_coef * x}, clip_coef=0.1)
    for _ in range(WARM_UP + 2):
        it(torch.ones(2))
    args.clip_coef = 0.2
    assert it(torch.ones(2))["y"].tolist() == pytest.approx([0.2, 0.2])
    assert it.backend.recorded == 2 and said == []
    for k in range(MAX_REMADE + 2):
        args.clip_coef = 0.3 + k
        assert it(torch.ones(1))["y"].item() == pytest.approx(0.3 + k)
    assert said == ["it runs without CUDA graphs, which is slower: clip_coef keeps changing, and is no tensor"]


def test_what_nobody_named_ends_the_run():
    coef = [1.0]
    it, _, _, stopped = graphed(lambda x: {"y": coef[0] * x.sum()}, lambda x: {"y": coef[0] * x.sum()}, Frozen)
    for _ in range(WARM_UP + EVERY):
        it(torch.ones(2))
    assert stopped == []
    coef[0] = 2.0
    it(torch.ones(2))
    assert stopped == [
        "it reads what changes from call to call, which needs --no-cuda-graphs: y is 2 in its CUDA graph, "
        "and 4 without,"
    ]


def test_what_cannot_be_recorded_runs_as_it_is():
    class Refusing(Again):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    it, _, said, _ = graphed(lambda x: {"y": 2 * x}, backend=Refusing)
    for k in range(WARM_UP + 3):
        assert it(torch.full((2,), k))["y"].tolist() == [2 * k, 2 * k]
    assert len(said) == 1 and "operation not permitted" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize(
    "device, changes", [("cpu", {}), ("cuda", {"compile": True}), ("cuda", {"cuda_graphs": False})]
)
def test_plain_code_runs_where_graphs_are_not_asked_for(device, changes):
    args = dataclasses.replace(importlib.import_module("ppo_atari").Args(), **changes)
    it = Graphed(lambda x: x, "it", args, torch.device(device), None, backend=pytest.fail)
    x = torch.ones(2)
    assert it(x) is x


def test_optimizers_that_are_reset_are_new_ones():
    weights = []
    for again in (True, False):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        start = {name: x.clone() for name, x in module.state_dict().items()}
        optimizer = torch.optim.Adam(module.parameters(), **fused_adam(0.1, module))
        for _ in range(3 if again else 1):
            if again:
                module.load_state_dict(start)
                reset([optimizer])
            module(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(module.state_dict())
        assert {x["step"].item() for x in optimizer.state.values()} == {1}
    assert same(*weights)


def test_a_learning_rate_that_is_a_tensor_is_filled():
    rate, p = torch.tensor(0.1), torch.nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([p], lr=rate), torch.optim.SGD([p], lr=0.1)]
    set_learning_rate(optimizers, 0.25)
    assert optimizers[0].param_groups[0]["lr"] is rate and rate.item() == 0.25
    assert optimizers[1].param_groups[0]["lr"] == 0.25


@needs_cuda
@pytest.mark.parametrize(
    "flags", [[], ["--precision", "bfloat16"], ["--kl-coef", "1", "--anneal-lr", "--reset-optimizer"]]
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_on_cuda_are_those_without_graphs(tmp_path, name, flags):
    """The same losses within the rounding of other kernels, in the rollouts before the games go apart."""
    runs = []
    for mode in ("--cuda-graphs", "--no-cuda-graphs"):
        (tmp_path / mode).mkdir()
        done, run = run_script(name, tmp_path / mode, *TINY, "--device", "cuda", "--torch-deterministic", mode, *flags)
        assert "without CUDA graphs" not in done.stdout
        runs.append(scalars_of(run))
    for loss in LOSSES:
        one, other = ([value for _, value in run[f"losses/{loss}"][:2]] for run in runs)
        assert one == pytest.approx(other, rel=0.05, abs=1e-3), loss


@needs_cuda
def test_a_run_with_graphs_is_resumed(tmp_path):
    run_script("ppo_pfo_atari", tmp_path, *TINY[:-4], "--total-timesteps", "576", "--device", "cuda")
    folder = newest_run(tmp_path)
    before = load(folder / "checkpoints" / "latest.pt")
    flags = ["--resume", str(folder.relative_to(tmp_path)), "--total-timesteps", "960"]
    done, run = run_script("ppo_pfo_atari", tmp_path, *flags)
    assert "resumed from" in done.stdout
    after = load(run / "checkpoints" / "latest.pt")
    assert after["global_step"] == 960 and not same(before["agent"], after["agent"])
