"""The comparison of remedies: known numbers in, known numbers out, and the command on synthetic runs."""

import re

import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_figures import ROOT, STEPS, curves_of, write_run

from benchmark import recipe, remedies


def test_holm_of_known_numbers():
    assert remedies.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert remedies.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = remedies.holm([0.02, np.nan, 0.01])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.02]) and np.isnan(adjusted[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_rejects_as_its_steps_do(p_values):
    """One after the other, the smallest first, until one is above 0.05 over the number of those that are left."""
    adjusted, rejecting = remedies.holm(p_values), True
    for k, i in enumerate(np.argsort(p_values, kind="stable")):
        rejecting &= (len(p_values) - k) * p_values[i] <= 0.05
        assert (adjusted[i] <= 0.05) == rejecting
        assert adjusted[i] >= p_values[i]


def test_what_is_compared_are_logarithms():
    x, y = np.array([100.0, 220.0, 90.0]), np.array([10.0, 12.0, 9.0])
    assert remedies.different(x, y) == pytest.approx(stats.ttest_ind(np.log(x), np.log(y), equal_var=False).pvalue)
    assert remedies.different(x, 7 * y) == pytest.approx(remedies.different(3 * x, 21 * y))
    assert np.isnan(remedies.different(x, np.array([0.0, 1.0]))) and np.isnan(remedies.different(x[:1], y))


def test_means_and_intervals():
    rng = np.random.default_rng(0)
    mean, low, high = remedies.mean_and_interval(np.array([1.0, 100.0]), True, rng, 1000)
    assert (mean, low, high) == pytest.approx((10, 1, 100))
    assert remedies.mean_and_interval(np.array([3.0]), False, rng, 1000)[0] == 3
    assert np.isnan(remedies.mean_and_interval(np.array([]), False, rng, 1000)).all()


def seeds_with(returns):
    """A table as table_of_seeds makes it, of returns by remedy."""
    rows = []
    for remedy, values in returns.items():
        for value in values:
            row = dict.fromkeys(remedies.MEASURES, 1.0) | {"intervention": remedy, "return": value, "max_return": 9.0}
            row["finished"] = True
            rows.append(row | {"ratio_broken_in": True, "return_halved_in": value < 100})
    return pd.DataFrame(rows)


def test_remedies_are_in_the_order_of_their_returns_and_judged_by_the_adjusted_p():
    returns = {"none": [50, 55, 60, 52, 57], "good": [500, 550, 610, 540, 520], "bad": [5, 5.5, 6, 5.2, 5.1]}
    returns |= {f"idle {i}": [49 + i, 56, 61, 52 - i, 57] for i in range(4)}
    table = remedies.table_of_remedies(seeds_with(returns), 0, 1000)
    assert table["remedy"].iloc[0] == "good" and table["remedy"].iloc[-1] == "bad"
    rows = {row["remedy"]: {**row, "of_ppo": {"return": 54.8, "max_return": 9.0}} for row in table.to_dict("records")}
    assert remedies.verdict(rows["good"]) == "helps" and remedies.verdict(rows["bad"]) == "harms"
    assert all(remedies.verdict(rows[f"idle {i}"]) == "no difference shown" for i in range(4))
    assert rows["good"]["improvement"] == 1 and rows["good"]["return_halved_in"] == 0
    assert rows["good"]["p_return_adjusted"] >= 5 * rows["good"]["p_return"]  # the second smallest of six
    text = remedies.markdown(table)
    assert "| **PPO** | 5 | – | – | – |" in text and text.count("\n") == 2 + 7 - 1


def test_the_command(tmp_path):
    (tmp_path / "runs").mkdir()
    for seed in range(3):
        for script, collapsed in (("ppo_mujoco", True), ("spo_mujoco", False)):
            curves = curves_of(seed, collapsed)
            if collapsed:
                curves["alarm/norm"] = {step: float(step >= STEPS[40 + seed]) for step in STEPS}
            write_run(tmp_path / "runs", curves, seed=seed, script=f"{script}.py")
    flags = ["--runs", tmp_path / "runs", "--output", tmp_path / "out", "--resamples", "200"]
    forked.program("benchmark.remedies", *flags)
    names = {"remedies.md", "remedies.csv", "remedies.png", "remedies.pdf", "runs.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    table = pd.read_csv(tmp_path / "out" / "remedies.csv")
    assert list(table["remedy"]) == ["spo_mujoco", "none"] and list(table["runs"]) == [3, 3]
    runs = pd.read_csv(tmp_path / "out" / "runs.csv").set_index(["intervention", "seed"]).sort_index()
    assert list(runs.loc["none", "rang_norm"]) == list(STEPS[40:43])
    assert runs.loc["spo_mujoco", "rang_norm"].isna().all() and runs["rang_ratios"].isna().all()


def test_remedies_of_an_earlier_call_are_kept(tmp_path, capsys):
    """By their rows alone; of a remedy that is there again, the new runs count."""

    def call(*scripts, **flags):
        (tmp_path / "-".join(scripts)).mkdir()
        for script in scripts:
            for seed in range(3):
                write_run(tmp_path / "-".join(scripts), curves_of(seed, "ppo" in script), seed=seed, script=script)
        args = remedies.Args(runs=(str(tmp_path / "-".join(scripts)),), output=tmp_path / "out", resamples=200, **flags)
        remedies.main(args)
        return [pd.read_csv(tmp_path / "out" / name) for name in ("remedies.csv", "runs.csv")]

    earlier = tmp_path / "out" / "runs.csv"
    call("ppo_mujoco.py", "spo_mujoco.py")
    table, runs = call("redo_mujoco.py", earlier=earlier)
    assert set(table["remedy"]) == {"none", "spo_mujoco", "redo_mujoco"} and len(runs) == 9
    together = remedies.table_of_remedies(runs, 0, 200)
    means = list(remedies.MEASURES)
    assert np.allclose(together[means].astype(float), table[means].astype(float), rtol=1e-4, equal_nan=True)
    table, runs = call("spo_mujoco.py", earlier=earlier)
    assert len(runs) == 9 and not runs.duplicated(["intervention", "seed"]).any()
    for text, words in (("a,b\n1,2\n", "has no column run"), ("", "can't be read as CSV")):
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(SystemExit) as stop:
            remedies.main(remedies.Args((str(tmp_path / "spo_mujoco.py"),), tmp_path / "other.csv", tmp_path / "none"))
        assert stop.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "none").exists()
    runs.assign(epochs=99).to_csv(tmp_path / "other.csv")
    with pytest.raises(SystemExit) as stop:
        remedies.main(remedies.Args((str(tmp_path / "spo_mujoco.py"),), tmp_path / "other.csv", tmp_path / "none"))
    assert stop.value.code == 2 and "has epochs 99" in capsys.readouterr().err


@pytest.mark.parametrize("unfinished", [False, True])
def test_runs_that_are_not_finished_count_where_they_are_to(unfinished, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for seed in range(3):
        for script in ("ppo_mujoco", "spo_mujoco"):
            curves = curves_of(seed, script == "ppo_mujoco")
            if script == "spo_mujoco" and seed == 2:
                last = max(max(points) for points in curves.values())
                curves = {tag: {k: x for k, x in points.items() if k <= last / 2} for tag, points in curves.items()}
            write_run(tmp_path / "runs", curves, seed=seed, script=f"{script}.py")
    remedies.main(remedies.Args((str(tmp_path / "runs"),), output=tmp_path, unfinished=unfinished, resamples=200))
    table = pd.read_csv(tmp_path / "remedies.csv").set_index("remedy")
    assert list(table.loc[["spo_mujoco", "none"], "runs"]) == [2 + unfinished, 3]
    assert list(table.loc[["spo_mujoco", "none"], "unfinished"]) == [int(unfinished), 0]
    assert ("| 3 (1 unfinished) |" in (tmp_path / "remedies.md").read_text()) == unfinished
    assert ("not finished, see --unfinished" in capsys.readouterr().out) != unfinished


def test_without_ppo_there_is_nothing_to_compare_with(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs", curves_of(0), script="spo_mujoco.py")
    with pytest.raises(SystemExit) as stop:
        remedies.main(remedies.Args(runs=(str(tmp_path / "runs"),), output=tmp_path / "out"))
    assert stop.value.code == 1 and "of PPO without change, and of a remedy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_study_has_every_recipe_on_mujoco():
    """But for the other environments."""
    text = (ROOT / "benchmark" / "remedies.sh").read_text()
    names = [name.removesuffix("_mujoco") for name in recipe.names() if name.endswith("_mujoco")]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
