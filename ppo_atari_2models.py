# PPO on Atari with separate actor and critic: the baseline of "No Representation, No Trust" (NeurIPS 2024,
# arXiv 2405.00662), whose settings are the defaults. The paper's comparison with CleanRL takes three runs:
# CleanRL's classic setting
#   python ppo_atari_2models.py --env-id Phoenix-v5 --frame-skip 4 --repeat-action-probability 0 --noop-max 30 \
#     --fire-reset --episodic-life --layer-init orthogonal --anneal-lr --clip-vloss --adam-eps 1e-5 --vf-coef 0.5
# the paper's setting
#   python ppo_atari_2models.py --env-id Phoenix-v5
# the collapse
#   python ppo_atari_2models.py --env-id Phoenix-v5 --update-epochs 8
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import envpool
import numpy as np
import torch
import torch.nn as nn
from envpool.atari.registration import atari_game_list
from torch import Tensor

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which python -P leaves out

from common.arguments import Range, RunArgs, atari_id, check_run_args
from common.cuda_graph import Graphed, fused_adam, reset, set_learning_rate
from common.evaluation import play
from common.feature_rank import deltas, layer_measures, policy_variance
from common.replay import compiled
from common.run import Run, find_checkpoint, parse_args, prepare, random_states, restore
from common.trust_region import categorical_kl, feature_drifts, of_logits, ratio_stats
from common.update_stats import UpdatePhase, kl_of_last_epoch, of_update_phase, to_be_finite


@dataclass
class Args(RunArgs):
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of this experiment, part of the run's name"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the hidden layers in rollout and update; weights, outputs, losses and diagnostics are float32, without TF32"""
    cuda_graphs: bool = True
    """on CUDA, launch the kernels of acting and of a gradient step all at once, without Python in between"""

    # Environment
    env_id: str = "Phoenix-v5"
    """an Atari game, `Phoenix-v5` or `ALE/Phoenix-v5`"""
    frame_skip: Annotated[int, Range(1, 1000)] = 3
    """emulator frames for which an action is repeated (CleanRL: 4)"""
    repeat_action_probability: Annotated[float, Range(0, 1)] = 0.25
    """sticky actions: probability that the emulator repeats the previous action instead (CleanRL: 0)"""
    noop_max: Annotated[int, Range(0, 1000)] = 0
    """most no-op frames after a reset (CleanRL: 30); envpool's least is one, which 0 becomes"""
    fire_reset: bool = False
    """press FIRE after a reset in games that have it (CleanRL: on)"""
    episodic_life: bool = False
    """a lost life ends an episode for the learner; logged returns are the whole game's all the same (CleanRL: on)"""

    # Algorithm
    total_timesteps: Annotated[int, Range(1, 10**12)] = 100_000_000
    """length of the run in emulator frames (agent steps x frame skip), floored to whole rollouts"""
    learning_rate: Annotated[float, Range(above=0, high=1e6)] = 2.5e-4
    """Adam's learning rate, constant unless annealed"""
    anneal_lr: bool = False
    """anneal the learning rate linearly to 0, rollout by rollout"""
    cosine_lr: bool = False
    """anneal the learning rate to 0 along a half cosine"""
    num_envs: Annotated[int, Range(1, 1024)] = 8
    """environments stepped in parallel"""
    num_steps: Annotated[int, Range(1, 100_000)] = 128
    """agent steps of each environment in a rollout"""
    minibatch_size: Annotated[int, Range(1, 100_000)] = 256
    """transitions in a minibatch; must divide num_envs x num_steps"""
    update_epochs: Annotated[int, Range(1, 100_000)] = 4
    """passes over each rollout, the paper's knob of non-stationarity: 4, 6 and 8"""
    gamma: Annotated[float, Range(0, 1)] = 0.99
    """discount"""
    gae_lambda: Annotated[float, Range(0, 1)] = 0.95
    """lambda of the generalised advantage estimate"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: Annotated[float, Range(above=0, high=1e6)] = 0.1
    """epsilon: ratios beyond 1 - epsilon and 1 + epsilon give no further gradient"""
    clip_objective: bool = True
    """PPO's clipped objective; off is the plain surrogate, to go with --kl-coef or --target-kl"""
    clip_vloss: bool = False
    """clip the value's change to clip_coef as well (CleanRL: on)"""
    ent_coef: Annotated[float, Range(0, 1e6)] = 0.01
    """coefficient of the entropy bonus"""
    vf_coef: Annotated[float, Range(0, 1e6)] = 1.0
    """coefficient of the value loss, which is 0.5 x mean squared error (CleanRL: 0.5)"""
    max_grad_norm: Annotated[float, Range(above=0, high=1e6)] = 0.5
    """gradient norm to which the actor and the critic are clipped, each on its own"""
    adam_eps: Annotated[float, Range(above=0, high=1e6)] = 1e-8
    """Adam's epsilon (CleanRL: 1e-5)"""
    activation: Literal["ReLU", "GELU", "LeakyReLU", "Tanh"] = "ReLU"
    """activation of the hidden layers"""
    layer_init: Literal["pytorch", "orthogonal"] = "pytorch"
    """initial weights: PyTorch's default or CleanRL's orthogonal ones"""

    # Interventions
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
    args.env_id = atari_id(args.env_id, atari_game_list)


