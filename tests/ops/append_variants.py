"""The append kernels as they are launched, for `compile_kernels`."""

from typing import Any

from compile_kernels import Variant

from turboattention.config import presets
from turboattention.ops.append.packed import QUERY_SAMPLES
from turboattention.ops.append.page_spec import PageSpec, page_spec
from turboattention.ops.append.triton import compress_kernel
from turboattention.ops.append.triton_paged import append_kernel
from turboattention.ops.append.triton_queries import TILE, queries_kernel
from turboattention.quant.layout import PageLayout

# Strides of contiguous tensors with 8 heads and 4,096 tokens: as launched, multiples of 16.
STRIDES = {
    f"{side}_{axis}": stride for side in ("key", "value") for axis, stride in (("b", 1 << 22), ("h", 1 << 19), ("d", 1))
}


def spec_of(preset: str, head_dim: int) -> PageSpec:
    cache = presets()[preset].cache
    return page_spec(PageLayout(cache.page_size, head_dim, cache.key, cache.value))


def compress(preset: str, head_dim: int, **changes: Any) -> Variant:
    spec = spec_of(preset, head_dim)
    types = {"key": "*fp16", "value": "*fp16", "pages": "*u8", "fault": "*i32"}
    constants = {
        **STRIDES,
        "key_t": head_dim,
        "value_t": head_dim,
        "valid": None,
        "valid_b": 0,
        "valid_t": 0,
        "S": spec,
    }
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


def append(preset: str, head_dim: int, *, rope: bool = False, before: bool = True, **changes: Any) -> Variant:
    """A decode step, or a prefill chunk with several groups of heads and ragged counts."""
    spec = spec_of(preset, head_dim)
    pointers = ("key", "value", "tail_key", "tail_value", "sink_key", "sink_value")
    types = {**dict.fromkeys(pointers, "*fp16"), "pool": "*u8"}
    types |= dict.fromkeys(("table", "lengths", "page_tokens", "fault"), "*i32")
    scalars = ("new_tokens", "window", "capacity", "kv_heads", "table_pages", "pool_pages", "table_b", "table_h")
    types |= dict.fromkeys(scalars, "i32")
    constants = {**STRIDES, **dict.fromkeys(("key_t", "value_t", "tail_t", "sink_t"), head_dim)}
    constants |= {"tail_b": 1 << 16, "tail_h": 1 << 13, "sink_b": 1 << 10, "sink_h": 1 << 7, "table_p": 1}
    constants |= {"angle_b": 0, "angle_t": head_dim // 2, "S": spec, "BEFORE": before, "SINKS": 1}
    constants |= {"ANGLES": head_dim // 2 if rope else 0, "ROWS": 1 if before else 16}
    optional = {"cos": rope, "sin": rope, "power": bool(spec.refined), "counts": not before, "heads": not before}
    optional |= dict.fromkeys(("tail_rows", "sink_rows", "starts"), not before)
    observed = before and bool(spec.refined)
    optional["queries"] = observed
    constants |= {"RATIO": 4 if observed else 0, "query_b": 1 << 12, "query_h": head_dim, "query_d": 1}
    kinds = {"cos": "*fp32", "sin": "*fp32", "power": "*fp32", "queries": "*bf16"}
    for name, given in optional.items():
        if given:
            types[name] = kinds.get(name, "*i32")
        else:
            constants[name] = None
    return Variant(
        f"append {preset} {head_dim} {'before' if before else 'after'}",
        append_kernel,
        types,
        constants,
        num_warps=spec.num_warps,
        options={"enable_fp_fusion": False},
        unaligned=scalars,
        **changes,
    )


def queries(head_dim: int, **changes: Any) -> Variant:
    types = {"power": "*fp32", "early": "*fp32", "queries": "*bf16", "keep": "*fp32", "kv_heads": "i32"}
    types |= dict.fromkeys(("starts", "counts", "rows", "lengths"), "*i32")
    constants = {"query_t": 32 * head_dim, "query_h": head_dim, "query_d": 1, "HEAD_DIM": head_dim, "RATIO": 4}
    constants |= {"WIDTH": head_dim, "SAMPLES": QUERY_SAMPLES, "PAGE": 64, "TILE": TILE}
    unaligned = ("starts", "counts", "rows", "keep", "lengths")
    return Variant(
        f"queries {head_dim}", queries_kernel, types, constants, num_warps=8, unaligned=unaligned, **changes
    )  # fmt: skip


VARIANTS = [
    queries(128, targets=("sm_80", "sm_90", "gfx942")),
    append("int8", 64),
    append("turbo4", 128, targets=("sm_80", "sm_90")),
    append("turbo2", 128, rope=True, before=False, targets=("sm_90",)),
    compress("turbo3", 96, targets=("gfx942",)),
    compress("turbo2", 256, targets=("sm_90",)),
]
