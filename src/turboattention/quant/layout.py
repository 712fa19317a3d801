"""Where every byte of a page is: the only place that knows shapes, offsets and sizes.

A page holds ``page_size`` tokens of K and V of one KV head. Kernels, caches and planners ask this class.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from turboattention.checks import check_head_dim
from turboattention.config import TensorFormat
from turboattention.errors import invalid
from turboattention.quant.granularity import PerBlock, PerChannel, PerGroup, PerToken
from turboattention.quant.packing import packed_bytes

# Pages that kernels read begin at a cache line: at 16 bytes they cost 4 % of the bandwidth of a GPU.
KERNEL_PAGE_ALIGNMENT = 128
PAGE_ALIGNMENT = 16
SINK_REGIONS = ("sink_key", "sink_value")  # 16 bits of any float dtype
REGION_ALIGNMENT = 64  # at most: vector loads, and slices of shared memory


class Region(NamedTuple):
    """A run of bytes inside a page."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def _aligned(offset: int, region: Region) -> int:
    """The next multiple of the largest power of two in the region's size, at most REGION_ALIGNMENT."""
    alignment = min(REGION_ALIGNMENT, region.nbytes & -region.nbytes)
    return -(-offset // alignment) * alignment


def _place(name: str) -> int:
    """Order of the regions: codes, vectors of K, what is small (it fills a gap), vectors of V."""
    if name in ("key_codes", "value_codes"):
        return 0
    if name in ("key_scale", "key_zero", "key_refined_codes"):
        return 1
    return 3 if name in ("value_scale", "value_zero") else 2


@dataclass(frozen=True)
class PageLayout:
    """The layout of one page.

    Order: codes of K, codes of V, scales, zeros and refined codes of K, numbers of the page, scales and zeros of V;
    each aligned to its own size (at most 64 bytes), the page to `alignment`. K codes are ``[tokens, D * bits / 8]``; V
    codes are transposed, ``[D, tokens * bits / 8]``, tokens in the stored order of `packing.permute_tokens`; refined
    codes are ``[channels, tokens * bits / 8]`` with their channels in ``refined_index``.
    sink_tokens: so many exact tokens of 16 bits stand behind all that, for engines whose pages outlive the sequence
    that wrote them; encoding a page does not touch them.
    """

    page_size: int
    head_dim: int
    key: TensorFormat
    value: TensorFormat
    sink_tokens: int = 0

    def __hash__(self) -> int:  # caches of kernels ask at every call
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.page_size, self.head_dim, self.key, self.value, self.sink_tokens))

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        for name, fmt in (("key", self.key), ("value", self.value)):
            if isinstance(fmt.granularity, PerGroup) and self.head_dim % fmt.granularity.size:
                raise invalid(f"{name} group size", f"a divisor of head_dim {self.head_dim}", fmt.granularity.size)

    def scale_shape(self, fmt: TensorFormat) -> tuple[int, int]:
        """Scales of a page as ``[token scales, channel scales]``, broadcastable to ``[tokens, channels]``."""
        match fmt.granularity:
            case PerToken():
                return self.page_size, 1
            case PerChannel():
                return 1, self.head_dim
            case PerGroup(size):
                return self.page_size, self.head_dim // size
            case PerBlock():
                return 1, 1

    @cached_property
    def regions(self) -> dict[str, Region]:
        """All regions by name: ``key_codes``, ``value_codes``, ``key_page_scale``, ``key_scale``, ..."""
        wanted: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for side, fmt in (("key", self.key), ("value", self.value)):
            wanted += [(f"{side}_{name}", shape, dtype) for name, shape, dtype in self._fields(side, fmt)]
        regions, end = {}, 0
        for name, shape, dtype in sorted(wanted, key=lambda field: _place(field[0])):
            start = _aligned(end, Region(0, shape, dtype))
            regions[name] = Region(start, shape, dtype)
            end = start + regions[name].nbytes
        if self.sink_tokens:
            start = -(-end // REGION_ALIGNMENT) * REGION_ALIGNMENT
            for name in SINK_REGIONS:
                regions[name] = Region(start, (self.sink_tokens, self.head_dim), torch.float16)
                start += regions[name].nbytes
        return regions

    def _fields(self, side: str, fmt: TensorFormat) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        tokens, channels = self.page_size, self.head_dim
        if fmt.bits == 16:
            return [("codes", (tokens, channels), torch.float16)]
        rows, columns = (tokens, channels) if side == "key" else (channels, tokens)
        fields: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("codes", (rows, packed_bytes(columns, fmt.bits)), torch.uint8)
        ]
        a, b = self.scale_shape(fmt)
        if fmt.metadata == "float16":
            fields += [("scale", (a * b,), torch.float16)]
            fields += [] if fmt.symmetric else [("zero", (a * b,), torch.float16)]
            return fields
        fields += [("page_scale", (1,), torch.float16), ("scale", (a * b,), torch.uint8)]
        if not fmt.symmetric:
            # FlashQ's offset is in units of the page scale; ours has a float16 number of its own.
            fields += [] if fmt.metadata == "flashq" else [("page_zero", (1,), torch.float16)]
            fields += [("zero", (a * b,), torch.int8)]
        if refined := fmt.refined_channels(channels):
            fields += [("refined_index", (refined,), torch.uint8)]
            fields += [("refined_codes", (refined, packed_bytes(tokens, fmt.refined_bits)), torch.uint8)]
        return fields

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a page, metadata and padding included."""
        end = max(region.offset + region.nbytes for region in self.regions.values())
        return -(-end // self.alignment) * self.alignment

    @property
    def alignment(self) -> int:
        """Bytes that a page is a multiple of."""
        read_by_kernels = all(fmt.bits < 16 and fmt.metadata == "two_level" for fmt in (self.key, self.value))
        return KERNEL_PAGE_ALIGNMENT if read_by_kernels else PAGE_ALIGNMENT

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Runs of bytes (start, end) of a page that belong to no region; they are zero."""
        gaps, end = [], 0
        for region in sorted(self.regions.values(), key=lambda region: region.offset):
            gaps += [(end, region.offset)] if region.offset > end else []
            end = region.offset + region.nbytes
        return (*gaps, (end, self.nbytes)) if self.nbytes > end else tuple(gaps)

    @property
    def num_values(self) -> int:
        """Values of K and V that a page stands for."""
        return 2 * self.page_size * self.head_dim

    @property
    def bits_per_value(self) -> float:
        """Bits per value of a full page, every byte counted."""
        return self.nbytes * 8 / self.num_values

    def read(self, pages: Tensor, name: str) -> Tensor:
        """Region ``name`` of uint8 ``pages`` ``[..., nbytes]`` as ``[..., *shape]`` of its dtype."""
        region = self.regions[name]
        part = pages[..., region.offset : region.offset + region.nbytes]
        if region.dtype != torch.uint8:
            part = part.contiguous().view(region.dtype)
        values: Tensor = part.unflatten(-1, region.shape)
        return values

    def write(self, pages: Tensor, name: str, values: Tensor) -> None:
        """Store ``values`` ``[..., *shape]`` into region ``name`` of ``pages``."""
        region = self.regions[name]
        data = values.to(region.dtype).flatten(-len(region.shape)).contiguous().view(torch.uint8)
        pages[..., region.offset : region.offset + region.nbytes] = data
