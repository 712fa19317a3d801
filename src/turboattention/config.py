"""Frozen configuration objects: how K and V are stored, how attention computes, and the presets by name."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from turboattention.errors import invalid
from turboattention.quant.granularity import Granularity, PerChannel, PerGroup, PerToken

BITS = (2, 3, 4, 8, 16)
Metadata = Literal["two_level", "float16", "flashq"]
OpenPageKind = Literal["exact", "int8_clamped"]
SoftmaxKind = Literal["exact", "base2", "sas"]
CHUNK_QUERIES = 64  # of the shortest chunk that `chunk_bits` applies to: one tile of integer matrix units
METADATA, OPEN_PAGES, SOFTMAXES = (get_args(kind) for kind in (Metadata, OpenPageKind, SoftmaxKind))


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``: a typing mistake must not select another behaviour in silence."""
    if value not in choices:
        raise invalid(name, f"one of {', '.join(map(str, choices))}", repr(value))


@dataclass(frozen=True)
class TensorFormat:
    """How K or V of one head is stored in full pages.

    bits: bits of a code; 16 keeps float16 values and ignores the other fields.
    granularity: which values share a scale.
    metadata: ``two_level`` (float16 scales of the page times 8-bit scale and zero), ``float16`` (a float16 scale and
        minimum each, as KIVI), ``flashq`` (arXiv 2412.08585: a symmetric 8-bit tile over 119, then integer scale and
        offset).
    symmetric: codes stand for (code - (2^bits - 1) / 2) * scale, so that no zero is stored.
    rotate: multiply by a Hadamard matrix over the channels first (spreads outliers; for per-token scales).
    search: pick each range by the smallest squared error instead of minimum and maximum.
    refined_share, refined_bits: this share of the channels of each page gets so many more bits, in a plane of their own
        (K, per channel, two-level only). Chosen per page by the expected score error: mean squared query x squared
        step.
    """

    bits: int
    granularity: Granularity = PerChannel()
    metadata: Metadata = "two_level"
    symmetric: bool = False
    rotate: bool = False
    search: bool = False
    refined_share: float = 0.0
    refined_bits: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise invalid("bits", f"one of {', '.join(map(str, BITS))}", self.bits)
        check_choice("metadata", self.metadata, METADATA)
        if self.metadata == "flashq" and (not isinstance(self.granularity, PerChannel) or self.symmetric):
            raise invalid("metadata 'flashq'", "granularity PerChannel and symmetric=False", self.granularity)
        if not 0.0 <= self.refined_share <= 1.0 or self.refined_bits not in (0, 1, 2, 4):
            raise invalid("refinement", "a share from 0 to 1 and 0, 1, 2 or 4 bits", self.refined_bits)
        plain = self.metadata == "two_level" and isinstance(self.granularity, PerChannel)
        if self.refined_bits and (not plain or self.symmetric or self.rotate or self.bits + self.refined_bits > 8):
            raise invalid(
                "refinement",
                "an asymmetric, unrotated two-level format per channel of at most 8 bits in all",
                self.bits,
            )

    @property
    def rotated(self) -> bool:
        """Whether stored values are rotated; 16-bit values are stored as they are."""
        return self.rotate and self.bits < 16

    def refined_channels(self, head_dim: int) -> int:
        """Channels of a page that get more bits."""
        return int(self.refined_share * head_dim) if self.refined_bits else 0


@dataclass(frozen=True)
class CacheConfig:
    """How the key/value cache of a layer is stored.

    key, value: formats of full pages.
    page_size: tokens of a page (one quantisation block).
    sink_tokens: first tokens of a sequence that are also kept exactly and read instead of their codes.
    recent_window: this many most recent tokens stay exact; a page is compressed once all its tokens are older.
    open_page: ``exact`` (the model's dtype, or float16 for a float32 model) or ``int8_clamped`` (the paper's decode
        buffer: INT8 with one universal scale per head, larger values clamped).
    low_priority_heads: share of the KV heads of a layer stored at ``low_bits``, chosen by the paper's priority
        (gap x standard deviation of the channel ranges, lowest first).
    """

    key: TensorFormat
    value: TensorFormat
    page_size: int = 64
    sink_tokens: int = 0
    recent_window: int = 0
    open_page: OpenPageKind = "exact"
    low_priority_heads: float = 0.0
    low_bits: int = 2

    def __post_init__(self) -> None:
        if self.page_size not in (32, 64, 128):
            raise invalid("page_size", "32, 64 or 128 tokens", self.page_size)
        if not 0 <= self.sink_tokens <= self.page_size:
            raise invalid("sink_tokens", f"0 to page_size ({self.page_size})", self.sink_tokens)
        if self.recent_window < 0:
            raise invalid("recent_window", "0 or more tokens", self.recent_window)
        if self.value.refined_bits:
            raise invalid("value", "a format without refined channels (they are for K)", self.value.refined_bits)
        check_choice("open_page", self.open_page, OPEN_PAGES)
        check_choice("low_bits", self.low_bits, BITS)
        if not 0.0 <= self.low_priority_heads <= 1.0:
            raise invalid("low_priority_heads", "a share from 0 to 1", self.low_priority_heads)


