"""What the Hopper kernel does with a tile of 64 rows and 128 tokens in registers; README.md has the derivation.

Row quantities are ``[ROWS, 4]``: one copy for each of the four threads that share a row, so that partial sums and
maxima stay in their thread. A tile ``[ROWS, N]`` is seen as ``[ROWS, N / 8, 4, 2]`` to combine with them.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.
# ruff: noqa: N803 - compile-time constants of a kernel are written in capitals, as in all Triton code

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboattention.ops.prefill.int8 import LEVELS
from turboattention.ops.prefill.sequences import BLOCK

ROWS = gl.constexpr(64)  # of a computing warpgroup
TOKENS = gl.constexpr(BLOCK)  # of a tile: those that share the scales of K and V
LOG2_LEVELS = gl.constexpr(math.log2(LEVELS))
FIRST_BASE = gl.constexpr(-1e30)
_HUGE = gl.constexpr(1e19)  # times 2^31 still far above the first base of a row

_EXP2 = gl.constexpr("ex2.approx.ftz.f32 $0, $1;")
# Two floats that carry a factor 2^-24: in float16 they are subnormals whose bits are the rounded integer.
_PAIR = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
_FOUR = gl.constexpr("prmt.b32 $0, $1, $2, 0x6420;")
_SUM = gl.constexpr(
    "{ .reg .b32 one, zero; mov.b32 one, 0x01010101; mov.b32 zero, 0; dp4a.s32.s32 $0, $1, one, zero; }"
)  # of the four int8 in a word
# From the largest integer score of two rows in this thread and their factors: the rows' references, exchanged between
# the four threads of a row, and two units of their last place higher: a large score is rounded, and a probability of
# 128 would wrap to -128; the bases of the output, which move only when a reference is 2^60 above; and the factors of
# the old output, 1 where nothing moved.
_REFERENCE = gl.constexpr("""{
.reg .pred p0, p1, any; .reg .f32 a0, a1, t, u;
cvt.rn.f32.s32 a0, $6; cvt.rn.f32.s32 a1, $7; mul.f32 a0, a0, $8; mul.f32 a1, a1, $9;
shfl.sync.bfly.b32 t, a0, 1, 31, -1; shfl.sync.bfly.b32 u, a1, 1, 31, -1; max.f32 a0, a0, t; max.f32 a1, a1, u;
shfl.sync.bfly.b32 t, a0, 2, 31, -1; shfl.sync.bfly.b32 u, a1, 2, 31, -1; max.f32 a0, a0, t; max.f32 a1, a1, u;
abs.f32 t, a0; abs.f32 u, a1; fma.rn.f32 $0, t, 0f34800000, a0; fma.rn.f32 $1, u, 0f34800000, a1;
mov.f32 $2, $10; mov.f32 $3, $11; mov.f32 $4, 0f3F800000; mov.f32 $5, 0f3F800000;
add.f32 t, $10, 0f42700000; setp.gt.f32 p0, $0, t; add.f32 t, $11, 0f42700000; setp.gt.f32 p1, $1, t;
or.pred any, p0, p1; vote.sync.any.pred any, any, 0xffffffff;
@!any bra KEEP${:uid};
@p0 mov.f32 $2, $0; @p1 mov.f32 $3, $1;
sub.f32 $4, $10, $2; ex2.approx.ftz.f32 $4, $4; sub.f32 $5, $11, $3; ex2.approx.ftz.f32 $5, $5;
KEEP${:uid}:
}""")


# Turns of the two computing warpgroups, by named barriers. To a barrier's number comes the lowest bit of n (n + 1), n
# all words together: always 0, which the assembler does not know; without it words would be computed after the barrier.
_AWAIT = gl.constexpr("bar.sync $4, 256; mov.f32 $0, $2; mov.f32 $1, $3;")
_PASS = gl.constexpr(
    """{
.reg .b32 id, all;
mov.b32 all, $16;
"""
    + "".join(f"or.b32 all, all, ${16 + i}; " for i in range(1, 16))
    + """
mad.lo.s32 id, all, all, all; and.b32 id, id, 1; add.s32 id, id, $32;
bar.arrive id, 256;
"""
    + "".join(f"mov.b32 ${i}, ${16 + i}; " for i in range(16))
    + "}"
)
_PASS_REGISTERS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 32))
_TURNS = gl.constexpr(8)  # numbers that Triton does not use


def _scale_asm(count: int) -> gl.constexpr:
    """Multiply ``count`` accumulators by their row's factor; only warps in which a factor is below 1 do it."""
    lines = [f"mov.b32 ${i}, ${count + i};" for i in range(count)]
    lines += [f"setp.lt.f32 p, ${2 * count}, 0f3F800000; setp.lt.f32 q, ${2 * count + 2}, 0f3F800000; or.pred p, p, q;"]
    lines += ["vote.sync.any.pred p, p, 0xffffffff;", "@!p bra SAME${:uid};"]
    lines += [f"mul.f32 ${i}, ${count + i}, ${2 * count + 2 * (i // 2 % 2)};" for i in range(count)]
    return gl.constexpr("{\n.reg .pred p, q;\n" + "\n".join(lines) + "\nSAME${:uid}:\n}")


def _constraints(count: int) -> gl.constexpr:
    return gl.constexpr(",".join(["=&f"] * count + ["f"] * (2 * count)))


# A thread holds this many accumulators of 64 rows: head_dim / 2.
_SCALE_64, _SCALE_128 = _scale_asm(32), _scale_asm(64)
_REGISTERS_64, _REGISTERS_128 = _constraints(32), _constraints(64)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(_EXP2, "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _beside(row, tile):
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, tile.type.layout))
    return gl.expand_dims(gl.expand_dims(gl.convert_layout(row, layout, assert_trivial=True), 1), 3)


