"""Limits that are set before the answers are seen, and the verdict: pass, fail or not enough data."""

import math
from dataclasses import asdict, dataclass

from turboattention.errors import invalid
from turboattention.serving.result import Check, Measured, Outcome, PairResult, SideResult, Verdict
from turboattention.serving.statistics import CONFIDENCE

MIN_SAMPLES = 20


@dataclass(frozen=True)
class Limits:
    """None: no limit. A limit passes when the whole interval is on its good side, fails when none of it is.

    max_score_drop: of the share of right answers, candidate below baseline.
    min_agreement: share of samples with the same text.
    max_error_rate: of the candidate.
    max_ttft_ratio, max_tpot_ratio: candidate over baseline, medians.
    max_length_drift: distance of the ratio of mean lengths from 1, either way.
    max_logprob_distance: mean absolute difference in nats per token of the common prefix.
    min_samples: with fewer there is no pass and no fail.
    """

    max_score_drop: float | None = None
    min_agreement: float | None = None
    max_error_rate: float | None = None
    max_ttft_ratio: float | None = None
    max_tpot_ratio: float | None = None
    max_length_drift: float | None = None
    max_logprob_distance: float | None = None
    min_samples: int = MIN_SAMPLES
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        shares = ("max_score_drop", "min_agreement", "max_error_rate")
        for name, value in asdict(self).items():
            option = "--" + name.replace("_", "-")
            if value is None:
                continue
            if not math.isfinite(value) or value < 0:
                raise invalid(option, "a finite number of at least 0", value)
            if name in shares and value > 1:
                raise invalid(option, "a share from 0 to 1", value)
        if self.min_samples < 2:
            raise invalid("--min-samples", "at least 2", self.min_samples)
        if not 0.5 <= self.confidence < 1:
            raise invalid("--confidence", "a number from 0.5 to below 1", self.confidence)

    def checks(self, candidate: SideResult, paired: PairResult, comparable: bool) -> list[Check]:
        """One check for each limit; ``comparable``: both sides cut text into the same tokens."""
        tokens = "" if comparable else "the sides cut text into different tokens"
        found = {  # and why there may be none
            "max_score_drop": (_negative(paired.score_difference), "no references in the requests"),
            "min_agreement": (paired.same, "no pair of answers"),
            "max_error_rate": (candidate.error_rate, "no answers"),
            "max_ttft_ratio": (paired.ttft_ratio, "no times"),
            "max_tpot_ratio": (paired.tpot_ratio, tokens or "no answers of two tokens"),
            "max_length_drift": (paired.length_ratio, "no pair of answers"),
            "max_logprob_distance": (paired.logprob_distance, tokens or "no log-probabilities"),
        }
        limits = ((name, getattr(self, name)) for name in found)
        return [self._check(name, limit, *found[name]) for name, limit in limits if limit is not None]

    def _check(self, name: str, limit: float, value: Measured | None, why: str) -> Check:
        if value is None:
            return Check(name, limit, value, "not enough data", why)
        if value.samples < self.min_samples:
            reason = f"{value.samples} samples, {self.min_samples} are needed"
            return Check(name, limit, value, "not enough data", reason)
        if name == "max_length_drift":
            low, high, good = 1 - limit, 1 + limit, f"within {1 - limit:g} to {1 + limit:g}"
        elif name.startswith("min_"):
            low, high, good = limit, math.inf, f"at least {limit:g}"
        else:
            low, high, good = -math.inf, limit, f"at most {limit:g}"
        outcome: Outcome = "not enough data"
        if low <= value.low and value.high <= high:
            outcome = "pass"
        elif value.high < low or value.low > high:
            outcome = "fail"
        where = {"pass": "is", "fail": "is not", "not enough data": "is only partly"}[outcome]
        return Check(name, limit, value, outcome, f"the interval {where} {good}")


def _negative(value: Measured | None) -> Measured | None:
    return None if value is None else Measured(0.0 - value.value, 0.0 - value.high, 0.0 - value.low, value.samples)


def verdict(checks: list[Check]) -> Verdict:
    """The worst outcome: one limit that fails is a fail, whatever is still open."""
    outcomes = {check.outcome for check in checks}
    if not outcomes:
        return "no limits"
    if "fail" in outcomes:
        return "fail"
    return "not enough data" if "not enough data" in outcomes else "pass"
