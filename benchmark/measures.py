"""What the paper's figures and our statistics take from a run's curves: pure functions of series and runs.

Definitions are those of "No Representation, No Trust" (Moalla et al. 2024) where a figure is named. Series are indexed
by environment steps; NaN stands for what can't be said.
"""

import functools
import math
import warnings

import numpy as np
import pandas as pd
from scipy import stats

from benchmark.human import scores_of
from benchmark.logs import DIAGNOSED, PLASTICITY, RANKS, RETURN

ALPHA = 0.05  # of the figures' exponential moving average, per logged iteration
WINDOW = {"Atari": 1_000_000, "MuJoCo": 50_000}  # environment steps of a window of figure 4
RETURN_WINDOW = 400_000  # frames of Atari over which a return is averaged at the least
RANK_SCALE = 512  # by which figure 7 divides a distance, whatever the network's width

# Figure 6, after the update, but for plasticity. Excess ratio and return have rules of their own.
FINAL_MEASURES = {
    "return": RETURN,
    "excess_ratio": "trust_region/excess_ratio",
    "dead_units": "representation/after/actor/dead_units",
    "preactivation_norm": "representation/after/actor/preactivation_norm",
    "pca_rank": DIAGNOSED,
    "plasticity_loss": PLASTICITY["actor"],
}


def smooth(series, every=1.0):
    """The figures' exponential moving average, not bias-adjusted: y₀ = x₀, yₜ = (1 − α) yₜ₋₁ + α xₜ.

    Where a point stands for ``every`` logged iterations, as in a thinned file, α is that of as many of them.
    """
    return series.ewm(alpha=1 - (1 - ALPHA) ** every, adjust=False).mean()


def spacing(steps):
    """The usual distance between steps, 0 of a single one."""
    return float(np.median(np.diff(steps))) if len(steps) > 1 else 0.0


def on_one_grid(series, every=None):
    """The series of several seeds as the columns of one table, and the logged iterations for which its points stand.

    All are put on the grid of the coarsest, or else a step would be of those seeds alone that have just this one: the
    value of a seed is its last one, up to its own end. The grid goes on in equal steps where the coarsest ends early.
    series: one for each seed, at least one, over steps or hours. every: for each, the logged iterations for which a
    point stands, 1 if not given.
    """
    spacings = [spacing(one.index) for one in series]
    width, points_of = max(zip(spacings, every or [1.0] * len(series), strict=True))
    coarsest = [one.index for one, its in zip(series, spacings, strict=True) if its > 0.99 * width or not width]
    grid = functools.reduce(pd.Index.union, coarsest)
    if width:
        rest = np.arange(grid[-1] + width, np.nextafter(max(one.index[-1] for one in series), np.inf), width)
        grid = grid.append(pd.Index(rest.astype(grid.dtype)))
    table = pd.concat([one.reindex(grid[grid <= one.index[-1]], method="ffill") for one in series], axis=1, sort=True)
    return table, points_of * spacing(grid) / width if width else 1.0


def over_seeds(series, smoothed, every=None):
    """Mean, minimum and maximum over seeds at each step, each smoothed if asked, and how many seeds have come so far.

    series, every: as for ``on_one_grid``. Returns a table indexed by step with the columns mean, min, max and seeds.
    """
    if not series:
        return pd.DataFrame(columns=["mean", "min", "max", "seeds"], dtype=float)
    table, stands_for = on_one_grid(series, every)
    columns = {"mean": table.mean(axis=1), "min": table.min(axis=1), "max": table.max(axis=1)}
    if smoothed:
        columns = {name: smooth(column, stands_for) for name, column in columns.items()}
    return pd.DataFrame({**columns, "seeds": table.notna().sum(axis=1)})


def iqm_over_seeds(series, smoothed, every=None, resamples=2000, seed=0):
    """Interquartile mean over seeds at each step, of their curves smoothed if asked, with a 95 % bootstrap band.

    The band is pointwise: the 2.5 and 97.5 percentiles of ``resamples`` interquartile means of seeds drawn with
    replacement, the same draws at each step; of a single seed it is NaN. As ``interquartile_mean`` does, a quarter of
    the seeds, rounded down, is cut off at either end (Agarwal et al. 2021).
    series, every: as for ``on_one_grid``. Returns a table indexed by step with the columns iqm, low, high and seeds.
    """
    if not series:
        return pd.DataFrame(columns=["iqm", "low", "high", "seeds"], dtype=float)
    table, stands_for = on_one_grid(series, every)
    if smoothed:
        # A moving average over what a seed has not logged yet, or no more, would draw it on
        table = table.apply(lambda column: smooth(column, stands_for)).where(table.notna())
    rows = np.full((len(table), 3), math.nan)
    here = table.notna().to_numpy()
    for present in np.unique(here, axis=0):
        if not (count := present.sum()):
            continue
        of_these = np.flatnonzero((here == present).all(axis=1))
        values = table.to_numpy()[np.ix_(of_these, present)]  # (steps, seeds)
        rows[of_these, 0] = stats.trim_mean(values, 0.25, axis=1)
        draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
        if count > 1:
            for i, step_values in zip(of_these, values, strict=True):
                rows[i, 1:] = np.percentile(stats.trim_mean(step_values[draws], 0.25, axis=1), [2.5, 97.5])
    bands = pd.DataFrame(rows, index=table.index, columns=["iqm", "low", "high"])
    return bands.assign(seeds=here.sum(axis=1))


