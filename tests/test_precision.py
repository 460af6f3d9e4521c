"""--precision bfloat16: the hidden layers compute in it, and what is compared with them was computed so too."""

import importlib
import math
import statistics
from functools import partial

import numpy as np
import pytest
import torch
from forked import run, slow
from test_scripts import TINY, load, run_script, same, scalars_of

from common.arguments import _cpu_has_bfloat16, check_precision

SCRIPTS = ["ppo_atari", "ppo_atari_2models", "ppo_pfo_atari"]
EMULATED = [] if _cpu_has_bfloat16() else pytest.mark.slow  # gradient steps of which would take minutes
ONE_BY_DEFAULT = slow(SCRIPTS, "ppo_atari", "ppo_atari_2models")  # where emulated instructions would take minutes
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Orthogonal weights have larger layers than PyTorch's, which rounding moves by more.
FLAGS = [*TINY, "--precision", "bfloat16", "--layer-init", "orthogonal"]
SLOW = "--precision bfloat16: this device has no instructions for it, and float32 would be faster\n"


def made(name, seed, device=CPU, **kwargs):
    """A script, its arguments in bfloat16 and in float32, and an agent of Phoenix's eight actions."""
    script = importlib.import_module(name)
    flags = {"num_envs": 3, "num_steps": 32, "minibatch_size": 32, "seed": seed, **kwargs}
    both = [script.Args(precision=precision, **flags) for precision in ("bfloat16", "float32")]
    for args in both:
        script.check_args(args)
    torch.manual_seed(seed)
    return script, *both, script.Agent(8, both[0]).to(device, memory_format=torch.channels_last)


def recorded(script, agent, args, device=CPU):
    """A rollout in real games, (96, …), with what the main block computes from it before the update phase."""
    steps, num_envs = args.num_steps, args.num_envs
    envs = script.make_envs(args, num_envs, list(range(num_envs)), reward_clip=True)
    obs = torch.empty((steps + 1, num_envs, 84, 84, 4), dtype=torch.uint8, device=device)
    obs[0] = torch.from_numpy(envs.reset()[0]).permute(0, 2, 3, 1)
    noise = torch.empty((steps, num_envs, 8), device=device).exponential_()
    with torch.no_grad(), script.hidden_precision(args, device):
        transitions, _ = script.rollout(envs, partial(script.act, agent), obs, noise, np.zeros((2, num_envs)), True)
        critic = agent.value(obs.flatten(0, 1), True)
        actor = agent.policy(obs[:-1].flatten(0, 1), True)
    values = critic.output.view(steps + 1, num_envs)
    advantages, returns = script.gae(
        transitions.rewards, values[:-1], values[1:], transitions.dones, args.gamma, args.gae_lambda
    )
    batch = {"obs": obs[:-1], "actions": transitions.actions, "values": values[:-1]}
    batch = {name: x.flatten(0, 1) for name, x in (batch | {"advantages": advantages, "returns": returns}).items()}
    held = {"actor_held": actor.preactivations, "critic_held": critic.preactivations[: steps * num_envs]}
    return batch | {"logits": actor.output} | held


def minibatches(batch, size):
    order = torch.randperm(len(batch["obs"]), device=batch["obs"].device)
    return [{name: x[mb_inds] for name, x in batch.items()} for mb_inds in order.split(size)]


def everything(mb):
    """The indices of all samples of a minibatch."""
    return torch.arange(len(mb["obs"]), device=mb["obs"].device)


def trained(script, agent, args, batch, steps):
    """The optimizers that moved ``agent`` by some gradient steps."""
    optimizers, kl_coef = script.make_optimizers(agent, args), torch.tensor(0.0, device=batch["obs"].device)
    while steps > 0:
        for mb in minibatches(batch, args.minibatch_size)[:steps]:
            script.update(agent, script.losses, optimizers, mb, everything(mb), kl_coef, args)
            steps -= 1
    return optimizers


def moved(script, agent, mb, args):
    """How far the policy and what PFO holds are from the recorded ones: the largest |ratio - 1|, a share of a norm.

    The share is the larger one of actor and critic: squared distance over squared norm of the pre-activations.
    """
    with script.hidden_precision(args, mb["obs"].device):
        policy, value = agent(mb["obs"])
    ratio = (policy.output.log_softmax(1) - mb["logits"].log_softmax(1)).exp()
    held = {"actor_held": policy.preactivations, "critic_held": value.preactivations}
    shares = [(new - mb[name]).square().sum() / mb[name].square().sum() for name, new in held.items()]
    return (ratio - 1).abs().max().item(), max(shares).item()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("weights", ["initial", pytest.param("trained", marks=EMULATED), "large"])
