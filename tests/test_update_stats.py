"""The second round of measures against loops over plain numbers, and what an update phase measures of itself."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.feature_rank import (
    activation_balance,
    gradient_dormant_fraction,
    measures_by_layer,
    saturated_fraction,
    split_layers,
)
from common.trust_region import of_logits, of_normals, ratio_stats
from common.update_stats import UpdatePhase, layers_of, phases_of, steps


def oui(x):
    """By pairs, as it is defined."""
    apart = [np.mean((a > 0) != (b > 0)) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    return 2 * np.mean([min(d, 0.5) for d in apart])


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), st.integers(1, 9), st.integers(0, 99))
def test_activation_balance_is_that_of_all_pairs(n, d, seed):
    x = np.random.default_rng(seed).standard_normal((n, d)) + 0.5
    assert activation_balance(torch.from_numpy(x)).item() == pytest.approx(oui(x), abs=1e-12)
    assert activation_balance(torch.from_numpy(x).bfloat16()).item() == pytest.approx(oui(x), abs=1e-12)


def test_activation_balance_at_its_ends():
    assert activation_balance(torch.ones(5, 3)) == 0  # a linear layer
    assert activation_balance(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == 1
    assert activation_balance(torch.zeros(5, 3)) == 0  # 0 is not on
    for x in (torch.ones(1, 3), torch.ones(0, 3), torch.ones(3, 0), torch.full((3, 3), math.nan)):
        assert activation_balance(x).isnan()


def test_activation_balance_compares_some_of_many_samples():
    x = torch.randn(1000, 8)
    assert activation_balance(x, samples=10) == activation_balance(x[torch.linspace(0, 999, 10).long()])


def test_saturated_fraction():
    x = torch.tensor([[0.991, -0.995], [0.5, 0.99]])
    assert saturated_fraction(x) == 0.5 and saturated_fraction(torch.zeros(0, 2)).isnan()
    assert saturated_fraction(torch.tensor([[math.nan]])).isnan()


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2)])
def test_gradient_dormant_fraction_by_loops(shape):
    gradient = np.random.default_rng(1).standard_normal(shape)
    gradient[1] *= 1e-4
    of_units = [np.abs(row).mean() for row in gradient]
    expected = np.mean([x <= 0.01 * np.mean(of_units) for x in of_units])
    assert gradient_dormant_fraction(torch.from_numpy(gradient)).item() == expected == 1 / shape[0]
    assert gradient_dormant_fraction(torch.zeros(shape)) == 1
    assert gradient_dormant_fraction(torch.full(shape, math.inf)).isnan()


def test_layers_are_split_where_they_join():
    conv, linear = torch.randn(3, 2, 4, 5), torch.randn(3, 7)
    joined = torch.cat([conv.flatten(1), linear], dim=1)
    first, second = split_layers(joined, [(2, 4, 5), (7,)])
    assert torch.equal(second, linear)
    assert torch.equal(first, torch.stack([conv[n, :, h, w] for n in range(3) for h in range(4) for w in range(5)]))
    assert split_layers(joined, [(7,)]) == []
    network = SimpleNamespace(all_preactivations=joined, features=linear.relu())
    assert measures_by_layer(network, [(7,)], "ReLU") == {}


def test_measures_of_each_layer():
    joined = torch.tensor([[3.0, 4.0, -1.0, 2.0], [6.0, -8.0, -2.0, 3.0]])
    network = SimpleNamespace(all_preactivations=joined, features=joined[:, 2:].relu())
    found = measures_by_layer(network, [(2,), (2,)], "ReLU")
    assert found["layer1/dead_units"] == 0 and found["layer2/dead_units"] == 1
    assert found["layer1/dormant_fraction"] == 0 and found["layer2/dormant_fraction"] == 0.5
    assert found["layer1/preactivation_norm"] == 7.5
    assert found["activation_balance"] == pytest.approx((1 + 0) / 2)
    network = SimpleNamespace(all_preactivations=joined, features=joined[:, 2:].tanh())
    found = measures_by_layer(network, [(2,), (2,)], "Tanh")
    assert found["layer1/saturated_fraction"] == 1 and found["layer2/saturated_fraction"] == 0.25


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_ratio_deviation(logratio):
    found = ratio_stats(torch.tensor(logratio, dtype=torch.float64), 0.2)["ratio_deviation"].item()
    assert found == pytest.approx(np.mean([abs(math.exp(x) - 1) for x in logratio]), abs=1e-12)


def test_ratio_deviation_overflows_to_infinity():
    assert ratio_stats(torch.tensor([100.0, 0.0]), 0.2)["ratio_deviation"] == math.inf
    assert ratio_stats(torch.tensor([math.nan, 0.0]), 0.2)["ratio_deviation"].isnan()


def test_outputs_of_policies_by_loops():
    before, after = np.random.default_rng(0).standard_normal((2, 50, 4))
    found = of_logits(torch.from_numpy(before), torch.from_numpy(after))
    norms = [np.sqrt(sum((x - row.mean()) ** 2 for x in row)) for row in after]
    assert found["policy/logit_norm"].item() == pytest.approx(np.mean(norms))
    changed = [a.argmax() != b.argmax() for a, b in zip(before, after, strict=True)]
    assert found["churn/policy_greedy"].item() == np.mean(changed) > 0
    shifted = of_logits(torch.from_numpy(before), torch.from_numpy(after + 7))
    assert shifted["policy/logit_norm"].item() == pytest.approx(np.mean(norms))  # the same policy

    old, new = ((torch.from_numpy(x), torch.from_numpy(x**2)) for x in (before, after))
    found = of_normals(old, new)
    assert found["policy/loc_abs_mean"].item() == pytest.approx(np.abs(after).mean())
    assert found["policy/scale_mean"].item() == pytest.approx((after**2).mean())
    assert found["churn/policy_loc"].item() == pytest.approx(((after - before) ** 2).mean())
    with pytest.raises(ValueError, match="equal shapes"):
        of_logits(torch.zeros(2, 3), torch.zeros(2, 4))


# An update phase


class Net(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Conv2d(1, 3, 2), nn.Linear(12, 5)])
        self.output = nn.Linear(5, num_outputs)

    def forward(self, x):
        first = self.hidden[0](x)
        second = self.hidden[1](first.relu().flatten(1))
        everything = torch.cat([first.flatten(1), second], dim=1)
        return SimpleNamespace(output=self.output(second.relu()), features=second.relu(), all_preactivations=everything)


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor, self.critic = Net(2), Net(1)

    def networks(self):
        return {"actor": self.actor, "critic": self.critic}

    def forward(self, x):
        return self.actor(x), self.critic(x)


def squared(before, after):
    """In place of a KL divergence."""
    return (after - before).square().sum(1)


@pytest.fixture
def phase():
    """An agent, its batch of 12 samples, and two gradient steps on the first and the last four; what is measured."""
    torch.manual_seed(0)
    agent = Agent()
    untrained = {name: x.clone() for name, x in agent.state_dict().items()}
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    nn.init.zeros_(agent.actor.hidden[0].weight[0].data)  # moved before the phase
    batch = {"obs": torch.randn(12, 1, 3, 3), "advantages": torch.randn(12)}
    found = SimpleNamespace(agent=agent, batch=batch, untrained=untrained, outputs=[], gradients=None, weights=[])
    phase = UpdatePhase(agent, batch, 3, squared, True)

    def look():
        with torch.no_grad():
            found.outputs.append(agent(batch["obs"]))
            found.weights.append({name: p.detach().clone() for name, p in agent.named_parameters()})

    look()
    for k, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 12))):
        with phase.step(k, batch["advantages"][rows]):
            policy, value = agent(batch["obs"][rows])
            optimizer.zero_grad()
            (policy.output.square().mean() + (value.output - 1).square().mean()).backward()
            found.gradients = found.gradients or {name: p.grad.clone() for name, p in agent.named_parameters()}
            optimizer.step()
        look()
    before, after = ({"actor": x[0], "critic": x[1]} for x in (found.outputs[0], found.outputs[-1]))
    logged = [{"actor_grad_norm": x, "critic_grad_norm": 2 * x} for x in (1.0, 2.0, 6.0)]
    found.tags = phase.measures(logged, before, after, "ReLU", untrained)
    return found


def test_churn_is_of_samples_outside_of_the_minibatch(phase):
    for end, (k, outside) in {"first": (0, range(4, 12)), "last": (2, range(8))}.items():
        (policy, value), (new_policy, new_value) = phase.outputs[k], phase.outputs[k + 1]
        moved = [squared(policy.output[i : i + 1], new_policy.output[i : i + 1]).item() for i in outside]
        assert phase.tags[f"churn/{end}_step/policy"] == pytest.approx(np.mean(moved), rel=1e-4)
        moved = [(new_value.output[i] - value.output[i]).item() ** 2 for i in outside]
        assert phase.tags[f"churn/{end}_step/value"] == pytest.approx(np.mean(moved), rel=1e-4)


def test_weights_are_measured_layer_by_layer(phase):
    start, end = phase.weights[0], phase.weights[-1]

    def norm(*tensors):
        return math.sqrt(sum(float(x) ** 2 for tensor in tensors for x in tensor.double().flatten()))

    for name in ("actor", "critic"):
        for k, layer in enumerate((f"{name}.hidden.0", f"{name}.hidden.1", f"{name}.output"), 1):
            parts = [f"{layer}.weight", f"{layer}.bias"]
            expected = norm(*(end[x] - start[x] for x in parts)) / norm(*(start[x] for x in parts))
            assert phase.tags[f"optim/{name}/layer{k}/relative_update"] == pytest.approx(expected, rel=1e-5)
        own = [x for x in end if x.startswith(name)]
        assert phase.tags[f"optim/{name}/weight_norm"] == pytest.approx(norm(*(end[x] for x in own)))
        update = norm(*(end[x] - start[x] for x in own))
        assert phase.tags[f"optim/{name}/update_norm"] == pytest.approx(update, rel=1e-5)
        distance = norm(*(end[x] - phase.untrained[x] for x in own))
        assert phase.tags[f"optim/{name}/init_distance"] == pytest.approx(distance, rel=1e-5)
        assert phase.tags[f"optim/{name}/output_weight_norm"] == pytest.approx(norm(end[f"{name}.output.weight"]))
    assert phase.tags["optim/actor/init_distance"] > phase.tags["optim/actor/update_norm"] * 1.01
    assert phase.tags["optim/actor/grad_norm"] == 3 and phase.tags["optim/critic/grad_norm"] == 6


def test_gradients_are_those_of_the_first_step(phase):
    for name, (k, layer) in itertools.product(("actor", "critic"), enumerate(("hidden.0", "hidden.1"), 1)):
        of_units = phase.gradients[f"{name}.{layer}.weight"].abs().flatten(1).mean(1)
        expected = (of_units <= 0.01 * of_units.mean()).float().mean().item()
        found = phase.tags[f"representation/before/{name}/layer{k}/gradient_dormant_fraction"]
        assert found == pytest.approx(expected)


def test_layers_are_told_apart_by_their_outputs(phase):
    """Channels are the units of the convolution: the one without weights has one sign on all samples."""
    assert len(layers_of(phase.agent.actor)) == 3
    for when, outputs in (("before", phase.outputs[0]), ("after", phase.outputs[-1])):
        x = outputs[0].all_preactivations
        for k, units in enumerate((x[:, :12].reshape(12, 3, 4).transpose(1, 2).reshape(-1, 3), x[:, 12:]), 1):
            dead = int((units.relu() == 0).all(0).sum())
            assert phase.tags[f"representation/{when}/actor/layer{k}/dead_units"] == dead
        norm = x[:, :12].norm(dim=1).mean().item()
        assert phase.tags[f"representation/{when}/actor/layer1/preactivation_norm"] == pytest.approx(norm)
        both = (oui(x[:, :12].numpy()) + oui(x[:, 12:].numpy())) / 2
        assert phase.tags[f"representation/{when}/actor/activation_balance"] == pytest.approx(both)


def test_a_phase_that_is_not_diagnosed_computes_nothing():
    agent = Agent()
    agent.forward = None  # would raise
    phase = UpdatePhase(agent, {}, 1, squared, False)
    with phase.step(0, None):
        pass
    assert phase.churn == {}


def test_without_samples_outside_or_untrained_weights_their_measures_are_left_out():
    torch.manual_seed(0)
    agent, batch = Agent(), {"obs": torch.randn(4, 1, 3, 3), "advantages": torch.randn(4)}
    phase = UpdatePhase(agent, batch, 1, squared, True)
    with phase.step(0, batch["advantages"]):
        sum(x.output.sum() for x in agent(batch["obs"])).backward()
    outputs = dict(zip(("actor", "critic"), agent(batch["obs"]), strict=True))
    tags = phase.measures([{"actor_grad_norm": 1.0, "critic_grad_norm": 1.0}], outputs, outputs, "Tanh", None)
    assert not any("churn" in tag or "init_distance" in tag for tag in tags)
    assert tags["optim/actor/update_norm"] == 0


def test_several_agents_have_a_phase_each():
    torch.manual_seed(0)
    modules = [Agent(), Agent()]
    gradients = [[torch.randn_like(p) for p in module.parameters()] for module in modules]
    agents = SimpleNamespace(modules=modules, last_gradients=lambda s: gradients[s])
    batch = {"obs": torch.randn(2, 6, 1, 3, 3), "advantages": torch.randn(2, 6)}
    phases = phases_of(agents, batch, 5, squared, True)
    with steps(phases, 0, batch["advantages"][:, :3], {1}), torch.no_grad():
        for p in modules[1].parameters():
            p.add_(0.1)
    with steps(phases, 2, batch["advantages"][:, :3], {0, 1}):
        pass
    assert phases[0].churn == {} and set(phases[1].churn) == {"churn/first_step/policy", "churn/first_step/value"}
    assert all(x > 0 for x in phases[1].churn.values()) and len(phases[1].dormant) == 4
