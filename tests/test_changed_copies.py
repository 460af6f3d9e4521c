"""A changed copy of a script does what it says, at full speed or without it, with one seed and with several."""

import functools
import importlib
import re

import forked
import pytest
import torch
from forked import ROOT

# Four iterations of 12 minibatches
FLAGS = ["--num-steps", "64", "--minibatch-size", "32", "--update-epochs", "3", "--obs-norm-steps", "20"]
FLAGS += ["--total-timesteps", "512"]
LOOP = "    for iteration in runs:\n"
LEFT = "1 - (iteration - 1) / args.num_iterations"
HIDDEN = "        self.activation = getattr(nn, args.activation)()\n"
LAYER, FEATURES = "preactivations.append(layer(x))", "x = self.activation(preactivations[-1])"
LOSS, SUM = "def losses(agent,", "    return a_loss + c_loss, {name"
MINIBATCH, STEP = "            at_an_end = k in", "                take_step(grad, learning)\n"
SHARED = "        self.share_features = args.share_features\n"
OPTIMIZERS = "    take_step = Optimizers(together, lambda: [x.optimizers for x in learners]).step\n"
CLIP = "ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)"
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
    "clipping by a global": [  # of which the first minibatch of a phase, without clipped ratios, shows nothing
        (LOSS, f"CLIP = 0.0\n\n\n{LOSS}"),
        (CLIP, CLIP.replace("args.clip_coef", "CLIP")),
        (LOOP, f"{LOOP}        CLIP = 0.1 * ({LEFT})\n"),
    ],
    "clipping by an object": [
        (LOSS, f"CLIP = [0.0]\n\n\n{LOSS}"),
        (CLIP, CLIP.replace("args.clip_coef", "CLIP[0]")),
        (LOOP, f"{LOOP}        CLIP[0] = 0.1 * ({LEFT})\n"),
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
    "own initial weights": [  # of each seed, which no batch of parameters and buffers knows
        (SHARED, f"{SHARED}        self.initial = [p.detach().clone() for p in self.parameters()]\n"),
        (SUM, SUM.replace(",", " + sum((p - q).square().sum() for p, q in zip(agent.parameters(), agent.initial)),")),
    ],
    "frozen layer": [(HIDDEN, f"{HIDDEN}        self.hidden[0].requires_grad_(False)\n")],
    "frozen layer, decayed": [
        (HIDDEN, f"{HIDDEN}        self.hidden[0].requires_grad_(False)\n"),
        (ADAM, "tuple(torch.optim.AdamW(part.parameters(), **adam, weight_decay=1.0)"),
    ],
    "buffer given another tensor": [
        (HIDDEN, f'{HIDDEN}        self.register_buffer("gain", torch.ones(()))\n'),
        (FEATURES, "x = self.gain * self.activation(preactivations[-1])"),
        (
            LOOP,
            f"{LOOP}        for x in agents:\n            x.actor.gain = torch.tensor(1 + 0.1 * iteration)\n",
        ),
    ],
    "gradient hook": [(HIDDEN, f"{HIDDEN}        self.output.weight.register_hook(lambda grad: 0 * grad)\n")],
    "optimizer hook": [
        (
            OPTIMIZERS,
            f"{OPTIMIZERS}    def clip(optimizer, *_):\n        for p in optimizer.param_groups[0]['params']:\n"
            "            p.data.clamp_(-0.2, 0.2)\n\n    for optimizer in itertools.chain(*(x.optimizers for x in "
            "learners)):\n        optimizer.register_step_post_hook(clip)\n",
        )
    ],
    "gradients clipped once more": [
        (
            STEP,
            "                for agent in agents:\n"
            f"                    nn.utils.clip_grad_value_(agent.parameters(), 1e-4)\n{STEP}",
        )
    ],
    "branch by NumPy": [
        (SUM, f"    if mb['returns'].detach().numpy().std() < 1e9:\n        a_loss = 0 * a_loss\n{SUM}"),
    ],
    "object within a phase": [
        (LOSS, f"STATE = {{'coef': 0.0}}\n\n\n{LOSS}"),
        (SUM, SUM.replace(",", " + STATE['coef'] * policy.output.square().mean(),")),
        (MINIBATCH, f"            STATE['coef'] = 5.0 if 2 < k < 8 and iteration > 1 else 0.0\n{MINIBATCH}"),
    ],
    "optimizers made anew": [
        (LOOP, f"{LOOP}        for x in learners:\n            x.optimizers = make_optimizers(x.agent, args)\n"),
    ],
    "temperature": [
        ("def act(agent,", "HEAT = 1.0\n\n\ndef act(agent,"),
        ("return sample(agent.policy(obs).output, noise)", "return sample(agent.policy(obs).output, HEAT * noise)"),
        (LOOP, f"{LOOP}        HEAT = {LEFT}\n"),
    ],
}
DIFF = (ROOT / "README.md").read_text().partition("```diff\n")[2].partition("```")[0]
CHANGES["the diff in the README"] = [
    tuple("".join(line[1:] for line in hunk.splitlines(True)[1:] if line[0] in f" {sign}") for sign in "-+")
    for hunk in DIFF.split("\n@@")[1:]
]
PLAIN = {  # where the plain code takes over, and what the run says
    "batch norm": "it draws random numbers or changes buffers of its own",
    "global by minibatch": "global COEF keeps changing, and is no tensor",
    "branch on data": "it can't be recorded",
    "branch by NumPy": "Python reads the numbers of a tensor",
    "object within a phase": "global STATE keeps changing, and is no tensor",
}


