# PPO and Proximal Feature Optimization (PFO) on MuJoCo, from "No Representation, No Trust" (NeurIPS 2024,
# arXiv 2405.00662). Separate actor and critic, a tanh-squashed normal policy; the defaults are the paper's.
# the paper's baseline, and the collapse that more epochs bring
#   python ppo_mujoco.py --env-id Hopper-v4
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20
# PFO on the last and on all hidden layers, and with ReLU
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --pfo-coef 1.0
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --pfo-coef 1.0 --pfo-layers all
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --pfo-coef 10.0 --activation ReLU
# the other interventions
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --reset-optimizer
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --share-features
# many seeds as one batch, each a run of its own
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --seeds 25 7 64 27 4
import contextlib
import ctypes
import itertools
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

with contextlib.suppress(OSError):
    ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)  # envpool renders MuJoCo with it, if it is loaded before

import envpool
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from envpool.mujoco.gym import registration
from torch import Tensor

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which python -P leaves out

from common.arguments import Range, RunArgs, check_run_args, fail, nearest, of_each_seed, usable_cores
from common.batch import Batch, Optimizers
from common.evaluation import can_render, play
from common.feature_rank import deltas, layer_measures, policy_variance
from common.replay import Differentiate, Reads, Replay, compiled
from common.run import Run, Runs, check_shapes, find_checkpoints, parse_args, prepare, random_states, restore
from common.trust_region import feature_drifts, normal_kl, of_normals, ratio_stats
from common.update_stats import kl_of_last_epoch, numbers_of_each, of_update_phase, phases_of, steps, to_be_finite


@dataclass
class Args(RunArgs):
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of this experiment, part of the run's name"""
    seeds: Annotated[tuple[int, ...], Range(0, 2**31 - 1)] = ()
    """train these seeds as one batch, each as a run of its own, in a fraction of the time of separate runs"""
    record: bool = True
    """on a CPU, record the operations of acting and of a gradient, and replay them without Python; each recording is
    checked against the plain code, which runs alone with --no-record"""
    torch_threads: Annotated[int, Range(0, 1024)] = 0
    """threads of PyTorch on a CPU; 0 is one for networks that are too small to share, else PyTorch's own number"""

    # Checkpoints
    resume: tuple[str, ...] = ()
    """go on with the run in this folder, or with those of --seeds, a folder for each (flags left out are as they were),
    or auto: the newest unfinished run in runs/ of the same arguments, else a new one; environments begin new episodes,
    and --total-timesteps may grow"""

    # Environment
    env_id: str = "Hopper-v4"
    """one of Gymnasium's MuJoCo tasks in envpool: Hopper, HalfCheetah, Ant, Humanoid, … v4 (the paper) or v5"""
    obs_norm_steps: Annotated[int, Range(2, 10**7)] = 2000
    """uniformly random steps of each environment that the fixed mean and std of the observations are taken from"""

    # Algorithm
    total_timesteps: Annotated[int, Range(1, 10**12)] = 5_000_000
    """length of the run in environment steps, floored to whole rollouts"""
    learning_rate: Annotated[float, Range(above=0, high=1e6)] = 3e-4
    """Adam's learning rate, constant unless annealed"""
    anneal_lr: bool = False
    """anneal the learning rate linearly to 0, rollout by rollout"""
    cosine_lr: bool = False
    """anneal the learning rate to 0 along a half cosine"""
    num_envs: Annotated[int, Range(1, 1024)] = 2
    """environments stepped in parallel"""
    num_steps: Annotated[int, Range(1, 100_000)] = 1024
    """steps of each environment in a rollout"""
    minibatch_size: Annotated[int, Range(1, 100_000)] = 64
    """transitions in a minibatch; must divide num_envs x num_steps"""
    update_epochs: Annotated[int, Range(1, 100_000)] = 10
    """passes over each rollout, the paper's knob of non-stationarity: 10, 15 and 20"""
    gamma: Annotated[float, Range(0, 1)] = 0.99
    """discount"""
    gae_lambda: Annotated[float, Range(0, 1)] = 0.95
    """lambda of the generalised advantage estimate"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: Annotated[float, Range(above=0, high=1e6)] = 0.2
    """epsilon: ratios beyond 1 - epsilon and 1 + epsilon give no further gradient"""
    clip_objective: bool = True
    """PPO's clipped objective; off is the plain surrogate, to go with --kl-coef or --target-kl"""
    clip_vloss: bool = False
    """clip the value's change to clip_coef as well (CleanRL: on)"""
    ent_coef: Annotated[float, Range(0, 1e6)] = 0.0
    """coefficient of the entropy bonus; the entropy is estimated from one sample of each state"""
    vf_coef: Annotated[float, Range(0, 1e6)] = 1.0
    """coefficient of the value loss, which is 0.5 x mean squared error (CleanRL: 0.5)"""
    max_grad_norm: Annotated[float, Range(above=0, high=1e6)] = 0.5
    """gradient norm to which the actor and the critic are clipped, each on its own, or all of it with a shared trunk"""
    adam_eps: Annotated[float, Range(above=0, high=1e6)] = 1e-8
    """Adam's epsilon (CleanRL: 1e-5)"""
    hidden_sizes: Annotated[tuple[int, ...], Range(1, 100_000)] = (64, 64)
    """units of each hidden layer"""
    activation: Literal["ReLU", "GELU", "LeakyReLU", "Tanh"] = "Tanh"
    """activation of the hidden layers; the paper has runs with Tanh and with ReLU"""
    layer_init: Literal["pytorch", "orthogonal"] = "pytorch"
    """initial weights: PyTorch's default or CleanRL's orthogonal ones"""

    # Interventions
    share_features: bool = False
    """actor and critic share their hidden layers, in one optimizer (the paper's code steps them in both)"""
    pfo_coef: Annotated[float, Range(0, 1e6)] = 0.0
    """coefficient of PFO on the actor (the paper: 1 with Tanh, 10 with ReLU), 0 is plain PPO"""
    pfo_layers: Literal["last", "all"] = "last"
    """hold the last hidden layer, or all hidden layers concatenated"""
    pfo_on: Literal["preactivations", "features"] = "preactivations"
    """hold the layer before or after its activation; features exist for the last layer alone"""
    pfo_distance: Literal["l2", "cosine"] = "l2"
    """mean squared difference, or the negative cosine similarity, to what the rollout recorded"""
    pfo_mode: Literal["regularize", "clip"] = "regularize"
    """regularize adds the distance to the loss; clip drops the policy gradient of samples out of trust instead, at any
    coefficient above 0"""
    pfo_limit: Annotated[float, Range(above=0, high=1e6)] = 0.1
    """a sample is out of trust if the held layer's l2 distance exceeds this, or its cosine is below 1 minus this"""
    critic_pfo_coef: Annotated[float, Range(0, 1e6)] = 0.0
    """coefficient of PFO on the critic; 0 leaves the critic alone, as the paper does"""
    reset_optimizer: bool = False
    """forget Adam's moments after each rollout"""
    adam_beta1: Annotated[float, Range(0, below=1)] = 0.9
    """Adam's decay of the first moment"""
    adam_beta2: Annotated[float, Range(0, below=1)] = 0.999
    """Adam's decay of the second moment; the paper's intervention is 0.9"""
    kl_coef: Annotated[float, Range(0, 1e6)] = 0.0
    """initial coefficient of an adaptive KL penalty, 0 is none (the paper's code: 1, with --no-clip-objective)"""
    kl_target: Annotated[float, Range(above=0, high=1e6)] = 0.01
    """the penalty doubles where the last epoch's mean KL exceeds 1.5 x this, and halves where it is below this / 1.5"""
    target_kl: Annotated[float, Range(0, 1e6)] = 0.0
    """end an update phase after the first minibatch whose KL exceeds this, 0 is never (the paper's code: 0.01)"""


