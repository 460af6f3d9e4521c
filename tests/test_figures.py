"""Logs, figures and statistics: known numbers in, known numbers out. All runs are synthetic but the last test's."""

import io
import itertools
import json
import math
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from benchmark import measures, table
from benchmark.logs import (
    DIAGNOSED,
    PAPER_KEYS,
    PAPER_PLASTICITY_KEYS,
    PAPER_SETTINGS,
    PLASTICITY,
    RANKS,
    RETURN,
    TAGS,
    Run,
    _put_on_grid,
    poolable,
    read_events,
    read_paper_runs,
    read_run,
    read_runs,
    read_thinned,
    write_thinned,
)

ROOT = Path(__file__).resolve().parent.parent
ABOVE, BELOW = "trust_region/ratio_above_mean", "trust_region/ratio_below_mean"
ARGS = {
    "script": "ppo_mujoco.py",
    "exp_name": "ppo_mujoco",
    "env_id": "Hopper-v4",
    "seed": 1,
    "update_epochs": 10,
    "anneal_lr": False,
    "activation": "Tanh",
    "hidden_sizes": (64, 64),
    "wandb_entity": None,
    "learning_rate": 3e-4,
    "pfo_coef": 0.0,
    "pfo_layers": "last",
    "pfo_on": "preactivations",
    "pfo_distance": "l2",
    "pfo_mode": "regularize",
    "reset_optimizer": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "share_features": False,
    "batch_size": 100,
    "num_iterations": 100,
}
STEPS = range(100, 10_001, 100)


def curves_of(seed=0, collapsed=False, steps=STEPS):
    """Every tag of a run that learns, or that collapses at half of its steps: {tag: {step: value}}."""
    rng = np.random.default_rng(seed)
    curves = {tag: {} for tag in TAGS}
    for i, step in enumerate(steps):
        low = collapsed and i >= len(STEPS) // 2
        for tag in curves:
            curves[tag][step] = rng.uniform(1, 2) * (2 if low else 40) + i / 100
        curves[RETURN][step] = (10 if low else 1000) + rng.uniform(0, 5)
        curves[BELOW][step], curves[ABOVE][step] = rng.uniform(0.5, 0.8), rng.uniform(1.2, 1.5)
    for tag in PLASTICITY.values():
        curves[tag] = {step: rng.uniform(0.01, 0.02) for step in (0, *itertools.islice(steps, 9, None, 10))}
    return curves


def write_events(folder, curves=None, args=None):
    """An event file as the scripts write it."""
    writer = SummaryWriter(str(folder))
    if args:
        rows = "\n".join(f"|{key}|{value}|" for key, value in args.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    for tag, points in (curves or {}).items():
        for step, value in points.items():
            writer.add_scalar(tag, value, step)
    writer.close()
    return folder


def write_run(folder, curves=None, **changed):
    """A synthetic run's folder; plasticity lies in a folder of its own in it."""
    args = ARGS | changed
    name = f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{len(list(folder.glob('*')))}"
    curves = curves_of(args["seed"]) if curves is None else curves
    plasticity = {tag: points for tag, points in curves.items() if tag.startswith("plasticity/")}
    write_events(folder / name, {tag: points for tag, points in curves.items() if tag not in plasticity}, args)
    if plasticity:
        write_events(folder / name / "plasticity", plasticity)
    return folder / name


def make_run(scalars, total_steps=10_000, suite="MuJoCo", **changed):
    """A Run of {tag: {step: value}}, without files."""
    scalars = {tag: pd.Series(points, dtype=float) for tag, points in scalars.items()}
    scalars.setdefault(DIAGNOSED, pd.Series(1.0, index=STEPS))
    head = {"name": "synthetic", "source": "runs", "suite": suite, "env_id": "Hopper-v4", "activation": "Tanh"}
    head |= {"schedule": "constant", "epochs": 10, "intervention": "none", "seed": 1, "total_steps": total_steps}
    return Run(**(head | changed), scalars=scalars)


# Reading event files


def test_event_files_are_read_whole(tmp_path):
    rng = np.random.default_rng(0)
    curves = {tag: dict(enumerate(rng.normal(size=12_000))) for tag in (RETURN, DIAGNOSED, "losses/value_loss")}
    curves[RETURN] |= {7: math.inf, 8: math.nan}
    write_events(tmp_path, curves, ARGS)
    scalars, parameters, problems = read_events(tmp_path, [RETURN, DIAGNOSED])
    theirs = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert set(scalars) == {RETURN, DIAGNOSED} and not problems
    for tag, series in scalars.items():
        expected = [(event.step, event.value) for event in theirs.Scalars(tag)]
        assert series.index.tolist() == [step for step, _ in expected]
        np.testing.assert_array_equal(series, [value for _, value in expected])
    assert parameters == ARGS


@pytest.mark.parametrize("cut", [1, 4, 5, 20, 40])
def test_a_file_that_is_being_written_gives_what_is_whole(tmp_path, cut):
    (path,) = write_events(tmp_path, {RETURN: {1: 1.0, 2: 2.0, 3: 3.0}}).glob("events*")
    path.write_bytes(path.read_bytes()[:-cut])
    scalars, _, problems = read_events(tmp_path, [RETURN])
    assert scalars[RETURN].to_dict() == {1: 1.0, 2: 2.0} | ({3: 3.0} if cut <= 4 else {}) and not problems


@pytest.mark.parametrize("damage", [b"\0" * 40, b"\xff" * 40])
def test_a_damaged_file_is_read_up_to_the_damage_and_said(tmp_path, damage):
    (path,) = write_events(tmp_path, {RETURN: {1: 1.0, 2: 2.0}}).glob("events*")
    path.write_bytes(path.read_bytes() + damage)
    scalars, _, problems = read_events(tmp_path, [RETURN])
    assert scalars[RETURN].to_dict() == {1: 1.0, 2: 2.0}
    assert len(problems) == 1 and path.name in problems[0] and "damaged" in problems[0]


def test_a_resumed_run_counts_from_where_it_resumed(tmp_path):
    first = {RETURN: {1: 1.0, 2: 2.0, 3: 3.0}, DIAGNOSED: {1: 9.0, 3: 8.0}}
    (path,) = write_events(tmp_path, first, ARGS).glob("events*")
    path.rename(tmp_path / "events.out.tfevents.1000000000.host.1.0")
    write_events(tmp_path, {RETURN: {4: 4.5}, "losses/value_loss": {3: 0.0}}, ARGS | {"seed": 2})
    scalars, parameters, _ = read_events(tmp_path, TAGS)
    assert scalars[RETURN].to_dict() == {1: 1.0, 2: 2.0, 4: 4.5} and scalars[DIAGNOSED].to_dict() == {1: 9.0}
    assert parameters["seed"] == 2


def test_a_file_for_each_checkpoint_is_read_in_order(tmp_path):
    """As plasticity_probe.py writes them: each file has one step of one network."""
    for step, (network, tag) in itertools.product((500, 0, 250), PLASTICITY.items()):
        (path,) = write_events(tmp_path / f"{step}{network}", {tag: {step: step / 100}}).glob("events*")
        path.rename(tmp_path / f"events.out.tfevents.{step:012d}.{network}")
    scalars, _, problems = read_events(tmp_path, TAGS)
    for tag in PLASTICITY.values():
        assert scalars[tag].to_dict() == {0: 0.0, 250: 2.5, 500: 5.0} and not problems


def test_a_run_has_its_setting_and_lies_on_the_grid_of_its_diagnostics(tmp_path):
    # Three iterations to a diagnosis; an episode ended in the iterations 1, 2, 4 and 9.
    curves = {
        DIAGNOSED: {100: 5, 400: 6, 700: 7, 1000: 8},
        RETURN: {100: 1.0, 200: 2.0, 400: 4.0, 900: 9.0},
        "losses/first_minibatch/entropy": {step: step for step in range(100, 1001, 100)},
        BELOW: {400: 0.5},
        PLASTICITY["actor"]: {0: 0.1, 250: 0.2},
    }
    run, problems = read_run(write_run(tmp_path, curves, num_iterations=20))
    assert not problems
    assert run.setting == ("runs", "MuJoCo", "Hopper-v4", "Tanh", "constant", 10, "none") and run.seed == 1
    assert run.total_steps == 2000 and run.last_step == 1000 and not run.finished
    assert run.get(RETURN).to_dict() == {100: 1.0, 400: 4.0, 1000: 9.0}
    assert run.carried_return().to_dict() == {100: 1.0, 400: 4.0, 700: 4.0, 1000: 9.0}
    assert run.get("losses/first_minibatch/entropy").to_dict() == {100: 100, 400: 400, 700: 700, 1000: 1000}
    assert run.get(BELOW).to_dict() == {400: 0.5} and run.get(ABOVE).empty
    assert run.get(PLASTICITY["actor"]).index.tolist() == [0, 250]


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, "none"),
        ({"pfo_coef": 1.0}, "PFO last"),
        ({"pfo_coef": 1.0, "pfo_layers": "all"}, "PFO all"),
        ({"pfo_coef": 10.0, "pfo_layers": "all", "activation": "ReLU"}, "PFO all"),
        ({"pfo_coef": 1.0, "activation": "ReLU"}, "PFO last (coefficient 1)"),
        ({"pfo_coef": 10.0, "pfo_layers": "all", "frame_skip": 3, "activation": "ReLU"}, "PFO all"),
        ({"pfo_coef": 1.0, "pfo_layers": "all", "frame_skip": 3, "activation": "ReLU"}, "PFO all (coefficient 1)"),
        ({"pfo_coef": 1.0, "pfo_distance": "cosine", "pfo_mode": "clip"}, "PFO last cosine clip"),
        ({"reset_optimizer": True}, "reset Adam"),
        ({"adam_beta2": 0.9}, "Adam betas"),
        ({"adam_beta1": 0.5}, "Adam betas 0.5, 0.999"),
        ({"share_features": True}, "shared trunk"),
        ({"script": "ppo_atari.py", "exp_name": "mine"}, "shared trunk"),
        ({"share_features": True, "reset_optimizer": True}, "reset Adam + shared trunk"),
        ({"kl_coef": 1.0}, "KL penalty"),
        ({"target_kl": 0.01}, "early stopping"),
        ({"script": "my_ablation.py"}, "my_ablation"),
    ],
)
def test_interventions_are_told_from_the_arguments(tmp_path, changed, expected):
    run, _ = read_run(write_run(tmp_path, {DIAGNOSED: {100: 1}}, **changed))
    assert run.intervention == expected


