"""Intervals and tests for paired samples: bootstrap and exact tests from SciPy, Tango's interval for flips."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Values = NDArray[np.float64]
CONFIDENCE = 0.95
RESAMPLES = 2000


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


def share_interval(hits: int, of: int, confidence: float = CONFIDENCE) -> Interval:
    """Exact (Clopper-Pearson) interval of a share."""
    found = stats.binomtest(hits, of).proportion_ci(confidence, method="exact")
    return Interval(float(found.low), float(found.high))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value for as many losses as gains; 1 without flips."""
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def paired_share_interval(lost: int, gained: int, of: int, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval (Statistics in Medicine 17, 1998) of (gained - lost) / of.

    A bootstrap of samples without a flip is the interval 0 to 0, however few they are; this one narrows as 1 / of.
    """
    z = float(stats.norm.ppf(0.5 + confidence / 2))

    def score(difference: float) -> float:
        b = -gained - lost + (2 * of - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        q = (math.sqrt(max(0.0, b * b - 8 * of * c)) - b) / (4 * of)  # the likeliest share of losses
        variance = of * (2 * q + difference * (1 - difference))
        gap = gained - lost - of * difference
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    centre = (gained - lost) / of
    edge = 1 - 1e-9
    low = -1.0 if score(-edge) < z else optimize.brentq(lambda d: min(score(d), 1e3) - z, -edge, centre)
    high = 1.0 if score(edge) > -z else optimize.brentq(lambda d: max(score(d), -1e3) + z, centre, edge)
    return Interval(float(low), float(high))


def bootstrap(
    statistic: Callable[..., Values | float],
    *columns: Sequence[float] | Values,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, Interval]:
    """``statistic(*columns, axis=-1)`` and its percentile interval over samples drawn with all their columns."""
    data = [np.asarray(column, dtype=np.float64) for column in columns]
    value = float(statistic(*data, axis=-1))
    if len(data[0]) < 2:
        return value, Interval(-math.inf, math.inf)
    found = stats.bootstrap(
        data, statistic, n_resamples=RESAMPLES, confidence_level=confidence, method="percentile", paired=True,
        vectorized=True, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return value, Interval(float(found.low), float(found.high))


def mean(values: Values, axis: int = -1) -> Values:
    """For `bootstrap`."""
    return np.asarray(values.mean(axis=axis))


def ratio_of_means(numerator: Values, denominator: Values, axis: int = -1) -> Values:
    """For `bootstrap`; also a mean of sums over sums, where each sample brings a sum and a count."""
    return np.asarray(numerator.mean(axis=axis) / denominator.mean(axis=axis))


def ratio_of_medians(numerator: Values, denominator: Values, axis: int = -1) -> Values:
    """For `bootstrap`."""
    return np.asarray(np.median(numerator, axis=axis) / np.median(denominator, axis=axis))
