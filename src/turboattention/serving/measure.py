"""Lists of numbers to values with intervals; None where there is nothing to measure."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from turboattention.serving.result import Measured, Spread
from turboattention.serving.statistics import bootstrap, paired_share_interval, share_interval


def share(hits: int, of: int, confidence: float) -> Measured | None:
    """A share with its exact interval."""
    return Measured(hits / of, *share_interval(hits, of, confidence), of) if of else None


def flip_difference(lost: int, gained: int, of: int, confidence: float) -> Measured | None:
    """Difference of two shares over the same samples with Tango's interval."""
    return Measured((gained - lost) / of, *paired_share_interval(lost, gained, of, confidence), of) if of else None


def bootstrapped(
    statistic: Callable[..., Any], columns: Sequence[Sequence[float]], confidence: float
) -> Measured | None:
    """None too for one sample, which has no interval, and where a resample divides by zero."""
    if len(columns[0]) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value, interval = bootstrap(statistic, *columns, confidence=confidence)
    found = Measured(value, *interval, len(columns[0]))
    return found if all(map(math.isfinite, found)) else None


def spread(values: Sequence[float]) -> Spread | None:
    """Percentiles, interpolated."""
    return Spread(*(float(value) for value in np.percentile(values, [50, 90, 99]))) if values else None


def average(values: Sequence[float]) -> float | None:
    """The plain mean."""
    return sum(values) / len(values) if values else None
