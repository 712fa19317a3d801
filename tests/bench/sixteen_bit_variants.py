"""How the benchmark's kernels are compiled: see tests/ops/compile_kernels.py."""

from compile_kernels import TARGETS, Variant

from turboattention.bench.read_kernel import read_kernel
from turboattention.bench.sixteen_bit import TILES, merge_kernel, split_kernel

SPLIT = {
    "q": "*fp16", "key": "*fp16", "value": "*fp16", "lengths": "*i32", "offsets": "*i64", "partial": "*fp32",
    "lse": "*fp32", "chunk": "i32", "splits": "i32", "factor": "fp32",
}  # fmt: skip
MERGE = {"partial": "*fp32", "lse": "*fp32", "out": "*fp16", "splits": "i32"}
LATER = ("sm_90", "sm_100", "sm_120")


def _split(tiles, dependent: bool, targets: tuple[str, ...]) -> Variant:
    sizes = {"HEADS": 8, "RATIO": 4, "DIM": 128, "PADDED": 128, "ROWS": 16}
    constants = {**sizes, "BLOCK": tiles.block, "DEPENDENT": dependent}
    name = f"split {tiles.name}{' dependent' if dependent else ''}"
    return Variant(name, split_kernel, SPLIT, constants, tiles.warps, tiles.stages, targets)


VARIANTS = [
    _split(TILES[0], False, TARGETS),
    _split(TILES[4], False, ("sm_80", "sm_90")),
    _split(TILES[0], True, LATER),
    Variant("merge", merge_kernel, MERGE, {"SIZE": 512, "DIM": 128, "PART": 128, "BATCH": 32, "DEPENDENT": False}),
    Variant(
        "merge dependent", merge_kernel, MERGE, {"SIZE": 512, "DIM": 128, "PART": 128, "BATCH": 32, "DEPENDENT": True},
        targets=LATER,
    ),
    Variant("read", read_kernel, {"words": "*i32", "out": "*i32", "count": "i64"}, {"WORDS": 1024}, 4, 3),
]  # fmt: skip
