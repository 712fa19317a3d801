"""What an A/B run found, as plain data: reports only render it, JSON is the same object."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

SCHEMA = 1
Verdict = Literal["pass", "fail", "not enough data", "no limits"]
Outcome = Literal["pass", "fail", "not enough data"]


class Measured(NamedTuple):
    """A value, its interval at the run's confidence, and how many samples it comes from."""

    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Spread:
    """Percentiles; milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class SideResult:
    """One side over all samples that it was asked."""

    description: dict[str, str]
    answers: int  # asked, errors included
    errors: dict[str, int]  # by kind
    error_rate: Measured
    error_examples: list[str]
    ttft_ms: Spread | None  # time to the first token
    tpot_ms: Spread | None  # time per token after the first, of an answer
    gap_ms: Spread | None  # between neighbouring pieces of a stream: stalls show here
    tokens_per_s: float | None  # written tokens over the time with at least one request in flight
    tokens: float | None  # mean of an answer
    characters: float | None
    score: float | None  # share right, an error counts as wrong


@dataclass(frozen=True)
class Flip:
    """A sample whose score, or only whose text, differs."""

    id: str
    kind: Literal["lost", "gained", "differs"]
    prompt: str
    references: list[str]
    baseline: str
    candidate: str
    prefix: int  # characters before the first difference


@dataclass(frozen=True)
class PairResult:
    """The candidate against the baseline on samples that both answered."""

    pairs: int
    same: Measured | None  # share with the same text
    prefix_share: Measured | None  # of the longer text, before the first difference
    first_difference: float | None  # median over differing pairs: tokens, or characters where there are none
    first_difference_unit: Literal["tokens", "characters"]
    logprob_difference: Measured | None  # candidate minus baseline, nats per token of the common prefix
    logprob_distance: Measured | None  # mean absolute value of it
    logprob_tokens: int
    scored: int  # samples with references; an answer that failed is wrong
    score_difference: Measured | None  # Tango's interval
    score_bootstrap: Measured | None  # the same difference, bootstrap interval
    mcnemar_p: float | None
    lost: int
    gained: int
    length_ratio: Measured | None  # of mean lengths: tokens, or characters where tokens are not comparable
    length_unit: Literal["tokens", "characters"]
    ttft_ratio: Measured | None  # of medians
    tpot_ratio: Measured | None  # of medians


@dataclass(frozen=True)
class Check:
    """One limit against what was measured; ``value`` None where there was nothing to measure."""

    name: str
    limit: float
    value: Measured | None
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Curves:
    """For plots: times of each side in ms, sorted; share of pairs still the same after so many characters."""

    ttft_ms: dict[str, list[float]]
    tpot_ms: dict[str, list[float]]
    characters: list[int]
    agreeing: list[float]


@dataclass(frozen=True)
class ABResult:
    """A run, whole or interrupted.

    stopped: why it is partial; "" for a whole run.
    remarks: what a reader has to know: left-out lines, mixed tokenizers, missing log-probabilities.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    requests: int
    bad_lines: list[dict[str, Any]]
    stopped: str
    remarks: list[str]
    baseline: SideResult
    candidate: SideResult
    paired: PairResult
    checks: list[Check]
    verdict: Verdict
    flips: list[Flip] = field(repr=False)
    curves: Curves = field(repr=False)
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``schema`` stands first."""
        data = asdict(self)
        return {"schema": data.pop("schema"), **data}
