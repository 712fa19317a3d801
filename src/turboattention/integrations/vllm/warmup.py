"""Every kernel that serving can need is compiled before the first request, by steps on invented tokens."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from turboattention.integrations.vllm.drafts import Drafts
from turboattention.integrations.vllm.impl import TurboAttentionImpl
from turboattention.integrations.vllm.metadata import Lengths, TurboMetadata
from turboattention.integrations.vllm.parts import parts_of
from turboattention.integrations.vllm.settings import PAGE_TOKENS
from turboattention.ops.append.packed import Packed

PREFIX, CHUNK = 2 * PAGE_TOKENS, PAGE_TOKENS + 16  # tokens: pages before a chunk, and a page inside of it


def warm_up(
    layers: Iterable[TurboAttentionImpl], *, sequences: int, blocks: int, spare_row: int, width: int = 1
) -> int:
    """Run decode at every batch size that compiles anew, and chunks with and without a prefix, once for each format.

    layers: those of this process. sequences: largest batch. blocks: columns of the engine's block table, because the
    kernels are compiled for its strides. spare_row: of the open pages, the only one that is written. width: tokens of
    a decode step. The pages are this function's own. Returns how many formats there were.
    """
    formats: dict[Any, TurboAttentionImpl] = {}
    for layer in layers:
        formats.setdefault((layer.pages.layout, layer.num_heads, layer.num_kv_heads, layer.policy.attention), layer)
    for layer in formats.values():
        device, heads = layer.pages.key.device, layer.num_kv_heads
        # All sequences have the same blocks: what is in them does not matter.
        pool = torch.zeros(4, heads, PAGE_TOKENS, layer.pages.layout.nbytes // PAGE_TOKENS, dtype=torch.uint8)
        table = torch.zeros(sequences, heads, max(blocks, 4), dtype=torch.int32)
        table[:, :, :4] = torch.arange(4) * heads + torch.arange(heads)[:, None]
        pool, table = pool.to(device), table.to(device)
        steps = list(_steps(sequences, spare_row, table, width))
        checksums, layer.checksums = layer.checksums, None  # these steps read pages that nothing has written
        if device.type == "cuda":
            # Most of the compiler runs without Python's lock. These three share few kernels.
            with ThreadPoolExecutor(3) as threads:
                list(threads.map(partial(_step, layer, pool), (steps[0], steps[-3], steps[-1])))
        for meta in steps:
            _step(layer, pool, meta)
        layer.checksums = checksums
        if layer.pages.power is not None:
            layer.pages.power[spare_row] = 0.0
    return len(formats)


@torch.inference_mode()
def _step(layer: TurboAttentionImpl, pool: Tensor, meta: TurboMetadata) -> None:
    q, k, v, out = (
        torch.zeros(meta.tokens, n, layer.head_size, dtype=layer.pages.key.dtype, device=pool.device)
        for n in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads, layer.num_heads)
    )
    with torch.cuda.device(pool.device if pool.is_cuda else -1):
        layer.forward(torch.nn.Module(), q, k, v, pool, meta, out)


def _steps(sequences: int, row: int, table: Tensor, width: int) -> Iterator[TurboMetadata]:
    size = 1
    while size < 2 * sequences:
        batch = min(size, sequences)
        decoding = _lengths(batch, PREFIX, width, row, table)
        meta = TurboMetadata(batch, decoding, batch * width, decode_tokens=batch * width)
        if width > 1:
            meta.drafts = Drafts(width, torch.zeros_like(decoding.counts))
        yield meta
        size *= 2
    for prefix in (0, PREFIX):
        chunk = _lengths(1, prefix, CHUNK, row, table)
        ends = torch.tensor([0, CHUNK], dtype=torch.int32, device=table.device)
        keep = torch.ones(1, dtype=torch.float32, device=table.device)
        yield TurboMetadata(
            0, _lengths(0, 0, 0, row, table), CHUNK, chunk, chunk_starts=(0, CHUNK), cu=ends,
            packed=Packed(ends[:1], CHUNK), has_prefix=prefix > 0,
            parts=parts_of(ends, (0, CHUNK), chunk.after, (prefix + CHUNK,)), keep=keep,
        )  # fmt: skip


def _lengths(batch: int, before: int, new: int, row: int, table: Tensor) -> Lengths:
    """Sequences of ``before`` and ``new`` tokens, all in the same row and the same blocks."""
    after = before + new
    paged = (before + min(new, 1) if new < PAGE_TOKENS else after) // PAGE_TOKENS * PAGE_TOKENS
    numbers = {
        "before": before, "after": after, "paged_before": before // PAGE_TOKENS * PAGE_TOKENS, "paged_after": paged,
        "counts": new, "rows": row, "sinks": 0, "fault": 0,
    }  # fmt: skip
    columns = {name: torch.full((batch,), x, dtype=torch.int32, device=table.device) for name, x in numbers.items()}
    return Lengths(**columns, table=table[:batch])
