# How well can the networks of each checkpoint of a run still fit random targets? The plasticity loss of "No
# Representation, No Trust" (NeurIPS 2024, arXiv 2405.00662, figure 1), for a run of any of the training scripts here:
# the paper's probe, whose defaults are those of Atari or of MuJoCo
#   python plasticity_probe.py runs/Phoenix-v5__ppo_pfo_atari__1__1763820000
# all runs of a study, and the first and the last checkpoint alone
#   python plasticity_probe.py runs/*
#   python plasticity_probe.py runs/* --checkpoints first last
# can it still fit what it was at the start, on what it now sees?
#   python plasticity_probe.py runs/* --targets initial --data each --name plasticity_initial
#
# One data set and one random target network serve all checkpoints of a run. The networks, the environment and the
# sampling of actions are those of the run's own script. Results are written to runs/RUN/plasticity/: a line of
# plasticity.csv for each network of a checkpoint, and TensorBoard events.
import ast
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib
import io
import json
import math
import os
import re
import sys
import time
import types
import typing
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.func import functional_call

sys.path.append(str(Path(__file__).resolve().parent))  # which python -P leaves out
from common.arguments import check_range, fail, pick_device
from common.checkpoint import BadCheckpoint, load_checkpoint
from common.curvature import gradient_cosine, hessian_max, hessian_product, hessian_trace, ntk, ntk_effective_rank
from common.feature_rank import RANKS, SIGMAS, dead_units, dormant_fraction, feature_ranks, feature_stats, mean_norm
from common.run import MAY_DIFFER, git_revision, library_versions, parse_args
from common.trust_region import categorical_kl, normal_kl

try:
    import fcntl
except ImportError:  # Windows has no such locks; there, nothing keeps two probes out of one folder
    fcntl = None

ROOT = Path(__file__).resolve().parent
LOSSES = ("initial_loss", "final_loss", "last_minibatch_loss", "loss_auc")
MEASURES = (
    *(
        *RANKS,
        *SIGMAS,
        "dead_units",
        "dead_fraction",
        "dormant_fraction",
        "feature_norm",
        "feature_mean",
        "feature_std",
    ),
    *("preactivation_norm", "all_preactivation_norm"),
)
# Of the checkpoint's own weights; empty in the CSV, and not in the events, where they were not asked for
CURVATURE = ("ntk_effective_rank", "gradient_cosine", "hessian_max", "hessian_trace")
LOGGED = (*LOSSES, *CURVATURE, *(f"{when}/{name}" for when in ("before", "after") for name in MEASURES))
COLUMNS = ("global_step", "network", *LOGGED, "weights_crc32")  # the last says which weights were fitted
# What a unit that counts as dead does on the data set, and what follows where all of a layer are.
DEAD = {
    "ReLU": "0 on every observation: the output can't depend on what the network sees",
    "GELU": "0 on every observation: the output can't depend on what the network sees",
    "Tanh": "constant within 0.001: the output hardly depends on what the network sees",
    "LeakyReLU": "negative on every observation: the layer is linear there",
}
NUM_THREADS = torch.get_num_threads()
CHUNK = 512  # observations of a forward pass over the data set: the hidden layers of 36 000 would take gigabytes


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, probed one after the other"""
    checkpoints: tuple[str, ...] = ()
    """which checkpoints to fit, by their global step, `first` or `last`; none given is all"""
    networks: tuple[Literal["actor", "critic"], ...] = ("actor", "critic")
    """which networks to fit; neither fit depends on the other"""
    data: Literal["first", "each"] = "first"
    """the run's first checkpoint acts to make the data for all checkpoints, or each makes its own"""
    targets: Literal["random", "initial"] = "random"
    """fit the outputs of random networks of the run's class, or those of the run's first checkpoint"""
    target_seed: int = 27
    """seed of the weights of the random targets"""
    seed: int = 1
    """seed of the data's environments and actions, and of the minibatches"""
    num_envs: int = 0
    """environments, of 36 000 agent steps (and 1 GB) each on Atari, 1000 on MuJoCo; 0 is the paper's: 1 and 4"""
    max_samples: int = 0
    """most observations in the data set, reached by fewer steps of each environment; 0 is no limit"""
    epochs: int = 0
    """passes over the data in a fit; 0 is the paper's: 1 on Atari, 4 on MuJoCo"""
    anneal_lr: bool = False
    """anneal the learning rate, which is the run's, linearly to 0 over a fit, minibatch by minibatch"""
    max_grad_norm: float = 0.5
    """gradient norm to which each fit is clipped"""
    curvature: bool = True
    """measure tangent kernel, gradients and Hessian before each fit, of 64 states on Atari, 128 on MuJoCo"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes CUDA, then MPS, then the CPU"""
    name: str = "plasticity"
    """folder in the run's that gets the results; it holds those of one setting"""


