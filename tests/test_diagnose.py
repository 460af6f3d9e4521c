"""What is said of made-up runs, of committed ones, and of files that are none; the numbers are those of the files."""

import json
import math
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
from test_alarms import N, collapsing, feed, healthy
from test_figures import make_run, paper_logs, write_run

from benchmark import remedies
from benchmark.diagnose import READ, Args, diagnose, flags_of, main, read_evidence, readings, relevant, text_of
from benchmark.logs import DIAGNOSED, RETURN, read_each, read_paper_runs, read_runs
from common.alarms import ALARMS, CATEGORICAL, Watch

ROOT = Path(__file__).resolve().parent.parent
MUJOCO = ROOT / "benchmark" / "results" / "mujoco"
NONE = str(MUJOCO / "Hopper-v4_ReLU_none.csv.gz")


def curves(of, iterations=N):
    """Scalars {tag: {step: value}} of a made-up run of N iterations of 2048 steps."""
    tags = {tag: {} for tag in (*(kind.tag for kind in ALARMS.values()),)}
    for i in range(1, iterations + 1):
        for tag, value in of(i).items():
            tags[tag][i * 2048] = value
    return tags


def made(of, iterations=N, **changed):
    return make_run(curves(of, iterations), total_steps=N * 2048, **changed)


def test_a_run_is_read_as_it_was_watched_in_training(tmp_path):
    """Every iteration's scalars, also those without diagnostics, from the event file to the alarms."""

    def sparse(i):  # the return at each iteration, the rest at every third
        return {tag: x for tag, x in collapsing(i).items() if tag == RETURN or i % 3 == 1}

    folder = write_run(tmp_path, curves(sparse), batch_size=2048, num_iterations=N, activation="ReLU")
    (run,), _, _ = read_each([str(folder)], "RUNS", READ, whole=True)
    fed = {step: tags for step, tags in readings(run)}
    assert list(fed) == [i * 2048 for i in range(1, N + 1)]
    assert fed[2048] == pytest.approx(sparse(1), rel=1e-6) and fed[4096] == pytest.approx(sparse(2), rel=1e-6)
    rang, collapsed = feed(Watch(), sparse)
    diagnosis = diagnose(run)
    events = {event.name: event for event in diagnosis.events}
    for name, alarm in rang.items():
        event = events[f"alarm {name}"]
        assert event.step == alarm.step and (event.was, event.now) == pytest.approx((alarm.was, alarm.now), rel=1e-4)
    assert events["collapsed"].step == collapsed * 2048 and len(rang) == len(ALARMS)
    assert diagnosis.first.startswith(f"ratios, at step {rang['ratios'].step:,}")
    assert diagnosis.state == "collapsed" and 600 <= diagnosis.since / 2048 < 603  # on the grid of diagnoses


@pytest.mark.parametrize(
    "iterations, state, since",
    [(200, "healthy", None), (450, "bounds lost", 300), (640, "collapsing", 600), (N, "collapsed", 600)],
)
def test_verdicts_at_every_stage_of_one_run(iterations, state, since):
    diagnosis = diagnose(made(collapsing, iterations))
    assert diagnosis.state == state
    if since:
        assert 0 <= diagnosis.since / 2048 - since < 25
    assert diagnosis.verdict.startswith(state) and ("% of training" in diagnosis.verdict)


def test_a_healthy_run_and_one_that_comes_back():
    diagnosis = diagnose(made(healthy))
    assert (diagnosis.state, diagnosis.since, diagnosis.held, diagnosis.first) == ("healthy", None, [], "no alarm rang")

    def back(i):
        return healthy(i) | ({ALARMS["ratios"].tag: 1e4} if 300 < i < 400 else {})

    diagnosis = diagnose(made(back))
    assert diagnosis.state == "healthy" and "ratios rang and came back" in diagnosis.verdict


def test_a_return_can_be_lost_alone():
    def alone(i):
        return healthy(i) | ({RETURN: 20.0} if i > 600 else {})

    diagnosis = diagnose(made(alone))
    assert diagnosis.state == "collapsed" and "the rank has not gone with the return" in diagnosis.verdict
    assert not any(event.name == "collapsed" for event in diagnosis.events)


def test_what_was_not_logged_is_said():
    run = make_run({DIAGNOSED: {100: 5.0, 200: 6.0}}, total_steps=10_000)
    lines = diagnose(run).unlogged
    assert "return (no episode has ended yet)" in lines and "PCA rank of the actor's features" not in lines
    assert any(line.startswith("plasticity (python plasticity_probe.py") for line in lines)


def test_categorical_policies_have_their_limit_where_a_log_does_not_say_so():
    """Of Atari's entropy, which ends at 0; and not of a density's."""

    def leaving(i):
        return healthy(i) | {ALARMS["entropy"].tag: 2.0 if i < 500 else 0.1}

    for suite, rings in (("Atari", True), ("MuJoCo", False)):
        run = made(leaving, suite=suite)
        run.scalars["losses/first_minibatch/entropy"] = run.scalars.pop(ALARMS["entropy"].tag)
        assert any(event.name == "alarm entropy" for event in diagnose(run).events) == rings
    run = made(leaving)
    run.scalars[CATEGORICAL] = pd.Series(1.0, index=run.grid)
    assert any(event.name == "alarm entropy" for event in diagnose(run).events)


