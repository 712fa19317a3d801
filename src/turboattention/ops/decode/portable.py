"""Attention over pages and exact tail in portable Triton: every GPU that Triton compiles for, one or many queries.

The rows of a program are (query, query head) pairs of one KV head, so a chunk of queries and all heads of a group share
each page. Codes go to the matrix unit as float16: as subnormals (one AND for two codes) where the unit takes them, else
converted. Scales stay outside as in the definition (folded form); see README.md.
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
def _queries(q_rows, C: tl.constexpr):
    """Queries ``[rows, channels]`` as float16, divided by a power of two (returned) for each row: exact."""
    channel = tl.arange(0, C.dim_padded)
    q = tl.load(q_rows[:, None] + channel[None, :], mask=(channel < C.head_dim)[None, :], other=0.0).to(tl.float32)
    unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), 1), 1e-30))))
    return (q * (1.0 / unit)[:, None]).to(tl.float16), unit


@triton.jit
def _exact(
    q_rows, begin, end, exact, length, page_tokens, start, oldest, newest, real, tail_key_ptr, tail_value_ptr,
    sink_key_ptr, sink_value_ptr, part_ptr, lse_ptr, part, tail_token, sink_token, tail_capacity, queries, window,
    softcap, qscale, C: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Exact tokens ``begin .. end`` of one row of work (sinks, then tail) in 16 bits."""
    channel = tl.arange(0, C.dim_padded)
    q, unit = _queries(q_rows, C)
    factor = unit * qscale

    m = tl.full([C.rows], -1e30, tl.float32)
    mass = tl.full([C.rows], 0.0, tl.float32)
    acc = tl.full([C.rows, C.dim_padded], 0.0, tl.float32)
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
        x = tl.dot(q, tl.trans(key.to(tl.float16))) * factor[:, None]
        if SOFTCAP:
            x = _cap(x, softcap)
        seen = (index < exact) & ((index >= sinks) | (position < page_tokens))
        seen = seen[None, :] & (position[None, :] <= newest[:, None]) & (position[None, :] >= oldest[:, None])
        x = tl.where(seen, x, -1e30)
        top = tl.maximum(tl.max(x, 1), m)
        fall = tl.exp2(m - top)
        m = top
        p = tl.where(seen, tl.exp2(x - top[:, None]), 0.0)
        mass = mass * fall + tl.sum(p, 1)
        acc = acc * fall[:, None] + tl.dot(p.to(tl.float16), value.to(tl.float16))
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
    channel = tl.arange(0, C.dim_padded)
    q, unit = _queries(q_rows, C)
    factor = unit * qscale
    shrink = 1.0 / unit
    m = tl.full([C.rows], -1e30, tl.float32)
    mass = tl.full([C.rows], 0.0, tl.float32)
    acc = tl.full([C.rows, C.dim_padded], 0.0, tl.float32)
    # Tokens of a page in the order in which the rows of V hold them.
    u = tl.arange(0, PAGE)
    token = (u & ~14) | ((u >> 1) & 1) * 8 | ((u >> 2) & 3) * 2
    for i in tl.range(0, count, num_stages=C.stages):
        page = base + i
        if PAGED:
            page = tl.load(table + i).to(tl.int64)
        data = pool_ptr + page * C.page_bytes
        # Loads first, so that they wait together.
        v_scale = _float16(data + C.value_page_scale)
        weight = tl.load(data + C.value_scale + token).to(tl.float32)
        k_scale = _float16(data + C.key_page_scale) * (1.0 / 255.0)
        scale = tl.load(data + C.key_scale + channel, mask=channel < C.head_dim, other=0).to(tl.float32)
        exact_qs = q.to(tl.float32) * scale[None, :]
        qs = exact_qs.to(tl.float16)
        # What rounding took away goes through a product of its own: an outlier channel would feel it.
        qs_rest = (exact_qs - qs.to(tl.float32)).to(tl.float16)
        b = tl.full([C.rows], 0.0, tl.float32)
        if not C.key_symmetric:
            k_zero = _float16(data + C.key_page_zero) * (1.0 / 127.0)
            zero = tl.load(
                (data + C.key_zero).to(tl.pointer_type(tl.int8)) + channel, mask=channel < C.head_dim, other=0
            )
            b = tl.sum(q.to(tl.float32) * zero.to(tl.float32)[None, :], 1) * k_zero
        else:
            b = tl.sum(exact_qs, 1) * (k_scale * -0.5 * ((1 << C.key_bits) - 1))
        x = _scores(data + C.key_codes, qs, qs_rest, token, C)
        if C.refined_channels > 0:
            x += _refined(data, q_rows, shrink, token, C)
        x = (x * k_scale + b[:, None]) * factor[:, None]
        if SOFTCAP:
            x = _cap(x, softcap)
        position = (page0 + i) * PAGE + token
        masked = ((page0 + i) * PAGE < lower) | ((page0 + i + 1) * PAGE > first_query) | WINDOW
        if masked:
            seen = (position[None, :] >= oldest[:, None]) & (position[None, :] <= newest[:, None])
            x = tl.where(seen & (position >= lower)[None, :], x, -1e30)
        top = tl.maximum(tl.max(x, 1), m)
        fall = tl.exp2(m - top)
        m = top
        p = tl.exp2(x - top[:, None])
        if masked:
            p = tl.where(x > -1e29, p, 0.0)  # a row may see nothing of this page
        mass = mass * fall + tl.sum(p, 1)
        # P is weighted and rounded once, and everything of V is taken with the rounded weights.
        ps = (p * weight[None, :]).to(tl.float16)
        new = _weighted(data + C.value_codes, ps, channel, C)
        if C.value_symmetric:
            new -= tl.sum(ps.to(tl.float32), 1)[:, None] * (0.5 * ((1 << C.value_bits) - 1))
            new *= v_scale * (1.0 / 255.0)
        else:
            v_zero = _float16(data + C.value_page_zero) * (1.0 / 127.0)
            zero = tl.load((data + C.value_zero).to(tl.pointer_type(tl.int8)) + token).to(tl.float32)
            # The zero of a token goes with the weight that its codes got.
            share = ps.to(tl.float32) * (zero / weight)[None, :]
            new = new * (v_scale * (1.0 / 255.0)) + (tl.sum(share, 1) * v_zero)[:, None]
        acc = acc * fall[:, None] + new

    _store(part_ptr, lse_ptr, part, m, mass, acc, real, C)


