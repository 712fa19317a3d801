"""What a comparison found, as plain data: the report and the command line only render it, JSON is the same object."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

SCHEMA = 1


class Interval(NamedTuple):
    """A 95 % bootstrap interval over blocks of positions."""

    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Values for a plot: ``x`` are the left edges (histogram) or first positions (curve) of the bins."""

    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class BaselineResult:
    """Ordinary attention with a 16-bit cache."""

    perplexity: float
    perplexity_ci: Interval
    kv_bytes: int  # 2 bytes a value, also when the run itself computed in float32
    prefill_tokens_per_s: float
    decode_ms_per_token: float
    continuation: str


@dataclass(frozen=True)
class CandidateResult:
    """One preset or policy against the baseline, on the same tokens."""

    preset: str
    perplexity: float
    perplexity_ci: Interval
    delta_nll: float  # nats per token added by the candidate, paired
    delta_nll_ci: Interval
    kl_mean: float  # KL(baseline || candidate) in nats, mean over positions
    kl_ci: Interval
    top1_agreement: float  # share of positions with the same most likely token
    top1_ci: Interval
    kv_bytes: int  # every byte that the cache holds after `tokens` tokens of every window
    bits_per_value: float
    compression: float  # 16 / bits_per_value
    prefill_tokens_per_s: float
    decode_ms_per_token: float
    continuation: str
    kl_by_position: Series = field(repr=False)
    kl_histogram: Series = field(repr=False)


@dataclass(frozen=True)
class ComparisonResult:
    """The baseline and all candidates of one run of `compare`."""

    environment: dict[str, Any]
    model: str
    text: list[str]  # names of the texts; each gives one window
    tokens: int  # tokens of a window
    prompt: str
    baseline: BaselineResult
    candidates: list[CandidateResult]
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``schema`` stands first."""
        data = asdict(self)
        return {"schema": data.pop("schema"), **data}
