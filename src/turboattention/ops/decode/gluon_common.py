"""Device functions that both halves of the Gluon decode kernel use."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from turboattention.ops.decode import gluon_layouts as lay

# Triton 3.9 knows the copy by another name only.
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

LOWEST = gl.constexpr(-1e30)


@gluon.jit
def join_all(parts):
    """Tensors to one with new last dimensions of size 2: the index bits of the list, lowest first."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return gl.join(parts[0], parts[1])
    elif len(parts) == 4:
        return gl.join(gl.join(parts[0], parts[1]), gl.join(parts[2], parts[3]))
    else:
        low = gl.join(gl.join(parts[0], parts[1]), gl.join(parts[2], parts[3]))
        high = gl.join(gl.join(parts[4], parts[5]), gl.join(parts[6], parts[7]))
        return gl.join(low, high)


@gluon.jit
def unpack(words, BITS: gl.constexpr):
    """Codes of 16-bit words as float16 subnormals: trailing dimensions are the part of the byte and the byte."""
    ASM: gl.constexpr = lay.mask_asm(BITS)
    if BITS == 8:
        parts = gl.inline_asm_elementwise(ASM, lay.constraints(2, 1), [words], (gl.float16,) * 2, True, 2)
    elif BITS == 4:
        parts = gl.inline_asm_elementwise(ASM, lay.constraints(4, 1), [words], (gl.float16,) * 4, True, 2)
    else:
        parts = gl.inline_asm_elementwise(ASM, lay.constraints(8, 1), [words], (gl.float16,) * 8, True, 2)
    return join_all(parts)


@gluon.jit
def signed_bytes(words):
    """Signed bytes plus 128 as subnormals."""
    ASM: gl.constexpr = lay.signed_bytes_asm()
    return join_all(gl.inline_asm_elementwise(ASM, lay.constraints(2, 1), [words], (gl.float16, gl.float16), True, 2))


@gluon.jit
def transpose_blocks(p):
    """Swap rows and columns of every 8 x 8 block of an accumulator fragment."""
    ASM: gl.constexpr = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,r", [p], gl.float16, True, 2)


@gluon.jit
def as_operand(p, layout: gl.constexpr):
    """P from the accumulator of Q K^T to the second operand of P V."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    swapped = transpose_blocks(p).reshape(M // 8, 8, N // 8, 8).permute(0, 3, 2, 1).reshape(M, N)
    return gl.convert_layout(swapped, layout, assert_trivial=True)


@gluon.jit
def store_operand(memory, x):
    """Second operand of a product to shared memory, eight neighbours of a lane side by side."""
    ORDER: gl.constexpr = lay.operand_order(x.shape[0], x.shape[1])
    FLAT: gl.constexpr = lay.operand_layout(x.shape[0], x.shape[1])
    x = x.reshape(lay.twos(x.numel)).permute(ORDER.value).reshape(x.numel)
    memory.store(gl.convert_layout(x, FLAT, assert_trivial=True))


@gluon.jit
def load_operand(memory, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """What `store_operand` stored."""
    ORDER: gl.constexpr = lay.operand_order_back(ROWS, COLUMNS)
    x = memory.load(lay.operand_layout(ROWS, COLUMNS))
    x = x.reshape(lay.twos(ROWS * COLUMNS)).permute(ORDER.value).reshape(ROWS, COLUMNS)
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def broadcast_to(x, other):
    """``x`` in the shape that it and ``other`` broadcast to."""
    x, _ = gl.broadcast(x, other)
    return x


@gluon.jit
def exp2(x):
    """``2^x`` on the special-function unit; results below 2^-126 become 0, which saves two instructions of three."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def rest_of_product(a, b, rounded):
    """``a * b - rounded`` with one rounding: what a float16 product lost."""
    ASM: gl.constexpr = "{ .reg .b32 n; neg.f16x2 n, $3; fma.rn.f16x2 $0, $1, $2, n; }"
    return gl.inline_asm_elementwise(ASM, "=r,r,r,r", [a, b, rounded], gl.float16, True, 2)