def check_args(args):
    """Refuse what can't run before anything is started, and fill in what follows from the arguments."""
    check_run_args(args)
    tasks = [f"{task}-{version}" for task, versions, _ in registration.gym_mujoco_envs for version in versions]
    if args.env_id not in tasks:
        some = nearest(args.env_id, tasks) or "Hopper-v4, Ant-v4, Humanoid-v4"
        fail(f"--env-id {args.env_id}: must be one of Gymnasium's {len(tasks)} MuJoCo tasks; nearest: {some}")
    if len({*args.seeds}) < len(args.seeds):
        fail(f"--seeds {' '.join(map(str, args.seeds))}: must be different numbers")
    if args.seeds and args.seed not in (Args.seed, *args.seeds):
        fail(f"--seed {args.seed}: must not go with --seeds; they are all the seeds there are")
    number = len(args.seeds or (args.seed,))
    if args.resume and args.resume != ("auto",) and len(args.resume) != number:
        fail(f"--resume {' '.join(args.resume)}: must be auto, or a run's folder for each of {number} seeds")
    if not args.hidden_sizes:
        fail("--hidden-sizes: must be one number or more")
    if args.pfo_layers == "all" and args.pfo_on == "features":
        fail("--pfo-layers all: must go with --pfo-on preactivations; all layers after activation do not exist")


def make_envs(args, num_envs, seeds, **kwargs):
    """``num_envs`` simulations in this process, each with its own seed."""
    if "post_constraint" in envpool.make_spec(args.env_id).config._fields:
        kwargs["post_constraint"] = True  # contact forces as in Gymnasium; envpool's own default leaves them 0
    kwargs["num_threads"] = min(num_envs, usable_cores())  # envpool counts cores that this process may not use
    return envpool.make(args.env_id, env_type="gymnasium", num_envs=num_envs, seed=seeds, **kwargs)


class Normalizer(NamedTuple):
    """The fixed transformation of observations, known before training and kept with every checkpoint."""

    mean: np.ndarray  # (D,) float64
    std: np.ndarray  # (D,) float64, unbiased
    time_limit: int  # steps of an episode

    def __call__(self, obs, elapsed):
        """(N, D) observations, ``elapsed`` (N,) steps into their episodes: (N, D + 1) float32, the time feature last.

        A dimension that was constant in the random steps is divided by 1e-6, not by its std of 0.
        """
        x = np.empty((len(obs), obs.shape[1] + 1), dtype=np.float32)
        x[:, :-1] = (obs - self.mean) / np.maximum(self.std, 1e-6)
        x[:, -1] = 2 * elapsed / self.time_limit - 1
        return torch.from_numpy(x)

    def state_dict(self):
        mean, std = torch.from_numpy(self.mean), torch.from_numpy(self.std)
        return {"mean": mean, "std": std, "time_limit": self.time_limit}

    @classmethod
    def load(cls, state):
        return cls(state["mean"].numpy(), state["std"].numpy(), state["time_limit"])


