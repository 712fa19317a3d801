"""The kernel behind `packed.add_packed_queries`: one launch for the chunks of a step."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboattention.ops.append.packed import QUERY_SAMPLES, Packed
from turboattention.ops.common.sample_triton import spread

TILE = 32  # tokens that a program reads at once, of every query head of its KV head


def add_packed_queries(
    power: Tensor, queries: Tensor, packed: Packed, *, rows: Tensor, counts: Tensor, keep: Tensor, lengths: Tensor,
    page_size: int,
) -> Tensor:  # fmt: skip
    """As `packed.add_packed_queries`, which has checked the arguments; sums may differ in their last bits."""
    _, heads, dim = power.shape
    early = torch.empty_like(power)
    queries_kernel[(heads, len(rows))](
        power, early, queries, packed.starts, counts, rows, keep, lengths, heads, *queries.stride(),
        HEAD_DIM=dim, WIDTH=triton.next_power_of_2(dim), RATIO=queries.shape[1] // heads, SAMPLES=QUERY_SAMPLES,
        PAGE=page_size, TILE=TILE, num_warps=8,
    )  # fmt: skip
    return early


@triton.jit(do_not_specialize_on_alignment=["starts", "counts", "rows", "keep", "lengths"])
def queries_kernel(
    power, early, queries, starts, counts, rows, keep, lengths, kv_heads, query_t, query_h, query_d,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, RATIO: tl.constexpr, SAMPLES: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """All of one KV head of one sequence."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + row)
    channel = tl.arange(0, WIDTH)
    live = channel < HEAD_DIM
    queries += tl.load(starts + row).to(tl.int64) * query_t + head * RATIO * query_h
    queries += channel[None, :] * query_d
    to = (tl.load(rows + row).to(tl.int64) * kv_heads + head) * HEAD_DIM + channel
    before = tl.load(power + to, live, 0.0) * tl.load(keep + row)

    first = tl.minimum(count, PAGE - tl.load(lengths + row) % PAGE)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(0, PAGE, TILE):
        i = begin + tl.arange(0, TILE)
        total = _add(total, queries, i, (i < first)[:, None] & live[None, :], query_t, query_h, RATIO)
    tl.store(early + to, before + tl.sum(total, 0), live)

    samples = tl.minimum(count, SAMPLES)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(0, SAMPLES, TILE):
        i = begin + tl.arange(0, TILE)
        token = spread(i, tl.maximum(samples, 1), count)
        total = _add(total, queries, token, (i < samples)[:, None] & live[None, :], query_t, query_h, RATIO)
    share = count.to(tl.float32) / tl.maximum(samples, 1).to(tl.float32)
    tl.store(power + to, before + tl.sum(total, 0) * share, live)


@triton.jit
def _add(total, queries, token, mask, query_t, query_h, RATIO: tl.constexpr):
    """Squares of the queries of some tokens, of all query heads of the KV head."""
    where = token.to(tl.int64)[:, None] * query_t
    for j in tl.static_range(RATIO):
        x = tl.load(queries + where + j * query_h, mask, 0.0).to(tl.float32)
        total += x * x
    return total
