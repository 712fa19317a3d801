"""Variants of the kernel that expands pages, for `compile_kernels`."""

from compile_kernels import Variant
from decode_variants import preset

from turboattention.ops.decode.tiles import PortableTile
from turboattention.ops.prefill.expand_triton import COLUMNS, REGISTERS, WARPS, expand_kernel


def expand(name: str, head_dim: int, targets: tuple[str, ...], sinks: int = 1) -> Variant:
    layout = preset(name, head_dim)
    halves = ("tail_key_ptr", "tail_value_ptr", "sink_key_ptr", "sink_value_ptr", "key_ptr", "value_ptr")
    numbers = ("table_ptr", "lengths_ptr", "page_tokens_ptr", "heads_ptr", "tail_rows_ptr", "sink_rows_ptr")
    types = dict.fromkeys((*halves, "out_key_ptr", "out_value_ptr"), "*bf16")
    types |= dict.fromkeys((*numbers, "cu_q_ptr", "cu_k_ptr"), "*i32") | {"pool_ptr": "*u8", "signs_ptr": "*fp16"}
    strides = [f"{x}_{axis}" for x in ("tail", "sink") for axis in ("batch", "head", "token")]
    strides += [f"{x}_{axis}" for x in ("key", "value", "out") for axis in ("token", "head")]
    types |= dict.fromkeys(("table_batch", "table_head", "tail_capacity", *strides), "i32")
    tile = PortableTile.of(layout, 1, 64, "bytes")
    constants = {
        "C": tile,
        "COLUMNS": COLUMNS,
        "SINKS": sinks,
        "ROTATE": head_dim & -head_dim if layout.value.rotated else 0,
    }
    return Variant(
        f"expand {name} {head_dim}", expand_kernel, types, constants, WARPS, targets=targets,
        options={} if "gfx942" in targets else {"maxnreg": REGISTERS}, multiples=tuple(strides),
    )  # fmt: skip


VARIANTS = [
    expand("turbo4", 128, ("sm_80", "sm_90")),
    expand("turbo4", 128, ("gfx942",)),
    expand("turbo2", 64, ("sm_90",)),
    expand("int8", 256, ("sm_90",)),
]