class Refused(Exception):
    """A run that can't be probed as it was asked for; the message is for the user."""


def check_args(args):
    """Refuse what can't run before anything is started."""
    if not args.runs:
        fail("RUNS: name at least one run's folder, as runs/*")
    for which in args.checkpoints:
        if which not in ("first", "last") and not which.isdecimal():
            fail(f"--checkpoints {which}: must be global steps, first or last")
    if not args.networks:
        fail("--networks: must name actor, critic or both")
    args.networks = tuple(dict.fromkeys(args.networks))
    check_range(args, "seed target_seed", low=0, high=2**31 - 1)
    check_range(args, "num_envs", low=0, high=1024)
    check_range(args, "max_samples epochs", low=0, high=10**9)
    check_range(args, "max_grad_norm", above=0, high=1e6)
    if not re.fullmatch(r"[\w+-][\w.+-]*", args.name) or args.name in ("checkpoints", "videos", "wandb"):
        fail(f"--name {args.name!r}: must be letters, digits and . _ + -, and no folder that the run has anyway")


def open_checkpoint(path):
    """The checkpoint ``{step}.pt`` as a dict, its tensors on the CPU; opening it runs no code. Raises BadCheckpoint."""
    try:
        checkpoint = load_checkpoint(path)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"can't be read: {error}") from None
    if not all(x.isfinite().all() for x in checkpoint["agent"].values()):
        raise BadCheckpoint("has weights that are not finite numbers")
    if checkpoint["global_step"] != int(path.stem):
        raise BadCheckpoint(f"was made at step {checkpoint['global_step']}, not {path.stem}")
    return checkpoint


@functools.cache
def training_scripts():
    """Names of this project's training scripts, ``ppo_atari.py`` and so on, found by what they define.

    A checkpoint may name any file; only these are imported.
    """
    needed, found = {"Args", "check_args", "make_envs", "Agent", "rollout"}, []
    for path in sorted(ROOT.glob("*.py")):
        with contextlib.suppress(SyntaxError, ValueError):  # a copy that somebody is still writing is none
            if needed <= {getattr(node, "name", None) for node in ast.parse(path.read_text(encoding="utf-8")).body}:
                found.append(path.name)
    return found


def may_be(value, kind):
    """Whether a field annotated as ``kind`` may have ``value``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return isinstance(value, str | int) and value in parts
    if origin in (typing.Union, types.UnionType):
        return any(may_be(value, part) for part in parts)
    if origin is tuple:
        parts = parts[:1] * len(value) if isinstance(value, tuple) and ... in parts else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(may_be, value, parts))
    return type(value) is kind or (kind is float and type(value) is int)


def script_and_args(checkpoint):
    """The module that made a checkpoint and the run's Args, checked as if typed by hand. Raises BadCheckpoint."""
    if checkpoint["script"] not in training_scripts():
        raise BadCheckpoint(f"was made by {checkpoint['script'][:100]!r}, which is no training script here")
    try:
        script = importlib.import_module(checkpoint["script"].removesuffix(".py"))
    except Exception as error:  # of a copy, whatever its author has not finished
        reason = f"{type(error).__name__}, {error}"
        raise BadCheckpoint(f"was made by {checkpoint['script']}, which can't be imported: {reason}") from None
    kinds, values = typing.get_type_hints(script.Args), {}
    for name, value in checkpoint["args"].items():
        if name not in kinds:
            raise BadCheckpoint(f"has an argument that {script.__name__}.py doesn't know: {str(name)[:100]!r}")
        if name != "resume" and not may_be(value, kinds[name]):  # a name or several, where a script takes several
            raise BadCheckpoint(f"has an argument with a value that it can't have: {name}")
        values[name] = value
    values = {field.name: values[field.name] for field in dataclasses.fields(script.Args)
              if field.init and field.name in values}  # fmt: skip
    run_args = script.Args(**values)
    run_args.compile = False  # nothing here is compiled, nor needs a compiler
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            script.check_args(run_args)
    except SystemExit:
        raise BadCheckpoint(f"has arguments that can't be: {said.getvalue().strip()}") from None
    return script, run_args