def make_envs(args, num_envs, seeds, **kwargs):
    """``num_envs`` games in this process, each with its own seed."""
    return envpool.make(
        args.env_id,
        env_type="gymnasium",
        num_envs=num_envs,
        seed=seeds,
        frame_skip=args.frame_skip,
        repeat_action_probability=args.repeat_action_probability,
        noop_max=max(args.noop_max, 1),  # 0 crashes envpool
        use_fire_reset=args.fire_reset,
        max_episode_steps=108_000 // args.frame_skip,  # in agent steps; ALE's limit is in frames
        **kwargs,
    )


class NetworkOutput(NamedTuple):
    """What a forward pass gives: the output, and the hidden layers for the diagnostics."""

    output: Tensor  # (N, num_outputs) logits or value
    features: Tensor  # (N, 512) last hidden layer after its activation
    preactivations: Tensor  # (N, 512) the same before its activation
    all_preactivations: Tensor | None  # (N, 21632) of all hidden layers, concatenated; None unless asked for

    def map(self, function):
        return NetworkOutput(*(None if x is None else function(x) for x in self))


def init_layer(layer, std, args):
    if args.layer_init == "orthogonal":
        nn.init.orthogonal_(layer.weight, std)
        nn.init.zeros_(layer.bias)
    return layer


class Network(nn.Module):
    """The convolutional network of Mnih et al. (2015)."""

    def __init__(self, num_outputs, output_std, args):
        super().__init__()
        self.hidden = nn.ModuleList(
            init_layer(layer, math.sqrt(2), args)
            for layer in (
                nn.Conv2d(4, 32, 8, stride=4),
                nn.Conv2d(32, 64, 4, stride=2),
                nn.Conv2d(64, 64, 3, stride=1),
                nn.Linear(64 * 7 * 7, 512),
            )
        )
        self.output = init_layer(nn.Linear(512, num_outputs), output_std, args)
        self.activation = getattr(nn, args.activation)()

    def forward(self, x, all_layers):  # (N, 4, 84, 84) in [0, 1]
        preactivations = []
        for layer in self.hidden:
            x = x.flatten(1) if isinstance(layer, nn.Linear) else x
            preactivations.append(layer(x))
            x = self.activation(preactivations[-1])
        dtype = self.hidden[0].weight.dtype  # float32, whatever the layers computed in
        everything = torch.cat([layer.flatten(1) for layer in preactivations], dim=1).to(dtype) if all_layers else None
        last = preactivations[-1].to(dtype)
        x = self.activation(last)  # of float32: torch.compile would leave out bfloat16's rounding here
        with torch.autocast(x.device.type, enabled=False):  # which ends with the hidden layers
            return NetworkOutput(self.output(x), x, last, everything)


