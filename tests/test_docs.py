"""What the documents tell a reader to type is taken by what it is typed at, and what they link to is there."""

import importlib
import re
import shlex

import pytest
from forked import ROOT, SCRIPTS

from common.arguments import parse

PLACES = ("*.md", "docs/*.md", "recipes/*.md", "benchmark/**/*.md")
NAMES = [str(path.relative_to(ROOT)) for pattern in PLACES for path in ROOT.glob(pattern)]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
OTHERS = ("python -m venv", "python -m pytest", "python -P", "python my_", "python weight_clipping_mujoco.py")


def commands_of(text):
    """Commands of Python and bash in blocks and between backticks, as words."""
    lines = [line for kind, block in BLOCK.findall(text) if kind == "bash" for line in block.splitlines()]
    lines += [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    for part in (part for line in lines for part in re.split(r"&&|;|\||\bdo\b", line)):
        if re.match(r"\s*([A-Z_]+=\S+ )?(python|bash) \S", part):
            yield [word for word in shlex.split(part, comments=True) if not re.match(r"[A-Z_]+=", word)]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text()):
        assert "://" in target or ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name, monkeypatch):
    for words in commands_of((ROOT / name).read_text()):
        if " ".join(words).startswith(OTHERS):
            continue
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
            continue
        module, *flags = words[2:] if words[1] == "-m" else [words[1].removesuffix(".py"), *words[2:]]
        flags = [re.sub(r"^\$\w+$", "1", word) for word in flags]  # a loop's variable
        flags = flags[: flags.index("--")] if "--" in flags else flags
        if "--help" in flags:
            continue
        script = importlib.import_module(module)
        monkeypatch.setattr("sys.argv", [module, *flags])
        args = parse(script.Args)
        if module in SCRIPTS and not args.resume:
            script.check_args(args)


def test_commands_are_found():
    """So that the tests above test something."""
    found = [" ".join(words) for words in commands_of((ROOT / "README.md").read_text())]
    assert "python ppo_pfo_atari.py --env-id Phoenix-v5 --pfo-coef 1.0" in found and len(found) > 8
