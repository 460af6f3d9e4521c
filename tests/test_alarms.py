"""Alarms on made-up curves, where it is known what should ring and when, and in a run of a script."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import LongArgs, state
from test_scripts import scalars_of

from benchmark.logs import read_runs
from common.alarms import ALARMS, Alarm, Watch
from common.run import Run

TAG = {name: kind.tag for name, kind in ALARMS.items()}
N = 1000  # iterations of the made-up runs


def healthy(i):
    """A run that learns: its return rises, its rank dips at the beginning, norm and entropy move a little."""
    return {
        TAG["return"]: 1000 * (1 - math.exp(-i / 200)),
        TAG["rank"]: 14 if 5 < i < 20 else 30,
        TAG["norm"]: 2 + 10 * i / N,
        TAG["ratios"]: 1.8,
        TAG["units"]: 0.02,
        TAG["entropy"]: 2 - 6 * i / N,
    }


def collapsing(i):
    """The same, and from 300 on ratios, 400 norm, 500 entropy, 600 the return, 650 the rank and 700 units go."""
    tags = healthy(i)
    tags[TAG["ratios"]] = 1.8 if i < 300 else 1e5
    tags[TAG["norm"]] = 5 * 10 ** max(0, (i - 400) / 50)
    tags[TAG["entropy"]] = 2 - 5 * max(0, i - 500)
    if i >= 600:
        tags[TAG["return"]] = 20
    if i >= 650:
        tags[TAG["rank"]] = 4
    if i >= 700:
        tags[TAG["units"]] = 0.4
    return tags


def feed(watch, curves, iterations=range(1, N + 1)):
    """The alarms of a run by name, and the first iteration at which it counts as collapsed."""
    alarms, collapsed = {}, None
    for i in iterations:
        for alarm in watch(i * 2048, i / N, curves(i)):
            assert alarm.name not in alarms, "an alarm rings once"
            alarms[alarm.name] = alarm
        if watch.collapsed and collapsed is None:
            collapsed = i
    return alarms, collapsed


def test_a_healthy_run_rings_nothing():
    assert feed(Watch(), healthy) == ({}, None)


def test_a_collapse_rings_each_alarm_in_its_order():
    alarms, collapsed = feed(Watch(), collapsing)
    assert list(alarms) == ["ratios", "norm", "entropy", "return", "rank", "units"]
    begin = dict(zip(alarms, (300, 445, 502, 600, 650, 700), strict=True))
    for name, alarm in alarms.items():
        assert 10 <= alarm.step / 2048 - begin[name] <= 25, name  # held for 1 %, behind the moving average
    assert 750 <= collapsed <= 775  # a tenth after the rank


def test_an_alarm_says_what_when_and_from_what_to_what():
    alarm = feed(Watch(), collapsing)[0]["rank"]
    assert alarm.was == pytest.approx(30) and alarm.now < 24
    line = str(alarm)
    assert "\n" not in line and f"{alarm.step:,}" in line and TAG["rank"] in line and "30 ->" in line


@pytest.mark.parametrize("seed", range(5))
def test_noise_rings_nothing(seed):
    rng = np.random.default_rng(seed)

    def noisy(i):
        tags = {tag: x * math.exp(0.2 * rng.standard_normal()) for tag, x in healthy(i).items()}
        return tags | {TAG["return"]: 1000 + 250 * rng.standard_normal()}

    assert feed(Watch(), noisy) == ({}, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_return_that_never_rose_is_not_lost(seed):
    rng = np.random.default_rng(seed)
    assert feed(Watch(), lambda i: {TAG["return"]: -20.5 + 0.5 * rng.standard_normal()}) == ({}, None)


def test_returns_below_zero_are_counted_from_the_first():
    """Pong: from -21 to 19 and back; the half is at -1."""
    alarms, _ = feed(Watch(), lambda i: {TAG["return"]: -21 + 40 * math.sin(math.pi * i / N)})
    assert list(alarms) == ["return"]
    assert alarms["return"].was == pytest.approx(19, abs=0.2) and -4 < alarms["return"].now < -1


def test_single_values_ring_nothing():
    def with_outliers(i):
        return collapsing(N) if i % 100 == 50 else healthy(i)

    assert feed(Watch(), with_outliers) == ({}, None)


def test_a_norm_that_has_stopped_growing_does_not_ring():
    assert "norm" not in feed(Watch(), lambda i: {TAG["norm"]: 2 if i == 1 else min(2 + i / 20, 15.9)})[0]
    assert "norm" in feed(Watch(), lambda i: {TAG["norm"]: 2 + i / 20})[0]


def test_a_categorical_policy_has_an_entropy_of_its_own_scale():
    entropy = {"policy/logit_norm": 3.0}
    falling = lambda i: {TAG["entropy"]: max(1.4 * (1 - i / 500), 0.01)}  # noqa: E731
    assert "entropy" not in feed(Watch(), falling)[0]
    assert "entropy" in feed(Watch(), lambda i: falling(i) | entropy)[0]


def test_what_is_missing_is_passed_over():
    """Each alarm rings as it does among the others, when its tag is alone, and logged every third time."""
    together, _ = feed(Watch(), collapsing)
    for name, tag in TAG.items():
        alone, collapsed = feed(Watch(), lambda i, tag=tag: {tag: collapsing(i)[tag]} if i % 3 == 0 else {})
        assert list(alone) == [name] and collapsed is None
        assert abs(alone[name].step - together[name].step) <= 12 * 2048
    assert feed(Watch(), lambda i: {}) == ({}, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value):
    """NaN is passed over; neither spoils what comes later."""
    alarms, _ = feed(Watch(), lambda i: dict.fromkeys(TAG.values(), value) if i < 3 else collapsing(i))
    if math.isnan(value):
        assert list(alarms) == list(feed(Watch(), collapsing)[0])
    all_along, collapsed = feed(Watch(), lambda i: dict.fromkeys(TAG.values(), value))
    assert set(all_along) == ({"ratios"} if value == math.inf else set()) and collapsed is None


def test_a_ratio_without_bounds_rings():
    alarms, _ = feed(Watch(), lambda i: {TAG["ratios"]: 2 if i < 500 else math.inf})
    assert 505 < alarms["ratios"].step / 2048 < 520


@pytest.mark.parametrize("at", [1, 5, 200, 305, 612, 655, 720, 999])
def test_a_resumed_run_goes_on_where_it_was(at):
    whole, first, second = Watch(), Watch(), Watch()
    alarms, collapsed = feed(whole, collapsing)
    before, _ = feed(first, collapsing, range(1, at + 1))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after, _ = feed(second, collapsing, range(at + 1, N + 1))
    assert before | after == alarms and not before.keys() & after.keys()
    assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict()) and second.collapsed and collapsed


def test_a_run_that_was_made_longer_goes_on():
    watch = Watch()
    feed(watch, collapsing, range(1, 710))
    for i in range(710, 2 * N + 1):
        watch(i * 2048, i / (2 * N), collapsing(i))
    assert all(watch.ringing.values()) and watch.collapsed


def test_what_comes_back_is_not_collapsed():
    watch = Watch()
    feed(watch, lambda i: healthy(i) if i >= 800 else collapsing(i))
    assert watch.ringing["return"] and watch.ringing["rank"] and not watch.collapsed


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {"rank": 1.0},
        {"rank": [1.0]},
        {"rank": [1] * 10},
        {"both": [1.0, "x"]},
        {"other": [1.0] * 10},
        {"other": []},
    ],
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(ValueError, match="alarms"):
        Watch().load_state_dict(state)


def test_a_state_of_any_floats_raises_nothing_later():
    for x in (0.0, 1e308, -1e308, math.inf, -math.inf, math.nan):
        watch, state = Watch(), Watch().state_dict()
        watch.load_state_dict({name: [x] * len(numbers) for name, numbers in state.items()})
        feed(watch, collapsing, range(1, 50))


# In a run: there, everything counts as lost

TINY = "--num-steps 64 --obs-norm-steps 50 --update-epochs 1 --total-timesteps 2560 --diagnostics-interval 1"
LOST = """
from common import alarms
for name in ("return", "rank"):
    alarms.ALARMS[name] = alarms.ALARMS[name]._replace(limit=-1e9)
