"""What an update phase did, by the tag under which it is logged: losses over its minibatches, weights, gradients."""

import contextlib
from functools import partial

import numpy as np
import torch

from common.feature_rank import gradient_dormant_fraction, measures_by_layer

REFERENCE = 256  # samples on which churn is measured


def of_update_phase(logged, num_updates, kl_coef):
    """The losses of an update phase by tag, floats.

    logged: numbers by name of each minibatch that was trained on, of ``num_updates`` that were to be. kl_coef: the
    coefficient of the KL penalty that they were trained with. ``losses/{name}`` is that of the last minibatch, the
    clip fraction the mean over all.
    """
    tags = {}
    for name in logged[0].keys() - {"kl", "actor_grad_norm", "critic_grad_norm"}:
        tags[f"losses/first_minibatch/{name}"] = logged[0][name]
        tags[f"losses/last_minibatch/{name}"] = tags[f"losses/{name}"] = logged[-1][name]
    tags["losses/clipfrac"] = np.mean([of_minibatch["clipfrac"] for of_minibatch in logged])
    tags["losses/early_stop"] = 1 - len(logged) / num_updates
    tags["losses/kl_coef"] = kl_coef
    return tags


def kl_of_last_epoch(logged, num_minibatches):
    """Mean KL over the minibatches of the last epoch, which may have been cut short; an epoch has ``num_minibatches``.

    logged: as for ``of_update_phase``.
    """
    return np.mean([x["kl"] for x in logged[(len(logged) - 1) // num_minibatches * num_minibatches :]])


def flat_weights(network):
    """All parameters of a network as one tensor, a copy."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def layers_of(network):
    """The layers with weights of a network, in order: the hidden ones, and the output's last."""
    return [x for x in network.modules() if isinstance(x, torch.nn.Linear | torch.nn.Conv2d)]


class UpdatePhase:
    """What is measured of an update phase by an agent's weights, and of its first and its last gradient step.

    Nothing is, and nothing computed, unless ``diagnosed``. No weight and no random number changes by it.

    agent: gives, for observations, the outputs of actor and critic, and has ``networks()`` by these names.
    batch: its ``obs`` (B, …) and ``advantages`` (B,). num_updates: gradient steps that the phase is to have.
    policy_kl(before, after): KL divergence (N,) of the policies with the actor's outputs (N, …).
    gradients(): of the agent's parameters in their order, at the last step; by default their ``grad``.
    """

    def __init__(self, agent, batch, num_updates, policy_kl, diagnosed, gradients=None):
        self.agent, self.batch, self.policy_kl = agent, batch, policy_kl
        self.gradients = gradients or (lambda: [p.grad for p in agent.parameters()])
        self.ends = {num_updates - 1: "last", 0: "first"} if diagnosed else {}
        self.churn, self.dormant = {}, {}
        if diagnosed:
            networks = agent.networks().items()
            self.weights = {name: flat_weights(x) for name, x in networks}
            self.layers = {name: [flat_weights(layer) for layer in layers_of(x)] for name, x in networks}

    @contextlib.contextmanager
    def step(self, k, advantages):
        """Encloses gradient step k, from 0, on the minibatch with these ``advantages`` (M,): measures its churn."""
        end = self.ends.get(k)
        if end is None:
            yield
            return
        outside = self._outside(advantages)
        before = self._outputs(outside)
        yield
        if len(outside):
            after = self._outputs(outside)
            self.churn[f"churn/{end}_step/policy"] = self.policy_kl(before[0], after[0]).mean()
            self.churn[f"churn/{end}_step/value"] = (after[1] - before[1]).square().mean()
        if end == "first":
            gradient_of = dict(zip(map(id, self.agent.parameters()), self.gradients(), strict=True))
            for name, network in self.agent.networks().items():
                for i, layer in enumerate(layers_of(network)[:-1], 1):
                    dormant = gradient_dormant_fraction(gradient_of[id(layer.weight)])
                    self.dormant[f"representation/before/{name}/layer{i}/gradient_dormant_fraction"] = dormant

    @contextlib.contextmanager
    def _only_looking(self):
        """Layers that learn from what passes through them, as BatchNorm, don't."""
        was = self.agent.training
        self.agent.eval()
        try:
            yield
        finally:
            self.agent.train(was)

    def _outside(self, advantages):
        """Observations outside the minibatch, which are those with other advantages: REFERENCE or fewer, or none."""
        outside = (~torch.isin(self.batch["advantages"], advantages)).nonzero().squeeze(1)
        last = max(len(outside) - 1, 0)
        chosen = torch.linspace(0, last, min(REFERENCE, len(outside))).long().to(outside.device)
        return self.batch["obs"][outside[chosen]]

    @torch.no_grad()
    def _outputs(self, obs):
        with self._only_looking():
            return [x.output for x in self.agent(obs)] if len(obs) else None

    @torch.no_grad()
    def measures(self, logged, before, after, activation, initial):
        """The measures of weights, gradients, churn and single layers by tag, floats.

        logged: as for ``of_update_phase``. before, after: the NetworkOutput of actor and critic, by these names, at the
        two ends of the phase, with all layers, and the name of their ``activation``. initial: the untrained agent's
        state_dict, or None where it is not known.

        `optim/{network}/grad_norm`: L2 before clipping, mean over the minibatches; `update_norm`, `weight_norm`: L2.
        `optim/{network}/layer{k}/relative_update`: ‖ΔW‖ / ‖W‖ with the bias, W before the phase (Lyle et al. 2024).
        `optim/{network}/init_distance`: ‖θ − θ₀‖ from the untrained weights (Kumar et al. 2023).
        `optim/{network}/output_weight_norm`: Frobenius norm of the output layer's weights.
        `churn/{first,last}_step/{policy,value}`: mean KL divergence, and mean squared change of the value, that the
        step made on samples outside its minibatch (Tang & Berseth 2024, CHAIN; there is no last step where the phase
        ended early). `representation/…/layer{k}/…`: as `measures_by_layer`, and `gradient_dormant_fraction` of the
        first minibatch.
        """
        tags, shapes = {**self.churn, **self.dormant}, self._shapes()
        names = {id(p): name for name, p in self.agent.named_parameters()}
        for name, network in self.agent.networks().items():
            optim, layers, weights = f"optim/{name}", layers_of(network), flat_weights(network)
            tags[f"{optim}/grad_norm"] = np.mean([of_minibatch[f"{name}_grad_norm"] for of_minibatch in logged])
            tags[f"{optim}/update_norm"] = (weights - self.weights[name]).norm()
            tags[f"{optim}/weight_norm"] = weights.norm()
            tags[f"{optim}/output_weight_norm"] = layers[-1].weight.norm()
            for k, (layer, was) in enumerate(zip(layers, self.layers[name], strict=True), 1):
                tags[f"{optim}/layer{k}/relative_update"] = (flat_weights(layer) - was).norm() / was.norm()
            if initial is not None:
                start = torch.cat([initial[names[id(p)]].to(p).flatten() for p in network.parameters()])
                tags[f"{optim}/init_distance"] = (weights - start).norm()
            for when, outputs in (("before", before), ("after", after)):
                of_layers = measures_by_layer(outputs[name], shapes[name], activation)
                tags |= {f"representation/{when}/{name}/{measure}": x for measure, x in of_layers.items()}
        return {tag: float(x) for tag, x in tags.items()}

    def _shapes(self):
        """Those of the hidden layers' outputs for one observation, by network."""
        shapes, hooks = {}, []
        for name, network in self.agent.networks().items():
            shapes[name] = []
            for layer in layers_of(network)[:-1]:
                put = lambda layer, x, y, found=shapes[name]: found.append(tuple(y.shape[1:]))  # noqa: E731
                hooks.append(layer.register_forward_hook(put))
        with self._only_looking():
            self.agent(self.batch["obs"][:1])
        for hook in hooks:
            hook.remove()
        return shapes


def phases_of(agents, batch, num_updates, policy_kl, diagnosed):
    """The UpdatePhase of each of ``agents``, a Batch of S; ``batch`` holds tensors (S, B, …)."""
    phases = []
    for s, agent in enumerate(agents.modules):
        own = {name: batch[name][s] for name in ("obs", "advantages")}
        phases.append(UpdatePhase(agent, own, num_updates, policy_kl, diagnosed, partial(agents.last_gradients, s)))
    return phases


@contextlib.contextmanager
def steps(phases, k, advantages, learning):
    """Encloses step k of several UpdatePhases, which those in ``learning`` take; ``advantages`` is (S, M)."""
    if k not in phases[0].ends:
        yield
        return
    with contextlib.ExitStack() as stack:
        for s in learning:
            stack.enter_context(phases[s].step(k, advantages[s]))
        yield


def to_be_finite(losses, logged, networks):
    """Lists of numbers by what they are, of which a training can't go on if one is not finite.

    losses: names in ``logged``; logged, networks: as above. The weights are the largest of each network, without sign.
    """
    numbers = {name: [of_minibatch[name] for of_minibatch in logged if name in of_minibatch] for name in losses}
    numbers |= {f"{name}'s weight": [flat_weights(x).abs().max().item()] for name, x in networks.items()}
    return numbers | {f"{name}'s gradient norm": [x[f"{name}_grad_norm"] for x in logged] for name in networks}


def numbers_of_each(logged):
    """What was logged of each seed's minibatches, dicts of tensors (S,) by name, as dicts of numbers, by one transfer.

    A seed that stopped early has fewer, and the first of them are the others' too.
    """
    longest = max(logged, key=len)
    numbers = torch.stack([x for stats in longest for x in stats.values()]).T.tolist()
    of_each = []
    for of_seed, row in zip(logged, map(iter, numbers), strict=True):
        of_each.append([{name: next(row) for name in stats} for stats in of_seed])
    return of_each
