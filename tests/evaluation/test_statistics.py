"""Block bootstrap against examples worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from turboattention.errors import InvalidInputError
from turboattention.evaluation.statistics import mean_interval, perplexity_interval


def test_constant_values_have_a_point_interval() -> None:
    mean, interval = mean_interval(torch.full((2, 128), 3.0))
    assert (mean, *interval) == (3.0, 3.0, 3.0)


def test_two_blocks_give_the_three_possible_means() -> None:
    """Blocks with means 0 and 1: drawing two of them gives 0 (1/4), 1/2 (1/2) or 1 (1/4), so 95 % spans all."""
    values = torch.cat([torch.zeros(1, 64), torch.ones(1, 64)], dim=1)
    mean, interval = mean_interval(values)
    assert (mean, *interval) == (0.5, 0.0, 1.0)


def test_interval_is_that_of_all_draws() -> None:
    """Four blocks: all 256 draws are enumerable, and their quantiles are those of the bootstrap."""
    means = [0.0, 1.0, 2.0, 9.0]
    draws = [sum(draw) / 4 for draw in itertools.product(means, repeat=4)]
    expected = np.percentile(draws, [2.5, 97.5])
    values = torch.tensor(means).repeat_interleave(64).view(2, 128)
    mean, interval = mean_interval(values, resamples=50_000)
    assert mean == 3.0
    np.testing.assert_allclose(interval, expected, atol=0.26)


def test_short_last_block_counts_by_its_length() -> None:
    values = torch.cat([torch.zeros(1, 64), torch.ones(1, 16)], dim=1)
    mean, interval = mean_interval(values)
    assert mean == 16 / 80
    assert tuple(interval) == (0.0, 1.0)


def test_blocks_do_not_cross_rows() -> None:
    """Rows of 96: blocks of 64 and 32 positions in each row, not three blocks of 64."""
    values = torch.zeros(2, 96)
    values[0, 64:] = 1.0
    values[1, :64] = 1.0
    mean, _ = mean_interval(values)
    assert mean == 0.5
    assert mean_interval(values[:1])[0] == 32 / 96


def test_seed_decides() -> None:
    values = torch.randn(3, 512)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_pairing_removes_what_both_runs_share() -> None:
    """The text's own spread is large; the difference of two runs over it is known far better."""
    text = torch.randn(3, 1024) + 3.0 * torch.randn(3, 16).repeat_interleave(64, dim=1)
    other = text + 0.01 * torch.randn(3, 1024) + 0.1
    difference, paired = mean_interval(other - text)
    _, single = mean_interval(text)
    assert paired.low < 0.1 < paired.high
    assert difference == pytest.approx(0.1, abs=0.005)
    assert paired.high - paired.low < 0.01 * (single.high - single.low)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Blocks of independent normals: about 95 of 100 intervals hold the true mean (a little fewer with 24 blocks)."""
    torch.manual_seed(0)
    covered = 0
    for seed in range(200):
        interval = mean_interval(torch.randn(3, 512), seed=seed, resamples=400)[1]
        covered += interval.low <= 0.0 <= interval.high
    assert 176 <= covered <= 198


def test_perplexity_is_the_exponential() -> None:
    nll = torch.randn(2, 256).abs()
    mean, interval = mean_interval(nll)
    perplexity, bounds = perplexity_interval(nll)
    assert perplexity == math.exp(mean)
    assert tuple(bounds) == (math.exp(interval.low), math.exp(interval.high))


def test_one_block_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 2 blocks of 64 positions, received shape"):
        mean_interval(torch.zeros(1, 64))
