"""Areas, labels and rings of made-up runs against plain loops, and the command on committed runs."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.alarms import HORIZONS, Told, alarm_table, auc, labelled, lead, roc, share
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
    command = [sys.executable, "-m", "benchmark.alarms", "--runs", str(runs), "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--resamples", "100"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "alarms.md").read_text()
    assert done.stdout.rstrip().endswith(text.rstrip()) and (tmp_path / "out" / "roc.png").stat().st_size > 10_000
    areas = pd.read_csv(tmp_path / "out" / "auc.csv")
    assert set(areas.horizon) == set(HORIZONS) and areas.auc.between(0, 1).all()
    assert (areas.low <= areas.high).all() and "actor's OUI" not in set(areas.measure) and "actor's OUI" in text
    alarms = pd.read_csv(tmp_path / "out" / "alarms.csv")
    assert alarms.half.value_counts().to_dict() == {"chosen on": 5, "judged": 5}
    assert alarms.lost.notna().all() and (alarms.ratios < alarms.lost).all()


def test_too_few_runs_are_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "benchmark.alarms", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --runs") and done.stderr.count("\n") == 1


def test_the_scripts_have_the_limits_that_were_chosen():
    """The committed table judges what the scripts do."""
    text = (ROOT / "benchmark" / "results" / "alarms" / "alarms.md").read_text()
    for name, kind in ALARMS.items():
        assert f"| {name} | {kind.limit:g} |" in text