def random_statistics(args, seeds, rng):
    """The Normalizer of ``args.obs_norm_steps`` uniformly random steps in an environment for each of ``seeds``."""
    envs = make_envs(args, len(seeds), seeds)
    low, high = envs.action_space.low, envs.action_space.high
    obs, seen = envs.reset()[0], []
    for _ in range(args.obs_norm_steps):
        seen.append(obs.copy())
        obs, _, terminated, truncated, _ = envs.step(rng.uniform(low, high, (len(seeds), *low.shape)))
        ended = np.flatnonzero(terminated | truncated).astype(np.int32)
        if ended.size:
            obs[ended] = envs.step(np.zeros((ended.size, *low.shape)), ended)[0]
    time_limit = envs.spec.config.max_episode_steps
    envs.close()
    seen = np.concatenate(seen)
    return Normalizer(seen.mean(0), seen.std(0, ddof=1), time_limit)


class NetworkOutput(NamedTuple):
    """What a forward pass gives: the output, and the hidden layers for the diagnostics and PFO."""

    output: Tensor  # (N, num_outputs) loc and raw scale, or value
    features: Tensor  # (N, 64 units) last hidden layer after its activation
    preactivations: Tensor  # (N, 64 units) the same before its activation
    all_preactivations: Tensor | None  # (N, 128 units) of all hidden layers; None unless asked for

    def map(self, function):
        return NetworkOutput(*(None if x is None else function(x) for x in self))


def init_layer(layer, std, args):
    if args.layer_init == "orthogonal":
        nn.init.orthogonal_(layer.weight, std)
        nn.init.zeros_(layer.bias)
    return layer


class Network(nn.Module):
    """A perceptron with ``args.hidden_sizes``."""

    def __init__(self, num_inputs, num_outputs, output_std, args):
        super().__init__()
        sizes = (num_inputs, *args.hidden_sizes)
        self.hidden = nn.ModuleList(
            init_layer(nn.Linear(*size), math.sqrt(2), args) for size in itertools.pairwise(sizes)
        )
        self.output = init_layer(nn.Linear(sizes[-1], num_outputs), output_std, args)
        self.activation = getattr(nn, args.activation)()

    def forward(self, x, all_layers):  # (N, num_inputs), normalised
        preactivations = []
        for layer in self.hidden:
            preactivations.append(layer(x))
            x = self.activation(preactivations[-1])
        everything = torch.cat(preactivations, dim=1) if all_layers else None
        return NetworkOutput(self.output(x), x, preactivations[-1], everything)


class Agent(nn.Module):
    """Actor and critic, two networks that share nothing, or their hidden layers with ``--share-features``.

    action_low, action_high: (A,) ends of the box of actions.
    """

    def __init__(self, obs_dim, action_low, action_high, args):
        super().__init__()
        half_width = torch.as_tensor((action_high - action_low) / 2, dtype=torch.float32)
        self.register_buffer("half_width", half_width)
        self.actor = Network(obs_dim + 1, 2 * len(half_width), 0.01, args)  # and the time feature
        self.critic = Network(obs_dim + 1, 1, 1.0, args)
        self.share_features = args.share_features
        if args.share_features:
            self.critic.hidden = self.actor.hidden

    def networks(self):
        return {"actor": self.actor, "critic": self.critic}

    def parts(self):
        """What has a gradient clip and an optimizer of its own."""
        return [self] if self.share_features else [self.actor, self.critic]

    def policy(self, obs, all_layers=False):
        return self.actor(obs, all_layers)

    def value(self, obs, all_layers=False):
        return self.critic(obs, all_layers)

    def forward(self, obs, all_layers=False):
        actor = self.actor(obs, all_layers)
        if self.share_features:
            return actor, actor._replace(output=self.critic.output(actor.features))
        return actor, self.critic(obs, all_layers)


def loc_and_scale(output):
    """Parameters of the normal under the tanh, (…, A) each, from the actor's output (…, 2A)."""
    loc, raw = output.chunk(2, dim=-1)
    return loc, F.softplus(raw + math.log(math.expm1(0.99))) + 0.01  # raw 0 is scale 1


def policy_kl(output, other):
    """KL divergence (N,) of the policies with these outputs of the actor, (N, 2A) each."""
    return normal_kl(*loc_and_scale(output), *loc_and_scale(other))


def squash(z):
    """tanh z, held off the ends of the box, where ``unsquash`` would be infinite."""
    return z.tanh().clamp(-1 + 1e-6, 1 - 1e-6)


def unsquash(u):
    """The z of ``squash``: atanh u, finite."""
    return u.clamp(-1 + 1e-6, 1 - 1e-6).atanh()