class Agent(nn.Module):
    """Actor and critic, two networks that share nothing."""

    def __init__(self, num_actions, args):
        super().__init__()
        self.actor = Network(num_actions, 0.01, args)
        self.critic = Network(1, 1.0, args)

    def networks(self):
        return {"actor": self.actor, "critic": self.critic}

    def scale(self, obs):
        # Images are stored with their channels last, and so seen by the convolutions, which are faster so.
        x = obs.permute(0, 3, 1, 2)  # (N, 84, 84, 4) uint8 to (N, 4, 84, 84)
        return x.bfloat16().div_(255) if torch.is_autocast_enabled(x.device.type) else x / 255

    def policy(self, obs, all_layers=False):
        return self.actor(self.scale(obs), all_layers)

    def value(self, obs, all_layers=False):
        return self.critic(self.scale(obs), all_layers)

    def forward(self, obs, all_layers=False):
        x = self.scale(obs)
        return self.actor(x, all_layers), self.critic(x, all_layers)


def hidden_precision(args, device):
    """The context in which the hidden layers compute in ``--precision``; out of it, as in diagnostics, in float32."""
    cached = device.type != "cuda"  # a CUDA graph would go on with casts of the weights as they were
    return torch.autocast(device.type, torch.bfloat16, args.precision == "bfloat16", cached)


def sample(logits, noise):
    """Actions (N,) of the policy with ``logits`` (N, A), drawn by ``noise`` (N, A) from an exponential distribution."""
    return (logits - noise.log()).argmax(1)  # Gumbel's trick: −log of an exponential variable is a Gumbel one


def act(agent, obs, noise, all_layers):
    """The policy's NetworkOutput for observations (N, 84, 84, 4), and its actions (N,), drawn by ``noise`` (N, A)."""
    network = agent.policy(obs, all_layers)
    return network, sample(network.output, noise)


def choose(agent, obs, elapsed, greedy, generator):
    """Actions (N,), NumPy, for envpool's observations (N, 4, 84, 84) in an evaluation, sampled or ``greedy``."""
    x = torch.from_numpy(obs).to(generator.device).permute(0, 2, 3, 1)
    logits = agent.policy(x).output
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.argmax(1) if greedy else sample(logits, noise)).cpu().numpy()


class Rollout(NamedTuple):
    """What a rollout recorded, (num_steps, num_envs, …) each; every transition is one that an environment made."""

    actions: Tensor  # int64
    rewards: Tensor
    dones: Tensor  # 1 where the step ended an episode, by a time limit too
    policy: NetworkOutput  # as it acted