def test_schedules_are_told_from_the_arguments(tmp_path):
    for flags, expected in (({"anneal_lr": True}, "linear"), ({"cosine_lr": True}, "cosine"), ({}, "constant")):
        assert read_run(write_run(tmp_path, {DIAGNOSED: {100: 1}}, **flags))[0].schedule == expected


@pytest.mark.parametrize("spoil", ["no table", "no diagnostics", "another program"])
def test_what_is_no_run_is_left_out_with_its_reason(tmp_path, spoil):
    if spoil == "no table":
        write_events(tmp_path / "run", {DIAGNOSED: {1: 1.0}})
    elif spoil == "no diagnostics":
        write_events(tmp_path / "run", {RETURN: {1: 1.0}}, ARGS)
    else:
        write_events(tmp_path / "run", {DIAGNOSED: {1: 1.0}}, {"env_id": "x", "seed": 1})
    runs, left_out, _ = read_runs([str(tmp_path)])
    assert runs == [] and len(left_out) == 1
    reason = {"no table": "no table", "no diagnostics": DIAGNOSED, "another program": "not a run of these scripts"}
    assert reason[spoil] in left_out[0][1]


# Which runs are pooled


def test_runs_that_differ_in_more_than_the_seed_are_not_pooled(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, seed=seed, device="cpu" if seed == 1 else "cuda", exp_name=f"name{seed}")
    odd = write_run(tmp_path, seed=3, learning_rate=0.001)
    again = write_run(tmp_path, curves_of(steps=range(100, 501, 100)), seed=2)
    write_run(tmp_path, seed=3, learning_rate=0.001, pfo_coef=1.0)  # the only one of its setting
    runs, left_out, _ = read_runs([str(tmp_path / "*")])
    assert sorted((run.seed, run.intervention) for run in runs) == [(1, "none"), (2, "none"), (3, "PFO last")]
    reasons = dict(left_out)
    assert reasons.pop(odd.name) == "differs from most of its setting in learning_rate 0.001, not 0.0003"
    assert "same setting and seed" in reasons.pop(again.name) and not reasons


def test_thinned_runs_are_compared_as_others_are(tmp_path):
    """What their arguments were is in the file."""
    for seed, rate in ((1, 3e-4), (2, 3e-4), (3, 0.001)):
        write_run(tmp_path / "runs", seed=seed, learning_rate=rate, device=f"cuda:{seed}")
    (odd,) = (tmp_path / "runs").glob("*__3__*")
    thinned = write_thinned([read_run(odd)[0], read_run(next((tmp_path / "runs").glob("*__2__*")))[0]], tmp_path, 50)
    runs, left_out, _ = read_runs([str(tmp_path / "runs" / "*__1__*"), *map(str, thinned)])
    assert sorted(run.seed for run in runs) == [1, 2]
    assert left_out == [(odd.name, "differs from most of its setting in learning_rate 0.001, not 0.0003")]


def test_plasticity_of_another_probe_is_not_pooled(tmp_path):
    """The run stays, its plasticity goes; thinned files say how it was probed."""
    probe = {"targets": "random", "data": "first", "epochs": 4, "device": "cpu"}
    for seed in (1, 2, 3, 4):
        run = write_run(tmp_path / "runs", seed=seed)
        settings = probe | ({"epochs": 1, "targets": "initial"} if seed == 2 else {"device": f"cuda:{seed}"})
        text = json.dumps({"settings": settings}) if seed < 4 else "no JSON"
        (run / "plasticity" / "settings.json").write_text(text)
    every = [read_run(path)[0] for path in sorted((tmp_path / "runs").iterdir())]
    (thinned,) = write_thinned(every, tmp_path, 50)
    for source in (tmp_path / "runs", thinned):
        runs, left_out, notes = read_runs([str(source)])
        assert len(runs) == 4 and not left_out
        assert [run.seed for run in runs if len(run.get(PLASTICITY["actor"]))] == [1, 3]
        assert any(
            "its plasticity is left out" in x and "targets initial, not random; epochs 1, not 4" in x for x in notes
        )
    assert any("settings.json can't be read" in x for x in read_runs([str(tmp_path / "runs")])[2])


def test_pfo_without_a_coefficient_is_the_script_without_pfo():
    plain = {key: value for key, value in ARGS.items() if not key.startswith("pfo_")}
    runs = [make_run({}, args=plain, seed=1), make_run({}, args=ARGS | {"pfo_layers": "all"}, seed=2)]
    assert poolable(runs) == (runs, [])


