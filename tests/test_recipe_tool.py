"""benchmark.recipe: diffs are applied to the letter, saved, and brought up to date with their scripts."""

import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark import recipe

ROOT = recipe.ROOT
SCRIPT = "".join(f"line {i}\n" for i in range(30))
HEAD = "Shout on script.py: a line in capitals (Author 2020), constant 1."


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with script.py, and a recipe that changes its line 10."""
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.setattr(recipe, "RECIPES", tmp_path / "recipes")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    text = SCRIPT.replace("line 10\n", "LINE 10\nand more\n")
    recipe.path_of("shout").write_text(recipe.diff("shout", "script.py", [HEAD], text))
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    return tmp_path


def main(*names, **flags):
    return recipe.main(recipe.Args(names=names, **flags))


def refused(capsys, *names, **flags):
    with pytest.raises(SystemExit) as stop:
        main(*names, **flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


LINES = st.lists(st.sampled_from(["a\n", "b\n", "c\n"]), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(LINES, LINES)
def test_a_diff_makes_of_one_text_the_other(before, after):
    text = "".join(recipe.difflib.unified_diff(before, after, "a.py", "b.py"))
    hunks = list(recipe.PatchSet(text)[0]) if text else []
    assert recipe.applied(hunks, "".join(before), strict=True) == "".join(after)


def test_a_copy_says_what_it_is(tree):
    assert main("shout") == 0
    made = (tree / "shout.py").read_text()
    assert made == f"# {HEAD}\n" + SCRIPT.replace("line 10\n", "LINE 10\nand more\n")


def test_lines_may_move_but_not_change(tree, capsys):
    (tree / "script.py").write_text("new\n" * 5 + SCRIPT)
    assert "LINE 10\n" in recipe.made("shout")
    hunks = recipe.read("shout").hunks
    with pytest.raises(recipe.Conflict, match="are not there"):
        recipe.applied(hunks, (tree / "script.py").read_text(), strict=True)
    with pytest.raises(recipe.Conflict, match="from 8 on, of “line 7”, stand in 2 places"):
        recipe.applied(hunks, "new\n" + SCRIPT + SCRIPT)
    (tree / "script.py").write_text(SCRIPT.replace("line 8", "line eight"))
    assert "shout: script.py has changed" in refused(capsys, "shout")
    assert not (tree / "shout.py").exists()


def test_refreshing_follows_lines_that_move(tree, capsys):
    assert main(refresh=True) == 0 and capsys.readouterr().out == "shout: up to date\n"
    (tree / "script.py").write_text("new\n" * 5 + SCRIPT)
    assert main(refresh=True) == 0 and capsys.readouterr().out == "shout: lines have moved\n"
    assert "@@ -13,7 +13,8 @@" in recipe.path_of("shout").read_text()
    assert main(refresh=True) == 0 and capsys.readouterr().out == "shout: up to date\n"


def test_refreshing_merges_changes_nearby(tree, capsys):
    (tree / "script.py").write_text(SCRIPT.replace("line 8\n", "line eight\n"))
    assert main("shout", refresh=True) == 0
    assert capsys.readouterr().out == "shout: merged with the changes of script.py\n"
    assert recipe.made("shout").endswith(
        SCRIPT.replace("line 8\n", "line eight\n").replace("line 10\n", "LINE 10\nand more\n")
    )
    assert not (tree / "shout.py").exists()


def test_a_conflict_is_mended_in_the_copy(tree, capsys):
    (tree / "script.py").write_text(SCRIPT.replace("line 10\n", "line ten\n"))
    before = recipe.path_of("shout").read_text()
    assert main("shout", refresh=True) == 1
    assert "conflicts in 1 places, marked in shout.py" in capsys.readouterr().out
    assert recipe.path_of("shout").read_text() == before
    assert "is still the mark of a conflict" in refused(capsys, "shout", save=True)
    copy = (tree / "shout.py").read_text()
    begin, end = copy.index("<<<<<<<"), copy.index(">>>>>>> recipe\n") + len(">>>>>>> recipe\n")
    (tree / "shout.py").write_text(copy[:begin] + "LINE TEN\n" + copy[end:])
    assert main("shout", save=True) == 0
    assert recipe.made("shout") == (tree / "shout.py").read_text()
    assert "-line ten\n+LINE TEN\n" in recipe.path_of("shout").read_text()


def test_a_copy_becomes_a_recipe(tree, capsys):
    text = SCRIPT.replace("line 29\n", "the end\n")
    (tree / "whisper.py").write_text(f"# Whisper on script.py: less (Author 2021).\n# No constant.\n{text}")
    assert main("whisper", save=True) == 0
    assert capsys.readouterr().out == "recipes/whisper.diff\n"
    one = recipe.read("whisper")
    assert one.head == ["Whisper on script.py: less (Author 2021).", "No constant."] and one.script == "script.py"
    assert main("whisper") == 0  # it is there, and as the recipe makes it
    assert main(list=True) == 0
    assert "shout    Shout on script.py: a line" in capsys.readouterr().out


def test_what_somebody_wrote_is_not_written_over(tree, capsys):
    (tree / "shout.py").write_text("mine\n")
    assert "shout.py is there, and other than the recipe makes it" in refused(capsys, "shout")
    assert (tree / "shout.py").read_text() == "mine\n"
    assert main("shout", overwrite=True) == 0 and "LINE 10" in (tree / "shout.py").read_text()


def test_wrong_arguments_cost_one_line(tree, capsys):
    assert "shot: is no recipe; nearest: shout" in refused(capsys, "shot")
    assert "name at least one recipe" in refused(capsys)
    assert "--show: must not go with --list" in refused(capsys, "shout", list=True, show=True)
    assert "must be letters, digits and _" in refused(capsys, "../shout")
    assert "there is no whisper.py" in refused(capsys, "whisper", save=True)
    (tree / "whisper.py").write_text("# Whisper: less.\n" + SCRIPT)
    assert "its first line must say what it is on which script" in refused(capsys, "whisper", save=True)
    (tree / "whisper.py").write_text("# Whisper on script.py: less.\nnothing else\n")
    assert "must have the first line of script.py below comments" in refused(capsys, "whisper", save=True)
    recipe.path_of("bad").write_text(
        "Bad on script.py: nothing.\n--- script.py\n+++ bad.py\n@@ -1,9 +1,9 @@\n line 0\n"
    )
    assert "is no unified diff" in refused(capsys, "bad")
    recipe.path_of("bad").write_text("Bad on nothing.py: nothing.\n")
    assert "must begin with a line that says what it is on which script" in refused(capsys, "bad")


def test_the_command_writes_a_script_beside_the_others(tmp_path):
    for folder in ("benchmark", "common", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "ppo_mujoco.py", tmp_path)
    command = [sys.executable, "-m", "benchmark.recipe", "spo_mujoco"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "spo_mujoco.py\n"), done.stderr
    assert (tmp_path / "spo_mujoco.py").read_text().startswith("# SPO on ppo_mujoco.py: ")
