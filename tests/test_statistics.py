"""Survival, interquartile means, improvement and what rliable reads: numbers by hand, properties, and the command."""

import itertools

import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_figures import ABOVE, ROOT, STEPS, command, curves_of, make_run, paper_logs, write_run

from benchmark import human
from benchmark.logs import DIAGNOSED, RETURN, read_runs
from benchmark.measures import iqm_over_seeds, over_seeds, smooth
from benchmark.statistics import after_break, comparisons, for_rliable, improvements, read_times
from benchmark.survival import (
    EVENTS,
    Time,
    kaplan_meier,
    logrank,
    logrank_scores,
    median_time,
    restricted_mean,
    times_of,
)
from benchmark.table import probability_of_improvement

MUJOCO = ROOT / "benchmark" / "results" / "mujoco"
# Weeks in remission of 21 + 21 patients with leukaemia (Freireich et al. 1963), the textbooks' example
PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
TREATED = [6, 6, 6, 7, 10, 13, 16, 22, 23]
STILL = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]


def happened(steps, last=1000):
    return [Time(step, True, last) for step in steps]


def never(steps):
    return [Time(step, False, step) for step in steps]


some_time = st.tuples(st.integers(1, 12), st.booleans()).map(lambda x: Time(x[0], x[1], 12 if x[1] else x[0]))
some_times = st.lists(some_time, min_size=1, max_size=7)  # up to 7 against 7, all ways to deal them are gone through


def test_a_kaplan_meier_curve_by_hand():
    """Of 6: one falls of 6 at 2, one is censored at 3, one falls of 4 at 5, one is censored there, 1 of 2 at 7."""
    curve = kaplan_meier([*happened([2, 5, 7]), *never([3, 5, 9])])
    assert curve["step"].tolist() == [0, 2, 3, 5, 7, 9]
    assert curve["survival"].tolist() == pytest.approx([1, 5 / 6, 5 / 6, 5 / 6 * 3 / 4, 5 / 16, 5 / 16])
    assert curve["at_risk"].tolist() == [6, 6, 5, 4, 2, 1]
    assert curve["events"].tolist() == [0, 1, 0, 1, 1, 0] and curve["censored"].tolist() == [0, 0, 1, 1, 0, 1]
    # Greenwood at 2: var(log S) = 1 / (6 · 5), so that the bounds are S ** exp(± 1.96 sqrt(1/30) / log(5/6))
    spread = np.exp(1.959964 * np.sqrt(1 / 30) / np.log(5 / 6) * np.array([-1, 1]))
    assert curve.loc[1, ["low", "high"]].tolist() == pytest.approx((5 / 6) ** spread)
    assert curve.loc[0, ["low", "high"]].isna().all()


def test_medians_and_restricted_means_by_hand():
    times = [*happened([2, 5, 7]), *never([3, 5, 9])]
    assert median_time(times) == 7 and np.isnan(median_time(times[:1] + times[3:]))
    assert median_time(happened([1, 2, 3, 4])) == 2  # at most half are left from there on
    assert restricted_mean(times, 8) == pytest.approx(2 + 3 * 5 / 6 + 2 * 5 / 8 + 5 / 16)
    assert restricted_mean(never([9, 9]), 9) == 9 and restricted_mean(happened([3, 5]), 4) == 3.5


def test_the_log_rank_test_of_the_textbooks():
    """Chi-square 16.79 with 1 degree of freedom; expected 10.75 of 21 on placebo and 19.25 of 9 under treatment."""
    placebo, treated = happened(PLACEBO), [*happened(TREATED), *never(STILL)]
    found = logrank(placebo, treated)
    assert found.p == pytest.approx(4.17e-5, rel=0.01) and found.p_permuted < 0.001
    scores = logrank_scores([*placebo, *treated])
    assert len(PLACEBO) - scores[:21].sum() == pytest.approx(10.75, abs=0.005)
    assert len(TREATED) - scores[21:].sum() == pytest.approx(19.25, abs=0.005)
    assert (median_time(placebo), median_time(treated)) == (8, 23)


