"""What a calibration found, as plain data: the report and the command line only render it, JSON is the same object."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from turboattention.evaluation.result import Interval, Series

SCHEMA = 1
Kind = Literal["chosen", "calibrated", "uniform", "paper", "kivi", "rule"]


@dataclass(frozen=True)
class Point:
    """One policy measured on text; all numbers through the real cache.

    kind: ``chosen`` (the policy that was written), ``calibrated`` (other sizes of the same allocation), ``uniform``,
        ``paper`` and ``kivi`` (presets), ``rule`` (the paper's choice of heads with our formats).
    added_nats: nats per token more than with 16 bits, paired. kl: KL(16-bit || policy), nats per token.
    kl_by_text: the same for each text alone. kl_by_position: mean of blocks of 64 tokens.
    """

    name: str
    kind: Kind
    bits_per_value: float
    kl: float
    kl_ci: Interval
    added_nats: float
    added_nats_ci: Interval
    top1_agreement: float
    kl_by_text: dict[str, float]
    kl_by_position: Series = field(repr=False)


@dataclass(frozen=True)
class ProbeResult:
    """A unit at a level: estimated and measured KL, nats per token."""

    unit: str
    level: str
    estimated: float
    measured: float


@dataclass(frozen=True)
class LayerBits:
    """What a layer got: mean bits of the codes of K and of V over its heads, and the share of the predicted loss."""

    layer: int
    key_bits: float
    value_bits: float
    loss_share: float


@dataclass(frozen=True)
class HeadError:
    """Output of one head's attention (mean over its query heads and queries), relative to the output's size.

    bound: follows from the scales of its pages alone; seen: what the codes did.
    """

    layer: int
    head: int
    bound: float
    seen: float


@dataclass(frozen=True)
class Retrieval:
    """Secret codes found again in a long text: share found exactly, and nats per digit token."""

    name: str
    bits_per_value: float
    exact: float
    gold_nll: float


@dataclass(frozen=True)
class Break:
    """The most bits at which a measure leaves its limit, going down the calibrated sizes; None: it never does."""

    measure: str
    limit: float
    bits_per_value: float | None
    value: float | None


@dataclass(frozen=True)
class CalibrationResult:
    """One run of `calibrate`.

    tokens: of calibration windows (sensitivity and tuning); held_out_tokens: of each held-out window.
    predicted_kl: of the chosen policy by the sensitivities; tuning: the same policy on the tuning windows.
    points: on held-out text, the chosen policy first.
    spearman: rank correlation of estimates and measurements of ``probes``; None when nothing was measured.
    depth: relative error of the hidden state after each layer, of the chosen policy.
    within_target: whether the chosen policy meets the target on held-out text.
    """

    environment: dict[str, Any]
    model: str
    texts: list[str]
    held_out: list[str]
    tokens: int
    held_out_tokens: int
    target: str
    per: str
    seed: int
    predicted_kl: float
    tuning: Point
    points: list[Point]
    within_target: bool
    layers: list[LayerBits]
    probes: list[ProbeResult]
    spearman: float | None
    depth: list[float]
    heads: list[HeadError]
    retrieval: list[Retrieval]
    retrieval_tokens: int
    breaks: list[Break]
    seconds: dict[str, float]
    schema: int = SCHEMA

    @property
    def chosen(self) -> Point:
        """The policy that was written, on held-out text."""
        return self.points[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``schema`` stands first."""
        data = asdict(self)
        return {"schema": data.pop("schema"), **data}
