"""Limits of what a watch measures, with the distance between raising an alarm and clearing it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from turboattention.errors import invalid

# What a limit can be about, and what the number is.
MEASURES = {
    "relative_error": "RMS error of a head's attention output over the output's RMS",
    "kl": "KL(16-bit || as stored) of the attention weights, nats",
    "key_clipped": "share of K's values more than half a step outside of their range",
    "value_clipped": "share of V's values more than half a step outside of their range",
    "key_saturated": "share of K's codes at an end of their range",
    "value_saturated": "share of V's codes at an end of their range",
    "key_drift": "log2 of the size of K against the calibration, either way",
    "value_drift": "log2 of the size of V against the calibration, either way",
    "faults": "sequences with a token that no page can hold (all layers together)",
}
ALL_LAYERS = "all"


@dataclass(frozen=True)
class Limit:
    """A bound of one measure, judged for each layer by the mean of a window.

    high: an alarm is raised after ``raise_after`` windows in a row above it. low: it is cleared after ``clear_after``
    windows in a row below it; None: 0.8 times high. checks: in a window, at least. by_layer: other highs; low keeps
    its distance from them.
    """

    measure: str
    high: float
    low: float | None = None
    checks: int = 8
    raise_after: int = 2
    clear_after: int = 4
    by_layer: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise invalid("limit", f"one of {', '.join(MEASURES)}", repr(self.measure))
        if not 0 <= self.high < float("inf"):
            raise invalid(f"limit {self.measure}", "a number from 0", self.high)
        if self.low is not None and not 0 <= self.low <= self.high:
            raise invalid(f"limit {self.measure}", f"a lower bound from 0 to {self.high:g}", self.low)
        for name in ("checks", "raise_after", "clear_after"):
            if getattr(self, name) < 1:
                raise invalid(f"limit {self.measure}: {name}", "1 or more", getattr(self, name))

    def bounds(self, layer: str) -> tuple[float, float]:
        """High and low of a layer."""
        high = self.by_layer.get(layer, self.high)
        share = 0.8 if self.low is None or not self.high else self.low / self.high
        return high, high * share

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """``measure=high`` or ``measure=high:low``."""
        measure, equals, bounds = text.partition("=")
        high, colon, low = bounds.partition(":")
        if not equals:
            raise invalid("limit", "MEASURE=HIGH or MEASURE=HIGH:LOW", repr(text))
        try:
            return _shaped(cls(measure.strip(), float(high), float(low) if colon else None))
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise invalid(f"limit {measure}", "numbers", repr(bounds)) from error


def _shaped(limit: Limit) -> Limit:
    # A fault is wrong at once, and no mean of checks.
    return replace(limit, checks=1, raise_after=1) if limit.measure == "faults" else limit


def default_limits() -> list[Limit]:
    """Of turbo4 and better; docs/monitoring.md says from which measurements, and what other presets need."""
    return [Limit("relative_error", 0.25), Limit("kl", 0.3), _shaped(Limit("faults", 0.0))]


def chosen_limits(
    given: Iterable[str] = (), expected: Mapping[str, float] | None = None, factor: float = 3.0
) -> list[Limit]:
    """The default limits with those of ``given`` (texts of `Limit.parse`) in place of theirs.

    expected: relative errors by layer that a calibration found (`expected_errors`); their limit is ``factor`` times
    that, for layers it names. Raises InvalidInputError for a measure given twice.
    """
    if not factor > 1.0:
        raise invalid("factor", "above 1", factor)
    limits = {limit.measure: limit for limit in default_limits()}
    own: Sequence[Limit] = [Limit.parse(text) for text in given]
    for limit in own:
        if sum(other.measure == limit.measure for other in own) > 1:
            raise invalid("limits", "each measure once", limit.measure)
        limits[limit.measure] = limit
    if expected is not None:
        highs = {layer: factor * error for layer, error in expected.items()}
        limits["relative_error"] = replace(limits["relative_error"], by_layer=highs)
    return list(limits.values())