@dataclass(frozen=True)
class AttentionConfig:
    """How attention computes over the cache.

    softmax: ``exact``; ``base2`` (polynomial exponential and exact skip of tiles that round to zero); ``sas`` (the
        paper's table, cubic and cut at -6).
    query_bits, probability_bits: 8 rounds Q per tile / P to INT8 as the paper does; 16 keeps them.
    chunk_bits: 8 computes the causal attention of a chunk of at least 64 new tokens over itself with both products in
        INT8, a scale for each block: the INT8 stage of FlashQ (arXiv 2412.08585) with K smoothed by its mean as in
        SageAttention (arXiv 2410.02367) and the channels of Q and K evened out. The tokens before the chunk are read as
        with 16, the default; so is all of attention for shorter chunks and decode. Inference alone; needs the defaults
        of the other fields, and neither soft-capped scores nor float64 fit it.
    """

    softmax: SoftmaxKind = "exact"
    query_bits: Literal[8, 16] = 16
    probability_bits: Literal[8, 16] = 16
    chunk_bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        check_choice("softmax", self.softmax, SOFTMAXES)
        check_choice("query_bits", self.query_bits, (8, 16))
        check_choice("probability_bits", self.probability_bits, (8, 16))
        check_choice("chunk_bits", self.chunk_bits, (8, 16))
        if self.chunk_bits == 8 and not self.plain:
            raise invalid("chunk_bits 8", "softmax 'exact' and 16 bits of Q and P", f"{self.described}")

    @property
    def plain(self) -> bool:
        """Whether attention over the cache is exact but for what the codes of the cache rounded away."""
        return self.softmax == "exact" and self.query_bits == 16 and self.probability_bits == 16

    @property
    def described(self) -> str:
        """The arithmetic over the cache in words."""
        return f"softmax {self.softmax} with Q in {self.query_bits} and P in {self.probability_bits} bits"

    def rounds_chunk(self, queries: int) -> bool:
        """Whether causal attention of ``queries`` new tokens over themselves is computed in INT8."""
        return self.chunk_bits == 8 and queries >= CHUNK_QUERIES


@dataclass(frozen=True)
class Preset:
    """A named configuration: the cache's format and the attention's arithmetic."""

    name: str
    summary: str
    cache: CacheConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)


def _turbo(name: str, summary: str, bits: int, refined_share: float, refined_bits: int) -> Preset:
    # Why these choices: docs/decisions. Searching K's range at 4 bits and above changed nothing.
    key = TensorFormat(bits, PerChannel(), search=bits <= 3, refined_share=refined_share, refined_bits=refined_bits)
    value = TensorFormat(bits, PerToken(), symmetric=True, rotate=True, search=True)
    return Preset(name, summary, CacheConfig(key=key, value=value, sink_tokens=1))


def _paper(name: str, summary: str, low_priority_heads: float) -> Preset:
    stored = TensorFormat(4, PerChannel(), metadata="flashq")
    cache = CacheConfig(key=stored, value=stored, open_page="int8_clamped", low_priority_heads=low_priority_heads)
    return Preset(name, summary, cache, AttentionConfig(softmax="sas", query_bits=8, probability_bits=8))


def _kivi(name: str, summary: str, bits: int) -> Preset:
    key = TensorFormat(bits, PerChannel(), metadata="float16")
    value = TensorFormat(bits, PerGroup(32), metadata="float16")
    return Preset(name, summary, CacheConfig(key=key, value=value, page_size=32, recent_window=128))


_EXACT = TensorFormat(16)
_PRESETS = (
    Preset("fp16", "nothing quantised: the test of the plumbing", CacheConfig(key=_EXACT, value=_EXACT)),
    _turbo("int8", "8-bit K and V", 8, 0.0, 0),
    _turbo("turbo4", "4-bit K and V, one more bit for 3/32 of K's channels (default)", 4, 3 / 32, 1),
    _turbo("turbo3", "3-bit K and V, one more bit for 3/32 of K's channels", 3, 3 / 32, 1),
    _turbo("turbo2", "2-bit K and V, two more bits for 1/4 of K's channels", 2, 1 / 4, 2),
    _paper("paper4", "FlashQ at 4 bits and SAS (arXiv 2412.08585)", 0.0),
    _paper("paper3", "FlashQ with half of the heads at 2 bits, and SAS (arXiv 2412.08585)", 0.5),
    _kivi("kivi4", "KIVI at 4 bits, groups of 32, 128 recent tokens exact (arXiv 2402.02750)", 4),
    _kivi("kivi2", "KIVI at 2 bits, groups of 32, 128 recent tokens exact (arXiv 2402.02750)", 2),
)
DEFAULT_PRESET = "turbo4"


def presets() -> dict[str, Preset]:
    """All presets by name, in the order in which tables show them."""
    return {preset.name: preset for preset in _PRESETS}


def get_preset(name: str) -> Preset:
    """The preset called ``name``; raises InvalidInputError that lists the names."""
    known = presets()
    if name not in known:
        raise invalid("preset", f"one of {', '.join(known)}", repr(name))
    return known[name]


def with_bits(fmt: TensorFormat, bits: int) -> TensorFormat:
    """``fmt`` at another number of bits; more than 8 with the refinement: without it."""
    fits = bits + fmt.refined_bits <= 8
    return replace(
        fmt, bits=bits, refined_bits=fmt.refined_bits if fits else 0, refined_share=fmt.refined_share if fits else 0.0
    )