class Atari:
    """What the probe needs to know of the scripts with a categorical policy on images."""

    num_envs, num_steps, epochs = 1, 36_000, 1  # the paper's data set and fit
    curvature_states = 64  # a Jacobian of one output on all of them takes 432 MB

    @staticmethod
    def agent(script, envs, args):
        return script.Agent(int(envs.action_space.n), args)

    @staticmethod
    def statistics(script, checkpoint, agent):
        """The run's observation statistics; images have none."""

    @staticmethod
    def collect(script, envs, policy, statistics, num_steps, generator):
        """The observations before ``num_steps`` actions of ``policy`` in each environment, (num_steps * num_envs, …).

        ``policy(obs, all_layers)`` gives a NetworkOutput on the CPU. Uint8 (…, 84, 84, 4), channels last.
        """
        num_envs = len(envs.all_env_ids)
        obs = torch.empty((num_steps + 1, num_envs, 84, 84, 4), dtype=torch.uint8)
        obs[0] = torch.from_numpy(envs.reset()[0]).permute(0, 2, 3, 1)
        running = np.zeros((2, num_envs))

        def act(obs, noise, all_layers):
            network = policy(obs, all_layers)
            return network, script.sample(network.output, noise)

        for part in torch.arange(num_steps).split(CHUNK):  # a rollout keeps the features of all its steps
            noise = torch.empty((len(part), num_envs, int(envs.action_space.n))).exponential_(generator=generator)
            script.rollout(envs, act, obs[part[0] : part[-1] + 2], noise, running, False)
        return obs[:-1].flatten(0, 1)

    @staticmethod
    def kl(script, target, output):
        """KL(target ‖ output) (N,) of two policies, from the outputs of their networks."""
        return categorical_kl(target, output)


class MuJoCo:
    """The same of the scripts with a squashed normal policy on vectors, which the run's own statistics normalise."""

    num_envs, num_steps, epochs = 4, 1000, 4
    curvature_states = 128

    @staticmethod
    def agent(script, envs, args):
        return script.Agent(envs.observation_space.shape[0], envs.action_space.low, envs.action_space.high, args)

    @staticmethod
    def statistics(script, checkpoint, agent):
        kept = checkpoint.get("normalizer")
        try:
            mean, std = (kept[name].double().numpy() for name in ("mean", "std"))
            time_limit = kept["time_limit"]
        except (LookupError, TypeError, AttributeError):
            raise BadCheckpoint("is without the run's observation statistics") from None
        size = (agent.actor.hidden[0].in_features - 1,)
        if {mean.shape, std.shape} != {size} or not np.isfinite([mean, std]).all() or not may_be(time_limit, int):
            raise BadCheckpoint("has observation statistics that don't fit its networks")
        return script.Normalizer(mean, std, max(time_limit, 1))

    @staticmethod
    def collect(script, envs, policy, statistics, num_steps, generator):
        """As on Atari; float32 (…, D + 1), normalised and with the time feature."""
        num_envs = len(envs.all_env_ids)
        running = np.zeros((2, num_envs))
        first = statistics(envs.reset()[0], running[1])
        obs = torch.empty((num_steps + 1, *first.shape))
        obs[0] = first
        noise = torch.randn((num_steps, num_envs, len(envs.action_space.low)), generator=generator)

        def act(obs, noise):
            return (script.sample(policy(obs).output, noise),)

        script.rollout(envs, act, statistics, obs, noise, running)
        return obs[:-1].flatten(0, 1)

    @staticmethod
    def kl(script, target, output):
        """KL(target ‖ output) (N,) of two policies: that of the normals under the tanh, or of categorical ones."""
        if not hasattr(script, "loc_and_scale"):
            return categorical_kl(target, output)
        return normal_kl(*script.loc_and_scale(target), *script.loc_and_scale(output))


def separate(agent, name):
    """How to call a copy of one network of ``agent``, and its parameters; a trunk that two shared becomes its own."""
    agent = copy.deepcopy(agent)
    return (agent.policy if name == "actor" else agent.value), list(agent.networks()[name].parameters())


