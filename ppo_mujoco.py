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
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --adam-beta2 0.9
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --share-features
import contextlib
import copy
import ctypes
import difflib
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

with contextlib.suppress(OSError):
    ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)  # envpool renders MuJoCo with it, if it is loaded before

import envpool
import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from envpool.mujoco.gym.registration import gym_mujoco_envs
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from common.feature_rank import dead_units, dormant_fraction, feature_ranks, feature_stats, mean_norm, policy_variance
from common.run import (
    Run,
    StopRequest,
    check_range,
    check_shapes,
    fail,
    find_checkpoint,
    keep_freed_memory,
    milestones,
    parse_args,
    pick_device,
    quit_on_interrupt,
    random_states,
    restore,
    usable_cores,
)
from common.trust_region import feature_drift, normal_kl, ratio_stats


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of this experiment, part of the run's name"""
    seed: int = 1
    """seed of everything random: networks, actions, minibatches, environments"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes CUDA, then MPS, then the CPU"""
    torch_deterministic: bool = False
    """use deterministic kernels alone; it is slower on CUDA, and on a CPU runs repeat bit for bit without it"""
    compile: bool = False
    """run policy, losses and gradients through torch.compile (on CUDA as CUDA graphs); it takes a minute to start"""
    torch_threads: int = 0
    """threads of PyTorch on a CPU; 0 is one for networks that are too small to share, else PyTorch's own number"""

    # Logging
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str | None = None
    """the W&B project; None is what WANDB_PROJECT in the environment says, else no-representation-no-trust"""
    wandb_entity: str | None = None
    """the W&B team; None is what WANDB_ENTITY in the environment says, else your own account"""
    wandb_mode: Literal["online", "offline"] | None = None
    """offline writes a W&B run into the run's folder, to be uploaded with `wandb sync`; None is what WANDB_MODE in the
    environment says, which may be disabled as well, else online"""
    diagnostics_interval: int = 0
    """iterations between diagnostics, besides the first and the last one; 0 is 0.1 % of the run (every 3rd in 5 M)"""
    eval_episodes: int = 0
    """episodes of each evaluation, with sampled and with greedy actions, at the end of the run; 0 is no evaluation"""
    eval_interval: float = 0.0
    """share of the run (0.1: every tenth of it) after which to evaluate as well; 0 evaluates at the end alone"""
    capture_video: bool = False
    """record the first episode of each evaluation as mp4, 50 steps a second"""

    # Checkpoints
    checkpoint_interval: float = 0.005
    """share of the run after which checkpoints/latest.pt is written anew; every 2.5 % it is kept under its own name"""
    resume: str = ""
    """go on with the run in this folder (flags left out are as they were), or auto: the newest unfinished run in runs/
    of the same arguments, else a new one; environments begin new episodes, and --total-timesteps may grow"""

    # Environment
    env_id: str = "Hopper-v4"
    """one of Gymnasium's MuJoCo tasks in envpool: Hopper, HalfCheetah, Ant, Humanoid, … v4 (the paper) or v5"""
    obs_norm_steps: int = 2000
    """uniformly random steps of each environment that the fixed mean and std of the observations are taken from"""

    # Algorithm
    total_timesteps: int = 5_000_000
    """length of the run in environment steps, floored to whole rollouts"""
    learning_rate: float = 3e-4
    """Adam's learning rate, constant unless annealed"""
    anneal_lr: bool = False
    """anneal the learning rate linearly to 0, rollout by rollout"""
    cosine_lr: bool = False
    """anneal the learning rate to 0 along a half cosine"""
    num_envs: int = 2
    """environments stepped in parallel"""
    num_steps: int = 1024
    """steps of each environment in a rollout"""
    minibatch_size: int = 64
    """transitions in a minibatch; must divide num_envs x num_steps"""
    update_epochs: int = 10
    """passes over each rollout, the paper's knob of non-stationarity: 10, 15 and 20"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.2
    """epsilon: ratios beyond 1 - epsilon and 1 + epsilon give no further gradient"""
    clip_objective: bool = True
    """PPO's clipped objective; off is the plain surrogate, to go with --kl-coef or --target-kl"""
    clip_vloss: bool = False
    """clip the value's change to clip_coef as well (CleanRL: on)"""
    ent_coef: float = 0.0
    """coefficient of the entropy bonus; the entropy is estimated from one sample of each state"""
    vf_coef: float = 1.0
    """coefficient of the value loss, which is 0.5 x mean squared error (CleanRL: 0.5)"""
    max_grad_norm: float = 0.5
    """gradient norm to which the actor and the critic are clipped, each on its own, or all of it with a shared trunk"""
    adam_eps: float = 1e-8
    """Adam's epsilon (CleanRL: 1e-5)"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """units of each hidden layer"""
    activation: Literal["ReLU", "GELU", "LeakyReLU", "Tanh"] = "Tanh"
    """activation of the hidden layers; the paper has runs with Tanh and with ReLU"""
    layer_init: Literal["pytorch", "orthogonal"] = "pytorch"
    """initial weights: PyTorch's default or CleanRL's orthogonal ones"""

    # Interventions
    share_features: bool = False
    """actor and critic share their hidden layers, in one optimizer (the paper's code steps them in both)"""
    pfo_coef: float = 0.0
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
    pfo_limit: float = 0.1
    """a sample is out of trust if the held layer's l2 distance exceeds this, or its cosine is below 1 minus this"""
    critic_pfo_coef: float = 0.0
    """coefficient of PFO on the critic; 0 leaves the critic alone, as the paper does"""
    critic_pfo_layers: Literal["last", "all"] = "last"
    """as --pfo-layers, for the critic"""
    critic_pfo_on: Literal["preactivations", "features"] = "preactivations"
    """as --pfo-on, for the critic"""
    critic_pfo_distance: Literal["l2", "cosine"] = "l2"
    """as --pfo-distance, for the critic"""
    critic_pfo_mode: Literal["regularize", "clip"] = "regularize"
    """as --pfo-mode, for the critic and its value gradient"""
    critic_pfo_limit: float = 0.1
    """as --pfo-limit, for the critic"""
    reset_optimizer: bool = False
    """forget Adam's moments after each rollout"""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment"""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment; the paper's intervention is 0.9"""
    kl_coef: float = 0.0
    """initial coefficient of an adaptive KL penalty, 0 is none (the paper's code: 1, with --no-clip-objective)"""
    kl_target: float = 0.01
    """the penalty doubles where the last epoch's mean KL exceeds 1.5 x this, and halves where it is below this / 1.5"""
    target_kl: float = 0.0
    """end an update phase after the first minibatch whose KL exceeds this, 0 is never (the paper's code: 0.01)"""

    # Filled in from the above
    batch_size: int = field(init=False)
    """transitions in a rollout"""
    num_iterations: int = field(init=False)
    """rollouts in the run"""


def check_args(args):
    """Refuse what can't run before anything is started, and fill in what follows from the arguments."""
    tasks = [f"{task}-{version}" for task, versions, _ in gym_mujoco_envs for version in versions]
    if args.env_id not in tasks:
        nearest = difflib.get_close_matches(args.env_id.lower(), map(str.lower, tasks), n=3, cutoff=0.5)
        nearest = ", ".join(task for task in tasks if task.lower() in nearest) or "Hopper-v4, Ant-v4, Humanoid-v4"
        fail(f"--env-id {args.env_id}: must be one of Gymnasium's {len(tasks)} MuJoCo tasks; nearest: {nearest}")
    check_range(args, "num_envs num_steps minibatch_size update_epochs", low=1, high=100_000)
    check_range(args, "num_envs", high=1024)
    check_range(args, "total_timesteps", low=1, high=10**12)
    check_range(args, "seed", low=0, high=2**31 - 1)
    check_range(args, "obs_norm_steps", low=2, high=10**7)
    check_range(args, "torch_threads", low=0, high=1024)
    check_range(args, "diagnostics_interval", low=0, high=10**9)
    check_range(args, "eval_episodes", low=0, high=1024)
    check_range(args, "learning_rate max_grad_norm adam_eps clip_coef kl_target", above=0, high=1e6)
    check_range(args, "pfo_limit critic_pfo_limit", above=0, high=1e6)
    check_range(args, "ent_coef vf_coef pfo_coef critic_pfo_coef kl_coef target_kl", low=0, high=1e6)
    check_range(args, "gamma gae_lambda eval_interval", low=0, high=1)
    check_range(args, "adam_beta1 adam_beta2", low=0, below=1)
    check_range(args, "checkpoint_interval", above=0, high=1)
    if not args.hidden_sizes or not all(1 <= size <= 100_000 for size in args.hidden_sizes):
        sizes = " ".join(map(str, args.hidden_sizes))
        fail(f"--hidden-sizes {sizes}: must be one number or more, each at least 1 and at most 100000")
    args.batch_size = args.num_envs * args.num_steps
    if args.batch_size == 1:
        fail("--num-steps 1: must make rollouts of at least 2 transitions, with more steps or --num-envs")
    if args.batch_size % args.minibatch_size:
        fail(f"--minibatch-size {args.minibatch_size}: must divide num_envs x num_steps = {args.batch_size}")
    args.num_iterations = args.total_timesteps // args.batch_size
    if not args.num_iterations:
        fail(f"--total-timesteps {args.total_timesteps}: must be at least one rollout of {args.batch_size} steps")
    for prefix in ("pfo", "critic_pfo"):
        if getattr(args, f"{prefix}_layers") == "all" and getattr(args, f"{prefix}_on") == "features":
            flag = "--" + prefix.replace("_", "-")
            fail(f"{flag}-layers all: must go with {flag}-on preactivations; all layers after activation do not exist")
    if args.anneal_lr and args.cosine_lr:
        fail("--cosine-lr: must not go with --anneal-lr; choose one schedule")
    if (args.capture_video or args.eval_interval) and not args.eval_episodes:
        flag = "--capture-video" if args.capture_video else f"--eval-interval {args.eval_interval}"
        fail(f"{flag}: needs --eval-episodes of at least 1")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if args.compile and not shutil.which(compiler):
        fail(f"--compile: torch.compile needs a C++ compiler, and {compiler} is not there; CXX may name another one")


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


# The activations that NumPy has
IN_NUMPY = {"Tanh": np.tanh, "ReLU": functools.partial(np.maximum, np.float32(0))}


def acts_in_numpy(layers, args):
    """Whether ``numpy_act`` is the faster way to act: the network is so small that calls take the time of an action."""
    return (
        args.activation in IN_NUMPY and args.num_envs * max(w[..., 0].numel() * w.shape[-1] for w, _ in layers) < 2**17
    )


def numpy_act(layers, activation):
    """``sample`` of the policy made of ``layers`` as a function of observations and noise, the same but for rounding.

    Most of an action's time goes into PyTorch's overhead for each operation; NumPy has a fraction of it. layers:
    weights (…, out, in) and biases (…, out) on a CPU, which are read where they are and may go on learning; (…) are the
    seeds of a batch, or nothing. activation: one of ``IN_NUMPY``.
    """
    weights = [weight.detach().numpy().swapaxes(-1, -2) for weight, _ in layers]
    biases = [bias.detach().numpy()[..., None, :] for _, bias in layers]
    seeds, action_dim = biases[0].shape[:-2], biases[-1].shape[-1] // 2
    raw_of_1, smallest, end = map(np.float32, (math.log(math.expm1(0.99)), 0.01, 1 - 1e-6))

    @np.errstate(all="ignore")  # what is not finite ends the run with a message of its own
    def act(obs, noise):
        x = obs.numpy().reshape(*seeds, -1, obs.shape[-1])
        for weight, bias in zip(weights, biases, strict=True):
            x = x @ weight
            x += bias
            if bias is not biases[-1]:
                activation(x, out=x)
        loc, raw = x.reshape(-1, 2, action_dim).swapaxes(0, 1)
        scale = np.logaddexp(raw + raw_of_1, np.float32(0)) + smallest
        return torch.from_numpy(np.minimum(np.maximum(np.tanh(loc + scale * noise.numpy()), -end), end))

    return act


class Rollout(NamedTuple):
    """What a rollout recorded, (num_steps, num_envs, …) each; every transition is one that an environment made."""

    actions: Tensor  # (…, A) in [-1, 1], before they are stretched to the action box
    rewards: Tensor
    dones: Tensor  # 1 where the step ended an episode, by a time limit too


def rollout(envs, act, normalizer, obs, noise, running):
    """Step each environment ``len(noise)`` times from ``obs[0]`` on; returns a Rollout and the episodes that ended.

    envs: a synchronous envpool. ``act(obs, noise)`` gives actions in (-1, 1), as ``sample`` does.
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
        action.copy_(act(seen, random))  # a CUDA graph writes its next results over these
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
        mb_advantages = mb_advantages - mb_advantages.mean(-1, keepdim=True)
        mb_advantages = mb_advantages / mb_advantages.std(-1, correction=0, keepdim=True).clamp(min=1e-6)

    pg_loss = -mb_advantages * ratio
    if args.clip_objective:
        pg_loss = torch.max(pg_loss, -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))

    logged = {"clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(-1)}
    if everything:
        logged |= {"old_approx_kl": -logratio.mean(-1), "approx_kl": (ratio - 1 - logratio).mean(-1)}

    # PFO (section 5): the features may not move far from where they were during the rollout.
    if args.pfo_coef or everything:
        distance, out_of_trust = feature_distance(held, mb["actor_held"], args.pfo_distance, args.pfo_limit)
        logged |= {"pfo_actor": distance.mean(-1), "pfo_out_of_trust": out_of_trust.float().mean(-1)}
    if args.pfo_coef and args.pfo_mode == "clip":
        pg_loss = torch.where(out_of_trust, pg_loss.detach(), pg_loss)
    loss = logged["policy_loss"] = pg_loss.mean(-1)
    if args.pfo_coef and args.pfo_mode == "regularize":
        loss = loss + args.pfo_coef * logged["pfo_actor"]

    if args.ent_coef or everything:
        logged["entropy"] = entropy_estimate(loc, scale, mb["noise"], half_width).mean(-1)
    if args.ent_coef:
        loss = loss - args.ent_coef * logged["entropy"]
    if args.kl_coef or everything:
        logged["kl"] = normal_kl(mb["loc"], mb["scale"], loc, scale).mean(-1)
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
        limits = args.critic_pfo_distance, args.critic_pfo_limit
        distance, out_of_trust = feature_distance(held, mb["critic_held"], *limits)
        logged["pfo_critic"] = distance.mean(-1)
    if args.critic_pfo_coef and args.critic_pfo_mode == "clip":
        v_loss = torch.where(out_of_trust, v_loss.detach(), v_loss)
    logged["value_loss"] = 0.5 * v_loss.mean(-1)
    loss = args.vf_coef * logged["value_loss"]
    if args.critic_pfo_coef and args.critic_pfo_mode == "regularize":
        loss = loss + args.critic_pfo_coef * logged["pfo_critic"]
    return loss, logged


def losses(agent, mb, kl_coef, args, everything=True):
    """The sum of both losses on a minibatch, and what is logged of them by name."""
    policy, value = agent(mb["obs"], "all" in (args.pfo_layers, args.critic_pfo_layers))
    held = pfo_input(policy, args.pfo_layers, args.pfo_on)
    critic_held = pfo_input(value, args.critic_pfo_layers, args.critic_pfo_on)
    a_loss, a_logged = actor_loss(policy.output, held, mb, agent.half_width, kl_coef, args, everything)
    c_loss, c_logged = critic_loss(value.output.squeeze(-1), critic_held, mb, args, everything)
    return a_loss + c_loss, {name: x.detach() for name, x in {**a_logged, **c_logged}.items()}


def gradients(agent, losses, mb, kl_coef, args, everything=True):
    """Gradients of the losses on a minibatch, clipped, in the order of the parameters; and what is logged, by name."""
    parts = [list(part.parameters()) for part in agent.parts()]
    loss, logged = losses(agent, mb, kl_coef, args, everything)
    grads = torch.autograd.grad(loss, [p for part in parts for p in part])
    clipped, norms = [], []
    for part in parts:
        of_part = grads[len(clipped) : len(clipped) + len(part)]
        norms.append(nn.utils.get_total_norm(of_part))
        clipped += torch._foreach_mul(of_part, (args.max_grad_norm / (norms[-1] + 1e-6)).clamp(max=1))
    logged |= {"actor_grad_norm": norms[0], "critic_grad_norm": norms[-1]}
    # Copied, since a CUDA graph writes its next results over these.
    return clipped, dict(zip(logged, torch.stack(list(logged.values())).unbind(), strict=True))


def recorded(function):
    """``function`` of tensors as a program of PyTorch's operations, made at the first call for the shapes of that call.

    Most of the time of so small a network goes into Python and autograd's bookkeeping. The program does without: it has
    the operations one after the other, those of a backward pass too. It reads the agent's weights where they are.
    Numbers that are no tensors are what they were at the first call: what is to change comes in as a tensor.
    """
    program = None

    @torch.no_grad()
    def call(*tensors):
        nonlocal program
        if program is None:
            with torch.enable_grad():
                graph = make_fx(function)(*tensors)
            for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
                node.replace_all_uses_with(node.args[0])  # nothing here has a gradient any more
            graph.graph.eliminate_dead_code()
            graph.recompile()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                program = torch.jit.trace(graph, tensors, check_trace=False)
        return program(*tensors)

    return call


def recorded_gradients(differentiate):
    """``differentiate(mb, kl_coef, everything)`` as two ``recorded`` programs, which know tensors alone."""
    names, programs = {}, {}

    def record(everything, columns):
        def flat(kl_coef, *tensors):
            grads, logged = differentiate(dict(zip(columns, tensors, strict=True)), kl_coef, everything)
            names[everything] = list(logged)
            return (*grads, torch.stack(list(logged.values())))

        return recorded(flat)

    def call(mb, kl_coef, everything):
        if everything not in programs:
            programs[everything] = record(everything, list(mb))
        *grads, logged = programs[everything](kl_coef, *mb.values())
        return grads, dict(zip(names[everything], logged.unbind(), strict=True))

    return call


def make_optimizers(agent, args):
    """An Adam for each part of the agent."""
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps, "fused": True}
    return tuple(torch.optim.Adam(part.parameters(), **adam) for part in agent.parts())


def step_optimizers(optimizers, params, grads):
    """What ``step()`` of these Adams, equal but for their ``params``, does to them, without the bookkeeping of it.

    params: those of each optimizer that take a step; grads: theirs, one after the other. One call serves all, since the
    calls take longer than the steps.
    """
    states = [optimizer.state[p] for optimizer, own in zip(optimizers, params, strict=True) for p in own]
    params = [p for own in params for p in own]
    for p, state in zip(params, states, strict=True):
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    exp_avgs, exp_avg_sqs, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    (group,) = optimizers[0].param_groups
    settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
    beta1, beta2 = group["betas"]
    with torch.no_grad():
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(params, grads, exp_avgs, exp_avg_sqs, [], steps, beta1=beta1, beta2=beta2, **settings)


def update(differentiate, optimizers, mb, kl_coef, everything=True):
    """One gradient step on a minibatch; returns what is logged by name, without waiting for the device."""
    grads, logged = differentiate(mb, kl_coef, everything)
    step_optimizers(optimizers, [optimizer.param_groups[0]["params"] for optimizer in optimizers], grads)
    return logged


def shuffled(batch, minibatch_size):
    """One epoch: minibatches of the tensors in ``batch`` in random order, each with noise to estimate the entropy."""
    z = batch["z"]
    order = torch.randperm(len(z), device=z.device)
    parts = {name: x.index_select(0, order).split(minibatch_size) for name, x in batch.items()}
    parts["noise"] = torch.randn_like(z).split(minibatch_size)
    for mb in zip(*parts.values(), strict=True):
        yield dict(zip(parts, mb, strict=True))


def compiled(function, device):
    """``function`` through torch.compile with static shapes, on CUDA as CUDA graphs."""
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")

    def call(*args):
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned may be written over
        return fast(*args)

    return call


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


def flat_weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


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
            measures = {
                **feature_ranks(network.features),
                "dead_units": dead_units(network.features, args.activation),
                "dormant_fraction": dormant_fraction(network.features),
                **feature_stats(network.features),
                "preactivation_norm": mean_norm(network.preactivations),
                "all_preactivation_norm": mean_norm(network.all_preactivations),
            }
            tags.update({f"representation/{when}/{name}/{measure}": x for measure, x in measures.items()})
    for tag in [tag for tag in tags if tag.startswith("representation/after/")]:
        if tag.endswith(("rank", "dead_units", "norm", "policy_variance")):
            tags[tag.replace("/after/", "/delta/")] = tags[tag] - tags[tag.replace("/after/", "/before/")]

    logratio = normal_log_prob(z, new_loc, new_scale) - normal_log_prob(z, loc, scale)
    tags.update({f"trust_region/{name}": x for name, x in ratio_stats(logratio, args.clip_coef).items()})
    tags["trust_region/kl"] = normal_kl(loc, scale, new_loc, new_scale).mean()
    for name in ("actor", "critic"):
        for layer in ("features", "preactivations", "all_preactivations"):
            drift = feature_drift(getattr(before[name], layer), getattr(after[name], layer))
            tags.update({f"trust_region/{name}_{layer[:-1]}_{distance}": x for distance, x in drift.items()})
    return {tag: float(x) for tag, x in tags.items()}


def render_frame(env_id):
    """One image of a simulation; where there is no OpenGL, this ends the process."""
    envs = envpool.make(env_id, env_type="gymnasium", num_envs=1, seed=0, render_mode="rgb_array")
    envs.reset()
    return envs.render(env_ids=[0])[0]


def can_render(env_id):
    """Whether ``render_frame`` works, tried in a process of its own."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['render_frame'](sys.argv[2])"
    script = os.path.abspath(__file__)
    command = [sys.executable, "-c", code, script, env_id]
    with contextlib.suppress(subprocess.TimeoutExpired):  # of a driver that hangs
        return subprocess.run(command, cwd=os.path.dirname(script), capture_output=True, timeout=120).returncode == 0
    return False


@torch.no_grad()
def evaluate(agent, normalizer, args, device, seeds, greedy, video=None):
    """Returns and lengths of one whole episode for each of ``seeds``.

    The actions are sampled or ``greedy``, the normal's loc; the first episode is recorded to the path ``video``.
    Training's own random states stay as they are.
    """
    envs = make_envs(args, len(seeds), seeds, render_mode="rgb_array" if video else None)
    low, high = envs.action_space.low, envs.action_space.high
    half_width, midpoint = (high - low) / 2, (high + low) / 2
    generator = torch.Generator(device).manual_seed(seeds[0])
    obs, _ = envs.reset()
    returns, lengths, playing = np.zeros(len(seeds)), np.zeros(len(seeds)), np.arange(len(seeds), dtype=np.int32)
    with contextlib.ExitStack() as stack:
        film = None
        if video:
            video.parent.mkdir(exist_ok=True)
            film = stack.enter_context(imageio.get_writer(video, fps=50, macro_block_size=2))
        while playing.size:
            if film and playing[0] == 0:
                film.append_data(envs.render(env_ids=[0])[0])
            loc, scale = loc_and_scale(agent.policy(normalizer(obs, lengths[playing]).to(device)).output)
            noise = torch.empty_like(loc).normal_(generator=generator)
            actions = squash(loc if greedy else torch.addcmul(loc, scale, noise))
            obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy() * half_width + midpoint, playing)
            returns[playing] += rewards
            lengths[playing] += 1
            ongoing = ~(terminated | truncated)
            obs, playing = obs[ongoing], playing[ongoing]
    envs.close()
    return returns, lengths