# Measures


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.sampled_from([1.0, 2.5]))
def test_smoothing_is_the_moving_average_of_the_figures(values, every):
    alpha = 1 - 0.95**every
    expected = [values[0]]
    for value in values[1:]:
        expected.append((1 - alpha) * expected[-1] + alpha * value)
    np.testing.assert_allclose(measures.smooth(pd.Series(values), every), expected, rtol=1e-9, atol=1e-6)


def test_bands_are_over_the_seeds_that_have_the_step():
    seeds = [pd.Series({0: 1.0, 1: 2.0, 2: 3.0}), pd.Series({0: 3.0, 1: 6.0})]
    found = measures.over_seeds(seeds, smoothed=False)
    assert found.to_dict("list") == {"mean": [2, 4, 3], "min": [1, 2, 3], "max": [3, 6, 3], "seeds": [2, 2, 1]}
    smoothed = measures.over_seeds(seeds, smoothed=True)
    assert smoothed["mean"].tolist() == pytest.approx([2, 2.1, 2.145])
    assert smoothed["max"].tolist() == pytest.approx([3, 3.15, 3.1425])


def constant(value, steps):
    return pd.Series(float(value), index=steps)


@pytest.mark.parametrize(
    "ten, fifty",
    [
        (range(100, 6001, 100), range(100, 6001, 300)),  # another --diagnostics-interval
        (range(100, 10_001, 500), range(100, 4001, 200)),  # thinned files of finished and unfinished runs
        (range(100, 4001, 300), range(200, 10_001, 200)),  # the coarsest in progress
    ],
)
def test_seeds_of_different_grids_are_averaged_where_both_are(ten, fifty):
    found = measures.over_seeds([constant(10, ten), constant(50, fifty)], smoothed=False)
    assert found["seeds"].tolist() == [sum(x[0] <= step <= x[-1] for x in (ten, fifty)) for step in found.index]
    both, coarsest = found[found["seeds"] == 2], max(ten.step, fifty.step)
    assert (both["mean"] == 30).all() and (both["min"] == 10).all() and (both["max"] == 50).all()
    assert set(np.diff(found.index)) == {coarsest} and len(both) > 5
    assert found.index[-1] > max(ten[-1], fifty[-1]) - coarsest


def test_smoothing_is_of_the_grid_on_which_seeds_are_averaged():
    """The coarsest of a thinned file, where a point stands for three iterations, whatever comes first."""
    fine, coarse = constant(0, range(100, 3001, 100)), constant(0, range(100, 3001, 300))
    coarse.iloc[5:] = fine.iloc[15:] = 1.0
    for series, every in (([fine, coarse], [1.0, 3.0]), ([coarse, fine], [3.0, 1.0])):
        found = measures.over_seeds(series, smoothed=True, every=every)["mean"]
        np.testing.assert_allclose(found, measures.smooth(coarse, 3.0))


def test_a_return_that_stands_repeatedly_counts_once():
    # The window of the last 5 %: steps 9500 to 10000. Its first value was carried into it.
    run = make_run({RETURN: {100: 0.0, 9000: 7.0, 9700: 1.0, 9800: 1.0, 10_000: 4.0}})
    assert run.carried_return()[[9500, 9900]].tolist() == [7.0, 1.0]
    assert measures.final_return(run) == pytest.approx((7 + 1 + 1 + 4) / 4)


def test_final_values_are_means_over_the_last_twentieth():
    steps = np.array(STEPS)
    plasticity = {step: step / 1000 for step in range(0, 10_001, 250)}
    run = make_run({DIAGNOSED: dict(zip(steps, steps, strict=True)), PLASTICITY["actor"]: plasticity})
    found = measures.final_values(run)
    assert found["pca_rank"] == pytest.approx(np.mean([9500, 9600, 9700, 9800, 9900, 10_000]))
    assert found["plasticity_loss"] == pytest.approx(9.75)
    assert math.isnan(found["return"]) and math.isnan(found["dead_units"]) and math.isnan(found["excess_ratio"])


@pytest.mark.parametrize("total, batch", [(2441, 2048), (32_552, 3072)])
def test_plasticity_at_the_end_is_of_the_last_checkpoints(total, batch):
    """The last three of a full run, wherever rounding put them; nothing where only the first ones were probed."""
    steps = [round(k * total * 0.025) * batch for k in range(41)]
    grid = {DIAGNOSED: dict.fromkeys(range(batch, total * batch + 1, batch), 1.0)}

    def final(probed):
        losses = {PLASTICITY["actor"]: {steps[k]: k for k in probed}}
        return measures.final_values(make_run(grid | losses, total * batch))["plasticity_loss"]

    assert final(range(41)) == 39 and final([0, 40]) == 40
    assert math.isnan(final([0, 1, 2])) and math.isnan(final([]))


def test_excess_ratio():
    both = {step: 2.0 for step in STEPS}
    # More than 10 iterations in the window of 5 %, 1000 of 20 000 steps: those after step 9000.
    above = both | {step: 4.0 for step in STEPS if step > 9000}
    run = make_run({ABOVE: above, BELOW: {step: 0.5 for step in STEPS}}, total_steps=20_000)
    assert measures.final_excess_ratio(run) == pytest.approx(8)
    # Only 5 in the window, so it grows backwards to 10: those after 9000, of which 5 have a ratio of 8 and 5 of 4.
    above = both | {step: 4.0 for step in STEPS if step > 9500}
    run = make_run({ABOVE: above, BELOW: {step: 0.5 for step in STEPS}})
    assert measures.final_excess_ratio(run) == pytest.approx(6)
    # It ends at the last iteration with both.
    run = make_run({ABOVE: {100: 2.0, 200: 3.0, 300: 4.0}, BELOW: {200: 0.5, 300: 0.5, 400: 0.5}})
    assert measures.final_excess_ratio(run) == pytest.approx(7)
    assert math.isnan(measures.final_excess_ratio(make_run({ABOVE: {100: 2.0}, BELOW: {200: 0.5}})))


def test_excess_ratio_is_bounded_on_mujoco_alone():
    ratios = {ABOVE: {100: math.inf}, BELOW: {100: 0.0}}
    assert measures.final_excess_ratio(make_run(ratios)) == pytest.approx(1e24)
    assert measures.final_excess_ratio(make_run(ratios, suite="Atari")) == math.inf


def test_windows_with_the_lowest_ratios():
    rng = np.random.default_rng(0)
    below = {step: rng.uniform(0.1, 0.8) for step in STEPS if step % 300}
    rank = {step: rng.uniform(1, 60) for step in STEPS}
    run = make_run({BELOW: below, "representation/before/actor/pca_rank": rank})
    found = measures.lowest_windows(run, 1000, count=4)
    means = {}
    for start in range(0, 10_001, 1000):
        inside = [step for step in below if start <= step < start + 1000]
        if inside:
            means[start] = np.mean([below[step] for step in inside]), np.mean([rank[step] for step in inside])
    expected = sorted((ratio, start, rank) for start, (ratio, rank) in means.items())[:4]
    assert found.index.tolist() == [start for _, start, _ in expected]
    assert found["ratio_below"].tolist() == pytest.approx([ratio for ratio, _, _ in expected])
    assert found["pca_rank"].tolist() == pytest.approx([rank for _, _, rank in expected])


