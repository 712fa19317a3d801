"""Attention over pages and exact tail in portable Triton: every GPU that Triton compiles for, one or many queries.

The rows of a program are (query, query head) pairs of one KV head, so a chunk of queries and all heads of a group share
each page. They are the columns of every product (the 8-column side of NVIDIA's matrix unit); tokens and channels are
the other side. Scales stay outside as in the definition (folded form); see README.md.

Codes go to the matrix unit as float16: as subnormals (one AND for two codes) where the unit takes them, else converted.
What decides the speed is where the compiler moves data. Packed words are loaded as they lie, and all that follows is
elementwise or a change of view, so that words and not codes go through shared memory, copied there while earlier pages
are computed. Which column of a product a code stands for follows from that (`_columns`): Q, scales and P keep to it.
"""

import triton
import triton.language as tl

from turboattention.ops.decode.work import row_programs, sequence_work


# What changes while a cache grows must not compile the kernel again.
@triton.jit(
    do_not_specialize=[
        "table_batch", "table_head", "tail_capacity", "batch", "heads", "programs", "ratio", "queries", "window",
    ]
)  # fmt: skip
def attend_kernel(
    q_ptr, pool_ptr, table_ptr, lengths_ptr, page_tokens_ptr, starts_ptr, heads_ptr,
    tail_key_ptr, tail_value_ptr, sink_key_ptr, sink_value_ptr, part_ptr, lse_ptr,
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
            begin = pages * index // for_pages
            count = pages * (index + 1) // for_pages - begin
            page0 = lower // PAGE + begin
            _pages(
                q_rows, pool_ptr, table_ptr + far_row * table_batch + group.to(tl.int64) * table_head + page0,
                (row * C.groups + group).to(tl.int64) * table_head + page0, page0, count, lower, oldest, newest,
                length - queries if CAUSAL else length, real, part_ptr, lse_ptr, part, softcap, qscale,
                C, PAGED, WINDOW, SOFTCAP,
            )  # fmt: skip
        else:
            begin = index * EXACT
            _exact(
                q_rows, begin, tl.minimum(begin + EXACT, exact), exact, length, page_tokens, start, oldest, newest,
                real,
                tail_key_ptr + far_row * tail_batch + far_head * tail_head,
                tail_value_ptr + far_row * tail_batch + far_head * tail_head,
                sink_key_ptr + far_row * sink_batch + far_head * sink_head,
                sink_value_ptr + far_row * sink_batch + far_head * sink_head,
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
    key_channel, key_part, key_inside = _key_columns(C)
    q = _queries(q_rows, key_channel, key_inside, shrink)
    q_sum = tl.sum(q.to(tl.float32), 0)
    token, token_part = _token_columns(C)
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
        fine_q = _refined_queries(ahead, q_rows, shrink * LIFTED, _refined_index(ahead, C), C)
    ahead = _page(pool_ptr, table, base, tl.minimum(1, limit), PAGED, C)
    if C.refined_channels > 0:
        next_index = _refined_index(ahead, C)
    for i in tl.range(0, count, num_stages=C.stages):
        data = _page(pool_ptr, table, base, i, PAGED, C)
        next_weight, next_k_scale, next_k_offset, next_v_scale = _small(ahead, token, C)
        next_fine_q = fine_q
        if C.refined_channels > 0:
            next_fine_q = _refined_queries(ahead, q_rows, shrink * LIFTED, next_index, C)
        ahead = _page(pool_ptr, table, base, tl.minimum(i + 2, limit), PAGED, C)
        if C.refined_channels > 0:
            next_index = _refined_index(ahead, C)

        scale = _key_bytes(data + C.key_scale, False, C)
        # What rounding took away goes through a product of its own: an outlier channel would feel it.
        qs, rest = _scaled(q, tl.broadcast_to((scale * key_lift)[:, None], [WIDTH, ROWS]), KEY_HOW)
        if C.key_symmetric:
            c = _sum_over_channels(scale, q, C) * KEY_UNIT
            b = c * (k_scale.to(tl.float32) * (-0.5 * ((1 << C.key_bits) - 1) / 255.0)) * factor
        else:
            c = _sum_over_channels(_key_bytes(data + C.key_zero, True, C), q, C) * KEY_UNIT - q_sum * 128.0
            b = c * (k_offset.to(tl.float32) * (1.0 / 127.0)) * factor
        a = factor * (k_scale.to(tl.float32) * (KEY_UNIT / LIFTED / 255.0))
        codes = _codes(data + C.key_codes, token * C.key_row_bytes, C.key_row_bytes, C.key_columns, C.key_bits, KEY_HOW)
        x = tl.dot(codes, qs, tl.dot(codes, rest))
        if C.refined_channels > 0:
            x = tl.dot(_refined_codes(data, C), fine_q, x)
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
        values = _codes(data + C.value_codes, value_row, C.value_row_bytes, C.value_columns, C.value_bits, VALUE_HOW)
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
def _columns(COLUMNS: tl.constexpr, PARTS: tl.constexpr, HOW: tl.constexpr):
    """For each column of `packed_codes`: its place in its part of the row, and which part."""
    k = tl.arange(0, COLUMNS * PARTS)
    if HOW == "bytes":
        return k % COLUMNS, k // COLUMNS
    else:
        # Even bytes of all words and parts, then odd bytes.
        WORDS: tl.constexpr = COLUMNS // 2
        return k % WORDS * 2 + k // (WORDS * PARTS), k // WORDS % PARTS


@triton.jit
def _key_columns(C: tl.constexpr):
    """Channel and part of each column of the codes of K, and which columns are no padding."""
    COLUMNS: tl.constexpr = C.key_columns
    PARTS: tl.constexpr = C.key_parts
    HOW: tl.constexpr = C.key_how
    USED: tl.constexpr = C.head_dim // C.key_parts
    place, part = _columns(COLUMNS, PARTS, HOW)
    inside = place < USED
    return tl.where(inside, part * USED + place, 0), part, inside


@triton.jit
def _token_columns(C: tl.constexpr):
    """Token and part of each column of the codes of V: the order of tokens in every product."""
    COLUMNS: tl.constexpr = C.value_columns
    PARTS: tl.constexpr = C.value_parts
    HOW: tl.constexpr = C.value_how
    place, part = _columns(COLUMNS, PARTS, HOW)
    u = part * COLUMNS + place  # stored order, see `packing.permute_tokens`
    return (u & ~14) | ((u >> 1) & 1) * 8 | ((u >> 2) & 3) * 2, part


@triton.jit
def _refined_index(data, C: tl.constexpr):
    """The refined channels of a page."""
    k = tl.arange(0, C.refined_columns)
    return tl.load(data + C.refined_index + k, mask=k < C.refined_channels, other=0).to(tl.int32)


@triton.jit
def _refined_queries(data, q_rows, unit, index, C: tl.constexpr):
    """Q times scale of the refined channels, in the unit of the scaled Q."""
    inside = tl.arange(0, C.refined_columns) < C.refined_channels
    scale = tl.load(data + C.key_scale + index, mask=inside, other=0).to(tl.float32) * (1.0 / (1 << C.refined_bits))
    q = tl.load(q_rows[None, :] + index[:, None]).to(tl.float32)  # padding: channel 0 with scale 0
    return (q * unit[None, :] * scale[:, None]).to(tl.float16)


@triton.jit
def _refined_codes(data, C: tl.constexpr):
    """Codes of the lower plane, ``[tokens, refined channels]`` in the order of `_token_columns`."""
    COLUMNS: tl.constexpr = C.refined_columns
    PARTS: tl.constexpr = 8 // C.refined_bits
    BYTES: tl.constexpr = C.page // PARTS
    k = tl.arange(0, COLUMNS)[:, None]
    at = k * BYTES + tl.arange(0, BYTES)[None, :]
    byte = tl.load(data + C.refined_codes + at, mask=k < C.refined_channels, other=0).to(tl.int16)
    shift = (tl.arange(0, PARTS) * C.refined_bits).to(tl.int16)
    fine = (byte[:, None, :] >> shift[None, :, None]) & ((1 << C.refined_bits) - 1)
    fine = fine.reshape(COLUMNS, C.page // 16, 2, 4, 2)
    fine = fine.permute(0, 1, 3, 2, 4) if C.value_how == "bytes" else fine.permute(0, 4, 1, 3, 2)
    fine = fine.reshape(COLUMNS, C.page).trans()
    if C.key_how == "bytes":
        return fine.to(tl.float16)
    else:
        return fine.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _inside(k, USED: tl.constexpr, SIZE: tl.constexpr):
    """``k``, of which there are SIZE, below USED: no mask, which would be a branch on AMD GPUs."""
    if USED == SIZE:
        return k
    else:
        return tl.minimum(k, USED - 1)


@triton.jit
def _key_bytes(data, SIGNED: tl.constexpr, C: tl.constexpr):
    """A byte for each column of the codes of K as float16 (2^-24 of it where how is not 'bytes'); signed: plus 128."""
    HOW: tl.constexpr = C.key_how
    USED: tl.constexpr = C.head_dim // C.key_parts
    if HOW == "bytes":
        k = tl.arange(0, C.key_width)
        place = _inside(k % C.key_columns, USED, C.key_columns)
        byte = tl.load(data + (k // C.key_columns * USED + place))
        if SIGNED:
            byte = byte ^ 128
        return byte.to(tl.float16)
    else:
        WORDS: tl.constexpr = C.key_columns // 2
        k = tl.arange(0, C.key_width // 2)
        place = _inside(k % WORDS, USED // 2, WORDS)
        words = tl.load(data.to(tl.pointer_type(tl.int16)) + (k // WORDS * (USED // 2) + place))
        if SIGNED:
            words = words ^ -32640  # 0x8080
        return _beside(_unpack(words, 8, HOW))


@triton.jit
def _codes(data, row_offset, ROW_BYTES: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, HOW: tl.constexpr):
    """Codes of packed rows, ``[rows, COLUMNS * parts]`` float16; as subnormals, those of part h times 2^(BITS * h).

    Columns that are padding hold any codes: Q is 0 there.
    """
    if HOW == "bytes":
        # A row of 3 bits is the low two bits packed as 2-bit codes, then the high bits packed in eighths.
        LOW: tl.constexpr = ROW_BYTES * 2 // 3 if BITS == 3 else ROW_BYTES
        byte = _inside(tl.arange(0, COLUMNS), LOW, COLUMNS)
        low = tl.load(data + row_offset[:, None] + byte[None, :])
        if BITS == 3:
            EIGHTH: tl.constexpr = ROW_BYTES // 3
            high = tl.load(data + row_offset[:, None] + (LOW + byte % EIGHTH)[None, :])
        PARTS: tl.constexpr = 4 if BITS == 3 else 8 // BITS
        parts = ()
        for h in tl.static_range(PARTS):
            if BITS == 3:
                bit = 2 * h + byte // EIGHTH
                code = ((low >> (2 * h)) & 3).to(tl.int32) | (((high.to(tl.int32) >> bit[None, :]) & 1) << 2)
            else:
                code = (low >> (BITS * h)) & ((1 << BITS) - 1)
            parts += (code.to(tl.float16),)  # type: ignore[assignment]
        return _beside(parts)
    else:
        word = _inside(tl.arange(0, COLUMNS // 2), ROW_BYTES // 2, COLUMNS // 2)
        words = tl.load(data.to(tl.pointer_type(tl.int16)) + (row_offset // 2)[:, None] + word[None, :])
        return _beside(_unpack(words, BITS, HOW))


@triton.jit
def _unpack(words, BITS: tl.constexpr, HOW: tl.constexpr):
    """Codes of 16-bit words as subnormals: a tensor for each part of the even bytes, then of the odd bytes."""
    if HOW == "asm":
        ASM: tl.constexpr = mask_asm(BITS)
        OUT: tl.constexpr = 16 // BITS
        return tl.inline_asm_elementwise(ASM, "=&r," * OUT + "r", [words], (tl.float16,) * OUT, True, 2)
    else:
        PARTS: tl.constexpr = 8 // BITS
        parts = ()
        for h in tl.static_range(2 * PARTS):
            code = (words >> (h // PARTS * 8)) & (((1 << BITS) - 1) << (h % PARTS * BITS))
            parts += (code.to(tl.int16).to(tl.float16, bitcast=True),)  # type: ignore[assignment]
        return parts


@triton.constexpr_function
def mask_asm(bits):
    """PTX of `_unpack` for two words: masks, and a shift for the odd bytes."""
    parts = 8 // bits
    masks = [((1 << bits) - 1) * 0x10001 << bits * h for h in range(parts)]
    even = [f"and.b32 ${h}, ${2 * parts}, {mask:#010x};" for h, mask in enumerate(masks)]
    odd = [f"and.b32 ${parts + h}, x, {mask:#010x};" for h, mask in enumerate(masks)]
    return " ".join(["{ .reg .b32 x;", *even, f"shr.u32 x, ${2 * parts}, 8;", *odd, "}"])


@triton.jit
def _beside(parts):
    """1, 2, 4 or 8 equal tensors side by side along the last dimension."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return _flat(tl.join(parts[0], parts[1]))
    elif len(parts) == 4:
        return _beside((_flat(tl.join(parts[0], parts[1])), _flat(tl.join(parts[2], parts[3]))))
    else:
        return _beside((_beside(parts[:4]), _beside(parts[4:])))


@triton.jit
def _flat(pair):
    """``[..., n, 2]`` to ``[..., 2 n]``: the first of all pairs, then the second."""
    if len(pair.shape) == 2:
        return pair.permute(1, 0).reshape(2 * pair.shape[0])
    else:
        return pair.permute(0, 2, 1).reshape(pair.shape[0], 2 * pair.shape[1])


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
