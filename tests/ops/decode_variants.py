"""Decode kernels to compile for every GPU (see compile_kernels)."""

from compile_kernels import AMD, NVIDIA, Variant

from turboattention.config import TensorFormat, get_preset
from turboattention.ops.decode import gluon, portable
from turboattention.ops.decode.tiles import GluonTile, PortableTile
from turboattention.quant.granularity import PerToken
from turboattention.quant.layout import PageLayout

# Dependent launches begin with sm_90.
OLD, NEW = (tuple(f"sm_{arch}" for arch in NVIDIA if (arch >= 90) == new) for new in (False, True))
FEW = (("sm_80",), ("sm_90",))  # of variants that differ little from one that is compiled for all
TYPES = {
    "q_ptr": "*fp16", "pool_ptr": "*i16", "table_ptr": "*i32", "lengths_ptr": "*i32", "page_tokens_ptr": "*i32",
    "starts_ptr": "*i32", "heads_ptr": "*i32", "tail_key_ptr": "*fp16", "tail_value_ptr": "*fp16",
    "sink_key_ptr": "*fp16", "sink_value_ptr": "*fp16", "part_ptr": "*fp32", "lse_ptr": "*fp32",
    **dict.fromkeys(
        ("q_batch", "q_head", "table_batch", "table_head", "tail_batch", "tail_head", "tail_token", "sink_batch",
         "sink_head", "sink_token", "tail_capacity", "batch", "heads", "programs", "window"), "i32"),
    "softcap": "fp32", "qscale": "fp32",
}  # fmt: skip
# An engine's tail has rows of its own for more sequences than the batch; the other variants read row b for sequence b.
ROWS = ("tail_rows_ptr", "sink_rows_ptr")
FLAGS = {"BATCH": 8, "PAGED": True, "RING": True, "SINKS": 1, "STARTS": False, "WINDOW": False, "SOFTCAP": False}


def plain(key_bits: int, value_bits: int, head_dim: int = 128) -> PageLayout:
    return PageLayout(
        64, head_dim, TensorFormat(key_bits), TensorFormat(value_bits, PerToken(), symmetric=True, rotate=True)
    )


def preset(name: str, head_dim: int = 128) -> PageLayout:
    cache = get_preset(name).cache
    return PageLayout(cache.page_size, head_dim, cache.key, cache.value)


def note(layout: PageLayout, rows: int, bound: float, spills: int = 0) -> dict[str, float]:
    """bound: instructions for each stored value and eight query heads; spills: allowed in the loop."""
    values = layout.num_values * max(1, rows // 16)
    return {"values": values, "instructions_per_value": bound, "loop_spills_allowed": spills}


def gluon_variant(
    name: str,
    layout: PageLayout,
    bound: float,
    ratio: int = 4,
    spills: int = 0,
    where: tuple[tuple[str, ...], ...] = (OLD, NEW),
    rows: bool = False,
    **flags: object,
) -> list[Variant]:
    tile = GluonTile.of(layout, ratio)
    constants = {"C": tile, **FLAGS, **flags}
    types = TYPES | dict.fromkeys(ROWS, "*i32") if rows else TYPES
    constants |= {} if rows else dict.fromkeys(ROWS)
    kept = note(layout, 16, bound, spills)
    return [
        Variant(name, gluon.decode_kernel, types, {**constants, "PDL": targets is NEW}, 1, 1, targets, note=kept)
        for targets in where
    ]


def portable_variant(
    name: str, layout: PageLayout, bound: float, ratio: int = 4, queries: int = 1, how: str = "asm", spills: int = 0,
    where: tuple[tuple[str, ...], ...] = (OLD, NEW), **flags: object,
) -> list[Variant]:  # fmt: skip
    tile = PortableTile.of(layout, ratio, queries, how)
    types = {**TYPES, "pool_ptr": "*u8", **dict.fromkeys(("q_query", "ratio", "queries"), "i32")}
    constants = {"C": tile, **FLAGS, "CAUSAL": True, **dict.fromkeys(ROWS), **flags}
    kept = note(layout, tile.rows, bound, spills)
    return [
        Variant(name, portable.attend_kernel, types, {**constants, "PDL": targets is NEW}, tile.num_warps, 2, targets,
                note=kept)
        for targets in where
    ]  # fmt: skip


GROUPS = [
    gluon_variant("gluon turbo4", preset("turbo4"), 2.4),
    gluon_variant("gluon turbo4 of an engine", preset("turbo4"), 2.4, rows=True, where=FEW),
    gluon_variant("gluon turbo2", preset("turbo2"), 2.6, where=FEW),
    gluon_variant("gluon K4 V2", plain(4, 2), 2.1, where=FEW),
    gluon_variant(
        "gluon int8 64, all flags",
        preset("int8", 64),
        3.6,
        ratio=3,
        where=(("sm_86",), ("sm_90", "sm_120")),
        STARTS=True,
        WINDOW=True,
        SOFTCAP=True,
        PAGED=False,
        RING=False,
    ),
    gluon_variant("gluon plain 4 D256", plain(4, 4, 256), 2.1, spills=60, where=FEW),
    portable_variant("portable plain 4", plain(4, 4), 2.6, spills=10, where=FEW),
    portable_variant("portable turbo4", preset("turbo4"), 3.0, spills=4),
    portable_variant("portable turbo2", preset("turbo2"), 3.5, spills=16, where=FEW),
    portable_variant(
        "portable turbo3 80, all flags",
        preset("turbo3", 80),
        16.5,
        spills=120,
        where=FEW,
        STARTS=True,
        WINDOW=True,
        SOFTCAP=True,
        PAGED=False,
        RING=False,
    ),
    portable_variant("portable turbo4 chunk", preset("turbo4"), 7.0, queries=64, spills=60),
    portable_variant("portable turbo4 bytes", preset("turbo4"), 10.5, how="bytes", where=(AMD,)),
]
VARIANTS = [variant for group in GROUPS for variant in group]