def test_five_against_five():
    """All earlier: 2 of 252 ways to deal them; where nothing happened, or to neither, nothing can be said."""
    found = logrank(happened([1, 2, 3, 4, 5]), happened([6, 7, 8, 9, 10]))
    assert found.p_permuted == pytest.approx(2 / 252) and 0.001 < found.p < 0.003
    assert (
        np.isnan(logrank(never([5, 5]), never([5, 5]))).all()
        and np.isnan(logrank(happened([1, 2]), happened([3]))).all()
    )
    assert logrank(happened([3, 3]), happened([3, 3])) == (1, 1)


@settings(deadline=None)
@given(some_times)
def test_survival_never_rises_and_stays_within_its_band(times):
    curve = kaplan_meier(times)
    assert (np.diff(curve["survival"]) <= 1e-12).all() and curve["survival"].between(0, 1).all()
    banded = curve.dropna()
    assert (banded["low"] <= banded["survival"] + 1e-9).all() and (banded["survival"] <= banded["high"] + 1e-9).all()
    assert curve["events"].sum() + curve["censored"].sum() == len(times)
    assert 0 <= restricted_mean(times, 12) <= 12


@settings(deadline=None)
@given(some_times, st.integers(1, 12))
def test_without_censoring_it_is_the_share_that_is_left(times, step):
    steps = [time.step for time in times]
    curve = kaplan_meier(happened(steps)).set_index("step")["survival"]
    assert curve[curve.index <= step].iloc[-1] == pytest.approx(np.mean([x > step for x in steps]))
    assert restricted_mean(happened(steps), step) == pytest.approx(np.mean(np.minimum(steps, step)))


@settings(deadline=None)
@given(some_times, some_times)
def test_the_log_rank_test_has_no_sides(times, others):
    one, other = logrank(times, others), logrank(others, times)
    assert tuple(one) == pytest.approx(tuple(other), nan_ok=True)
    assert np.isnan(one.p_permuted) or 0 < one.p_permuted <= 1
    assert logrank_scores([*times, *others]).sum() == pytest.approx(0, abs=1e-9)


scores = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@settings(deadline=None)
@given(scores, scores)
def test_one_improves_or_the_other(x, y):
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)


def test_the_times_of_runs():
    """A run that collapses, one that stays healthy, and one in progress."""
    collapsed = curves_of(1, collapsed=True)
    collapsed[ABOVE] = {step: 100.0 if step > 3000 else 1.3 for step in STEPS}
    found = times_of(make_run(collapsed))
    assert found["ratio_broken"] == (3100, True, 10_000) and found["return_halved"].happened
    assert all(times_of(make_run(curves_of()))[event] == (10_000, False, 10_000) for event in EVENTS)
    part = {tag: {step: x for step, x in points.items() if step <= 4000} for tag, points in curves_of().items()}
    assert times_of(make_run(part))["rank_tenth"] == (4000, False, 4000)


def test_the_tests_of_a_place():
    """Holm's factor is the number of settings of which a question is asked, and each event's is its own."""
    settings_of = itertools.product(("none", "PFO last", "reset Adam"), (10, 20), range(4))
    runs, times = [], {}
    for intervention, epochs, seed in settings_of:
        run = make_run({}, name=f"{intervention}{epochs}{seed}", intervention=intervention, epochs=epochs, seed=seed)
        step = 100 + seed + (1000 if intervention == "PFO last" else 0)
        quiet = Time(10_000, False, 10_000)
        runs.append(run)
        times[run.name] = {"ratio_broken": Time(step, True, 10_000), "return_halved": quiet, "rank_tenth": quiet}
    table = comparisons(runs, times)
    assert len(table) == 3 * 6 and (table["runs"] == 4).all()
    broken = table[table["event"] == EVENTS["ratio_broken"]].set_index(["intervention", "epochs"])
    pfo = broken.loc[("PFO last", 10)]
    assert (pfo["events"], pfo["median"], pfo["restricted_mean"]) == (4, 1101, 1101.5)
    assert pfo["p_intervention"] == pytest.approx(2 / 70) and pfo["p_holm_intervention"] == pytest.approx(8 / 70)
    assert broken.loc[("none", 20), "p_epochs"] == 1 and np.isnan(broken.loc[("none", 20), "p_intervention"])
    quiet = table[table["event"] != EVENTS["ratio_broken"]]
    assert (
        quiet["restricted_mean"].eq(10_000).all()
        and quiet["median"].isna().all()
        and quiet.filter(like="p_").isna().all(axis=None)
    )


