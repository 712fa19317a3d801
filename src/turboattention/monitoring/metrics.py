"""The watch's and the guard's numbers for Prometheus (needs prometheus-client)."""

from functools import cache
from typing import Any

from turboattention.errors import MissingDependencyError
from turboattention.monitoring.settings import NO_CLIENT
from turboattention.monitoring.shadow import Check

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Summary
except ImportError as error:
    raise MissingDependencyError(NO_CLIENT) from error

ERROR_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
KL_BUCKETS = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


class WatchMetrics:
    """Of the process that runs the layers; every metric has the label ``rank``.

    Sums and counts, so that whoever reads them twice gets the mean of the time between.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def of(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(f"turboattention_{name}", text, ["rank", *labels], registry=registry, **more)

        self._error = of(
            Histogram, "shadow_relative_error", "RMS error of a head's attention output against 16-bit attention.",
            "layer", buckets=ERROR_BUCKETS,
        )  # fmt: skip
        self._kl = of(
            Histogram, "shadow_kl", "KL(16-bit || as stored) of attention weights, nats.", "layer", buckets=KL_BUCKETS
        )  # fmt: skip
        self._values = of(Counter, "page_values", "Values of pages looked at.", "layer", "tensor")
        self._clipped = of(Counter, "page_clipped", "Those outside of their range.", "layer", "tensor")
        self._saturated = of(Counter, "page_saturated", "Codes at an end of their range.", "layer", "tensor")
        self._drift = of(
            Summary, "shadow_drift", "log2 of the size of K and V against the calibration, either way.",
            "layer", "tensor",
        )  # fmt: skip
        self._steps = of(Counter, "watched_steps", "Steps of sequences that could have been checked.")
        self._checked = of(Counter, "shadow_steps", "Steps that were.")
        self._skipped = of(Counter, "shadow_skipped", "Heads no longer watched, by reason.", "reason")
        self._bytes = of(Gauge, "shadow_bytes", "Memory of exact K and V kept.", multiprocess_mode="max")

    def checked(self, check: Check, rank: str = "0") -> None:
        """Add a check."""
        layer = str(check.layer)
        self._error.labels(rank, layer).observe(check.relative_error)
        self._kl.labels(rank, layer).observe(check.kl)
        for tensor, rates in check.codes.items():
            for metric, number in zip((self._values, self._clipped, self._saturated), rates, strict=True):
                metric.labels(rank, layer, tensor).inc(number)
        for tensor, drift in check.drift.items():
            self._drift.labels(rank, layer, tensor).observe(abs(drift))

    def stepped(self, steps: int, checked: int, rank: str = "0") -> None:
        """Steps of sequences that could be checked, and how many of them are."""
        self._steps.labels(rank).inc(steps)
        self._checked.labels(rank).inc(checked)

    def skipped(self, reason: str, rank: str = "0") -> None:
        """A head that is not watched to its end."""
        self._skipped.labels(rank, reason).inc()

    def holds(self, nbytes: int, rank: str = "0") -> None:
        """Bytes of exact K and V held now."""
        self._bytes.labels(rank).set(nbytes)


@cache
def watch_metrics() -> WatchMetrics:
    """Those of this process, in prometheus_client's own registry; registered by the first call."""
    return WatchMetrics()


class GuardMetrics:
    """Of the process that runs a guard: its alarms, last windows and responses."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._alarm = Gauge(
            "turboattention_guard_alarm", "1 while an alarm stands.", ["layer", "measure"], registry=registry
        )  # fmt: skip
        self._window = Gauge(
            "turboattention_guard_window", "Mean of the last window.", ["layer", "measure"], registry=registry
        )  # fmt: skip
        self._responses = Counter(
            "turboattention_guard_responses", "Responses run.", ["response", "outcome"], registry=registry
        )  # fmt: skip

    def window(self, layer: str, measure: str, mean: float, raised: bool) -> None:
        self._window.labels(layer, measure).set(mean)
        self._alarm.labels(layer, measure).set(1 if raised else 0)

    def forgotten(self, layer: str, measure: str) -> None:
        self._alarm.labels(layer, measure).set(0)

    def responded(self, name: str, failed: bool) -> None:
        self._responses.labels(name, "failed" if failed else "done").inc()
