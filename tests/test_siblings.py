"""Sibling scripts differ in their algorithm and in nothing else: what is meant to be the same is so to the letter."""

import ast
import difflib
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A new script is added here, with the blocks in which it differs from the others by design.
ATARI = ["ppo_atari", "ppo_atari_2models", "ppo_pfo_atari"]
SCRIPTS = [*ATARI, "ppo_mujoco"]
DIFFERENT = {
    frozenset({"ppo_atari_2models", "ppo_pfo_atari"}): {
        *("Args", "check_args", "NetworkOutput", "actor_loss", "critic_loss", "losses", "main"),
    },
    frozenset({"ppo_atari", "ppo_atari_2models"}): {"Args", "Agent", "make_optimizers", "update"},
}
DIFFERENT[frozenset({"ppo_atari", "ppo_pfo_atari"})] = set.union(*DIFFERENT.values())
# What the two domains have in common to the letter, beside their flags.
EVERYWHERE = {"init_layer", "gae", "pfo_input", "feature_distance", "learning_rate", "adapted_kl_coef"}
# How many lines they have in common in their other functions, in runs of at least four.
IN_PART = {"critic_loss": 6, "actor_loss": 5, "diagnose": 11}
IN_PART = {"ppo_atari": IN_PART, "ppo_atari_2models": IN_PART, "ppo_pfo_atari": IN_PART | {"critic_loss": 10}}
# Flags whose text or default differs between the domains, and those that one of them alone has.
OF_A_DOMAIN = {
    *("env_id", "total_timesteps", "learning_rate", "num_envs", "num_steps", "minibatch_size"),
    *("update_epochs", "clip_coef", "ent_coef", "max_grad_norm", "activation", "pfo_coef"),
}
OF_ATARI = {
    "precision",
    "cuda_graphs",
    "frame_skip",
    "repeat_action_probability",
    "noop_max",
    "fire_reset",
    "episodic_life",
}
OF_MUJOCO = {"seeds", "record", "torch_threads", "resume", "obs_norm_steps", "hidden_sizes", "share_features"}
# Every line in which two scripts differ names one of these.
WORDS = {
    frozenset({"ppo_atari_2models", "ppo_pfo_atari"}): ("pfo", "held", "all_layers", "diagnosed"),
    frozenset({"ppo_atari", "ppo_atari_2models"}): (),
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def blocks(name):
    """The top-level blocks of a script by name, comments included: functions, classes, constants, the main block."""
    text = source(name)
    lines, found = text.splitlines(), {}
    nodes = ast.parse(text).body
    for node, following in itertools.zip_longest(nodes, nodes[1:]):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        last = (
            min([following.lineno, *(d.lineno for d in getattr(following, "decorator_list", []))])
            if following
            else None
        )
        title = getattr(node, "name", None)
        if isinstance(node, ast.Assign):
            title = node.targets[0].id
        elif isinstance(node, ast.If):
            title = "main"
        if title:
            found[title] = "\n".join(lines[first - 1 : last - 1 if last else None]).rstrip()
    return found


def fields(name):
    """The source of each field of a script's Args, its help text included."""
    text = source(name)
    (args,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "Args")
    lines, found = text.splitlines(), {}
    for node, doc in itertools.pairwise(args.body):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(doc, ast.Expr), f"{name}: {node.target.id} has no help text"
            found[node.target.id] = "\n".join(lines[node.lineno - 1 : doc.end_lineno])
    return found


PAIRS = list(itertools.combinations(ATARI, 2))


@pytest.mark.parametrize("one, other", PAIRS)
def test_shared_blocks_are_the_same_to_the_letter(one, other):
    mine, theirs = blocks(one), blocks(other)
    assert {"Args", "rollout", "gae", "diagnose", "choose", "main"} <= mine.keys() & theirs.keys()
    different = {title for title in mine.keys() & theirs.keys() if mine[title] != theirs[title]}
    assert different <= DIFFERENT[frozenset({one, other})]


@pytest.mark.parametrize("one, other", PAIRS)
def test_shared_flags_are_the_same_to_the_letter(one, other):
    mine, theirs = fields(one), fields(other)
    different = {name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]}
    assert different <= ({"max_grad_norm"} if "ppo_atari" in (one, other) else set())
    assert all("pfo" in name for name in mine.keys() ^ theirs.keys())


def test_the_domains_differ_in_their_environments_and_policies_alone():
    atari, mujoco = blocks("ppo_pfo_atari"), blocks("ppo_mujoco")
    assert {title for title in EVERYWHERE if atari[title] != mujoco[title]} == set()
    atari, mujoco = fields("ppo_pfo_atari"), fields("ppo_mujoco")
    assert {name for name in atari.keys() & mujoco.keys() if atari[name] != mujoco[name]} == OF_A_DOMAIN
    assert atari.keys() - mujoco.keys() == OF_ATARI and mujoco.keys() - atari.keys() == OF_MUJOCO


@pytest.mark.parametrize("name", ATARI)
def test_what_the_domains_share_within_blocks_stays_the_same(name):
    atari, mujoco = blocks(name), blocks("ppo_mujoco")
    shared = {}
    for title in atari.keys() & mujoco.keys() - {"Args", "Agent", "main"}:
        one, other = atari[title].splitlines(), mujoco[title].splitlines()
        runs = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
        shared[title] = 0 if one == other else sum(run.size for run in runs if run.size >= 4)
    assert {title: lines for title, lines in shared.items() if lines} == IN_PART[name]


@pytest.mark.parametrize("pair", WORDS, ids=lambda pair: " ".join(sorted(pair)))
def test_the_main_blocks_differ_in_the_algorithm_alone(pair):
    one, other = (blocks(name)["main"].splitlines() for name in sorted(pair))
    for line in difflib.ndiff(one, other):
        if line[0] in "+-":
            assert any(word in line for word in WORDS[pair]), line


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_only_common_of_this_project(name):
    own = {path.stem for path in ROOT.glob("*.py")} | {"benchmark", "tests"}
    for node in ast.walk(ast.parse(source(name))):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not own & {module.split(".")[0] for module in modules}


def test_common_imports_no_script():
    own = {path.stem for path in ROOT.glob("*.py")} | {"benchmark", "tests"}
    for path in (ROOT / "common").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not own & {module.split(".")[0] for module in modules}, path


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_lines_hold_commands_that_parse(name, monkeypatch):
    """The commands in a script's head are complete: each is accepted as it stands."""
    import importlib
    import shlex
    import sys

    script = importlib.import_module(name)
    head = source(name).split("\nimport ")[0].replace("\\\n#", " ")
    commands = [line[line.index("python ") :] for line in head.splitlines() if f"python {name}.py" in line]
    assert len(commands) >= 3
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command.split("  ")[0] if "  #" in command else command)[1:])
        script.check_args(script.parse_args(script.Args))
