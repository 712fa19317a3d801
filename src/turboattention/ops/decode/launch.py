"""From caches to kernels: what a launch of attention over pages needs, without reading anything from the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.paged_kv import PagedKV
from turboattention.ops.decode.tiles import GluonTile, PortableTile, power_of_two
from turboattention.quant.layout import PageLayout

# Queries of one launch: bounds the memory of partial results.
QUERY_BLOCK = 1024
# Few sizes, because each is compiled: a server meets every batch up to its largest.
SMALLEST_BATCH = 64
MERGED_PARTS = (8, 32, 128)


class Group(NamedTuple):
    """KV heads with one page layout: pages in a pool through a table, or (table None) one after the other."""

    layout: PageLayout
    heads: tuple[int, ...]
    pool: Tensor  # uint8, contiguous
    table: Tensor | None
    room: int  # pages between two heads of the pool when there is no table


@dataclass(frozen=True)
class KernelView:
    """The arguments that all kernels share, whichever cache they come from."""

    groups: tuple[Group, ...]
    lengths: Tensor
    page_tokens: Tensor
    starts: Tensor | None
    tail_key: Tensor
    tail_value: Tensor
    sink_key: Tensor | None
    sink_value: Tensor | None
    ring: bool
    tail_rows: Tensor | None = None
    sink_rows: Tensor | None = None

    @classmethod
    def of_paged(cls, kv: PagedKV) -> "KernelView":
        """A view of a paged cache."""
        groups = tuple(Group(g.layout, g.heads, g.pool, g.table, 0) for g in kv.groups)
        return cls(
            groups, kv.lengths, kv.page_tokens, None, kv.tail_key, kv.tail_value, kv.sink_key, kv.sink_value, True,
            kv.tail_rows, kv.sink_rows,
        )  # fmt: skip

    @classmethod
    def of_cached(cls, kv: CachedKV) -> "KernelView":
        """A view of a contiguous cache, whose lengths the host knows."""
        batch, device = kv.tail_key.shape[0], kv.tail_key.device
        groups = tuple(Group(g.layout, g.heads, g.pages.contiguous(), None, g.pages.shape[2]) for g in kv.groups)
        lengths, page_tokens = (
            torch.full((batch,), n, dtype=torch.int32, device=device) for n in (kv.length, kv.page_tokens)
        )
        starts = None if kv.starts is None else kv.starts.to(torch.int32)
        tail = kv.tail_key.contiguous(), kv.tail_value.contiguous()
        return cls(groups, lengths, page_tokens, starts, *tail, kv.sink_key, kv.sink_value, False)


@dataclass(frozen=True)
class Request:
    """What is to be computed; softcap in the units of the scores, window in tokens."""

    scale: float
    causal: bool = True
    softcap: float | None = None
    window: int | None = None


def attend(
    q: Tensor, view: KernelView, request: Request, *, gluon: bool, how: str, blocks: int | None = None,
    split: int | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of ``q`` ``[batch, heads, queries, head_dim]`` (the newest tokens) over ``view``.

    gluon: the Gluon kernel (one query); how: see `tiles.PortableTile`. blocks: programs of a launch, None: eight for
    each multiprocessor. split: pages of a program instead. out: like q, written instead of a new tensor.
    Returns out like q and lse float32 ``[batch, heads, queries]``.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.stride(-1) != 1:
        q = q.contiguous()
    for first in range(0, q.shape[2], QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, q.shape[2])
        part = view
        if last < q.shape[2] and request.causal:
            # These queries are not the newest tokens: the cache ends earlier for them.
            part = replace(view, lengths=view.lengths - (q.shape[2] - last))
        for group in view.groups:
            _launch(
                q[:, :, first:last],
                part,
                group,
                request,
                out[:, :, first:last],
                lse[:, :, first:last],
                gluon,
                how,
                blocks,
                split,
            )
    return out, lse


def _launch(
    q: Tensor, view: KernelView, group: Group, request: Request, out: Tensor, lse: Tensor, gluon: bool, how: str,
    blocks: int | None, split: int | None,
) -> None:  # fmt: skip
    from turboattention.ops.decode.merge import merge_kernel  # needs Triton

    batch, q_heads, queries, dim = q.shape
    ratio = q_heads // view.tail_key.shape[1]
    tile: GluonTile | PortableTile
    if gluon:
        tile = GluonTile.of(group.layout, ratio)
        columns, row_blocks = tile.columns, tile.head_blocks
    else:
        tile = PortableTile.of(group.layout, ratio, queries, how)
        columns, row_blocks = tile.rows, -(-ratio * queries // tile.rows)
    rows = len(group.heads) * row_blocks
    room = group.room if group.table is None else group.table.shape[2]
    if split is None:
        # Programs of pages all run at once.
        blocks = blocks or _multiprocessors(q.device) * tile.resident
        blocks = programs = max(1, min(blocks, room * batch * rows // tile.least_pages))
    else:
        blocks, programs = max(1, -(-room // split)) * batch * rows, -split
    sinks = 0 if view.sink_key is None else view.sink_key.shape[2]
    exact_parts = -(-(view.tail_key.shape[2] + sinks) // tile.exact_tokens)
    grid = blocks + batch * rows * (1 + exact_parts)  # every row has at least one program for its pages
    pdl = _dependent_launch(q.device)
    early = {"launch_pdl": True} if pdl else {}
    heads = heads_tensor(group.heads, q.device)
    part = torch.empty(grid * columns * dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(grid * columns, dtype=torch.float32, device=q.device)
    table = view.lengths if group.table is None else group.table
    starts = view.lengths if view.starts is None else view.starts
    sink_key = view.tail_key if view.sink_key is None else view.sink_key
    sink_value = view.tail_value if view.sink_value is None else view.sink_value
    tail_strides = _strides(view.tail_key, view.tail_value)
    sink_strides = _strides(sink_key, sink_value)
    pointers = (
        table,
        view.lengths,
        view.page_tokens,
        starts,
        heads,
        view.tail_key,
        view.tail_value,
        sink_key,
        sink_value,
        view.tail_rows,
        view.sink_rows if view.sink_key is not None else None,
    )
    table_strides = (0, group.room) if group.table is None else (group.table.stride(0), group.table.stride(1))
    softcap = (request.softcap or 1.0) * math.log2(math.e)
    flags: dict[str, Any] = {
        "BATCH": 1 if batch == 1 else max(SMALLEST_BATCH, power_of_two(batch)),
        "SINKS": sinks,
        "STARTS": view.starts is not None,
        "WINDOW": request.window is not None,
        "PDL": pdl,
    }
    shape = {"PAGED": group.table is not None, "RING": view.ring, "SOFTCAP": request.softcap is not None}
    window = request.window or 0
    scale = request.scale * math.log2(math.e)
    places = (*table_strides, *tail_strides, *sink_strides, view.tail_key.shape[2])
    if gluon:
        from turboattention.ops.decode.gluon import decode_kernel  # needs Triton with Gluon

        assert isinstance(tile, GluonTile)
        decode_kernel[(grid,)](
            q, group.pool.view(torch.int16), *pointers, part, part_lse, q.stride(0), q.stride(1), *places,
            batch, rows, programs, window, softcap, scale, tile, **flags, **shape, num_warps=1, maxnreg=tile.registers,
            **early,
        )  # fmt: skip
    else:
        from turboattention.ops.decode.portable import attend_kernel  # needs Triton

        assert isinstance(tile, PortableTile)
        attend_kernel[(grid,)](
            q, group.pool, *pointers, part, part_lse, q.stride(0), q.stride(1), q.stride(2), *places,
            batch, rows, programs, ratio, queries, window, softcap, scale, tile, **flags, **shape,
            CAUSAL=request.causal, num_warps=tile.num_warps,
        )  # fmt: skip
    parts = next((size for size in MERGED_PARTS if size > blocks // (batch * rows)), MERGED_PARTS[-1])
    merge_kernel[(batch, len(group.heads) * ratio * queries)](
        part, part_lse, out, lse, view.lengths, view.page_tokens, starts, heads, out.stride(0), out.stride(1),
        out.stride(2), lse.stride(0), lse.stride(1), batch, rows, ratio, queries, window, programs,
        COLUMNS=columns, DIM=dim, DIM_PADDED=power_of_two(dim), PARTS=parts, EXACT_PARTS=power_of_two(exact_parts),
        PAGE=group.layout.page_size, EXACT=tile.exact_tokens, LEAST=tile.least_pages,
        ROTATE=(dim & -dim) if group.layout.value.rotated else 0, **flags, num_warps=1 if parts <= 8 else 4, **early,
    )  # fmt: skip


def _strides(key: Tensor, value: Tensor) -> tuple[int, int, int]:
    """Batch, head and token strides that K and V share."""
    if key.stride() != value.stride() or key.stride(3) != 1:
        raise ValueError(f"K and V are stored unlike: strides {key.stride()} and {value.stride()}")
    return key.stride(0), key.stride(1), key.stride(2)


@lru_cache(maxsize=1024)
def heads_tensor(heads: Sequence[int], device: torch.device) -> Tensor:
    """The KV heads of a group on the device; made once, because a copy from the host would stall every step."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


@lru_cache(maxsize=64)
def _dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (NVIDIA, sm_90 and newer)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