def test_curves_after_the_break():
    run = make_run({RETURN: {step: float(step) for step in STEPS}})
    curve = after_break(run, RETURN, 3050, 100)
    assert curve.index[0] == -2900 and curve.index[-1] == 6900 and (np.diff(curve.index) == 100).all()
    assert curve[0] == 3000 and curve[100] == 3100  # the last value at that step


def test_interquartile_means_over_seeds():
    """Of five seeds the middle three; a band that the means of draws lie in; seeds count up to their own end."""
    series = [pd.Series(float(x), index=range(10, 101, 10)) for x in (0, 1, 2, 6, 1000)]
    series[4] = series[4].loc[:50]
    table = iqm_over_seeds(series, False)
    assert table["iqm"].tolist() == [3.0] * 5 + [1.5] * 5 and table["seeds"].tolist() == [5] * 5 + [4] * 5
    means = [np.sort(draw)[1:4].mean() for draw in itertools.product((0, 1, 2, 6, 1000), repeat=5)]  # all of them
    low, high = np.percentile(means, [2.5, 97.5])
    assert table.loc[10, "low"] == pytest.approx(low, abs=0.35) and table.loc[10, "high"] == pytest.approx(
        high, rel=0.1
    )
    assert iqm_over_seeds(series[:1], False)[["low", "high"]].isna().all(axis=None)
    waves = [pd.Series(np.sin(np.arange(50) + i), index=range(50)) for i in range(3)]
    smoothed = iqm_over_seeds(waves, True)["iqm"]  # of three none is cut off: the mean, whose smoothing is linear
    np.testing.assert_allclose(smoothed, over_seeds(waves, True)["mean"])
    np.testing.assert_allclose(smoothed, smooth(pd.concat(waves, axis=1).mean(axis=1)))


def test_hours_of_a_run():
    rate = {100: 10.0, 200: 20.0, 300: 10.0}  # steps a second since the beginning: 10, 10 and 30 seconds
    run = make_run({"charts/SPS": rate})
    assert run.hours_at([0, 50, 100, 200, 250, 300]) * 3600 == pytest.approx([0, 5, 10, 10, 20, 30])
    run.args["frame_skip"] = 4
    assert run.hours_at([100]) * 3600 == pytest.approx([2.5])
    assert np.isnan(make_run({}).hours_at([100])).all()


def test_returns_in_human_units():
    assert len(human.SCORES) == 57 and human.scores_of("Phoenix-v5") == human.scores_of("ALE/Phoenix-v5")
    run = make_run({RETURN: {100: 761.4, 200: 7242.6, 300: 761.4 + 2 * (7242.6 - 761.4)}}, suite="Atari")
    run.env_id = "Phoenix-v5"
    (scaled,), left_out = human.normalise([run])
    assert scaled.get(RETURN).tolist() == pytest.approx([0, 1, 2]) and not left_out
    assert run.get(RETURN).iloc[0] == 761.4  # the run itself is as it was
    run.env_id = "Tetris-v5"
    assert human.normalise([run])[0] == [] and "Tetris-v5" in human.normalise([run])[1][0][1]


