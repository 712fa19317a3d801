"""Pages to bytes and back: every preset, byte positions, neutral tokens, constants and extremes."""

import pytest
import torch

from turboattention.config import TensorFormat, presets
from turboattention.errors import InvalidInputError
from turboattention.quant.codec import decode_pages, encode_pages, expand_pages
from turboattention.quant.error import sqnr_db
from turboattention.quant.granularity import PerBlock, PerChannel, PerGroup, PerToken
from turboattention.quant.layout import PageLayout

DIMS = (64, 80, 96, 128, 256)
NAMES = tuple(presets())
# Signal to noise of Gaussian values in dB: below the worst preset at these bits.
FLOOR = {16: 70.0, 8: 40.0, 4: 17.0, 3: 11.0, 2: 5.0}


def layout_of(name: str, dim: int) -> PageLayout:
    cache = presets()[name].cache
    if name.startswith("kivi") and dim % 32:
        pytest.skip("KIVI's groups of 32 do not divide this head_dim; refused by PageLayout")
    return PageLayout(cache.page_size, dim, cache.key, cache.value)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, dim: int):
    layout = layout_of(name, dim)
    key, value = torch.randn(2, 3, layout.page_size, dim), torch.randn(2, 3, layout.page_size, dim)
    pages = encode_pages(layout, key, value)
    assert pages.shape == (2, 3, layout.nbytes)
    assert pages.dtype == torch.uint8
    for restored, exact, fmt in zip(expand_pages(layout, pages), (key, value), (layout.key, layout.value), strict=True):
        assert restored.shape == exact.shape
        assert restored.dtype == torch.float32
        assert sqnr_db(restored, exact) > FLOOR[fmt.bits]
    # Pages are independent: alone, a page has the same bytes.
    assert torch.equal(encode_pages(layout, key[1, 2], value[1, 2]), pages[1, 2])


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_deterministic_and_keeps_its_input(name: str):
    layout = layout_of(name, 64)
    key, value = torch.randn(layout.page_size, 64), torch.randn(layout.page_size, 64)
    before = key.clone(), value.clone()
    assert torch.equal(encode_pages(layout, key, value), encode_pages(layout, key, value))
    assert torch.equal(key, before[0])
    assert torch.equal(value, before[1])


