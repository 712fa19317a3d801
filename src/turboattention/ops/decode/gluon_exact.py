"""Exact tokens in the Gluon decode kernel: sinks and tail, in 16 bits."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from turboattention.ops.decode.gluon_common import LOWEST, as_operand, cap, exp2, query_rows, store, unit_of

TILE = gl.constexpr(16)  # tokens: one product


@gluon.jit
def exact_tokens(
    q_ptr, kv_head, head, begin, end, exact, length, page_tokens, start, tail_key_ptr, tail_value_ptr, sink_key_ptr,
    sink_value_ptr, part_ptr, lse_ptr, part, q_head, tail_head, tail_token, sink_head, sink_token, tail_capacity,
    window, softcap, qscale, C: gl.constexpr, RING: gl.constexpr, SINKS: gl.constexpr, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Exact tokens ``begin .. end`` of one row (sinks, then tail) in 16 bits, 16 at a time."""
    D: gl.constexpr = C.head_dim
    N: gl.constexpr = C.product_columns
    T: gl.constexpr = TILE
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    blocks: gl.constexpr = gl.zeros([T, N], gl.float32, layout=mma).reshape(T // 8, 8, N).type.layout
    part_sum: gl.constexpr = gl.SliceLayout(0, blocks)
    m = gl.full([N], LOWEST, gl.float32, layout=gl.SliceLayout(0, mma))
    mass = gl.zeros([8, N], gl.float32, layout=part_sum)
    acc = gl.zeros([D, N], gl.float32, layout=mma)
    natural = gl.arange(0, D, layout=gl.SliceLayout(1, right))
    far_head = kv_head.to(gl.int64)
    tail_key_ptr += far_head * tail_head
    tail_value_ptr += far_head * tail_head
    sink_key_ptr += far_head * sink_head
    sink_value_ptr += far_head * sink_head
    q_rows = query_rows(q_ptr, kv_head, head, q_head, gl.arange(0, N, layout=gl.SliceLayout(0, right)), C)
    q = gl.load(q_rows + gl.expand_dims(natural, 1)).to(gl.float32)
    unit = unit_of(q)
    q = (q * gl.expand_dims(1.0 / unit, 0)).to(gl.float16)
    factor = gl.convert_layout(unit, gl.SliceLayout(0, mma)) * qscale
    visible_from = gl.maximum(start, length - window) if WINDOW else start
    tail_first = gl.maximum(page_tokens, visible_from)
    sinks = exact - (length - tail_first)
    for first in range(begin, end, T):
        ktoken = first + gl.arange(0, T, layout=gl.SliceLayout(1, left))
        kslot = tail_first + ktoken - sinks
        kslot = kslot % tail_capacity if RING else kslot - page_tokens
        kchannel = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, left)), 0)
        kat = gl.where(ktoken < sinks, ktoken * sink_token, kslot.to(gl.int64) * tail_token)
        kmask = gl.expand_dims(ktoken < exact, 1)
        if SINKS > 0:
            is_sink = gl.expand_dims(ktoken < sinks, 1)
            kptr = gl.where(is_sink, sink_key_ptr + gl.expand_dims(kat, 1) + kchannel,
                            tail_key_ptr + gl.expand_dims(kat, 1) + kchannel)  # fmt: skip
        else:
            kptr = tail_key_ptr + gl.expand_dims(kat, 1) + kchannel
        key = gl.load(kptr, mask=kmask, other=0.0).to(gl.float16)
        vtoken = first + gl.arange(0, T, layout=gl.SliceLayout(0, left))
        vslot = tail_first + vtoken - sinks
        vslot = vslot % tail_capacity if RING else vslot - page_tokens
        vchannel = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(1, left)), 1)
        vat = gl.where(vtoken < sinks, vtoken * sink_token, vslot.to(gl.int64) * tail_token)
        if SINKS > 0:
            vptr = gl.where(gl.expand_dims(vtoken < sinks, 0), sink_value_ptr + gl.expand_dims(vat, 0) + vchannel,
                            tail_value_ptr + gl.expand_dims(vat, 0) + vchannel)  # fmt: skip
        else:
            vptr = tail_value_ptr + gl.expand_dims(vat, 0) + vchannel
        value = gl.load(vptr, mask=gl.expand_dims(vtoken < exact, 0), other=0.0).to(gl.float16)
        x = mma_v2(key, q, gl.zeros([T, N], gl.float32, layout=mma)) * gl.expand_dims(factor, 0)
        if SOFTCAP:
            x = cap(x, softcap)
        xtoken = first + gl.arange(0, T, layout=gl.SliceLayout(1, mma))
        seen = xtoken < exact
        if SINKS > 0 and WINDOW:
            seen = seen & ((xtoken >= sinks) | (start + xtoken >= visible_from))
        if SINKS > 0:
            seen = seen & ((xtoken >= sinks) | (start + xtoken < page_tokens))
        x = gl.where(gl.expand_dims(seen, 1), x, LOWEST)
        top = gl.maximum(gl.max(x, 0), m)
        fall = exp2(m - top)
        m = top
        p = gl.where(gl.expand_dims(seen, 1), exp2(x - gl.expand_dims(top, 0)), 0.0)
        fall8 = gl.convert_layout(fall, gl.SliceLayout(0, part_sum), assert_trivial=True)
        add = gl.convert_layout(gl.sum(p.reshape(T // 8, 8, N), 0), part_sum, assert_trivial=True)
        mass = mass * gl.expand_dims(fall8, 0) + add
        p = as_operand(p.to(gl.float16), right)
        acc = acc * gl.expand_dims(fall, 0) + mma_v2(value, p, gl.zeros([D, N], gl.float32, layout=mma))
    total = gl.convert_layout(gl.sum(mass, 0), gl.SliceLayout(0, mma))
    out = acc * gl.expand_dims(1.0 / gl.maximum(total, 1e-30), 0)
    store(part_ptr, lse_ptr, part, out, m, total, head, mma, C)
