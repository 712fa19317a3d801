"""The two ends of 64 rows in the Hopper kernel: queries into shared memory, output and LSE out of registers."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.
# ruff: noqa: N803 - compile-time constants of a kernel are written in capitals, as in all Triton code

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from turboattention.ops.prefill.hopper_tile import FIRST_BASE, LOG2_LEVELS, ROWS
from turboattention.ops.prefill.int8 import LEVELS, LOG2E, SMALLEST

_LN2 = gl.constexpr(math.log(2))
_LOG2E = gl.constexpr(LOG2E)
_SMALLEST = gl.constexpr(SMALLEST)
_LEVELS = gl.constexpr(float(LEVELS))
# Each product is rounded before it is rounded to an integer, as in the definition.
_ROUND = gl.constexpr("""{
.reg .f32 a, b, c, d; .reg .b32 low, high;
mul.rn.f32 a, $1, $5; mul.rn.f32 b, $2, $6; mul.rn.f32 c, $3, $7; mul.rn.f32 d, $4, $8;
add.rn.f32 a, a, 0f4B400000; add.rn.f32 b, b, 0f4B400000; add.rn.f32 c, c, 0f4B400000; add.rn.f32 d, d, 0f4B400000;
prmt.b32 low, a, b, 0x0040; prmt.b32 high, c, d, 0x0040; prmt.b32 $0, low, high, 0x5410;
}""")


@gluon.constexpr_function
def _memory_layout(width):
    """16 bytes of float16 a thread, rows one behind the other."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def _divide(a, b):
    return gl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], gl.float32, True, 1)


@gluon.jit
def read_queries(
    q_shared, q_ptr, mean_ptr, gain_ptr, lse_ptr, stride_t, stride_d, scale, rows_left,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """64 rows of Q to INT8 in shared memory; returns their scale.

    The codes of `int8.quantise_chunk`. ``lse`` keeps scale * (q . mean of k), for `write_rows`.
    """
    layout: gl.constexpr = _memory_layout(WIDTH)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    at = q_ptr + gl.expand_dims(row.to(gl.int64) * stride_t, 1) + gl.expand_dims(channel * stride_d, 0)
    real = gl.expand_dims(row < rows_left, 1) & gl.expand_dims(channel < HEAD_DIM, 0)
    q = gl.load(at, mask=real, other=0.0).to(gl.float32)
    mean = gl.expand_dims(gl.load(mean_ptr + channel), 0)
    gl.store(lse_ptr + row, gl.sum(q * mean, 1) * scale, mask=row < rows_left)
    q = q * gl.expand_dims(gl.load(gain_ptr + channel) * (scale * _LOG2E), 0)
    largest = gl.maximum(gl.max(gl.max(gl.abs(q), 1), 0), _SMALLEST)
    levels = gl.to_tensor(_LEVELS)
    inverse = _divide(levels, largest)
    q_shared.store(gl.inline_asm_elementwise(_ROUND, "=r,f,f,f,f,f,f,f,f", [q, inverse], gl.int8, True, 4))
    fence_async_shared()
    return _divide(largest, levels)


@gluon.jit
def write_rows(
    acc, total, base, out_ptr, lse_ptr, out_stride_t, out_stride_d, rows_left,
    row_layout: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Output ``acc [ROWS, WIDTH]`` over the row's sum, and LSE; total, base: ``[ROWS, 4]``."""
    # Four threads hold parts of a row's sum and the same base.
    total = gl.sum(total, 1)
    base = gl.max(base, 1)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    blind = base < 0.01 * FIRST_BASE
    shift = gl.load(lse_ptr + row, mask=row < rows_left, other=0.0)
    lse = _LN2 * (base + gl.log2(total) - LOG2_LEVELS) + shift
    gl.store(lse_ptr + row, gl.where(blind, -float("inf"), lse), mask=row < rows_left)
    o_layout: gl.constexpr = acc.type.layout
    inverse = gl.convert_layout(gl.where(blind, 0.0, 1.0 / total), gl.SliceLayout(1, o_layout))
    out = acc * gl.expand_dims(inverse, 1)
    # Through shared memory, so that a thread stores 16 bytes in a row.
    store: gl.constexpr = _memory_layout(WIDTH)
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), store)
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, store)), 1)
    channel = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, store)), 0)
    to = out_ptr + row.to(gl.int64) * out_stride_t + channel * out_stride_d
    gl.store(to, out, mask=(row < rows_left) & (channel < HEAD_DIM))
