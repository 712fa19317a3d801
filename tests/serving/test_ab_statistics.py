"""Intervals and tests against published and independent values; what limits make of them."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from turboattention.errors import InvalidInputError
from turboattention.serving.limits import Limits, verdict
from turboattention.serving.result import Check, Measured
from turboattention.serving.statistics import (
    bootstrap,
    mcnemar,
    mean,
    paired_share_interval,
    ratio_of_means,
    ratio_of_medians,
    share_interval,
)

Z = stats.norm.ppf(0.975)


def test_exact_values() -> None:
    assert mcnemar(9, 2) == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)
    assert mcnemar(0, 0) == 1.0
    assert share_interval(0, 20) == pytest.approx((0, 1 - 0.025 ** (1 / 20)))  # closed form
    assert share_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=5e-5)  # Clopper and Pearson's tables


def test_paired_share_of_the_paper() -> None:
    """Tango 1998: 44 patients, one of whom changed; and no flips, where the bound is z^2 / (n + z^2)."""
    assert paired_share_interval(1, 0, 44) == pytest.approx((-0.118, 0.060), abs=1e-3)
    bound = Z**2 / (20 + Z**2)
    assert paired_share_interval(0, 0, 20) == pytest.approx((-bound, bound), abs=1e-6)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 30))
def test_paired_share_by_the_likelihood(lost: int, gained: int, other: int) -> None:
    """At its bounds the score is z with the variance of the likeliest table, here found by a search."""
    of = lost + gained + other
    if not 0 < lost + gained < of:
        return
    interval = paired_share_interval(lost, gained, of)
    for bound, sign in ((interval.low, 1), (interval.high, -1)):

        def unlikely(q: float, d: float = bound) -> float:
            """lost with probability q, gained with q + d."""
            cells = ((lost, q), (gained, q + d), (other, 1 - 2 * q - d))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

        low, high = max(0.0, -bound), (1 - bound) / 2
        q = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x
        variance = of * (2 * q + bound - bound**2)
        assert sign * (gained - lost - of * bound) / math.sqrt(variance) == pytest.approx(Z, abs=2e-3)


def test_bootstrap_against_normal_theory() -> None:
    generator = np.random.default_rng(1)
    before = generator.lognormal(3.0, 0.4, 400)
    after = 1.1 * before * generator.lognormal(0.0, 0.05, 400)
    value, interval = bootstrap(mean, after - before)
    error = Z * (after - before).std(ddof=1) / 20
    assert value == pytest.approx((after - before).mean())
    assert interval == pytest.approx((value - error, value + error), rel=0.06)
    for statistic in (ratio_of_means, ratio_of_medians):
        ratio, interval = bootstrap(statistic, after, before)
        assert interval.low < 1.1 < interval.high
        assert interval.high - interval.low < 0.06, "the pairs are kept together"
        assert bootstrap(statistic, after, before) == (ratio, interval), "the same seed"


@pytest.mark.parametrize(
    ("limits", "value", "outcome"),
    [
        ({"max_error_rate": 0.1}, (0.05, 0.01, 0.09), "pass"),
        ({"max_error_rate": 0.1}, (0.05, 0.01, 0.11), "not enough data"),
        ({"max_error_rate": 0.1}, (0.3, 0.11, 0.5), "fail"),
        ({"min_agreement": 0.9}, (0.95, 0.91, 0.99), "pass"),
        ({"min_agreement": 0.9}, (0.8, 0.7, 0.89), "fail"),
        ({"max_length_drift": 0.1}, (1.0, 0.91, 1.09), "pass"),
        ({"max_length_drift": 0.1}, (0.95, 0.85, 1.0), "not enough data"),
        ({"max_length_drift": 0.1}, (0.8, 0.7, 0.89), "fail"),
    ],
)
def test_a_limit_needs_the_whole_interval(
    limits: dict[str, float], value: tuple[float, float, float], outcome: str
) -> None:
    (name, limit), few = next(iter(limits.items())), Measured(*value, 19)
    check = Limits(**limits)._check(name, limit, Measured(*value, 20), "")
    assert check.outcome == outcome
    assert Limits(**limits)._check(name, limit, few, "").outcome == "not enough data"
    assert Limits(**limits)._check(name, limit, None, "no times") == Check(
        name, limit, None, "not enough data", "no times"
    )


def test_the_verdict_is_the_worst_outcome() -> None:
    passed, failed, unclear = (Check("x", 0, None, outcome, "") for outcome in ("pass", "fail", "not enough data"))
    assert verdict([]) == "no limits"
    assert verdict([passed]) == "pass"
    assert verdict([passed, unclear]) == "not enough data"
    assert verdict([passed, unclear, failed]) == "fail"


@pytest.mark.parametrize(
    "wrong", [{"max_score_drop": -0.1}, {"min_agreement": 1.5}, {"max_tpot_ratio": math.nan}, {"confidence": 1.0}]
)
def test_limits_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="--" + next(iter(wrong)).replace("_", "-")):
        Limits(**wrong)