@triton.jit
def _store(part_ptr, lse_ptr, part, m, mass, acc, real, C: tl.constexpr):
    """A partial result and its LSE in log2 units; a row that saw nothing gets an LSE that says so."""
    channel = tl.arange(0, C.dim_padded)
    at = part.to(tl.int64) * C.rows + tl.arange(0, C.rows)
    wanted = (real & (mass > 0))[:, None] & (channel < C.head_dim)[None, :]
    tl.store(part_ptr + at[:, None] * C.head_dim + channel[None, :], acc / mass[:, None], mask=wanted)
    tl.store(lse_ptr + at, tl.where(mass > 0, m + tl.log2(mass), -1e30), mask=real)


@triton.jit
def _float16(pointer):
    return tl.load(pointer.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _cap(x, softcap):
    """``cap * tanh(x / cap)`` with scores and cap in log2 units."""
    return softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * 1.4426950408889634 / softcap)) + 1.0))


@triton.jit
def _codes(
    data, row_offset, inside, ROW_BYTES: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr,
    HOW: tl.constexpr,
):  # fmt: skip
    """Codes of one part of packed rows, ``[rows, PADDED]`` float16 (times 2^-24 where HOW is not 'bytes')."""
    if HOW == "bytes":
        byte = tl.arange(0, PADDED)
        if BITS == 3:
            # A row is its low two bits packed as 2-bit codes, then its high bits packed in eighths.
            LOW: tl.constexpr = ROW_BYTES * 2 // 3
            EIGHTH: tl.constexpr = ROW_BYTES // 3
            wanted = inside[:, None] & (byte < LOW)[None, :]
            low = tl.load(data + row_offset[:, None] + byte[None, :], mask=wanted, other=0)
            high = tl.load(data + row_offset[:, None] + (LOW + byte % EIGHTH)[None, :], mask=wanted, other=0)
            bit = 2 * PART + byte // EIGHTH
            code = ((low >> (2 * PART)) & 3).to(tl.int32) | (((high.to(tl.int32) >> bit[None, :]) & 1) << 2)
        else:
            wanted = inside[:, None] & (byte < ROW_BYTES)[None, :]
            code = tl.load(data + row_offset[:, None] + byte[None, :], mask=wanted, other=0)
            code = (code >> (BITS * PART)) & ((1 << BITS) - 1)
        return code.to(tl.float16)
    else:
        word = tl.arange(0, PADDED // 2)
        wanted = inside[:, None] & (word < ROW_BYTES // 2)[None, :]
        words = tl.load(
            data.to(tl.pointer_type(tl.int16)) + (row_offset // 2)[:, None] + word[None, :], mask=wanted, other=0
        )
        even, odd = _halves(words, BITS, PART, HOW)
        return tl.join(even, odd).reshape(inside.shape[0], PADDED)


@triton.jit
def _halves(words, BITS: tl.constexpr, PART: tl.constexpr, HOW: tl.constexpr):
    """Codes of part PART of the even and odd bytes of 16-bit words as float16 subnormals."""
    SHIFT: tl.constexpr = BITS * PART
    if HOW == "asm":
        ASM: tl.constexpr = shift_and_mask(BITS, SHIFT)
        return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [words], (tl.float16, tl.float16), True, 2)
    else:
        low = (words >> SHIFT) & ((1 << BITS) - 1)
        high = (words >> (SHIFT + 8)) & ((1 << BITS) - 1)
        return low.to(tl.int16).to(tl.float16, bitcast=True), high.to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def shift_and_mask(bits, shift):
    """PTX: codes of two 16-bit words at ``shift``, then those of their odd bytes."""
    mask = ((1 << bits) - 1) * 0x10001
    return (
        "{ .reg .b32 x; "
        f"shr.u32 x, $2, {shift}; and.b32 $0, x, {mask:#010x}; shr.u32 x, $2, {shift + 8}; and.b32 $1, x, {mask:#010x};"
        " }"
    )


@triton.jit
def _scores(codes_ptr, qs, qs_rest, token, C: tl.constexpr):
    """``qs + qs_rest`` times the codes of K, ``[rows, tokens]``: products for each part of the bytes."""
    PARTS: tl.constexpr = C.key_parts
    BYTES: tl.constexpr = C.key_row_bytes
    COLUMNS: tl.constexpr = C.key_columns
    BITS: tl.constexpr = C.key_bits
    HOW: tl.constexpr = C.key_how
    ROWS: tl.constexpr = C.rows
    DIM: tl.constexpr = C.head_dim
    x = tl.full([ROWS, C.page], 0.0, tl.float32)
    always = token >= 0
    for part in tl.static_range(PARTS):
        codes = tl.trans(_codes(codes_ptr, token * BYTES, always, BYTES, COLUMNS, BITS, part, HOW))
        left = _columns(qs, part, PARTS, ROWS, DIM, COLUMNS)
        rest = _columns(qs_rest, part, PARTS, ROWS, DIM, COLUMNS)
        x = tl.dot(left, codes, tl.dot(rest, codes, x))
    if HOW != "bytes":
        x *= 16777216.0
    return x


@triton.jit
def _columns(qs, PART: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Channels of one part of K: columns PART * head_dim / parts .. of ``qs``, zero-padded."""
    if PARTS == 1:
        return qs
    elif PARTS * COLUMNS == DIM:
        return _part(qs, PART, PARTS)
    else:
        index = tl.arange(0, COLUMNS)
        inside = index < DIM // PARTS
        index = tl.where(inside, index + PART * (DIM // PARTS), 0)
        picked = tl.gather(qs, tl.broadcast_to(index[None, :], [ROWS, COLUMNS]), 1)
        return tl.where(inside[None, :], picked, 0.0)


@triton.jit
def _part(x, PART: tl.constexpr, PARTS: tl.constexpr):
    """Columns PART * n / PARTS .. of ``x`` ``[rows, n]``."""
    ROWS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1] // PARTS
    if PARTS == 1:
        return x
    elif PARTS == 2:
        a, b = x.reshape(ROWS, 2, SIZE).permute(0, 2, 1).split()
        if PART == 0:
            return a
        else:
            return b
    else:
        even, odd = x.reshape(ROWS, 4, SIZE).permute(0, 2, 1).reshape(ROWS, SIZE, 2, 2).split()
        if PART % 2 == 0:
            low, high = even.split()
        else:
            low, high = odd.split()
        if PART // 2 == 0:
            return low
        else:
            return high


@triton.jit
def _weighted(codes_ptr, ps, channel, C: tl.constexpr):
    """``ps`` times the codes of V, ``[rows, channels]``."""
    PARTS: tl.constexpr = C.value_parts
    BYTES: tl.constexpr = C.value_row_bytes
    TOKENS: tl.constexpr = C.page // C.value_parts
    BITS: tl.constexpr = C.value_bits
    HOW: tl.constexpr = C.value_how
    out = tl.full([C.rows, C.dim_padded], 0.0, tl.float32)
    inside = channel < C.head_dim
    for part in tl.static_range(PARTS):
        codes = _codes(codes_ptr, channel * BYTES, inside, BYTES, TOKENS, BITS, part, HOW)
        out = tl.dot(_part(ps, part, PARTS), tl.trans(codes), out)
    if HOW != "bytes":
        out *= 16777216.0
    return out


@triton.jit
def _refined(data, q_rows, shrink, token, C: tl.constexpr):
    """What the lower plane of the refined channels adds to the scores, in the unit of ``qs``."""
    k = tl.arange(0, C.refined_columns)
    inside = k < C.refined_channels
    index = tl.load(data + C.refined_index + k, mask=inside, other=0).to(tl.int32)
    scale = tl.load(data + C.key_scale + index, mask=inside, other=0).to(tl.float32)
    q = tl.load(q_rows[:, None] + index[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    q = (q * shrink[:, None] * (scale * (1.0 / (1 << C.refined_bits)))[None, :]).to(tl.float16)
    BYTES: tl.constexpr = C.page * C.refined_bits // 8
    at = k[None, :] * BYTES + (token % BYTES)[:, None]
    byte = tl.load(data + C.refined_codes + at, mask=inside[None, :], other=0)
    fine = (byte.to(tl.int32) >> (token // BYTES * C.refined_bits)[:, None]) & ((1 << C.refined_bits) - 1)
    return tl.dot(q, tl.trans(fine.to(tl.float16)))
