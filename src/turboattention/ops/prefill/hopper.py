"""INT8 prefill for Hopper (sm_90) in Gluon: two warpgroups of 64 rows compute, one warp loads K and V by TMA.

The products of neighbouring tiles overlap: Q K of the next tile and P V of this one are issued together, and P V runs
under the softmax of the next tile. Same operands and same arithmetic as `int8_triton`, except that the output is
rescaled only when a row's maximum grows by 2^60 (float32 has the range), in a branch that single warps take.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from turboattention.ops.prefill.hopper_tile import (
    FIRST_BASE,
    LOG2_LEVELS,
    ROWS,
    TOKENS,
    add_product,
    hide,
    integers,
    output_layout,
    rescale,
    row_sums,
    score_factor,
    scores_layout,
    softmax,
)
from turboattention.ops.prefill.int8 import Int8Chunk
from turboattention.ops.prefill.sequences import BLOCK

STAGES = gl.constexpr(2)
REGISTERS = 240  # of a computing thread; the loader's share goes to it
COMPILED_REGISTERS = 168  # times 384 threads: what a program owns before it is shared out
LN2 = gl.constexpr(math.log(2))


@gluon.jit
def _load(k_desc, v_desc, barriers, buffers, k_row, v_row, start_k, tiles):
    """The producer: one warp."""
    k_full, k_empty, v_full, v_empty = barriers
    k_buffer, v_buffer = buffers
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [k_row + start_k + i * TOKENS, 0], k_full.index(stage), k_buffer.index(stage)
        )
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_desc, [v_row, start_k + i * TOKENS], v_full.index(stage), v_buffer.index(stage)
        )


@gluon.jit
def _step(
    i, p, acc, total, base, weight, v_scale, q_scale, q_shared, barriers, buffers, k_scale_ptr, v_scale_ptr,
    limit, length,
    WIDTH: gl.constexpr, EARLY: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """P V of tile i, scores and softmax of tile i + 1."""
    k_full, k_empty, v_full, v_empty = barriers
    k_buffer, v_buffer = buffers
    zero_s = gl.zeros([ROWS, TOKENS], gl.int32, layout=scores_layout())
    zero_o = gl.zeros([ROWS, WIDTH], gl.int32, layout=output_layout(WIDTH))
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=output_layout(WIDTH), k_width=4)
    row_layout: gl.constexpr = base.type.layout
    stage = i % STAGES
    phase = (i // STAGES) & 1
    next_stage = (i + 1) % STAGES
    next_phase = ((i + 1) // STAGES) & 1
    k_scale = gl.load(k_scale_ptr + i + 1)
    next_v_scale = gl.load(v_scale_ptr + i + 1)
    if EARLY:
        mbarrier.wait(k_full.index(next_stage), next_phase)
        k = k_buffer.index(next_stage).permute((1, 0))
        next_s = warpgroup_mma(q_shared, k, zero_s, use_acc=False, is_async=True)
    codes = integers(p)
    if not EARLY:
        mbarrier.wait(k_full.index(next_stage), next_phase)
    mbarrier.wait(v_full.index(stage), phase)
    if not EARLY:
        k = k_buffer.index(next_stage).permute((1, 0))
        next_s = warpgroup_mma(q_shared, k, zero_s, use_acc=False, is_async=True)
    product = warpgroup_mma(codes, v_buffer.index(stage).permute((1, 0)), zero_o, use_acc=False, is_async=True)
    total = gl.fma(row_sums(codes, base), weight, total)
    # The next scores are complete; P V of this tile runs under the softmax of the next one.
    s = warpgroup_mma_wait(1, deps=[next_s])
    mbarrier.arrive(k_empty.index(next_stage), count=1)
    factor = score_factor(q_scale, k_scale, row_layout)
    if MASKED:
        s, factor = hide(s, factor, limit, length, (i + 1) * TOKENS, row_layout, CAUSAL)
    p, base, old, next_weight = softmax(s, factor, base, operand)
    product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(v_empty.index(stage), count=1)
    acc = rescale(add_product(acc, product, weight * v_scale, WIDTH), old, WIDTH)
    return p, acc, total * old, base, next_weight, next_v_scale


@gluon.jit
def _compute(
    q_shared, q_barrier, barriers, buffers, q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr,
    out_ptr, lse_ptr, out_stride_t, out_stride_d, rows_left, limit, length, clear, tiles,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, EARLY: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 rows. limit: tokens that the first row sees, one more for each row after it.

    clear: tiles without mask. EARLY: issue Q K of the next tile before P is packed; better or worse by what the
    compiler makes of it.
    """
    k_full, k_empty, v_full, _ = barriers
    k_buffer, v_buffer = buffers
    s_layout: gl.constexpr = scores_layout()
    o_layout: gl.constexpr = output_layout(WIDTH)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=4)
    zero_s = gl.zeros([ROWS, TOKENS], gl.int32, layout=s_layout)
    zero_o = gl.zeros([ROWS, WIDTH], gl.int32, layout=o_layout)
    row_layout: gl.constexpr = gl.max(gl.max(zero_s.reshape([ROWS, TOKENS // 8, 4, 2]), 3), 1).type.layout
    q_scale = gl.load(q_scale_ptr)
    base = gl.full([ROWS, 4], FIRST_BASE, gl.float32, layout=row_layout)
    total = gl.zeros([ROWS, 4], gl.float32, layout=row_layout)
    acc = gl.zeros([ROWS, WIDTH], gl.float32, layout=o_layout)
    mbarrier.wait(q_barrier, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q_shared, k_buffer.index(0).permute((1, 0)), zero_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0), count=1)
    factor = score_factor(q_scale, gl.load(k_scale_ptr), row_layout)
    if clear == 0:
        s, factor = hide(s, factor, limit, length, 0, row_layout, CAUSAL)
    v_scale = gl.load(v_scale_ptr)
    p, base, _, weight = softmax(s, factor, base, operand)
    # Exponentials, not integers, are carried over the edge of a loop: int8 values would be split into bytes there.
    middle = gl.maximum(gl.minimum(clear, tiles) - 1, 0)
    for i in range(0, middle):
        p, acc, total, base, weight, v_scale = _step(
            i, p, acc, total, base, weight, v_scale, q_scale, q_shared, barriers, buffers, k_scale_ptr, v_scale_ptr,
            limit, length, WIDTH, EARLY, False, CAUSAL,
        )  # fmt: skip
    for i in range(middle, tiles - 1):
        p, acc, total, base, weight, v_scale = _step(
            i, p, acc, total, base, weight, v_scale, q_scale, q_shared, barriers, buffers, k_scale_ptr, v_scale_ptr,
            limit, length, WIDTH, False, True, CAUSAL,
        )  # fmt: skip
    last = tiles - 1
    codes = integers(p)
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    v = v_buffer.index(last % STAGES).permute((1, 0))
    product = warpgroup_mma(codes, v, zero_o, use_acc=False, is_async=True)
    total = gl.fma(row_sums(codes, base), weight, total)
    product = warpgroup_mma_wait(0, deps=[product])
    acc = add_product(acc, product, weight * v_scale, WIDTH)

    # Four threads hold parts of a row's sum and the same base.
    total = gl.sum(total, 1)
    base = gl.max(base, 1)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    blind = base < 0.01 * FIRST_BASE
    lse = LN2 * (base + gl.log2(total) - LOG2_LEVELS) + gl.load(shift_ptr + row)
    gl.store(lse_ptr + row, gl.where(blind, -float("inf"), lse), mask=row < rows_left)
    inverse = gl.convert_layout(gl.where(blind, 0.0, 1.0 / total), gl.SliceLayout(1, o_layout))
    out = acc * gl.expand_dims(inverse, 1)
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, o_layout)), 1)
    channel = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, o_layout)), 0)
    to = out_ptr + row.to(gl.int64) * out_stride_t + channel * out_stride_d
    gl.store(to, out.to(out_ptr.dtype.element_ty), mask=(row < rows_left) & (channel < HEAD_DIM))


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
    q_desc, k_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    longest_q, longest_k, padded_q, padded_k, heads, ratio,
    out_stride_b, out_stride_h, out_stride_t, out_stride_d, lse_stride_b, lse_stride_h,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
    EARLY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 query rows of one head. Grid (batch * heads, blocks of rows), the longest causal rows first."""
    number = gl.program_id(0) // heads
    head = gl.program_id(0) % heads
    kv_head = head // ratio
    block = gl.program_id(1)
    if CAUSAL:
        block = gl.num_programs(1) - 1 - block
    first_q, length_q, start_q = _locate(cu_q_ptr, number, longest_q, PACKED)
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

    q_shared = gl.allocate_shared_memory(
        q_desc.dtype, [2, q_desc.block_type.shape[0], q_desc.block_type.shape[1]], q_desc.layout
    )
    k_buffer = gl.allocate_shared_memory(
        k_desc.dtype, [STAGES, k_desc.block_type.shape[0], k_desc.block_type.shape[1]], k_desc.layout
    )
    v_buffer = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES, v_desc.block_type.shape[0], v_desc.block_type.shape[1]], v_desc.layout
    )
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_barrier, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    padded_row = head * padded_q + start_q + first_row
    mbarrier.expect(q_barrier, 2 * q_desc.block_type.nbytes)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(q_desc, [padded_row + i * ROWS, 0], q_barrier, q_shared.index(i))
    barriers = (k_full, k_empty, v_full, v_empty)
    buffers = (k_buffer, v_buffer)
    q_scale_ptr += padded_row // ROWS
    k_scale_ptr += (kv_head * padded_k + start_k) // TOKENS
    v_scale_ptr += (kv_head * padded_k + start_k) // TOKENS
    shift_ptr += padded_row
    row = (first_q + first_row).to(gl.int64)
    out_ptr += head.to(gl.int64) * out_stride_h + row * out_stride_t
    lse_ptr += head.to(gl.int64) * lse_stride_h + row
    if not PACKED:
        out_ptr += number.to(gl.int64) * out_stride_b
        lse_ptr += number.to(gl.int64) * lse_stride_b
    gl.warp_specialize(
        [
            (_compute, (q_shared.index(0), q_barrier, barriers, buffers, q_scale_ptr, k_scale_ptr, v_scale_ptr,
                        shift_ptr, out_ptr, lse_ptr, out_stride_t, out_stride_d, rows_left, position + 1, length,
                        clear, tiles, HEAD_DIM, WIDTH, EARLY, CAUSAL)),
            (_compute, (q_shared.index(1), q_barrier, barriers, buffers, q_scale_ptr + 1, k_scale_ptr, v_scale_ptr,
                        shift_ptr + ROWS, out_ptr + out_stride_t * ROWS, lse_ptr + ROWS, out_stride_t, out_stride_d,
                        rows_left - ROWS, position + ROWS + 1, length, clear_1, tiles, HEAD_DIM, WIDTH, EARLY, CAUSAL)),
            (_load, (k_desc, v_desc, barriers, buffers, kv_head * padded_k, kv_head * WIDTH, start_k, tiles)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def shared_layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """Layout of an int8 tile in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.int8)


