"""Alarms of a training that collapses, from what it logs of itself: numbers in, alarms out.

Limits are those that `benchmark/alarms.py` chose on one half of the committed runs; it judged them on the other.
"""

import math
from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

BEGINNING = 0.03  # share of training whose extremes don't count: untrained networks have ranks of their own
SMOOTHING = 0.005  # share of training over which a moving average forgets all but 1/e
HELD = 0.01  # share of training for which a condition has to last, and
OBSERVATIONS = 4  # as many values at least: neither a single one nor a short run says anything
LOST = 0.5  # share of return, and of rank, without which a run
COLLAPSED = 0.1  # collapsed, once that has lasted for this share of training


class Kind(NamedTuple):
    """What an alarm is about."""

    tag: str
    limit: float  # rings from here on, in what `severity` says of the alarm
    means: str


ALARMS = {
    "ratios": Kind(
        "trust_region/excess_ratio",
        10,
        "clipping no longer bounds the policy's ratios; returns tend to fall next (fewer epochs, --target-kl, PFO)",
    ),
    "norm": Kind(
        "representation/after/actor/preactivation_norm",
        8,
        "the actor's pre-activations keep growing; units saturate or die, and single outputs move far (PFO holds them)",
    ),
    "units": Kind(
        "representation/after/actor/dead_fraction",
        0.05,
        "units of the actor die and don't come back; its plasticity goes with them",
    ),
    "rank": Kind(
        "representation/after/actor/pca_rank",
        0.3,
        "the actor's features lose dimensions: it tells fewer states apart",
    ),
    "entropy": Kind(
        "representation/after/entropy",
        5,
        "the policy becomes deterministic, and small changes of its output large ratios",
    ),
    "return": Kind(
        "charts/rollout_return",
        0.5,
        "half of the best return is lost; it may come back, unless the rank goes too",
    ),
}
DISCRETE_ENTROPY = 0.9  # limit of a categorical's entropy, which ends at 0
CATEGORICAL = "policy/logit_norm"  # logged of these alone


class Alarm(NamedTuple):
    """One alarm that rang: at ``step``, its tag had gone from ``was`` to ``now``."""

    name: str
    step: int
    was: float
    now: float

    def __str__(self):
        kind = ALARMS[self.name]
        return f"alarm {self.name} at step {self.step:,}: {kind.tag} {self.was:.3g} -> {self.now:.3g}; {kind.means}"


@dataclass
class _Signal:
    """One tag's moving averages, and since when it has been beyond its limit; shares are of training."""

    share: float = math.nan  # at the last value
    last: float = math.nan  # value, and the one before it
    before: float = math.nan
    first: float = math.nan
    now: float = math.nan
    slow: float = math.nan  # as `now`, over ten times as long
    spread: float = 0.0  # mean distance of values from `now`
    low: float = math.inf  # extremes of `now`
    high: float = -math.inf
    since: float = math.nan
    values: float = 0.0  # since then
    worse: float = 0.0  # `severity` at the last value
    rang: float = -1.0  # the step, -1 if it didn't

    def take(self, value, share):
        if math.isnan(self.share):
            self.first = self.now = self.slow = self.last = self.before = value
        else:
            passed = max(share - self.share, 0)  # a resumed run that was made longer stands at a smaller share
            self.spread += _weight(passed, 10 * SMOOTHING) * (abs(value - self.now) - self.spread)
            self.before, self.last, value = self.last, value, sorted((self.before, self.last, value))[1]
            self.now += _weight(passed, SMOOTHING) * (value - self.now)
            self.slow += _weight(passed, 10 * SMOOTHING) * (value - self.slow)
        if share <= BEGINNING:
            self.low = self.high = self.now
        self.share, self.low, self.high = share, min(self.low, self.now), max(self.high, self.now)

    def hold(self, beyond):
        """Note whether the value is beyond its limit; returns for which share of training that has been so."""
        self.values = self.values + 1 if beyond else 0.0
        if not beyond or math.isnan(self.since):
            self.since = self.share if beyond else math.nan
        self.since = min(self.since, self.share)
        return self.share - self.since if beyond and self.values >= OBSERVATIONS else -1.0


def _weight(passed, horizon):
    return -math.expm1(-passed / horizon)


def _power(exponent):
    return 10.0 ** min(exponent, 300.0)