def normal_log_prob(z, loc, scale):
    """Log-density (…,) of a diagonal normal, summed over the last dimension."""
    return -(0.5 * ((z - loc) / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def log_det_squash(z, half_width):
    """Log-determinant (…,) of ``z -> tanh(z) * half_width``; log π(a) is the normal's log-density at z minus it."""
    return (2 * (math.log(2) - z - F.softplus(-2 * z)) + half_width.log()).sum(-1)


def entropy_estimate(loc, scale, noise, half_width):
    """Estimate (…,) of the policy's entropy from the one action that ``noise`` (…, A) makes; it has no closed form."""
    z = torch.addcmul(loc, scale, noise)
    return log_det_squash(z, half_width) - normal_log_prob(z, loc, scale)


def sample(output, noise):
    """Actions (N, A) in (-1, 1) of the policy with ``output`` (N, 2A), made of ``noise`` (N, A), standard normal."""
    loc, scale = loc_and_scale(output)
    return squash(torch.addcmul(loc, scale, noise))


def act(agent, obs, noise):
    """Actions (N, A) of the agent's policy for observations (N, D + 1)."""
    return sample(agent.policy(obs).output, noise)


def choose(agent, normalizer, box, obs, elapsed, greedy, generator):
    """Actions (N, A), NumPy, in the ``box`` of low and high, for observations (N, D) in an evaluation, sampled or
    ``greedy``, the normal's loc."""
    low, high = box
    loc, scale = loc_and_scale(agent.policy(normalizer(obs, elapsed).to(generator.device)).output)
    noise = torch.empty_like(loc).normal_(generator=generator)
    actions = squash(loc if greedy else torch.addcmul(loc, scale, noise))
    return actions.cpu().numpy() * ((high - low) / 2) + (high + low) / 2


def by_seed(x, num_seeds):
    """What the rollout made in all environments, (num_steps, S * num_envs, …), as (S, num_steps * num_envs, …)."""
    return x.unflatten(1, (num_seeds, -1)).transpose(0, 1).flatten(1, 2)


class Rollout(NamedTuple):
    """What a rollout recorded, (num_steps, num_envs, …) each; every transition is one that an environment made."""

    actions: Tensor  # (…, A) in [-1, 1], before they are stretched to the action box
    rewards: Tensor
    dones: Tensor  # 1 where the step ended an episode, by a time limit too


@np.errstate(all="ignore")  # what is not finite ends the run with a message of its own
def rollout(envs, act, normalizer, obs, noise, running):
    """Step each environment ``len(noise)`` times from ``obs[0]`` on; returns a Rollout and the episodes that ended.

    envs: a synchronous envpool. ``act(obs, noise)`` gives actions in (-1, 1), as ``sample`` does, in a tuple.
    obs: (num_steps + 1, num_envs, D + 1) normalised, on the training device, filled from index 1.
    noise: (num_steps, num_envs, A) standard normal, from which the actions are made.
    running: (2, num_envs) return and length so far of the episodes in progress, carried on from rollout to rollout.
    The episodes that ended: tuples of the environment, its steps into the rollout, return and length.
    """
    num_steps, num_envs, action_dim = noise.shape
    low, high = envs.action_space.low, envs.action_space.high
    half_width, midpoint = (high - low) / 2, (high + low) / 2
    rewards, dones = np.zeros((2, num_steps, num_envs), dtype=np.float32)
    actions, episodes = torch.empty_like(noise), []
    for step, (seen, following, random, action) in enumerate(zip(obs[:-1], obs[1:], noise, actions, strict=True)):
        action.copy_(act(seen, random)[0])  # a CUDA graph writes its next results over these
        next_obs, rewards[step], terminated, truncated, _ = envs.step(action.cpu().numpy() * half_width + midpoint)
        dones[step] = done = terminated | truncated
        running[0] += rewards[step]
        running[1] += 1

        # envpool spends the next step of an ended environment on its reset: no action, no reward, a new episode's
        # first observation. Spent here and now, it stays out of the rollout.
        if done.any():
            ended = np.flatnonzero(done).astype(np.int32)
            episodes += [(i, step + 1, running[0, i], running[1, i]) for i in ended]
            running[:, ended] = 0
            lost = 0 * next_obs[ended].sum(1, keepdims=True)  # keeps a NaN that the reset would write over
            next_obs[ended] = envs.step(np.zeros((ended.size, action_dim)), ended)[0] + lost
        following.copy_(normalizer(next_obs, running[1]))
    rewards, dones = (torch.from_numpy(x).to(obs.device) for x in (rewards, dones))
    return Rollout(actions, rewards, dones), episodes


def not_finite(transitions, obs, num_envs):
    """Seeds whose rollout has a number that is not finite, and what that is: the earliest first.

    Of one step, the first in the order of cause and effect.
    """
    made = {"action": transitions.actions, "observation": obs[1:], "reward": transitions.rewards}
    broken = []
    for name, x in made.items():
        which = (~x.isfinite()).view(*x.shape[:2], -1).any(-1)
        broken += [(step, i, name) for step, i in which.nonzero().tolist()]
    for step, i, name in sorted(broken, key=lambda at: at[0]):
        where = f"environment {i % num_envs} in step {step + 1} of the rollout"
        yield i // num_envs, f"the {name} of {where} is not finite"


def gae(rewards, values, next_values, dones, gamma, gae_lambda):
    """Generalised advantage estimate (Schulman et al. 2016): advantages and returns, (num_steps, num_envs).

    All arguments have that shape. Nothing is bootstrapped past a ``done``: a time limit is a termination.
    """
    deltas = rewards + gamma * next_values * (1 - dones) - values
    decays = gamma * gae_lambda * (1 - dones)
    advantages = [torch.zeros_like(values[0])]
    for delta, decay in zip(deltas.flip(0).unbind(), decays.flip(0).unbind(), strict=True):
        advantages.append(torch.addcmul(delta, decay, advantages[-1]))
    advantages = torch.stack(advantages[:0:-1])
    return advantages, advantages + values


def pfo_input(network, layers, on):
    """The layer of a NetworkOutput that PFO holds, (N, D)."""
    if on == "features":
        return network.features
    return network.all_preactivations if layers == "all" else network.preactivations


def feature_distance(new, old, distance, limit):
    """Distance of each sample's features from ``old``, (N,), and which samples are out of trust, (N,) bool."""
    if distance == "l2":
        apart = (new - old).square().mean(-1)
        return apart, apart > limit
    cosine = F.cosine_similarity(new, old, dim=-1)
    return -cosine, cosine < 1 - limit


def actor_loss(output, held, mb, half_width, kl_coef, args, everything=True):
    """The actor's loss on a minibatch, and what is logged of it by name.

    output: (N, 2A) of the current policy; held: (N, D) its layer that PFO holds; half_width: (A,) of the action box;
    kl_coef: tensor.
    mb: the minibatch's z (the actions before the tanh), logprobs, loc, scale, advantages and actor_held, as the rollout
    recorded them, and noise (N, A), standard normal, for the entropy. Log-probabilities are the normals': what tanh and
    box add is the same for every policy, and cancels in the ratio. Not ``everything`` is less to log, and faster.
    """
    loc, scale = loc_and_scale(output)
    logratio = normal_log_prob(mb["z"], loc, scale) - mb["logprobs"]
    logratio = logratio.clamp(math.log(1e-7), math.log(1e9))
    ratio = logratio.exp()
    mb_advantages = mb["advantages"]
    if args.norm_adv:
        mb_advantages = mb_advantages - mb_advantages.mean()
        mb_advantages = mb_advantages / mb_advantages.std(correction=0).clamp(min=1e-6)

    pg_loss = -mb_advantages * ratio
    if args.clip_objective:
        pg_loss = torch.max(pg_loss, -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))

    logged = {"clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean()}
    if everything:
        logged |= {"old_approx_kl": -logratio.mean(), "approx_kl": (ratio - 1 - logratio).mean()}

    # PFO (section 5): the features may not move far from where they were during the rollout.
    if args.pfo_coef or everything:
        distance, out_of_trust = feature_distance(held, mb["actor_held"], args.pfo_distance, args.pfo_limit)
        logged |= {"pfo_actor": distance.mean(), "pfo_out_of_trust": out_of_trust.float().mean()}
    if args.pfo_coef and args.pfo_mode == "clip":
        pg_loss = torch.where(out_of_trust, pg_loss.detach(), pg_loss)
    loss = logged["policy_loss"] = pg_loss.mean()
    if args.pfo_coef and args.pfo_mode == "regularize":
        loss = loss + args.pfo_coef * logged["pfo_actor"]

    if args.ent_coef or everything:
        logged["entropy"] = entropy_estimate(loc, scale, mb["noise"], half_width).mean()
    if args.ent_coef:
        loss = loss - args.ent_coef * logged["entropy"]
    if args.kl_coef or everything:
        logged["kl"] = normal_kl(mb["loc"], mb["scale"], loc, scale).mean()
    if args.kl_coef:
        loss = loss + kl_coef * logged["kl"]
    return loss, logged


def critic_loss(newvalue, held, mb, args, everything=True):
    """The critic's loss on a minibatch, and what is logged of it by name.

    newvalue: (N,) of the current critic; held: (N, D) its layer that PFO holds.
    mb: the minibatch's returns, values and critic_held, as computed before the update phase.
    """
    v_loss = (newvalue - mb["returns"]).square()
    if args.clip_vloss:
        v_clipped = mb["values"] + (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - mb["returns"]).square())

    logged = {}
    if args.critic_pfo_coef or everything:
        distance, out_of_trust = feature_distance(held, mb["critic_held"], args.pfo_distance, args.pfo_limit)
        logged["pfo_critic"] = distance.mean()
    if args.critic_pfo_coef and args.pfo_mode == "clip":
        v_loss = torch.where(out_of_trust, v_loss.detach(), v_loss)
    logged["value_loss"] = 0.5 * v_loss.mean()
    loss = args.vf_coef * logged["value_loss"]
    if args.critic_pfo_coef and args.pfo_mode == "regularize":
        loss = loss + args.critic_pfo_coef * logged["pfo_critic"]
    return loss, logged


def losses(agent, mb, kl_coef, args, everything=True):
    """The sum of both losses on a minibatch, and what is logged of them by name."""
    policy, value = agent(mb["obs"], args.pfo_layers == "all")
    held = pfo_input(policy, args.pfo_layers, args.pfo_on)
    critic_held = pfo_input(value, args.pfo_layers, args.pfo_on)
    a_loss, a_logged = actor_loss(policy.output, held, mb, agent.half_width, kl_coef, args, everything)
    c_loss, c_logged = critic_loss(value.output.squeeze(-1), critic_held, mb, args, everything)
    return a_loss + c_loss, {name: x.detach() for name, x in {**a_logged, **c_logged}.items()}


def gradients(together, losses_of_each, mb, kl_coef, args):
    """Clipped gradients of each seed's losses on its minibatch, in a row for each, and what is logged, by name.

    together: a Batch of S. losses_of_each(mb, kl_coef): those of each, of tensors (S, …).
    """
    loss, logged = losses_of_each(mb, kl_coef)
    row = together.flat(together.gradients(loss))
    parts = [row[:, columns] for columns in together.columns(Agent.parts)]
    norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts])
    for part, norm in zip(parts, (args.max_grad_norm / (norms + 1e-6)).clamp(max=1).unsqueeze(2), strict=True):
        part.mul_(norm)
    return row, logged | {"actor_grad_norm": norms[0], "critic_grad_norm": norms[-1]}


