"""A changed copy of a script does what it says, at full speed or without it, with one seed and with several."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Four iterations of 12 minibatches
FLAGS = ["--num-steps", "128", "--update-epochs", "3", "--obs-norm-steps", "20", "--total-timesteps", "1024"]
LOOP = "    for iteration in range(done + 1, args.num_iterations + 1):\n"
LEFT = "1 - (iteration - 1) / args.num_iterations"
HIDDEN = "        self.activation = getattr(nn, args.activation)()\n"
LAYER, FEATURES = "preactivations.append(layer(x))", "x = self.activation(preactivations[-1])"
LOSS, SUM = "def losses(agent,", "    return a_loss + c_loss, {name"
MINIBATCH, STEP = "            everything = k in", "            take_step(grad, learning)\n"
ADAM = "tuple(torch.optim.Adam(part.parameters(), **adam)"


def norm(layer):
    """A layer before each activation: two lines."""
    made = f"        self.norms = nn.ModuleList({layer} for n in args.hidden_sizes)\n"
    return [(HIDDEN, HIDDEN + made), (LAYER, "preactivations.append(self.norms[len(preactivations)](layer(x)))")]


# Each by the lines that it replaces
CHANGES = {
    "none": [],
    "clip_coef annealed": [(LOOP, f"{LOOP}        args.clip_coef = 0.01 * ({LEFT})\n")],
    "ent_coef annealed": [(LOOP, f"{LOOP}        args.ent_coef = 0.1 * ({LEFT})\n")],
    "layer norm": norm("nn.LayerNorm(n)"),
    "group norm": norm("nn.GroupNorm(4, n)"),
    "batch norm": norm("nn.BatchNorm1d(n)"),
    "normalised features": [(FEATURES, "x = 8 * F.normalize(self.activation(preactivations[-1]), dim=-1)")],
    "third term": [
        (SUM, SUM.replace(",", " + 0.01 * sum(p.square().sum() for p in agent.actor.parameters()),")),
    ],
    "global by iteration": [
        (LOSS, f"COEF = 0.0\n\n\n{LOSS}"),
        (SUM, SUM.replace(",", " + COEF * policy.output.square().mean(),")),
        (LOOP, f"{LOOP}        COEF = {LEFT}\n"),
    ],
    "global by minibatch": [
        (LOSS, f"COEF = 0.0\n\n\n{LOSS}"),
        (SUM, SUM.replace(",", " + COEF * policy.output.square().mean(),")),
        (MINIBATCH, f"            COEF = 1 - k / num_updates\n{MINIBATCH}"),
    ],
    "branch on data": [
        (SUM, f"    if value.output.mean() > -100:\n        a_loss = a_loss + policy.output.square().mean()\n{SUM}"),
    ],
    "SGD": [(ADAM, "tuple(torch.optim.SGD(part.parameters(), lr=1e-2)")],
    "weight decay": [(ADAM, "tuple(torch.optim.AdamW(part.parameters(), **adam, weight_decay=1.0)")],
    "weights clipped": [
        (
            STEP,
            f"{STEP}            for p in (p for agent in agents for p in agent.parameters()):\n"
            "                p.data = p.data.clamp(-0.2, 0.2)\n",
        )
    ],
    "temperature": [
        ("def act(agent,", "HEAT = 1.0\n\n\ndef act(agent,"),
        ("return sample(agent.policy(obs).output, noise)", "return sample(agent.policy(obs).output, HEAT * noise)"),
        (LOOP, f"{LOOP}        HEAT = {LEFT}\n"),
    ],
}
PLAIN = {  # where the plain code takes over, and what the run says
    "batch norm": "it draws random numbers or changes buffers of its own",
    "global by minibatch": "a recording gives other numbers, since it reads what changes from call to call",
    "branch on data": "it can't be recorded",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last weights of each seed of a changed copy, and what it printed, by the change and further flags."""

    @functools.cache
    def train(change, *flags):
        source = (ROOT / "ppo_mujoco.py").read_text()
        for line, other in CHANGES[change]:
            assert source.count(line) == 1, line
            source = source.replace(line, other)
        folder = tmp_path_factory.mktemp("copy")
        (folder / "my_ablation.py").write_text(source)
        done = subprocess.run(
            [sys.executable, "my_ablation.py", *FLAGS, *flags],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        checkpoints = [torch.load(x, weights_only=True) for x in folder.glob("runs/*/checkpoints/latest.pt")]
        return {x["args"]["seed"]: x["agent"] for x in checkpoints}, done.stdout

    return train


def apart(one, other):
    """The largest difference between the weights that two agents have in common."""
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one.keys() & other.keys())


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_learns_as_its_plain_code_does(change, trained):
    """NumPy acts with another rounding, which four iterations turn into no more than 5e-5."""
    (agents, said), (plain, _) = trained(change), trained(change, "--no-record")
    assert apart(agents[1], plain[1]) < 5e-5
    if change != "none":
        assert apart(agents[1], trained("none")[0][1]) > 1e-3
    assert ("runs as plain code" in said) == (change in PLAIN)
    assert PLAIN.get(change, "") in said


@pytest.mark.parametrize("change", ["clip_coef annealed", "layer norm", "normalised features", "third term"])
def test_seeds_of_a_changed_copy_are_its_single_runs(change, trained):
    (several, _), (one, _) = trained(change, "--seeds", "1", "2"), trained(change)
    assert several.keys() == {1, 2}
    assert apart(several[1], one[1]) < 5e-5 and apart(several[2], one[1]) > 1e-2


def test_seeds_that_vmap_cannot_batch_are_computed_one_after_the_other(trained):
    (several, said), (one, _) = trained("branch on data", "--seeds", "1", "2"), trained("branch on data")
    assert "the seeds are computed one after the other, which is slower" in said
    assert apart(several[1], one[1]) < 5e-5 and apart(several[2], one[1]) > 1e-2


def test_weights_given_other_data_are_those_of_the_batch(trained):
    (several, _), (plain, _) = (
        trained("weights clipped", "--seeds", "1", "2"),
        trained("weights clipped", "--no-record"),
    )
    assert apart(several[1], plain[1]) < 5e-5
    assert max(x.abs().max() for name, x in several[2].items() if name != "half_width") <= 0.2