def rollout(envs, act, obs, noise, running, all_layers):
    """Step each environment ``len(noise)`` times from ``obs[0]`` on; returns a Rollout and the games that ended.

    envs: a synchronous envpool. ``act(obs, noise, all_layers)`` gives a NetworkOutput and actions.
    obs: (num_steps + 1, num_envs, 84, 84, 4) uint8 on the training device, filled from index 1.
    noise: (num_steps, num_envs, num_actions), from which the actions are sampled.
    running: (2, num_envs) return and length so far of the games in progress, carried on from rollout to rollout.
    The games that ended: tuples of the agent steps into the rollout, raw return and length in agent steps.
    """
    num_steps, num_envs = noise.shape[:2]
    # Pinned, the copy to a CUDA device need not be waited for; MPS is not safe with such copies.
    staging = torch.empty((num_envs, 84, 84, 4), dtype=torch.uint8, pin_memory=obs.is_cuda)
    rewards, dones = np.zeros((2, num_steps, num_envs), dtype=np.float32)
    actions = torch.empty((num_steps, num_envs), dtype=torch.int64, device=obs.device)
    outputs, games = [], []
    for step in range(num_steps):
        network, actions[step] = act(obs[step], noise[step], all_layers)
        outputs.append(network.map(torch.clone))  # over which a CUDA graph writes its next results

        next_obs, rewards[step], terminated, truncated, info = envs.step(actions[step].cpu().numpy())
        dones[step] = done = terminated | truncated
        running += np.stack([info["reward"], np.ones(num_envs)])
        game_over = info["terminated"].astype(bool) | truncated  # a lost life is not the end of a game
        for i in np.flatnonzero(game_over):
            games.append(((step + 1) * num_envs, running[0, i], running[1, i]))
        running[:, game_over] = 0

        # envpool spends the next step of an ended environment on its reset: no action, no reward, a new episode's
        # first observation. Spent here and now, it stays out of the rollout. After a lost life the game goes on.
        if done.any():
            ended = np.flatnonzero(done).astype(np.int32)
            next_obs[ended] = envs.step(np.zeros_like(ended), ended)[0]
        staging.copy_(torch.from_numpy(next_obs).permute(0, 2, 3, 1))
        obs[step + 1].copy_(staging, non_blocking=obs.is_cuda)
    rewards, dones = (torch.from_numpy(x).to(obs.device) for x in (rewards, dones))
    outputs = NetworkOutput(*(None if x[0] is None else torch.stack(x) for x in zip(*outputs, strict=True)))
    return Rollout(actions, rewards, dones, outputs), games


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


def actor_loss(logits, mb, kl_coef, args):
    """The actor's loss on a minibatch, and what is logged of it by name.

    logits: (N, num_actions) of the current policy; kl_coef: tensor.
    mb: the minibatch's actions, logits and advantages, as the rollout recorded them.
    """
    newlogprobs, oldlogprobs = logits.log_softmax(1), mb["logits"].log_softmax(1)
    logratio = (newlogprobs - oldlogprobs).gather(1, mb["actions"].unsqueeze(1)).squeeze(1)
    ratio = logratio.exp()
    mb_advantages = mb["advantages"]
    if args.norm_adv:
        mb_advantages = (mb_advantages - mb_advantages.mean()) / mb_advantages.std(correction=0).clamp(min=1e-6)

    pg_loss = -mb_advantages * ratio
    if args.clip_objective:
        pg_loss = torch.max(pg_loss, -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef))

    pg_loss = pg_loss.mean()

    entropy = -(newlogprobs.exp() * newlogprobs).sum(1).mean()
    kl = (oldlogprobs.exp() * (oldlogprobs - newlogprobs)).sum(1).mean()
    loss = pg_loss - args.ent_coef * entropy
    if args.kl_coef:
        loss = loss + kl_coef * kl
    return loss, {
        "policy_loss": pg_loss,
        "entropy": entropy,
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        "kl": kl,
    }


def critic_loss(newvalue, mb, args):
    """The critic's loss on a minibatch, and what is logged of it by name.

    newvalue: (N,) of the current critic.
    mb: the minibatch's returns and values, as computed before the update phase.
    """
    v_loss = (newvalue - mb["returns"]).square()
    if args.clip_vloss:
        v_clipped = mb["values"] + (newvalue - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - mb["returns"]).square())

    v_loss = 0.5 * v_loss.mean()
    return args.vf_coef * v_loss, {"value_loss": v_loss}


def losses(agent, batch, mb_inds, kl_coef, args):
    """The sum of both losses on the minibatch ``mb_inds`` of a batch, and what is logged of them by name."""
    mb = {name: x.index_select(0, mb_inds) for name, x in batch.items()}
    with hidden_precision(args, mb["obs"].device):
        policy, value = agent(mb["obs"])
    a_loss, a_logged = actor_loss(policy.output, mb, kl_coef, args)
    c_loss, c_logged = critic_loss(value.output.squeeze(1), mb, args)
    return a_loss + c_loss, {name: x.detach() for name, x in {**a_logged, **c_logged}.items()}