if __name__ == "__main__":
    args = parse_args(Args)
    check_args(args)
    quit_on_interrupt()
    device = pick_device(args.device)
    keep_freed_memory()
    set_threads(args)
    restored = {"kl_coef": float, "normalizer": dict, "episodes": int, "recent_returns": list}
    checkpoint = find_checkpoint(args, os.path.basename(__file__), **restored)
    film = args.capture_video and can_render(args.env_id)

    # Seeding
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    if checkpoint:
        rng.bit_generator.state = checkpoint["random_states"]["numpy"]  # so the environments get seeds of their own
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.torch_deterministic

    # Environments
    seeds = rng.integers(2**31, size=args.num_envs).tolist()
    envs = make_envs(args, args.num_envs, seeds)
    action_low, action_high = envs.action_space.low, envs.action_space.high
    obs_dim, action_dim = envs.observation_space.shape[0], len(action_low)
    if checkpoint:
        normalizer = Normalizer(np.zeros(obs_dim), np.zeros(obs_dim), 0)  # to be restored
    else:
        norm_seeds = rng.integers(2**31, size=args.num_envs).tolist()
        normalizer = random_statistics(args, norm_seeds, rng)

    # Networks
    if checkpoint:
        check_shapes(checkpoint, Agent, obs_dim, action_low, action_high, args)
    agent = Agent(obs_dim, action_low, action_high, args).to(device)
    optimizers = make_optimizers(agent, args)
    kl_coef = torch.tensor(args.kl_coef, device=device)
    if checkpoint:
        restore(checkpoint, agent, optimizers, device, normalizer=normalizer.state_dict())
        normalizer = Normalizer.load(checkpoint["normalizer"])
        kl_coef.fill_(checkpoint["kl_coef"])

    def act(obs, noise):
        return sample(agent.policy(obs).output, noise)

    def differentiate(mb, kl_coef, everything):
        return gradients(agent, losses, mb, kl_coef, args, everything)

    if device.type == "cpu" and not args.compile:
        layers = [(layer.weight, layer.bias) for layer in (*agent.actor.hidden, agent.actor.output)]
        fast = acts_in_numpy(layers, args)
        act = numpy_act(layers, IN_NUMPY[args.activation]) if fast else recorded(act)
        differentiate = recorded_gradients(differentiate)
    else:
        losses = compiled(losses, device) if args.compile else losses
        act = torch.no_grad()(compiled(act, device) if args.compile else act)

    # The run's folder: from here on, something is written
    run = Run(args, args.num_iterations * args.batch_size, checkpoint, unit="step")
    if args.capture_video and not film:
        run.say("--capture-video: MuJoCo can't render here, for want of EGL; training goes on without videos")

    def state(iteration):
        return {
            "script": os.path.basename(__file__),
            "agent": agent.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "kl_coef": kl_coef.item(),
            "normalizer": normalizer.state_dict(),
            "obs_dim": obs_dim,
            "action_low": torch.from_numpy(action_low),
            "action_high": torch.from_numpy(action_high),
            "iteration": iteration,
            "global_step": iteration * args.batch_size,
            "episodes": episodes,
            "recent_returns": list(map(float, recent_returns)),
            "random_states": {**random_states(device), "numpy": rng.bit_generator.state},
        }

    def stop(why):
        holds = "holds" if run.save_checkpoint(previous_step, good) else "lacks"
        run.close(exit_code=1)
        fail(f"{why} in iteration {iteration}; {run.folder} {holds} the state before it", code=1)

    interrupted = StopRequest()
    start_time = time.time()
    T, N, B = args.num_steps, args.num_envs, args.batch_size
    diagnostics_interval = args.diagnostics_interval or math.ceil(args.num_iterations / 1000)
    snapshots = milestones(args.num_iterations, 0.025) | {0}
    checkpoints = milestones(args.num_iterations, args.checkpoint_interval) | snapshots
    evaluations = milestones(args.num_iterations, args.eval_interval or 1) if args.eval_episodes else set()
    running, episodes, recent_returns = np.zeros((2, N)), 0, deque(maxlen=100)
    obs = torch.empty((T + 1, N, obs_dim + 1), device=device)
    obs[0] = normalizer(envs.reset()[0], running[1])
    shown = {}
    done = 0  # iterations before this process
    if checkpoint:
        done, episodes = checkpoint["iteration"], checkpoint["episodes"]
        recent_returns.extend(checkpoint["recent_returns"])
    else:
        run.save_checkpoint(0, state(0))

    for iteration in range(done + 1, args.num_iterations + 1):
        diagnosed = (iteration - 1) % diagnostics_interval == 0 or iteration == args.num_iterations
        previous_step, global_step = (iteration - 1) * args.batch_size, iteration * args.batch_size
        scalars = {}
        good = copy.deepcopy(state(iteration - 1))

        # Rollout
        rollout_start = time.time()
        noise = torch.randn((T, N, action_dim), device=device)
        transitions, ended = rollout(envs, act, normalizer, obs, noise, running)
        made = {"action": transitions.actions, "observation": obs[1:], "reward": transitions.rewards}
        broken = {name: (~x.isfinite()).nonzero() for name, x in made.items() if not x.isfinite().all()}
        if broken:  # the earliest, and of one step the first in the order of cause and effect
            name = min(broken, key=lambda name: broken[name][0, 0].item())
            step, env = broken[name][0, :2].tolist()
            stop(f"the {name} of environment {env} in step {step + 1} of the rollout is not finite")
        for _, steps, episode_return, length in ended:
            scalars_of_episode = {"charts/episodic_return": episode_return, "charts/episodic_length": length}
            run.log(scalars_of_episode, previous_step + steps * N)
            recent_returns.append(episode_return)
        if ended:
            episodes += len(ended)
            scalars["charts/rollout_return"] = np.mean([episode[2] for episode in ended])
            scalars["charts/rollout_length"] = np.mean([episode[3] for episode in ended])

        # Advantages, and everything flattened to (B, …)
        update_start = time.time()
        all_layers = diagnosed or "all" in (args.pfo_layers, args.critic_pfo_layers)
        with torch.no_grad():
            # ((T + 1) * N, …): the policy as it acted, and the values with the one after the last step
            actor, critic = agent(obs.flatten(0, 1), all_layers)
            values = critic.output.view(T + 1, N)
            advantages, returns = gae(
                transitions.rewards, values[:-1], values[1:], transitions.dones, args.gamma, args.gae_lambda
            )
            before = {"actor": actor.map(lambda x: x[: T * N]), "critic": critic.map(lambda x: x[: T * N])}
            loc, scale = loc_and_scale(before["actor"].output)
            z = unsquash(transitions.actions.flatten(0, 1))
            apart = sample(before["actor"].output, noise.flatten(0, 1)) - transitions.actions.flatten(0, 1)
            apart = apart.abs().mean().item()
        if apart > 1e-4:
            stop(f"the actions are {apart:.1g} off those of the policy that learns (is numpy_act its network?)")
        batch = {
            "obs": obs[:-1].flatten(0, 1),
            "z": z,
            "logprobs": normal_log_prob(z, loc, scale),
            "loc": loc,
            "scale": scale,
            "values": values[:-1].flatten(),
            "advantages": advantages.flatten(),
            "returns": returns.flatten(),
            "actor_held": pfo_input(before["actor"], args.pfo_layers, args.pfo_on),
            "critic_held": pfo_input(before["critic"], args.critic_pfo_layers, args.critic_pfo_on),
        }

        # Update phase
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(iteration, args)
            if args.reset_optimizer:
                optimizer.state.clear()
        if diagnosed:
            weights = {name: flat_weights(network) for name, network in agent.networks().items()}
        logged, num_minibatches = [], B // args.minibatch_size
        num_updates = args.update_epochs * num_minibatches
        minibatches = (mb for _ in range(args.update_epochs) for mb in shuffled(batch, args.minibatch_size))
        for k, mb in enumerate(minibatches):
            # Logged are the first and the last minibatch, and the KL of each where something hangs on it.
            everything = k in (0, num_updates - 1) or bool(args.kl_coef or args.target_kl)
            logged.append(update(differentiate, optimizers, mb, kl_coef, everything))
            if args.target_kl and logged[-1]["kl"].item() > args.target_kl:
                break
        # The one transfer of the update phase
        numbers = iter(torch.stack([x for stats in logged for x in stats.values()]).tolist())
        logged = [{name: next(numbers) for name in stats} for stats in logged]
        update_time = time.time() - update_start
        grad_norms = {name: [stats.pop(f"{name}_grad_norm") for stats in logged] for name in agent.networks()}
        for name in logged[0].keys() - {"kl"}:
            scalars[f"losses/first_minibatch/{name}"] = logged[0][name]
            scalars[f"losses/last_minibatch/{name}"] = scalars[f"losses/{name}"] = logged[-1][name]
        scalars["losses/clipfrac"] = np.mean([stats["clipfrac"] for stats in logged])
        scalars["losses/early_stop"] = 1 - len(logged) / num_updates
        scalars["losses/kl_coef"] = kl_coef.item()
        if args.kl_coef:
            last_epoch = (len(logged) - 1) // num_minibatches * num_minibatches
            kl = np.mean([stats["kl"] for stats in logged[last_epoch:]])
            kl_coef.fill_(adapted_kl_coef(kl_coef.item(), kl, args))
        variance = returns.var()
        if variance > 0:
            scalars["losses/explained_variance"] = (1 - (returns - values[:-1]).var() / variance).item()
        else:
            run.say_once("losses/explained_variance is logged only where the returns of a rollout differ")
        checked = {name: [stats[name] for stats in logged] for name in ("policy_loss", "value_loss")}
        if args.ent_coef:  # else it is a diagnostic, which stops no run
            checked["entropy"] = [logged[0]["entropy"], logged[-1]["entropy"]]
        checked |= {f"{name}'s weight": [flat_weights(x).abs().max().item()] for name, x in agent.networks().items()}
        with torch.no_grad():
            checked["policy's output"] = agent.policy(obs[-1]).output.flatten().tolist()
        for name, x in (checked | {f"{name}'s gradient norm": x for name, x in grad_norms.items()}).items():
            if not all(map(math.isfinite, x)):
                run.log(scalars, global_step)
                stop(f"the {name} is not finite")

        # Diagnostics of the whole rollout, by the networks as they now are
        if diagnosed:
            diagnostics_start = time.time()
            with torch.no_grad():
                after = dict(zip(("actor", "critic"), agent(batch["obs"], True), strict=True))
                scalars |= diagnose(before, after, z, noise.flatten(0, 1), agent.half_width, args)
                for name, network in agent.networks().items():
                    new = flat_weights(network)
                    scalars[f"optim/{name}/grad_norm"] = np.mean(grad_norms[name])
                    scalars[f"optim/{name}/update_norm"] = (new - weights[name]).norm().item()
                    scalars[f"optim/{name}/weight_norm"] = new.norm().item()
            for side in ("above", "below"):
                if f"trust_region/ratio_{side}_std" not in scalars:
                    run.say_once(
                        f"trust_region/ratio_{side}_* and excess_ratio need ratios {side} the clip range (a std two)"
                    )
            del after
            scalars["time/rollout"] = update_start - rollout_start
            scalars["time/update"] = update_time
            scalars["time/diagnostics"] = time.time() - diagnostics_start
            shown["rank"] = scalars["representation/after/actor/pca_rank"]
            shown["dead"] = scalars["representation/after/actor/dead_units"]
        del actor, critic, before, batch, transitions

        scalars["charts/learning_rate"] = learning_rate(iteration, args)
        scalars["charts/SPS"] = (iteration - done) * B / (time.time() - start_time)
        scalars["charts/FPS"] = scalars["charts/SPS"]
        run.log(scalars, global_step)
        if recent_returns:
            shown["return"] = np.mean(recent_returns)
        run.progress(global_step, **shown)
        if diagnosed:
            run.report(global_step, scalars["charts/FPS"], **shown)
        if iteration in evaluations:
            seeds = np.random.SeedSequence([args.seed, global_step]).generate_state(args.eval_episodes) // 2
            for kind in ("sampled", "greedy"):
                video = run.folder / "videos" / f"{global_step}-{kind}.mp4" if film else None
                try:
                    results = evaluate(agent, normalizer, args, device, seeds.tolist(), kind == "greedy", video)
                except OSError as error:
                    run.say(f"{video}: can't be written ({error.strerror or 'ffmpeg failed'}); it is left out")
                    video = None
                    results = evaluate(agent, normalizer, args, device, seeds.tolist(), kind == "greedy")
                names = ("episodic_return", "episodic_length")
                run.log({f"eval/{kind}/{name}": x.mean() for name, x in zip(names, results, strict=True)}, global_step)
                run.say(f"evaluation, {kind}: mean return {results[0].mean():.1f} of {args.eval_episodes} episodes")
                if video:
                    run.log_video(f"eval/{kind}/video", video, global_step)
        # Last, since what was logged up to a checkpoint is what a resumed run keeps
        if iteration in checkpoints or interrupted:
            run.save_checkpoint(global_step, state(iteration), iteration in snapshots)
        if interrupted:
            break
        obs[0] = obs[-1]

    envs.close()
    sys.exit(run.close(interrupted.exit_code))
