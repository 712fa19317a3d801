"""Kernels that make the INT8 operands of a chunk: the same codes as `int8.quantise_chunk`, in two launches.

Some tokens of K and some queries give the mean and the channels' gains; then every program quantises a block of 128
tokens of one head of Q, K or V.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import triton
import triton.language as tl
from torch import Tensor

from turboattention.ops.common.order_triton import token_at
from turboattention.ops.common.sample_triton import spread
from turboattention.ops.prefill.int8 import (
    KEY_SAMPLES,
    LEVELS,
    LOG2E,
    QUERY_SAMPLES,
    SMALLEST,
    SMALLEST_SHARE,
    Int8Chunk,
    empty_chunk,
)
from turboattention.ops.prefill.sequences import BLOCK, Sequences

_KEYS = tl.constexpr(KEY_SAMPLES)
_QUERIES = tl.constexpr(QUERY_SAMPLES)
_SMALLEST_SHARE = tl.constexpr(SMALLEST_SHARE)


@triton.jit
def locate(cu_ptr, number, longest, PACKED: tl.constexpr):
    """First token, length and padded start of a sequence (`Sequences`)."""
    if PACKED:
        first = tl.load(cu_ptr + number)
        length = tl.load(cu_ptr + number + 1) - first
        start = (first // 128 + number) * 128
    else:
        first = number * 0
        length = longest
        start = number * (tl.cdiv(longest, 128) * 128)
    return first, length, start


@triton.jit
def _head(x_ptr, head, number, first, stride_b, stride_h, stride_t, PACKED: tl.constexpr):
    """The first token of a head of a sequence."""
    base = x_ptr + head.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    if not PACKED:
        base += number.to(tl.int64) * stride_b
    return base


@triton.jit
def _tile(base, tokens, length, channels, real, stride_t, stride_d):
    """Tokens of a head as float32, 0 where there are none."""
    at = base + tokens.to(tl.int64)[:, None] * stride_t + channels[None, :] * stride_d
    return tl.load(at, mask=(tokens < length)[:, None] & real, other=0.0).to(tl.float32)


@triton.jit
def _share(x):
    share = tl.math.div_rn(x, tl.zeros_like(x) + tl.max(x, 0))
    return tl.where(share < 1.0, tl.maximum(share, _SMALLEST_SHARE), 1.0)


@triton.jit(do_not_specialize=["longest_q", "longest_k", "ratio"])
def measure(
    q_ptr, k_ptr, mean_ptr, gain_ptr, cu_q_ptr, cu_k_ptr, longest_q, longest_k, ratio, kv_heads,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """``mean`` and ``gain``, float32 ``[batch, kv_heads, WIDTH]``, of one KV head of one sequence."""
    head = tl.program_id(0)
    number = tl.program_id(1)
    TILE: tl.constexpr = 64 if WIDTH <= 128 else 32  # sampled rows at once: more do not fit registers
    channels = tl.arange(0, WIDTH)
    real = (channels < HEAD_DIM)[None, :]
    first, length, _ = locate(cu_k_ptr, number, longest_k, PACKED)
    base = _head(k_ptr, head, number, first, k_stride_b, k_stride_h, k_stride_t, PACKED)
    count = tl.minimum(length, _KEYS)
    # Tiles are joined element by element and reduced once: a reduction for each tile waits for all warps.
    total = tl.zeros([TILE, WIDTH], tl.float32)
    largest = tl.full([TILE, WIDTH], -float("inf"), tl.float32)
    least = tl.full([TILE, WIDTH], float("inf"), tl.float32)
    for i in range(_KEYS // TILE):
        sample = i * TILE + tl.arange(0, TILE)
        seen = sample < count
        tokens = tl.where(seen, spread(sample, tl.maximum(count, 1), length), length)
        x = _tile(base, tokens, length, channels, real, k_stride_t, k_stride_d)
        total += x
        largest = tl.maximum(largest, tl.where(seen[:, None], x, -float("inf")))
        least = tl.minimum(least, tl.where(seen[:, None], x, float("inf")))
    first_q, length_q, _ = locate(cu_q_ptr, number, longest_q, PACKED)
    magnitude = tl.zeros([TILE, WIDTH], tl.float32)
    for i in range(_QUERIES // TILE):
        sample = i * TILE + tl.arange(0, TILE)
        base_q = _head(q_ptr, head * ratio, number, first_q, q_stride_b, q_stride_h, q_stride_t, PACKED)
        tokens = spread(sample, _QUERIES, length_q)
        at = base_q + (sample % ratio).to(tl.int64)[:, None] * q_stride_h + tokens.to(tl.int64)[:, None] * q_stride_t
        x = tl.load(at + channels[None, :] * q_stride_d, mask=(tokens < length_q)[:, None] & real, other=0.0)
        magnitude = tl.maximum(magnitude, tl.abs(x.to(tl.float32)))
    mean = tl.math.div_rn(tl.sum(total, 0), tl.maximum(count, 1).to(tl.float32))
    to = (number * kv_heads + head) * WIDTH + channels
    tl.store(mean_ptr + to, mean)
    size = tl.maximum(tl.max(largest, 0) - mean, mean - tl.min(least, 0))
    tl.store(gain_ptr + to, tl.math.sqrt_rn(tl.math.div_rn(_share(size), _share(tl.max(magnitude, 0)))))


@triton.jit
def _codes(x, top, LEVELS: tl.constexpr):
    """Integers of x where ``top`` is the largest magnitude, ties to even: the low byte after adding 1.5 * 2^23."""
    inverse = tl.math.div_rn(tl.zeros_like(top) + LEVELS, top)
    return (x * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["longest_q", "longest_k"])
def quantise(
    q_ptr, k_ptr, v_ptr, mean_ptr, gain_ptr, cu_q_ptr, cu_k_ptr,
    q8_ptr, q_scale_ptr, k8_ptr, k_scale_ptr, v8_ptr, v_scale_ptr, shift_ptr,
    factor, scale, longest_q, longest_k, padded_q, padded_k, heads, kv_heads,
    q_stride_b, q_stride_h, q_stride_t, q_stride_d, k_stride_b, k_stride_h, k_stride_t, k_stride_d,
    v_stride_b, v_stride_h, v_stride_t, v_stride_d,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
    LEVELS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """A block of 128 tokens of one head: of Q (heads first), then of K, then of V. ``factor`` is scale * log2(e).

    Launch it without FP fusion: x * inverse must be rounded before the rounding to integers, as in the definition.
    """
    block = tl.program_id(0)
    which = tl.program_id(1)
    number = tl.program_id(2)
    channels = tl.arange(0, WIDTH)
    real = (channels < HEAD_DIM)[None, :]
    # Half a block at a time: a whole one takes so many registers that a multiprocessor has room for one program only.
    rows = tl.arange(0, 64)
    first_k, length_k, start_k = locate(cu_k_ptr, number, longest_k, PACKED)
    if which < heads:
        first, length, start = locate(cu_q_ptr, number, longest_q, PACKED)
        if block * 128 < length:
            base = _head(q_ptr, which, number, first, q_stride_b, q_stride_h, q_stride_t, PACKED)
            at = (number * kv_heads + which // (heads // kv_heads)) * WIDTH + channels
            mean = tl.load(mean_ptr + at)
            factors = tl.load(gain_ptr + at) * factor
            for half in range(2):
                tokens = block * 128 + half * 64 + rows
                x = _tile(base, tokens, length, channels, real, q_stride_t, q_stride_d)
                to_q = which.to(tl.int64) * padded_q + start + tokens
                tl.store(shift_ptr + to_q, tl.sum(x * mean[None, :], 1) * scale)
                x = x * factors[None, :]
                top_q = tl.maximum(tl.max(tl.abs(x)), SMALLEST)
                tl.store(q8_ptr + to_q[:, None] * WIDTH + channels[None, :], _codes(x, top_q, LEVELS))
                to_scale = q_scale_ptr + which * (padded_q // 64) + start // 64 + block * 2 + half
                tl.store(to_scale, tl.math.div_rn(top_q, tl.zeros_like(top_q) + LEVELS))
    elif block * 128 < length_k:
        if which < heads + kv_heads:
            head = which - heads
            base = _head(k_ptr, head, number, first_k, k_stride_b, k_stride_h, k_stride_t, PACKED)
            mean = tl.load(mean_ptr + (number * kv_heads + head) * WIDTH + channels)
            gain = tl.load(gain_ptr + (number * kv_heads + head) * WIDTH + channels)
            inverse = tl.math.div_rn(tl.zeros_like(gain) + 1.0, gain)[None, :]
            top_k = SMALLEST
            for half in range(2):
                tokens = block * 128 + half * 64 + rows
                x = _tile(base, tokens, length_k, channels, real, k_stride_t, k_stride_d)
                x = tl.where((tokens < length_k)[:, None] & real, (x - mean[None, :]) * inverse, 0.0)
                top_k = tl.maximum(tl.max(tl.abs(x)), top_k)
            for half in range(2):
                tokens = block * 128 + half * 64 + rows
                x = _tile(base, tokens, length_k, channels, real, k_stride_t, k_stride_d)
                x = tl.where((tokens < length_k)[:, None] & real, (x - mean[None, :]) * inverse, 0.0)
                to_k = head.to(tl.int64) * padded_k + start_k + tokens
                tl.store(k8_ptr + to_k[:, None] * WIDTH + channels[None, :], _codes(x, top_k, LEVELS))
            to_scale = k_scale_ptr + head * (padded_k // 128) + start_k // 128 + block
            tl.store(to_scale, tl.math.div_rn(top_k, tl.zeros_like(top_k) + LEVELS))
        else:
            head = which - heads - kv_heads
            base = _head(v_ptr, head, number, first_k, v_stride_b, v_stride_h, v_stride_t, PACKED)
            order = token_at(rows)  # read in that order, then transpose
            top_v = SMALLEST
            for half in range(2):
                x = _tile(base, block * 128 + half * 64 + rows, length_k, channels, real, v_stride_t, v_stride_d)
                top_v = tl.maximum(tl.max(tl.abs(x)), top_v)
            for half in range(2):
                x = _tile(base, block * 128 + half * 64 + order, length_k, channels, real, v_stride_t, v_stride_d)
                to_v = (head * WIDTH + channels).to(tl.int64)[:, None] * padded_k
                to_v += (start_k + block * 128 + half * 64 + rows)[None, :]
                tl.store(v8_ptr + to_v, tl.trans(_codes(x, top_v, LEVELS)))
            to_scale = v_scale_ptr + head * (padded_k // 128) + start_k // 128 + block
            tl.store(to_scale, tl.math.div_rn(top_v, tl.zeros_like(top_v) + LEVELS))


def quantise_chunk(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences | None = None, *, queries: bool = True
) -> Int8Chunk:
    """As `int8.quantise_chunk`, by kernels; K's codes may differ where its mean is added up in another order.

    queries: make the operands of Q too (`hopper` quantises its queries itself).
    """
    sequences = sequences or Sequences.dense(q, k)
    sequences.check(q, k, v)
    chunk = empty_chunk(q, k, sequences, queries=queries)
    kv_heads, width = chunk.k.shape[0], chunk.k.shape[2]
    query_heads = sequences.heads(q)
    heads = query_heads if queries else 0
    packed = sequences.is_packed
    sizes = {"HEAD_DIM": chunk.head_dim, "WIDTH": width, "PACKED": packed}
    strides = [(0, x.stride(1), x.stride(0), x.stride(2)) if packed else x.stride() for x in (q, k, v)]
    measure[(kv_heads, sequences.batch)](
        q, k, chunk.mean, chunk.gain, sequences.cu_q, sequences.cu_k, sequences.max_q, sequences.max_k,
        query_heads // kv_heads, kv_heads, *strides[0], *strides[1], **sizes, num_warps=8,
    )  # fmt: skip
    longest = max(sequences.max_q, sequences.max_k) if queries else sequences.max_k
    quantise[(-(-longest // BLOCK), heads + 2 * kv_heads, sequences.batch)](
        q, k, v, chunk.mean, chunk.gain, sequences.cu_q, sequences.cu_k,
        chunk.q, chunk.q_scale, chunk.k, chunk.k_scale, chunk.v, chunk.v_scale, chunk.shift,
        scale * LOG2E, scale, sequences.max_q, sequences.max_k, sequences.padded_q, sequences.padded_k, heads, kv_heads,
        *strides[0], *strides[1], *strides[2], **sizes, LEVELS=float(LEVELS), SMALLEST=SMALLEST,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return chunk