def test_the_papers_logs_are_diagnosed(tmp_path):
    runs, _ = read_paper_runs(paper_logs(tmp_path))
    for run in runs:  # all of their measures grow without end, and no entropy or return falls
        diagnosis = diagnose(run)
        assert {event.name for event in diagnosis.events} == {
            "alarm ratios",
            "alarm units",
            "alarm norm",
            "largest return",
        }
        assert diagnosis.state == "collapsing" and "the paper's logs" in text_of(diagnosis)


def test_evidence_is_read_from_the_committed_tables():
    """Each number is that of claims.csv, and held is what its interval says."""
    evidence = [x[3] for x in read_evidence(ROOT / "benchmark" / "results") if x[3].source.endswith("claims.csv")]
    table = pd.read_csv(MUJOCO / "claims.csv")
    row = table[
        (table.comparison == "PFO last against none, 10 epochs")
        & (table.measure == "pre-activation norm")
        & (table.activation == "ReLU")
    ]
    (norm,) = [x for x in evidence if x.alarm == "norm" and x.setting == "Hopper-v4, ReLU, 10 epochs"]
    assert (norm.value, norm.reference) == (row.value.item(), row.reference.item())
    assert norm.held == (row.high.item() < 1) and norm.flags == "--pfo-coef 10"
    assert f"{row.low.item():.3g} to {row.high.item():.3g}" in str(norm)
    assert {x.alarm for x in evidence} == set(ALARMS)
    for x in evidence:
        assert x.flags and x.runs > 0


def test_single_runs_are_no_evidence(tmp_path):
    (tmp_path / "one").mkdir()
    table = pd.read_csv(MUJOCO / "claims.csv").assign(low=np.nan, high=np.nan)
    table.to_csv(tmp_path / "one" / "claims.csv", index=False)
    assert read_evidence(tmp_path) == []


def test_evidence_of_remedies_is_read_where_there_is_any(tmp_path):
    runs = [x for x in read_runs([str(MUJOCO)])[0] if x.activation == "Tanh" and x.epochs == 20]
    seeds = remedies.table_of_seeds(runs)
    table = remedies.table_of_remedies(seeds, 0, 100)
    (tmp_path / "remedies").mkdir()
    seeds.to_csv(tmp_path / "remedies" / "runs.csv")
    table.to_csv(tmp_path / "remedies" / "remedies.csv")
    evidence = read_evidence(tmp_path)
    (units,) = [x[3] for x in evidence if x[3].alarm == "units" and x[3].intervention == "PFO last"]
    mean = seeds.groupby("intervention")["dead_units"].mean()
    assert (units.value, units.reference) == pytest.approx((mean["PFO last"], mean["none"]))
    assert units.held and units.flags == "--pfo-coef 1" and units.setting == "Hopper-v4, Tanh, 20 epochs"
    run = runs[0]
    chosen = relevant(run, ["units"], evidence)
    assert chosen and run.intervention not in {x.intervention for x in chosen}


def test_flags_of_interventions():
    assert flags_of("PFO all", "Atari", "ReLU") == "--pfo-coef 10 --pfo-layers all"
    assert flags_of("critic PFO last (coefficient 3) + reset Adam", "MuJoCo", "Tanh") == (
        "--critic-pfo-coef 3 --reset-optimizer"
    )
    assert flags_of("spo_mujoco", "MuJoCo", "Tanh") == "python -m benchmark.recipe spo_mujoco"
    assert flags_of("my_own", "MuJoCo", "Tanh") == ""


def test_json_is_of_the_committed_curves():
    done = forked.program("benchmark.diagnose", NONE, "--only", "20 epochs", "seed 4", "--json")
    (found,) = json.loads(done.stdout)
    assert found["state"] == "collapsed" and found["finished"] and found["seed"] == 4
    rings = pd.read_csv(ROOT / "benchmark" / "results" / "alarms" / "alarms.csv")
    rings = rings[rings.run == "Hopper-v4, ReLU, constant learning rate, 20 epochs, baseline, seed 4"].iloc[0]
    events = {event["name"]: event["step"] for event in found["events"]}
    for name in ALARMS:
        assert events[f"alarm {name}"] == pytest.approx(rings[name], abs=10)  # of 6 digits
    assert (found["since"], events["collapsed"]) == pytest.approx((rings["lost"], rings["stopped"]), abs=10)
    assert {held["alarm"] for held in found["held_in_measured_runs"]} == set(ALARMS)


def test_infinities_are_no_json():
    run = made(lambda i: healthy(i) | ({ALARMS["ratios"].tag: math.inf} if i > 500 else {}))
    run.scalars["trust_region/ratio_above_mean"] = pd.Series(np.inf, index=run.grid)
    json.dumps(diagnose(run).as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "runs, changed, named",
    [
        (("nowhere",), {}, "RUNS nowhere"),
        ((), {}, "RUNS"),
        ((str(MUJOCO / "claims.md"),), {}, "claims.md"),
        ((NONE,), {"only": ("no such run",)}, "--only no such run"),
        ((NONE,), {"results": Path("nowhere")}, "--results nowhere"),
    ],
)
def test_what_is_wrong_costs_one_line(capsys, runs, changed, named):
    refused(capsys, Args(runs, **changed), named)


def test_a_folder_without_a_diagnosis_is_named(tmp_path, capsys):
    folder = write_run(tmp_path, {RETURN: {100: 1.0}})
    refused(capsys, Args((str(folder),)), f"{folder}: it has no")


def refused(capsys, args, named):
    with pytest.raises(SystemExit) as end:
        main(args)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