@gluon.constexpr_function
def scores_layout():
    """Of int32 scores ``[ROWS, TOKENS]``."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])


@gluon.constexpr_function
def output_layout(width):
    """Of the output ``[ROWS, width]``, int32 or float32."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 32])


@gluon.jit
def score_factor(q_scale, k_scale, row_layout: gl.constexpr):
    """float32 ``[ROWS, 4]``: from integers to scores. Below the floor, which `hide` needs, scores differ by < 0.03."""
    return gl.zeros([ROWS, 4], gl.float32, layout=row_layout) + gl.maximum(q_scale * k_scale, 2.0**-26)


@gluon.jit
def _limit(limit, length, layout: gl.constexpr, CAUSAL: gl.constexpr):
    """int32 ``[ROWS]``: the tokens that each row sees are those below it; ``limit`` is that of the first row."""
    row = gl.arange(0, ROWS, layout=layout)
    if CAUSAL:
        return gl.minimum(limit + row, length)
    else:
        return length + row * 0


@gluon.jit
def hide(s, factor, limit, length, first, row_layout: gl.constexpr, CAUSAL: gl.constexpr):
    """Scores of tokens that a row doesn't see as low as they get; ``first`` is the tile's first token.

    A factor of at least 2^-26 (`score_factor`) then rounds their weights to 0. A row that sees nothing in the tile gets
    a huge factor, and so a reference far below every other: masking probabilities too would cost registers.
    """
    layout: gl.constexpr = s.type.layout
    seen = gl.expand_dims(_limit(limit, length, gl.SliceLayout(1, layout), CAUSAL), 1)
    token = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
    s = gl.where(gl.expand_dims(token, 0) < seen, s, -2147483647)
    some = _limit(limit, length, gl.SliceLayout(1, row_layout), CAUSAL) > first
    return s, gl.where(gl.expand_dims(some, 1), factor, _HUGE)


