"""Means with bootstrap intervals over blocks of positions: neighbours depend on each other, blocks hardly."""

import math

import numpy as np
from torch import Tensor

from turboattention.errors import invalid
from turboattention.evaluation.result import Interval

BLOCK = 64
CONFIDENCE = 0.95
RESAMPLES = 2000


def mean_interval(
    values: Tensor, seed: int = 0, block: int = BLOCK, resamples: int = RESAMPLES
) -> tuple[float, Interval]:
    """Mean of ``values`` [rows, positions] and its 95 % interval.

    Each row is cut into blocks of ``block`` positions (the last may be shorter) and whole blocks are drawn with
    replacement. Give differences of two runs over the same tokens for a paired interval; the same ``seed`` draws the
    same blocks for every quantity.
    """
    sums, counts = _blocks(values, block)
    if len(sums) < 2:
        raise invalid("values", f"at least 2 blocks of {block} positions", f"shape {tuple(values.shape)}")
    chosen = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    tail = 100.0 * (1.0 - CONFIDENCE) / 2.0
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(sums.sum() / counts.sum()), Interval(float(low), float(high))


def perplexity_interval(nll: Tensor, seed: int = 0) -> tuple[float, Interval]:
    """Perplexity, the exponential of the mean of ``nll`` [rows, positions] in nats, and its 95 % interval."""
    mean, interval = mean_interval(nll, seed)
    return math.exp(mean), Interval(math.exp(interval.low), math.exp(interval.high))


def _blocks(values: Tensor, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of values of each block, over all rows."""
    table = values.detach().double().cpu().numpy()
    starts = np.arange(0, table.shape[1], block)
    sums = np.add.reduceat(table, starts, axis=1)
    counts = np.diff(np.append(starts, table.shape[1]))
    return sums.ravel(), np.tile(counts, table.shape[0])
