"""Recipes: published changes of a training script, each a unified diff in recipes/.

    python -m benchmark.recipe --list
    python -m benchmark.recipe --show spo_mujoco
    python -m benchmark.recipe spo_mujoco
    python spo_mujoco.py --env-id Hopper-v4

The third writes spo_mujoco.py beside the scripts, a script like any other. Whoever changes one of them then runs
--refresh, which brings the recipes made from it up to date; recipes/README.md says how to write a recipe.
"""

import difflib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from unidiff import PatchSet, UnidiffParseError

from common.arguments import fail
from common.run import parse_args

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
OLDER = 100  # versions of a script, of which one is looked for that a recipe was made from


class Conflict(Exception):
    """A hunk whose lines are not in the script, or not in one place alone; the message says which."""


@dataclass
class Recipe:
    """A file of recipes/: lines on what it is, with the name of its script in the first, and the change."""

    head: list[str]
    script: str
    hunks: list


@dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """recipes, each of which is written to NAME.py beside the scripts"""
    list: bool = False
    """say what recipes there are"""
    show: bool = False
    """print the recipes instead"""
    overwrite: bool = False
    """write over a NAME.py that is there"""
    save: bool = False
    """make recipes/NAME.diff of NAME.py as it now is"""
    refresh: bool = False
    """bring recipes up to date with their scripts, all of them if none is named"""


def path_of(name):
    return RECIPES / f"{name}.diff"


def names():
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.diff"))


def script_in(line):
    """The name of the script that the first line of a recipe is about, as in "SPO on ppo_mujoco.py: …"."""
    found = re.search(r"\bon (\w+\.py)\b", line)
    return found[1] if found and (ROOT / found[1]).is_file() else None


def read(name):
    """The Recipe of this name; one line and exit code 2 if there is none, or if it can't be read."""
    if name not in names():
        nearest = ", ".join(difflib.get_close_matches(name, names(), n=3, cutoff=0.4))
        fail(f"{name}: is no recipe{f'; nearest: {nearest}' if nearest else ''} (--list lists them)")
    text = path_of(name).read_text(encoding="utf-8")
    head = text[: text.find("--- ")].splitlines()
    script = script_in(head[0]) if head else None
    try:
        patches = PatchSet(text)
    except UnidiffParseError as error:
        fail(f"{path_of(name)}: is no unified diff, {error}")
    if script is None or len(patches) != 1:
        fail(f"{path_of(name)}: must begin with a line that says what it is on which script, and change this alone")
    return Recipe(head, script, list(patches[0]))


def places(lines, wanted):
    """Where the lines ``wanted`` stand one after the other in ``lines``, as indices."""
    return [i for i in range(len(lines) - len(wanted) + 1) if lines[i : i + len(wanted)] == wanted]


def applied(hunks, source, strict=False):
    """The text ``source`` with a recipe's hunks. Raises Conflict.

    All lines of a hunk must be there to the letter: where it says, moved as the hunk before was, or else in one place
    alone. With ``strict`` none may have moved.
    """
    lines, result, done, moved = source.splitlines(keepends=True), [], 0, 0
    for hunk in hunks:
        wanted = [line.value for line in hunk if not line.is_added]
        begin = hunk.source_start - 1 + moved
        if begin < done or lines[begin : begin + len(wanted)] != wanted:
            elsewhere = [] if strict else [i for i in places(lines, wanted) if i >= done]
            if len(elsewhere) != 1:
                many = f"stand in {len(elsewhere)} places" if elsewhere else "are not there"
                raise Conflict(f"the lines from {hunk.source_start} on, of “{hunk[0].value.strip()}”, {many}")
            begin = elsewhere[0]
        moved = begin - (hunk.source_start - 1)
        result += lines[done:begin] + [line.value for line in hunk if not line.is_removed]
        done = begin + len(wanted)
    return "".join(result + lines[done:])


def with_head(head, text):
    """A script that says in its first lines which recipe it was made by."""
    return "".join(f"# {line}\n" for line in head) + text


def made(name):
    """The text of NAME.py."""
    recipe = read(name)
    try:
        return with_head(recipe.head, applied(recipe.hunks, (ROOT / recipe.script).read_text(encoding="utf-8")))
    except Conflict as conflict:
        fail(f"{name}: {recipe.script} has changed, {conflict}; --refresh merges the two")


def diff(name, script, head, text):
    """The recipe that makes ``text`` of a script's file: its lines on what it is, and a unified diff."""
    before, after = (x.splitlines(keepends=True) for x in ((ROOT / script).read_text(encoding="utf-8"), text))
    return "".join([*(f"{line}\n" for line in head), *difflib.unified_diff(before, after, script, f"{name}.py")])


