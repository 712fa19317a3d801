"""INT8 prefill in Triton, for every GPU that Triton knows: both products on integer matrix units.

Each tile of 128 rows and 64 or 128 tokens rounds its probabilities against its own row maximum, so that every row of
every tile uses all 127 levels; the int32 product of a tile is added to the output in float32 (README.md).
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboattention.ops.prefill.int8 import LEVELS, Int8Chunk
from turboattention.ops.prefill.int8_prepass import locate

# Four floats that carry a factor 2^-24: in float16 they are subnormals whose bits are the rounded integers.
_PACK = tl.constexpr("""{
.reg .b32 low, high;
cvt.rn.f16x2.f32 low, $2, $1; cvt.rn.f16x2.f32 high, $4, $3;
prmt.b32 $0, low, high, 0x6420;
}""")
_LOG2_LEVELS = tl.constexpr(math.log2(LEVELS))
_LN2 = tl.constexpr(math.log(2))


@dataclass(frozen=True)
class Tiles:
    """How the kernel is cut.

    block_m, block_n: query rows and tokens of a tile. part: channels of the output at a time, all or half of them.
    float_by_add: turn int32 into float32 by adding to the bits of 1.5 * 2^23, where the conversion shares a slow unit
    with the exponential. assembly: inline PTX for rounding and row sums.
    """

    block_m: int
    block_n: int
    part: int
    num_warps: int
    num_stages: int
    float_by_add: bool
    assembly: bool


def choose_tiles(target: str, width: int) -> Tiles:
    """Tiles for a target (``sm_90``, ``gfx942``; anything else is the interpreter) and a padded head_dim.

    Eight warps on NVIDIA: four would need more than 255 registers a thread. Only the Hopper matrix unit reads its
    operands from shared memory; elsewhere they take registers too, so a tile has fewer tokens, and again fewer where
    the output of a row is 256 channels wide.
    """
    half = max(width // 2, 64)
    if target == "sm_90":
        return Tiles(128, 128, width, 8, 3, False, True) if width <= 128 else Tiles(128, 64, half, 8, 2, False, True)
    if target.startswith("sm_"):
        return Tiles(128, 64 if width <= 128 else 32, half, 8, 2, target == "sm_80", True)
    if target.startswith("gfx"):
        return Tiles(128, 64, half, 8, 1, False, False) if width <= 128 else Tiles(64, 64, half, 8, 1, False, False)
    return Tiles(128, 128 if width <= 128 else 64, half, 4, 1, False, False)


@triton.jit
def _exact_float(x, BY_ADD: tl.constexpr):
    """float32 of int32 below 2^22 in magnitude; the largest sum of products here is 127 * 127 * 256 < 2^22."""
    if BY_ADD:
        return (x + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        return x.to(tl.float32)


@triton.jit
def _integers(p, ASSEMBLY: tl.constexpr):
    """int8 of probabilities 0 .. 127 (with ASSEMBLY: of these times 2^-24), and the sum of each row of integers."""
    if ASSEMBLY:
        codes = tl.inline_asm_elementwise(_PACK, "=r,f,f,f,f", [p], tl.int8, is_pure=True, pack=4)
    else:
        codes = (p + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    # No dp4a over packed codes: which four lie together in a register is the compiler's choice, rows included.
    return codes, tl.sum(codes.to(tl.int32), 1)


@triton.jit
def _in_operand_order(x, M: tl.constexpr, N: tl.constexpr):
    """Columns in the stored order of V's tokens: what a thread holds is its part of the next product's operand."""
    x = tl.reshape(x, [M, N // 32, 2, 2, 4, 2])
    return tl.reshape(tl.permute(x, [0, 1, 2, 4, 3, 5]), [M, N])


@triton.jit
def _tiles(
    begin, end, q, q_scale, k_ptrs, v_ptrs, k_scale_ptr, v_scale_ptr, padded_k, position, length,
    acc, acc_high, total, top,
    M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BY_ADD: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add the tokens ``begin .. end`` (multiples of N) to the running output, sum and reference of every row."""
    for n in range(begin, end, N):
        k_scale = tl.load(k_scale_ptr + n // 128)
        v_scale = tl.load(v_scale_ptr + n // 128)
        k = tl.load(k_ptrs + n * WIDTH)
        v = tl.load(v_ptrs + n)
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
        factor = q_scale * k_scale
        if MASKED:
            token = n + tl.arange(0, N)
            seen = (token < length)[None, :]
            if CAUSAL:
                seen = seen & (token[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (token[None, :] > position[:, None] - WINDOW)
            # A row that sees nothing here gets a reference far below every other and no weight.
            highest = tl.max(tl.where(seen, s, -(1 << 30)), 1)
        else:
            highest = tl.max(s, 1)
        reference = highest.to(tl.float32) * factor
        # Two units of its last place higher: a large score is rounded, and a probability of 128 would wrap to -128.
        reference += tl.abs(reference) * 2.0**-22
        # Largest probability 127 = 2^6.99; the subnormal packing wants another factor 2^-24.
        offset: tl.constexpr = _LOG2_LEVELS - 24.0 if ASSEMBLY else _LOG2_LEVELS
        x = _exact_float(s, BY_ADD) * factor[:, None] + (-reference + offset)[:, None]
        if MASKED:
            x = tl.where(seen, x, -float("inf"))
        p, sums = _integers(tl.exp2(_in_operand_order(x, M, N)), ASSEMBLY)
        new_top = tl.maximum(top, reference)
        old = tl.exp2(top - new_top)
        weight = tl.exp2(reference - new_top)
        top = new_top
        total = total * old + sums.to(tl.float32) * weight
        weight = weight * v_scale
        if WIDTH > PART:
            # Two halves of the channels, so that only one int32 product is alive at a time.
            v_high = tl.load(v_ptrs + n + PART * padded_k)
            acc = (
                acc * old[:, None] + _exact_float(tl.dot(p, tl.trans(v), out_dtype=tl.int32), BY_ADD) * weight[:, None]
            )
            product = tl.dot(p, tl.trans(v_high), out_dtype=tl.int32)
            acc_high = acc_high * old[:, None] + _exact_float(product, BY_ADD) * weight[:, None]
        else:
            acc = (
                acc * old[:, None] + _exact_float(tl.dot(p, tl.trans(v), out_dtype=tl.int32), BY_ADD) * weight[:, None]
            )
    return acc, acc_high, total, top


@triton.jit(do_not_specialize=["longest_q", "longest_k", "heads", "ratio"])
def attention_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr,
    longest_q, longest_k, padded_q, padded_k, heads, ratio,
    out_stride_b, out_stride_h, out_stride_t, out_stride_d, lse_stride_b, lse_stride_h,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BY_ADD: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """M query rows of one head. Grid (batch * heads, blocks of rows): heads that share K and V run side by side."""
    number = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    kv_head = head // ratio
    # Causal rows see more tokens the later they are: the longest first, so that no long one is left at the end.
    block = tl.num_programs(1) - 1 - tl.program_id(1) if CAUSAL else tl.program_id(1)
    first_q, length_q, start_q = locate(cu_q_ptr, number, longest_q, PACKED)
    _, length, start_k = locate(cu_k_ptr, number, longest_k, PACKED)
    if block * M >= length_q:
        return
    padded_k = tl.multiple_of(padded_k, 128)
    rows = block * M + tl.arange(0, M)
    channels = tl.arange(0, WIDTH)
    padded_row = head.to(tl.int64) * padded_q + start_q + rows
    q = tl.load(q_ptr + padded_row[:, None] * WIDTH + channels[None, :])
    q_scale = tl.load(q_scale_ptr + head * (padded_q // 64) + (start_q + rows) // 64)
    position = rows + (length - length_q)

    tokens = tl.arange(0, N)
    k_ptrs = k_ptr + (kv_head.to(tl.int64) * padded_k + start_k) * WIDTH + tokens[:, None] * WIDTH + channels[None, :]
    v_ptrs = (
        v_ptr
        + kv_head.to(tl.int64) * WIDTH * padded_k
        + start_k
        + tl.arange(0, PART)[:, None] * padded_k
        + tokens[None, :]
    )
    k_scale_ptr += kv_head * (padded_k // 128) + start_k // 128
    v_scale_ptr += kv_head * (padded_k // 128) + start_k // 128

    acc = tl.zeros([M, PART], tl.float32)
    acc_high = tl.zeros([M, PART], tl.float32) if WIDTH > PART else tl.zeros([M], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)

    # Tokens that every row sees lie in full_begin .. full_end; masked tiles are before (window) and after.
    first_position = block * M + length - length_q
    last_position = tl.minimum(first_position + M, length) - 1
    end = tl.minimum(last_position + 1, length) if CAUSAL else length
    full_end = tl.maximum(tl.minimum(first_position + 1, length), 0) // N * N if CAUSAL else length // N * N
    begin = first_position * 0
    full_begin = begin
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // N * N
        full_begin = tl.minimum(
            tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), N) * N, tl.cdiv(tl.maximum(end, 0), N) * N
        )
        full_end = tl.maximum(full_end, full_begin)
        acc, acc_high, total, top = _tiles(
            begin, full_begin, q, q_scale, k_ptrs, v_ptrs, k_scale_ptr, v_scale_ptr, padded_k, position, length,
            acc, acc_high, total, top, M, N, WIDTH, PART, CAUSAL, WINDOW, True, BY_ADD, ASSEMBLY,
        )  # fmt: skip
    acc, acc_high, total, top = _tiles(
        full_begin, full_end, q, q_scale, k_ptrs, v_ptrs, k_scale_ptr, v_scale_ptr, padded_k, position, length,
        acc, acc_high, total, top, M, N, WIDTH, PART, CAUSAL, WINDOW, False, BY_ADD, ASSEMBLY,
    )  # fmt: skip
    acc, acc_high, total, top = _tiles(
        full_end, end, q, q_scale, k_ptrs, v_ptrs, k_scale_ptr, v_scale_ptr, padded_k, position, length,
        acc, acc_high, total, top, M, N, WIDTH, PART, CAUSAL, WINDOW, True, BY_ADD, ASSEMBLY,
    )  # fmt: skip

    blind = total == 0
    inverse = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))
    lse = _LN2 * (top + tl.log2(tl.where(blind, 1.0, total)) - _LOG2_LEVELS)
    lse = tl.where(blind, -float("inf"), lse + tl.load(shift_ptr + padded_row))
    real = rows < length_q
    row = (first_q + rows).to(tl.int64)
    if PACKED:
        tl.store(lse_ptr + head.to(tl.int64) * lse_stride_h + row, lse, mask=real)
        out_ptr += head.to(tl.int64) * out_stride_h
    else:
        tl.store(lse_ptr + number.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + row, lse, mask=real)
        out_ptr += number.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    part = tl.arange(0, PART)
    to = out_ptr + row[:, None] * out_stride_t + part[None, :] * out_stride_d
    tl.store(to, (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & (part < HEAD_DIM)[None, :])
    if WIDTH > PART:
        high = (acc_high * inverse[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(to + PART * out_stride_d, high, mask=real[:, None] & (part + PART < HEAD_DIM)[None, :])


def attention(
    chunk: Int8Chunk, out: Tensor, lse: Tensor, *, causal: bool, window: int | None = None, tiles: Tiles | None = None
) -> None:
    """Attention over the operands, written into ``out`` (like q, any strides) and ``lse``: `int8.int8_attention`."""
    sequences = chunk.sequences
    packed = sequences.is_packed
    heads, _, width = chunk.q.shape
    tiles = tiles or choose_tiles(target_of(chunk.q.device), width)
    grid = (sequences.batch * heads, -(-sequences.max_q // tiles.block_m))
    strides = (0, out.stride(1), out.stride(0), out.stride(2)) if packed else out.stride()
    attention_kernel[grid](
        chunk.q, chunk.q_scale, chunk.k, chunk.k_scale, chunk.v, chunk.v_scale, chunk.shift, out, lse,
        sequences.cu_q, sequences.cu_k, sequences.max_q, sequences.max_k, sequences.padded_q, sequences.padded_k,
        heads, heads // chunk.k.shape[0], *strides, 0 if packed else lse.stride(0), lse.stride(-2),
        HEAD_DIM=chunk.head_dim, WIDTH=width, PART=tiles.part, M=tiles.block_m, N=tiles.block_n,
        CAUSAL=causal, WINDOW=window or 0, PACKED=packed, BY_ADD=tiles.float_by_add, ASSEMBLY=tiles.assembly,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def target_of(device: torch.device) -> str:
    """The name of what kernels run on: ``sm_90``, ``gfx942`` or ``interpreter``."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