def test_human_scores_are_of_games_that_there_are():
    envpool = pytest.importorskip("envpool")
    assert {f"{game}-v5" for game in human.SCORES} <= set(envpool.list_all_envs())
    assert all(low < high for low, high in human.SCORES.values())


def test_improvement_of_any_two_settings():
    runs = [
        make_run(curves_of(seed, collapsed), epochs=epochs, seed=seed, intervention=intervention)
        for epochs, intervention, collapsed in ((10, "none", False), (20, "none", True), (20, "PFO last", False))
        for seed in range(3)
    ]
    table = improvements(runs, 0, 200).set_index(["setting", "other"])
    assert len(table) == 6
    for (one, other), row in table.iterrows():
        assert row["probability"] + table.loc[(other, one), "probability"] == pytest.approx(1)
        assert row["low"] <= row["probability"] <= row["high"]
    low = "Tanh, constant learning rate, 20 epochs, baseline"
    assert table.loc[("Tanh, constant learning rate, 20 epochs, PFO last", low), "probability"] == 1
    assert improvements(runs[:3], 0, 200).empty


def test_arrays_for_rliable():
    """Settings without holes: the lowest seeds where one task has more, and none of a setting that lacks a task."""
    counts = {("none", "Hopper-v4"): 3, ("none", "Walker2d-v4"): 2, ("PFO last", "Hopper-v4"): 2}
    runs = [
        make_run(curves_of(10 * seed + len(env_id)), env_id=env_id, seed=seed, intervention=intervention)
        for (intervention, env_id), count in counts.items()
        for seed in reversed(range(count))
    ]
    points, curves, lines = for_rliable(runs)
    name = "Tanh, constant learning rate, 10 epochs, baseline"
    assert set(points) == {"tasks", name} and set(curves) == {"tasks", "frames", name}
    assert points["tasks"].tolist() == ["Hopper-v4", "Walker2d-v4"] and points[name].shape == (2, 2)
    assert curves[name].shape == (2, 2, 100) and curves["frames"].tolist() == list(STEPS)
    hopper, walker = curves_of(10 + 9)[RETURN], curves_of(10 + 11)[RETURN]  # of seed 1
    np.testing.assert_allclose(curves[name][1], [list(hopper.values()), list(walker.values())])
    assert points[name][1, 0] == pytest.approx(np.mean(list(hopper.values())[-6:]))  # the last 5 %, its start included
    assert [line.partition(":")[0] for line in lines] == ["Tanh, constant learning rate, 10 epochs, PFO last", name]
    assert "without finished runs of Walker2d-v4" in lines[0] and "Hopper-v4 seed 2" in lines[1]


def test_curves_for_rliable_begin_where_all_have_a_return():
    late, short = curves_of(1), curves_of(2)
    late[RETURN] = {step: x for step, x in late[RETURN].items() if step > 450}
    short = {tag: {step: x for step, x in points.items() if step <= 9990} for tag, points in short.items()}
    _, curves, _ = for_rliable([make_run(late), make_run(short, seed=2)])
    assert curves["frames"][0] == 500 and curves["frames"][-1] == 9900
    assert all(np.isfinite(x).all() for name, x in curves.items() if name not in ("tasks", "frames"))


# The command


def program(*flags, code=0, name="statistics"):
    """Run it as a process; its standard output, or its one line of error."""
    done = forked.program(f"benchmark.{name}", *flags, code=code)
    assert done.stderr == "" if not code else done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr if code else done.stdout