alarms.LOST = -1e9
"""


def train(folder, *arguments):
    return forked.finished("ppo_mujoco", folder, [*TINY.split(), *arguments], LOST)


def test_a_collapse_ends_a_run_that_is_to_stop_on_it(tmp_path):
    done = train(tmp_path, "--stop-on", "collapse")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*")
    alarms = [line for line in done.stdout.splitlines() if line.startswith("alarm ")]
    assert sorted(line.split()[1] for line in alarms) == ["rank", "return"]
    (end,) = [line for line in done.stdout.splitlines() if line.startswith("--stop-on collapse")]
    checkpoint = torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)
    assert f" {checkpoint['global_step']:,} steps" in end and 4 < checkpoint["iteration"] < 20
    scalars = scalars_of(folder)
    for name in ALARMS:
        points = scalars[f"alarm/{name}"]
        values = [value for _, value in points]
        assert values == sorted(values) and values[0] == 0 and values[-1] == float(name in ("return", "rank"))
    run, _ = read_runs([str(folder)])[:2]
    assert run[0].last_step == checkpoint["global_step"]

    # Resumed without it, the run goes on to its end, and nothing rings twice.
    done = train(tmp_path, "--resume", str(folder), "--stop-on", "none")
    assert done.returncode == 0 and "alarm " not in done.stdout, done.stderr
    assert torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["iteration"] == 20
    assert all(scalars_of(folder)[f"alarm/{name}"][-1][1] == 1 for name in ("return", "rank"))


def test_seeds_that_are_trained_together_end_together(tmp_path):
    done = train(tmp_path, "--stop-on", "collapse", "--seeds", "1", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--stop-on collapse") == 2 and "seed 2: alarm rank" in done.stdout
    assert len(list(tmp_path.glob("runs/*/checkpoints/latest.pt"))) == 2


def test_a_checkpoint_with_other_alarms_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/x/checkpoints").mkdir(parents=True)
    checkpoint = {**state(1), "alarms": {"rank": [1.0]}, "path": Path("runs/x/checkpoints/latest.pt")}
    with pytest.raises(SystemExit) as stop:
        Run(LongArgs(resume="runs/x"), checkpoint=checkpoint)
    assert stop.value.code == 2
    assert "latest.pt: can't be resumed, its alarms have other numbers" in capsys.readouterr().err


def test_an_alarm_reaches_console_event_file_and_wandb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, alerts = Run(LongArgs()), []
    run.wandb = SimpleNamespace(alert=lambda title, text: alerts.append((title, text)), finish=lambda exit_code: None)
    alarm = Alarm("rank", 16, 30.0, 4.0)
    run.raise_alarm(alarm)
    assert alerts == [(f"rank: {run.name}", str(alarm))] and str(alarm) in capsys.readouterr().out
    run.wandb.alert = None  # raises
    run.raise_alarm(alarm)
    assert run.wandb is None and "W&B failed and tracks this run no further" in capsys.readouterr().out
    assert run.close() == 0
    texts = EventAccumulator(str(run.folder)).Reload().Tensors("alarms/text_summary")
    assert [x.step for x in texts] == [16, 16] and str(alarm).encode() in texts[0].tensor_proto.string_val[0]