def run_copy(folder, script, changes, *flags):
    """The last weights of each seed of a copy with these changes, and what it printed."""
    source = (ROOT / f"{script}.py").read_text()
    for line, other in (pair for change in changes for pair in CHANGES[change]):
        line, other = (x if script == "ppo_mujoco" else x.replace(" in runs:", " in run:") for x in (line, other))
        assert source.count(line) == 1, line
        source = source.replace(line, other)
    (folder / "my_ablation.py").write_text(source)
    code, printed = forked.run(script, folder, flags, path=folder / "my_ablation.py")
    assert code == 0, printed
    checkpoints = [torch.load(x, weights_only=True) for x in folder.glob("runs/*/checkpoints/latest.pt")]
    return {x["args"]["seed"]: x["agent"] for x in checkpoints}, printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What ``run_copy`` gives of ppo_mujoco.py, by the change and further flags, each run once."""

    @functools.cache
    def train(change, *flags):
        return run_copy(tmp_path_factory.mktemp("copy"), "ppo_mujoco", [change], *FLAGS, *flags)

    return train


def apart(one, other):
    """The largest difference between the weights that two agents have in common."""
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one.keys() & other.keys())


@pytest.fixture(scope="module")
def rounding(trained):
    """How far apart two runs of a change may be, of which NumPy acts in one, with a rounding that simulations magnify:
    a fifth of what the change does to the plain code's weights, and no more than 2e-3."""

    def limit(change):
        plain, unchanged = (trained(x, "--no-record")[0][1] for x in (change, "none"))
        return min(apart(plain, unchanged) / 5, 2e-3) if change != "none" else 2e-3

    return limit


def test_the_diff_in_the_readme_is_where_it_says():
    lines = (ROOT / "ppo_mujoco.py").read_text().splitlines()
    shift = 0
    for hunk in DIFF.split("\n@@ ")[1:]:
        head, *body = hunk.splitlines()
        at, count, to, now = map(int, re.fullmatch(r"-(\d+),(\d+) \+(\d+),(\d+) @@", head).groups())
        old, new = ([line[1:] for line in body if line[0] in f" {sign}"] for sign in "-+")
        assert lines[at - 1 : at - 1 + count] == old and len(new) == now and to == at + shift
        shift += now - count


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_learns_as_its_plain_code_does(change, trained, rounding):
    (agents, said), (plain, _) = trained(change), trained(change, "--no-record")
    difference = apart(agents[1], plain[1])
    assert difference == 0 if change == "batch norm" else difference < rounding(change)  # its acting is plain code too
    assert change == "none" or rounding(change) > 2e-4
    assert ("runs as plain code" in said) == (change in PLAIN)
    assert PLAIN.get(change, "") in said


def test_optimizers_made_anew_in_each_iteration_have_no_moments(trained):
    flags = "--reset-optimizer", "--seeds", "1", "2"
    (mine, _), (theirs, _) = trained("optimizers made anew", *flags[1:]), trained("none", *flags)
    assert all(apart(mine[seed], theirs[seed]) == 0 for seed in (1, 2))


