"""Areas, labels and rings of made-up runs against plain loops, and the command on committed runs."""

import math
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.alarms import (
    HORIZONS,
    OTHERS,
    Told,
    alarm_table,
    auc,
    early,
    early_table,
    labelled,
    lead,
    roc,
    share,
    tell,
)  # fmt: skip
from benchmark.logs import DIAGNOSED, RETURN, TAGS, Run
from common.alarms import ALARMS

ROOT = Path(__file__).resolve().parent.parent
STEPS = np.arange(0, 1000, 10)


def made(score, lost, **rings):
    """A run of 1000 steps with this score, lost at a step or not."""
    rings = dict.fromkeys(ALARMS) | rings
    return Told("run", 1000, STEPS, {"x": np.asarray(score, float)}, rings, None, lost, math.nan)


def test_points_are_labelled_by_what_comes_within_the_horizon():
    positive, negative = labelled(made(STEPS, 500), "x", 0.1)
    assert positive.tolist() == list(range(400, 500, 10)) and negative.tolist() == list(range(40, 400, 10))
    positive, negative = labelled(made(STEPS, None), "x", 0.1)
    assert positive.tolist() == [] and negative.tolist() == list(range(40, 900, 10))  # the last 90 know no end
    score = np.where(STEPS < 450, math.nan, STEPS)
    assert labelled(made(score, 500), "x", 0.1)[0].tolist() == [450, 460, 470, 480, 490]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999))
def test_area_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    tolds = [made(rng.integers(0, 9, len(STEPS)), lost) for lost in (300, 700, None)]
    parts = [labelled(told, "x", 0.2) for told in tolds]
    positive, negative = (np.concatenate(x) for x in zip(*parts, strict=True))
    pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
    area, low, high = auc(tolds, "x", 0.2, rng, 100)
    assert area == pytest.approx(np.mean(pairs)) and low <= area <= high
    assert np.trapezoid(*roc(positive, negative)[::-1]) == pytest.approx(area)


def test_area_of_a_perfect_measure_and_of_none():
    rng = np.random.default_rng(0)
    tolds = [made(lost - 200 <= STEPS, lost) for lost in (400, 600, 800)]
    assert auc(tolds, "x", 0.2, rng, 100) == (1, 1, 1)
    assert np.isnan(auc([made(STEPS, None)], "x", 0.2, rng, 100)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999))
def test_early_shares_are_those_of_pairs(seed):
    """At 10 % of training, of runs that are not lost by then and have the measure."""
    rng = np.random.default_rng(seed)
    losts = [None, None, 50, 100, *rng.integers(101, 900, 6).tolist()]
    scores = rng.integers(0, 5, len(losts)).astype(float)
    tolds = [made(np.where(STEPS <= 100, score, rng.random(len(STEPS))), lost)
             for score, lost in zip(scores, losts, strict=True)]  # fmt: skip
    tolds.append(made(np.where(STEPS <= 100, math.nan, 1.0), 500))  # logged too late
    known = [(score, lost or math.inf) for score, lost in zip(scores, losts, strict=True) if lost not in (50, 100)]
    found = early(tolds, "x", np.random.default_rng(0), 100)
    assert (found["runs"], found["lost"]) == (8, 6)
    for name, pairs in (
        ("auc", [(x, y) for x, lost in known for y, other in known if lost < math.inf == other]),
        ("concordance", [(x, y) for x, lost in known for y, other in known if lost < other]),
    ):
        assert found[name] == pytest.approx(np.mean([(x > y) + (x == y) / 2 for x, y in pairs]))
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


