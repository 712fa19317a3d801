# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""Decode over 16-bit K and V in Triton, split along the sequence: a baseline, tuned like the kernels it meets.

Each program reads a chunk of one sequence and KV head for all query heads of that head; a second kernel merges the
chunks. With chunks of a fixed number of tokens a ragged batch is as balanced as an even one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboattention.bench.data import Cache16
from turboattention.errors import UnsupportedError

ROWS = 16  # query heads of a KV head, padded to what a matrix unit takes
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """How the kernel runs: tokens of a step, warps, stages of the pipeline, programs wanted for each multiprocessor."""

    block: int
    warps: int
    stages: int
    programs: int

    @property
    def name(self) -> str:
        return f"{self.block} tokens, {self.warps} warps, {self.stages} stages, {self.programs} per SM"


TILES = (Tiles(64, 4, 3, 2), Tiles(64, 4, 3, 4), Tiles(128, 4, 2, 2), Tiles(64, 4, 4, 2), Tiles(128, 8, 3, 1))


@triton.jit
def split_kernel(
    q, key, value, lengths, offsets, partial, lse, chunk, splits, factor,
    HEADS: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One chunk of one (sequence, KV head): unnormalised softmax over its tokens, divided by its own sum."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(0)
    pair = tl.program_id(1)
    sequence = pair // HEADS
    length = tl.load(lengths + sequence)
    begin = tl.load(offsets + sequence) * HEADS + (pair % HEADS).to(tl.int64) * length
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    inside = (channel < DIM)[None, :]
    here = (row < RATIO)[:, None]
    queries = tl.load(q + (pair * RATIO + row)[:, None] * DIM + channel[None, :], mask=here & inside, other=0.0)
    first = split * chunk
    last = tl.minimum(first + chunk, length)
    maximum = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(first, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        seen = token < last
        at = (begin + token)[:, None] * DIM + channel[None, :]
        k = tl.load(key + at, mask=seen[:, None] & inside, other=0.0)
        scores = tl.dot(queries, tl.trans(k)) * factor
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        rescale = tl.exp2(maximum - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(value + at, mask=seen[:, None] & inside, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None])
        maximum = higher
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    place = (pair.to(tl.int64) * splits + split) * RATIO + row
    tl.store(partial + place[:, None] * DIM + channel[None, :], out, mask=here & inside)
    tl.store(lse + place, maximum + tl.log2(total), mask=row < RATIO)


@triton.jit
def merge_kernel(
    partial, lse, out, splits, SIZE: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr, BATCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The weighted mean of all chunks: PART of the query heads x channels = SIZE outputs of a (sequence, KV head)."""
    pair = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1) * PART + tl.arange(0, PART)
    real = (item < SIZE)[None, :]
    step = tl.arange(0, BATCH)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    maximum = tl.full([PART], -float("inf"), tl.float32)
    total = tl.zeros([PART], tl.float32)
    result = tl.zeros([PART], tl.float32)
    for first in range(0, splits, BATCH):
        split = first + step
        ok = (split < splits)[:, None] & real
        place = pair * splits + split
        logs = tl.load(lse + place[:, None] * (SIZE // DIM) + (item // DIM)[None, :], mask=ok, other=-float("inf"))
        values = tl.load(partial + place[:, None] * SIZE + item[None, :], mask=ok, other=0.0)
        higher = tl.maximum(maximum, tl.max(logs, 0))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # every chunk so far is empty
        weights = tl.exp2(logs - level[None, :])
        rescale = tl.exp2(maximum - level)
        total = total * rescale + tl.sum(weights, 0)
        result = result * rescale + tl.sum(weights * values, 0)
        maximum = higher
    result = result / tl.where(total > 0, total, 1.0)  # 0 beyond the last item
    tl.store(out + pair * SIZE + item, result.to(out.dtype.element_ty), mask=item < SIZE)


class SplitDecode:
    """16-bit decode over one cache; ``decode(q)`` takes and gives ``[batch, heads, 1, head_dim]``."""

    def __init__(self, cache: Cache16, tiles: Tiles) -> None:
        device = cache.key.device
        self.cache, self.tiles = cache, tiles
        cuda = device.type == "cuda"
        properties = torch.cuda.get_device_properties(device) if cuda else None
        processors = properties.multi_processor_count if properties else 2
        # Hopper and later can start the merge while the chunks still run.
        self.dependent = properties is not None and torch.version.hip is None and properties.major >= 9
        steps = sum(-(-length // tiles.block) for length in cache.lengths) * cache.kv_heads
        self.chunk = max(1, -(-steps // (processors * tiles.programs))) * tiles.block
        longest = max(cache.lengths)
        self.splits = -(-longest // self.chunk)
        # Chunks of equal size: the last one of an even batch would otherwise be short and the others long.
        self.chunk = triton.cdiv(triton.cdiv(longest, tiles.block), self.splits) * tiles.block
        self.splits = -(-longest // self.chunk)
        starts = [sum(cache.lengths[:i]) for i in range(len(cache.lengths))]
        self.lengths = torch.tensor(cache.lengths, dtype=torch.int32, device=device)
        self.offsets = torch.tensor(starts, dtype=torch.int64, device=device)

    def __call__(self, q: Tensor) -> Tensor:
        cache, tiles = self.cache, self.tiles
        batch, heads, _, dim = q.shape
        pairs, ratio = batch * cache.kv_heads, heads // cache.kv_heads
        if ratio > ROWS:
            raise UnsupportedError(f"at most {ROWS} query heads for each KV head")
        partial = q.new_empty(pairs * self.splits * ratio * dim, dtype=torch.float32)
        lse = q.new_empty(pairs * self.splits * ratio, dtype=torch.float32)
        out = torch.empty_like(q)
        launch = {"launch_pdl": True} if self.dependent else {}
        split_kernel[(self.splits, pairs)](
            q, cache.key, cache.value, self.lengths, self.offsets, partial, lse, self.chunk, self.splits,
            dim**-0.5 * LOG2_E, cache.kv_heads, ratio, dim, triton.next_power_of_2(dim), ROWS, tiles.block,
            self.dependent, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        rows = min(128, max(2, triton.next_power_of_2(self.splits)))
        part = max(32, min(512, 4096 // rows))
        merge_kernel[(pairs, triton.cdiv(ratio * dim, part))](
            partial, lse, out, self.splits, ratio * dim, dim, part, rows, self.dependent, num_warps=4, **launch
        )
        return out
