"""Which thread holds what in the Gluon decode kernel, worked out bit by bit at compile time.

One warp multiplies with ``mma.m16n8k16``: lane ``4 g + t`` holds rows g and g + 8 of the first operand and, of its 16
columns, 2t, 2t + 1, 2t + 8 and 2t + 9. Codes stay where the page layout puts them (`quant.packing`); which token a row
and which channel a column stands for is free, as long as Q, P and V agree. The choice below makes every byte that a
lane loads its own operand: no shuffles, only masks.

Names of index bits: ``g0..g2`` and ``t0, t1`` of the lane, ``o`` odd byte of a 16-bit word, ``e`` odd 16-bit word of a
32-bit register, ``w`` further words, ``h`` which of the parts of a row that share a byte (low or high nibble, ...).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def log2(n):
    """Exponent of a power of two."""
    return n.bit_length() - 1


@gluon.constexpr_function
def row_lane(name, other):
    """What the fragment of V calls e, t0, t1 are the lane bits of a row of K; everything else is ``other``."""
    return {"e": "g0", "t0": "g1", "t1": "g2"}.get(name, other)


@gluon.constexpr_function
def parts_bits(bits):
    """Bits of the index of the part: 8 / bits codes share a byte."""
    return log2(8 // bits)


@gluon.constexpr_function
def token_bits(value_bits):
    """Index bits of a token (64 of a page), lowest first, by what they are in the fragment of V.

    V rows hold their tokens in the stored order u = (.. 16 a + 4 c + 2 b + d) of token 16 a + 8 b + 2 c + d.
    """
    stored = {
        8: ["o", "e", "w0", "w1", "t0", "t1"],
        4: ["o", "e", "w0", "t0", "t1", "h0"],
        2: ["o", "e", "t0", "t1", "h0", "h1"],
    }[value_bits]
    return [stored[0], stored[2], stored[3], stored[1], stored[4], stored[5]]


@gluon.constexpr_function
def row_bits(value_bits):
    """Index bits of a row of Q K^T and of a column of V, lowest first: three inside a block of 8, three above."""
    return ["e", "t0", "t1"] + {8: ["o", "w0", "w1"], 4: ["o", "w0", "h0"], 2: ["o", "h0", "h1"]}[value_bits]


@gluon.constexpr_function
def key_words(head_dim, bits):
    """16-bit words of a row of K codes."""
    return head_dim * bits // 16


@gluon.constexpr_function
def key_word_bits(head_dim, bits):
    """Index bits of a word inside a row of K codes, lowest first: the top two choose the lane."""
    n = log2(key_words(head_dim, bits))
    return ["e"] + [f"w{i}" for i in range(n - 3)] + ["t0", "t1"]


@gluon.constexpr_function
def column_bits(head_dim, bits):
    """Index bits of a column of K (and of a row of Q), lowest first."""
    words = [b for b in key_word_bits(head_dim, bits) if b.startswith("w")]
    return ["e", "t0", "t1", "o"] + [f"h{i}" for i in range(parts_bits(bits))] + words


@gluon.constexpr_function
def channel_bits(head_dim, bits):
    """Index bits of a channel, lowest first: odd byte, word, part of the row."""
    return ["o"] + key_word_bits(head_dim, bits) + [f"h{i}" for i in range(parts_bits(bits))]


@gluon.constexpr_function
def linear_layout(index_bits, lanes, size):
    """A 1-D layout of ``size`` elements; ``index_bits`` names each bit of the index, ``lanes`` those of the lane id.

    A lane bit that is no bit of the index holds copies; every other bit of the index is one of the register, the lowest
    first.
    """
    place = {name: 1 << i for i, name in enumerate(index_bits)}
    lane = [[place.get(name, 0)] for name in lanes]
    registers = [[1 << i] for i, name in enumerate(index_bits) if name not in lanes]
    return gl.DistributedLinearLayout(registers, lane, [], [], [size])


@gluon.constexpr_function
def copy_layout(words):
    """8 words (16 bytes) for each lane and copy; copies of the data where that is less than a warp's worth."""
    lane = [[8 << i] if (8 << i) < words else [0] for i in range(5)]
    registers = [[1], [2], [4]] + [[256 << i] for i in range(log2(words // 256) if words >= 256 else 0)]
    return gl.DistributedLinearLayout(registers, lane, [], [], [words])


@gluon.constexpr_function
def key_codes_layout(head_dim, bits, value_bits):
    """Words of the K codes: lane g takes the rows whose scores it will hold, lane t a quarter of each row."""
    token = [row_lane(b, "row_" + b) for b in token_bits(value_bits)]
    index = key_word_bits(head_dim, bits) + token
    return linear_layout(index, ["t0", "t1", "g0", "g1", "g2"], 64 * key_words(head_dim, bits))


@gluon.constexpr_function
def key_codes_order(head_dim, bits, value_bits):
    """Permutation of unpacked K codes, seen as bits (highest first), to ``[64 rows, head_dim columns]``."""
    token = ["row_" + b for b in token_bits(value_bits)]
    source = (key_word_bits(head_dim, bits) + token)[::-1] + [f"h{i}" for i in range(parts_bits(bits))] + ["o"]
    target = ["row_" + b for b in row_bits(value_bits)][::-1] + column_bits(head_dim, bits)[::-1]
    return [source.index(b) for b in target]


@gluon.constexpr_function
def key_scale_layout(head_dim, bits):
    """Words (two channels) of the K scales or zeros: the same for all rows g."""
    index = channel_bits(head_dim, bits)[1:]
    return linear_layout(index, ["t0", "t1", "g0", "g1", "g2"], head_dim // 2)


@gluon.constexpr_function
def key_scale_order(head_dim, bits):
    """Permutation of unpacked K scales, seen as bits (highest first), to columns."""
    source = [*channel_bits(head_dim, bits)[1:][::-1], "o"]
    return [source.index(b) for b in column_bits(head_dim, bits)[::-1]]


@gluon.constexpr_function
def value_word_bits(bits):
    """Index bits of a word inside a row of V codes, lowest first."""
    return {8: ["e", "w0", "w1", "t0", "t1"], 4: ["e", "w0", "t0", "t1"], 2: ["e", "t0", "t1"]}[bits]


@gluon.constexpr_function
def value_codes_layout(head_dim, bits):
    """Words of the V codes: lane g takes channels g, g + 8, ..., lane t a quarter of each row."""
    index = value_word_bits(bits) + ["g0", "g1", "g2"] + [f"m{i}" for i in range(log2(head_dim) - 3)]
    return linear_layout(index, ["t0", "t1", "g0", "g1", "g2"], head_dim * 64 * bits // 16)


@gluon.constexpr_function
def value_codes_order(head_dim, bits):
    """Permutation of unpacked V codes, seen as bits (highest first), to ``[head_dim rows, 64 columns]``."""
    channel = ["g0", "g1", "g2"] + [f"m{i}" for i in range(log2(head_dim) - 3)]
    source = (value_word_bits(bits) + channel)[::-1] + [f"h{i}" for i in range(parts_bits(bits))] + ["o"]
    target = channel[::-1] + row_bits(bits)[::-1]
    return [source.index(b) for b in target]


@gluon.constexpr_function
def value_scale_layout(bits):
    """Words (two tokens) of the V scales: lane g takes the rows whose scores it holds."""
    index = [row_lane(b, b) for b in token_bits(bits)][1:]
    return linear_layout(index, ["same", "same", "g0", "g1", "g2"], 32)


@gluon.constexpr_function
def value_scale_order(bits):
    """Permutation of unpacked V scales, seen as bits (highest first), to rows."""
    source = [*token_bits(bits)[1:][::-1], "o"]
    return [source.index(b) for b in row_bits(bits)[::-1]]


@gluon.constexpr_function
def part_of_row_bit(value_bits):
    """First bit of the part inside the row index: rows of part h hold codes shifted left by h * bits."""
    return 6 - parts_bits(value_bits)


@gluon.constexpr_function
def refined_split(refined_bits):
    """How many of the token bits choose the byte of a refined row; the others choose the place inside it."""
    return 3 if refined_bits == 1 else 4


@gluon.constexpr_function
def refined_word_bits(refined_bits, value_bits):
    """Index bits of a word of a refined row, lowest first."""
    return token_bits(value_bits)[1 : refined_split(refined_bits)]


@gluon.constexpr_function
def refined_shifts(refined_bits, value_bits, of_lane):
    """``(name, shift)`` of the token bits that choose the place inside a byte: those of the lane or of the register."""
    names = token_bits(value_bits)[refined_split(refined_bits) :]
    pairs = [(name, refined_bits << i) for i, name in enumerate(names)]
    return [pair for pair in pairs if (row_lane(pair[0], "") != "") == of_lane]


@gluon.constexpr_function
def refined_layout(channels, refined_bits, value_bits):
    """Words of the refined codes beside the shifts that differ between lanes: ``[channels * words, shifts]``."""
    row = [row_lane(b, "row_" + b) for b in refined_word_bits(refined_bits, value_bits)]
    index = row + _refined_channel_bits(channels)
    place = {name: [1 << i, 0] for i, name in enumerate(index)}
    shifts = refined_shifts(refined_bits, value_bits, True)
    for i in range(len(shifts)):
        place[row_lane(shifts[i][0], "")] = [0, 1 << i]
    lanes = ["t0", "t1", "g0", "g1", "g2"]
    # Channels 2i and 2i + 1 side by side in a register, as the operand wants them.
    registers = [place["c0"]] + [place[name] for name in index if name not in (*lanes, "c0")]
    shape = [channels * (1 << len(row)), 1 << len(refined_shifts(refined_bits, value_bits, True))]
    return gl.DistributedLinearLayout(registers, [place.get(name, [0, 0]) for name in lanes], [], [], shape)


@gluon.constexpr_function
def refined_order(channels, refined_bits, value_bits):
    """Permutation of unpacked refined codes, seen as bits (highest first), to ``[64 rows, channels]``."""
    row = ["row_" + b for b in refined_word_bits(refined_bits, value_bits)]
    lane_shifts = ["row_" + name for name, _ in refined_shifts(refined_bits, value_bits, True)]
    register_shifts = ["row_" + name for name, _ in refined_shifts(refined_bits, value_bits, False)]
    channel = _refined_channel_bits(channels)
    # Pieces of eight channels are unpacked one by one and joined.
    source = (row + channel[:3])[::-1] + lane_shifts[::-1] + register_shifts + ["row_o"] + channel[3:]
    target = ["row_" + b for b in row_bits(value_bits)][::-1] + channel[::-1]
    return [source.index(b) for b in target]


@gluon.constexpr_function
def _refined_channel_bits(channels):
    return ["c0", "t0", "t1"] + [f"c{i}" for i in range(1, log2(channels) - 2)]


@gluon.constexpr_function
def _operand_bits(rows):
    """Index bits of a second operand ``[rows, 8]`` in memory, lowest first: eight values of a lane, lanes, the rest."""
    return ["k0", "k3", "k4", "k1", "k2", "n0", "n1", "n2"] + [f"k{i}" for i in range(5, log2(rows))]


@gluon.constexpr_function
def operand_layout(rows, columns):
    """Layout of the values of a second operand in the order of `_operand_bits`."""
    return linear_layout(_operand_bits(rows), ["k1", "k2", "n0", "n1", "n2"], rows * columns)


@gluon.constexpr_function
def operand_order(rows, columns):
    """Permutation of a second operand ``[rows, columns]``, seen as bits (highest first), to `operand_layout`."""
    source = ([f"n{i}" for i in range(log2(columns))] + [f"k{i}" for i in range(log2(rows))])[::-1]
    return [source.index(b) for b in _operand_bits(rows)[::-1]]


@gluon.constexpr_function
def operand_order_back(rows, columns):
    """The inverse of `operand_order`."""
    order = operand_order(rows, columns)
    return [order.index(i) for i in range(len(order))]


@gluon.constexpr_function
def mask_asm(bits):
    """PTX: a pair of 16-bit words to its pairs of codes, each shifted left by bits * part; odd bytes last."""
    parts = 8 // bits
    out = 2 * parts
    mask = (1 << bits) - 1
    lines = [f"and.b32 ${i}, ${out}, {(mask << i * bits) * 0x10001:#010x};" for i in range(parts)]
    lines += [f"shr.u32 x, ${out}, 8;"]
    lines += [f"and.b32 ${parts + i}, x, {(mask << i * bits) * 0x10001:#010x};" for i in range(parts)]
    return "{ .reg .b32 x; " + " ".join(lines) + " }"


@gluon.constexpr_function
def signed_bytes_asm():
    """PTX: a pair of 16-bit words to their bytes plus 128, even bytes first."""
    return (
        "{ .reg .b32 x; xor.b32 x, $2, 0x80808080; and.b32 $0, x, 0x00ff00ff;"
        " shr.u32 x, x, 8; and.b32 $1, x, 0x00ff00ff; }"
    )


@gluon.constexpr_function
def refined_asm(refined_bits, value_bits):
    """PTX: a pair of 16-bit words and their lane's shift (twice) to pairs of refined codes; odd bytes last."""
    shifts = [0]
    for _, shift in refined_shifts(refined_bits, value_bits, False):
        shifts += [s + shift for s in shifts]
    shifts += [8 + s for s in shifts]
    mask = ((1 << refined_bits) - 1) * 0x10001
    out = len(shifts)
    lines = [f"shr.u32 x, ${out}, ${out + 1};"]
    lines += [f"shr.u32 y, x, {s}; and.b32 ${i}, y, {mask:#010x};" for i, s in enumerate(shifts)]
    return "{ .reg .b32 x, y; " + " ".join(lines) + " }"


@gluon.constexpr_function
def constraints(outputs, inputs):
    """Register constraints of an inline assembly with 32-bit operands."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@gluon.constexpr_function
def twos(n):
    """The shape of ``n`` elements seen bit by bit."""
    return [2] * log2(n)


@gluon.constexpr_function
def row_position(value_bits, token_bit):
    """Which bit of the row index is this bit of the token."""
    return row_bits(value_bits).index(token_bits(value_bits)[token_bit])


@gluon.constexpr_function
def lane_shifts(refined_bits, value_bits):
    """Size of the second dimension of `refined_layout`."""
    return 1 << len(refined_shifts(refined_bits, value_bits, True))


@gluon.constexpr_function
def lane_shift_step(refined_bits, value_bits, i):
    """The shift that belongs to bit ``i`` of the second dimension of `refined_layout`."""
    return refined_shifts(refined_bits, value_bits, True)[i][1]


@gluon.constexpr_function
def refined_outputs(refined_bits, value_bits):
    """How many values `refined_asm` makes of a word."""
    return 2 << len(refined_shifts(refined_bits, value_bits, False))