def last_of(series, run, share=0.05):
    """The part of a series in the last ``share`` of what the run has logged, at least its last value."""
    late = series[series.index >= (1 - share) * run.last_step]
    return late if len(late) else series.iloc[-1:]


def final_return(run):
    """Mean return over the last 5 % of the run, each rollout counted once that stands repeatedly on the grid."""
    carried = last_of(run.carried_return(), run)
    fresh = carried.index.isin(run.get(RETURN).index)
    fresh[:1] = True  # the one that was carried into the window
    return carried[fresh].mean()


def final_excess_ratio(run):
    """Figure 6's excess ratio: mean over iterations of the mean ratio above 1 + ε over the mean ratio below 1 − ε.

    The window is 5 % of the run's steps, and ends at the last iteration that has both; with fewer than 10 such
    iterations it grows backwards until it holds them. On MuJoCo the numerator is at most 1e13 and the denominator at
    least 1e-11.
    """
    ratios = excess_ratio(run)
    if ratios.empty:
        return math.nan
    in_window = int((ratios.index > ratios.index[-1] - 0.05 * run.total_steps).sum())
    return ratios.iloc[-max(in_window, 10) :].mean()


def final_values(run):
    """The measures of figure 6: means over the last 5 % of the run, of plasticity over the last 3 checkpoints.

    They are made every 2.5 %. Where only some were probed, the last 3 of these would be of another time.
    """
    values = {name: last_of(run.get(tag), run).mean() for name, tag in FINAL_MEASURES.items()}
    values["return"] = final_return(run)
    values["excess_ratio"] = final_excess_ratio(run)
    plasticity = run.get(PLASTICITY["actor"])
    values["plasticity_loss"] = plasticity[plasticity.index > 0.925 * run.last_step].iloc[-3:].mean()
    return values


SCATTERED = {
    "dead_units": "representation/before/actor/dead_units",
    "pca_rank": "representation/before/actor/pca_rank",
    "preactivation_norm": "representation/before/actor/preactivation_norm",
}


