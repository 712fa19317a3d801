"""The open pages of one layer: the newest tokens of every sequence, exact, and what its queries said so far."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.errors import UnsupportedError
from turboattention.integrations.vllm.settings import PAGE_TOKENS
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV
from turboattention.quant.layout import PageLayout

if TYPE_CHECKING:
    from turboattention.integrations.vllm.metadata import Lengths  # imports vLLM, which a planner does without


@dataclass(frozen=True)
class OpenPages:
    """Rows for sequences; the last row is for padding.

    key, value: ``[rows, kv_heads, capacity, head_dim]``; a token is in slot ``position % capacity``, which is 64, more
        where drafts need room.
    power: float32 ``[rows, kv_heads, head_dim]``, sums of squared queries; None where the format refines no channels.
    """

    layout: PageLayout
    key: Tensor
    value: Tensor
    power: Tensor | None

    @classmethod
    def allocate(
        cls,
        layout: PageLayout,
        rows: int,
        kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int = PAGE_TOKENS,
    ) -> "OpenPages":
        """Zeros; float16 for models in float32, as pages round anyway.

        Raises torch.OutOfMemoryError that says how much was wanted and what to lower.
        """
        stored = dtype if dtype.itemsize == 2 else torch.float16
        shape = (rows, kv_heads, capacity, layout.head_dim)
        refines = bool(layout.key.refined_channels(layout.head_dim))
        try:
            key, value = (torch.zeros(shape, dtype=stored, device=device) for _ in range(2))
            power = (
                torch.zeros(rows, kv_heads, layout.head_dim, dtype=torch.float32, device=device) if refines else None
            )
        except torch.OutOfMemoryError as error:
            wanted = rows * kv_heads * layout.head_dim * (2 * stored.itemsize * capacity + 4 * refines)
            raise torch.OutOfMemoryError(
                f"open pages of a layer: expected {wanted / 2**20:.1f} MiB for {rows} rows of {capacity} tokens, "
                f"received no memory ({error}); lower --max-num-seqs, or free memory of the device"
            ) from error
        return cls(layout, key, value, power)

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes + (0 if self.power is None else self.power.nbytes)

    def view(self, kv_cache: Tensor, numbers: "Lengths", *, after: bool) -> PagedKV:
        """The cache of some sequences before or after their new tokens.

        kv_cache: vLLM's blocks, uint8 ``[blocks, kv_heads, 64, bytes of a token]``. Raises UnsupportedError where vLLM
        has padded them to the larger pages of other layers.
        """
        heads = self.key.shape[1]
        if not kv_cache.is_contiguous():
            raise UnsupportedError(
                "vLLM: blocks of compressed pages are padded to the size of another layer's block; use a larger "
                "--block-size, a multiple of 64"
            )
        pool = kv_cache.view(torch.uint8).view(-1, self.layout.nbytes)
        group = PagedGroup(self.layout, tuple(range(heads)), pool, numbers.table)
        sink_key, sink_value = self._sinks(pool, heads)
        lengths, paged = (
            (numbers.after, numbers.paged_after) if after else (numbers.before, numbers.paged_before)
        )  # fmt: skip
        return PagedKV(
            (group,), lengths, paged, self.key, self.value, sink_key, sink_value, numbers.rows,
            None if sink_key is None else numbers.sinks,
        )  # fmt: skip

    def _sinks(self, pool: Tensor, heads: int) -> tuple[Tensor | None, Tensor | None]:
        """The exact first tokens ``[blocks, kv_heads, sinks, head_dim]`` in the pages themselves."""
        regions, count = self.layout.regions, self.layout.sink_tokens
        if not count:
            return None, None
        words = pool.view(self.key.dtype).view(-1, heads, self.layout.nbytes // 2)
        parts = []
        for name in ("sink_key", "sink_value"):
            first = regions[name].offset // 2
            parts.append(words[..., first : first + count * self.layout.head_dim].unflatten(-1, (count, -1)))
        return parts[0], parts[1]
