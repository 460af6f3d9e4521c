"""Films of a run's policies: which checkpoints show its collapse, and what is written of a real run."""

import forked
import imageio.v2 as imageio
import numpy as np
import pytest
from test_figures import make_run

from benchmark.film import Refused, of_collapse
from benchmark.logs import DIAGNOSED, RETURN

SNAPSHOTS = list(range(500, 10_001, 500))
TINY = "--num-envs 2 --num-steps 8 --minibatch-size 16 --update-epochs 1 --total-timesteps 960 --frame-skip 30 "


def run_of(score, rank=lambda step: 10.0):
    """A Run of 200 iterations, of 50 steps each, with the return ``score(step)``."""
    steps = range(50, 10_001, 50)
    return make_run({RETURN: {x: score(x) for x in steps}, DIAGNOSED: {x: rank(x) for x in steps}})


def film(*flags):
    return forked.program("benchmark.film", *flags, code=None)


def test_checkpoints_before_at_and_after_the_fall_of_the_return():
    run = run_of(lambda step: 100 - abs(step - 3_000) / 100 if step <= 6_200 else 5.0)
    shown = of_collapse(run, SNAPSHOTS)
    assert list(shown) == [3_000, 6_500, 10_000]
    assert [what.split()[0] for what in shown.values()] == ["at", "when", "at"]


def test_a_fall_of_the_rank_where_the_return_has_none():
    run = run_of(lambda step: 50.0 - step / 1_000, lambda step: 40.0 if step <= 6_200 else 3.0)
    shown = of_collapse(run, SNAPSHOTS)
    assert list(shown) == [500, 6_500, 10_000] and shown[6_500] == "when the rank had fallen for good"


def test_a_return_that_is_largest_again_after_a_fall_is_not_before_it():
    """A largest return that comes after the fall for good can't be; a dip that is made up for is no fall."""
    run = run_of(lambda step: 20.0 if 4_000 < step < 5_000 else step / 100)
    assert list(of_collapse(run, SNAPSHOTS)) == [10_000]
    assert list(of_collapse(run_of(lambda step: 50.0 if step < 2_000 else 40.0), SNAPSHOTS)) == [500, 10_000]


def test_no_best_policy_without_a_game():
    with pytest.raises(Refused, match="no episode has ended yet"):
        of_collapse(make_run({}), SNAPSHOTS)


def test_films_of_a_run(tmp_path):
    done = forked.finished("ppo_atari", tmp_path, f"{TINY} --checkpoint-interval 0.5".split())
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.glob("runs/*")
    done = film(run, "--checkpoints", "first", "960", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    videos = [run / "videos" / f"{step}-sampled.mp4" for step in (0, 960)]
    assert len(lines) == 2 and all(str(video) in line for video, line in zip(videos, lines, strict=True))
    for video, line in zip(videos, lines, strict=True):
        with imageio.get_reader(video) as reader:
            images = [np.asarray(image) for image in reader]
        assert f" in {len(images)} agent steps" in line and images[0].shape == (210, 160, 3)
        assert np.std(images[0]) > 1


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "RUNS: name at least one run's folder"),
        (("nowhere",), "nowhere: must be a run's folder, with checkpoints/ in it"),
        (("nowhere", "--checkpoints", "-1"), "--checkpoints -1: must be global steps, first or last"),
        (("nowhere", "--seed", "-1"), "--seed -1: must be"),
    ],
)
def test_what_is_wrong_costs_one_line(flags, said):
    done = film(*flags)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_checkpoint_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "960.pt").write_bytes(b"nothing")
    done = film(tmp_path / "run", "--checkpoints", "900")
    assert done.returncode == 2 and "--checkpoints 900: it has none of that step; the nearest is 960" in done.stderr
    done = film(tmp_path / "run", "--checkpoints", "last")
    assert done.returncode == 2 and "can't be read" in done.stderr and "Traceback" not in done.stderr
