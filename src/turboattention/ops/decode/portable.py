"""Attention over pages and exact tail in portable Triton: every GPU that Triton compiles for, one or many queries.

The rows of a program are (query, query head) pairs of one KV head, so a chunk of queries and all heads of a group share
each page. They are the columns of every product (the 8-column side of NVIDIA's matrix unit); tokens and channels are
the other side. Scales stay outside as in the definition (folded form); see README.md.

Codes go to the matrix unit as float16: as subnormals (one AND for two codes) where the unit takes them, else converted.
What decides the speed is where the compiler moves data. Packed words are loaded as they lie, and all that follows is
elementwise or a change of view, so that words and not codes go through shared memory, copied there while earlier pages
are computed. Which column of a product a code stands for follows from that (`column_order`): Q, scales and P keep to
it.
"""

import triton
import triton.language as tl

from turboattention.ops.decode.portable_codes import (
    key_bytes,
    key_columns,
    packed_codes,
    refined_codes,
    refined_index,
    refined_queries,
    token_columns,
)
from turboattention.ops.decode.work import row_programs, sequence_work, span


# What changes while a cache grows must not compile the kernel again.
@triton.jit(
    do_not_specialize=[
        "table_batch", "table_head", "tail_capacity", "batch", "heads", "programs", "ratio", "queries", "window",
    ]
)  # fmt: skip
def attend_kernel(
    q_ptr, pool_ptr, table_ptr, lengths_ptr, page_tokens_ptr, starts_ptr, heads_ptr,
    tail_key_ptr, tail_value_ptr, sink_key_ptr, sink_value_ptr, tail_rows_ptr, sink_rows_ptr, part_ptr, lse_ptr,
    q_batch, q_head, q_query, table_batch, table_head, tail_batch, tail_head, tail_token, sink_batch, sink_head,
    sink_token, tail_capacity, batch, heads, programs, ratio, queries, window, softcap, qscale,
    C: tl.constexpr, BATCH: tl.constexpr, PAGED: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr,
    STARTS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One partial result: of some pages or of some exact tokens of a row (see `work`)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.arange(0, BATCH)
    inside = rows < batch
    length_of = tl.load(lengths_ptr + rows, mask=inside, other=0)
    paged_of = tl.load(page_tokens_ptr + rows, mask=inside, other=0)
    start_of = tl.zeros([BATCH], tl.int32)
    if STARTS:
        start_of = tl.load(starts_ptr + rows, mask=inside, other=0)
    EXACT: tl.constexpr = C.exact_tokens
    LEAST: tl.constexpr = C.least_pages
    PAGE: tl.constexpr = C.page
    exact_of, pages_of, _ = sequence_work(length_of, paged_of, start_of, window, queries, PAGE, SINKS, WINDOW)
    pages_of = tl.where(inside, pages_of, 0)
    exact_of = tl.where(inside, exact_of, 0)
    all_pages = tl.sum(pages_of) * heads
    for_pages_of, for_exact_of = row_programs(exact_of, pages_of, all_pages, programs, EXACT, LEAST)
    part = tl.program_id(0)
    page_programs = tl.sum(for_pages_of) * heads
    # This program among those of its kind, and what each row has of them.
    of_pages = part < page_programs
    mine = tl.where(of_pages, part, part - page_programs)
    per_head = tl.where(of_pages, for_pages_of, for_exact_of)
    ends = tl.cumsum(per_head) * heads
    row = tl.sum((ends <= mine).to(tl.int32))
    if row < batch:
        first = tl.max(tl.where(rows < row, ends, 0))
        length = tl.load(lengths_ptr + row)
        page_tokens = tl.load(page_tokens_ptr + row)
        start = row * 0
        if STARTS:
            start = tl.load(starts_ptr + row)
        exact, pages, lower = sequence_work(length, page_tokens, start, window, queries, PAGE, SINKS, WINDOW)
        for_pages, for_exact = row_programs(exact, pages, all_pages, programs, EXACT, LEAST)
        here = tl.where(of_pages, for_pages, for_exact)
        head = (mine - first) // here
        index = (mine - first) % here
        row_blocks = tl.cdiv(ratio * queries, C.rows)
        group = head // row_blocks
        kv_head = tl.load(heads_ptr + group)
        far_row, far_head = row.to(tl.int64), kv_head.to(tl.int64)

        local = (head % row_blocks) * C.rows + tl.arange(0, C.rows)
        real = local < ratio * queries
        local = tl.minimum(local, ratio * queries - 1)
        # The newest token that a row sees, and the oldest.
        newest = length - 1 + tl.full([C.rows], 0, tl.int32)
        if CAUSAL:
            newest = length - queries + local // ratio
        oldest = start + tl.full([C.rows], 0, tl.int32)
        if WINDOW:
            oldest = tl.maximum(oldest, length - queries + local // ratio - window + 1)
        q_index = (kv_head * ratio + local % ratio).to(tl.int64) * q_head + (local // ratio).to(tl.int64) * q_query
        q_rows = q_ptr + far_row * q_batch + q_index
        if of_pages:
            begin, count = span(pages, for_pages, index)
            page0 = lower // PAGE + begin
            _pages(
                q_rows, pool_ptr, table_ptr + far_row * table_batch + group.to(tl.int64) * table_head + page0,
                (row * (heads // row_blocks) + group).to(tl.int64) * table_head + page0, page0, count, lower,
                oldest, newest, length - queries if CAUSAL else length, real, part_ptr, lse_ptr, part, softcap, qscale,
                C, PAGED, WINDOW, SOFTCAP,
            )  # fmt: skip
        else:
            begin = index * EXACT
            tail_row, sink_row = far_row, far_row
            if tail_rows_ptr is not None:
                tail_row = tl.load(tail_rows_ptr + row).to(tl.int64)
            if sink_rows_ptr is not None:
                sink_row = tl.load(sink_rows_ptr + row).to(tl.int64)
            _exact(
                q_rows, begin, tl.minimum(begin + EXACT, exact), exact, length, page_tokens, start, oldest, newest,
                real,
                tail_key_ptr + tail_row * tail_batch + far_head * tail_head,
                tail_value_ptr + tail_row * tail_batch + far_head * tail_head,
                sink_key_ptr + sink_row * sink_batch + far_head * sink_head,
                sink_value_ptr + sink_row * sink_batch + far_head * sink_head,
                part_ptr, lse_ptr, part, tail_token, sink_token, tail_capacity, queries, window, softcap, qscale,
                C, RING, SINKS, WINDOW, SOFTCAP,
            )  # fmt: skip


@triton.jit
def _unit(q_rows, C: tl.constexpr):
    """A power of two for each row that brings its largest query value into (0.5, 1]: dividing by it is exact."""
    channel = tl.arange(0, C.dim_padded)
    q = tl.load(q_rows[None, :] + channel[:, None], mask=(channel < C.head_dim)[:, None], other=0.0).to(tl.float32)
    return tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), 0), 1e-30))))