@gluon.jit
def scalar(memory):
    """One float16 of shared memory as a float32 scalar in every lane."""
    one: gl.constexpr = gl.DistributedLinearLayout([], [[0], [0], [0], [0], [0]], [], [], [1])
    return gl.max(memory.load(one).to(gl.float16, bitcast=True).to(gl.float32), 0)


@gluon.jit
def copy_words(memory, source, WORDS: gl.constexpr, limit):
    """Start the copy of up to WORDS words of a page; words from ``limit`` on are not read."""
    index = gl.arange(0, WORDS, layout=lay.copy_layout(WORDS))
    _copy(memory, source + index, mask=index < limit)


@gluon.jit
def copy_all(memory, source, WORDS: gl.constexpr):
    """Start the copy of WORDS words."""
    index = gl.arange(0, WORDS, layout=lay.copy_layout(WORDS))
    _copy(memory, source + index)


@gluon.jit
def even_columns(x, COLUMNS: gl.constexpr):
    """The even ones of twice COLUMNS columns, or all of COLUMNS."""
    if x.shape[1] > COLUMNS:
        x, _ = x.reshape(x.shape[0], COLUMNS, 2).split()
    return x


@gluon.jit
def even_entries(x, COLUMNS: gl.constexpr, mma: gl.constexpr):
    """`even_columns` of a row."""
    rows = gl.expand_dims(x, 0) + gl.zeros([16, x.shape[0]], x.dtype, layout=mma)
    return gl.max(even_columns(rows, COLUMNS), 0)


@gluon.jit
def pair_sums(x, COLUMNS: gl.constexpr):
    """The sum of each pair of twice COLUMNS columns, or COLUMNS columns as they are."""
    if x.shape[1] > COLUMNS:
        even, odd = x.reshape(x.shape[0], COLUMNS, 2).split()
        x = even + odd
    return x


@gluon.jit
def spread_columns(x, COLUMNS: gl.constexpr):
    """Columns of zeros between those of ``x`` where it has half of COLUMNS."""
    if x.shape[1] < COLUMNS:
        x = gl.join(x, gl.zeros_like(x)).reshape(x.shape[0], COLUMNS)
    return x


@gluon.jit
def query_rows(q_ptr, kv_head, head, q_head, column, C: gl.constexpr):
    """Pointers to the queries of a block of query heads: number ``column`` of it, or the last one."""
    first = (head % C.head_blocks) * C.columns
    index = kv_head * C.ratio + first + gl.minimum(column, C.ratio - 1 - first)
    return q_ptr + gl.expand_dims(index.to(gl.int64) * q_head, 0)


@gluon.jit
def unit_of(q):
    """A power of two for each column that brings its largest value into (0.5, 1]."""
    return gl.exp2(gl.ceil(gl.log2(gl.maximum(gl.max(gl.abs(q), 0), 1e-30))))


@gluon.jit
def store(part_ptr, lse_ptr, part, out, m, total, head, layout: gl.constexpr, C: gl.constexpr):
    """A partial result ``[head_dim, columns]`` in the order ``[column][channel]``, and its LSE in log2 units."""
    column = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, layout))
    channel = gl.expand_dims(gl.arange(0, C.head_dim, layout=gl.SliceLayout(1, layout)), 1)
    real = column < gl.minimum(C.columns, C.ratio - (head % C.head_blocks) * C.columns)
    at = part.to(gl.int64) * C.columns + column
    gl.store(part_ptr + gl.expand_dims(at * C.head_dim, 0) + channel, out, mask=gl.expand_dims(real, 0))
    gl.store(lse_ptr + at, gl.where(total > 0, m + gl.log2(total), LOWEST), mask=real)


@gluon.jit
def cap(x, softcap):
    """``cap * tanh(x / cap)`` with scores and cap in log2 units."""
    return softcap * (1.0 - 2.0 / (gl.exp2(x * (2.0 * 1.4426950408889634 / softcap)) + 1.0))