def test_rank_agreement_is_scipys():
    rng = np.random.default_rng(1)
    ranks = {rank: rng.integers(1, 60, len(STEPS)).astype(float) for rank in RANKS}
    ranks["srank"][3] = math.nan
    scalars = {f"representation/after/actor/{rank}": dict(zip(STEPS, x, strict=True)) for rank, x in ranks.items()}
    found = measures.rank_agreement(measures.ranks_of(make_run(scalars)))
    kept = np.arange(len(STEPS)) != 3
    for i, j in itertools.product(range(5), repeat=2):
        a, b = ranks[RANKS[i]][kept], ranks[RANKS[j]][kept]
        expected = [stats.kendalltau(a, b)[0], stats.spearmanr(a, b)[0], stats.pearsonr(a, b)[0]]
        expected.append(1 - np.linalg.norm(a - b) / (math.sqrt(len(a)) * 512))
        assert found[:, i, j].tolist() == pytest.approx(expected, abs=1e-12)
    scalars["representation/after/actor/srank"] = dict.fromkeys(STEPS, 3.0)
    found = measures.rank_agreement(measures.ranks_of(make_run(scalars)))
    assert np.isnan(found[:3, 2]).all() and np.isfinite(found[3]).all() and np.isfinite(found[:, 0, 1]).all()


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=12))
def test_for_good(flags):
    found = measures.for_good(pd.Series(flags, index=range(10, 10 + len(flags)), dtype=bool))
    expected = [10 + i for i in range(len(flags)) if all(flags[i:])]
    assert found == (expected[0] if expected else None)


def falls(rank_at, return_at, high_return=1000.0, low_return=10.0, back_at=None):
    """A run whose rank and return fall at these steps, and rise again."""
    back_at = back_at or math.inf
    scalars = {
        DIAGNOSED: {step: 2.0 if rank_at <= step < back_at else 40.0 for step in STEPS},
        RETURN: {step: low_return if return_at <= step < back_at else high_return for step in STEPS},
    }
    return make_run(scalars)


def test_collapse_is_where_both_fell_for_good():
    found = measures.collapse(falls(3000, 5000))
    assert found == {"collapsed": 5000, "return_halved": 5000, "rank_tenth": 3000, "rank_halved": 3000}
    assert measures.collapse(falls(6000, 5000))["collapsed"] == 6000
    for run in (falls(3000, 5000, back_at=8000), falls(3000, math.inf), falls(math.inf, 5000)):
        assert measures.collapse(run)["collapsed"] is None


def test_where_the_ratios_leave_their_bounds():
    above = {step: 1e20 if step >= 6000 or step == 3000 else 1.3 for step in STEPS}  # a single time is none
    rank = {step: 40.0 if step <= 4000 else 20.0 if step <= 8000 else 1.0 for step in STEPS}
    run = make_run({ABOVE: above, BELOW: dict.fromkeys(STEPS, 0.7), DIAGNOSED: rank}, total_steps=20_000)
    assert measures.ratio_broken(run) == 6000 and measures.rank_when_broken(run) == 0.5
    assert measures.excess_ratio(run).max() == pytest.approx(1e13 / 0.7)
    held = make_run({ABOVE: {100: 1.3}, BELOW: {100: 0.7}})
    assert measures.ratio_broken(held) is None and measures.rank_when_broken(held) is None


def test_collapse_of_negative_returns():
    """Twice as bad is low, half as bad is not."""
    assert measures.collapse(falls(3000, 5000, high_return=-10.0, low_return=-20.0))["collapsed"] == 5000
    assert measures.collapse(falls(3000, 5000, high_return=-10.0, low_return=-14.0))["collapsed"] is None
    assert measures.collapse(falls(3000, 5000, high_return=-10.0, low_return=-5.0))["collapsed"] is None


def test_a_dip_at_the_end_is_no_collapse():
    """A running median sees half as much there: it has to last for 2 % of the run."""
    for fell, collapsed in ((0.994, None), (0.975, 97_500)):
        steps = range(100, 100_001, 100)
        low = {step: step >= fell * 100_000 for step in steps}
        scalars = {DIAGNOSED: {step: 2.0 if low[step] else 40.0 for step in steps}}
        scalars[RETURN] = {step: 10.0 if low[step] else 1000.0 for step in steps}
        found = measures.collapse(make_run(scalars, total_steps=100_000))
        assert {*found.values()} == {collapsed}


def test_a_single_good_game_does_not_end_a_collapse():
    steps = range(100, 100_001, 100)  # a thousand logged iterations, of which the median takes 21
    scalars = {
        DIAGNOSED: {step: 2.0 if step >= 30_000 else 40.0 for step in steps},
        RETURN: {step: 10.0 if step >= 50_000 and step != 80_000 else 1000.0 for step in steps},
    }
    assert measures.collapse(make_run(scalars, total_steps=100_000))["collapsed"] == 50_000


def games(level, rng, total_steps=4_000_000):
    """The returns of a Phoenix run of 8 environments, a mean for each 4 rollouts in which a game ended.

    Games take about 1 800 agent steps, and return 900 on average, with a deviation of 740, times ``level(share done)``.
    """
    steps = np.arange(12_288, total_steps, 12_288)
    ends = np.cumsum(rng.normal(1800, 600, (8, 1000)).clip(300), axis=1) * 8 * 3 - rng.uniform(0, 40_000, (8, 1))
    ends = ends[(ends > 0) & (ends < steps[-1])]
    returns = rng.gamma(1.48, 608, ends.size) * [level(x) for x in ends / total_steps]
    return pd.Series(returns).groupby(steps[np.searchsorted(steps, ends)]).mean()


@pytest.mark.parametrize(
    ("level", "least", "most"),
    [
        (lambda share: 1, 0, 10),
        (lambda share: min(1 + 2 * share, 2), 0, 1),
        (lambda share: 1.5 if share < 0.5 else 1, 75, 100),
        (lambda share: 2 if share < 0.5 else 1, 97, 100),
    ],
    ids=["never learns", "doubles and keeps it", "half more and loses it", "doubles and loses it"],
)
def test_whether_a_return_fell_on_atari(level, least, most):
    """Of 100 runs as long as a workstation takes in a night, with so few games that 2 % of one say nothing."""
    rng, fell = np.random.default_rng(0), []
    for _ in range(100):
        returns = games(level, rng)
        rank = dict.fromkeys(returns.index, 100.0)
        run = make_run({RETURN: returns, DIAGNOSED: rank}, 4_000_000, "Atari", env_id="Phoenix-v5")
        fell.append(measures.collapse(run)["return_halved"])
    fell = [step for step in fell if step is not None]
    print(len(fell))
    assert least <= len(fell) <= most
    if least:
        assert abs(np.median(fell) - 2_000_000) < 100_000


def test_atari_returns_are_of_all_rollouts_since_the_last_point(tmp_path):
    curves = {DIAGNOSED: {30: 1.0, 60: 2.0}, RETURN: {10: 1.0, 20: 3.0, 30: 5.0, 40: 7.0, 70: 9.0}}
    atari, mujoco = (make_run(curves, 70, suite) for suite in ("Atari", "MuJoCo"))
    for run in (atari, mujoco):
        _put_on_grid(run, lambda carried, steps: steps != steps.shift())
    assert atari.get(RETURN).to_dict() == {30: 3.0, 60: 7.0}
    assert mujoco.get(RETURN).to_dict() == {30: 5.0, 60: 7.0}


