"""What is measured: one operator on one shape, one format and one kind of batch."""

from dataclasses import dataclass, replace
from typing import Literal

from turboattention.config import CacheConfig, presets, with_bits
from turboattention.errors import invalid

Operator = Literal["append", "decode", "prefill"]
PageOrder = Literal["random", "contiguous"]
SHORTEST_RAGGED = 100


@dataclass(frozen=True)
class Case:
    """One measurement.

    op: the operator. query_heads, kv_heads, head_dim: the shape of the layer.
    batch, tokens: sequences, and tokens of each (of the longest when ``ragged``).
    form: a name from `forms`; prefill has no stored form and ignores it.
    causal: of prefill. order: of the pages in the pool. ragged: lengths from 100 tokens to ``tokens``, evenly spaced on
    a logarithmic scale. implementation: of the operator; None lets it choose. name: for tables, free text.
    """

    op: Operator
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    tokens: int = 8192
    form: str = "turbo4"
    causal: bool = True
    order: PageOrder = "random"
    ragged: bool = False
    implementation: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("query_heads", "kv_heads", "head_dim", "batch", "tokens"):
            if getattr(self, name) < 1:
                raise invalid(name, "1 or more", getattr(self, name))
        if self.query_heads % self.kv_heads:
            raise invalid("query_heads", f"a multiple of {self.kv_heads} KV heads", self.query_heads)
        if self.form not in forms():
            raise invalid("preset", f"one of {', '.join(forms())}", repr(self.form))
        if self.ragged and (self.batch < 2 or self.tokens <= SHORTEST_RAGGED):
            raise invalid("ragged batch", f"2 or more sequences, more than {SHORTEST_RAGGED} tokens", self)
        if self.ragged and self.op == "prefill":
            raise invalid("ragged batch", "op decode or append", self.op)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        if not self.ragged:
            return (self.tokens,) * self.batch
        ratio = self.tokens / SHORTEST_RAGGED
        lengths = [round(SHORTEST_RAGGED * ratio ** (i / (self.batch - 1))) for i in range(self.batch)]
        # Long and short ones alternate: an order by length would let a scheduler look better than it is.
        return tuple(lengths[::2] + lengths[1::2][::-1])

    @property
    def total_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def config(self) -> CacheConfig:
        return forms()[self.form]

    def even(self) -> "Case":
        """The even batch of (almost) as many tokens."""
        return replace(self, ragged=False, tokens=self.total_tokens // self.batch)


def forms() -> dict[str, CacheConfig]:
    """Stored forms by name: the presets, and for 4 and 2 bits the steps between them that a table compares."""
    found = {name: preset.cache for name, preset in presets().items()}
    for name in ("turbo4", "turbo2"):
        cache = found[name]
        found[f"{name}-unrefined"] = replace(cache, key=replace(cache.key, refined_share=0.0, refined_bits=0))
    four = found["turbo4"]
    found["turbo4-v2"] = replace(four, value=with_bits(four.value, 2))
    found["turbo4-unrefined-v2"] = replace(found["turbo4-unrefined"], value=with_bits(four.value, 2))
    return found
