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
# many seeds as one batch, each a run of its own
#   python ppo_mujoco.py --env-id Hopper-v4 --update-epochs 20 --seeds 25 7 64 27 4
import contextlib
import copy
import ctypes
import difflib
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
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
from torch.utils._pytree import tree_map

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which python -P leaves out

from common.batch import Batch, Optimizers
from common.feature_rank import dead_units, dormant_fraction, feature_ranks, feature_stats, mean_norm, policy_variance
from common.replay import Replay
from common.run import (
    Run,
    StopRequest,
    check_range,
    check_shapes,
    fail,
    find_checkpoints,
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
    seeds: tuple[int, ...] = ()
    """train these seeds as one batch, each as a run of its own, in a fraction of the time of separate runs"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes CUDA, then MPS, then the CPU"""
    torch_deterministic: bool = False
    """use deterministic kernels alone; it is slower on CUDA, and on a CPU runs repeat bit for bit without it"""
    compile: bool = False
    """run policy, losses and gradients through torch.compile (on CUDA as CUDA graphs); it takes a minute to start"""
    record: bool = True
    """on a CPU, record the operations of acting and of a gradient, and replay them without Python; each recording is
    checked against the plain code, which runs alone with --no-record"""
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
    resume: tuple[str, ...] = ()
    """go on with the run in this folder, or with those of --seeds, a folder for each (flags left out are as they were),
    or auto: the newest unfinished run in runs/ of the same arguments, else a new one; environments begin new episodes,
    and --total-timesteps may grow"""

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
    if not all(0 <= seed < 2**31 for seed in args.seeds) or len({*args.seeds}) < len(args.seeds):
        seeds = " ".join(map(str, args.seeds))
        fail(f"--seeds {seeds}: must be different numbers, each at least 0 and at most {2**31 - 1}")
    if args.seeds and args.seed not in (Args.seed, *args.seeds):
        fail(f"--seed {args.seed}: must not go with --seeds; they are all the seeds there are")
    number = len(args.seeds or (args.seed,))
    if args.resume and args.resume != ("auto",) and len(args.resume) != number:
        fail(f"--resume {' '.join(args.resume)}: must be auto, or a run's folder for each of {number} seeds")
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


def of_each_seed(args):
    """The arguments of the run of each seed."""
    runs = [copy.copy(args) for _ in args.seeds or (args.seed,)]
    resumed = args.resume if args.resume != ("auto",) else len(runs) * args.resume
    for s, run_args in enumerate(runs):
        run_args.seed, run_args.seeds, run_args.resume = (args.seeds or (args.seed,))[s], (), resumed[s : s + 1]
    return runs


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


def act(agent, obs, noise):
    """Actions (N, A) of the agent's policy for observations (N, D + 1)."""
    return sample(agent.policy(obs).output, noise)


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
        limits = args.critic_pfo_distance, args.critic_pfo_limit
        distance, out_of_trust = feature_distance(held, mb["critic_held"], *limits)
        logged["pfo_critic"] = distance.mean()
    if args.critic_pfo_coef and args.critic_pfo_mode == "clip":
        v_loss = torch.where(out_of_trust, v_loss.detach(), v_loss)
    logged["value_loss"] = 0.5 * v_loss.mean()
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


def gradients(agents, losses, mb, kl_coef, args):
    """Clipped gradients of each seed's losses on its minibatch, in a row for each, and what is logged, by name.

    agents: a Batch of S. losses(mb, kl_coef): those of each, of tensors (S, …).
    """
    loss, logged = losses(mb, kl_coef)
    row, clipped, norms = agents.flat(agents.gradients(loss)), [], []
    for columns in agents.columns(Agent.parts):
        norms.append(torch.linalg.vector_norm(row[:, columns], dim=1, keepdim=True))
        clipped.append(row[:, columns] * (args.max_grad_norm / (norms[-1] + 1e-6)).clamp(max=1))
    logged |= {"actor_grad_norm": norms[0].squeeze(1), "critic_grad_norm": norms[-1].squeeze(1)}
    # Copied, since a CUDA graph writes its next results over these.
    return torch.cat(clipped, dim=1), dict(zip(logged, torch.stack(list(logged.values())).unbind(), strict=True))


class Differentiate:
    """``gradients`` by recordings, which know tensors alone: one with everything that is logged, one with less."""

    def __init__(self, agents, gradients, *of_replay):
        self.agents, self.gradients, self.of_replay, self.names, self.replays = agents, gradients, of_replay, {}, {}

    def __call__(self, mb, kl_coef, everything, plain, checked, trial):
        """The gradients and what is logged; ``plain`` is without a recording, ``checked`` and ``trial`` are for one."""
        self.agents.adopt()
        if plain:
            return self.gradients(mb, kl_coef, everything)
        if everything not in self.replays:
            self.replays[everything] = Replay(self._flat(everything, list(mb)), "a gradient", *self.of_replay)
        replay = self.replays[everything]
        replay.off |= any(other.off for other in self.replays.values())
        if checked or trial:
            grad, logged = replay.checked(kl_coef, *mb.values(), trial=trial)
        else:
            grad, logged = replay(kl_coef, *mb.values())
        return grad, dict(zip(self.names[everything], logged.unbind(), strict=True))

    def _flat(self, everything, columns):
        def flat(kl_coef, *tensors):
            grad, logged = self.gradients(dict(zip(columns, tensors, strict=True)), kl_coef, everything)
            self.names[everything] = list(logged)
            return grad, torch.stack(list(logged.values()))

        return flat

    def agrees(self, mb, kl_coef):
        """Whether the recordings still give what the plain code gives."""
        self.agents.adopt()
        return any(replay.off for replay in self.replays.values()) or all(
            replay.agrees(kl_coef, *mb.values()) for replay in self.replays.values()
        )


def make_optimizers(agent, args):
    """An Adam for each part of the agent."""
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps, "fused": True}
    return tuple(torch.optim.Adam(part.parameters(), **adam) for part in agent.parts())