@torch.no_grad()
def outputs_of(network, obs, device):
    """The outputs (N, …) on the CPU of ``network(obs, all_layers)`` for all of ``obs``."""
    return torch.cat([network(part.to(device), False).output.cpu() for part in obs.split(CHUNK)])


@torch.no_grad()
def measure(network, obs, activation, device):
    """The outputs (N, …) as ``outputs_of`` gives them, every measure of the features by name, and their number."""
    outputs, features, norms = [], [], []
    for part in obs.split(CHUNK):
        layers = network(part.to(device), True)
        outputs.append(layers.output.cpu())
        features.append(layers.features)
        norms.append([len(part) * mean_norm(x).item() for x in (layers.preactivations, layers.all_preactivations)])
    features = torch.cat(features)
    preactivation_norm, all_preactivation_norm = np.sum(norms, axis=0) / len(obs)
    dead = dead_units(features, activation)
    measures = {
        **feature_ranks(features),
        "dead_units": dead,
        "dead_fraction": dead / features.shape[1],
        "dormant_fraction": dormant_fraction(features),
        **feature_stats(features),
        "preactivation_norm": preactivation_norm,
        "all_preactivation_norm": all_preactivation_norm,
    }
    return torch.cat(outputs), {name: float(x) for name, x in measures.items()}, features.shape[1]


class Output(nn.Module):
    """One network of an agent, for ``functional_call``, which takes modules alone."""

    def __init__(self, agent, name):
        super().__init__()
        self.agent, self.network = agent, {"actor": "policy", "critic": "value"}[name]

    def forward(self, obs):
        return getattr(self.agent, self.network)(obs, False).output


def as_function(agent, name):
    """One network as a function of its parameters and observations, and its parameters by name.

    Layers that learn from what passes through them, as BatchNorm, are as in evaluation: there is no sample by sample
    otherwise.
    """
    module = Output(copy.deepcopy(agent).eval(), name)
    own = set(map(id, module.agent.networks()[name].parameters()))
    parameters = {key: p.detach() for key, p in module.named_parameters() if id(p) in own}
    return (lambda parameters, obs: functional_call(module, parameters, (obs,))), parameters


def curvature(agent, name, obs, target, plan, seed, device):
    """CURVATURE by name, of the network as it is and the loss of a fit to ``target`` (N, …), on some of ``obs`` (N, …).

    Which states, and what the estimates draw, depends on ``seed`` alone: it is the same for all checkpoints. Raises
    Refused where `torch.func` can't take the network's derivatives, or memory is short.
    """
    generator = torch.Generator().manual_seed(stream(seed, "curvature"))
    chosen = torch.randperm(len(obs), generator=generator)[: plan.kind.curvature_states]
    obs, target = obs[chosen].to(device), target[chosen].to(device)
    function, parameters = as_function(agent, name)

    def loss(parameters, obs, target):
        return loss_of(plan, name)(plan.script, target, function(parameters, obs))

    try:
        product = hessian_product(lambda parameters: loss(parameters, obs, target).mean(), parameters)
        measures = (
            ntk_effective_rank(ntk(function, parameters, obs)),
            gradient_cosine(loss, parameters, obs, target),
            hessian_max(product, parameters, generator),
            hessian_trace(product, parameters, generator),
        )
    except RuntimeError as error:  # as where a copy takes a number out of a tensor, which torch.func does not allow
        reason = str(error).strip().split("\n")[0][:200]
        why = f"can't be measured ({reason}); --no-curvature goes without"
        raise Refused(f"{plan.run}: the curvature of the {name} {why}") from None
    return {name: x.item() for name, x in zip(CURVATURE, measures, strict=True)}


def squared_error(script, target, output):
    """The squared error (N,) of values (N, 1)."""
    return (output - target).square().squeeze(1)


def loss_of(plan, name):
    """``loss(script, target, output)`` of a network by name, (N,)."""
    return {"actor": plan.kind.kl, "critic": squared_error}[name]


