"""INT8 prefill for Hopper (sm_90) in Gluon: two warpgroups of 64 rows compute, one warp loads K and V by TMA.

In a warpgroup the product Q K of the next tile runs while P V of the tile before is added to the output, and P V of
this tile runs while the maxima of the next scores are sought. With head_dim 128 the two warpgroups take turns in the
exponentials. Same arithmetic as `int8_triton`, except that the output is rescaled only when a row's maximum grows by
2^60 (float32 has the range), in a branch that single warps take, and that queries are quantised here.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from turboattention.ops.prefill.hopper_rows import read_queries, write_rows
from turboattention.ops.prefill.hopper_tile import (
    FIRST_BASE,
    ROWS,
    TOKENS,
    add_product,
    await_turn,
    exponents,
    hide,
    integers,
    output_layout,
    pass_turn,
    probabilities,
    references,
    rescale,
    row_sums,
    score_factor,
    scores_layout,
)
from turboattention.ops.prefill.int8 import Int8Chunk
from turboattention.ops.prefill.sequences import BLOCK

# Triton 3.9 knows the copy by another name only.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
STAGES = gl.constexpr(3)
REGISTERS = 240  # of a computing thread; the loader's share goes to it
COMPILED_REGISTERS = 168  # times 384 threads: what a program owns before it is shared out


@gluon.jit
def _load(k_desc, v_desc, full, free, k_buffer, v_buffer, k_row, v_row, start_k, tiles):
    """The producer, one warp: step i brings K of tile i + 1 and V of tile i."""
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        # Behind the last tile it comes once more: a barrier expects the same bytes at every step.
        token = start_k + gl.minimum(i + 1, tiles - 1) * TOKENS
        _copy(k_desc, [k_row + token, 0], full.index(stage), k_buffer.index(stage))
        _copy(v_desc, [v_row, start_k + i * TOKENS], full.index(stage), v_buffer.index(stage))


@gluon.jit
def _softmax(
    s, tile, base, q_scale, k_scale, limit, length, clear, WIDTH: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """From a tile's scores: arguments of its exponentials, base, factor of the old output, weight of the tile."""
    row_layout: gl.constexpr = base.type.layout
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=output_layout(WIDTH), k_width=4)
    factor = score_factor(q_scale, k_scale, row_layout)
    if tile >= clear:
        s, factor = hide(s, factor, limit, length, tile * TOKENS, row_layout, CAUSAL)
    reference, base, old, weight = references(s, factor, base)
    return exponents(s, factor, reference, operand), base, old, weight


