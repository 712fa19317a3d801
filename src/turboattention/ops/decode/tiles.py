"""Sizes that the kernels are compiled for, as readable heuristics; nothing is searched at run time."""

from dataclasses import dataclass

from turboattention.quant.layout import PageLayout


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class GluonTile:
    """What `gluon.decode_kernel` is compiled for; offsets and sizes in 16-bit words unless said otherwise.

    ratio: query heads of a KV head. columns: query heads of a program, padded to 4 or 8 (16 would spill registers;
    programs of the same KV head find its pages in the L2 cache). product_columns: of a matrix product; with 4 heads
    each has two, one for what rounding Q * scale takes away. head_blocks: programs that share a KV head. stages: pages
    in flight and in use. least_pages: of a program. exact_tokens: of a program. resident: programs of a multiprocessor
    at once, each of one warp.
    """

    head_dim: int
    key_bits: int
    value_bits: int
    ratio: int
    columns: int
    product_columns: int
    stages: int
    least_pages: int
    exact_tokens: int
    resident: int
    page_words: int
    key_codes: int
    value_codes: int
    metadata: int  # where it begins; the next offsets count from there
    key_scale: int
    value_scale: int
    key_page_scale: int
    key_page_zero: int
    value_page_scale: int
    refined_codes: int
    refined_bits: int
    refined_channels: int
    refined_index: int  # in bytes, from the start of the page

    @classmethod
    def of(cls, layout: PageLayout, ratio: int) -> "GluonTile":
        """The tile for pages of ``layout``."""
        word = {name: region.offset // 2 for name, region in layout.regions.items()}
        refined = layout.key.refined_channels(layout.head_dim)
        metadata = word["key_scale"]
        return cls(
            head_dim=layout.head_dim,
            key_bits=layout.key.bits,
            value_bits=layout.value.bits,
            ratio=ratio,
            columns=4 if ratio <= 4 else 8,
            product_columns=8,
            stages=3 if layout.key.bits + layout.value.bits <= 4 else 2,  # small pages
            least_pages=2,
            exact_tokens=64,
            resident=8,
            page_words=layout.nbytes // 2,
            key_codes=word["key_codes"],
            value_codes=word["value_codes"],
            metadata=metadata,
            key_scale=0,
            value_scale=word["value_scale"] - metadata,
            key_page_scale=word["key_page_scale"] - metadata,
            key_page_zero=word["key_page_zero"] - metadata,
            value_page_scale=word["value_page_scale"] - metadata,
            refined_codes=word["key_refined_codes"] - metadata if refined else 0,
            refined_bits=layout.key.refined_bits if refined else 0,
            refined_channels=refined,
            refined_index=layout.regions["key_refined_index"].offset if refined else 0,
        )

    @property
    def registers(self) -> int:
        """Registers of a thread that leave room for ``resident`` programs (65,536 a multiprocessor, in steps of 8)."""
        return min(255, 65536 // (32 * self.resident) // 8 * 8)

    @property
    def head_blocks(self) -> int:
        return -(-self.ratio // self.columns)

    @property
    def key_parts(self) -> int:
        """Codes of K in a byte."""
        return 8 // self.key_bits

    @property
    def value_parts(self) -> int:
        """Codes of V in a byte."""
        return 8 // self.value_bits

    @property
    def part_bit(self) -> int:
        """First bit of the part of V inside a row index."""
        return 6 - (self.value_parts.bit_length() - 1)

    @property
    def key_row_words(self) -> int:
        return self.head_dim * self.key_bits // 16

    @property
    def key_words(self) -> int:
        return 64 * self.key_row_words

    @property
    def value_words(self) -> int:
        return self.head_dim * 64 * self.value_bits // 16

    @property
    def refined_columns(self) -> int:
        """Refined channels, padded to whole products."""
        return max(16, power_of_two(self.refined_channels)) if self.refined_channels else 16

    @property
    def metadata_words(self) -> int:
        """Words of metadata, padded; the pieces of the refined codes may reach beyond what the page has."""
        pieces = self.refined_codes + self.refined_columns * 4 * self.refined_bits
        return power_of_two(max(256, self.page_words - self.metadata, pieces))

    @property
    def refined_unit(self) -> float:
        """Brings q * scale of a refined code to the unit of ``q_code * scale``: 2^15 * 2^-24, and 2^-bits."""
        return 2.0 ** (-9 - self.refined_bits)


@dataclass(frozen=True)
class PortableTile:
    """What `portable.attend_kernel` is compiled for; offsets and sizes in bytes.

    rows: (query, query head) pairs of a program. how: ``asm`` or ``words`` read codes as float16 subnormals (16-bit
    words, masks; asm is the same for NVIDIA in one instruction for two codes), ``bytes`` converts each code.
    """

    head_dim: int
    page: int
    rows: int
    exact_tile: int
    stages: int
    num_warps: int
    least_pages: int
    exact_tokens: int
    page_bytes: int
    key_bits: int
    value_bits: int
    key_symmetric: bool
    value_symmetric: bool
    key_how: str
    value_how: str
    key_codes: int
    key_row_bytes: int
    key_page_scale: int
    key_scale: int
    key_page_zero: int
    key_zero: int
    value_codes: int
    value_row_bytes: int
    value_page_scale: int
    value_scale: int
    value_page_zero: int
    value_zero: int
    refined_bits: int
    refined_channels: int
    refined_index: int
    refined_codes: int

    @classmethod
    def of(cls, layout: PageLayout, ratio: int, queries: int, how: str) -> "PortableTile":
        """The tile for pages of ``layout`` and chunks of ``queries``; how: the fastest way that the device allows."""
        offset = {name: region.offset for name, region in layout.regions.items()}
        refined = layout.key.refined_channels(layout.head_dim)
        # NVIDIA's matrix unit takes eight rows of work, AMD's 16; more than 32 rows of a chunk would spill registers.
        # With head_dim 64 and 32 rows Triton 3.6 compiles both products to wgmma and the result is wrong on an H100.
        chunk_rows = 32 if layout.head_dim > 64 else 16
        rows = min(8 if queries == 1 else chunk_rows, power_of_two(ratio * queries))
        rows = max(8 if how == "asm" else 16, rows)
        return cls(
            head_dim=layout.head_dim,
            page=layout.page_size,
            rows=rows,
            exact_tile=16 if rows <= 16 else 64,
            # Codes are copied two pages ahead, and their place in the table is read two pages before that.
            stages=5 if rows <= 16 and how == "asm" else 1,
            num_warps=4 if rows > 16 else 2 if rows > 8 or layout.head_dim > 128 else 1,
            least_pages=2,
            exact_tokens=64 if rows <= 16 else 512,
            page_bytes=layout.nbytes,
            key_bits=layout.key.bits,
            value_bits=layout.value.bits,
            key_symmetric=layout.key.symmetric,
            value_symmetric=layout.value.symmetric,
            key_how="bytes" if layout.key.bits == 3 else how,
            value_how="bytes" if layout.value.bits == 3 else how,
            key_codes=offset["key_codes"],
            key_row_bytes=layout.regions["key_codes"].shape[1],
            key_page_scale=offset["key_page_scale"],
            key_scale=offset["key_scale"],
            key_page_zero=offset.get("key_page_zero", 0),
            key_zero=offset.get("key_zero", 0),
            value_codes=offset["value_codes"],
            value_row_bytes=layout.regions["value_codes"].shape[1],
            value_page_scale=offset["value_page_scale"],
            value_scale=offset["value_scale"],
            value_page_zero=offset.get("value_page_zero", 0),
            value_zero=offset.get("value_zero", 0),
            refined_bits=layout.key.refined_bits if refined else 0,
            refined_channels=refined,
            refined_index=offset.get("key_refined_index", 0),
            refined_codes=offset.get("key_refined_codes", 0),
        )

    @property
    def resident(self) -> int:
        """Programs of a multiprocessor at once: eight warps of about 255 registers a thread fit one."""
        return 8 // self.num_warps

    @property
    def dim_padded(self) -> int:
        return power_of_two(self.head_dim)

    @property
    def key_parts(self) -> int:
        """Codes of K in a byte (of its low bits where there are three)."""
        return 4 if self.key_bits == 3 else 8 // self.key_bits

    @property
    def value_parts(self) -> int:
        return 4 if self.value_bits == 3 else 8 // self.value_bits

    @property
    def key_columns(self) -> int:
        """Channels of one part, padded to whole products."""
        return max(16 // self.key_parts, power_of_two(self.head_dim // self.key_parts))

    @property
    def key_width(self) -> int:
        """Channels of all parts, padded."""
        return self.key_columns * self.key_parts

    @property
    def value_columns(self) -> int:
        """Tokens of one part."""
        return self.page // self.value_parts

    @property
    def refined_columns(self) -> int:
        return max(16, power_of_two(self.refined_channels))