def fit(network, parameters, obs, target, loss, plan, args, generator, device):
    """Fit ``network`` to ``target`` (N, …) on ``obs`` (N, …); returns the loss of each minibatch before its step.

    ``loss(script, target, output)`` gives the loss (N,) of each sample. A fresh Adam has the run's learning rate, betas
    and epsilon; minibatches have the run's size, in a new order for each epoch, of which an incomplete last one is
    dropped.
    """
    lr, betas = plan.run_args.learning_rate, (plan.run_args.adam_beta1, plan.run_args.adam_beta2)
    optimizer = torch.optim.Adam(parameters, lr, betas, plan.run_args.adam_eps, fused=True)
    size = plan.run_args.minibatch_size
    order = [torch.randperm(len(obs), generator=generator).split(size) for _ in range(plan.epochs)]
    order = [mb_inds for epoch in order for mb_inds in epoch if len(mb_inds) == size]
    losses = []
    for step, mb_inds in enumerate(order):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / len(order))
        output = network(obs.index_select(0, mb_inds).to(device), False).output
        mb_loss = loss(plan.script, target.index_select(0, mb_inds).to(device), output).mean()
        optimizer.zero_grad()
        mb_loss.backward()
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        losses.append(mb_loss.detach())
    return torch.stack(losses).tolist()


def stream(seed, purpose):
    """A seed for one purpose: what one of them draws doesn't depend on whether the others draw."""
    purposes = ("data", "actor", "critic", "curvature")
    return int(np.random.SeedSequence([seed, purposes.index(purpose)]).generate_state(1)[0])


@dataclass
class Plan:
    """What is to be done with a run."""

    run: Path
    paths: list  # of the numbered checkpoints, in order
    first: Path  # the first one that can be read
    script: types.ModuleType
    run_args: object  # the script's Args
    kind: type  # Atari or MuJoCo
    num_envs: int
    num_steps: int  # agent steps of each environment
    epochs: int
    settings: dict  # what the results depend on, as JSON has it
    bad: dict  # what is wrong with each of the paths that can't be probed
    defaults: list  # flags that the run lacks, with the values that they have here


def learnt_by(script, run_args):
    """What makes two checkpoints those of one run: the script, and the arguments that decide what is learnt."""
    free = MAY_DIFFER | {"total_timesteps", "num_iterations"}  # a run that is resumed may get longer
    return script.__name__, tuple(x for x in dataclasses.asdict(run_args).items() if x[0] not in free)


def make_plan(run, args, device):
    """The Plan of a run. Raises Refused where nothing in it can be probed, or not as ``args`` want it.

    A folder may hold checkpoints of other runs. The run is what most of them are of; of as many, what the first is of.
    """
    if not (run / "checkpoints").is_dir():
        raise Refused(f"{run}: must be a run's folder, with checkpoints/ in it")
    # The numbers alone: a run may keep a rolling checkpoint beside those of its milestones.
    paths = {int(path.stem): path for path in run.glob("checkpoints/*.pt") if re.fullmatch("[0-9]{1,18}", path.stem)}
    paths = [paths[step] for step in sorted(paths)]
    bad, found = {}, {}
    for path in paths:
        try:
            checkpoint = open_checkpoint(path)
            found[path] = script_and_args(checkpoint)
        except BadCheckpoint as error:
            bad[path] = str(error)
    counts = Counter(learnt_by(*made) for made in found.values())
    for path, made in found.items():
        if learnt_by(*made) != counts.most_common(1)[0][0]:
            bad[path] = f"is of another run than most in {run}"
    for path, (script, run_args) in found.items():
        if path in bad:
            continue
        kind = Atari if hasattr(script.Args, "frame_skip") else MuJoCo
        try:
            checkpoint = open_checkpoint(path)
            agent = new_agent(script, kind, run_args, args.target_seed, device, checkpoint["agent"])
            load_weights(checkpoint, agent, script, kind)
            break
        except BadCheckpoint as error:
            bad[path] = str(error)
    else:
        for broken, why in sorted(bad.items(), key=lambda x: int(x[0].stem)):
            complain(f"{broken}: {why}")
        raise Refused(f"{run}: has no checkpoint that can be probed")
    num_envs = args.num_envs or kind.num_envs
    num_steps = min(kind.num_steps, (args.max_samples or math.inf) // num_envs)
    if num_envs * num_steps < run_args.minibatch_size:
        flag = f"--max-samples {args.max_samples}" if args.max_samples else f"--num-envs {num_envs}"
        size = run_args.minibatch_size
        raise Refused(f"{flag}: must give at least one minibatch, which has {size} samples in {run}")
    epochs = args.epochs or kind.epochs
    settings = {
        "script": script.__name__ + ".py",
        "first_checkpoint": int(path.stem),
        "data": args.data,
        "targets": args.targets,
        "target_seed": args.target_seed if args.targets == "random" else None,
        "seed": args.seed,
        "num_envs": num_envs,
        "steps_per_env": int(num_steps),
        "epochs": epochs,
        "anneal_lr": args.anneal_lr,
        "max_grad_norm": args.max_grad_norm,
        "device": device.type,
    }
    folder = run / args.name
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder}: is not a folder, for results to be kept in; name another --name")
    if not os.access(folder if folder.exists() else run, os.W_OK | os.X_OK):
        raise Refused(f"{folder}: can't be written")
    check_settings(folder, settings)
    read_results(folder)  # raises where it can't, before anything is started
    steps = [int(path.stem) for path in paths]
    for which in args.checkpoints:
        if which.isdecimal() and int(which) not in steps:
            nearest = min(steps, key=lambda step: abs(step - int(which)))
            raise Refused(f"--checkpoints {which}: is no checkpoint of {run}; the nearest is {nearest}")
    values = {name: x for name, x in dataclasses.asdict(run_args).items() if name not in checkpoint["args"]}
    defaults = [f"--{name.replace('_', '-')} {x}" for name, x in values.items() if name not in MAY_DIFFER]
    return Plan(run, paths, path, script, run_args, kind, num_envs, int(num_steps), epochs, settings, bad, defaults)