def make_optimizers(agent, args):
    """An Adam for each part of the agent."""
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps, "fused": True}
    return tuple(torch.optim.Adam(part.parameters(), **adam) for part in agent.parts())


def shuffled(batch, epochs, minibatch_size, generators, learning):
    """Minibatches of the tensors (S, B, …) in ``batch``, in an order of each epoch, with noise for the entropy.

    The seeds that are not in ``learning`` draw no random numbers, as a separate run that has stopped early.
    """
    z = batch["z"]
    num_seeds, batch_size = z.shape[:2]
    for _ in range(epochs):
        order = torch.arange(num_seeds * batch_size, device=z.device).view(num_seeds, batch_size)
        noise = torch.zeros_like(z)
        for s in learning:
            order[s] = s * batch_size + torch.randperm(batch_size, generator=generators[s], device=z.device)
            noise[s] = torch.randn(z.shape[1:], generator=generators[s], device=z.device)
        order = order.flatten()
        parts = {name: x.flatten(0, 1).index_select(0, order).view_as(x) for name, x in batch.items()}
        parts = {name: x.split(minibatch_size, dim=1) for name, x in (parts | {"noise": noise}).items()}
        for mb in zip(*parts.values(), strict=True):
            yield dict(zip(parts, mb, strict=True))