@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_nothing_has_moved_before_the_first_step(name, weights, device):
    """Ratios are within 1e-3 of 1 and PFO's distances below 1e-6 of the squared norm, whatever the minibatch's size.

    Pre-activations recorded in float32 would be out of that, and with large weights the ratios too.
    """
    device = torch.device(device)
    script, args, plain, agent = made(name, 1, device)
    if weights == "large":  # logits some units apart
        with torch.no_grad():
            for layer in agent.modules():
                if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                    layer.weight.mul_(3)
    if weights == "trained":
        trained(script, agent, args, recorded(script, agent, args, device), 24)
    batch = recorded(script, agent, args, device)
    kl_coef = torch.tensor(0.0, device=device)
    for size in (3, 8, 32, 96):
        for mb in minibatches(batch, size)[:4]:
            _, logged = script.losses(agent, mb, everything(mb), kl_coef, args)
            assert abs(logged["old_approx_kl"]) < 1e-3 and logged["clipfrac"] == 0
            for network in ("actor", "critic") if name == "ppo_pfo_atari" else ():
                assert logged[f"pfo_{network}"] <= 1e-6 * mb[f"{network}_held"].square().mean()
            ratio, share = moved(script, agent, mb, args)
            assert ratio < 1e-3 and share < 1e-6
    wrong = [moved(script, agent, mb, plain) for mb in minibatches(batch, 32)]
    assert min(share for _, share in wrong) > 1e-6
    assert weights != "large" or max(ratio for ratio, _ in wrong) > 1e-3


def loss_and_gradients(script, agent, mb, args):
    agent.zero_grad()
    loss, logged = script.losses(agent, mb, everything(mb), torch.tensor(0.0), args)
    loss.backward()
    layers = {}
    for name, p in agent.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(p.grad.flatten())
    return {**logged, "loss": loss.detach()}, {layer: torch.cat(grads) for layer, grads in layers.items()}


@pytest.mark.parametrize("steps", [0, pytest.param(12, marks=EMULATED)])
@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_losses_and_gradients_agree_with_float32(name, steps):
    """On the same minibatch, at the initial weights and some gradient steps on, over three seeds.

    bfloat16 has 8 bits, a rounding error of 0.2 to 0.4 %. Losses: within 0.5 % or 1e-4, shares within two samples. A
    layer's gradient (weights and bias): the median over seeds of |difference| / |float32's| is at most 10 %; for each
    seed the cosine is at least 0.9 and the norm within 20 %. In most seeds the error is 1 to 6 %, and 0.3 % in the
    actor's output layer; it is larger where the background of an image puts a unit next to its kink.
    """
    errors = {}
    for seed in range(1, 4):
        script, args, plain, agent = made(name, seed)
        batch = recorded(script, agent, args)
        trained(script, agent, args, batch, steps)
        mb = minibatches(batch, 64)[0]
        losses, gradients = loss_and_gradients(script, agent, mb, args)
        expected, layers = loss_and_gradients(script, agent, mb, plain)
        for loss, x in expected.items():
            assert losses[loss].dtype == torch.float32
            share = loss in ("clipfrac", "pfo_out_of_trust")  # of 64 samples, of which two may lie at the bound
            torch.testing.assert_close(losses[loss], x, rtol=5e-3, atol=2 / 64 if share else 1e-4)
        for layer, x in layers.items():
            assert gradients[layer].dtype == torch.float32
            assert torch.cosine_similarity(gradients[layer], x, dim=0) > 0.9, layer
            assert gradients[layer].norm() / x.norm() == pytest.approx(1, abs=0.2), layer
            errors.setdefault(layer, []).append(((gradients[layer] - x).norm() / x.norm()).item())
    medians = {layer: statistics.median(x) for layer, x in errors.items()}
    assert max(medians.values()) < 0.1, medians
    assert min(medians.values()) > 1e-5, medians  # bfloat16 reaches every layer