# Statistics


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_probability_of_improvement_counts_pairs(x, y):
    wins = sum((a > b) + 0.5 * (a == b) for a in x for b in y)
    assert table.probability_of_improvement(x, y) == pytest.approx(wins / (len(x) * len(y)))


def test_interquartile_mean_cuts_a_quarter_at_either_end():
    assert table.interquartile_mean(np.array([100.0, 1, 2, 3, -50])) == 2
    assert table.interquartile_mean(np.arange(15.0)) == 7  # rounded down: 3 of 15 at either end


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_the_bootstrap_resamples_each_stratum_within_itself(sizes):
    strata = [10 * i + np.arange(size) for i, size in enumerate(sizes)]
    samples = table.resampled(strata, np.random.default_rng(0), 50)
    assert samples.shape == (50, sum(sizes))
    assert (samples // 10 == np.repeat(range(len(sizes)), sizes)).all()


def test_intervals_agree_with_scipys_bootstrap():
    scores = np.random.default_rng(3).normal(10, 2, 12)
    rng = np.random.default_rng(0)
    ours = table.interval(table.interquartile_mean(table.resampled([scores], rng, 20_000), axis=1))
    theirs = stats.bootstrap(
        [scores], table.interquartile_mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose(ours, (theirs.low, theirs.high), atol=0.05)


def test_improvement_interval_holds_what_is_certain():
    rng = np.random.default_rng(0)
    strata = [(np.array([5.0, 6]), np.array([1.0, 2])), (np.array([7.0, 8, 9]), np.array([3.0, 4]))]
    assert table.improvement_interval(strata, rng, 200) == (1, 1)
    equal = [(np.array([1.0, 1]), np.array([1.0, 1, 1]))]
    assert table.improvement_interval(equal, rng, 200) == (0.5, 0.5)


def test_a_row_for_each_setting_and_for_all_epochs():
    def row(epochs, seed, intervention, score, collapsed=None, first=None):
        head = {"source": "runs", "env_id": "E", "activation": "Tanh", "schedule": "constant", "epochs": epochs}
        final = dict.fromkeys(measures.FINAL_MEASURES, 0.0) | {"return": float(score)}
        steps = {"collapsed": collapsed, "return_halved": collapsed, "rank_tenth": None, "rank_halved": None}
        return {**head, "seed": seed, "intervention": intervention, **final, **steps, "first": first}

    runs = pd.DataFrame(
        [row(10, seed, "none", score) for seed, score in enumerate((1, 2, 3))]
        + [row(20, 0, "none", 10, 100, "rank"), row(20, 1, "none", 20, 300, "return")]
        + [row(epochs, seed, "PFO last", 15) for epochs in (10, 20) for seed in (0, 1)]
    )
    found, without = (table.table_of_settings(some, 0, 200) for some in (runs, runs[runs["intervention"] == "none"]))
    pd.testing.assert_frame_equal(found.iloc[: len(without)][without.columns], without)  # intervals stay as they are
    found = {(row["intervention"], row["epochs"]): row for row in found.to_dict("records")}
    assert list(found) == [(name, epochs) for name in ("none", "PFO last") for epochs in ("10", "20", "10+20")]
    both = found["none", "10+20"]
    assert both["runs"] == 5 and both["median"] == 3 and both["iqm"] == pytest.approx((2 + 3 + 10) / 3)
    assert both["collapsed"] == 2 and both["median_collapse_step"] == 200 and both["rank_first"] == 1
    assert 2 <= both["median_low"] <= both["median"] <= both["median_high"] <= 10
    assert found["PFO last", "10"]["improvement"] == 1 and found["PFO last", "20"]["improvement"] == 0.5
    assert found["PFO last", "10+20"]["improvement"] == 0.75 and math.isnan(both["improvement"])
    assert found["PFO last", "20"]["iqm_low"] == found["PFO last", "20"]["iqm_high"] == 15


def test_one_seed_has_no_interval():
    found = table.summary_of([np.array([3.0])], np.random.default_rng(0), 100)
    assert found["median"] == found["iqm"] == 3 and math.isnan(found["median_low"]) and math.isnan(found["iqm_high"])


# The logs of the paper's authors; these are synthetic, with their columns


def paper_logs(folder, epochs=(4, 6), seeds=(7, 25)):
    """Synthetic CSV files with the exact columns of the published combined logs; returns their paths."""
    training, plasticity = [], []
    for number, (count, seed) in enumerate(itertools.product(epochs, seeds)):
        config = {
            "config/working_dir": f"/logs/atari-ppo/baselines/{number}",
            "config/env/name": "ALE/Phoenix-v5",
            "config/seed": seed,
            "config/optim/num_epochs": count,
            "config/optim/anneal_linearly": False,
            "config/optim/reset_state": False,
            "config/models/activation": "ReLU",
            "config/models/share_features": False,
            "config/loss/policy/kwargs/feature_trust_region_coef": 0.0,
            "config/loss/policy/kwargs/feature_trust_all_layers": False,
        }
        for i, step in enumerate(np.linspace(3072, 99_999_744, 60).astype(int)):
            values = {key: 1 + i + number for key in PAPER_KEYS.values()}
            values[PAPER_KEYS[RETURN]] = math.nan if i == 0 else 100 * (i // 2)  # each return stands twice
            values[PAPER_KEYS[BELOW]] = math.nan if i % 2 else 0.5
            training.append({**config, "global_step": step, "batch/unused": 1, **values})
        solved = {"config/solve_dir": config.pop("config/working_dir"), **config}
        for step in (0, 50_000_000, 99_999_744):
            losses = {key: step / 1e9 for key in PAPER_PLASTICITY_KEYS.values()}
            plasticity.append({**solved, "capacity-counters/env_steps": step, **losses})
    paths = folder / "atari.csv", folder / "atari-capacity.csv"
    for path, rows in zip(paths, (training, plasticity), strict=True):
        pd.DataFrame(rows).sample(frac=1, random_state=0).to_csv(path)  # theirs are not in order either
    return paths


def test_the_papers_logs(tmp_path):
    runs, left_out = read_paper_runs(paper_logs(tmp_path))
    assert len(runs) == 4 and not left_out
    run = next(run for run in runs if (run.epochs, run.seed) == (6, 25))
    assert run.setting == ("paper", "Atari", "Phoenix-v5", "ReLU", "constant", 6, "none") and run.finished
    assert run.get("representation/before/critic/dead_units").tolist() == [4.0 + i for i in range(60)]
    assert len(run.get(BELOW)) == 30
    assert run.get(RETURN).tolist() == [100 * i for i in range(30)]
    assert math.isnan(run.carried_return().iloc[0]) and run.carried_return().iloc[-2:].tolist() == [2900, 2900]
    assert run.get(PLASTICITY["critic"]).to_dict() == {0: 0, 50_000_000: 0.05, 99_999_744: 0.099999744}


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"pfo_coef": 1.0}, "PFO last"),
        ({"pfo_coef": 10.0, "pfo_all": "True"}, "PFO all"),
        ({"reset": True}, "reset Adam"),
        ({"share": True}, "shared trunk"),
        ({"config/working_dir": "/logs/atari-ppo/control/adam-beta/x"}, "Adam betas"),
    ],
)
def test_the_papers_interventions(tmp_path, changed, expected):
    path, _ = paper_logs(tmp_path, epochs=(4,), seeds=(7,))
    logs = pd.read_csv(path, index_col=0).assign(**{PAPER_SETTINGS.get(key, key): x for key, x in changed.items()})
    logs.to_csv(path)
    assert [run.intervention for run in read_paper_runs([path])[0]] == [expected]