def test_early_shares_without_runs_to_tell_apart():
    """All lost: sooner or later still is a question. A single one that isn't carries no interval."""
    rng, worse = np.random.default_rng(0), [made(1000 - lost + 0 * STEPS, lost) for lost in (300, 500, 700)]
    for tolds in (worse, [*worse, made(0 * STEPS, None)]):
        found = early(tolds, "x", rng, 100)
        assert math.isnan(found["auc"]) and found["concordance"] == 1 and found["lost"] == 3
    found = early([*worse, made(0 * STEPS, None), made(999 + 0 * STEPS, None)], "x", rng, 100)
    assert found["auc"] == 0.5 and found["concordance"] == pytest.approx(6 / 9)
    unlogged = early([made(math.nan * STEPS, 500)], "x", rng, 100)
    assert unlogged["runs"] == 0 and math.isnan(unlogged["concordance"])
    rows = early_table(pd.DataFrame.from_dict({"one": unlogged, "other": found}, orient="index"))
    assert [row[:2] for row in rows] == [("other", "3 of 5"), ("one", "not logged in these runs")]
    assert early_table(pd.DataFrame.from_dict({"x": early(worse, "x", rng, 100)}, orient="index"))[0][2] == "–"


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_a_low_oui_is_the_worse_and_is_kept_in_thinned_curves(network):
    """Logged under the scripts' own tag, which the logs keep; a mean over five points, of what was known alone."""
    tag = f"representation/after/{network}/activation_balance"
    assert tag in TAGS and OTHERS[f"{network}'s OUI"][0] == tag
    steps = pd.Index(range(0, 1000, 10))
    curves = {DIAGNOSED: 9 + 0.0 * steps, RETURN: 5 + 0.0 * steps, tag: np.linspace(0.6, 0.1, len(steps))}
    logged = {name: pd.Series(np.asarray(x), index=steps) for name, x in curves.items()}
    run = Run("run", "runs", "MuJoCo", "Hopper-v4", "ReLU", "constant", 20, "none", 1, 1000, scalars=logged)
    told = tell(run)
    score = told.scores[f"{network}'s OUI"]
    assert score[50] == pytest.approx(-np.mean(curves[tag][46:51])) and (np.diff(score) > 0).all()
    other = {"actor": "critic", "critic": "actor"}[network]
    assert np.isnan(told.scores[f"{other}'s OUI"]).all()


def test_rings_are_counted_and_timed():
    tolds = [made(STEPS, 500, rank=300), made(STEPS, 600, rank=590), made(STEPS, 400, rank=700), made(STEPS, 300)]
    tolds += [made(STEPS, None, rank=10), made(STEPS, None)]
    ((name, limit, before, soon, _, never, wrong),) = alarm_table(tolds, {"rank": 0.2}, np.random.default_rng(0), 100)
    assert (name, limit, never, wrong) == ("rank", "0.2", "1", "1 of 2")
    assert before.startswith("2 of 4 (") and soon.startswith("2 of 4 (")
    told = [made(STEPS, 10**6 * end, rank=10**6 * (end - 1)) for end in (2, 3, 4)]
    assert lead(told, "rank", np.random.default_rng(0), 100) == "1.00 (1.00 to 1.00), 1.00 to 1.00"
    assert lead(tolds, "norm", np.random.default_rng(0), 100) == "–"


def test_shares_have_wilsons_interval():
    assert share(0, 0) == "0 of 0"
    assert share(5, 10) == "5 of 10 (24 to 76 %)"  # Wilson 1927, as in any table of it
    assert share(10, 10) == "10 of 10 (72 to 100 %)"


def test_the_command_chooses_on_one_half_and_judges_the_other(tmp_path):
    runs = ROOT / "benchmark" / "results" / "mujoco" / "Hopper-v4_ReLU_none.csv.gz"
    done = forked.program("benchmark.alarms", "--runs", runs, "--output", tmp_path / "out", "--resamples", "100")
    text = (tmp_path / "out" / "alarms.md").read_text()
    assert done.stdout.rstrip().endswith(text.rstrip()) and (tmp_path / "out" / "roc.png").stat().st_size > 10_000
    areas = pd.read_csv(tmp_path / "out" / "auc.csv")
    assert set(areas.horizon) == set(HORIZONS) and areas.auc.between(0, 1).all()
    assert (areas.low <= areas.high).all() and "actor's OUI" not in set(areas.measure)
    assert "| actor's OUI | not logged in these runs | not logged" in text
    table = pd.read_csv(tmp_path / "out" / "early.csv", index_col="measure")
    assert "actor's OUI" not in table.index and set(areas.measure) - {"share of training"} == set(table.index)
    assert table.concordance.between(0, 1).all() and (table.runs <= 10).all() and "## At 10 % of training" in text
    assert "| actor's OUI | not logged in these runs |  |  |" in text
    alarms = pd.read_csv(tmp_path / "out" / "alarms.csv")
    assert alarms.half.value_counts().to_dict() == {"chosen on": 5, "judged": 5}
    assert alarms.lost.notna().all() and (alarms.ratios < alarms.lost).all()


def test_too_few_runs_are_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    done = forked.program("benchmark.alarms", "--runs", tmp_path / "runs", "--output", tmp_path, code=2)
    assert done.stderr.startswith("error: --runs") and done.stderr.count("\n") == 1


def test_the_scripts_have_the_limits_that_were_chosen():
    """The committed table judges what the scripts do."""
    text = (ROOT / "benchmark" / "results" / "alarms" / "alarms.md").read_text()
    for name, kind in ALARMS.items():
        assert f"| {name} | {kind.limit:g} |" in text