def test_the_command_on_the_committed_curves(tmp_path):
    """It makes what lies beside them, and their log-rank tests are those of claims.csv, which is of the whole logs."""
    said = program("--runs", MUJOCO, "--events", MUJOCO / "runs.csv", "--output", tmp_path)
    assert "65 runs used:" in said and "never broke" not in said
    for place in ("ReLU", "Tanh"):
        for kind in ("survival", "aligned"):
            stem = f"{kind}_Hopper-v4_{place}_constant"
            assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
            assert (tmp_path / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
            (committed,) = MUJOCO.glob(f"{stem}.csv*")
            pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"{stem}.csv"), pd.read_csv(committed))
    for name in ("survival.md", "survival.csv", "improvement.md", "improvement.csv"):
        assert (tmp_path / name).read_text() == (MUJOCO / name).read_text()
    assert not list(tmp_path.glob("*.tmp*"))
    claims = pd.read_csv(MUJOCO / "claims.csv")
    times = claims[claims["measure"].str.startswith("restricted mean time to a return")].set_index("comparison")
    found = pd.read_csv(tmp_path / "survival.csv")
    found = found[found["setting"].str.contains("ReLU") & (found["event"] == EVENTS["return_halved"])]
    found = found.set_index(["intervention", "epochs"])
    relu = times[times["activation"] == "ReLU"]["permutation_p"]
    assert relu["PFO last against none, 20 epochs"] == found.loc[("PFO last", 20), "p_intervention"]
    assert relu["no intervention: 20 epochs against 10"] == found.loc[("none", 20), "p_epochs"]
    file = np.load(tmp_path / "rliable_MuJoCo_scores.npz")
    points = {name: file[name] for name in file.files if name != "tasks"}
    assert len(points) == 13 and all(x.shape == (5, 1) for x in points.values())


def test_runs_in_progress_and_healthy_ones(tmp_path):
    """Censored, named, and left out of what is of the end; a second environment has files of its own."""
    for seed in (1, 2):
        write_run(tmp_path / "runs", seed=seed)
    progress = write_run(tmp_path / "runs", curves_of(3, steps=range(100, 5000, 100)), seed=3)
    said, _ = command("statistics", "--runs", tmp_path / "runs", "--output", tmp_path, "--resamples", "100")
    assert f"in progress, censored at their last step, and of no improvement or export: {progress.name}" in said
    assert "aligned_Hopper-v4_Tanh_constant: left out, whose ratios never broke: " in said
    assert "improvement.md: not written, without finished runs of two settings" in said
    curve = pd.read_csv(tmp_path / "survival_Hopper-v4_Tanh_constant.csv")
    assert curve["survival"].eq(1).all() and curve["censored"].sum() == 3 * 3 and 4900 in curve["step"].to_numpy()
    assert "not reached" in (tmp_path / "survival.md").read_text()
    assert not (tmp_path / "aligned_Hopper-v4_Tanh_constant.png").exists()