def test_plasticity_without_its_run_is_left_out(tmp_path):
    training, plasticity = paper_logs(tmp_path)
    pd.read_csv(training).query("`config/optim/num_epochs` == 4").to_csv(training)
    runs, left_out = read_paper_runs([plasticity, training])
    assert {run.epochs for run in runs} == {4} and len(left_out) == 2
    assert all("no training log" in reason for _, reason in left_out)


def test_the_papers_runs_may_lie_in_several_files(tmp_path):
    """Theirs in two files are whole, and rows without a folder are said."""
    for path in paper_logs(tmp_path, epochs=(4,), seeds=(7,)):
        rows = pd.read_csv(path, index_col=0)
        folder = "config/solve_dir" if "capacity" in path.name else "config/working_dir"
        for half in (0, 1):
            part = rows.iloc[half::2].copy()
            if half:
                part.iloc[0, part.columns.get_loc(folder)] = None
            part.to_csv(tmp_path / f"{half}-{path.name}")
    (run,), left_out = read_paper_runs(sorted(tmp_path.glob("[01]-*.csv")))
    assert len(run.grid) == 59 and len(run.get(PLASTICITY["actor"])) == 2
    assert left_out == [
        (str(tmp_path / "1-atari-capacity.csv"), "rows without config/solve_dir: 1"),
        (str(tmp_path / "1-atari.csv"), "rows without config/working_dir: 1"),
    ]


# Thinned files


def test_a_thinned_file_holds_the_same_runs(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, seed=seed)
    runs, _, _ = read_runs([str(tmp_path)])
    (path,) = write_thinned(runs, tmp_path, points=1000)
    again = read_thinned(path)
    assert [(run.name, run.setting, run.seed, run.every) for run in again] == [
        (run.name, run.setting, run.seed, 1) for run in runs
    ]
    for run, same in zip(runs, again, strict=True):
        assert measures.final_values(same) == pytest.approx(measures.final_values(run), rel=1e-4)
        assert measures.collapse(same) == measures.collapse(run) and same.finished
    content = path.read_bytes()
    write_thinned(runs, tmp_path, points=1000)
    assert path.read_bytes() == content


def test_thinning_keeps_both_ends_and_what_a_point_stands_for(tmp_path):
    write_run(tmp_path)
    runs, _, _ = read_runs([str(tmp_path)])
    (path,) = write_thinned(runs, tmp_path, points=20)
    (run,) = read_thinned(path)
    assert len(run.grid) == 20 and run.grid[0] == 100 and run.grid[-1] == 10_000 and run.every == 5
    assert run.get(PLASTICITY["actor"]).equals(runs[0].get(PLASTICITY["actor"]).map("{:.5g}".format).astype(float))
    assert run.carried_return().tolist() == pytest.approx(runs[0].carried_return()[run.grid].tolist(), rel=1e-4)


# The commands


