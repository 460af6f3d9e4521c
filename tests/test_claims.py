"""The comparisons behind the paper's claims, on runs whose differences are known."""

import forked
import numpy as np
import pandas as pd
import pytest
from test_figures import curves_of, make_run, write_run

from benchmark.claims import MEASURES, WITHIN, claims, effect, values_of
from benchmark.logs import PLASTICITY, RETURN, until


def test_effects():
    rng = np.random.default_rng(0)
    # Each run is three times what it was: paired, nothing is left to chance.
    one, other = np.array([3.0, 30.0, 300.0]), np.array([1.0, 10.0, 100.0])
    assert effect(one, other, "ratio", True, rng, 100) == pytest.approx((3, 3, 3))
    middle, low, high = effect(one, other, "ratio", False, rng, 1000)
    assert middle == pytest.approx(3) and low < 1 < 9 < high
    assert effect([5, 7], [1, 3], "difference", True, rng, 100) == pytest.approx((4, 4, 4))
    middle, low, high = effect([5, 7], [1, 3], "difference", False, rng, 1000)
    assert (middle, low, high) == pytest.approx((4, 2, 6))
    middle, low, high = effect([5], [1, 3], "difference", False, rng, 100)
    assert middle == 3 and np.isnan([low, high]).all()


@pytest.mark.parametrize(("runs", "held"), [(2, 0.67), (3, 0.81), (5, 0.87)])
def test_how_often_an_interval_holds_the_truth(runs, held):
    """As often as benchmark/results/README.md says, which is less than 95 %."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        _, low, high = effect(rng.normal(size=runs), rng.normal(size=runs), "difference", False, rng, 500)
        inside += low <= 0 <= high
    assert inside / 1000 == pytest.approx(held, abs=0.02)


def test_a_run_at_its_two_ends():
    curves = curves_of(1, collapsed=True)
    norm = "representation/after/actor/preactivation_norm"
    curves[norm] = {step: 2.0 if step <= 500 else 50.0 for step in curves[norm]}
    curves[PLASTICITY["actor"]] = {0: 0.25, 5000: 7.0, 9500: 1.0, 9750: 2.0, 10_000: 3.0}
    curves["trust_region/ratio_above_mean"][400] = np.inf  # bounded, at the start as at the end
    end, start = values_of(make_run(curves))
    assert 1e12 < start["excess_ratio"] < 1e14
    assert start["preactivation_norm"] == 2 and end["preactivation_norm"] == 50
    assert start["plasticity_loss"] == 0.25 and end["plasticity_loss"] == 2
    assert end["collapsed"] == end["halved"] == 1 and 0 < end["kept"] < 0.02 and end["rank_kept"] < 0.1
    assert 5000 < end["halved_step"].step < 6000 and end["halved_step"].happened
    assert end["broken_step"] == (10_000, False, 10_000)  # never: censored at the end
    assert 0 < end["step_of_max"] <= 0.005 and 1000 <= end["max_return"] <= 1005
    assert end.keys() >= MEASURES.keys() and start.keys() == set(WITHIN)


def test_a_run_until_a_step():
    """It is a finished run of that length, the later half gone; one that is not as far stays in progress."""
    curves = curves_of(1, collapsed=True)
    run = until(make_run(curves), 4950)
    assert run.finished and run.last_step == run.total_steps == 4900
    end, _ = values_of(run)
    assert end["collapsed"] == end["halved"] == 0 and end["return"] > 1000
    assert values_of(make_run(curves))[0]["return"] < 100
    short = {tag: {step: x for step, x in points.items() if step <= 3000} for tag, points in curves.items()}
    assert not until(make_run(short), 4950).finished


def test_comparisons_between_settings():
    runs = [
        make_run(curves_of(seed, collapsed), epochs=epochs, intervention=intervention, seed=seed)
        for epochs, intervention, collapsed in ((10, "none", False), (20, "none", True), (20, "PFO last", False))
        for seed in range(4)
    ]
    table, without = (
        claims(some, 0, 500).set_index(["comparison", "measure"])
        for some in (runs, [run for run in runs if run.epochs == 20])
    )
    pd.testing.assert_frame_equal(table.loc[without.index], without)  # other runs leave intervals as they are
    worse = table.loc["no intervention: 20 epochs against 10"]
    assert worse.loc["return", "high"] < -900 and worse.loc["return", "probability"] == 0
    assert worse.loc["share of runs that collapsed", "effect"] == 1
    assert worse.loc["excess ratio", "effect_is"] == "ratio" and worse.loc["PCA rank", "effect_is"] == "difference"
    # Without it the return falls at half of each run; with 10 epochs never, which counts as 0.01 M steps at least.
    time = worse.loc["restricted mean time to a return below half for good, M steps"]
    assert time["reference"] == 0.01 and time["effect"] == pytest.approx(-0.0049)
    assert time["permutation_p"] == pytest.approx(2 / 70) and time["logrank_p"] < 0.01
    assert worse.drop(time.name)["permutation_p"].isna().all()  # the excess ratio never passes 10 in any of them
    better = table.loc["PFO last against none, 20 epochs"]
    assert better.loc["return", "low"] > 900 and better.loc["return", "probability"] == 1
    assert (better["runs"] == 4).all() and len(better) == len(MEASURES)
    within = table.loc["no intervention, 20 epochs: end against start"]
    assert within.loc["PCA rank", "high"] < 0 and set(within.index) <= {MEASURES[name][0] for name in WITHIN}
    assert "PFO last against none, 10 epochs" not in table.index


def test_the_command(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "runs", seed=seed)
    write_run(tmp_path / "runs", curves_of(3, steps=range(100, 5000, 100)), seed=3)
    flags = ["--runs", tmp_path / "runs", "--output", tmp_path]
    done = forked.program("benchmark.claims", *flags, "--resamples", "100")
    assert "left out, in progress" in done.stdout and "2 runs used" in done.stdout
    assert (tmp_path / "claims.md").read_text() in done.stdout
    assert (tmp_path / "claims.csv").read_text().count("\n") == 1 + len(WITHIN)
    for name in ("benchmark.claims", "benchmark.table"):
        assert "3 runs used" in forked.program(name, *flags, "--steps", "4000").stdout
        assert forked.program(name, *flags, "--steps", "50", code=2).stderr.startswith("error: --steps 50")
    assert set(pd.read_csv(tmp_path / "runs.csv")["last_step"]) == {4000}
    earlier = ["--steps", "4000", "--earlier", tmp_path / "runs.csv"]
    done = forked.program("benchmark.table", *flags, *earlier, code=2)
    assert done.stderr.startswith("error: --steps: must not go with --earlier"), done.stderr
    done = forked.program("benchmark.claims", *flags, "--resamples", "1", code=2)
    assert done.stderr.startswith("error: --resamples 1") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_run_in_which_no_episode_ended(tmp_path):
    """It is left out of the claims by name, and the table and the curves say what they lack."""
    for seed in (1, 2, 3):
        curves = curves_of(seed)
        curves["charts/episodic_return"] = curves[RETURN]
        if seed == 3:
            del curves[RETURN], curves["charts/episodic_return"]
        without = write_run(tmp_path / "runs", curves, seed=seed)

    def program(name, *flags):
        return forked.program(f"benchmark.{name}", *flags, code=None)

    flags = ["--output", str(tmp_path), "--resamples", "100", "--runs"]
    done = program("claims", *flags, str(tmp_path / "runs"))
    assert done.returncode == 0 and f"no episode has ended in it: {without.name}\n" in done.stdout, done.stderr
    assert "2 runs used" in done.stdout and (tmp_path / "claims.csv").is_file()
    done = program("claims", *flags, str(without))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    done = program("table", *flags, str(tmp_path / "runs"))
    assert done.returncode == 0 and f"note: {without.name}: no episode has ended in it" in done.stdout, done.stderr
    for runs in ([without], sorted(tmp_path.glob("runs/*"))):
        done = program("curves", *map(str, runs), "--output", str(tmp_path / "curves.png"))
        assert done.returncode == 0 and f"{without.name}: no episode has ended in it\n" in done.stdout
        assert done.stderr == ""


@pytest.mark.parametrize("name", ["claims", "table", "figures", "logs", "statistics"])
def test_a_console_without_dashes_does_not_matter(tmp_path, name):
    for seed in (1, 2):
        write_run(tmp_path / "runs", seed=seed, env_id="Hopper–v4")
    flags = ["--runs", tmp_path / "runs", "--output", tmp_path, *(["--figure", "1"] if name == "figures" else [])]
    plain = "import sys\nsys.stdout.reconfigure(encoding='ascii')"
    assert "\\u2013" in forked.program(f"benchmark.{name}", *flags, before=plain).stdout
