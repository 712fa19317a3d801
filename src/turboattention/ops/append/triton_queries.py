"""The kernel behind `packed.add_packed_queries`: one launch for the chunks of a step."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import triton
import triton.language as tl
from torch import Tensor

from turboattention.ops.append.packed import QUERY_SAMPLES, Packed
from turboattention.ops.common.sample_triton import spread

TILE = 32  # tokens that a program reads at once, of every query head of its KV head


def add_packed_queries(
    power: Tensor, queries: Tensor, packed: Packed, *, rows: Tensor, counts: Tensor, keep: Tensor
) -> None:
    """As `packed.add_packed_queries`, which has checked the arguments; sums may differ in their last bits."""
    _, heads, dim = power.shape
    queries_kernel[(heads, len(rows))](
        power, queries, packed.starts, counts, rows, keep, heads, *queries.stride(),
        HEAD_DIM=dim, WIDTH=triton.next_power_of_2(dim), RATIO=queries.shape[1] // heads, SAMPLES=QUERY_SAMPLES,
        TILE=TILE, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["starts", "counts", "rows", "keep"])
def queries_kernel(
    power, queries, starts, counts, rows, keep, kv_heads, query_t, query_h, query_d,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, RATIO: tl.constexpr, SAMPLES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All of one KV head of one sequence."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.load(counts + row)
    channel = tl.arange(0, WIDTH)
    live = channel < HEAD_DIM
    queries += tl.load(starts + row).to(tl.int64) * query_t + head * RATIO * query_h
    samples = tl.minimum(count, SAMPLES)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for first in range(0, SAMPLES, TILE):
        i = first + tl.arange(0, TILE)
        token = spread(i, tl.maximum(samples, 1), count).to(tl.int64)
        for j in tl.static_range(RATIO):
            where = token[:, None] * query_t + j * query_h + channel[None, :] * query_d
            x = tl.load(queries + where, (i < samples)[:, None] & live[None, :], 0.0).to(tl.float32)
            total += x * x
    squares = tl.sum(total, 0) * (count.to(tl.float32) / tl.maximum(samples, 1).to(tl.float32))
    to = power + (tl.load(rows + row).to(tl.int64) * kv_heads + head) * HEAD_DIM + channel
    tl.store(to, tl.load(to, live, 0.0) * tl.load(keep + row) + squares, live)
