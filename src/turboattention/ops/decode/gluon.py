"""Decode for NVIDIA GPUs from sm_80 on, in Gluon: one warp a block, codes read as they lie in the page.

Codes become float16 *subnormals* by one AND for two codes (bits 0-3 of a 16-bit lane are code * 2^-24); the powers of
two are folded into Q and into the result, and the matrix units take subnormal operands without loss. Tokens (in Q K^T)
and channels (in P V) are the 16-row side of ``mma.m16n8k16``, the query heads of a KV head its 8-column side. Which
thread holds what: `gluon_layouts`. Maths and measurements: README.md beside.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from turboattention.ops.decode import gluon_layouts as lay
from turboattention.ops.decode.gluon_common import (
    LOWEST,
    as_operand,
    broadcast_to,
    cap,
    copy_all,
    copy_words,
    even_columns,
    even_entries,
    exp2,
    join_all,
    load_operand,
    pair_sums,
    query_rows,
    rest_of_product,
    scalar,
    signed_bytes,
    spread_columns,
    store,
    store_operand,
    unit_of,
    unpack,
)
from turboattention.ops.decode.gluon_exact import exact_tokens
from turboattention.ops.decode.work import row_programs, sequence_work, span

_sequence_work = gluon.jit(sequence_work.fn)
_row_programs = gluon.jit(row_programs.fn)
_span = gluon.jit(span.fn)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _wait_then_launch():
    """Wait for the kernel before this one (append, or the merge of another layer), then let the merge start.

    In this order, because the merge reads lengths that the kernel before may write.
    """
    one = gl.full([32], 0, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    ASM: gl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(ASM, "=r,r", [one], gl.int32, False, 1)


@gluon.jit
def _copy_page(kbuf, vbuf, mbuf, slot, page, C: gl.constexpr):
    copy_all(kbuf.index(slot), page + C.key_codes, C.key_words)
    copy_all(vbuf.index(slot), page + C.value_codes, C.value_words)
    copy_words(mbuf.index(slot), page + C.metadata, C.metadata_words, C.page_words - C.metadata)
    async_copy.commit_group()


@gluon.jit
def _row(lengths_ptr, page_tokens_ptr, starts_ptr, row, STARTS: gl.constexpr):
    """Length, tokens in pages and left padding of a sequence."""
    start = gl.load(starts_ptr + row) if STARTS else row * 0
    return gl.load(lengths_ptr + row), gl.load(page_tokens_ptr + row), start


# What changes while a cache grows must not compile the kernel again.
@gluon.jit(do_not_specialize=["table_batch", "table_head", "tail_capacity", "batch", "heads", "programs", "window"])
def decode_kernel(
    q_ptr, pool_ptr, table_ptr, lengths_ptr, page_tokens_ptr, starts_ptr, heads_ptr,
    tail_key_ptr, tail_value_ptr, sink_key_ptr, sink_value_ptr, tail_rows_ptr, sink_rows_ptr, part_ptr, lse_ptr,
    q_batch, q_head, table_batch, table_head, tail_batch, tail_head, tail_token, sink_batch, sink_head, sink_token,
    tail_capacity, batch, heads, programs, window, softcap, qscale,
    C: gl.constexpr, BATCH: gl.constexpr, PAGED: gl.constexpr, RING: gl.constexpr, SINKS: gl.constexpr,
    STARTS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One partial result: of some pages or of some exact tokens of a row (see `work`)."""
    if PDL:
        _wait_then_launch()
    part = gl.program_id(0)
    if BATCH == 1:
        row, first = part * 0, part * 0
        length, page_tokens, start = _row(lengths_ptr, page_tokens_ptr, starts_ptr, row, STARTS)
        exact, pages, lower = _sequence_work(length, page_tokens, start, window, 1, 64, SINKS, WINDOW)
        all_pages = pages * heads
        for_pages, for_exact = _row_programs(exact, pages, all_pages, programs, C.exact_tokens, C.least_pages)
        page_programs = for_pages * heads
        of_pages = part < page_programs
        mine = gl.where(of_pages, part, part - page_programs)
        here = gl.where(of_pages, for_pages, for_exact)
        inside = mine < here * heads
    else:
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        rows = gl.arange(0, BATCH, layout=flat)
        real = rows < batch
        length_of = gl.load(lengths_ptr + rows, mask=real, other=0)
        paged_of = gl.load(page_tokens_ptr + rows, mask=real, other=0)
        start_of = gl.zeros([BATCH], gl.int32, layout=flat)
        if STARTS:
            start_of = gl.load(starts_ptr + rows, mask=real, other=0)
        exact_of, pages_of, _ = _sequence_work(length_of, paged_of, start_of, window, 1, 64, SINKS, WINDOW)
        pages_of = gl.where(real, pages_of, 0)
        exact_of = gl.where(real, exact_of, 0)
        all_pages = gl.sum(pages_of, 0) * heads
        for_pages_of, for_exact_of = _row_programs(
            exact_of, pages_of, all_pages, programs, C.exact_tokens, C.least_pages
        )
        page_programs = gl.sum(for_pages_of, 0) * heads
        # This program among those of its kind, and what each row has of them.
        of_pages = part < page_programs
        mine = gl.where(of_pages, part, part - page_programs)
        ends = gl.associative_scan(gl.where(of_pages, for_pages_of, for_exact_of), 0, _add) * heads
        row = gl.sum((ends <= mine).to(gl.int32), 0)
        first = gl.max(gl.where(rows < row, ends, 0), 0)
        inside = row < batch
        row = gl.minimum(row, batch - 1)
        length, page_tokens, start = _row(lengths_ptr, page_tokens_ptr, starts_ptr, row, STARTS)
        exact, pages, lower = _sequence_work(length, page_tokens, start, window, 1, 64, SINKS, WINDOW)
        for_pages, for_exact = _row_programs(exact, pages, all_pages, programs, C.exact_tokens, C.least_pages)
        here = gl.where(of_pages, for_pages, for_exact)
    if inside:
        head = (mine - first) // here
        index = (mine - first) % here
        kv_head = gl.load(heads_ptr + head // C.head_blocks)
        far_row = row.to(gl.int64)
        q_ptr += far_row * q_batch
        if of_pages:
            begin, count = _span(pages, for_pages, index)
            _pages(
                q_ptr, pool_ptr, table_ptr + far_row * table_batch, kv_head, row * (heads // C.head_blocks), head,
                lower // 64 + begin, count, lower, part_ptr, lse_ptr, part, q_head, table_head, softcap, qscale,
                C, PAGED, SOFTCAP,
            )  # fmt: skip
        else:
            begin = index * C.exact_tokens
            tail_row, sink_row = far_row, far_row
            if tail_rows_ptr is not None:
                tail_row = gl.load(tail_rows_ptr + row).to(gl.int64)
            if sink_rows_ptr is not None:
                sink_row = gl.load(sink_rows_ptr + row).to(gl.int64)
            exact_tokens(
                q_ptr, kv_head, head, begin, gl.minimum(begin + C.exact_tokens, exact), exact, length, page_tokens,
                start, tail_key_ptr + tail_row * tail_batch, tail_value_ptr + tail_row * tail_batch,
                sink_key_ptr + sink_row * sink_batch, sink_value_ptr + sink_row * sink_batch, part_ptr, lse_ptr, part,
                q_head, tail_head, tail_token, sink_head, sink_token, tail_capacity, window, softcap, qscale,
                C, RING, SINKS, WINDOW, SOFTCAP,
            )  # fmt: skip


@gluon.jit
def _pages(
    q_ptr, pool_ptr, table_ptr, kv_head, first_group, head, page0, count, lower, part_ptr, lse_ptr, part, q_head,
    table_head, softcap, qscale, C: gl.constexpr, PAGED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Pages ``page0 .. page0 + count`` of one row; tokens before ``lower`` are not seen.

    first_group: KV heads of the sequences before, where there is no table.
    """
    D: gl.constexpr = C.head_dim
    N: gl.constexpr = C.product_columns
    H: gl.constexpr = C.columns
    words: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    kbuf = gl.allocate_shared_memory(gl.int16, [C.stages, C.key_words], words)
    vbuf = gl.allocate_shared_memory(gl.int16, [C.stages, C.value_words], words)
    mbuf = gl.allocate_shared_memory(gl.int16, [C.stages, C.metadata_words], words)

    KB: gl.constexpr = C.key_bits
    VB: gl.constexpr = C.value_bits
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    # A head of a paired tile has two columns: Q * scale, and what rounding took from it. Results of heads: `heads`.
    heads: gl.constexpr = even_columns(gl.zeros([64, N], gl.float32, layout=mma), H).type.layout
    of_head: gl.constexpr = gl.SliceLayout(0, heads)
    # Scores as [block of eight rows, row, head]: a lane holds one row of every block.
    blocks: gl.constexpr = gl.zeros([64, H], gl.float32, layout=heads).reshape(8, 8, H).type.layout
    part_sum: gl.constexpr = gl.SliceLayout(0, blocks)
    group = head // C.head_blocks

    # Pages in flight first: their latency hides behind the preparation of Q.
    table = table_ptr + group.to(gl.int64) * table_head + page0
    base = (first_group + group).to(gl.int64) * table_head + page0
    for i in gl.static_range(C.stages - 1):
        if i < count:
            page = gl.load(table + i).to(gl.int64) if PAGED else base + i
            _copy_page(kbuf, vbuf, mbuf, i, pool_ptr + page * C.page_words, C)
        else:
            async_copy.commit_group()

    # Q in the order of the columns of K, scaled by a power of two so that its largest value is in (0.5, 1].
    k_index = gl.arange(0, D, layout=gl.SliceLayout(1, right))
    column = gl.arange(0, N, layout=gl.SliceLayout(0, right))
    q_rows = query_rows(q_ptr, kv_head, head, q_head, column * H // N, C)
    channel = (k_index & 1) * 2 + ((k_index >> 1) & 3) * (C.key_row_words // 2) + ((k_index >> 3) & 1)
    part_of_k = (k_index >> 4) & (C.key_parts - 1)
    channel += part_of_k * (D // C.key_parts) + (k_index // (16 * C.key_parts)) * 4
    qf = gl.load(q_rows + gl.expand_dims(channel, 1)).to(gl.float32)
    unit = unit_of(qf)
    shrink = 1.0 / unit
    qn = qf * gl.expand_dims(shrink, 0)
    q_zero = qn.to(gl.float16)
    # In shared memory: read anew for every page, they need no registers in between.
    qbuf = gl.allocate_shared_memory(gl.float16, [2, D * N], words)
    store_operand(qbuf.index(0), q_zero)
    if H < N:
        store_operand(qbuf.index(1), gl.where(gl.expand_dims(column & 1, 0) == 1, q_zero, 0.0))
    # Part h of a byte is code * 2^(bits * h): taken back in the scales.
    lift = gl.exp2((15 - part_of_k * KB).to(gl.float32)).to(gl.float16)
    lift = broadcast_to(gl.expand_dims(lift, 1), q_zero)
    qsum = gl.convert_layout(gl.sum(q_zero.to(gl.float32), 0), gl.SliceLayout(0, mma))
    qsum8 = gl.convert_layout(even_entries(qsum, H, mma), gl.SliceLayout(0, part_sum)) * 128.0
    unit = gl.convert_layout(unit, gl.SliceLayout(0, mma))
    factor = gl.convert_layout(even_entries(unit, H, mma), of_head) * qscale

    mass = gl.zeros([8, H], gl.float32, layout=part_sum)
    acc = gl.zeros([D, H], gl.float32, layout=heads)
    ones_sum = gl.zeros([16, H], gl.float32, layout=heads)
    v_unit = 1.0  # acc and ones_sum are in units of this; it follows the V scale of the latest page

    # A row of "codes" 1 in the scale of each part: sums the rounded P, which the zero of V belongs to.
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, left))
    one_bits = (1 << ((col >> C.part_bit) & (C.value_parts - 1)) * VB).to(gl.int16)
    ones = gl.expand_dims(one_bits.to(gl.float16, bitcast=True), 0) + gl.zeros([16, 64], gl.float16, layout=left)
    mrow = gl.arange(0, 64, layout=gl.SliceLayout(1, heads))
    v_lift = gl.exp2((-((mrow >> C.part_bit) & (C.value_parts - 1)) * VB).to(gl.float32))
    of_block = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, blocks)))
    in_block = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, blocks)))
    token = _token_of_row(gl.expand_dims(of_block, 1) * 8 + gl.expand_dims(in_block, 0), VB)
    token = gl.expand_dims(token, 2)
    m8 = gl.full([H], LOWEST, gl.float32, layout=gl.SliceLayout(0, part_sum))

    limit = count - 1
    ahead = base + gl.minimum(C.stages - 1, limit)
    if PAGED:
        ahead = gl.load(table + gl.minimum(C.stages - 1, limit)).to(gl.int64)
    if C.refined_channels > 0:
        # Q and scale of the refined channels are fetched one page ahead, their index two.
        r_index, r_page = _refined_index(pool_ptr, table, base, 0, limit, PAGED, right, C)
        rq, rs = _refined_operands(q_rows, shrink, column, pool_ptr, r_index, r_page, right, C)
        r_index, r_page = _refined_index(pool_ptr, table, base, 1, limit, PAGED, right, C)
    cur = 0
    for i in range(count):
        async_copy.wait_group(C.stages - 2)
        into = cur + C.stages - 1
        into = gl.where(into >= C.stages, into - C.stages, into)
        if i + C.stages - 1 < count:
            _copy_page(kbuf, vbuf, mbuf, into, pool_ptr + ahead * C.page_words, C)
        else:
            async_copy.commit_group()
        ahead = base + gl.minimum(i + C.stages, limit)
        if PAGED:
            ahead = gl.load(table + gl.minimum(i + C.stages, limit)).to(gl.int64)
        kmem = kbuf.index(cur)
        vmem = vbuf.index(cur)
        meta = mbuf.index(cur)

        scale = unpack(meta.slice(0, D // 2).load(lay.key_scale_layout(D, KB)), 8)
        scale = scale.reshape(lay.twos(D)).permute(lay.key_scale_order(D, KB).value).reshape(D)
        scale = gl.convert_layout(scale, gl.SliceLayout(1, right), assert_trivial=True)
        q_zero = load_operand(qbuf.index(0), D, N, right)
        scale = broadcast_to(gl.expand_dims(scale, 1), q_zero) * lift
        # What rounding takes away goes through a product too: an outlier channel would feel it.
        qs = load_operand(qbuf.index(1), D, N, right) * scale if H < N else q_zero * scale
        qs_rest = rest_of_product(q_zero, scale, qs)
        zero = signed_bytes(meta.slice(D // 2, D // 2).load(lay.key_scale_layout(D, KB)))
        zero = zero.reshape(lay.twos(D)).permute(lay.key_scale_order(D, KB).value).reshape(D)
        zero = gl.convert_layout(zero, gl.SliceLayout(0, left), assert_trivial=True)
        zeros = broadcast_to(gl.expand_dims(zero, 0), gl.zeros([16, 1], gl.float16, layout=left))
        c = mma_v2(zeros, q_zero, gl.zeros([16, N], gl.float32, layout=mma))

        codes = unpack(kmem.load(lay.key_codes_layout(D, KB, VB)), KB)
        codes = codes.reshape(lay.twos(64 * D)).permute(lay.key_codes_order(D, KB, VB).value).reshape(64, D)
        codes = gl.convert_layout(codes, left, assert_trivial=True)
        x = mma_v2(codes, qs_rest, gl.zeros([64, N], gl.float32, layout=mma))
        if H == N:
            x += mma_v2(codes, qs, gl.zeros([64, N], gl.float32, layout=mma))
        if C.refined_channels > 0:
            fine = _refined_codes(meta, left, C)
            x = mma_v2(fine, (rq * gl.expand_dims(rs, 1)).to(gl.float16), x)
            rq, rs = _refined_operands(q_rows, shrink, column, pool_ptr, r_index, r_page, right, C)
            r_index, r_page = _refined_index(pool_ptr, table, base, i + 2, limit, PAGED, right, C)

        k_scale = scalar(meta.slice(C.key_page_scale, 1)) * (2.0**33 / 255.0)
        k_zero = scalar(meta.slice(C.key_page_zero, 1)) * (1.0 / 127.0)
        v_scale = scalar(meta.slice(C.value_page_scale, 1))
        # Every row of c holds the same numbers: each lane finds those of its heads in its own registers.
        a = gl.convert_layout(factor, gl.SliceLayout(0, part_sum), assert_trivial=True)
        c = even_columns(c, H)
        b = gl.convert_layout(gl.max(c.reshape(2, 8, H), 0), part_sum, assert_trivial=True) * 16777216.0
        b = (b - gl.expand_dims(qsum8, 0)) * gl.expand_dims(a * k_zero, 0)
        a = a * k_scale
        # In blocks of eight rows: a lane holds one row of each block, so that only the last step crosses lanes.
        x = gl.convert_layout(pair_sums(x, H).reshape(8, 8, H), blocks, assert_trivial=True)
        y = x * gl.expand_dims(gl.expand_dims(a, 0), 0) + gl.expand_dims(b, 0)
        if SOFTCAP:
            y = cap(y, softcap)
        if (page0 + i) * 64 < lower:
            y = gl.where((page0 + i) * 64 + token >= lower, y, LOWEST)
        top = gl.maximum(gl.max(gl.max(y, 0), 0), m8)
        fall8 = exp2(m8 - top)
        m8 = top
        p = exp2(y - gl.expand_dims(gl.expand_dims(top, 0), 0))
        mass = mass * gl.expand_dims(fall8, 0) + gl.sum(p, 0)
        fall = gl.convert_layout(fall8, of_head, assert_trivial=True)
        p = gl.convert_layout(p.reshape(64, H), heads, assert_trivial=True)

        vs = unpack(meta.slice(C.value_scale, 32).load(lay.value_scale_layout(VB)), 8)
        vs = vs.reshape(lay.twos(64)).permute(lay.value_scale_order(VB).value).reshape(64)
        vs = gl.convert_layout(vs, gl.SliceLayout(1, heads), assert_trivial=True).to(gl.int16, bitcast=True)
        # A page of zeros has page scale 0: its P is 0 and the unit stays a number.
        vs = vs.to(gl.float32) * (v_lift * gl.where(v_scale > 0, 1.0, 0.0))
        v_scale = gl.maximum(v_scale, 5.9604645e-08)
        ratio = fall * (v_unit / v_scale)
        v_unit = v_scale
        p = spread_columns(p * gl.expand_dims(vs, 1), N).to(gl.float16)
        p = as_operand(gl.convert_layout(p, mma, assert_trivial=True), right)
        values = unpack(vmem.load(lay.value_codes_layout(D, VB)), VB)
        values = values.reshape(lay.twos(64 * D)).permute(lay.value_codes_order(D, VB).value).reshape(D, 64)
        values = gl.convert_layout(values, left, assert_trivial=True)
        # From zero for every page: the matrix unit truncates when it adds, which would bias long sums.
        new = mma_v2(values, p, gl.zeros([D, N], gl.float32, layout=mma))
        acc = acc * gl.expand_dims(ratio, 0) + gl.convert_layout(even_columns(new, H), heads, assert_trivial=True)
        new = mma_v2(ones, p, gl.zeros([16, N], gl.float32, layout=mma))
        new = gl.convert_layout(even_columns(new, H), heads, assert_trivial=True)
        ones_sum = ones_sum * gl.expand_dims(ratio, 0) + new
        cur = gl.where(cur + 1 >= C.stages, 0, cur + 1)
    async_copy.wait_group(0)

    total = gl.convert_layout(gl.sum(mass, 0), of_head)
    middle = gl.max(ones_sum, 0) * (0.5 * ((1 << VB) - 1))
    out = (acc - gl.expand_dims(middle, 0)) * gl.expand_dims(v_unit * (2.0**24 / 255.0) / total, 0)
    m = gl.convert_layout(m8, of_head, assert_trivial=True)
    store(part_ptr, lse_ptr, part, out, m, total, head, heads, C)


@gluon.jit
def _token_of_row(row, VALUE_BITS: gl.constexpr):
    """Token of a row of the scores (see `gluon_layouts.token_bits` and `row_bits`)."""
    token = row & 0
    for i in gl.static_range(6):
        token |= ((row >> lay.row_position(VALUE_BITS, i)) & 1) << i
    return token


@gluon.jit
def _refined_index(pool_ptr, table, base, i, limit, PAGED: gl.constexpr, right: gl.constexpr, C: gl.constexpr):
    """Refined channels of page ``i`` of the segment, and where that page is."""
    i = gl.minimum(i, limit)
    page = base + i
    if PAGED:
        page = gl.load(table + i).to(gl.int64)
    start = (pool_ptr + page * C.page_words).to(gl.pointer_type(gl.uint8))
    k = gl.arange(0, C.refined_columns, layout=gl.SliceLayout(1, right))
    index = gl.load(start + C.refined_index + k, mask=k < C.refined_channels, other=0).to(gl.int32)
    return index, page


@gluon.jit
def _refined_operands(q_rows, shrink, column, pool_ptr, index, page, right: gl.constexpr, C: gl.constexpr):
    """Q and scale of the refined channels; their product has the unit of ``q_code * scale``."""
    start = (pool_ptr + page * C.page_words).to(gl.pointer_type(gl.uint8))
    k = gl.arange(0, C.refined_columns, layout=gl.SliceLayout(1, right))
    real = gl.expand_dims((column & 1 == 0) | (C.columns == C.product_columns), 0)
    q = gl.load(q_rows + gl.expand_dims(index, 1), mask=real, other=0.0).to(gl.float32) * gl.expand_dims(shrink, 0)
    scale = gl.load(start + 2 * C.metadata + 2 * C.key_scale + index, mask=k < C.refined_channels, other=0).to(
        gl.float32
    )
    return q, scale * C.refined_unit


@gluon.jit
def _refined_codes(memory, left: gl.constexpr, C: gl.constexpr):
    """Refined codes ``[64 rows, refined columns]`` as subnormals."""
    RB: gl.constexpr = C.refined_bits
    VB: gl.constexpr = C.value_bits
    layout: gl.constexpr = lay.refined_layout(8, RB, VB)
    lane = gl.arange(0, lay.lane_shifts(RB, VB), layout=gl.SliceLayout(0, layout))
    shift = lane * 0
    for i in gl.static_range(lay.log2(lay.lane_shifts(RB, VB))):
        shift += ((lane >> i) & 1) * lay.lane_shift_step(RB, VB, i)
    ROOM: gl.constexpr = 32 * RB
    if C.refined_columns == 16:
        fine = gl.join(_refined_piece(memory, shift, 0, layout, C), _refined_piece(memory, shift, ROOM, layout, C))
    elif C.refined_columns == 32:
        a = gl.join(_refined_piece(memory, shift, 0, layout, C), _refined_piece(memory, shift, ROOM, layout, C))
        b = gl.join(
            _refined_piece(memory, shift, 2 * ROOM, layout, C), _refined_piece(memory, shift, 3 * ROOM, layout, C)
        )
        fine = gl.join(a, b)
    else:
        a = gl.join(_refined_piece(memory, shift, 0, layout, C), _refined_piece(memory, shift, ROOM, layout, C))
        b = gl.join(
            _refined_piece(memory, shift, 2 * ROOM, layout, C), _refined_piece(memory, shift, 3 * ROOM, layout, C)
        )
        c = gl.join(
            _refined_piece(memory, shift, 4 * ROOM, layout, C), _refined_piece(memory, shift, 5 * ROOM, layout, C)
        )
        d = gl.join(
            _refined_piece(memory, shift, 6 * ROOM, layout, C), _refined_piece(memory, shift, 7 * ROOM, layout, C)
        )
        fine = gl.join(gl.join(a, b), gl.join(c, d))
    fine = fine.reshape(lay.twos(64 * C.refined_columns))
    fine = fine.permute(lay.refined_order(C.refined_columns, RB, VB).value).reshape(64, C.refined_columns)
    return gl.convert_layout(fine, left, assert_trivial=True)


@gluon.jit
def _refined_piece(memory, shift, AT: gl.constexpr, layout: gl.constexpr, C: gl.constexpr):
    """Refined codes of eight channels, unpacked."""
    RB: gl.constexpr = C.refined_bits
    OUT: gl.constexpr = lay.refined_outputs(RB, C.value_bits)
    ASM: gl.constexpr = lay.refined_asm(RB, C.value_bits)
    words = memory.slice(C.refined_codes + AT, 32 * RB).load(gl.SliceLayout(1, layout))
    words = gl.expand_dims(words, 1) + (gl.expand_dims(shift, 0) * 0).to(gl.int16)
    shift = gl.expand_dims(shift, 0) + (words * 0).to(gl.int32)
    return join_all(
        gl.inline_asm_elementwise(ASM, lay.constraints(OUT, 3), [words, shift], (gl.float16,) * OUT, True, 2)
    )
