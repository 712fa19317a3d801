"""What the plugin does in this process, said once when the memory of the pages is known."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from turboattention.integrations.vllm.settings import PAGE_TOKENS

log = logging.getLogger("vllm.turboattention")  # a child of vLLM's logger, so that it appears in its log
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class LayerCache:
    """The cache of one attention layer.

    name: as vLLM calls it. skipped: why its pages are 16-bit, None where they are ours.
    token_bytes: of all its KV heads in pages. plain_bytes: the same at 16 bits. open_bytes: its open pages.
    """

    name: str
    skipped: str | None
    token_bytes: float
    plain_bytes: float
    open_bytes: int = 0


@dataclass(frozen=True)
class StartReport:
    """What a process of the engine holds.

    policy: its name. layers: in the order of the model. memory: bytes of all pages. open_rows: of the open-page pool.
    other: layers with a state that is no KV cache (Mamba).
    """

    policy: str
    layers: tuple[LayerCache, ...]
    memory: int
    open_rows: int
    other: int = 0

    @property
    def compressed(self) -> int:
        """Layers in our pages."""
        return sum(layer.skipped is None for layer in self.layers)

    @property
    def token_bytes(self) -> float:
        """Of all layers in pages."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def plain_bytes(self) -> float:
        """Of all layers at 16 bits."""
        return sum(layer.plain_bytes for layer in self.layers)

    @property
    def open_bytes(self) -> int:
        """Of the open pages of all layers."""
        return sum(layer.open_bytes for layer in self.layers)

    @property
    def tokens(self) -> int:
        """That fit into the pages when every layer keeps every token."""
        return int(self.memory / self.token_bytes) if self.token_bytes else 0

    def tokens_at(self, bits: int) -> int:
        """That would fit at 16 or 8 bits into the same memory, that of the open pages included."""
        return int((self.memory + self.open_bytes) / (self.plain_bytes * bits / 16)) if self.plain_bytes else 0

    def lines(self) -> list[str]:
        """For a log."""
        total, plain = len(self.layers), self.plain_bytes
        lines = [f"policy {self.policy}: {self.compressed} of {total} attention layers compressed"]
        reasons = defaultdict(list)
        for layer in self.layers:
            if layer.skipped is not None:
                reasons[layer.skipped].append(layer.name)
        lines += [f"16-bit pages ({reason}): {_names(names)}" for reason, names in reasons.items()]
        if self.other:
            lines.append(f"{self.other} layers with a state of their own: not compressed, and not in the numbers below")
        lines.append(f"a token takes {self.token_bytes:.0f} bytes in pages (BF16 {plain:.0f}, FP8 {plain / 2:.0f})")
        ratios = [f"{name} {self.tokens_at(bits):,} ({self.tokens / self.tokens_at(bits):.2f}x)"
                  for name, bits in (("BF16", 16), ("FP8", 8)) if self.tokens_at(bits)]  # fmt: skip
        lines.append(f"{self.tokens:,} KV tokens fit into {self.memory / _GIB:.2f} GiB of pages; {', '.join(ratios)}")
        lines.append(
            f"open pages: {self.open_bytes / _MIB:.1f} MiB for {self.open_rows} rows of {PAGE_TOKENS} exact tokens, "
            "which BF16 and FP8 above may use as well"
        )
        return lines


def _names(names: Sequence[str]) -> str:
    """Layer numbers where every name has one, else the names."""
    numbers = [next((part for part in name.split(".") if part.isdigit()), None) for name in names]
    return ", ".join(name if number is None else number for name, number in zip(names, numbers, strict=True))


def say(report: StartReport) -> None:
    """Write the report into vLLM's log."""
    for line in report.lines():
        log.info("TurboAttention: %s", line)
    if not report.compressed:
        log.warning("TurboAttention: no layer of this process is compressed")