def save(name):
    """Make a recipe of NAME.py: its first comment says what it is on which script, and the script's lines follow."""
    path = ROOT / f"{name}.py"
    if not path.is_file():
        fail(f"{name}: there is no {path.name} beside the scripts")
    text = path.read_text(encoding="utf-8")
    script = script_in(text.split("\n", 1)[0])
    if script is None:
        fail(f'{path.name}: its first line must say what it is on which script, as "# SPO on ppo_mujoco.py: …"')
    first = (ROOT / script).read_text(encoding="utf-8").split("\n", 1)[0]
    head, found, rest = text.partition(f"\n{first}\n")
    lines = head.split("\n")
    if not found or not all(line.startswith("# ") for line in lines):
        fail(f"{path.name}: must have the first line of {script} below comments that say what it is")
    for i, line in enumerate(rest.split("\n"), len(lines) + 2):
        if re.match("<<<<<<<|=======|>>>>>>>", line):
            fail(f"{path.name}: line {i} is still the mark of a conflict")
    path_of(name).write_text(diff(name, script, [line[2:] for line in lines], f"{first}\n{rest}"), encoding="utf-8")


def older(script):
    """The texts of a script in this repository's history, the newest first; none without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        log = subprocess.run([*git, "log", f"-{OLDER}", "--format=%H", "--", script], capture_output=True, text=True)
        for commit in log.stdout.split():
            shown = subprocess.run([*git, "show", f"{commit}:{script}"], capture_output=True)
            if shown.returncode == 0:
                yield shown.stdout.decode()
    except OSError:
        return


def merged(recipe, old, folder):
    """The script as it now is, with what a recipe made of the ``old`` one; and the number of conflicts marked in it."""
    texts = {"script": (ROOT / recipe.script).read_text(encoding="utf-8"), "old": old}
    texts["recipe"] = applied(recipe.hunks, old, strict=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    command = ["git", "merge-file", "-p", *(word for name in texts for word in ("-L", name)), *texts]
    done = subprocess.run(command, cwd=folder, capture_output=True)
    if done.returncode > 127:  # its exit code is the number of conflicts, up to this
        fail(f"git merge-file: {done.stderr.decode()}", code=1)
    return done.stdout.decode(), done.returncode


def refresh(name):
    """Bring a recipe up to date with its script, and say what became of it; False if it takes somebody to do it."""
    recipe = read(name)
    before = path_of(name).read_text(encoding="utf-8")
    try:
        text = applied(recipe.hunks, (ROOT / recipe.script).read_text(encoding="utf-8"))
        what = "lines have moved"
    except Conflict as conflict:
        for old in older(recipe.script):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    text, conflicts = merged(recipe, old, Path(folder))
                break
            except Conflict:
                continue
        else:
            print(f"{name}: {conflict}, and git knows no {recipe.script} that it was made from")
            return False
        if conflicts:
            path = ROOT / f"{name}.py"
            path.write_text(with_head(recipe.head, text), encoding="utf-8")
            marked = f"conflicts in {conflicts} places, marked in {path.name}"
            print(f"{name}: {marked}; mend them there, then --save {name}")
            return False
        what = f"merged with the changes of {recipe.script}"
    after = diff(name, recipe.script, recipe.head, text)
    if after == before:
        print(f"{name}: up to date")
    else:
        path_of(name).write_text(after, encoding="utf-8")
        print(f"{name}: {what}")
    return True


def main(args):
    """Do what the command line asks for; returns the exit code."""
    modes = [mode for mode in ("list", "show", "save", "refresh") if getattr(args, mode)]
    if len(modes) > 1:
        fail(f"--{modes[1]}: must not go with --{modes[0]}")
    if not args.names and modes not in (["list"], ["refresh"]):
        fail("NAMES: name at least one recipe (--list lists them)")
    for name in args.names:
        if not re.fullmatch(r"\w+", name):
            fail(f"{name!r}: must be letters, digits and _, as spo_mujoco")
    if args.list:
        width = max(map(len, names()), default=0)
        print("\n".join(f"{name:{width}}  {read(name).head[0]}" for name in names()))
    elif args.show:
        print("\n".join(path_of(name).read_text(encoding="utf-8") for name in args.names if read(name)), end="")
    elif args.save:
        for name in args.names:
            save(name)
            print(path_of(name).relative_to(ROOT))
    elif args.refresh:
        fine = [refresh(name) for name in args.names or names()]
        return 0 if all(fine) else 1
    else:
        texts = {name: made(name) for name in args.names}
        for name, text in texts.items():
            path = ROOT / f"{name}.py"
            if path.exists() and path.read_text(encoding="utf-8") != text and not args.overwrite:
                fail(f"{name}: {path.name} is there, and other than the recipe makes it; --overwrite writes over it")
        for name, text in texts.items():
            (ROOT / f"{name}.py").write_text(text, encoding="utf-8")
            print(f"{name}.py")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(parse_args(Args)))