@gluon.jit
def references(s, factor, base):
    """Largest score of each row, base, factor of the old output, weight of this tile."""
    s4 = s.reshape([ROWS, TOKENS // 8, 4, 2])
    # One reduction, because the assembler makes maxima of three only from a chain.
    highest = gl.max(s4.permute([0, 2, 1, 3]).reshape([ROWS, 4, TOKENS // 4]), 2)
    highest = gl.convert_layout(highest, base.type.layout, assert_trivial=True)
    reference, base, old = gl.inline_asm_elementwise(
        _REFERENCE, "=&f,=&f,=&f,=&f,=&f,=&f,r,r,f,f,f,f", [highest, factor, base],
        (gl.float32, gl.float32, gl.float32), True, 2,
    )  # fmt: skip
    return reference, base, old, _exp2(reference - base)


@gluon.jit
def await_turn(row, number: gl.constexpr, WIDTH: gl.constexpr):
    """Wait until the other warpgroup lets this one, of this number, go on; returns ``row [ROWS, 4]``.

    With 64 channels there are no turns: they cost more than they gain.
    """
    layout: gl.constexpr = row.type.layout
    if WIDTH == 64:
        return row
    id = gl.full([ROWS, 4], _TURNS + number, gl.int32, layout=layout)
    return gl.inline_asm_elementwise(_AWAIT, "=f,=f,f,f,r,r", [row, id], gl.float32, False, 2)


@gluon.jit
def pass_turn(words, number: gl.constexpr, WIDTH: gl.constexpr):
    """Let the other warpgroup, of this number, go on when the ``words [ROWS, TOKENS / 4]``, returned, are known."""
    layout: gl.constexpr = words.type.layout
    if WIDTH == 64:
        return words
    id = gl.full([ROWS, TOKENS // 4], _TURNS + number, gl.int32, layout=layout)
    return gl.inline_asm_elementwise(_PASS, _PASS_REGISTERS, [words, id], gl.int32, False, 16)


@gluon.jit
def exponents(s, factor, reference, operand: gl.constexpr):
    """log2 of the probabilities times 127 * 2^-24, in the order of the second product's operand."""
    s4 = s.reshape([ROWS, TOKENS // 8, 4, 2])
    x = gl.fma(s4.to(gl.float32), _beside(factor, s4), -_beside(reference + (24.0 - LOG2_LEVELS), s4))
    x = x.reshape([ROWS, TOKENS // 32, 2, 2, 4, 2]).permute([0, 1, 2, 4, 3, 5]).reshape([ROWS, TOKENS])
    return gl.convert_layout(x, operand, assert_trivial=True)


@gluon.jit
def probabilities(x):
    """127 * 2^(score - reference) as integers, four in a word: int32 ``[ROWS, TOKENS / 4]``."""
    low, high = gl.split(_exp2(x).reshape([ROWS, TOKENS // 2, 2]))
    pairs = gl.inline_asm_elementwise(_PAIR, "=r,f,f", [low, high], gl.int32, True, 1)
    low, high = gl.split(pairs.reshape([ROWS, TOKENS // 4, 2]))
    return gl.inline_asm_elementwise(_FOUR, "=r,r,r", [low, high], gl.int32, True, 1)


@gluon.jit
def integers(words, operand: gl.constexpr):
    """int8 ``[ROWS, TOKENS]`` of words that hold four each."""
    pair = gl.join(words, words)
    four = gl.convert_layout(gl.join(pair, pair).reshape([ROWS, TOKENS]), operand, assert_trivial=True)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [four], gl.int8, True, 4)


@gluon.jit
def row_sums(words, like):
    """float32 ``[ROWS, 4]``: what this thread's part of each row of integers adds up to."""
    sums = gl.inline_asm_elementwise(_SUM, "=r,r", [words], gl.int32, True, 1)
    sums = gl.sum(gl.sum(sums.reshape([ROWS, TOKENS // 32, 2, 4]), 2), 1)
    return gl.convert_layout(sums, like.type.layout, assert_trivial=True).to(gl.float32)


@gluon.jit
def rescale(acc, old, WIDTH: gl.constexpr):
    """acc * old; nothing where no row of the warp has a factor below 1."""
    acc4 = acc.reshape([ROWS, WIDTH // 8, 4, 2])
    factor = _beside(old, acc4)
    if WIDTH == 128:
        scaled = gl.inline_asm_elementwise(_SCALE_128, _REGISTERS_128, [acc4, factor], gl.float32, True, 64)
    else:
        scaled = gl.inline_asm_elementwise(_SCALE_64, _REGISTERS_64, [acc4, factor], gl.float32, True, 32)
    return gl.convert_layout(scaled.reshape([ROWS, WIDTH]), acc.type.layout, assert_trivial=True)


@gluon.jit
def add_product(acc, product, weight, WIDTH: gl.constexpr):
    """acc + product * weight, product int32."""
    product4 = product.reshape([ROWS, WIDTH // 8, 4, 2])
    added = gl.fma(product4.to(gl.float32), _beside(weight, product4), acc.reshape([ROWS, WIDTH // 8, 4, 2]))
    return gl.convert_layout(added.reshape([ROWS, WIDTH]), acc.type.layout, assert_trivial=True)