def new_agent(script, kind, run_args, seed, device, weights=None):
    """A randomly initialised agent of a run's class. Raises BadCheckpoint if ``weights`` by name don't fit it."""
    envs = script.make_envs(run_args, 1, [0])
    if weights is not None:  # shapes alone, before memory is taken for networks of any size
        with torch.device("meta"):
            shapes = {name: x.shape for name, x in kind.agent(script, envs, run_args).state_dict().items()}
        if shapes != {name: x.shape for name, x in weights.items()}:
            envs.close()
            raise BadCheckpoint("has weights that don't fit its arguments")
    torch.manual_seed(seed)
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last  # as in training
    agent = kind.agent(script, envs, run_args).to(device, memory_format=layout)
    envs.close()
    return agent


def load_weights(checkpoint, agent, script, kind):
    """``agent`` with the checkpoint's weights, and the run's observation statistics. Raises BadCheckpoint."""
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        reason = (str(error).splitlines() * 2)[1].strip()  # the first line names the class, the second what is wrong
        raise BadCheckpoint(f"doesn't fit the networks of {script.__name__}.py: {reason[:200]}") from None
    return agent, kind.statistics(script, checkpoint, agent)


def complain(message):
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def check_settings(folder, settings):
    """Refuse to add to results of other settings, or to files that aren't the probe's."""
    path = folder / "settings.json"
    if not path.exists() and not (folder / "plasticity.csv").exists():
        return
    try:
        found = json.loads(path.read_text())["settings"]
        differ = [f"{key} {found.get(key)}, not {settings.get(key)}" for key in {**settings, **found}
                  if found.get(key) != settings.get(key)]  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        why = "can't be read, so that it can't say how the results beside it were made; name another --name"
        raise Refused(f"{path}: {why}") from None
    if differ:
        raise Refused(f"{folder}: holds a probe with {'; '.join(differ)}; name another --name, or remove the folder")