def make_optimizers(agent, args):
    """Adam for the actor and Adam for the critic."""
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps, **fused_adam(args.learning_rate, agent)}
    return torch.optim.Adam(agent.actor.parameters(), **adam), torch.optim.Adam(agent.critic.parameters(), **adam)


def update(agent, losses, optimizers, batch, mb_inds, kl_coef, args):
    """One gradient step on a minibatch; returns what is logged by name, without waiting for the device."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss, logged = losses(agent, batch, mb_inds, kl_coef, args)
    loss.backward()
    logged["actor_grad_norm"] = nn.utils.clip_grad_norm_(agent.actor.parameters(), args.max_grad_norm)
    logged["critic_grad_norm"] = nn.utils.clip_grad_norm_(agent.critic.parameters(), args.max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
    return logged


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


def diagnose(before, after, actions, args):
    """The representation and trust region measures of a rollout, by tag.

    before, after: the NetworkOutput of actor and critic, by these names, for the rollout's N transitions at the two
    ends of the update phase, with all layers. actions: (N,).
    """
    tags = {}
    for when, networks in (("before", before), ("after", after)):
        logits, value = networks["actor"].output, networks["critic"].output
        tags[f"representation/{when}/policy_variance"] = policy_variance(logits.softmax(1))
        tags[f"representation/{when}/entropy"] = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        tags[f"representation/{when}/value_mean"] = value.mean()
        tags[f"representation/{when}/value_std"] = value.std()
        for name, network in networks.items():
            measures = layer_measures(network, args.activation)
            tags.update({f"representation/{when}/{name}/{measure}": x for measure, x in measures.items()})
    tags |= deltas(tags)

    logits, new_logits = before["actor"].output, after["actor"].output
    logratio = (new_logits.log_softmax(1) - logits.log_softmax(1)).gather(1, actions.unsqueeze(1)).squeeze(1)
    tags.update({f"trust_region/{name}": x for name, x in ratio_stats(logratio, args.clip_coef).items()})
    tags["trust_region/kl"] = categorical_kl(logits, new_logits).mean()
    tags |= of_logits(logits, new_logits)
    for name in ("actor", "critic"):
        drifts = feature_drifts(before[name], after[name])
        tags.update({f"trust_region/{name}_{measure}": x for measure, x in drifts.items()})
    return {tag: float(x) for tag, x in tags.items()}


if __name__ == "__main__":
    args = parse_args(Args)
    check_args(args)
    device = prepare(args)
    checkpoint = find_checkpoint(args, os.path.basename(__file__), num_actions=int, kl_coef=float)
    T, N, B = args.num_steps, args.num_envs, args.batch_size

    # Seeding
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    if checkpoint:
        rng.bit_generator.state = checkpoint["random_states"]["numpy"]  # so the environments get seeds of their own

    # Environments
    envs = make_envs(args, N, rng.integers(2**31, size=N).tolist(), episodic_life=args.episodic_life, reward_clip=True)
    num_actions = int(envs.action_space.n)

    # Networks
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last  # MPS has had wrong results
    agent = Agent(num_actions, args).to(device, memory_format=layout)
    optimizers = make_optimizers(agent, args)
    kl_coef = torch.tensor(args.kl_coef, device=device)
    if checkpoint:
        restore(checkpoint, agent, optimizers, device)
        kl_coef.fill_(checkpoint["kl_coef"])
    acting = torch.no_grad()(act)
    if args.compile:
        acting, losses = compiled(acting, device), compiled(losses, device)

    def state():
        return {
            "script": os.path.basename(__file__),
            "agent": agent.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "kl_coef": kl_coef.item(),
            "num_actions": num_actions,
            "random_states": {**random_states(device), "numpy": rng.bit_generator.state},
        }

    evaluation = partial(play, partial(make_envs, args), partial(choose, agent), device, 60 / args.frame_skip)
    run = Run(args, state, checkpoint, evaluation)  # from here on, something is written
    if args.noop_max == 0:
        run.say("--noop-max 0: becomes envpool's least, one no-op frame after a reset")
    acting = partial(Graphed(acting, "acting", args, device, run), agent)
    take_step = Graphed(update, "a gradient step", args, device, run, lambda agent, losses, _, *x: losses(agent, *x)[1])
    obs = torch.empty((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device)
    obs[-1] = torch.from_numpy(envs.reset()[0]).permute(0, 2, 3, 1)
    running = np.zeros((2, N))

    for iteration in run:
        # Rollout
        obs[0] = obs[-1]
        noise = torch.empty((T, N, num_actions), device=device).exponential_()
        with hidden_precision(args, device):
            transitions, games = rollout(envs, acting, obs, noise, running, run.diagnosed)
        run.log_episodes(games)
        run.lap("rollout")

        # Advantages, and everything flattened to (B, …)
        with torch.no_grad(), hidden_precision(args, device):
            critic = agent.value(obs.flatten(0, 1), run.diagnosed)  # ((T + 1) * N, …): with the observation after it
            values = critic.output.view(T + 1, N)
            advantages, returns = gae(
                transitions.rewards, values[:-1], values[1:], transitions.dones, args.gamma, args.gae_lambda
            )
            actor = transitions.policy.map(lambda x: x.flatten(0, 1))
            if args.precision == "bfloat16":  # in which a few environments may round otherwise than a minibatch
                actor = agent.policy(obs[:-1].flatten(0, 1), run.diagnosed)
        before = {"actor": actor, "critic": critic.map(lambda x: x[:B])}
        batch = {
            "obs": obs[:-1].flatten(0, 1),
            "actions": transitions.actions.flatten(),
            "logits": before["actor"].output,
            "values": values[:-1].flatten(),
            "advantages": advantages.flatten(),
            "returns": returns.flatten(),
        }

        # Update phase
        run.scalars["charts/learning_rate"] = learning_rate(iteration, args)
        set_learning_rate(optimizers, learning_rate(iteration, args))
        if args.reset_optimizer:
            reset(optimizers)
        if run.diagnosed and args.precision == "bfloat16":  # whose rounding would pass for directions of features
            with torch.no_grad():
                before = dict(zip(("actor", "critic"), agent(batch["obs"], True), strict=True))
        order = torch.cat([torch.randperm(B, device=device) for _ in range(args.update_epochs)])
        order = order.split(args.minibatch_size)
        logged, phase = [], UpdatePhase(agent, batch, len(order), categorical_kl, run.diagnosed)
        for k, mb_inds in enumerate(order):
            with phase.step(k, batch["advantages"][mb_inds]):
                stats = take_step(agent, losses, optimizers, batch, mb_inds, kl_coef, args)
            logged.append(torch.stack(list(stats.values())))
            if args.target_kl and stats["kl"].item() > args.target_kl:
                break
        # The one transfer of the update phase: what was logged by name, of each minibatch
        logged = [dict(zip(stats, x, strict=True)) for x in torch.stack(logged).tolist()]
        run.lap("update")
        run.scalars |= of_update_phase(logged, len(order), kl_coef.item())
        if args.kl_coef:
            kl_coef.fill_(adapted_kl_coef(kl_coef.item(), kl_of_last_epoch(logged, B // args.minibatch_size), args))
        if returns.var() > 0:
            unexplained = (returns - values[:-1]).var() / returns.var()
            run.scalars["losses/explained_variance"] = (1 - unexplained).item()
        run.require_finite(to_be_finite(("policy_loss", "value_loss", "entropy"), logged, agent.networks()))

        # Diagnostics of the whole rollout, by the networks as they now are
        if run.diagnosed:
            with torch.no_grad():
                after = dict(zip(("actor", "critic"), agent(batch["obs"], True), strict=True))
            run.scalars |= diagnose(before, after, batch["actions"], args)
            run.scalars |= phase.measures(logged, before, after, args.activation, run.untrained)
            del after
            run.lap("diagnostics")
        del actor, critic, before, batch, transitions

    envs.close()
    sys.exit(run.close())