def shuffled(batch, minibatch_size, generators, learning):
    """One epoch: minibatches of the tensors (S, B, …) in ``batch`` in random order, each with noise for the entropy.

    The seeds that are not in ``learning`` draw no random numbers, as a separate run that has stopped early.
    """
    z = batch["z"]
    num_seeds, batch_size = z.shape[:2]
    order = torch.arange(num_seeds * batch_size, device=z.device).view(num_seeds, batch_size)
    noise = torch.zeros_like(z)
    for s in learning:
        order[s] = s * batch_size + torch.randperm(batch_size, generator=generators[s], device=z.device)
        noise[s] = torch.randn(z.shape[1:], generator=generators[s], device=z.device)
    order = order.flatten()
    parts = {
        name: x.flatten(0, 1).index_select(0, order).view_as(x).split(minibatch_size, dim=1)
        for name, x in batch.items()
    }
    parts["noise"] = noise.split(minibatch_size, dim=1)
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


def clone(x):
    """A copy of a tensor, without what lies beside it in a batch; anything else as it is."""
    return x.clone() if isinstance(x, Tensor) else x


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
    args_of_seeds = of_each_seed(args)
    T, S, N, B = args.num_steps, len(args_of_seeds), args.num_envs, args.batch_size
    restored = {"kl_coef": float, "normalizer": dict, "episodes": int, "recent_returns": list}
    checkpoints_of_seeds = find_checkpoints(args_of_seeds, os.path.basename(__file__), **restored)
    film = args.capture_video and can_render(args.env_id)

    # Seeding
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.torch_deterministic

    # Environments and networks of each seed, with the random numbers that its run alone would draw
    env_seeds, normalizers, agents, optimizers, generators, states_of_start, rngs = [], [], [], [], [], [], []
    for of_seed, checkpoint in zip(args_of_seeds, checkpoints_of_seeds, strict=True):
        torch.manual_seed(of_seed.seed)
        rng = np.random.default_rng(of_seed.seed)
        if checkpoint:
            rng.bit_generator.state = checkpoint["random_states"]["numpy"]  # so the environments get seeds of their own
        env_seeds += rng.integers(2**31, size=N).tolist()
        spaces = envpool.make_spec(args.env_id)
        if not spaces.observation_space.shape:
            fail(
                f"--env-id {args.env_id}: its observations must be vectors; they are a dict, as all of dm_control's are"
            )
        action_low, action_high = spaces.action_space.low, spaces.action_space.high
        obs_dim, action_dim = spaces.observation_space.shape[0], len(action_low)
        if checkpoint:
            check_shapes(checkpoint, Agent, obs_dim, action_low, action_high, args)
            normalizers.append(Normalizer(np.zeros(obs_dim), np.zeros(obs_dim), 0))  # to be restored
        else:
            norm_seeds = rng.integers(2**31, size=N).tolist()
            normalizers.append(random_statistics(args, norm_seeds, rng))
        agents.append(Agent(obs_dim, action_low, action_high, args).to(device))
        optimizers.append(make_optimizers(agents[-1], args))
        if checkpoint:
            restore(checkpoint, agents[-1], optimizers[-1], device, normalizer=normalizers[-1].state_dict())
            normalizers[-1] = Normalizer.load(checkpoint["normalizer"])
        states_of_start.append(random_states(device))
        generators.append(torch.Generator(device))
        generators[-1].set_state(states_of_start[-1][device.type])
        rngs.append(rng)
    envs = make_envs(args, S * N, env_seeds)
    # Row by row of the environments, the statistics of the seed that they belong to
    mean, std = (np.repeat([getattr(x, name) for x in normalizers], N, axis=0) for name in ("mean", "std"))
    normalizer = Normalizer(mean, std, normalizers[0].time_limit)
    together = Batch(agents)
    take_step = Optimizers(together, optimizers).step
    kl_coef = torch.full((S,), args.kl_coef, device=device)
    for s, checkpoint in enumerate(checkpoints_of_seeds):
        if checkpoint:
            kl_coef[s] = checkpoint["kl_coef"]

    # The runs' folders: from here on, something is written
    runs = [
        Run(args_of_seeds[s], args.num_iterations * B, checkpoints_of_seeds[s], unit="step", console=s == 0)
        for s in range(S)
    ]
    say = runs[0].say
    together.say = say
    if args.capture_video and not film:
        say("--capture-video: MuJoCo can't render here, for want of EGL; training goes on without videos")

    @torch.no_grad()
    def act_of_all(obs, noise):
        return (together.each(act)(obs.unflatten(0, (S, N)), noise.unflatten(0, (S, N))).flatten(0, 1),)

    losses_of_all = {
        everything: together.each(lambda agent, mb, kl_coef, e=everything: losses(agent, mb, kl_coef, args, e))
        for everything in (True, False)
    }
    if args.compile:
        act_of_all = compiled(act_of_all, device)
        losses_of_all = {everything: compiled(x, device) for everything, x in losses_of_all.items()}

    def gradients_of_all(mb, kl_coef, everything):
        return gradients(together, losses_of_all[everything], mb, kl_coef, args)

    of_replay = (vars(args), together.state, say, device.type != "cpu" or args.compile or not args.record)
    acting = Replay(act_of_all, "acting", *of_replay, in_numpy=True)

    def choose(obs, noise):
        return (acting.checked(obs, noise, trial=True) if trial else acting(obs, noise))[0]

    differentiate = Differentiate(together, gradients_of_all, *of_replay)

    def state(s, iteration):
        return {
            "script": os.path.basename(__file__),
            "agent": {name: x.clone() for name, x in agents[s].state_dict().items()},
            "optimizers": tree_map(clone, [optimizer.state_dict() for optimizer in optimizers[s]]),
            "kl_coef": kl_coef[s].item(),
            "normalizer": normalizers[s].state_dict(),
            "obs_dim": obs_dim,
            "action_low": torch.from_numpy(action_low),
            "action_high": torch.from_numpy(action_high),
            "iteration": iteration,
            "global_step": iteration * B,
            "episodes": episodes[s],
            "recent_returns": list(map(float, recent_returns[s])),
            "random_states": {
                **states_of_start[s],
                device.type: generators[s].get_state(),
                "numpy": rngs[s].bit_generator.state,
            },
        }

    def stop(s, why):
        """End the run of one seed; its environments go on with its last good policy, and nobody learns from them."""
        holds = "holds" if runs[s].save_checkpoint(previous_step, good[s]) else "lacks"
        agents[s].load_state_dict(good[s]["agent"])
        training.remove(s)
        runs[s].close(exit_code=1, keep_bar=bool(training))
        line = f"{why} in iteration {iteration}; {runs[s].folder} {holds} the state before it"
        say(f"error: {line}", file=sys.stderr)
        if not training:
            raise SystemExit(1)

    interrupted = StopRequest()
    start_time = time.time()
    diagnostics_interval = args.diagnostics_interval or math.ceil(args.num_iterations / 1000)
    snapshots = milestones(args.num_iterations, 0.025) | {0}
    checkpoints = milestones(args.num_iterations, args.checkpoint_interval) | snapshots
    evaluations = milestones(args.num_iterations, args.eval_interval or 1) if args.eval_episodes else set()
    running, episodes, recent_returns = np.zeros((2, S * N)), [0] * S, [deque(maxlen=100) for _ in range(S)]
    obs = torch.empty((T + 1, S * N, obs_dim + 1), device=device)
    obs[0] = normalizer(envs.reset()[0], running[1])
    shown = [{} for _ in range(S)]
    training = set(range(S))
    done = 0  # iterations before this process
    for s, checkpoint in enumerate(checkpoints_of_seeds):
        if checkpoint:
            done, episodes[s] = checkpoint["iteration"], checkpoint["episodes"]
            recent_returns[s].extend(checkpoint["recent_returns"])
        else:
            runs[s].save_checkpoint(0, state(s, 0))

    for iteration in range(done + 1, args.num_iterations + 1):
        diagnosed = (iteration - 1) % diagnostics_interval == 0 or iteration == args.num_iterations
        previous_step, global_step = (iteration - 1) * B, iteration * B
        scalars = [{} for _ in range(S)]
        good = [state(s, iteration - 1) for s in range(S)]

        # Rollout
        rollout_start = time.time()
        noise = [torch.randn((T, N, action_dim), generator=generator, device=device) for generator in generators]
        noise = torch.cat(noise, dim=1)
        trial = iteration == done + 1  # recordings are used once they have done this iteration as the plain code does
        together.adopt()
        acting.checked(obs[0], noise[0], trial=False)
        transitions, ended = rollout(envs, choose, normalizer, obs, noise, running)
        made = {"action": transitions.actions, "observation": obs[1:], "reward": transitions.rewards}
        broken = {name: (~x.isfinite()).view(T, S * N, -1).any(-1).nonzero() for name, x in made.items()}
        # The earliest first, and of one step the first in the order of cause and effect
        for step, i, name in sorted(
            ((*at, name) for name, x in broken.items() for at in x.tolist()), key=lambda at: at[0]
        ):
            if i // N in training:
                stop(i // N, f"the {name} of environment {i % N} in step {step + 1} of the rollout is not finite")
        for s in sorted(training):
            of_seed = [episode[1:] for episode in ended if episode[0] // N == s]
            for steps, episode_return, length in of_seed:
                scalars_of_episode = {"charts/episodic_return": episode_return, "charts/episodic_length": length}
                runs[s].log(scalars_of_episode, previous_step + steps * N)
                recent_returns[s].append(episode_return)
            if of_seed:
                episodes[s] += len(of_seed)
                scalars[s]["charts/rollout_return"] = np.mean([episode[1] for episode in of_seed])
                scalars[s]["charts/rollout_length"] = np.mean([episode[2] for episode in of_seed])

        # Advantages, and everything by seed, (S, B, …)
        update_start = time.time()
        all_layers = diagnosed or "all" in (args.pfo_layers, args.critic_pfo_layers)
        with torch.no_grad():
            # Of each seed, ((T + 1) * N, …): the policy as it acted, and the value with the one after the last step
            outputs = [agent(x, all_layers) for agent, x in zip(agents, by_seed(obs, S), strict=True)]
            values = torch.stack([critic.output.view(T + 1, N) for _, critic in outputs], dim=1).flatten(1)
            advantages, returns = gae(
                transitions.rewards, values[:-1], values[1:], transitions.dones, args.gamma, args.gae_lambda
            )
            before = [
                {name: x.map(lambda x: x[: T * N]) for name, x in zip(("actor", "critic"), output, strict=True)}
                for output in outputs
            ]
            output = torch.stack([of_seed["actor"].output for of_seed in before])
            loc, scale = loc_and_scale(output)
            z = unsquash(by_seed(transitions.actions, S))
            some = slice(None, -1, 16)  # of the rollout's steps, to see whether the policy that learns has acted
            apart = together.each(act)(by_seed(obs[some], S), by_seed(noise[some], S))
            apart = (apart - by_seed(transitions.actions[some], S)).abs().mean((1, 2)).tolist()
        for s in sorted(training):
            if not acting.off and apart[s] > 1e-4:
                off = f"{apart[s]:.1g} off those of the policy that learns"
                stop(s, f"the actions are {off}: what changes within a rollout needs --no-record")
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
            "critic_held": torch.stack(
                [pfo_input(x["critic"], args.critic_pfo_layers, args.critic_pfo_on) for x in before]
            ),
        }

        # Update phase
        for optimizer in itertools.chain(*optimizers):
            optimizer.param_groups[0]["lr"] = learning_rate(iteration, args)
            if args.reset_optimizer:
                optimizer.state.clear()
        if diagnosed:
            weights = [{name: flat_weights(network) for name, network in agent.networks().items()} for agent in agents]
        logged, num_minibatches = [[] for _ in range(S)], B // args.minibatch_size
        num_updates = args.update_epochs * num_minibatches
        learning = set(training)
        minibatches = (
            mb for _ in range(args.update_epochs) for mb in shuffled(batch, args.minibatch_size, generators, learning)
        )
        for k, mb in enumerate(minibatches):
            # Logged are the first and the last minibatch, and the KL of each where something hangs on it.
            everything = k in (0, num_updates - 1) or bool(args.kl_coef or args.target_kl)
            at_an_end = k in (0, num_updates - 1)
            grad, stats = differentiate(mb, kl_coef, everything, plain=at_an_end, checked=k == 1, trial=trial)
            take_step(grad, learning)
            for s in learning:
                logged[s].append(stats)
            if args.target_kl:
                learning -= {s for s, kl in enumerate(stats["kl"].tolist()) if kl > args.target_kl}
                if not learning:
                    break
        if not differentiate.agrees(mb, kl_coef):
            for s in sorted(training):
                stop(s, "a loss reads what changes within an update phase, which needs a tensor or --no-record")
        # The one transfer of the update phase: (number of updates and names, S)
        updates = max(map(len, logged))
        longest = next(stats for stats in logged if len(stats) == updates)
        numbers = torch.stack([x for stats in longest for x in stats.values()]).T.tolist()
        update_time = time.time() - update_start
        variances = batch["returns"].var(1).tolist(), (batch["returns"] - batch["values"]).var(1).tolist()
        for s in sorted(training):
            of_seed = iter(numbers[s])
            of_seed = [{name: next(of_seed) for name in stats} for stats in logged[s]]
            names = agents[s].networks()
            grad_norms = {name: [stats.pop(f"{name}_grad_norm") for stats in of_seed] for name in names}
            for name in of_seed[0].keys() - {"kl"}:
                scalars[s][f"losses/first_minibatch/{name}"] = of_seed[0][name]
                scalars[s][f"losses/last_minibatch/{name}"] = scalars[s][f"losses/{name}"] = of_seed[-1][name]
            scalars[s]["losses/clipfrac"] = np.mean([stats["clipfrac"] for stats in of_seed])
            scalars[s]["losses/early_stop"] = 1 - len(of_seed) / num_updates
            scalars[s]["losses/kl_coef"] = kl_coef[s].item()
            if args.kl_coef:
                last_epoch = (len(of_seed) - 1) // num_minibatches * num_minibatches
                kl = np.mean([stats["kl"] for stats in of_seed[last_epoch:]])
                kl_coef[s] = adapted_kl_coef(kl_coef[s].item(), kl, args)
            if variances[0][s] > 0:
                scalars[s]["losses/explained_variance"] = 1 - variances[1][s] / variances[0][s]
            else:
                runs[0].say_once("losses/explained_variance is logged only where the returns of a rollout differ")
            if diagnosed:
                scalars[s] |= {f"optim/{name}/grad_norm": np.mean(x) for name, x in grad_norms.items()}
            checked = {name: [stats[name] for stats in of_seed] for name in ("policy_loss", "value_loss")}
            if args.ent_coef:  # else it is a diagnostic, which stops no run
                checked["entropy"] = [of_seed[0]["entropy"], of_seed[-1]["entropy"]]
            networks = agents[s].networks().items()
            checked |= {f"{name}'s weight": [flat_weights(x).abs().max().item()] for name, x in networks}
            with torch.no_grad():
                checked["policy's output"] = agents[s].policy(obs[-1].unflatten(0, (S, N))[s]).output.flatten().tolist()
            for name, x in (checked | {f"{name}'s gradient norm": x for name, x in grad_norms.items()}).items():
                if not all(map(math.isfinite, x)):
                    runs[s].log(scalars[s], global_step)
                    stop(s, f"the {name} is not finite")
                    break

        # Diagnostics of the whole rollout, by the networks as they now are
        if diagnosed:
            diagnostics_start = time.time()
            for s in sorted(training):
                with torch.no_grad():
                    after = dict(zip(("actor", "critic"), agents[s](batch["obs"][s], True), strict=True))
                scalars[s] |= diagnose(before[s], after, z[s], by_seed(noise, S)[s], agents[s].half_width, args)
                for side in ("above", "below"):
                    if f"trust_region/ratio_{side}_std" not in scalars[s]:
                        ratios = f"trust_region/ratio_{side}_* and excess_ratio"
                        runs[0].say_once(f"{ratios} need ratios {side} the clip range (a std two)")
                for name, network in agents[s].networks().items():
                    new = flat_weights(network)
                    scalars[s][f"optim/{name}/update_norm"] = (new - weights[s][name]).norm().item()
                    scalars[s][f"optim/{name}/weight_norm"] = new.norm().item()
                shown[s]["rank"] = scalars[s]["representation/after/actor/pca_rank"]
                shown[s]["dead"] = scalars[s]["representation/after/actor/dead_units"]
            times = {"time/rollout": update_start - rollout_start, "time/update": update_time}
            times["time/diagnostics"] = time.time() - diagnostics_start
            for s in training:
                scalars[s] |= times
        del outputs, before, batch, transitions

        sps = (iteration - done) * B / (time.time() - start_time)  # of each seed; together they make S times that
        for s in sorted(training):
            scalars[s]["charts/learning_rate"] = learning_rate(iteration, args)
            scalars[s]["charts/SPS"] = scalars[s]["charts/FPS"] = sps
            runs[s].log(scalars[s], global_step)
            if recent_returns[s]:
                shown[s]["return"] = np.mean(recent_returns[s])
        of_training = [shown[s] for s in training]
        means = {name: np.mean([x[name] for x in of_training if name in x]) for name in of_training[0]}
        runs[0].progress(global_step, **means)
        if diagnosed:
            runs[0].report(global_step, sps, **means)
        # After logging, since what was logged up to a checkpoint is what a resumed run keeps
        if iteration in checkpoints or interrupted:
            for s in sorted(training):
                runs[s].save_checkpoint(global_step, state(s, iteration), iteration in snapshots)
        if iteration in evaluations:  # with the checkpoints saved: what only looks at the agents can't cost them
            for s in sorted(training):
                seeds = (
                    np.random.SeedSequence([args_of_seeds[s].seed, global_step]).generate_state(args.eval_episodes) // 2
                )
                subject = partial(evaluate, agents[s], normalizers[s], args, device, seeds.tolist())
                runs[s].evaluate(subject, global_step, film, say)
        if interrupted:
            break
        obs[0] = obs[-1]

    envs.close()
    exit_codes = {runs[s].close(interrupted.exit_code) for s in training}
    sys.exit(min(exit_codes - {0}, default=int(len(training) < S)))
