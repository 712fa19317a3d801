"""What a calibration aims at."""

import math
from dataclasses import dataclass
from typing import Literal

from turboattention.calibration.result import Point
from turboattention.errors import invalid

Kind = Literal["max-kl", "max-ppl-increase", "bits"]
KINDS: tuple[Kind, ...] = ("max-kl", "max-ppl-increase", "bits")
_EXPECTED = f"one of {', '.join(f'{kind}=NUMBER' for kind in KINDS)}"


@dataclass(frozen=True)
class Target:
    """``max-kl`` in nats per token, ``max-ppl-increase`` as a share (0.01: one per cent), ``bits`` per value."""

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise invalid("target", _EXPECTED, repr(self.kind))
        if not (math.isfinite(self.value) and self.value > 0):
            raise invalid(f"target {self.kind}", "a positive number", self.value)

    @classmethod
    def parse(cls, text: str) -> "Target":
        """``max-kl=0.01`` and the like."""
        kind, _, number = text.partition("=")
        known = next((x for x in KINDS if x == kind.strip()), None)
        if known is None:
            raise invalid("target", _EXPECTED, repr(kind))
        try:
            value = float(number)
        except ValueError:
            raise invalid(f"target {known}", "a positive number", repr(number)) from None
        return cls(known, value)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"

    @property
    def loss(self) -> float | None:
        """The limit in nats per token; None for a target of size."""
        if self.kind == "bits":
            return None
        return self.value if self.kind == "max-kl" else math.log1p(self.value)

    def loss_seen(self, point: Point) -> float:
        """What must stay within `loss`.

        The added nats of a text may be below zero by chance; KL, their mean under the model itself, may not. So a limit
        of perplexity limits both.
        """
        return max(point.kl, point.added_nats) if self.kind == "max-ppl-increase" else point.kl

    def met(self, point: Point) -> bool:
        """Whether a measured policy is good (or small) enough."""
        if self.loss is None:
            return point.bits_per_value <= self.value + 1e-9
        return self.loss_seen(point) <= self.loss
