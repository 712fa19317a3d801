"""Variants of the INT8 prefill kernels for `compile_kernels`: the tiles that each target really gets."""

from compile_kernels import TARGETS, Variant

from turboattention.ops.prefill import hopper, int8_prepass, int8_triton, merge_triton
from turboattention.ops.prefill.int8 import LEVELS, SMALLEST

CODES = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": "*i8"}
SCALES = {"q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "shift_ptr": "*fp32"}
LENGTHS = dict.fromkeys(("longest_q", "longest_k", "padded_q", "padded_k", "heads", "ratio"), "i32")


def attention(target: str, width: int, *, causal: bool, window: int = 0, packed: bool = False) -> Variant:
    tiles = int8_triton.choose_tiles(target, width)
    constants = {
        "HEAD_DIM": width, "WIDTH": width, "PART": tiles.part, "M": tiles.block_m, "N": tiles.block_n, "CAUSAL": causal,
        "WINDOW": window,
        "PACKED": packed, "BY_ADD": tiles.float_by_add, "ASSEMBLY": tiles.assembly, "out_stride_d": 1,
    }  # fmt: skip
    types = {**CODES, **SCALES, "out_ptr": "*fp16", "lse_ptr": "*fp32", **LENGTHS}
    types |= dict.fromkeys(("out_stride_b", "out_stride_h", "out_stride_t", "lse_stride_b", "lse_stride_h"), "i32")
    if packed:
        types |= {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32"}
    else:
        constants |= {"cu_q_ptr": None, "cu_k_ptr": None}
    name = f"attention-{width}" + "-causal" * causal + "-window" * bool(window) + "-packed" * packed
    return Variant(name, int8_triton.attention_kernel, types, constants, tiles.num_warps, tiles.num_stages, (target,))


def prepass(width: int) -> list[Variant]:
    sizes = {"HEAD_DIM": width, "WIDTH": width, "PACKED": False}
    inputs = [f"{x}_stride_{axis}" for x in "qkv" for axis in "bht"]
    types = {**dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp16"), "mean_ptr": "*fp32", "gain_ptr": "*fp32"}
    types |= {"q8_ptr": "*i8", "k8_ptr": "*i8", "v8_ptr": "*i8", **SCALES, "factor": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(("longest_q", "longest_k", "padded_q", "padded_k", "heads", "kv_heads", *inputs), "i32")
    constants = {**sizes, "LEVELS": float(LEVELS), "SMALLEST": SMALLEST, "cu_q_ptr": None, "cu_k_ptr": None}
    constants |= dict.fromkeys(("q_stride_d", "k_stride_d", "v_stride_d"), 1)
    measured = {"q_ptr": "*fp16", "k_ptr": "*fp16", "mean_ptr": "*fp32", "gain_ptr": "*fp32"}
    measured |= dict.fromkeys(("longest_q", "longest_k", "ratio", "kv_heads", *inputs[:6]), "i32")
    measured_with = {**sizes, "cu_q_ptr": None, "cu_k_ptr": None, "q_stride_d": 1, "k_stride_d": 1}
    return [
        Variant(f"quantise-{width}", int8_prepass.quantise, types, constants, 8, options={"enable_fp_fusion": False}),
        Variant(f"measure-{width}", int8_prepass.measure, measured, measured_with, 8),
    ]


def on_hopper(width: int, *, causal: bool, packed: bool = False) -> Variant:
    def tile(rows: int, columns: int) -> str:
        return f"tensordesc<i8[{rows}, {columns}],{hopper.shared_layout(rows, columns)!r}>"

    types = {"q_ptr": "*fp16", "k_desc": tile(128, width), "v_desc": tile(width, 128)}
    types |= {"mean_ptr": "*fp32", "gain_ptr": "*fp32"}
    types |= {"k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "out_ptr": "*fp16", "lse_ptr": "*fp32", "scale": "fp32"}
    numbers = [f"{x}_stride_{axis}" for x in ("q", "out") for axis in "bht"]
    numbers += ["lse_stride_b", "lse_stride_h", "longest_q", "longest_k", "padded_k", "heads", "ratio"]
    types |= dict.fromkeys(numbers, "i32")
    constants = {"HEAD_DIM": width, "WIDTH": width, "CAUSAL": causal, "PACKED": packed}
    constants |= {"REGISTERS": hopper.REGISTERS, "q_stride_d": 1, "out_stride_d": 1}
    if packed:
        types |= {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32"}
    else:
        constants |= {"cu_q_ptr": None, "cu_k_ptr": None}
    name = f"hopper-{width}" + "-causal" * causal + "-packed" * packed
    return Variant(
        name, hopper.attention_kernel, types, constants, 4, 2, ("sm_90",), {"maxnreg": hopper.COMPILED_REGISTERS}
    )


def merge(width: int, *, packed: bool) -> Variant:
    types = {"before_ptr": "*fp16", "before_lse_ptr": "*fp32", "out_ptr": "*fp16", "lse_ptr": "*fp32"}
    numbers = [f"{x}_stride_{axis}" for x in ("before", "out") for axis in "bht"]
    numbers += [f"{x}_stride_{axis}" for x in ("before_lse", "lse") for axis in "bh"]
    types |= dict.fromkeys(("rows", "longest", "heads", *numbers), "i32") | ({"cu_ptr": "*i32"} if packed else {})
    constants = {"HEAD_DIM": width, "WIDTH": width, "ROWS": merge_triton.ROWS, "PACKED": packed, "out_stride_d": 1}
    constants |= {} if packed else {"cu_ptr": None}
    return Variant(f"merge-{width}" + "-packed" * packed, merge_triton.merge_kernel, types, constants)


VARIANTS = [
    *(attention(target, width, causal=True) for target in TARGETS for width in (128, 256)),
    *(attention(target, 64, causal=True) for target in ("sm_80", "sm_90", "gfx942")),
    attention("sm_90", 128, causal=False),
    attention("sm_90", 128, causal=True, window=1024, packed=True),
    on_hopper(64, causal=True),
    on_hopper(128, causal=True),
    on_hopper(128, causal=False),
    on_hopper(128, causal=True, packed=True),
    *prepass(128),
    merge(128, packed=False),
    merge(256, packed=True),
]