def lowest_windows(run, width, count=20):
    """Figure 4: of a run's windows of ``width`` environment steps, the ``count`` with the lowest ratio below 1 − ε.

    Returns a table indexed by the window's first step: ratio_below and the measures of SCATTERED, means over the
    iterations in the window that have a ratio below.
    """
    table = pd.DataFrame({"ratio_below": run.get("trust_region/ratio_below_mean")}).dropna()
    for name, tag in SCATTERED.items():
        table[name] = run.get(tag).reindex(table.index)
    windows = table.groupby(table.index // width * width).mean()
    return windows.nsmallest(count, "ratio_below").rename_axis("window_start")


def correlations(x, y):
    """Kendall's τ and Spearman's ρ of two arrays; NaN where either is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return stats.kendalltau(x, y).statistic, stats.spearmanr(x, y).statistic


AGREEMENTS = ("Kendall's τ", "Spearman's ρ", "Pearson's r", "1 − distance")


def ranks_of(run):
    """The five ranks of a run's policy after the update, a column each; iterations with one not finite are left out."""
    columns = {rank: run.get(f"representation/after/actor/{rank}") for rank in RANKS}
    return pd.DataFrame(columns).replace([np.inf, -np.inf], np.nan).dropna()


def rank_agreement(ranks):
    """Figure 7: how the five ranks of a run agree, (4, 5, 5) in the order of AGREEMENTS and RANKS.

    The last is 1 − ‖a − b‖ / (√n · 512). The correlations of a rank that is constant are NaN.
    """
    distances = np.linalg.norm(ranks.to_numpy()[:, :, None] - ranks.to_numpy()[:, None, :], axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        agreement = np.stack([ranks.corr(method) for method in ("kendall", "spearman", "pearson")])
    constant = (ranks.nunique() < 2).to_numpy()
    agreement[:, constant[:, None] | constant] = math.nan
    return np.stack([*agreement, 1 - distances / (math.sqrt(len(ranks)) * RANK_SCALE)])


def for_good(condition, least=0):
    """The step from which a series of booleans is true up to its end, None if that is less than ``least`` steps."""
    if condition.empty or not condition.iloc[-1]:
        return None
    false = np.flatnonzero(~condition.to_numpy())
    step = int(condition.index[false[-1] + 1 if len(false) else 0])
    return step if condition.index[-1] - step >= least else None


def settled(series, run):
    """Centred running median over 2 % of the run's steps: noise and single dips go, and a fall stays where it was."""
    width = int(0.02 * run.total_steps / (spacing(run.grid) or run.total_steps)) // 2 * 2 + 1
    return series.rolling(width, center=True, min_periods=1).median()


def settled_return(run):
    """The return with its noise taken off, and the standard error of what is left: series over the steps that have one.

    On MuJoCo that is `settled`, taken to be exact. On Atari the games of one policy differ by about as much as they
    return on average, and 2 % of a run may hold a dozen: there it is the centred mean over 2 % of the run, and over
    400 000 frames (75 games of Phoenix) at the least.
    """
    if run.suite != "Atari":
        score = settled(run.carried_return().dropna(), run)
        return score, 0 * score
    points = run.get(RETURN).dropna()
    half = width_of_returns(run) / 2
    begins = points.index.searchsorted(points.index - half)
    ends = points.index.searchsorted(points.index + half, side="right")
    count, values = ends - begins, points.to_numpy() - points.mean()
    sums, squares = (np.concatenate(([0.0], x.cumsum())) for x in (values, values**2))
    mean = (sums[ends] - sums[begins]) / count
    variance = ((squares[ends] - squares[begins]) - count * mean**2).clip(min=0) / np.maximum(count - 1, 1)
    error = np.where(count > 1, np.sqrt(variance / count), math.inf)  # of a single point nothing is known
    return pd.Series(mean + points.mean(), points.index), pd.Series(error, points.index)


def width_of_returns(run):
    """The environment steps over which `settled_return` looks."""
    return max(0.02 * run.total_steps, RETURN_WINDOW if run.suite == "Atari" else 0)


def excess_ratio(run):
    """Mean ratio above 1 + ε over mean ratio below 1 − ε, at the iterations with both; on MuJoCo bounded (figure 6)."""
    above, below = run.get("trust_region/ratio_above_mean"), run.get("trust_region/ratio_below_mean")
    both = above.index.intersection(below.index)
    above, below = above[both], below[both]
    if run.suite == "MuJoCo":
        above, below = above.clip(upper=1e13), below.clip(lower=1e-11)
    return (above / below).sort_index()


def ratio_broken(run):
    """The first step at which the excess ratio's running median is above 10, None if there is none.

    Clipping at ε 0.1 or 0.2 would keep it at 1.22 or 1.5, if it could hold the ratios.
    """
    beyond = settled(excess_ratio(run), run) > 10
    return int(beyond.idxmax()) if beyond.any() else None


def rank_when_broken(run):
    """The PCA rank's running median when the ratios left their bounds, over its maximum until then; None if neither."""
    step, rank = ratio_broken(run), settled(run.get(DIAGNOSED).dropna(), run)
    until = rank[rank.index <= step] if step is not None else rank[:0]
    return float(until.iloc[-1] / until.max()) if len(until) else None


def collapse(run):
    """When a run collapsed: the steps from which return and PCA rank are low for good, None if they are not.

    The return is low when it is below half of its running maximum (of a maximum below 0: lower than it by half of its
    size); the rank of the policy's features after the update when it is below a tenth of its running maximum. Both are
    taken of what `settled_return` and `settled` leave, and have to last for as long as these look: of the last steps,
    they see one side alone. On Atari it is half of what the maximum has above random play (`benchmark.human`), and all
    that is played from then on must return less than the maximum by three standard errors, since games are few and
    differ. The moving average of the figures would not do: it takes 45 logged iterations to follow a sudden fall to a
    tenth and 14 to a half, and so puts the return first.

    Returns a dict of steps: return_halved, rank_tenth and rank_halved, the conditions each on its own; and collapsed,
    when return and rank are both low.
    """
    score, error = settled_return(run)
    rank = settled(run.get(DIAGNOSED).dropna(), run)
    best, highest = score.cummax(), rank.cummax()
    random, _ = scores_of(run.env_id) or (0.0, 0.0)
    low_return, low_rank = score < best - (best - random).abs() / 2, rank < highest / 10
    since = for_good(low_return, width_of_returns(run))
    if run.suite == "Atari" and since is not None:
        at_best, left = score[:since].idxmax(), run.get(RETURN).loc[since:]
        low_return &= best[since] - left.mean() > 3 * np.hypot(error[at_best], left.sem())
    both = low_return & low_rank.reindex(low_return.index, method="ffill", fill_value=False)
    conditions = {"collapsed": both, "return_halved": low_return, "rank_tenth": low_rank}
    conditions["rank_halved"] = rank < highest / 2
    least = dict.fromkeys(conditions, 0.02 * run.total_steps)
    least["collapsed"] = least["return_halved"] = width_of_returns(run)
    return {name: for_good(condition, least[name]) for name, condition in conditions.items()}
