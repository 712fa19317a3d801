"""The plugin's numbers among those of vLLM's /metrics.

They live in prometheus_client's registry of each process that runs layers. vLLM's server, a process of its own, sees
them where PROMETHEUS_MULTIPROC_DIR names a directory for all of them, as ``turboattention serve`` does.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from turboattention.integrations.vllm.report import StartReport
from turboattention.ops.append.paged import BEYOND_FLOAT16, NO_ROOM, NOT_FINITE

FAULTS = {NOT_FINITE: "not_finite", BEYOND_FLOAT16: "beyond_float16", NO_ROOM: "no_room"}


@dataclass(frozen=True)
class Metrics:
    """Gauges of the start and counters of the work; every one has the label ``rank``."""

    layers: Any
    token_bytes: Any
    tokens: Any
    open_bytes: Any
    faults: Any

    def started(self, report: StartReport, rank: str) -> None:
        """Set what does not change any more."""
        self.layers.labels(rank, "compressed").set(report.compressed)
        self.layers.labels(rank, "16bit").set(len(report.layers) - report.compressed)
        for fmt, bytes_, tokens in (
            (report.policy, report.token_bytes, report.tokens),
            ("bfloat16", report.plain_bytes, report.tokens_at(16)),
            ("fp8", report.plain_bytes / 2, report.tokens_at(8)),
        ):
            self.token_bytes.labels(rank, fmt).set(bytes_)
            self.tokens.labels(rank, fmt).set(tokens)
        self.open_bytes.labels(rank).set(report.open_bytes)
        for name in FAULTS.values():
            self.faults.labels(rank, name)  # so that 0 is seen


@cache
def metrics() -> Metrics:
    """The metrics of this process, registered by the first call."""
    from prometheus_client import Counter, Gauge  # vLLM needs it; this package does not

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"turboattention_{name}", text, ["rank", *labels], multiprocess_mode="max")

    return Metrics(
        gauge("layers", "Attention layers.", "pages"),
        gauge("kv_bytes_per_token", "Bytes of a token in the pages of all layers.", "format"),
        gauge("kv_tokens", "Tokens that fit into the pages, and would in other formats.", "format"),
        gauge("open_page_bytes", "Memory of the open pages."),
        Counter("turboattention_faults", "Sequences with a token that no page can hold.", ["rank", "kind"]),
    )
