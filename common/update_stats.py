"""What an update phase did, by the tag under which it is logged: losses over its minibatches, weights, gradients."""

import numpy as np
import torch


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


def of_weights(networks, before, logged):
    """Gradients and weights of ``networks``, modules by name, by tag: floats, L2 norms.

    before: the ``flat_weights`` of each before the update phase. logged: as for ``of_update_phase``; the gradient norm
    is that before clipping, the mean over the minibatches.
    """
    tags = {}
    for name, network in networks.items():
        weights = flat_weights(network)
        tags[f"optim/{name}/grad_norm"] = np.mean([of_minibatch[f"{name}_grad_norm"] for of_minibatch in logged])
        tags[f"optim/{name}/update_norm"] = (weights - before[name]).norm().item()
        tags[f"optim/{name}/weight_norm"] = weights.norm().item()
    return tags


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
