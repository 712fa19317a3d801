"""Refined channels of K: which are chosen, where their bits are, what they stand for, and what is refused."""

import pytest
import torch
from torch import Tensor

from turboattention.config import CacheConfig, TensorFormat, presets, with_bits
from turboattention.errors import InvalidInputError
from turboattention.ops.append import add_query_power, compress_pages
from turboattention.ops.common.folded import fold_scores
from turboattention.quant.affine import quantize
from turboattention.quant.codec import Side, decode_pages, encode_pages, expand_pages
from turboattention.quant.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerToken
from turboattention.quant.layout import PageLayout

EXACT = TensorFormat(16)
# All pairs of bits that a format may have.
PAIRS = [(bits, extra) for bits in (2, 3, 4) for extra in (1, 2, 4)]
REFINED_PRESETS = ("turbo4", "turbo3", "turbo2")


def layout_of(
    bits: int, extra: int, share: float, *, dim: int = 64, page_size: int = 64, search: bool = False
) -> PageLayout:
    key = TensorFormat(bits, search=search, refined_share=share, refined_bits=extra)
    return PageLayout(page_size, dim, key, EXACT)


def encode_key(
    layout: PageLayout, key: Tensor, query_power: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    return encode_pages(layout, key, torch.zeros_like(key), valid, query_power=query_power)


def chosen(layout: PageLayout, key: Tensor, query_power: Tensor | None = None) -> list[int]:
    return layout.read(encode_key(layout, key, query_power), "key_refined_index").tolist()


def ranges_of(widths: Tensor, tokens: int = 64) -> Tensor:
    """K whose channel c goes from -widths[c] / 2 to widths[c] / 2."""
    return torch.linspace(-0.5, 0.5, tokens)[:, None] * widths


def fine_codes(layout: PageLayout, side: Side) -> Tensor:
    """``code << extra | low`` of the refined channels ``[tokens, refined]``."""
    assert side.refinement is not None
    upper = side.codes[:, side.refinement.channels].int()
    return upper << layout.key.refined_bits | side.refinement.codes.T.int()


# --- choice ---


def test_widest_channels_are_chosen_without_queries():
    widths = torch.ones(64)
    widths[[61, 3, 17, 40]] = torch.tensor([9.0, 2.0, 5.0, 3.0])
    assert chosen(layout_of(4, 1, 4 / 64), ranges_of(widths)) == [3, 17, 40, 61]
    assert chosen(layout_of(4, 1, 2 / 64), ranges_of(widths)) == [17, 61]


def test_query_power_weighs_the_squared_step():
    """Widths 4, 3, 2, 1 and powers 1, 2, 3, 20: harm 16, 18, 12, 20. The plain product of both would put 2 before 0."""
    widths, power = torch.full((64,), 0.1), torch.ones(64)
    widths[[10, 20, 30, 40]] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    power[[10, 20, 30, 40]] = torch.tensor([1.0, 2.0, 3.0, 20.0])
    key = ranges_of(widths)
    assert chosen(layout_of(4, 1, 1 / 64), key, power) == [40]
    assert chosen(layout_of(4, 1, 2 / 64), key, power) == [20, 40]
    assert chosen(layout_of(4, 1, 3 / 64), key, power) == [10, 20, 40]
    assert chosen(layout_of(4, 1, 3 / 64), key) == [10, 20, 30]


@pytest.mark.parametrize("bits", (4, 3, 2))
def test_choice_against_a_sort(bits: int):
    layout = layout_of(bits, 1, 5 / 64)
    key = torch.randn(64, 64) * torch.rand(64)
    power = torch.rand(64) ** 4
    step = (key.amax(0) - key.amin(0)) / (2**bits - 1)
    harm = (power * step**2).tolist()
    assert chosen(layout, key, power) == sorted(sorted(range(64), key=lambda c: (-harm[c], c))[:5])


def test_ties_go_to_the_lowest_channels():
    layout = layout_of(4, 1, 3 / 64)
    key = ranges_of(torch.ones(64))
    assert chosen(layout, key) == [0, 1, 2]
    assert chosen(layout, key, torch.zeros(64)) == [0, 1, 2]
    power = torch.ones(64)
    power[[50, 20, 33, 41]] = 2.0
    assert chosen(layout, key, power) == [20, 33, 41]
    power[63] = 7.0
    assert chosen(layout, key, power) == [20, 33, 63]


def test_unit_of_the_query_power_does_not_matter():
    layout = layout_of(4, 1, 1 / 4)
    key, power = torch.randn(64, 64), torch.rand(64)
    assert torch.equal(encode_key(layout, key, power), encode_key(layout, key, power * 2.0**20))


def test_each_head_and_page_chooses_for_itself():
    """Two rows, three heads, four pages in one call have the bytes of one page at a time."""
    layout = layout_of(3, 1, 1 / 8)
    key = torch.randn(2, 3, 4, 64, 64) * torch.rand(2, 3, 4, 1, 64)
    power = torch.rand(2, 3, 64)
    together = compress_pages(layout, key.flatten(2, 3), torch.zeros_like(key).flatten(2, 3), query_power=power)
    assert together.shape == (2, 3, 4, layout.nbytes)
    choices = set()
    for b in range(2):
        for h in range(3):
            for p in range(4):
                alone = encode_key(layout, key[b, h, p], power[b, h])
                assert torch.equal(together[b, h, p], alone)
                choices.add(tuple(layout.read(alone, "key_refined_index").tolist()))
    assert len(choices) == 24


def test_invalid_tokens_do_not_choose():
    layout = layout_of(4, 1, 1 / 64)
    widths = torch.ones(64)
    widths[12] = 2.0
    key = ranges_of(widths)
    key[0, 30] = 1000.0
    valid = torch.ones(64, dtype=torch.bool)
    valid[0] = False
    pages = encode_key(layout, key, valid=valid)
    assert layout.read(pages, "key_refined_index").tolist() == [12]
    assert chosen(layout, key) == [30]


# --- bytes ---


def test_small_page_by_hand():
    """32 tokens at 2 bits; channel 5 counts 0 .. 7 and gets one more bit, the others count 0, 2, 4, 6: all steps are 2.

    Channel 5 has the widest coarse step (7 / 3). Its finer step is 1, kept as 2 in units of the upper plane.
    """
    layout = layout_of(2, 1, 1 / 64, page_size=32)
    token = torch.arange(32)
    key = (2 * (token % 4))[:, None].repeat(1, 64)
    key[:, 5] = token % 8
    pages = encode_key(layout, key.float())
    assert layout.read(pages, "key_refined_index").tolist() == [5]
    assert layout.read(pages, "key_page_scale").tolist() == [2.0]
    assert layout.read(pages, "key_scale").tolist() == [255] * 64
    assert layout.read(pages, "key_zero").tolist() == [0] * 64
    # Token i + 4 k is in bit k of byte i, and the lower bit of a token is its parity.
    assert layout.read(pages, "key_refined_codes").tolist() == [[0x00, 0xFF, 0x00, 0xFF]]
    codes = layout.read(pages, "key_codes").tolist()
    for t in range(32):
        # Byte 5 holds channels 5, 21, 37 and 53, from its lowest bits upwards.
        row = [0b01010101 * (t % 4)] * 16
        row[5] = 0b01010100 * (t % 4) + (t % 8) // 2
        assert codes[t] == row
    assert torch.equal(expand_pages(layout, pages)[0], key.float())


@pytest.mark.parametrize(
    ("name", "dim", "codes", "plane_at", "index_at"),
    [
        # K and V codes, scales and zeros of K, the plane; then two float16 of K, then the numbers of the channels
        ("turbo4", 64, (6, 8), 2048 + 2048 + 128, 48 + 4),
        ("turbo4", 128, (12, 8), 4096 + 4096 + 256, 96 + 4),
        ("turbo3", 64, (6, 8), 1536 + 1536 + 128, 48 + 4),
        # 9 numbers may begin anywhere
        ("turbo3", 96, (9, 8), 2304 + 2304 + 192, 72 + 4),
        # 16, 32 and 64 numbers begin at a multiple of 16, 32 and 64: 2436 + 12, 4868 + 28, 9732 + 60
        ("turbo2", 64, (16, 16), 1024 + 1024 + 128, 256 + 4 + 12),
        ("turbo2", 128, (32, 16), 2048 + 2048 + 256, 512 + 4 + 28),
        ("turbo2", 256, (64, 16), 4096 + 4096 + 512, 1024 + 4 + 60),
        # a plane of 320 bytes begins at a multiple of 64: 2720 + 32
        ("turbo2", 80, (20, 16), 1280 + 1280 + 160 + 32, 320 + 4),
    ],
)
def test_regions_by_hand(name: str, dim: int, codes: tuple[int, int], plane_at: int, index_at: int):
    """index_at: bytes from the plane to the numbers of its channels."""
    cache = presets()[name].cache
    layout = PageLayout(cache.page_size, dim, cache.key, cache.value)
    plane, numbers = layout.regions["key_refined_codes"], layout.regions["key_refined_index"]
    index = plane_at + index_at
    assert (plane.offset, *plane.shape) == (plane_at, *codes)
    assert (numbers.offset, *numbers.shape) == (index, codes[0])
    assert plane.dtype == numbers.dtype == torch.uint8
    # The bytes are there, and a reader finds them without the layout.
    key, value = torch.randn(64, dim), torch.randn(64, dim)
    page = encode_pages(layout, key, value).tolist()
    refinement = decode_pages(layout, encode_pages(layout, key, value)).key.refinement
    assert refinement is not None
    assert page[index : index + codes[0]] == refinement.channels.tolist()
    rows, width = codes
    bits = cache.key.refined_bits
    for row in range(rows):
        for t in range(64):
            byte = page[plane_at + row * width + t % width]
            assert byte >> bits * (t // width) & 2**bits - 1 == refinement.codes[row, t]


def test_highest_channel_fits_its_byte():
    layout = layout_of(4, 1, 2 / 256, dim=256)
    widths = torch.ones(256)
    widths[[128, 255]] = 2.0
    key = ranges_of(widths)
    assert chosen(layout, key) == [128, 255]
    decoded = decode_pages(layout, encode_key(layout, key)).key
    assert ((decoded.expand() - key).abs()[:, [128, 255]] <= 2 / 31 / 2 * 1.05).all()


@pytest.mark.parametrize("name", [n for n in presets() if n not in REFINED_PRESETS])
def test_other_presets_have_no_refinement(name: str):
    cache = presets()[name].cache
    layout = PageLayout(cache.page_size, 64, cache.key, cache.value)
    assert not [region for region in layout.regions if "refined" in region]
    x = torch.randn(cache.page_size, 64)
    pages = encode_pages(layout, x, x, query_power=torch.rand(64))
    assert torch.equal(pages, encode_pages(layout, x, x))
    assert decode_pages(layout, pages).key.refinement is None


@pytest.mark.parametrize(("name", "counts"), [("turbo4", (6, 7, 9, 12, 24)), ("turbo2", (16, 20, 24, 32, 64))])
def test_number_of_refined_channels(name: str, counts: tuple[int, ...]):
    fmt = presets()[name].cache.key
    assert tuple(fmt.refined_channels(dim) for dim in (64, 80, 96, 128, 256)) == counts


def test_no_channels_or_no_bits_is_the_plain_format():
    plain = PageLayout(64, 64, TensorFormat(4), EXACT)
    key = torch.randn(64, 64)
    for share, extra in ((0.0, 1), (1 / 4, 0), (1 / 65, 1)):
        layout = layout_of(4, extra, share)
        assert layout.regions == plain.regions
        assert torch.equal(encode_key(layout, key), encode_key(plain, key))


# --- values ---


@pytest.mark.parametrize("search", (False, True))
@pytest.mark.parametrize(("bits", "extra"), PAIRS)
def test_both_planes_are_the_finer_code(bits: int, extra: int, search: bool):
    """All channels refined: ``code << extra | low`` is round((x - zero) / fine step), clamped to the finer grid."""
    layout = layout_of(bits, extra, 1.0, search=search)
    key = torch.randn(64, 64) + torch.randn(64)
    side = decode_pages(layout, encode_key(layout, key)).key
    step = side.scale.squeeze(-2) / 2**extra
    zero = side.zero.squeeze(-2)
    expected = ((key - zero) / step).round().clamp(0, 2 ** (bits + extra) - 1)
    fine = fine_codes(layout, side)
    assert torch.equal(fine, expected.int())
    torch.testing.assert_close(side.expand(), fine * step + zero, rtol=1e-6, atol=1e-6)
    # The whole finer range is in use, or else the page would be a coarser one in disguise.
    assert fine.amax() == 2 ** (bits + extra) - 1
    assert fine.amin() == 0


@pytest.mark.parametrize("search", (False, True))
@pytest.mark.parametrize(("bits", "extra"), PAIRS)
def test_refined_channels_have_the_grid_of_the_finer_format(bits: int, extra: int, search: bool):
    """Its range too, searched at the finer bits; only the rounding of scales and zeros is the page's."""
    layout, key = layout_of(bits, extra, 1.0, search=search), torch.randn(64, 64)
    pages = encode_key(layout, key)
    side, finer = decode_pages(layout, pages).key, quantize(key, bits + extra, PerChannel(), search=search)
    # Stored scales are multiples of page scale / 255, zeros of page zero / 127.
    page_scale, page_zero = (layout.read(pages, f"key_page_{name}").float() for name in ("scale", "zero"))
    assert ((side.scale / 2**extra - finer.scale).abs() <= page_scale / 510 / 2**extra * 1.001).all()
    assert ((side.zero - finer.zero).abs() <= page_zero / 254 * 1.001).all()


@pytest.mark.parametrize("search", (False, True))
@pytest.mark.parametrize(("bits", "extra"), PAIRS)
def test_value_within_half_a_step(bits: int, extra: int, search: bool):
    """Of its own grid: fine in refined channels, coarse in the others. End codes stand for all that is beyond."""
    layout = layout_of(bits, extra, 1 / 4, search=search)
    key, power = torch.randn(64, 64) * (0.2 + torch.rand(64)), torch.rand(64)
    side = decode_pages(layout, encode_key(layout, key, power)).key
    assert side.refinement is not None
    refined = torch.zeros(64, dtype=torch.bool)
    refined[side.refinement.channels] = True
    step = torch.where(refined, side.scale.squeeze(-2) / 2**extra, side.scale.squeeze(-2))
    codes, top = side.codes.int(), torch.where(refined, 2 ** (bits + extra) - 1, 2**bits - 1)
    codes[:, refined] = fine_codes(layout, side)
    zero = side.zero.squeeze(-2)
    distance, error = (key - zero) / step, (side.expand() - key).abs()
    within = (distance >= -0.5) & (distance <= top + 0.5)
    assert ((error <= step * 0.5001 + 1e-6) | ~within).all()
    assert (codes[distance < 0] == 0).all()
    assert (codes == top)[distance > top].all()
    if not search:  # nothing is cut on purpose: only the rounding of the metadata leaves values outside
        assert within[:, refined].float().mean() > 0.85
        assert within[:, ~refined].float().mean() > 0.95


@pytest.mark.parametrize("name", REFINED_PRESETS)
def test_plain_channels_keep_their_codes(name: str):
    """Refinement changes no code of the other channels when the numbers of the page (its largest scale) stay."""
    fmt = presets()[name].cache.key
    plain = TensorFormat(fmt.bits, search=fmt.search)
    widths = torch.rand(64) + 0.5
    widths[7], power = 4.0, torch.rand(64) + 1.0
    power[7] = 0.0  # the widest channel sets the page scale and stays plain
    key = torch.randn(64, 64) * widths
    layout = PageLayout(64, 64, fmt, EXACT)
    one = decode_pages(layout, encode_key(layout, key, power)).key
    other_layout = PageLayout(64, 64, plain, EXACT)
    other = decode_pages(other_layout, encode_key(other_layout, key)).key
    assert one.refinement is not None
    assert 7 not in one.refinement.channels
    rest = [c for c in range(64) if c not in one.refinement.channels]
    assert torch.equal(one.scale[..., rest], other.scale[..., rest])
    assert torch.equal(one.codes[:, rest], other.codes[:, rest])
    errors = [(side.expand() - key).square().mean(0)[one.refinement.channels] for side in (one, other)]
    assert (errors[0] < errors[1]).all()


@pytest.mark.parametrize("constant", (0.0, 1.0, -3.0))
def test_constant_channels_can_be_refined(constant: float):
    layout = layout_of(2, 2, 1 / 4)
    key = torch.full((64, 64), constant)
    torch.testing.assert_close(expand_pages(layout, encode_key(layout, key))[0], key, rtol=5e-3, atol=0)


# --- scores ---


def expanded(side: Side) -> Tensor:
    """K in float64 ``[..., tokens, channels]`` from a loop over the refined channels."""
    codes = side.codes.double()
    assert side.refinement is not None
    for index in torch.cartesian_prod(*map(torch.arange, side.refinement.channels.shape)).tolist():
        *page, row = index
        channel = side.refinement.channels[(*page, row)]
        codes[(*page, slice(None), channel)] += side.refinement.unit * side.refinement.codes[(*page, row)].double()
    return codes * side.scale.double() + side.zero.double()


@pytest.mark.parametrize("share", (1 / 16, 1 / 4, 1.0))
@pytest.mark.parametrize(("bits", "extra"), PAIRS)
def test_folded_scores_are_expanded_scores(bits: int, extra: int, share: float):
    layout = layout_of(bits, extra, share, dim=80, search=True)
    key, power = torch.randn(2, 3, 64, 80) + 2, torch.rand(2, 3, 80)
    side = decode_pages(layout, encode_key(layout, key, power)).key
    values = expanded(side)
    q = torch.randn(2, 3, 5, 80, dtype=torch.float64)
    torch.testing.assert_close(fold_scores(q, side), q @ values.transpose(-2, -1), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(side.expand(), values.float(), rtol=1e-6, atol=1e-6)


def test_folded_scores_of_queries_for_several_pages():
    """Queries ``[..., 1, rows, channels]`` meet the pages of their head."""
    layout = layout_of(4, 1, 1 / 8)
    side = decode_pages(layout, encode_key(layout, torch.randn(2, 3, 4, 64, 64), torch.rand(2, 3, 1, 64))).key
    q = torch.randn(2, 3, 1, 5, 64, dtype=torch.float64)
    scores = q @ expanded(side).transpose(-2, -1)
    torch.testing.assert_close(fold_scores(q, side), scores, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", REFINED_PRESETS)
def test_scores_improve_where_queries_concentrate(name: str):
    """Four channels carry most of q: refined by query power beats plain, and beats refined by step alone."""
    fmt = presets()[name].cache.key
    strong = torch.tensor([3, 20, 41, 63])
    size = torch.ones(64)
    size[strong] = 8.0
    key, q = torch.randn(8, 64, 64), torch.randn(8, 32, 64) * size
    power = q.square().sum(-2)
    exact = q @ key.transpose(-2, -1)

    def error(key_format: TensorFormat, query_power: Tensor | None) -> float:
        layout = PageLayout(64, 64, key_format, EXACT)
        restored = expand_pages(layout, encode_key(layout, key, query_power))[0]
        return float((q @ restored.transpose(-2, -1) - exact).square().mean())

    plain, blind, aware = error(TensorFormat(fmt.bits, search=fmt.search), None), error(fmt, None), error(fmt, power)
    # One more bit is a quarter of the squared error in the four channels that make 256 of 316 parts of it.
    assert aware < 0.5 * plain
    assert aware < 0.6 * blind
    layout = PageLayout(64, 64, fmt, EXACT)
    index = layout.read(encode_key(layout, key, power), "key_refined_index")
    assert all(set(strong.tolist()) <= set(page.tolist()) for page in index)


# --- formats ---


@pytest.mark.parametrize("name", REFINED_PRESETS)
@pytest.mark.parametrize("bits", (2, 3, 4, 8, 16))
def test_with_bits_keeps_the_refinement_that_fits(name: str, bits: int):
    fmt = presets()[name].cache.key
    got = with_bits(fmt, bits)
    assert got.bits == bits
    kept = (fmt.refined_share, fmt.refined_bits) if bits < 8 else (0.0, 0)
    assert (got.refined_share, got.refined_bits) == kept
    assert (got.granularity, got.metadata, got.search) == (fmt.granularity, fmt.metadata, fmt.search)


def test_with_bits_at_the_limit():
    wide = TensorFormat(2, refined_share=1 / 4, refined_bits=4)
    assert with_bits(wide, 4) == TensorFormat(4, refined_share=1 / 4, refined_bits=4)
    assert with_bits(wide, 8) == TensorFormat(8)
    # Channels without bits are left as they are.
    assert with_bits(TensorFormat(4, refined_share=1 / 4), 8) == TensorFormat(8, refined_share=1 / 4)


@pytest.mark.parametrize("granularity", (PerToken(), PerGroup(32), PerBlock()), ids=repr)
def test_refinement_is_per_channel(granularity: Granularity):
    with pytest.raises(InvalidInputError, match="refinement: expected an asymmetric, unrotated two-level format per"):
        TensorFormat(4, granularity, refined_share=1 / 4, refined_bits=1)


@pytest.mark.parametrize(
    "options",
    (
        {"symmetric": True},
        {"rotate": True},
        {"metadata": "flashq"},
        {"metadata": "float16"},
        {"bits": 8},
        {"bits": 16},
    ),
    ids=str,
)
@pytest.mark.parametrize("extra", (1, 2, 4))
def test_refused_with(options: dict[str, object], extra: int):
    arguments = {"bits": 4, "granularity": PerChannel(), "refined_share": 1 / 4, "refined_bits": extra}
    with pytest.raises(InvalidInputError, match="refinement: expected an asymmetric, unrotated two-level format per"):
        TensorFormat(**{**arguments, **options})


@pytest.mark.parametrize(
    ("share", "extra"), [(1 / 4, 3), (1 / 4, 5), (1 / 4, -1), (1.01, 1), (-0.1, 1), (torch.nan, 1)]
)
def test_refused_numbers(share: float, extra: int):
    with pytest.raises(InvalidInputError, match="refinement: expected a share from 0 to 1 and 0, 1, 2 or 4 bits"):
        TensorFormat(2, refined_share=share, refined_bits=extra)


def test_value_cannot_be_refined():
    """The plane is K's alone: the product with V reads the upper codes only and would be wrong without a sign."""
    refined = TensorFormat(4, refined_share=1 / 4, refined_bits=1)

    def build() -> PageLayout:
        cache = CacheConfig(key=refined, value=refined)
        return PageLayout(cache.page_size, 64, cache.key, cache.value)

    with pytest.raises(InvalidInputError):
        build()


# --- query power ---


def power_by_loop(q: Tensor, kv_heads: int, real: Tensor | None) -> Tensor:
    batch, heads, tokens, dim = q.shape
    power = torch.zeros(batch, kv_heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                if real is None or real[b, t]:
                    power[b, h // (heads // kv_heads)] += q[b, h, t].double() ** 2
    return power


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
def test_query_power_against_loop(heads: int, kv_heads: int, padded: bool, dtype: torch.dtype):
    q = (torch.randn(3, heads, 7, 16) * 100).to(dtype)
    real = torch.arange(7) >= torch.tensor([0, 3, 7])[:, None] if padded else None
    got = add_query_power(None, q, kv_heads, real)
    assert got.dtype == torch.float32
    assert got.shape == (3, kv_heads, 16)
    torch.testing.assert_close(got.double(), power_by_loop(q, kv_heads, real), rtol=1e-5, atol=0)
    if padded:
        assert not got[2].any()


def test_query_power_adds_up():
    """In two steps, or one; what was there before is not changed in place."""
    q = torch.randn(2, 4, 9, 16)
    real = torch.arange(9) >= torch.tensor([2, 0])[:, None]
    first = add_query_power(None, q[:, :, :4], 2, real[:, :4])
    before = first.clone()
    both = add_query_power(first, q[:, :, 4:], 2, real[:, 4:])
    assert torch.equal(first, before)
    torch.testing.assert_close(both, add_query_power(None, q, 2, real), rtol=1e-5, atol=0)
    torch.testing.assert_close(both.double(), power_by_loop(q, 2, real), rtol=1e-5, atol=0)


def test_large_float16_queries_do_not_overflow():
    q = torch.full((1, 1, 2, 16), 60000.0, dtype=torch.float16)
    assert (add_query_power(None, q, 1, None) == 2 * 60000.0**2).all()


def test_query_power_groups_heads_as_attention_does():
    """Query heads 2 i and 2 i + 1 read KV head i."""
    q = torch.zeros(1, 4, 1, 16)
    q[0, 1, 0, 3], q[0, 2, 0, 5] = 2.0, 3.0
    power = add_query_power(None, q, 2, None)
    assert power.nonzero().tolist() == [[0, 0, 3], [0, 1, 5]]
    assert power[0, 0, 3] == 4.0
    assert power[0, 1, 5] == 9.0
