"""Variants of the INT8 prefill kernels for `compile_kernels`: the tiles that each target really gets."""

from turboattention.ops.prefill import int8_prepass, int8_triton
from turboattention.ops.prefill.int8 import LEVELS, SMALLEST

from compile_kernels import TARGETS, Variant

CODES = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": "*i8"}
SCALES = {"q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "shift_ptr": "*fp32"}
LENGTHS = dict.fromkeys(("longest_q", "longest_k", "padded_q", "padded_k", "heads", "ratio"), "i32")


def attention(target: str, width: int, *, causal: bool, window: int = 0, packed: bool = False) -> Variant:
    tiles = int8_triton.choose_tiles(target, width)
    constants = {
        "HEAD_DIM": width, "WIDTH": width, "M": tiles.block_m, "N": tiles.block_n, "CAUSAL": causal, "WINDOW": window,
        "PACKED": packed, "BY_ADD": tiles.float_by_add, "ASSEMBLY": tiles.assembly, "out_stride_d": 1,
    }  # fmt: skip
    types = {**CODES, **SCALES, "out_ptr": "*fp16", "lse_ptr": "*fp32", **LENGTHS}
    types |= dict.fromkeys(("out_stride_b", "out_stride_h", "out_stride_t", "lse_stride_b", "lse_stride_h"), "i32")
    if packed:
        types |= {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32"}
    else:
        constants |= {"cu_q_ptr": None, "cu_k_ptr": None}
    name = f"attention-{width}" + "-causal" * causal + "-window" * bool(window) + "-packed" * packed
    return Variant(
        name, int8_triton.attention_kernel, types, constants, tiles.num_warps, tiles.num_stages, (target,)
    )


VARIANTS = [attention(target, width, causal=True) for target in TARGETS for width in (64, 128, 256)]