@triton.jit
def _queries(q_rows, channel, inside, shrink):
    """Queries ``[channels, rows]`` times ``shrink`` as float16."""
    q = tl.load(q_rows[None, :] + channel[:, None], mask=inside[:, None], other=0.0).to(tl.float32)
    return (q * shrink[None, :]).to(tl.float16)


@triton.jit
def _exact(
    q_rows, begin, end, exact, length, page_tokens, start, oldest, newest, real, tail_key_ptr, tail_value_ptr,
    sink_key_ptr, sink_value_ptr, part_ptr, lse_ptr, part, tail_token, sink_token, tail_capacity, queries, window,
    softcap, qscale, C: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Exact tokens ``begin .. end`` of one row of work (sinks, then tail) in 16 bits."""
    channel = tl.arange(0, C.dim_padded)
    unit = _unit(q_rows, C)
    q = _queries(q_rows, channel, channel < C.head_dim, 1.0 / unit)
    factor = unit * qscale

    m = tl.full([C.rows], -1e30, tl.float32)
    mass = tl.full([C.rows], 0.0, tl.float32)
    acc = tl.full([C.dim_padded, C.rows], 0.0, tl.float32)
    visible_from = start
    if WINDOW:
        visible_from = tl.maximum(start, length - (queries - 1) - window)
    tail_first = tl.maximum(page_tokens, visible_from)
    sinks = exact - (length - tail_first)
    tile = tl.arange(0, C.exact_tile)
    for i in range(begin, end, C.exact_tile):
        index = i + tile
        position = tl.where(index < sinks, start + index, tail_first + index - sinks)
        slot = position - page_tokens
        if RING:
            slot = position % tail_capacity
        inside = (index < exact)[:, None] & (channel < C.head_dim)[None, :]
        at = slot.to(tl.int64)[:, None] * tail_token + channel[None, :]
        key = tl.load(tail_key_ptr + at, mask=inside & (index >= sinks)[:, None], other=0.0)
        value = tl.load(tail_value_ptr + at, mask=inside & (index >= sinks)[:, None], other=0.0)
        if SINKS > 0:
            at = index[:, None] * sink_token + channel[None, :]
            key += tl.load(sink_key_ptr + at, mask=inside & (index < sinks)[:, None], other=0.0)
            value += tl.load(sink_value_ptr + at, mask=inside & (index < sinks)[:, None], other=0.0)
        x = tl.dot(key.to(tl.float16), q) * factor[None, :]
        if SOFTCAP:
            x = _cap(x, softcap)
        seen = (index < exact) & ((index >= sinks) | (position < page_tokens))
        seen = seen[:, None] & (position[:, None] <= newest[None, :]) & (position[:, None] >= oldest[None, :])
        x = tl.where(seen, x, float("-inf"))
        top = tl.maximum(tl.max(x, 0), m)
        fall = tl.exp2(m - top)
        m = top
        p = tl.exp2(x - top[None, :])
        mass = mass * fall + tl.sum(p, 0)
        acc = acc * fall[None, :] + tl.dot(tl.trans(value.to(tl.float16)), p.to(tl.float16))
    _store(part_ptr, lse_ptr, part, m, mass, acc, real, C)


@triton.jit
def _pages(
    q_rows, pool_ptr, table, base, page0, count, lower, oldest, newest, first_query, real, part_ptr, lse_ptr, part,
    softcap, qscale, C: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """``count`` pages of one row of work.

    Tokens before ``lower`` are not seen, and by each row none before ``oldest`` or after ``newest``; pages that end
    before ``first_query`` hold none of the latter.
    """
    PAGE: tl.constexpr = C.page
    ROWS: tl.constexpr = C.rows
    DIM: tl.constexpr = C.dim_padded
    WIDTH: tl.constexpr = C.key_width
    KEY_HOW: tl.constexpr = C.key_how
    VALUE_HOW: tl.constexpr = C.value_how
    # What brings sums of subnormal codes back, and the exponent that Q was given to reach them.
    KEY_UNIT: tl.constexpr = 1.0 if C.key_how == "bytes" else 2.0**24
    VALUE_UNIT: tl.constexpr = 1.0 if C.value_how == "bytes" else 2.0**24
    LIFTED: tl.constexpr = 1.0 if C.key_how == "bytes" else 2.0**-9
    unit = _unit(q_rows, C)
    shrink = 1.0 / unit
    factor = unit * qscale
    key_channel, key_part, key_inside = key_columns(C)
    q = _queries(q_rows, key_channel, key_inside, shrink)
    q_sum = tl.sum(q.to(tl.float32), 0)
    token, token_part = token_columns(C)
    # Part h of a byte is its code times 2^(bits * h): taken back in the scales of K and in the weights of V.
    key_lift = tl.full([WIDTH], 1.0, tl.float16)
    if KEY_HOW != "bytes":
        key_lift = (32768 >> (key_part * C.key_bits)).to(tl.float16)
    value_lift = tl.full([PAGE], 1.0, tl.float32)
    ones = tl.full([16, PAGE], 1.0, tl.float16)
    if VALUE_HOW != "bytes":
        value_lift = (64 >> (token_part * C.value_bits)).to(tl.float32) * (1.0 / 64.0)
        one = (1 << (token_part * C.value_bits)).to(tl.int16).to(tl.float16, bitcast=True)
        ones = tl.broadcast_to(one[None, :], [16, PAGE])
    value_row = tl.minimum(tl.arange(0, DIM), C.head_dim - 1) * C.value_row_bytes

    m = tl.full([ROWS], -1e30, tl.float32)
    mass = tl.full([PAGE, ROWS], 0.0, tl.float32)  # summed over tokens at the end
    acc = tl.full([DIM, ROWS], 0.0, tl.float32)
    middle = tl.full([16, ROWS], 0.0, tl.float32)  # sums of the rounded weights, which the zero of V belongs to
    zeros = tl.full([ROWS], 0.0, tl.float32)
    v_unit = 1.0  # acc and middle are in units of this; it follows the V scale of the latest page
    limit = count - 1
    ahead = _page(pool_ptr, table, base, 0, PAGED, C)
    weight, k_scale, k_offset, v_scale = _small(ahead, token, C)
    next_index = tl.full([C.refined_columns], 0, tl.int32)
    fine_q = tl.full([C.refined_columns, ROWS], 0.0, tl.float16)
    if C.refined_channels > 0:
        fine_q = refined_queries(ahead, q_rows, shrink * LIFTED, refined_index(ahead, C), C)
    ahead = _page(pool_ptr, table, base, tl.minimum(1, limit), PAGED, C)
    if C.refined_channels > 0:
        next_index = refined_index(ahead, C)
    for i in tl.range(0, count, num_stages=C.stages):
        data = _page(pool_ptr, table, base, i, PAGED, C)
        next_weight, next_k_scale, next_k_offset, next_v_scale = _small(ahead, token, C)
        next_fine_q = fine_q
        if C.refined_channels > 0:
            next_fine_q = refined_queries(ahead, q_rows, shrink * LIFTED, next_index, C)
        ahead = _page(pool_ptr, table, base, tl.minimum(i + 2, limit), PAGED, C)
        if C.refined_channels > 0:
            next_index = refined_index(ahead, C)

        scale = key_bytes(data + C.key_scale, False, C)
        # What rounding took away goes through a product of its own: an outlier channel would feel it.
        qs, rest = _scaled(q, tl.broadcast_to((scale * key_lift)[:, None], [WIDTH, ROWS]), KEY_HOW)
        if C.key_symmetric:
            c = _sum_over_channels(scale, q, C) * KEY_UNIT
            b = c * (k_scale.to(tl.float32) * (-0.5 * ((1 << C.key_bits) - 1) / 255.0)) * factor
        else:
            c = _sum_over_channels(key_bytes(data + C.key_zero, True, C), q, C) * KEY_UNIT - q_sum * 128.0
            b = c * (k_offset.to(tl.float32) * (1.0 / 127.0)) * factor
        a = factor * (k_scale.to(tl.float32) * (KEY_UNIT / LIFTED / 255.0))
        codes = packed_codes(
            data + C.key_codes, token * C.key_row_bytes, C.key_row_bytes, C.key_columns, C.key_bits, KEY_HOW
        )
        x = tl.dot(codes, qs, tl.dot(codes, rest))
        if C.refined_channels > 0:
            x = tl.dot(refined_codes(data, C), fine_q, x)
        x = x * a[None, :] + b[None, :]
        if SOFTCAP:
            x = _cap(x, softcap)
        if ((page0 + i) * PAGE < lower) | ((page0 + i + 1) * PAGE > first_query) | WINDOW:
            position = (page0 + i) * PAGE + token
            seen = (position[:, None] >= oldest[None, :]) & (position[:, None] <= newest[None, :])
            # Weight 0 also in a row that has seen nothing yet, because m is a number.
            x = tl.where(seen & (position >= lower)[:, None], x, float("-inf"))
        top = tl.maximum(tl.max(x, 0), m)
        fall = _exp2(m - top, KEY_HOW)
        m = top
        p = _exp2(x - top[None, :], KEY_HOW)
        mass = mass * fall[None, :] + p

        # P is weighted and rounded once, and everything of V is taken with the rounded weights.
        w = weight.to(tl.float32) * value_lift
        if C.value_symmetric:
            w *= tl.where(v_scale.to(tl.float32) > 0, 1.0, 0.0)  # a page of zeros
        ps = (p * w[:, None]).to(tl.float16)
        if not C.value_symmetric:
            zero = tl.load((data + C.value_zero).to(tl.pointer_type(tl.int8)) + token).to(tl.float32)
            # The zero of a token goes with the weight that its codes got.
            share = ps.to(tl.float32) * tl.where(w > 0, zero / w, 0.0)[:, None]
            zeros = zeros * fall + tl.sum(share, 0) * (_float16(data + C.value_page_zero) * (1.0 / 127.0))
        values = packed_codes(
            data + C.value_codes, value_row, C.value_row_bytes, C.value_columns, C.value_bits, VALUE_HOW
        )
        new_unit = tl.maximum(v_scale.to(tl.float32), 5.9604645e-08)
        ratio = fall * (v_unit / new_unit)
        v_unit = new_unit
        # From zero for every page: the matrix unit truncates when it adds, which would bias long sums. The compiler
        # would make a plus an accumulator of the product.
        acc = tl.fma(acc, tl.broadcast_to(ratio[None, :], [DIM, ROWS]), tl.dot(values, ps))
        if C.value_symmetric:
            middle = tl.fma(middle, tl.broadcast_to(ratio[None, :], [16, ROWS]), tl.dot(ones, ps))
        weight = next_weight
        k_scale = next_k_scale
        k_offset = next_k_offset
        v_scale = next_v_scale
        fine_q = next_fine_q

    if C.value_symmetric:
        acc -= (tl.max(middle, 0) * (0.5 * ((1 << C.value_bits) - 1)))[None, :]
    acc = acc * (v_unit * (VALUE_UNIT / 255.0)) + zeros[None, :]
    _store(part_ptr, lse_ptr, part, m, tl.sum(mass, 0), acc, real, C)


@triton.jit
def _page(pool_ptr, table, base, i, PAGED: tl.constexpr, C: tl.constexpr):
    """Where page ``i`` of the row of work is."""
    page = base + i
    if PAGED:
        page = tl.load(table + i).to(tl.int64)
    return pool_ptr + page * C.page_bytes


@triton.jit
def _small(data, token, C: tl.constexpr):
    """Weights of V and numbers of the page, as they are stored: a page ahead of their use."""
    weight = tl.load(data + C.value_scale + token)
    k_scale = tl.load((data + C.key_page_scale).to(tl.pointer_type(tl.float16)))
    k_offset = tl.load((data + C.key_page_zero).to(tl.pointer_type(tl.float16)))
    v_scale = tl.load((data + C.value_page_scale).to(tl.pointer_type(tl.float16)))
    return weight, k_scale, k_offset, v_scale


@triton.jit
def _sum_over_channels(row, q, C: tl.constexpr):
    """``row`` times ``q`` for each row of work: a product whose 16 rows are the same."""
    return tl.max(tl.dot(tl.broadcast_to(row[None, :], [16, C.key_width]), q), 0)


@triton.jit
def _scaled(q, scale, HOW: tl.constexpr):
    """``q * scale`` in float16, and what rounding it lost."""
    if HOW == "asm":
        ASM: tl.constexpr = "{ .reg .b32 n; mul.rn.f16x2 $0, $2, $3; neg.f16x2 n, $0; fma.rn.f16x2 $1, $2, $3, n; }"
        return tl.inline_asm_elementwise(ASM, "=&r,=&r,r,r", [q, scale], (tl.float16, tl.float16), True, 2)
    else:
        exact = q.to(tl.float32) * scale.to(tl.float32)
        rounded = exact.to(tl.float16)
        return rounded, (exact - rounded.to(tl.float32)).to(tl.float16)


@triton.jit
def _exp2(x, HOW: tl.constexpr):
    """``2^x``; on NVIDIA results below 2^-126 become 0, which saves two instructions of three."""
    if HOW == "asm":
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def _store(part_ptr, lse_ptr, part, m, mass, acc, real, C: tl.constexpr):
    """A partial result ``[channels, rows]`` and its LSE in log2 units; a row that saw nothing gets one that says so."""
    channel = tl.arange(0, C.dim_padded)
    at = part.to(tl.int64) * C.rows + tl.arange(0, C.rows)
    wanted = (real & (mass > 0))[None, :] & (channel < C.head_dim)[:, None]
    tl.store(part_ptr + at[None, :] * C.head_dim + channel[:, None], acc / mass[None, :], mask=wanted)
    tl.store(lse_ptr + at, tl.where(mass > 0, m + tl.log2(mass), -1e30), mask=real)


@triton.jit
def _float16(pointer):
    return tl.load(pointer.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _cap(x, softcap):
    """``cap * tanh(x / cap)`` with scores and cap in log2 units."""
    return softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634 / softcap)) + 1.0))