class Learner:
    """What one seed has for itself, made with the random numbers that its run alone would draw."""

    def __init__(self, args, checkpoint, device):
        torch.manual_seed(args.seed)
        self.rng = np.random.default_rng(args.seed)
        if checkpoint:
            self.rng.bit_generator.state = checkpoint["random_states"]["numpy"]  # for new seeds of envs
        self.env_seeds = self.rng.integers(2**31, size=args.num_envs).tolist()
        spaces = envpool.make_spec(args.env_id)
        if not spaces.observation_space.shape:
            why = "its observations must be vectors; they are a dict, as all of dm_control's are"
            fail(f"--env-id {args.env_id}: {why}")
        self.box = spaces.action_space.low, spaces.action_space.high
        self.obs_dim = spaces.observation_space.shape[0]
        if checkpoint:
            check_shapes(checkpoint, Agent, self.obs_dim, *self.box, args)
            self.normalizer = Normalizer(np.zeros(self.obs_dim), np.zeros(self.obs_dim), 0)  # to be restored
        else:
            norm_seeds = self.rng.integers(2**31, size=args.num_envs).tolist()
            self.normalizer = random_statistics(args, norm_seeds, self.rng)
        self.agent = Agent(self.obs_dim, *self.box, args).to(device)
        self.optimizers = make_optimizers(self.agent, args)
        if checkpoint:
            restore(checkpoint, self.agent, self.optimizers, device, normalizer=self.normalizer.state_dict())
            self.normalizer = Normalizer.load(checkpoint["normalizer"])
        self.states_of_start = random_states(device)
        self.generator = torch.Generator(device)
        self.generator.set_state(self.states_of_start[device.type])

    def state(self, kl_coef):
        """What a checkpoint holds of the seed."""
        own = {self.generator.device.type: self.generator.get_state(), "numpy": self.rng.bit_generator.state}
        return {
            "script": os.path.basename(__file__),
            "agent": self.agent.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "kl_coef": kl_coef.item(),
            "normalizer": self.normalizer.state_dict(),
            "obs_dim": self.obs_dim,
            "action_low": torch.from_numpy(self.box[0]),
            "action_high": torch.from_numpy(self.box[1]),
            "random_states": {**self.states_of_start, **own},
        }


def set_threads(args):
    """Give PyTorch ``--torch-threads`` on a CPU, by default one where a layer's product is too small to be shared."""
    largest = max(math.prod(sizes) for sizes in itertools.pairwise((64, *args.hidden_sizes)))
    small = args.minibatch_size * largest < 2**22
    torch.set_num_threads(args.torch_threads or (1 if small else torch.get_num_threads()))


def learning_rate(iteration, args):
    """The learning rate of an iteration, counted from 1."""
    left = 1 - (iteration - 1) / args.num_iterations
    if args.cosine_lr:
        return args.learning_rate * (1 - math.cos(math.pi * left)) / 2
    return args.learning_rate * (left if args.anneal_lr else 1)


def adapted_kl_coef(kl_coef, kl, args):
    """The KL penalty's coefficient after an update phase whose last epoch had the mean KL ``kl``.

    It stays within 1e-6 and 1e6: beyond, a float would vanish or overflow in a long run and never come back.
    """
    factor = 2 if kl > 1.5 * args.kl_target else 0.5 if kl < args.kl_target / 1.5 else 1
    return min(max(kl_coef * factor, 1e-6), 1e6)


def diagnose(before, after, z, noise, half_width, args):
    """The representation and trust region measures of a rollout, by tag.

    before, after: the NetworkOutput of actor and critic, by these names, for the rollout's N transitions at the two
    ends of the update phase, with all layers. z: (N, A) the actions before the tanh. noise: (N, A), from which they
    were made; both entropies are estimated with it, so that the change owes nothing to another draw.
    """
    tags = {}
    loc, scale = loc_and_scale(before["actor"].output)
    new_loc, new_scale = loc_and_scale(after["actor"].output)
    for when, networks in (("before", before), ("after", after)):
        parameters, value = loc_and_scale(networks["actor"].output), networks["critic"].output
        tags[f"representation/{when}/policy_variance"] = policy_variance(*parameters)
        tags[f"representation/{when}/entropy"] = entropy_estimate(*parameters, noise, half_width).mean()
        tags[f"representation/{when}/value_mean"] = value.mean()
        tags[f"representation/{when}/value_std"] = value.std()
        for name, network in networks.items():
            measures = layer_measures(network, args.activation)
            tags.update({f"representation/{when}/{name}/{measure}": x for measure, x in measures.items()})
    tags |= deltas(tags)

    logratio = normal_log_prob(z, new_loc, new_scale) - normal_log_prob(z, loc, scale)
    tags.update({f"trust_region/{name}": x for name, x in ratio_stats(logratio, args.clip_coef).items()})
    tags["trust_region/kl"] = normal_kl(loc, scale, new_loc, new_scale).mean()
    tags |= of_normals((loc, scale), (new_loc, new_scale))
    for name in ("actor", "critic"):
        drifts = feature_drifts(before[name], after[name])
        tags.update({f"trust_region/{name}_{measure}": x for measure, x in drifts.items()})
    return {tag: float(x) for tag, x in tags.items()}