@pytest.mark.parametrize("granularity", (PerToken(), PerChannel(), PerGroup(16), PerBlock()), ids=repr)
@pytest.mark.parametrize("metadata", ("two_level", "float16"))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", (8, 4, 3, 2))
def test_error_within_half_a_step(
    bits: int, symmetric: bool, metadata: str, granularity: PerToken | PerChannel | PerGroup | PerBlock
):
    """Within half a stored step, plus the rounding of the metadata at the ends of the grid."""
    fmt = TensorFormat(bits, granularity, metadata, symmetric)
    layout = PageLayout(64, 80, fmt, fmt)
    key, value = torch.randn(64, 80), 5 * torch.randn(64, 80)
    pages = encode_pages(layout, key, value)
    decoded = decode_pages(layout, pages)
    for side, restored, exact in zip(decoded, expand_pages(layout, pages), (key, value), strict=True):
        step = side.scale.repeat_interleave(80 // side.scale.shape[-1], -1)
        edge = step * (2**bits - 1) / 2 / 100 + exact.abs().max() / 200
        assert ((restored - exact).abs() <= step / 2 + edge).all()


@pytest.mark.parametrize(("bits", "per_byte"), [(4, 2), (2, 4)])
def test_key_and_value_bytes(bits: int, per_byte: int):
    """Integers are their own codes: channel c shares a byte with c + D / 2 (quarters at 2 bits)."""
    fmt = TensorFormat(bits, PerChannel(), metadata="float16")
    layout = PageLayout(64, 64, fmt, fmt)
    key, value = (torch.randint(0, 2**bits, (64, 64)) for _ in range(2))
    for x in (key, value):
        x[0], x[1] = 0, 2**bits - 1  # the full range in each channel: scale 1, zero 0
    pages = encode_pages(layout, key.float(), value.float())
    keys, values = layout.read(pages, "key_codes"), layout.read(pages, "value_codes")
    width = 64 // per_byte
    for token in range(64):
        for byte in range(width):
            assert keys[token, byte] == sum(key[token, byte + k * width] << (bits * k) for k in range(per_byte))
    # Token (a, b, c, d) of a group of 32, sizes (2, 2, 4, 2), is stored at (a, c, b, d).
    place = [
        g * 32 + a * 16 + c * 4 + b * 2 + d
        for g in range(2)
        for a in range(2)
        for b in range(2)
        for c in range(4)
        for d in range(2)
    ]
    token_at = [place.index(position) for position in range(64)]
    for channel in range(64):
        for byte in range(width):
            expected = sum(value[token_at[byte + k * width], channel] << (bits * k) for k in range(per_byte))
            assert values[channel, byte] == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("constant", (0.0, 1.0, -3.0))
def test_constant_pages(name: str, constant: float):
    """Range zero: within the rounding of the metadata. Rotated, a constant is one spike: half a step of its grid."""
    layout = layout_of(name, 64)
    x = torch.full((layout.page_size, 64), constant)
    key, value = expand_pages(layout, encode_pages(layout, x, x))
    torch.testing.assert_close(key, x, rtol=5e-3, atol=0)
    if not layout.value.rotate:
        torch.testing.assert_close(value, x, rtol=5e-3, atol=0)
    else:
        # The spike is 8 times the constant, the grid spans twice that; each error is at most half a step.
        half_step = 8 * abs(constant) / (2**layout.value.bits - 1)
        assert ((value - x).norm(dim=-1) <= 8 * half_step * 1.01 + 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", (1e-3, 1.0, 3e3))
def test_small_and_large_values_keep_their_precision(name: str, magnitude: float):
    layout = layout_of(name, 64)
    x = torch.randn(4, layout.page_size, 64)
    usual = expand_pages(layout, encode_pages(layout, x, x))
    scaled = expand_pages(layout, encode_pages(layout, x * magnitude, x * magnitude))
    for restored, reference in zip(scaled, usual, strict=True):
        assert sqnr_db(restored, x * magnitude) > sqnr_db(reference, x) - 1.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ("key", "value"))
def test_beyond_float16_is_refused(name: str, side: str):
    layout = layout_of(name, 64)
    usual, huge = torch.randn(layout.page_size, 64), torch.randn(layout.page_size, 64)
    huge[3, 7] = 1e30
    with pytest.raises(InvalidInputError):
        encode_pages(layout, *((huge, usual) if side == "key" else (usual, huge)))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("fp16", "paper4", "paper3")])
def test_invalid_tokens_widen_no_range(name: str):
    layout = layout_of(name, 64)
    key, value = torch.randn(layout.page_size, 64), torch.randn(layout.page_size, 64)
    valid = torch.ones(layout.page_size, dtype=torch.bool)
    valid[:4] = False
    one, other = (x.clone() for x in (key, key))
    one[:4] *= 1000
    other[:4] = 0.5
    a, b = (expand_pages(layout, encode_pages(layout, k, value, valid)) for k in (one, other))
    for restored in (a, b):
        assert sqnr_db(restored[0][4:], key[4:]) > FLOOR[layout.key.bits]
    assert torch.equal(a[1], b[1])
    if not layout.key.search:  # a searched range still weighs the clamped values of the others
        assert torch.equal(a[0][4:], b[0][4:])


def test_page_without_any_valid_token_is_finite():
    for name in NAMES:
        layout = layout_of(name, 64)
        x = torch.randn(layout.page_size, 64)
        pages = encode_pages(layout, x, x, torch.zeros(layout.page_size, dtype=torch.bool))
        assert all(torch.isfinite(restored).all() for restored in expand_pages(layout, pages))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(dtype: torch.dtype):
    layout = layout_of("turbo4", 128)
    x = torch.randn(64, 128).to(dtype)
    assert torch.equal(encode_pages(layout, x, x), encode_pages(layout, x.float(), x.float()))


def test_universal_tile_scale_clamps():
    layout = layout_of("paper4", 64)
    x = torch.randn(64, 64).clamp(-1, 1)
    x[0, 0] = 50.0
    unit = torch.full((1, 1), 1 / 119, dtype=torch.float16)
    key, _ = expand_pages(layout, encode_pages(layout, x, x, tile_scales=(unit, unit)))
    assert key[0, 0].item() == pytest.approx(1.0, rel=0.1)
    assert sqnr_db(key.flatten()[1:], x.flatten()[1:]) > 17