def attention(chunk: Int8Chunk, out: Tensor, lse: Tensor, *, causal: bool) -> None:
    """Attention over the operands, written into ``out`` (like q, any strides) and ``lse``; see `int8.int8_attention`.

    The width of the operands must be 64 or 128 (head_dim up to 128).
    """
    sequences = chunk.sequences
    packed = sequences.is_packed
    heads, _, width = chunk.q.shape

    def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [rows, columns], shared_layout(rows, columns))

    grid = (sequences.batch * heads, -(-sequences.max_q // (2 * 64)))
    strides = (0, out.stride(1), out.stride(0), out.stride(2)) if packed else out.stride()
    attention_kernel[grid](
        describe(chunk.q, 64, width), describe(chunk.k, BLOCK, width), describe(chunk.v, width, BLOCK),
        chunk.q_scale, chunk.k_scale, chunk.v_scale, chunk.shift, out, lse, sequences.cu_q, sequences.cu_k,
        sequences.max_q, sequences.max_k, sequences.padded_q, sequences.padded_k, heads, heads // chunk.k.shape[0],
        *strides, 0 if packed else lse.stride(0), lse.stride(-2),
        HEAD_DIM=chunk.head_dim, WIDTH=width, CAUSAL=causal, PACKED=packed, EARLY=causal, REGISTERS=REGISTERS,
        num_warps=4, maxnreg=COMPILED_REGISTERS,
    )  # fmt: skip