@pytest.mark.parametrize("name", SCRIPTS)
def test_hidden_layers_alone_are_bfloat16(name):
    script, args, plain, agent = made(name, 1)
    batch = recorded(script, agent, args)
    optimizers = trained(script, agent, args, batch, 2)
    seen = {}
    for module, layer in agent.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(lambda _, x, y, at=module: seen.update({at: (x[0].dtype, y.dtype)}))
    with script.hidden_precision(args, CPU):
        outputs = agent(batch["obs"], True)
    dtypes = {layer: torch.bfloat16 if ".hidden." in layer else torch.float32 for layer in seen}
    assert seen == {layer: (dtype, dtype) for layer, dtype in dtypes.items()}
    assert sum(dtype == torch.bfloat16 for dtype in dtypes.values()) == (4 if name == "ppo_atari" else 8)
    assert all(x.dtype == torch.float32 for network in outputs for x in network)
    assert {x.dtype for x in agent.state_dict().values()} == {torch.float32}
    moments = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    assert len(moments) == 3 * len(list(agent.parameters())) and {x.dtype for x in moments} == {torch.float32}

    # Out of hidden_precision, as in diagnostics, the agent is one of --precision float32, bit for bit.
    other = script.Agent(8, plain).to(memory_format=torch.channels_last)
    other.load_state_dict(agent.state_dict())
    with script.hidden_precision(plain, CPU):
        expected = other(batch["obs"], True)
    diagnosed = agent(batch["obs"], True)
    assert set(seen.values()) == {(torch.float32, torch.float32)}
    for network, of_other, in_bfloat16 in zip(diagnosed, expected, outputs, strict=True):
        assert same(list(network), list(of_other))
        assert not any(map(torch.equal, network, in_bfloat16))


def check_run(folder, step, still=2e-7):
    """Every number of a run is finite, and its last checkpoint is one of bfloat16; returns that checkpoint.

    ``still`` bounds what the first minibatch of an update phase may have moved, of 1e-6 where float32 was recorded.
    """
    scalars = scalars_of(folder)
    assert "losses/policy_loss" in scalars and "representation/after/critic/pca_rank" in scalars
    assert [tag for tag, points in scalars.items() if not all(math.isfinite(x) for _, x in points)] == []
    for name in ("old_approx_kl", "approx_kl", "clipfrac", "pfo_actor", "pfo_critic"):
        assert all(abs(x) < still for _, x in scalars.get(f"losses/first_minibatch/{name}", [])), name
    state = load(folder / "checkpoints" / "latest.pt")
    assert state["args"]["precision"] == "bfloat16" and state["global_step"] == step
    moments = [x for o in state["optimizers"] for moments in o["state"].values() for x in moments.values()]
    assert {x.dtype for x in [*state["agent"].values(), *moments]} == {torch.float32}
    assert all(x.isfinite().all() for x in [*state["agent"].values(), *moments])
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_and_its_resumption(name, tmp_path):
    """The flag is kept: a resumed run goes on in bfloat16; and it is no float32 run."""
    code, said = run(name, tmp_path, [*FLAGS, "--total-timesteps", "576", "--eval-episodes", "1"])
    assert code == 0, said
    (folder,) = (tmp_path / "runs").iterdir()
    before = check_run(folder, 576)
    flags = ["--resume", str(folder.relative_to(tmp_path)), "--total-timesteps", "960"]
    code, said = run(name, tmp_path, flags)
    assert code == 0 and "resumed from" in said, said
    assert not same(check_run(folder, 960)["agent"], before["agent"])
    (tmp_path / "plain").mkdir()
    code, said = run(name, tmp_path / "plain", [*FLAGS, "--total-timesteps", "576", "--precision", "float32"])
    assert code == 0, said
    (plain,) = (tmp_path / "plain" / "runs").iterdir()
    assert not same(load(plain / "checkpoints" / "latest.pt")["agent"], before["agent"])


@pytest.mark.slow
def test_a_compiled_run(tmp_path):
    script = importlib.import_module("ppo_pfo_atari")
    try:
        script.check_args(script.Args(compile=True))
    except SystemExit:
        pytest.skip("no C++ compiler here")
    _, folder = run_script("ppo_pfo_atari", tmp_path, *FLAGS, "--total-timesteps", "384", "--compile")
    check_run(folder, 384)


@needs_cuda
@pytest.mark.parametrize("flags", [[], ["--compile"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_on_cuda(tmp_path, name, flags):
    _, folder = run_script(name, tmp_path, *FLAGS, "--device", "cuda", *flags)
    check_run(folder, 960, still=1e-5)  # a kernel may round otherwise in another batch size


@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_a_cpu_without_the_instructions_is_named(monkeypatch, capsys, avx512, amx):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    check_precision("float32", CPU)
    assert capsys.readouterr().out == ""
    check_precision("bfloat16", CPU)
    assert capsys.readouterr().out == ("" if avx512 or amx else SLOW)


def test_a_cpu_without_the_instructions_runs(tmp_path):
    """oneDNN is held to AVX2, which has none, and PyTorch is told what such a processor would tell it."""
    code = "import platform, torch; platform.machine = lambda: 'x86_64'\n"
    code += "torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False"
    flags = [*FLAGS, "--total-timesteps", "192", "--update-epochs", "1"]
    status, said = run("ppo_pfo_atari", tmp_path, flags, code, ONEDNN_MAX_CPU_ISA="AVX2")
    assert status == 0 and said.count(SLOW) == 1, said
    (folder,) = (tmp_path / "runs").iterdir()
    check_run(folder, 192)