def make_runs(args_of_seeds, learners, checkpoints, kl_coef, device):
    """The run of each seed, with its folder."""
    args, runs = args_of_seeds[0], Runs([])
    film = args.capture_video and can_render(args.env_id)
    for s, (of_seed, learner, checkpoint) in enumerate(zip(args_of_seeds, learners, checkpoints, strict=True)):
        policy = partial(choose, learner.agent, learner.normalizer, learner.box)
        evaluation = partial(play, partial(make_envs, of_seed), policy, device, 50)
        runs.add(Run(of_seed, partial(learner.state, kl_coef[s]), checkpoint, evaluation, film, console=s == 0))
    if args.capture_video and not film:
        runs[0].say("--capture-video: MuJoCo can't render here, for want of EGL; training goes on without videos")
    return runs


def of_all_seeds(together, args, device, say):
    """Acting and differentiating for all seeds of a Batch at once, by recordings where they can be made."""

    @torch.no_grad()
    def act_of_all(obs, noise):
        actions = together.each(act)(*(x.unflatten(0, (len(together.modules), -1)) for x in (obs, noise)))
        return (actions.flatten(0, 1),)

    losses_of_all = {
        everything: together.each(lambda agent, mb, kl_coef, e=everything: losses(agent, mb, kl_coef, args, e))
        for everything in (True, False)
    }
    if args.compile:
        act_of_all = compiled(act_of_all, device)
        losses_of_all = {everything: compiled(x, device) for everything, x in losses_of_all.items()}

    def gradients_of_all(mb, kl_coef, everything):
        return gradients(together, losses_of_all[everything], mb, kl_coef, args)

    of_replay = (Reads(args, losses), together.state, say, device.type != "cpu" or args.compile or not args.record)
    acting = Replay(act_of_all, "acting", *of_replay, in_numpy=True, check=together.check)
    return acting, Differentiate(together, gradients_of_all, *of_replay)


@torch.no_grad()
def acted_apart(together, obs, noise, actions):
    """Seeds whose actions in a rollout are not those of their policy, by every 16th step, and what that is."""
    some, num_seeds = slice(None, -1, 16), len(together.modules)
    of_each = zip(together.modules, by_seed(obs[some], num_seeds), by_seed(noise[some], num_seeds), strict=True)
    expected = torch.stack([act(*of_one) for of_one in of_each])
    apart = (expected - by_seed(actions[some], num_seeds)).abs().mean((1, 2)).tolist()
    for s in (s for s in range(num_seeds) if apart[s] > 1e-4):
        off = f"{apart[s]:.1g} off those of the policy that learns"
        yield s, f"the actions are {off}: what changes within a rollout needs --no-record"


