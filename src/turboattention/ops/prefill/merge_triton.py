"""A kernel that merges attention over the cache into attention of a chunk over itself: `reference.merge_attention`."""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
# Triton has no annotations, and its kernels are compiled from untyped Python.

import triton
import triton.language as tl

from turboattention.ops.prefill.int8 import padded_width
from turboattention.ops.prefill.int8_prepass import locate
from turboattention.ops.prefill.reference import AttentionOutput
from turboattention.ops.prefill.sequences import Sequences

ROWS = 16  # 32 of 256 channels would spill


@triton.jit(do_not_specialize=["rows", "longest", "heads"])
def merge_kernel(
    before_ptr, before_lse_ptr, out_ptr, lse_ptr, cu_ptr, rows, longest, heads,
    before_stride_b, before_stride_h, before_stride_t, before_lse_stride_b, before_lse_stride_h,
    out_stride_b, out_stride_h, out_stride_t, out_stride_d, lse_stride_b, lse_stride_h,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """ROWS of the first ``rows`` queries of one head of a sequence, in place of ``out`` and ``lse``."""
    number = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    first, length, _ = locate(cu_ptr, number, longest, PACKED)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < tl.minimum(rows, length)
    channel = tl.arange(0, WIDTH)
    wanted = real[:, None] & (channel < HEAD_DIM)[None, :]
    before_lse_ptr += number * before_lse_stride_b + head * before_lse_stride_h + row
    before_ptr += number * before_stride_b + head * before_stride_h
    before_ptrs = before_ptr + row.to(tl.int64)[:, None] * before_stride_t + channel[None, :]
    token = (first + row).to(tl.int64)
    lse_ptrs = lse_ptr + head * lse_stride_h + token
    out_ptr += head * out_stride_h
    if not PACKED:
        lse_ptrs += number * lse_stride_b
        out_ptr += number * out_stride_b
    out_ptrs = out_ptr + token[:, None] * out_stride_t + channel[None, :] * out_stride_d

    a = tl.load(before_lse_ptr, mask=real, other=-float("inf"))
    b = tl.load(lse_ptrs, mask=real, other=-float("inf"))
    top = tl.maximum(tl.maximum(a, b), -1e30)  # finite where neither saw anything
    of_a = tl.exp(a - top)
    of_b = tl.exp(b - top)
    total = of_a + of_b
    inverse = 1.0 / tl.maximum(total, 1e-30)
    before = tl.load(before_ptrs, mask=wanted, other=0.0).to(tl.float32)
    own = tl.load(out_ptrs, mask=wanted, other=0.0).to(tl.float32)
    out = before * (of_a * inverse)[:, None] + own * (of_b * inverse)[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=wanted)
    tl.store(lse_ptrs, tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-30)), -float("inf")), mask=real)


def merge_into(chunk: AttentionOutput, before: AttentionOutput, sequences: Sequences) -> None:
    """Merge ``before`` into ``chunk``, in place.

    chunk: of `int8_prefill`, dense or packed. before: of the same queries, the first ``rows`` of each sequence, dense:
    out ``[batch, heads, rows, head_dim]`` and lse ``[batch, heads, rows]``, both with a last stride of 1.
    """
    batch, heads, rows, dim = before.out.shape
    out, lse, packed = chunk.out, chunk.lse, sequences.is_packed
    strides = (0, out.stride(1), out.stride(0), out.stride(2)) if packed else out.stride()
    merge_kernel[(batch * heads, -(-rows // ROWS))](
        before.out, before.lse, out, lse, sequences.cu_q, rows, sequences.max_q, heads,
        *before.out.stride()[:3], *before.lse.stride()[:2], *strides, 0 if packed else lse.stride(0), lse.stride(-2),
        HEAD_DIM=dim, WIDTH=padded_width(dim), ROWS=ROWS, PACKED=packed, num_warps=4,
    )  # fmt: skip
