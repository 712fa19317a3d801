"""A plan as plain data: the report and the command line only render it, JSON is the same object."""

from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Speed:
    """A full batch in the middle of its answers.

    bound: what a step is spent on most: host, weights, compute, cache, launches or exchanges. The last three fields
    count prompts too: of each request its prompt is read once, while no other token is made. kwh_per_million: at the
    power limit of the cards.
    """

    batch: int
    ms_per_token: float
    bound: str
    first_token_ms: float
    tokens_per_s: float
    dollars_per_million: float | None
    kwh_per_million: float


@dataclass(frozen=True)
class FormPlan:
    """One way to store the cache.

    runs_in: "vLLM" or "transformers". bits_per_value, sequence_bytes: at the plan's context, every byte counted.
    token_bytes: of one more token. largest_batch: sequences of that context, whatever `max_batch`. largest_context: of
    each sequence of `batch`, no more than the model was made for.
    same: speed at the batch that all are compared at; own: at its own largest batch (at most `max_batch`); None where
    it does not fit or has no time, why_no_speed says the reason.
    """

    name: str
    runs_in: str
    bits_per_value: float
    token_bytes: float
    sequence_bytes: int
    largest_batch: int
    largest_context: int
    same: Speed | None
    own: Speed | None
    why_no_speed: str = ""


@dataclass(frozen=True)
class Gain:
    """Time of a 16-bit step over that of a compressed one; None where the batch does not fit in 16 bits."""

    batch: int
    context: int
    against_bf16: float | None
    against_fp8: float | None
    fits: bool


@dataclass(frozen=True)
class PlanResult:
    """Everything that ``turboattention plan`` found out.

    cards: that share every layer; all bytes are those of all of them.
    weight_bytes, free_bytes: of the model, and what is left for the cache. candidate: the form of ``gains``.
    notes: what is assumed, and where nothing is gained, in sentences. sources: measured rows behind the times.
    """

    model: str
    parameters: int
    layers: int
    compressed_layers: int
    kv_heads: int
    head_dim: int
    gpu: str
    cards: int
    prompt: int
    output: int
    batch: int
    max_batch: int
    weight_bytes: float
    free_bytes: float
    forms: tuple[FormPlan, ...]
    candidate: str
    gains: tuple[Gain, ...]
    notes: tuple[str, ...]
    sources: tuple[str, ...]
    schema: int = SCHEMA

    @property
    def context(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt + self.output

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"context": self.context}
