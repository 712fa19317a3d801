"""What a kernel must know of a page at compile time: numbers taken from `PageLayout`, nothing else."""

from dataclasses import dataclass
from functools import lru_cache

from turboattention.config import TensorFormat
from turboattention.quant.granularity import PerChannel, PerToken
from turboattention.quant.layout import SINK_REGIONS, PageLayout

# Runs of neighbouring channels (tokens) that share bytes: see quant.packing.
PARTS = {8: 1, 4: 2, 3: 8, 2: 4}
ABSENT = -1  # offset of a region that the format does not have


@dataclass(frozen=True)
class PageSpec:
    """Formats and byte offsets of a page, hashable: a compile-time constant of the kernels.

    key_width: channels of a run of K, rounded up to a power of two (head_dim 80 and 96 leave gaps between the runs).
    value_width: channels of V, rounded up to a power of two. rotation: width of a Hadamard block; 1 without rotation.
    gap_starts, gap_ends: bytes of no region. The other numbers are offsets of the regions with the same names.
    """

    page_size: int
    head_dim: int
    nbytes: int
    gap_starts: tuple[int, ...]
    gap_ends: tuple[int, ...]
    key_bits: int
    key_search: bool
    key_parts: int
    key_width: int
    refined: int
    refined_bits: int
    value_bits: int
    value_search: bool
    value_symmetric: bool
    value_parts: int
    value_width: int
    rotation: int
    key_codes: int
    key_page_scale: int
    key_scale: int
    key_page_zero: int
    key_zero: int
    key_refined_index: int
    key_refined_codes: int
    value_codes: int
    value_page_scale: int
    value_scale: int
    value_page_zero: int
    value_zero: int

    @property
    def num_warps(self) -> int:
        """Warps of a program: 64 values of a tile for each thread.

        A thread takes 255 registers then without spills in a loop, so that a multiprocessor holds two programs of
        head_dim 128; eight warps of 32 values each need as many, and only one program fits.
        """
        width = max(self.key_parts * self.key_width, self.value_width)
        return max(4, min(16, self.page_size * width // (32 * 64)))


def supports(layout: PageLayout) -> str | None:
    """None when the kernels can write pages of this layout, or the reason why not."""
    for side, fmt, granularity in (("key", layout.key, PerChannel), ("value", layout.value, PerToken)):
        if reason := _unsupported(fmt, granularity):
            return f"{side}: {reason}"
    if layout.key.symmetric or layout.key.rotate:
        return "key: the append kernel stores K asymmetric and unrotated"
    return None


def _unsupported(fmt: TensorFormat, granularity: type) -> str | None:
    if fmt.bits == 16:
        return "the append kernel stores 8, 4, 3 or 2 bits, not 16"
    if fmt.metadata != "two_level":
        return f"the append kernel writes two-level metadata, not {fmt.metadata}"
    if not isinstance(fmt.granularity, granularity):
        return f"the append kernel needs scales {granularity.__name__}, not {fmt.granularity}"
    return None


@lru_cache(maxsize=256)
def page_spec(layout: PageLayout) -> PageSpec:
    """The numbers of ``layout``, which `supports` must have accepted."""
    key, value, regions = layout.key, layout.value, layout.regions
    names = ("codes", "page_scale", "scale", "page_zero", "zero")
    offsets = {f"{side}_{name}": ABSENT for side in ("key", "value") for name in names}
    offsets |= {"key_refined_index": ABSENT, "key_refined_codes": ABSENT}
    offsets |= {name: region.offset for name, region in regions.items() if name not in SINK_REGIONS}
    refined = key.refined_channels(layout.head_dim)
    return PageSpec(
        page_size=layout.page_size,
        head_dim=layout.head_dim,
        nbytes=layout.nbytes,
        gap_starts=tuple(start for start, _ in layout.gaps),
        gap_ends=tuple(end for _, end in layout.gaps),
        key_bits=key.bits,
        key_search=key.search,
        key_parts=PARTS[key.bits],
        key_width=_power_of_two(layout.head_dim // PARTS[key.bits]),
        refined=refined,
        refined_bits=key.refined_bits if refined else 0,
        value_bits=value.bits,
        value_search=value.search,
        value_symmetric=value.symmetric,
        value_parts=PARTS[value.bits],
        value_width=_power_of_two(layout.head_dim),
        rotation=layout.head_dim & -layout.head_dim if value.rotated else 1,
        **offsets,
    )


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