SEVERAL = ["clip_coef annealed", "ent_coef annealed", "layer norm", "normalised features", "third term"]
SEVERAL += ["group norm", "global by iteration", "clipping by a global", "the diff in the README"]
SEVERAL += ["own initial weights", "frozen layer", "frozen layer, decayed", "buffer given another tensor"]
SEVERAL += ["gradient hook", "optimizer hook", "gradients clipped once more"]
APART = {"own initial weights", "gradient hook"}  # which a batch can't do


@pytest.mark.parametrize("change", SEVERAL)
def test_seeds_of_a_changed_copy_are_its_single_runs(change, trained, rounding):
    """The second of the batch is, which shows the most: what is computed once for all is often the first's."""
    (several, said), (one, _) = trained(change, "--seeds", "2", "1"), trained(change)
    assert several.keys() == {1, 2}
    assert (change in APART) == ("one after the other, which is slower (as a batch they give other numbers)" in said)
    assert apart(several[1], one[1]) < rounding(change) and apart(several[2], one[1]) > 1e-2


def test_a_seed_whose_weights_are_not_finite_ends_alone(tmp_path):
    source = (ROOT / "ppo_mujoco.py").read_text()
    broken = f"{' ' * 16}if (iteration, k) == (3, 5):\n{' ' * 20}agents[1].critic.output.bias.data.fill_(torch.nan)\n"
    (tmp_path / "my_ablation.py").write_text(source.replace(STEP, STEP + broken))
    flags = [*FLAGS, "--seeds", "1", "2"]
    code, said = forked.run("ppo_mujoco", tmp_path, flags, path=tmp_path / "my_ablation.py")
    assert code == 1 and said.count("error: ") == 1 and "error: the value_loss is not finite in iteration 3" in said
    checkpoints = [torch.load(x, weights_only=True) for x in tmp_path.glob("runs/*/checkpoints/latest.pt")]
    assert {x["args"]["seed"]: x["iteration"] for x in checkpoints} == {1: 4, 2: 2}


@pytest.mark.parametrize("change", ["clip_coef annealed", "layer norm"])
def test_several_seeds_learn_as_their_plain_code_does(change, trained, rounding):
    seeds = "--seeds", "2", "1"
    (agents, said), (plain, _) = trained(change, *seeds), trained(change, *seeds, "--no-record")
    assert "runs as plain code" not in said and "one after the other" not in said
    assert all(apart(agents[seed], plain[seed]) < rounding(change) for seed in (1, 2))


def test_seeds_that_vmap_cannot_batch_are_computed_one_after_the_other(trained, rounding):
    (several, said), (one, _) = trained("branch on data", "--seeds", "2", "1"), trained("branch on data")
    assert "the seeds are computed one after the other, which is slower" in said
    assert apart(several[1], one[1]) < rounding("branch on data") and apart(several[2], one[1]) > 1e-2


def test_weights_given_other_data_are_those_of_the_batch(trained, rounding):
    (several, _), (plain, _) = (
        trained("weights clipped", "--seeds", "2", "1"),
        trained("weights clipped", "--no-record"),
    )
    assert apart(several[1], plain[1]) < rounding("weights clipped")
    assert max(x.abs().max() for name, x in several[2].items() if name != "half_width") <= 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_atari", "ppo_atari_2models", "ppo_pfo_atari"])
def test_annealed_arguments_take_effect_in_compiled_losses(name, tmp_path):
    """Three iterations of an Atari script: neither of the two coefficients stays what it was at the first compilation,
    which is what the flags say."""
    script = importlib.import_module(name)
    try:
        script.check_args(script.Args(compile=True))
    except SystemExit:
        pytest.skip("no C++ compiler here")
    size = "--num-envs 2 --num-steps 8 --minibatch-size 8 --update-epochs 4 --total-timesteps 144 --adam-eps 1e-5"
    first = "--clip-coef 0.01 --ent-coef 0.1"
    annealed = ["clip_coef annealed", "ent_coef annealed"]

    def final(folder, changes, *flags):
        (tmp_path / folder).mkdir()
        agents, _ = run_copy(tmp_path / folder, name, changes, *size.split(), *first.split(), *flags)
        return agents[1]

    compiled = final("compiled", annealed, "--compile")
    assert apart(compiled, final("plain", annealed)) < 1e-4
    for k, change in enumerate(annealed):
        assert apart(compiled, final(f"{k}", [change])) > 3e-4, f"{annealed[1 - k]} without effect"
