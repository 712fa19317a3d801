"""C++ compression of pages against the definition: the same bytes, on every instruction set of this processor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboattention.config import TensorFormat, get_preset
from turboattention.cpu import library, structs
from turboattention.errors import InvalidInputError
from turboattention.ops.append import compress_pages, cpu, reference
from turboattention.quant.granularity import PerToken
from turboattention.quant.layout import PageLayout

REASON = library.without_library()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SETS = list(range(library.loaded().isa + 1))
PRESETS = ("int8", "turbo4", "turbo3", "turbo2")
GUARD = 4096


def layout_of(preset: str, head_dim: int) -> PageLayout:
    cache = get_preset(preset).cache
    return PageLayout(cache.page_size, head_dim, cache.key, cache.value)


def tokens(layout: PageLayout, pages: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """K and V ``[2, 2, tokens, head_dim]``: outliers, constant channels, tokens of zeros, a page of one value."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, pages * layout.page_size, layout.head_dim)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    key[..., 5] *= 30.0
    key[..., 7] = 0.25
    value[:, :, ::11] = 0.0
    value[..., 2] *= 12.0
    key[1, 1, : layout.page_size] = -1.5
    return key.to(dtype), value.to(dtype)


def assert_same(layout: PageLayout, key: Tensor, value: Tensor, valid: Tensor | None, power: Tensor | None, isa: int):
    want = reference.compress_pages(layout, key, value, valid, None, power)
    got = cpu.compress_pages(layout, key, value, valid, power, isa=isa)
    for name in layout.regions:
        assert torch.equal(layout.read(got, name), layout.read(want, name)), name
    assert torch.equal(got, want)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_bytes_of_the_definition(preset: str, head_dim: int, isa: int):
    layout = layout_of(preset, head_dim)
    key, value = tokens(layout, 3, seed=head_dim)
    power = torch.rand(2, 2, head_dim, generator=torch.Generator().manual_seed(1))
    columns = torch.arange(3 * layout.page_size)
    padded = torch.stack([columns >= 5, columns >= 2 * layout.page_size + 9])
    for valid, seen in ((None, None), (None, power), ((columns >= 1)[None], power), (padded, power)):
        assert_same(layout, key, value, valid, seen, isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, isa: int):
    layout = layout_of("turbo4", 64)
    assert_same(layout, *tokens(layout, 2, seed=3, dtype=dtype), None, None, isa)


@pytest.mark.parametrize("isa", SETS)
def test_formats_of_no_preset(isa: int):
    """Pages of 128 tokens, V asymmetric and not rotated, searched ranges at 8 bits, four more bits for half of K."""
    key = TensorFormat(4, search=True, refined_share=0.5, refined_bits=4)
    for value in (TensorFormat(3, PerToken()), TensorFormat(8, PerToken(), rotate=True, search=True)):
        layout = PageLayout(128, 128, key, value)
        assert_same(layout, *tokens(layout, 2, seed=4), None, None, isa)


@settings(max_examples=40)
@given(st.data())
def test_any_numbers(data: st.DataObject):
    """Few distinct values make ties in every rounding and every choice."""
    layout = layout_of(data.draw(st.sampled_from(PRESETS)), 64)
    few = data.draw(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=6))
    index = torch.randint(
        len(few), (2, 1, 1, 64, 64), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    key, value = torch.tensor(few, dtype=torch.float32)[index]
    valid = torch.arange(64)[None] >= data.draw(st.integers(0, 64))
    assert_same(layout, key, value, valid, None, data.draw(st.sampled_from(SETS)))


def test_nothing_is_written_beside_the_pages(monkeypatch: pytest.MonkeyPatch):
    layout = layout_of("turbo3", 80)
    key, value = tokens(layout, 2, seed=5)
    want = reference.compress_pages(layout, key, value)
    around: list[Tensor] = []

    def guarded(*shape: int, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        around.append(torch.full((count + 2 * GUARD,), 0xAB, dtype=dtype))
        return around[-1][GUARD : GUARD + count].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    got = cpu.compress_pages(layout, key, value)
    monkeypatch.undo()
    assert torch.equal(got, want)
    assert (around[0][:GUARD] == 0xAB).all()
    assert (around[0][-GUARD:] == 0xAB).all()


def test_strides_of_any_kind():
    layout = layout_of("turbo4", 64)
    key, value = tokens(layout, 2, seed=6)
    want = reference.compress_pages(layout, key, value)
    other = key.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(cpu.compress_pages(layout, other, value.mT.contiguous().mT), want)


def test_too_large_numbers_are_refused_as_the_definition_does():
    layout = layout_of("turbo4", 64)
    key, value = tokens(layout, 1, seed=7)
    key[0, 0, 3, 3] = 1e7
    for function in (cpu.compress_pages, reference.compress_pages):
        with pytest.raises(InvalidInputError, match="key range"):
            function(layout, key, value)


def test_float64_and_other_layouts_go_to_the_definition():
    layout = layout_of("turbo4", 64)
    key, value = tokens(layout, 1, seed=8)
    assert torch.float64 not in structs.DTYPES
    want = reference.compress_pages(layout, key.double(), value.double())
    assert torch.equal(compress_pages(layout, key.double(), value.double()), want)
    kivi = get_preset("kivi4").cache
    layout = PageLayout(kivi.page_size, 64, kivi.key, kivi.value)
    assert torch.equal(compress_pages(layout, key, value), reference.compress_pages(layout, key, value))