def severity(name, signal):
    """What is compared with the limit, and from what to what the tag has gone."""
    first, now, low, high = signal.first, signal.now, signal.low, signal.high
    lost = high - now if high - now > 3 * signal.spread else 0.0  # more than noise
    if name == "ratios":
        return _power(now), _power(first), _power(now)
    if name == "norm":
        grown = _power(now - first) if now > signal.slow else 0.0
        return grown, _power(first), _power(now)
    if name == "units":
        return now - low, low, now
    if name == "rank":
        return (lost / high if high > 0 else 0.0), high, now
    if name == "entropy":
        return (first - now) / max(abs(first), 1e-6), first, now
    best = high - min(first, 0.0)  # of returns below 0, what counts is how far they have come
    return (lost / best if best > 0 else 0.0), high, now


class Watch:
    """Watches a run's scalars and says once of each of ALARMS when it rings.

    The median of each three values goes into a moving average, of ratios and norms in logarithms, which has to be
    beyond its limit for a while. What is missing or NaN is passed over; an infinity is a very large number.

    ratios: the excess ratio is above 10; clipping at ε would hold it at (1 + ε) / (1 − ε).
    norm: grown to eight times its first value, and still growing.
    units: a twentieth of the layer's units more are dead than when fewest were.
    rank: three tenths of the largest are lost, and more than noise.
    entropy: a categorical's has lost 0.9 of its first value; that of a density, which has no least value and depends on
        the unit of the actions, five times the size of its first.
    return: half of the largest is lost, counted from the first where that is below 0, and more than noise.
    limits: others by the names of all alarms.
    """

    def __init__(self, limits=None):
        self.limits = limits or {name: kind.limit for name, kind in ALARMS.items()}
        self.signals = {name: _Signal() for name in ALARMS}
        self.share = 0.0
        self.both_since = math.nan  # share of training, return and rank both lost

    def __call__(self, step, share, tags):
        """The alarms that ring at ``step``, ``share`` of training done, 0 to 1. tags: what was logged there."""
        alarms = []
        for name, kind in ALARMS.items():
            value = float(tags.get(kind.tag, math.nan))
            if math.isnan(value):
                continue
            value = min(max(value, -1e13), 1e13)
            signal = self.signals[name]
            signal.take(math.log10(max(value, 1e-13)) if name in ("ratios", "norm") else value, share)
            signal.worse, was, now = severity(name, signal)
            limit = DISCRETE_ENTROPY if name == "entropy" and CATEGORICAL in tags else self.limits[name]
            if signal.hold(signal.worse >= limit) >= HELD and signal.rang < 0:
                signal.rang = float(step)
                alarms.append(Alarm(name, step, was, now))
        both = self.signals["return"], self.signals["rank"]
        lost = all(signal.worse >= LOST and signal.values >= OBSERVATIONS for signal in both)
        if not lost:
            self.both_since = math.nan
        elif math.isnan(self.both_since):
            self.both_since = share
        self.both_since = min(self.both_since, share)  # a resumed run that was made longer stands at a smaller share
        self.share = share
        return alarms

    @property
    def ringing(self):
        """By name whether each alarm has rung, 0 or 1."""
        return {name: float(signal.rang >= 0) for name, signal in self.signals.items()}

    @property
    def collapsed(self):
        """Whether half of return and half of rank have been lost for a tenth of training, and so for good."""
        return not math.isnan(self.both_since) and self.share - self.both_since >= COLLAPSED

    def state_dict(self):
        """All that it remembers: lists of floats by name."""
        own = {"both": [self.share, self.both_since]}
        return {name: list(map(float, astuple(signal))) for name, signal in self.signals.items()} | own

    def load_state_dict(self, state):
        """Go on from a ``state_dict``; raises ValueError for anything else. An alarm that it lacks begins anew."""
        if not isinstance(state, dict):
            raise ValueError(f"its alarms are a {type(state).__name__}, not a dict")
        for name, numbers in state.items():
            size = len(fields(_Signal)) if name in ALARMS else 2 if name == "both" else 0
            if not (
                isinstance(numbers, list) and len(numbers) == size and all(type(x) is float for x in numbers) and size
            ):
                raise ValueError(f"its alarms have other numbers than those of an alarm: {name}"[:200])
            if name in ALARMS:
                self.signals[name] = _Signal(*numbers)
            else:
                self.share, self.both_since = numbers
