"""When something happened to runs, of which to some it never did: survival analysis of their events.

A run to which an event has not happened by its last step, because its training ended there or is still in progress,
is censored there: that it came no earlier is all that is known. Pure functions; the estimators are SciPy's.
"""

import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from benchmark.measures import collapse, ratio_broken

# The steps of `benchmark.measures.collapse` and `ratio_broken`, in the order in which they come in most runs
EVENTS = {
    "ratio_broken": "excess ratio above 10",
    "return_halved": "return below half for good",
    "rank_tenth": "PCA rank below a tenth for good",
}
PERMUTATIONS = 20_000  # fewer than these are all gone through: of 5 runs against 5 there are 252, of 8 against 8 12 870


class Time(NamedTuple):
    """When an event happened to a run, or how long it is known not to have, in environment steps."""

    step: int  # of the event; if it has not happened, the run's last one
    happened: bool
    last_step: int  # of the run


def times_of(run):
    """{name of each of EVENTS: Time} of a Run."""
    steps = {**collapse(run), "ratio_broken": ratio_broken(run)}
    last = run.last_step
    return {name: Time(last if steps[name] is None else steps[name], steps[name] is not None, last) for name in EVENTS}


def censored(times):
    """SciPy's CensoredData of Times: a run to which nothing happened is right-censored at its last step."""
    return stats.CensoredData(
        uncensored=[time.step for time in times if time.happened],
        right=[time.step for time in times if not time.happened],
    )


def kaplan_meier(times):
    """The Kaplan–Meier estimate of the share of runs to which an event has not happened yet.

    times: Times, at least one. Returns a table with a row for step 0 and for each step at which something happened to
    a run or a run was censored: step; survival, the share from this step on; low and high, its pointwise 95 % interval
    (Greenwood's variance of log(−log(survival)), which stays within 0 and 1; NaN where survival is 0 or 1, whose
    logarithms have none); at_risk, runs just before the step; events; censored.
    """
    survival = stats.ecdf(censored(times)).sf
    with warnings.catch_warnings():  # of the interval where it is NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = survival.confidence_interval(0.95, method="log-log")
    steps = np.array([time.step for time in times])
    happened = np.array([time.happened for time in times])
    rows = [(0, 1.0, np.nan, np.nan, len(times), 0, 0)]
    for step, share, low, high in zip(
        survival.quantiles,
        survival.probabilities,
        interval.low.probabilities,
        interval.high.probabilities,
        strict=True,
    ):
        now = steps == step
        certain = not 0 < share < 1
        bounds = (np.nan, np.nan) if certain else (low, high)
        rows.append((int(step), share, *bounds, (steps >= step).sum(), (now & happened).sum(), (now & ~happened).sum()))
    return pd.DataFrame(rows, columns=["step", "survival", "low", "high", "at_risk", "events", "censored"])


def median_time(times):
    """The first step from which on at most half of the runs are without the event, by Kaplan and Meier; NaN if none."""
    curve = kaplan_meier(times)
    reached = curve["survival"] <= 0.5 + 1e-9  # a product of fractions, which may miss a half by its rounding
    return float(curve.loc[reached.idxmax(), "step"]) if reached.any() else np.nan


def restricted_mean(times, until):
    """Restricted mean time to an event, in environment steps: the area under the Kaplan–Meier curve up to ``until``.

    It is how long a run stays without the event on average, of the first ``until`` steps. Where no run is censored
    before ``until`` it is the mean of min(step, until).
    """
    curve = kaplan_meier(times)
    curve = curve[curve["step"] < until]
    return float(np.dot(curve["survival"], np.diff([*curve["step"], until])))


def logrank_scores(times):
    """Peto and Peto's (1972) scores of runs of all groups together: whether the event happened, minus the cumulative
    hazard (Nelson and Aalen's estimate) up to the run's time.

    The sum over the runs of one group is the log-rank test's numerator, events observed minus expected.
    """
    steps, happened = np.array([time.step for time in times]), np.array([time.happened for time in times])
    order, events = np.unique(steps[happened], return_counts=True)
    hazards = events / (steps[:, None] >= order).sum(axis=0)
    return happened - (hazards * (steps[:, None] >= order)).sum(axis=1)


class LogRank(NamedTuple):
    """Of the log-rank test that two groups of runs have the same distribution of times to an event."""

    p: float  # two-sided, by the asymptotic normal distribution
    p_permuted: float  # two-sided, of its numerator among all ways to deal the runs to the groups


def logrank(times, reference):
    """The log-rank test of two lists of Times; NaN where the event happened to no run, or either has less than two.

    The asymptotic p is too small for few runs: of five against five whose events are all earlier it is 0.002 to 0.003,
    and that comes about by chance in 2 of 252 ways to deal ten runs, 0.008. The permutation p is exact up to
    PERMUTATIONS ways, beyond them of as many random ones, and supposes that both groups are censored alike.
    """
    both = [*times, *reference]
    if min(len(times), len(reference)) < 2 or not any(time.happened for time in both):
        return LogRank(np.nan, np.nan)
    scores = logrank_scores(both)
    if np.ptp(scores) < 1e-12:  # all at one step: there is nothing in which the groups could differ
        return LogRank(1.0, 1.0)
    permuted = stats.permutation_test(
        (scores[: len(times)], scores[len(times) :]),
        lambda x, y, axis: x.sum(axis=axis).round(9),  # or ties would hang on the rounding of their sums
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(0),
    )
    with np.errstate(invalid="ignore"):  # no variance, where runs of one group alone were left at each event
        p = stats.logrank(censored(times), censored(reference)).pvalue
    return LogRank(1.0 if np.isnan(p) else float(p), float(permuted.pvalue))
