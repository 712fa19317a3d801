"""The append kernels as they are launched, for `compile_kernels`."""

from typing import Any

from compile_kernels import Variant

from turboattention.config import presets
from turboattention.ops.append.page_spec import PageSpec, page_spec
from turboattention.ops.append.triton import compress_kernel
from turboattention.ops.append.triton_paged import append_kernel
from turboattention.quant.layout import PageLayout

SIDES = [f"{side}_{axis}" for side in ("key", "value") for axis in "bht"]


def spec_of(preset: str, head_dim: int) -> PageSpec:
    cache = presets()[preset].cache
    return page_spec(PageLayout(cache.page_size, head_dim, cache.key, cache.value))


def compress(preset: str, head_dim: int, **changes: Any) -> Variant:
    spec = spec_of(preset, head_dim)
    types = {"key": "*fp16", "value": "*fp16", "pages": "*u8", "fault": "*i32", **dict.fromkeys(SIDES, "i64")}
    types |= {"valid": "*u8", "valid_b": "i64"}
    constants = {"key_d": 1, "value_d": 1, "valid_t": 1, "S": spec}
    if spec.refined:
        types["power"] = "*fp32"
    else:
        constants["power"] = None
    return Variant(
        f"compress {preset} {head_dim}",
        compress_kernel,
        types,
        constants,
        num_warps=spec.num_warps,
        options={"enable_fp_fusion": False},
        **changes,
    )


STRIDES = ("key_b", "key_h", "key_t", "value_b", "value_h", "value_t", "tail_b", "tail_h", "tail_t")


def append(preset: str, head_dim: int, *, rope: bool = False, before: bool = True, **changes: Any) -> Variant:
    """A decode step, or a prefill chunk with several groups of heads and ragged counts."""
    spec = spec_of(preset, head_dim)
    pointers = ("key", "value", "tail_key", "tail_value", "sink_key", "sink_value")
    types = {**dict.fromkeys(pointers, "*fp16"), "pool": "*u8"}
    types |= dict.fromkeys(("table", "lengths", "page_tokens", "fault"), "*i32")
    names = ("new_tokens", "window", "capacity", "kv_heads", "table_pages", "pool_pages", *STRIDES)
    types |= dict.fromkeys((*names, "sink_b", "sink_h", "sink_t", "angle_b", "angle_t", "table_b", "table_h"), "i32")
    constants = {"key_d": 1, "value_d": 1, "table_p": 1, "S": spec, "BEFORE": before, "SINKS": 1}
    constants |= {"ANGLES": head_dim // 2 if rope else 0, "ROWS": 1 if before else 16}
    optional = {"cos": rope, "sin": rope, "power": bool(spec.refined), "counts": not before, "heads": not before}
    for name, given in optional.items():
        if given:
            types[name] = "*fp32" if name in ("cos", "sin", "power") else "*i32"
        else:
            constants[name] = None
    return Variant(
        f"append {preset} {head_dim} {'before' if before else 'after'}",
        append_kernel,
        types,
        constants,
        num_warps=spec.num_warps,
        options={"enable_fp_fusion": False},
        unaligned=("new_tokens", "window", "capacity", "kv_heads", "table_pages", "pool_pages", "table_b", "table_h"),
        **changes,
    )


VARIANTS = [
    append("turbo4", 128),
    append("turbo2", 128, rope=True, targets=("sm_80", "sm_90", "sm_100", "gfx942")),
    append("turbo3", 96, targets=("sm_90",)),
    append("turbo4", 128, rope=True, before=False, targets=("sm_90", "gfx942")),
    compress("turbo4", 128, targets=("sm_80", "sm_90", "gfx942")),
    compress("int8", 256, targets=("sm_90",)),
    compress("turbo2", 256, targets=("sm_90",)),
]
