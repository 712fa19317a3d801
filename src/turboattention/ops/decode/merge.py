"""Merge of the parts that the blocks of a decode or prefill launch left for each row (see `work`)."""

import triton
import triton.language as tl

from turboattention.ops.decode.work import row_programs, sequence_work


@triton.jit(
    do_not_specialize=[
        "out_batch", "out_head", "out_query", "lse_batch", "lse_head", "batch", "heads", "ratio", "queries", "window",
        "programs",
    ]
)  # fmt: skip
def merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, lengths_ptr, page_tokens_ptr, starts_ptr, heads_ptr,
    out_batch, out_head, out_query, lse_batch, lse_head, batch, heads, ratio, queries, window, programs,
    COLUMNS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PARTS: tl.constexpr, BATCH: tl.constexpr,
    EXACT_PARTS: tl.constexpr, PAGE: tl.constexpr, EXACT: tl.constexpr, LEAST: tl.constexpr, SINKS: tl.constexpr,
    STARTS: tl.constexpr, WINDOW: tl.constexpr, ROTATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for each sequence, query head and query: ``out`` in its dtype, ``lse`` in natural-log units.

    heads: rows of a sequence. ROTATE: size of the Hadamard blocks to rotate back, 0 for none.
    """
    row = tl.program_id(0)
    local = tl.program_id(1)  # ((KV head of the launch) * queries + query) * ratio + query head of the KV head
    kv = local // (ratio * queries)
    of_kv = local % (ratio * queries)
    head = kv * tl.cdiv(ratio * queries, COLUMNS) + of_kv // COLUMNS
    rows = tl.arange(0, BATCH)
    inside = rows < batch
    length = tl.load(lengths_ptr + rows, mask=inside, other=0)
    paged = tl.load(page_tokens_ptr + rows, mask=inside, other=0)
    start = tl.zeros([BATCH], tl.int32)
    if STARTS:
        start = tl.load(starts_ptr + rows, mask=inside, other=0)
    exact, pages, _ = sequence_work(length, paged, start, window, queries, PAGE, SINKS, WINDOW)
    pages = tl.where(inside, pages, 0)
    exact = tl.where(inside, exact, 0)
    for_pages, for_exact = row_programs(exact, pages, tl.sum(pages) * heads, programs, EXACT, LEAST)
    paged_parts = tl.sum(tl.where(rows == row, for_pages, 0))
    exact_parts = tl.sum(tl.where(rows == row, for_exact, 0))
    paged_part = tl.sum(tl.where(rows < row, for_pages, 0)) * heads + head * paged_parts
    exact_part = tl.sum(for_pages + tl.where(rows < row, for_exact, 0)) * heads + head * exact_parts
    column = of_kv % COLUMNS
    channel = tl.arange(0, DIM_PADDED)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    best, total, paged_out = _gather(
        part_ptr, part_lse_ptr, paged_part.to(tl.int64), paged_parts, column, channel, COLUMNS, DIM, DIM_PADDED, PARTS
    )
    best2, total2, exact_out = _gather(
        part_ptr, part_lse_ptr, exact_part.to(tl.int64), exact_parts, column, channel, COLUMNS, DIM, DIM_PADDED,
        EXACT_PARTS,
    )  # fmt: skip
    top = tl.maximum(best, best2)
    fall, fall2 = tl.exp2(best - top), tl.exp2(best2 - top)
    best = top
    total = total * fall + total2 * fall2
    paged_out, exact_out = paged_out * fall, exact_out * fall2
    if ROTATE > 0:
        paged_out = rotate(paged_out, DIM_PADDED, ROTATE)
    out = tl.where(total > 0, (paged_out + exact_out) / total, 0.0)
    kv_head = tl.load(heads_ptr + kv)
    q_head = kv_head * ratio + of_kv % ratio
    query = of_kv // ratio
    to = row.to(tl.int64) * out_batch + q_head.to(tl.int64) * out_head + query.to(tl.int64) * out_query
    tl.store(out_ptr + to + channel, out.to(out_ptr.dtype.element_ty), mask=channel < DIM)
    natural = tl.where(total > 0, (best + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    to = row.to(tl.int64) * lse_batch + q_head.to(tl.int64) * lse_head + query
    tl.store(lse_ptr + to + tl.arange(0, 1), natural)


@triton.jit
def _gather(
    part_ptr, lse_ptr, first, count, column, channel, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Largest LSE, sum of the weights relative to it, and weighted sum of ``count`` parts."""
    index = tl.arange(0, PARTS)
    best = tl.full([1], -1e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([DIM_PADDED], tl.float32)
    for i in tl.range(0, count, PARTS):
        inside = i + index < count
        at = (first + i + index) * COLUMNS + column
        lse = tl.load(lse_ptr + at, mask=inside, other=-1e30)
        wanted = inside[:, None] & (channel < DIM)[None, :]
        # Not held up by the LSE; a part that saw nothing holds anything.
        part = tl.load(part_ptr + at[:, None] * DIM + channel[None, :], mask=wanted, other=0.0)
        seen = lse > -1e29
        top = tl.maximum(best, tl.max(lse))
        weight = tl.where(seen, tl.exp2(lse - top), 0.0)
        fall = tl.exp2(best - top)
        total = total * fall + tl.sum(weight)
        out = out * fall + tl.sum(tl.where(seen[:, None], part * weight[:, None], 0.0), 0)
        best = top
    return best, total, out


@triton.jit
def rotate(x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Hadamard rotation of blocks of a vector: butterflies, then 1 / sqrt(BLOCK)."""
    for level in tl.static_range(12):
        if (1 << level) < BLOCK:
            pairs = x.reshape(SIZE >> (level + 1), 2, 1 << level).permute(0, 2, 1)
            a, b = pairs.split()
            x = tl.join(a + b, a - b).permute(0, 2, 1).reshape(SIZE)
    return x * (1.0 / BLOCK**0.5)
