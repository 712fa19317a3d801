"""Decode kernels to compile for every GPU (see compile_kernels)."""

from compile_kernels import NVIDIA, Variant

from turboattention.config import TensorFormat, get_preset
from turboattention.ops.decode import gluon
from turboattention.ops.decode import portable
from turboattention.ops.decode.tiles import GluonTile, PortableTile
from turboattention.quant.granularity import PerToken
from turboattention.quant.layout import PageLayout

CUDA = tuple(f"sm_{arch}" for arch in NVIDIA)
TYPES = {
    "q_ptr": "*fp16", "pool_ptr": "*i16", "table_ptr": "*i32", "lengths_ptr": "*i32", "page_tokens_ptr": "*i32",
    "starts_ptr": "*i32", "heads_ptr": "*i32", "tail_key_ptr": "*fp16", "tail_value_ptr": "*fp16",
    "sink_key_ptr": "*fp16", "sink_value_ptr": "*fp16", "part_ptr": "*fp32", "lse_ptr": "*fp32",
    **dict.fromkeys(
        ("q_batch", "q_head", "table_batch", "table_head", "tail_batch", "tail_head", "tail_token", "sink_batch",
         "sink_head", "sink_token", "tail_capacity", "batch", "heads", "programs", "window"), "i32"),
    "softcap": "fp32", "qscale": "fp32",
}  # fmt: skip
FLAGS = {"BATCH": 8, "PAGED": True, "RING": True, "SINKS": 1, "STARTS": False, "WINDOW": False, "SOFTCAP": False, "PDL": True}


def plain(key_bits: int, value_bits: int, head_dim: int = 128) -> PageLayout:
    return PageLayout(64, head_dim, TensorFormat(key_bits), TensorFormat(value_bits, PerToken(), symmetric=True, rotate=True))


def preset(name: str, head_dim: int = 128) -> PageLayout:
    cache = get_preset(name).cache
    return PageLayout(cache.page_size, head_dim, cache.key, cache.value)


def gluon_variant(name: str, layout: PageLayout, ratio: int = 4, **flags: object) -> Variant:
    tile = GluonTile.of(layout, ratio, 8)
    targets = CUDA if not flags.pop("one", False) else ("sm_90",)
    constants = {"C": tile, **FLAGS, **flags}
    return Variant(name, gluon.decode_kernel, TYPES, constants, num_warps=1, num_stages=1, targets=targets)


def portable_variant(name: str, layout: PageLayout, ratio: int = 4, queries: int = 1, how: str = "asm", **flags: object) -> Variant:
    tile = PortableTile.of(layout, ratio, queries, 8, how)
    targets = ("sm_90",)
    types = {**TYPES, "pool_ptr": "*u8", **dict.fromkeys(("q_query", "ratio", "queries"), "i32")}
    constants = {"C": tile, **FLAGS, "CAUSAL": True, **flags}
    return Variant(name, portable.attend_kernel, types, constants, num_warps=tile.num_warps, num_stages=3, targets=targets)


VARIANTS = [
    portable_variant("portable turbo4", preset("turbo4")),
    portable_variant("portable turbo2 words", preset("turbo2"), how="words"),
    gluon_variant("gluon turbo4", preset("turbo4"), one=True),
    gluon_variant("gluon turbo2", preset("turbo2"), one=True),
    gluon_variant("gluon plain 2", plain(2, 2), one=True),
    gluon_variant("gluon plain K4 V2", plain(4, 2), one=True),
    gluon_variant("gluon int8", preset("int8"), one=True),
    gluon_variant("gluon turbo4 64", preset("turbo4", 64), one=True, ratio=3),
    gluon_variant("gluon turbo2 64", preset("turbo2", 64), one=True, ratio=7),
    gluon_variant("gluon turbo4 256", preset("turbo4", 256), one=True, ratio=16),
    gluon_variant("gluon turbo4 ratio 16", preset("turbo4"), one=True, ratio=16),
    gluon_variant("gluon all flags", preset("turbo4"), one=True, STARTS=True, WINDOW=True, SOFTCAP=True, PAGED=False, RING=False),
]