def command(name, *flags, code=0):
    """Run a command in this process, which spares its start; what it printed, and what on stderr."""
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        patch.setattr(sys, "argv", [f"benchmark.{name}", *map(str, flags)])
        patch.delitem(sys.modules, f"benchmark.{name}", raising=False)
        try:
            runpy.run_module(f"benchmark.{name}", run_name="__main__")
            stopped = 0
        except SystemExit as stop:
            stopped = stop.code
    assert stopped == code, printed.getvalue() + errors.getvalue()
    return printed.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Synthetic runs: baselines of two numbers of epochs, an intervention, a schedule, one in progress; and theirs."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed, epochs in itertools.product((1, 2), (10, 20)):
        write_run(folder / "runs", curves_of(seed, collapsed=epochs == 20), seed=seed, update_epochs=epochs)
        write_run(folder / "runs", seed=seed, update_epochs=epochs, pfo_coef=1.0)
    write_run(folder / "runs", seed=1, anneal_lr=True)
    write_run(folder / "runs", curves_of(steps=range(100, 2001, 100)), seed=3)
    paper_logs(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(sweep):
    """All figures of the sweep: their folder, and what was printed."""
    flags = ["--runs", sweep / "runs", sweep / "atari.csv", sweep / "atari-capacity.csv", "--output", sweep / "figures"]
    return sweep / "figures", command("figures", "--figure", *"12467", "--window", "500", *flags)[0]


def test_every_figure_is_drawn_in_three_forms(drawn):
    folder, printed = drawn
    expected = {
        *("figure1_Hopper-v4_Tanh_constant", "figure1_Hopper-v4_Tanh_linear", "figure1_Phoenix-v5_constant"),
        *("figure1_Hopper-v4_Tanh_10epochs_interventions", "figure1_Hopper-v4_Tanh_20epochs_interventions"),
        *("figure2_Hopper-v4_Tanh_constant", "figure2_Hopper-v4_Tanh_linear", "figure2_Phoenix-v5_constant"),
        *("figure4_Hopper-v4_Tanh", "figure4_Phoenix-v5_paper", "figure6_Hopper-v4_Tanh", "figure6_Phoenix-v5"),
        *("figure7_MuJoCo_Tanh", "figure7_Atari_ReLU_paper"),
    }
    stems = {path.stem for path in folder.glob("*.png")}
    assert stems == expected
    assert all((folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG") for stem in stems)
    assert all((folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF") for stem in stems)
    assert all(len(pd.read_csv(folder / f"{stem}.csv")) for stem in stems)
    assert not list(folder.glob("*.tmp*"))
    assert all(f"{folder / stem}.png" in printed for stem in stems)


def test_runs_with_a_constant_rank(tmp_path):
    """They are left out of figure 7, or kept without that rank."""
    curves = curves_of() | {"representation/after/actor/matrix_rank": dict.fromkeys(STEPS, 64.0)}
    write_run(tmp_path / "runs", curves, seed=1)
    flags = ["--figure", "7", "--runs", tmp_path / "runs", "--output", tmp_path]
    out, _ = command("figures", *flags, code=1)
    assert "its matrix_rank is constant" in out
    write_run(tmp_path / "runs", seed=2)
    command("figures", *flags, "--keep-constant-ranks")
    numbers = pd.read_csv(tmp_path / "figure7_MuJoCo_Tanh.csv")
    assert (
        "2 of 2 runs used" in command("figures", *flags, "--keep-constant-ranks")[0] and numbers["value"].notna().all()
    )


def test_a_figure_of_each_run(sweep):
    out, _ = command("figures", "--figure", "3", "--runs", sweep / "runs" / "*__3__*", "--output", sweep / "single")
    (run,) = (sweep / "runs").glob("*__3__*")
    assert f"{sweep / 'single' / f'figure3_{run.name}.png'}" in out
    numbers = pd.read_csv(sweep / "single" / f"figure3_{run.name}.csv")
    objective = numbers[numbers["tag"] == "losses/last_minibatch/policy_loss"]
    curve = curves_of(steps=range(100, 2001, 100))["losses/last_minibatch/policy_loss"]
    np.testing.assert_allclose(objective["logged"], [-x for x in curve.values()], rtol=1e-4)


def test_the_command_says_which_runs_it_used(drawn):
    folder, printed = drawn
    assert (
        "14 runs read:" in printed and "Hopper-v4, Tanh, constant learning rate, 10 epochs, baseline: 3 runs" in printed
    )
    assert "3 (at 20 %)" in printed
    assert "figure 4: 9 of 14 runs used" in printed
    assert "left out, an intervention: figure 4 is of baselines: 4 runs" in printed
    assert "left out, its learning rate is annealed: figure 4 is of constant ones: 1 run" in printed
    assert "left out, in progress: figure 6 is of the end of training: 1 run" in printed
    listed = pd.read_csv(folder / "figure4_runs.csv")
    assert len(listed) == 14 and listed["used"].sum() == 9 and (listed["reason"].notna() == ~listed["used"]).all()
    statistics = pd.read_csv(folder / "figure4_Hopper-v4_Tanh_statistics.csv").set_index("measure")
    points = pd.read_csv(folder / "figure4_Hopper-v4_Tanh.csv")
    for name, x in (("pca_rank", points["pca_rank"]), ("preactivation_norm", np.log10(points["preactivation_norm"]))):
        fit = stats.linregress(x, points["ratio_below"])
        expected = [stats.kendalltau(x, points["ratio_below"])[0], stats.spearmanr(x, points["ratio_below"])[0]]
        expected += [fit.slope, fit.intercept]
        found = statistics.loc[name, ["kendall_tau", "spearman_rho", "slope", "intercept"]].astype(float)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_numbers_behind_the_curves(drawn):
    """Of figure 1, with three seeds of which one is in progress."""
    folder, _ = drawn
    numbers = pd.read_csv(folder / "figure1_Hopper-v4_Tanh_constant.csv")
    found = numbers[(numbers["tag"] == DIAGNOSED) & (numbers["curve"] == "10 epochs")].set_index("step")
    curves = [curves_of(1), curves_of(2), curves_of(steps=range(100, 2001, 100))]
    means = [np.mean([curve[DIAGNOSED][step] for curve in curves if step in curve[DIAGNOSED]]) for step in STEPS]
    average = [means[0]]
    for mean in means[1:]:
        average.append(0.95 * average[-1] + 0.05 * mean)
    assert found.index.tolist() == list(STEPS)
    np.testing.assert_allclose(found["mean"], average, rtol=1e-4)
    assert found["seeds"].tolist() == [3] * 20 + [2] * 80
    plasticity = numbers[(numbers["tag"] == PLASTICITY["actor"]) & (numbers["curve"] == "20 epochs")]
    expected = np.mean([list(curves_of(seed, True)[PLASTICITY["actor"]].values()) for seed in (1, 2)], axis=0)
    np.testing.assert_allclose(plasticity["mean"], expected, rtol=1e-4)


def test_the_numbers_behind_points_and_boxes(drawn):
    folder, _ = drawn
    windows = pd.read_csv(folder / "figure4_Hopper-v4_Tanh.csv")
    assert windows.groupby("run").size().max() == 20 and (windows["window_start"] % 500 == 0).all()
    boxes = pd.read_csv(folder / "figure6_Hopper-v4_Tanh.csv")
    assert len(boxes) == 8 and set(boxes["intervention"]) == {"none", "PFO last"}
    matrices = pd.read_csv(folder / "figure7_MuJoCo_Tanh.csv")
    assert len(matrices) == 2 * 4 * 5 * 5
    same = matrices[matrices["rank"] == matrices["other_rank"]]
    np.testing.assert_allclose(same["value"], 1)


def test_a_figure_without_its_measures_stops_no_other(tmp_path):
    curves = {tag: points for tag, points in curves_of().items() if tag.startswith("representation/after/actor/")}
    write_run(tmp_path / "runs", curves)
    flags = ["--figure", "2", "7", "--runs", tmp_path / "runs", "--output", tmp_path]
    said, errors = command("figures", *flags, code=1)
    assert "none of figure 2's measures in its logs: losses/first_minibatch/entropy" in said
    assert "--figure 2: these runs have nothing" in errors and (tmp_path / "figure7_MuJoCo_Tanh.png").is_file()


def test_boxes_say_what_they_lack(tmp_path, monkeypatch):
    """An infinite value is not drawn, which the panel says, and how many runs are left in the box."""
    from benchmark import figures

    shown = []
    monkeypatch.setattr(
        figures.Drawn, "save", lambda drawn, figure, *_: shown.extend((x.get_title(), *x.texts) for x in figure.axes)
    )
    runs = [read_run(write_run(tmp_path, seed=seed))[0] for seed in (1, 2, 3)]
    runs[0].scalars["representation/after/actor/preactivation_norm"].iloc[-1] = math.inf
    del runs[1].scalars[PLASTICITY["actor"]]
    figures.figure_6(figures.Drawn(), runs, tmp_path, figures.Args())
    said = [(title, [text.get_text() for text in texts]) for title, *texts in shown]
    assert said == [("", [])] * 3 + [("1 infinite, not drawn", ["here 2"]), ("", []), ("", ["here 2"])]


@pytest.mark.parametrize("last, scale", [(0.5, "linear"), (1e7, "log")])
def test_an_axis_is_logarithmic_where_values_span_decades(last, scale):
    """Also where the loss of one run begins with 0: its untrained policy is the target."""
    from benchmark.figures import FIGURE_1, draw_curves

    runs = [make_run(curves_of(seed), seed=seed) for seed in (1, 2)]
    losses = [run.scalars[PLASTICITY["actor"]] for run in runs]
    losses[0].iloc[0], losses[1].iloc[-1] = 0, last
    figure, _ = draw_curves({("10 epochs", "runs"): runs}, FIGURE_1, 3)
    scales = [axis.get_yscale() for axis in figure.axes]
    assert scales == ["linear", "linear", "log", scale, "linear", "linear"]


def test_more_curves_than_colours_are_told_apart():
    from benchmark.figures import look

    assert len({look(i) for i in range(30)}) == 30


def test_ours_lie_over_theirs(tmp_path):
    """A run of ours on the paper's environment is drawn in the figure of its logs."""
    atari = {"script": "ppo_atari_2models.py", "env_id": "Phoenix-v5", "activation": "ReLU", "frame_skip": 3}
    write_run(tmp_path / "runs", **atari, update_epochs=4, batch_size=1024, num_iterations=32552)
    logs = paper_logs(tmp_path)
    command("figures", "--figure", "1", "--runs", tmp_path / "runs", *logs, "--output", tmp_path / "out")
    curves = pd.read_csv(tmp_path / "out" / "figure1_Phoenix-v5_constant.csv")[["curve", "source"]].drop_duplicates()
    assert set(map(tuple, curves.to_numpy())) == {("4 epochs", "runs"), ("4 epochs", "paper"), ("6 epochs", "paper")}


def test_the_table(sweep):
    printed = command("table", "--runs", sweep / "runs", "--output", sweep / "tables", "--resamples", "500")[0]
    runs = pd.read_csv(sweep / "tables" / "runs.csv")
    assert len(runs) == 9 and runs["finished"].all()
    collapsed = runs[runs["collapsed"].notna()]
    assert set(collapsed["epochs"]) == {20} and set(collapsed["intervention"]) == {"none"}
    assert (collapsed["collapsed"] == 5100).all()  # the step after half of them
    rows = pd.read_csv(sweep / "tables" / "table.csv")
    (row,) = rows[(rows["intervention"] == "PFO last") & (rows["epochs"] == "20")].to_dict("records")
    assert row["improvement"] == row["improvement_low"] == 1 and row["iqm_low"] <= row["iqm"] <= row["iqm_high"]
    text = (sweep / "tables" / "table.md").read_text(encoding="utf-8")
    assert text in printed and "MuJoCo, baselines: 2 of 5 runs collapsed. The rank was" in text
    assert "MuJoCo, interventions: 0 of 4 runs collapsed.\n" in text
    assert "in progress: the table is of the end of training" in printed


def test_rows_of_whole_logs_stand_for_thinned_runs(sweep, tmp_path):
    """As if all had been read whole; a run that is not in the earlier table is measured by what there is of it."""
    command("table", "--runs", sweep / "runs", "--output", tmp_path / "whole", "--resamples", "200")
    command("logs", "--runs", sweep / "runs", "--output", tmp_path / "thin", "--points", "20")
    whole = pd.read_csv(tmp_path / "whole" / "runs.csv")
    whole[whole["seed"] == 1].to_csv(tmp_path / "earlier.csv", index=False)
    for earlier, name in ((tmp_path / "whole" / "runs.csv", "all"), (tmp_path / "earlier.csv", "some"), (None, "none")):
        flags = ["--runs", tmp_path / "thin", "--output", tmp_path / name, "--resamples", "200"]
        said = command("table", *flags, *(["--earlier", earlier] if earlier else []))[0]
        assert (f"of 9 runs as they are in {earlier}" in said) == bool(earlier)
    assert (tmp_path / "all" / "runs.csv").read_bytes() == (tmp_path / "whole" / "runs.csv").read_bytes()
    pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path / name / "table.csv") for name in ("all", "whole")), rtol=1e-4)
    tables = {name: pd.read_csv(tmp_path / name / "runs.csv").set_index("run") for name in ("some", "none")}
    known, whole = tables["some"]["seed"] == 1, whole.set_index("run").loc[tables["some"].index]
    assert known.any() and tables["some"][known].equals(whole[known]) and not tables["none"].equals(whole)
    assert tables["some"][~known].equals(tables["none"][~known])
    for text, words in (("a,b\n1,2\n", "has no column run"), ("", "can't be read as CSV")):
        (tmp_path / "other.csv").write_text(text)
        flags = ["--runs", sweep / "runs", "--earlier", tmp_path / "other.csv", "--output", tmp_path / "not"]
        assert words in command("table", *flags, code=2)[1] and not (tmp_path / "not").exists()


def test_thinned_files_serve_as_runs(sweep):
    out = command("logs", "--runs", sweep / "runs", "--output", sweep / "thin", "--points", "50")[0]
    for intervention in ("none", "PFO_last"):
        assert str(sweep / "thin" / f"Hopper-v4_Tanh_{intervention}.csv.gz") in out
    out = command("figures", "--figure", "6", "--runs", sweep / "thin", "--output", sweep / "from_thin")[0]
    assert "10 runs read" in out and (sweep / "from_thin" / "figure6_Hopper-v4_Tanh.png").is_file()


@pytest.mark.parametrize(
    "flags, code, said",
    [
        (["--figure", "5"], 2, "5"),
        (["--figure"], 2, "--figure"),
        ([], 2, "--figure"),
        (["--figure", "1", "--runs"], 2, "--runs"),
        (["--figur", "1"], 2, "--figure"),
        (["--figure", "1", "--window", "-1"], 2, "--window -1"),
        (["--figure", "1", "--runs", "nowhere*"], 2, "--runs nowhere*"),
        (["--figure", "1", "--runs", "{folder}/empty"], 2, "there is no run in it"),
        (["--figure", "1", "--runs", "{folder}/other.csv"], 2, "other.csv: must have the columns"),
        (["--figure", "1", "--runs", "{folder}/binary.csv"], 2, "binary.csv: can't be read"),
        (["--figure", "1", "--runs", "{folder}/runs", "--output", "{folder}/other.csv"], 2, "--output"),
        (["--figure", "4", "--runs", "{folder}/runs", "--output", "{folder}/out"], 1, "--figure 4"),
        (["--figure", "1", "--runs", "{folder}/*.csv"], 1, "no run in it can be used"),
    ],
)
def test_what_cannot_be_drawn_costs_one_line(tmp_path, flags, code, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x9f" * 10)
    write_run(tmp_path / "runs", {DIAGNOSED: dict.fromkeys(STEPS, 3.0)})
    printed, errors = command("figures", *(flag.format(folder=tmp_path) for flag in flags), code=code)
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors
    if "*.csv" in "".join(flags):
        assert "left out, neither a run nor a CSV of curves: " in printed and "binary.csv" in printed


def test_what_was_refused_while_reading_is_listed(tmp_path):
    write_run(tmp_path / "runs", seed=1)
    odd = write_run(tmp_path / "runs", {RETURN: {100: 1.0}}, seed=2)
    (tmp_path / "runs" / "notes.txt").write_text("of the study\n")
    command("figures", "--figure", "2", "--runs", tmp_path / "runs" / "*", "--output", tmp_path)
    listed = pd.read_csv(tmp_path / "figure2_runs.csv").set_index("run")
    assert len(listed) == 3 and listed["used"].sum() == 1
    assert DIAGNOSED in listed.loc[str(odd), "reason"]
    assert "neither a run" in listed.loc[str(tmp_path / "runs" / "notes.txt"), "reason"]


def test_runs_of_several_seeds_from_an_older_revision_are_of_the_same_curve(tmp_path):
    """They name a script of their own, and know nothing of what came with ``record``."""
    write_run(tmp_path / "runs", seed=1, script="ppo_mujoco_multiseed.py", seeds=(1,))
    write_run(tmp_path / "runs", seed=2, record=True, seeds=())
    write_run(tmp_path / "runs", seed=3, record=False, seeds=())
    runs, left_out, _ = read_runs([str(tmp_path / "runs")])
    assert len({run.setting for run in runs}) == 1 and {run.intervention for run in runs} == {"none"}
    assert sorted(run.seed for run in runs) == [1, 2, 3] and not left_out
    assert poolable(runs) == (runs, []) and poolable(runs[1:]) == (runs[1:], [])


@pytest.mark.parametrize("script", ["ppo_atari", "ppo_mujoco"])
def test_real_runs_are_read(tmp_path, script):
    """Of the scripts themselves, under another name: which script it was is told all the same."""
    flags = ["--num-envs", "2", "--num-steps", "16", "--minibatch-size", "16", "--exp-name", "mine", "--anneal-lr"]
    if script == "ppo_atari":
        flags += ["--total-timesteps", "500", "--seed", "5"]
        setting, seeds, steps = ("runs", "Atari", "Phoenix-v5", "ReLU", "linear", 4, "shared trunk"), [5], 96
    else:
        flags += ["--total-timesteps", "165", "--seeds", "5", "6", "--adam-beta2", "0.9"]
        setting, seeds, steps = ("runs", "MuJoCo", "Hopper-v4", "Tanh", "linear", 10, "Adam betas"), [5, 6], 32
    forked.program(ROOT / f"{script}.py", *flags, folder=tmp_path)
    runs, left_out, notes = read_runs([str(tmp_path / "runs")])
    assert sorted(run.seed for run in runs) == seeds and not left_out and not notes
    for run in runs:
        assert run.setting == setting and run.total_steps == 5 * steps and run.finished
        assert run.grid.tolist() == [steps * i for i in range(1, 6)]
        # Not in so short a run: an episode's end, or plasticity. Ratios may all lie within the clip range.
        assert set(TAGS) - {RETURN, BELOW, ABOVE, *PLASTICITY.values()} <= set(run.scalars)