if __name__ == "__main__":
    args = parse_args(Args)
    check_args(args)
    device = prepare(args)
    set_threads(args)
    args_of_seeds = of_each_seed(args)
    T, S, N, B = args.num_steps, len(args_of_seeds), args.num_envs, args.batch_size
    checkpoints = find_checkpoints(args_of_seeds, os.path.basename(__file__), kl_coef=float, normalizer=dict)

    # Environments and networks of each seed
    learners = [Learner(*of_seed, device) for of_seed in zip(args_of_seeds, checkpoints, strict=True)]
    agents, generators = [x.agent for x in learners], [x.generator for x in learners]
    action_dim, obs_dim = len(agents[0].half_width), learners[0].obs_dim
    envs = make_envs(args, S * N, list(itertools.chain(*(x.env_seeds for x in learners))))
    # Row by row of the environments, the statistics of the seed that they belong to
    mean, std = (np.repeat([getattr(x.normalizer, name) for x in learners], N, axis=0) for name in ("mean", "std"))
    normalizer = Normalizer(mean, std, learners[0].normalizer.time_limit)
    together = Batch(agents)
    take_step = Optimizers(together, lambda: [x.optimizers for x in learners]).step
    kl_coef = torch.tensor([x["kl_coef"] if x else args.kl_coef for x in checkpoints], device=device)

    runs = make_runs(args_of_seeds, learners, checkpoints, kl_coef, device)  # from here on, something is written
    together.say = say = runs[0].say
    acting, differentiate = of_all_seeds(together, args, device, say)

    obs = torch.empty((T + 1, S * N, obs_dim + 1), device=device)
    running = np.zeros((2, S * N))
    obs[-1] = normalizer(envs.reset()[0], running[1])

    for iteration in runs:
        trial = iteration == runs.first  # recordings are used once they have done this iteration as the plain code does
        for s in set(range(S)) - set(runs.training):
            agents[s].load_state_dict(runs[s].good["agent"])  # its environments go on, and nobody learns from them

        # Rollout
        together.adopt()
        obs[0] = obs[-1]
        noise = torch.cat([torch.randn((T, N, action_dim), generator=x, device=device) for x in generators], dim=1)
        policy = acting.begin(obs[0], noise[0], trial=trial)
        transitions, ended = rollout(envs, policy, normalizer, obs, noise, running)
        for s, why in not_finite(transitions, obs, N):
            if s in runs.training:
                runs[s].stop(why)
        for s in runs.training:
            runs[s].log_episodes([(steps * N, *episode) for i, steps, *episode in ended if i // N == s])
        runs.lap("rollout")

        # Advantages, and everything by seed, (S, B, …)
        all_layers = runs.diagnosed or args.pfo_layers == "all"
        with torch.no_grad():
            # Of each seed, ((T + 1) * N, …): the policy as it acted, and the value with the one after the last step
            outputs = [agent(x, all_layers) for agent, x in zip(agents, by_seed(obs, S), strict=True)]
            values = torch.stack([critic.output.view(T + 1, N) for _, critic in outputs], dim=1).flatten(1)
            advantages, returns = gae(
                transitions.rewards, values[:-1], values[1:], transitions.dones, args.gamma, args.gae_lambda
            )
            before = [{"actor": x.map(lambda x: x[:B]), "critic": y.map(lambda x: x[:B])} for x, y in outputs]
            loc, scale = loc_and_scale(torch.stack([x["actor"].output for x in before]))
            z = unsquash(by_seed(transitions.actions, S))
        for s, why in () if acting.off else acted_apart(together, obs, noise, transitions.actions):
            if s in runs.training:
                runs[s].stop(why)
        batch = {
            "obs": by_seed(obs[:-1], S),
            "z": z,
            "logprobs": normal_log_prob(z, loc, scale),
            "loc": loc,
            "scale": scale,
            "values": by_seed(values[:-1], S),
            "advantages": by_seed(advantages, S),
            "returns": by_seed(returns, S),
            "actor_held": torch.stack([pfo_input(x["actor"], args.pfo_layers, args.pfo_on) for x in before]),
            "critic_held": torch.stack([pfo_input(x["critic"], args.pfo_layers, args.pfo_on) for x in before]),
        }

        # Update phase
        for optimizer in itertools.chain(*(x.optimizers for x in learners)):
            optimizer.param_groups[0]["lr"] = learning_rate(iteration, args)
            if args.reset_optimizer:
                optimizer.state.clear()
        num_updates = args.update_epochs * (B // args.minibatch_size)
        phases = phases_of(together, batch, num_updates, policy_kl, runs.diagnosed)
        learning, logged = set(runs.training), [[] for _ in range(S)]
        for k, mb in enumerate(shuffled(batch, args.update_epochs, args.minibatch_size, generators, learning)):
            # Logged are the first and the last minibatch, and the KL of each where something hangs on it.
            at_an_end = k in (0, num_updates - 1)
            everything = at_an_end or bool(args.kl_coef or args.target_kl)
            with steps(phases, k, mb["advantages"], learning):
                checked = k in (1, iteration % num_updates)
                grad, stats = differentiate(mb, kl_coef, everything, plain=at_an_end, checked=checked, trial=trial)
                take_step(grad, learning)
            for s in learning:
                logged[s].append(stats)
            if args.target_kl:
                learning -= {s for s, kl in enumerate(stats["kl"].tolist()) if kl > args.target_kl}
                if not learning:
                    break
        if not differentiate.agrees(mb, kl_coef):
            for s in runs.training:
                runs[s].stop("a loss reads what has changed since it was recorded, which needs a tensor or --no-record")
        logged = numbers_of_each(logged)
        runs.lap("update")
        variances = batch["returns"].var(1).tolist(), (batch["returns"] - batch["values"]).var(1).tolist()
        for s in runs.training:
            runs[s].scalars["charts/learning_rate"] = learning_rate(iteration, args)
            runs[s].scalars |= of_update_phase(logged[s], num_updates, kl_coef[s].item())
            if args.kl_coef:
                kl = kl_of_last_epoch(logged[s], B // args.minibatch_size)
                kl_coef[s] = adapted_kl_coef(kl_coef[s].item(), kl, args)
            if variances[0][s] > 0:
                runs[s].scalars["losses/explained_variance"] = 1 - variances[1][s] / variances[0][s]
            # Without its coefficient, the entropy is a diagnostic, which stops no run.
            of_losses = ("policy_loss", "value_loss", "entropy")[: 3 if args.ent_coef else 2]
            numbers = to_be_finite(of_losses, logged[s], agents[s].networks())
            with torch.no_grad():
                numbers["policy's output"] = agents[s].policy(obs[-1].unflatten(0, (S, N))[s]).output.flatten().tolist()
            runs[s].require_finite(numbers)

        # Diagnostics of the whole rollout, by the networks as they now are
        if runs.diagnosed:
            for s in runs.training:
                with torch.no_grad():
                    after = dict(zip(("actor", "critic"), agents[s](batch["obs"][s], True), strict=True))
                runs[s].scalars |= diagnose(before[s], after, z[s], by_seed(noise, S)[s], agents[s].half_width, args)
                runs[s].scalars |= phases[s].measures(logged[s], before[s], after, args.activation, runs[s].untrained)
            runs.lap("diagnostics")
        del outputs, before, batch, transitions

    envs.close()
    sys.exit(runs.close())