def test_the_papers_logs_in_human_units(tmp_path):
    logs = paper_logs(tmp_path)
    command("statistics", "--runs", *logs, "--output", tmp_path, "--normalise", "human", "--resamples", "100")
    file = np.load(tmp_path / "rliable_Atari_scores.npz")
    raw = np.mean([100 * (i // 2) for i in range(57, 60, 2)])  # each return counts once
    low, high = human.SCORES["Phoenix"]
    assert file["constant learning rate, 4 epochs, baseline, the paper's logs"] == pytest.approx(
        np.full((2, 1), (raw - low) / (high - low))
    )
    assert (tmp_path / "survival_Phoenix-v5_constant_paper.png").is_file()
    flags = ["--figure", "1", "6", "--runs", *logs, "--output", tmp_path, "--normalise", "human"]
    command("figures", *flags)
    numbers = pd.read_csv(tmp_path / "figure6_human_Phoenix-v5.csv")
    assert numbers["return"].tolist() == pytest.approx([(raw - low) / (high - low)] * 4, rel=1e-5)
    assert (tmp_path / "figure1_human_Phoenix-v5_constant.png").is_file()


def test_figures_over_hours_and_of_interquartile_means(tmp_path):
    """Runs without a rate are left out, in words; of a run of 100 steps a second, 10 000 steps are 100 seconds."""
    for seed in (1, 2, 3):
        curves = curves_of(seed)
        curves["charts/SPS"] = dict.fromkeys(STEPS, 100.0)
        if seed == 3:
            del curves["charts/SPS"]
        write_run(tmp_path / "runs", curves, seed=seed)
    flags = ["--figure", "1", "--runs", tmp_path / "runs", "--output", tmp_path]
    said, _ = command("figures", *flags, "--x", "hours", "--aggregate", "iqm")
    assert "left out, no charts/SPS in its logs, which --x hours needs: 1 run" in said
    numbers = pd.read_csv(tmp_path / "figure1_iqm_hours_Hopper-v4_Tanh_constant.csv")
    assert numbers["hour"].max() == pytest.approx(100 / 3600, rel=1e-4)
    returns = numbers[numbers["tag"] == RETURN]
    assert (returns["low"] <= returns["iqm"]).all() and (returns["iqm"] <= returns["high"]).all()
    assert (returns["seeds"] == 2).all()


@pytest.mark.parametrize(
    "flags, code, said",
    [
        (["--runs", "nowhere*"], 2, "--runs nowhere*"),
        (["--runs", "{folder}/runs", "--resamples", "1"], 2, "--resamples 1"),
        (["--runs", "{folder}/runs", "--seed", "-1"], 2, "--seed -1"),
        (["--runs", "{folder}/runs", "--output", "{folder}/notes.csv"], 2, "--output"),
        (["--runs", "{folder}/runs", "--normalise", "human"], 2, "--normalise human"),
        (["--runs", "{folder}/runs", "--normalise", "robot"], 2, "robot"),
        (["--runs", "{folder}/runs", "--events", "{folder}/nowhere.csv"], 2, "nowhere.csv: can't be read"),
        (["--runs", "{folder}/runs", "--events", "{folder}/notes.csv"], 2, "it has no column run"),
        (["--runs", "{folder}/runs", "--events", "{folder}/words.csv"], 2, "must have steps"),
        (["--runs", "{folder}/runs", "--events", "{folder}/others.csv"], 2, "must have a row for each run"),
        (["--runs", "{folder}/silent"], 1, "with an episode that ended"),
    ],
)
def test_what_is_wrong_costs_one_line(tmp_path, flags, code, said):
    write_run(tmp_path / "runs", seed=1)
    write_run(tmp_path / "silent", {DIAGNOSED: dict.fromkeys(STEPS, 3.0)})
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    head = f"run,last_step,{','.join(EVENTS)}\n"
    (tmp_path / "words.csv").write_text(f"{head}x,100,soon,,\n")
    (tmp_path / "others.csv").write_text(f"{head}x,100,50,,\n")
    flags = [flag.format(folder=tmp_path) for flag in flags]
    output = [] if "--output" in flags else ["--output", tmp_path / "out"]
    _, errors = command("statistics", *flags, *output, code=code)
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors, errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--figure", "1", "4", "--x", "hours"], "--x hours: must go with --figure 1 and 2 alone, not 4"),
        (["--figure", "6", "--aggregate", "iqm"], "--aggregate iqm: must go with --figure 1 and 2 alone, not 6"),
        (["--figure", "3", "--normalise", "human"], "--normalise human: must go with --figure 1 and 6 alone, not 3"),
    ],
)
def test_options_of_figures_that_they_have_no_effect_on(tmp_path, flags, said):
    _, errors = command("figures", *flags, "--runs", tmp_path, "--output", tmp_path / "out", code=2)
    assert errors == f"error: {said}\n" and not (tmp_path / "out").exists()


def test_times_are_read_from_a_table_of_runs(tmp_path):
    """As benchmark.table writes it: of the same logs, the same times."""
    for seed in (1, 2):
        write_run(tmp_path / "runs", curves_of(seed, collapsed=seed == 2), seed=seed)
    command("table", "--runs", tmp_path / "runs", "--output", tmp_path, "--resamples", "100")
    runs, _, _ = read_runs([str(tmp_path / "runs")])
    assert read_times(tmp_path / "runs.csv", runs) == {run.name: times_of(run) for run in runs}