@gluon.jit
def _step(
    i, x, product, acc, total, base, old, weight, fold, q_scale, q_shared, full, free,
    k_buffer, v_buffer, k_scale_ptr, v_scale_ptr, limit, length, clear,
    NUMBER: gl.constexpr, WIDTH: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Probabilities and P V of tile i; scores of tile i + 1.

    product: P V of tile i - 1, which is added to the output under the product Q K. fold: its weight. old: the factor of
    the output since then.
    """
    zero_s = gl.zeros([ROWS, TOKENS], gl.int32, layout=scores_layout())
    zero_o = gl.zeros([ROWS, WIDTH], gl.int32, layout=output_layout(WIDTH))
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=output_layout(WIDTH), k_width=4)
    stage = i % STAGES
    k_scale = gl.load(k_scale_ptr + i + 1)
    v_scale = gl.load(v_scale_ptr + i)
    words = pass_turn(probabilities(x), 1 - NUMBER, WIDTH)
    codes = integers(words, operand)
    k = k_buffer.index(stage).permute((1, 0))
    s = warpgroup_mma(q_shared, k, zero_s, use_acc=False, is_async=True)
    acc = rescale(add_product(acc, product, fold, WIDTH), old, WIDTH)
    total = gl.fma(row_sums(words, base), weight, total * old)
    fold = weight * v_scale
    product = warpgroup_mma(codes, v_buffer.index(stage).permute((1, 0)), zero_o, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    x, base, old, weight = _softmax(s, i + 1, base, q_scale, k_scale, limit, length, clear, WIDTH, CAUSAL)
    # A branch that keeps the assembler from waiting for P V before the maxima.
    mbarrier.wait(full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(free.index(stage), count=1)
    weight = await_turn(weight, NUMBER, WIDTH)
    return x, product, acc, total, base, old, weight, fold


@gluon.jit
def _compute(
    q_shared, first_k, first_barrier, full, free, k_buffer, v_buffer, q_ptr, mean_ptr, gain_ptr, k_scale_ptr,
    v_scale_ptr, out_ptr, lse_ptr, q_stride_t, q_stride_d, out_stride_t, out_stride_d, scale, rows_left, limit, length,
    clear, tiles, NUMBER: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 rows. limit: tokens that the first row sees, one more for each row after it.

    clear: tiles without mask.
    """
    s_layout: gl.constexpr = scores_layout()
    o_layout: gl.constexpr = output_layout(WIDTH)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=4)
    zero_s = gl.zeros([ROWS, TOKENS], gl.int32, layout=s_layout)
    zero_o = gl.zeros([ROWS, WIDTH], gl.int32, layout=o_layout)
    row_layout: gl.constexpr = gl.max(gl.max(zero_s.reshape([ROWS, TOKENS // 8, 4, 2]), 3), 1).type.layout
    q_scale = read_queries(
        q_shared, q_ptr, mean_ptr, gain_ptr, lse_ptr, q_stride_t, q_stride_d, scale, rows_left, HEAD_DIM, WIDTH
    )
    base = gl.full([ROWS, 4], FIRST_BASE, gl.float32, layout=row_layout)
    total = gl.zeros([ROWS, 4], gl.float32, layout=row_layout)
    fold = gl.zeros([ROWS, 4], gl.float32, layout=row_layout)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, layout=o_layout)
    mbarrier.wait(first_barrier, 0)
    s = warpgroup_mma(q_shared, first_k.permute((1, 0)), zero_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    k_scale = gl.load(k_scale_ptr)
    x, base, old, weight = _softmax(s, 0, base, q_scale, k_scale, limit, length, clear, WIDTH, CAUSAL)
    mbarrier.wait(full.index(0), 0)
    if NUMBER == 1:
        weight = await_turn(weight, NUMBER, WIDTH)
    product = zero_o
    for i in range(0, tiles - 1):
        x, product, acc, total, base, old, weight, fold = _step(
            i, x, product, acc, total, base, old, weight, fold, q_scale, q_shared, full, free,
            k_buffer, v_buffer, k_scale_ptr, v_scale_ptr, limit, length, clear, NUMBER, WIDTH, CAUSAL,
        )  # fmt: skip
    last = tiles - 1
    words = pass_turn(probabilities(x), 1 - NUMBER, WIDTH)
    codes = integers(words, operand)
    acc = rescale(add_product(acc, product, fold, WIDTH), old, WIDTH)
    v = v_buffer.index(last % STAGES).permute((1, 0))
    product = warpgroup_mma(codes, v, zero_o, use_acc=False, is_async=True)
    total = gl.fma(row_sums(words, base), weight, total * old)
    v_scale = gl.load(v_scale_ptr + last)
    if NUMBER == 0:
        weight = await_turn(weight, NUMBER, WIDTH)
    product = warpgroup_mma_wait(0, deps=[product])
    acc = add_product(acc, product, weight * v_scale, WIDTH)
    write_rows(
        acc, total, base, out_ptr, lse_ptr, out_stride_t, out_stride_d, rows_left, row_layout, HEAD_DIM, WIDTH
    )  # fmt: skip


@gluon.jit
def _locate(cu_ptr, number, longest, PACKED: gl.constexpr):
    """First token, length and padded start of a sequence (`Sequences`)."""
    if PACKED:
        first = gl.load(cu_ptr + number)
        length = gl.load(cu_ptr + number + 1) - first
        start = (first // 128 + number) * 128
    else:
        first = number * 0
        length = longest
        start = number * (gl.cdiv(longest, 128) * 128)
    return first, length, start


@gluon.jit(do_not_specialize=["longest_q", "longest_k", "heads", "ratio"])
def attention_kernel(
    q_ptr, mean_ptr, gain_ptr, k_desc, v_desc, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, scale,
    longest_q, longest_k, padded_k, heads, ratio, q_stride_b, q_stride_h, q_stride_t, q_stride_d,
    out_stride_b, out_stride_h, out_stride_t, out_stride_d, lse_stride_b, lse_stride_h,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 query rows of one head. Grid (batch * heads, blocks of rows), the longest causal rows first."""
    number = gl.program_id(0) // heads
    head = gl.program_id(0) % heads
    kv_head = head // ratio
    block = gl.program_id(1)
    if CAUSAL:
        block = gl.num_programs(1) - 1 - block
    first_q, length_q, _ = _locate(cu_q_ptr, number, longest_q, PACKED)
    _, length, start_k = _locate(cu_k_ptr, number, longest_k, PACKED)
    first_row = block * (2 * ROWS)
    # A block behind the end of a packed sequence computes one tile and stores nothing.
    rows_left = length_q - first_row
    position = first_row + length - length_q
    end = length
    if CAUSAL:
        end = gl.minimum(position + 2 * ROWS, length)
    tiles = gl.where(rows_left > 0, gl.maximum(gl.cdiv(end, TOKENS), 1), 1)
    clear = length // TOKENS
    clear_1 = clear
    if CAUSAL:
        clear = gl.maximum(gl.minimum(position + 1, length), 0) // TOKENS
        clear_1 = gl.maximum(gl.minimum(position + ROWS + 1, length), 0) // TOKENS

    q_shared = gl.allocate_shared_memory(gl.int8, [2, ROWS, WIDTH], shared_layout(ROWS, WIDTH))
    k_buffer = gl.allocate_shared_memory(
        k_desc.dtype, [STAGES, k_desc.block_type.shape[0], k_desc.block_type.shape[1]], k_desc.layout
    )
    v_buffer = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES, v_desc.block_type.shape[0], v_desc.block_type.shape[1]], v_desc.layout
    )
    first_k = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    first = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(first, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    mbarrier.expect(first, k_desc.block_type.nbytes)
    _copy(k_desc, [kv_head * padded_k + start_k, 0], first, first_k)
    k_scale_ptr += (kv_head * padded_k + start_k) // TOKENS
    v_scale_ptr += (kv_head * padded_k + start_k) // TOKENS
    mean_ptr += (number * (heads // ratio) + kv_head) * WIDTH
    gain_ptr += (number * (heads // ratio) + kv_head) * WIDTH
    row = (first_q + first_row).to(gl.int64)
    q_ptr += head.to(gl.int64) * q_stride_h + row * q_stride_t
    out_ptr += head.to(gl.int64) * out_stride_h + row * out_stride_t
    lse_ptr += head.to(gl.int64) * lse_stride_h + row
    if not PACKED:
        q_ptr += number.to(gl.int64) * q_stride_b
        out_ptr += number.to(gl.int64) * out_stride_b
        lse_ptr += number.to(gl.int64) * lse_stride_b
    gl.warp_specialize(
        [
            (_compute, (q_shared.index(0), first_k, first, full, free, k_buffer, v_buffer, q_ptr, mean_ptr,
                        gain_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, q_stride_t, q_stride_d, out_stride_t,
                        out_stride_d, scale, rows_left, position + 1, length, clear, tiles,
                        gl.constexpr(0), HEAD_DIM, WIDTH, CAUSAL)),
            (_compute, (q_shared.index(1), first_k, first, full, free, k_buffer, v_buffer, q_ptr + q_stride_t * ROWS,
                        mean_ptr, gain_ptr, k_scale_ptr, v_scale_ptr, out_ptr + out_stride_t * ROWS, lse_ptr + ROWS,
                        q_stride_t, q_stride_d, out_stride_t, out_stride_d, scale, rows_left - ROWS,
                        position + ROWS + 1, length, clear_1, tiles, gl.constexpr(1), HEAD_DIM, WIDTH, CAUSAL)),
            (_load, (k_desc, v_desc, full, free, k_buffer, v_buffer, kv_head * padded_k, kv_head * WIDTH, start_k,
                     tiles)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.constexpr_function
def shared_layout(rows, columns):
    """Layout of an int8 tile in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8)


def attention(q: Tensor, chunk: Int8Chunk, out: Tensor, lse: Tensor, scale: float, *, causal: bool) -> None:
    """Attention over the operands, written into ``out`` (like q, any strides) and ``lse``; see `int8.int8_attention`.

    q and scale: as for `int8.quantise_chunk`. The kernel quantises q itself; of the chunk it reads K, V, mean and gain.
    The width of the operands must be 64 or 128 (head_dim up to 128).
    """
    sequences = chunk.sequences
    packed = sequences.is_packed
    heads, kv_heads, width = sequences.heads(q), chunk.k.shape[0], chunk.k.shape[2]

    def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, columns], shared_layout(rows, columns))

    grid = (sequences.batch * heads, -(-sequences.max_q // (2 * 64)))
    strides = [(0, x.stride(1), x.stride(0), x.stride(2)) if packed else x.stride() for x in (q, out)]
    attention_kernel[grid](
        q, chunk.mean, chunk.gain, describe(chunk.k, BLOCK, width), describe(chunk.v, width, BLOCK),
        chunk.k_scale, chunk.v_scale, out, lse, sequences.cu_q, sequences.cu_k, scale,
        sequences.max_q, sequences.max_k, sequences.padded_k, heads, heads // kv_heads,
        *strides[0], *strides[1], 0 if packed else lse.stride(0), lse.stride(-2),
        HEAD_DIM=chunk.head_dim, WIDTH=width, CAUSAL=causal, PACKED=packed, REGISTERS=REGISTERS,
        num_warps=4, maxnreg=COMPILED_REGISTERS,
    )  # fmt: skip