def replace(path, write):
    """Have ``write(file)`` write the file ``path``, all or nothing."""
    unfinished = path.with_name("unfinished.tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave a whole name on half a file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_results(folder):
    """The rows of plasticity.csv by (global_step, network), {} if there is none."""
    path = folder / "plasticity.csv"
    if not path.exists():
        return {}
    try:
        with open(path, newline="") as file:
            reader = csv.reader(file)
            columns = tuple(next(reader))
            # Before they were measured, the columns weren't there.
            if columns not in (COLUMNS, tuple(x for x in COLUMNS if x not in CURVATURE)):
                raise ValueError
            rows = [dict.fromkeys(COLUMNS, "") | dict(zip(columns, row, strict=True)) for row in reader]
        kinds = {"network": str, "global_step": int, "weights_crc32": int}
        kinds |= dict.fromkeys(CURVATURE, lambda x: float(x) if x else None)
        rows = [{key: kinds.get(key, float)(x) for key, x in row.items()} for row in rows]
        return {(row["global_step"], row["network"]): row for row in rows}
    except (OSError, ValueError, StopIteration):
        raise Refused(f"{path}: is not as the probe wrote it; name another --name, or remove the folder") from None


def write_results(folder, settings, rows, key, made):
    """Write ``rows``, and the events of the one at ``key``; a crash between any two files leaves what can be gone on.

    key: its step and network. made: when the checkpoint was made, in seconds, for the time that TensorBoard shows.
    """
    if not (folder / "settings.json").exists():
        origin = {"settings": settings, "versions": library_versions(), "git_revision": git_revision()}
        replace(folder / "settings.json", lambda file: file.write(json.dumps(origin, indent=2).encode()))

    # A file for each fit, named so that TensorBoard reads them in the order of the steps, and never half there.
    def write_events(file):
        step, network = key
        events = RecordWriter(file)
        events.write(Event(wall_time=made, file_version="brain.Event:2").SerializeToString())
        values = [Summary.Value(tag=f"plasticity/{network}/{name}", simple_value=rows[key][name]) for name in LOGGED
                  if rows[key][name] is not None]  # fmt: skip
        events.write(Event(wall_time=made, step=step, summary=Summary(value=values)).SerializeToString())

    def write_table(file):
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(row for _, row in sorted(rows.items()))
        file.write(text.getvalue().encode())

    replace(folder / f"events.out.tfevents.{key[0]:012d}.{key[1]}", write_events)
    replace(folder / "plasticity.csv", write_table)


def load_agent(path, plan, agent):
    """A copy of ``agent`` with the weights at ``path``, and the run's observation statistics. Raises BadCheckpoint."""
    return load_weights(open_checkpoint(path), copy.deepcopy(agent), plan.script, plan.kind)


def checksum(agent):
    """CRC-32 of an agent's weights, to know it again."""
    crc = 0
    for x in agent.state_dict().values():
        crc = zlib.crc32(x.cpu().contiguous().numpy(), crc)
    return crc


@torch.no_grad()
def collect(agent, statistics, plan, seed, device):
    """The observations (N, …) that ``agent`` makes in new environments with sampled actions, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    env_seeds = torch.randint(2**31 - 1, (plan.num_envs,), generator=generator).tolist()
    envs = plan.script.make_envs(plan.run_args, plan.num_envs, env_seeds)

    def policy(obs, all_layers=False):
        return agent.policy(obs.to(device), all_layers).map(torch.Tensor.cpu)

    obs = plan.kind.collect(plan.script, envs, policy, statistics, plan.num_steps, generator)
    envs.close()
    return obs


def probe_network(name, agent, obs, target, plan, args, device):
    """Fit one network of ``agent`` to ``target`` (N, …) on ``obs`` (N, …); returns the CSV's row but for its step."""
    start = time.time()
    network, parameters = separate(agent, name)
    loss = loss_of(plan, name)
    generator = torch.Generator().manual_seed(stream(args.seed, name))
    initial, before, num_units = measure(network, obs, plan.run_args.activation, device)
    curved = dict.fromkeys(CURVATURE)
    if args.curvature:
        curved = curvature(agent, name, obs, target, plan, args.seed, device)
    losses = fit(network, parameters, obs, target, loss, plan, args, generator, device)
    final, after, _ = measure(network, obs, plan.run_args.activation, device)
    row = {
        "network": name,
        "initial_loss": loss(plan.script, target, initial).mean(dtype=torch.float64).item(),
        "final_loss": loss(plan.script, target, final).mean(dtype=torch.float64).item(),
        "last_minibatch_loss": losses[-1],
        "loss_auc": math.fsum(losses) / len(losses),
        **curved,
        **{f"before/{measure}": x for measure, x in before.items()},
        **{f"after/{measure}": x for measure, x in after.items()},
    }
    shown = f"loss {row['initial_loss']:.4g}, after {len(losses)} minibatches {row['final_loss']:.4g}"
    shown += f"; rank {before['pca_rank']:.0f}, dead {before['dead_units']:.0f} of {num_units}"
    print(f"  {name:6}: {shown}; {time.time() - start:.1f} s", flush=True)
    if before["dead_units"] == num_units:
        print(f"  {name:6}: all {num_units} units are dead, {DEAD[plan.run_args.activation]}", flush=True)
    return row


@contextlib.contextmanager
def locked(folder):
    """Keep other probes out of a folder of results, which is made. Raises Refused if one is at it."""
    folder.mkdir(exist_ok=True)
    if not fcntl:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(f"{folder}: another probe is at it") from None
        yield
    finally:
        os.close(held)


def probe(plan, args, device):
    """Fit the networks of a run's checkpoints and write the results; returns whether every checkpoint could be read."""
    folder, well = plan.run / args.name, True
    rows = read_results(folder)
    steps = {"first": int(plan.first.stem), "last": int(plan.paths[-1].stem)}
    steps = [steps[which] if which in steps else int(which) for which in args.checkpoints]
    paths = [path for path in plan.paths if not steps or int(path.stem) in steps]

    def finished_with(step, name):
        """Whether nothing is to be done; a fit from before the measures of curvature, or without, gets these alone."""
        row = rows.get((step, name))
        return row is not None and not (args.curvature and None in row.values())

    finished = sum(all(finished_with(int(path.stem), name) for name in args.networks) for path in paths)
    print(f"{plan.run}: {len(paths)} checkpoints of {plan.script.__name__}.py, {finished} finished before", flush=True)
    if plan.defaults:
        print(f"  the run is from before these flags, and is probed with {', '.join(plan.defaults)}", flush=True)

    # Small networks lose more to the threads' meetings than they gain.
    torch.set_num_threads(1 if plan.kind is MuJoCo else NUM_THREADS)
    random_agent = new_agent(plan.script, plan.kind, plan.run_args, args.target_seed, device)
    obs = None
    for path in plan.paths:
        step, before_first = int(path.stem), int(path.stem) < int(plan.first.stem)
        if path not in paths and not before_first:  # those before the first are why it is the first
            continue
        try:
            if path in plan.bad:
                raise BadCheckpoint(plan.bad[path])
            agent, statistics = load_agent(path, plan, random_agent)
            crc = checksum(agent)
            for name in args.networks:
                if rows.get((step, name), {"weights_crc32": crc})["weights_crc32"] != crc:
                    print(f"step {step:,}: the {name} fitted before was that of another checkpoint", flush=True)
                    del rows[step, name]
            names = [name for name in args.networks if not finished_with(step, name)]
            if not names:
                continue
            if obs is None or args.data == "each":
                obs = None  # before the next data set: two would need twice the memory
                first = load_agent(plan.first, plan, random_agent)
                actor, who = (first, plan.first.stem) if args.data == "first" else ((agent, statistics), path.stem)
                print(f"step {int(who):,} acts for {plan.num_envs} x {plan.num_steps:,} agent steps", flush=True)
                obs = collect(*actor, plan, stream(args.seed, "data"), device)
                teacher = first[0] if args.targets == "initial" else random_agent
                teacher = {name: separate(teacher, name)[0] for name in args.networks}
                targets = {name: outputs_of(network, obs, device) for name, network in teacher.items()}
        except BadCheckpoint as error:
            well = False
            complain(f"{path}: {error}")
            continue
        print(f"step {step:,}", flush=True)
        for name in names:
            if (step, name) in rows:
                print(f"  {name:6}: fitted before; its tangent kernel, gradients and Hessian are added", flush=True)
                rows[step, name] |= curvature(agent, name, obs, targets[name], plan, args.seed, device)
            else:
                row = probe_network(name, agent, obs, targets[name], plan, args, device)
                rows[step, name] = {"global_step": step, **row, "weights_crc32": crc}
            write_results(folder, plan.settings, rows, (step, name), path.stat().st_mtime)
    return well


def probe_runs(args, device):
    """Probe each of the runs, whatever becomes of the others; returns the exit code."""
    plans, well = [], True
    for run in args.runs:
        try:
            plans.append(make_plan(run, args, device))
        except Refused as error:
            complain(str(error))
    if not plans:
        return 2
    for plan in plans:
        try:
            with locked(plan.run / args.name):
                well = probe(plan, args, device) and well
        except Refused as error:
            well = False
            complain(str(error))
        except OSError as error:
            well = False
            complain(f"{error.filename or plan.run}: {error.strerror or error}; finished fits are kept")
    return 0 if well and len(plans) == len(args.runs) else 1


if __name__ == "__main__":
    args = parse_args(Args)
    check_args(args)
    try:
        raise SystemExit(probe_runs(args, pick_device(args.device)))
    except KeyboardInterrupt:
        fail("interrupted; what was finished is kept, and the same command goes on from there", code=130)
