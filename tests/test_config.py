"""Presets and the checks of configuration objects."""

from dataclasses import FrozenInstanceError, replace

import pytest

import turboattention as ta
from turboattention.config import (
    DEFAULT_PRESET,
    AttentionConfig,
    CacheConfig,
    TensorFormat,
    get_preset,
    presets,
    with_bits,
)
from turboattention.errors import InvalidInputError
from turboattention.quant.granularity import PerBlock, PerChannel, PerGroup, PerToken

FOUR = TensorFormat(4)


def test_presets_by_name_in_the_order_of_tables():
    names = ["fp16", "int8", "turbo4", "turbo3", "turbo2", "paper4", "paper3", "kivi4", "kivi2"]
    assert list(presets()) == names
    assert ta.presets() == presets()
    assert all(preset.name == name and preset.summary for name, preset in presets().items())
    assert DEFAULT_PRESET == "turbo4"


def test_changing_what_presets_returns_changes_no_preset():
    presets().clear()
    assert get_preset("turbo4").cache.key.bits == 4


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fp16", 16, 16),
        ("int8", 8, 8),
        ("turbo4", 4, 4),
        ("turbo3", 3, 3),
        ("turbo2", 2, 2),
        ("paper4", 4, 4),
        ("paper3", 4, 4),
        ("kivi4", 4, 4),
        ("kivi2", 2, 2),
    ],
)
def test_bits_of_presets(name: str, key: int, value: int):
    cache = get_preset(name).cache
    assert (cache.key.bits, cache.value.bits) == (key, value)


@pytest.mark.parametrize("name", ["paper4", "paper3"])
def test_paper_presets_are_the_papers(name: str):
    preset = get_preset(name)
    stored = TensorFormat(4, PerChannel(), metadata="flashq")
    assert (preset.cache.key, preset.cache.value) == (stored, stored)
    assert (preset.cache.page_size, preset.cache.sink_tokens, preset.cache.recent_window) == (64, 0, 0)
    assert preset.cache.open_page == "int8_clamped"
    assert preset.attention == AttentionConfig(softmax="sas", query_bits=8, probability_bits=8)
    assert (preset.cache.low_priority_heads, preset.cache.low_bits) == ({"paper4": 0.0, "paper3": 0.5}[name], 2)


@pytest.mark.parametrize(("name", "bits"), [("kivi4", 4), ("kivi2", 2)])
def test_kivi_presets_are_those_of_kivi(name: str, bits: int):
    """K per channel and V per token, groups of 32, float16 scale and minimum, 128 recent tokens exact."""
    cache = get_preset(name).cache
    assert cache.key == TensorFormat(bits, PerChannel(), metadata="float16")
    assert cache.value == TensorFormat(bits, PerGroup(32), metadata="float16")
    assert (cache.page_size, cache.recent_window, cache.sink_tokens) == (32, 128, 0)


@pytest.mark.parametrize("name", ["int8", "turbo4", "turbo3", "turbo2"])
def test_turbo_presets_protect_the_first_tokens(name: str):
    cache = get_preset(name).cache
    assert cache.sink_tokens > 0
    assert isinstance(cache.key.granularity, PerChannel)
    assert isinstance(cache.value.granularity, PerToken)
    assert get_preset(name).attention == AttentionConfig()


@pytest.mark.parametrize("name", ["turbo5", "", "FP16", "turbo4 "])
def test_unknown_preset(name: str):
    message = r"^preset: expected one of fp16, int8, turbo4, turbo3, turbo2, paper4, paper3, kivi4, kivi2, received "
    with pytest.raises(InvalidInputError, match=message + f"'{name}'$"):
        get_preset(name)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 9, 32, -4])
def test_unknown_bits(bits: int):
    with pytest.raises(InvalidInputError, match=f"^bits: expected one of 2, 3, 4, 8, 16, received {bits}$"):
        TensorFormat(bits)
    with pytest.raises(InvalidInputError, match=r"^bits: expected one of 2, 3, 4, 8, 16"):
        with_bits(FOUR, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", list(presets()))
def test_with_bits_changes_the_bits_alone(name: str, bits: int):
    for fmt in (get_preset(name).cache.key, get_preset(name).cache.value):
        other = with_bits(fmt, bits)
        assert other.bits == bits
        kept = ("granularity", "metadata", "symmetric", "rotate", "search")
        assert all(getattr(other, field) == getattr(fmt, field) for field in kept)


@pytest.mark.parametrize(
    "arguments",
    [{"granularity": PerToken()}, {"granularity": PerBlock()}, {"granularity": PerGroup(32)}, {"symmetric": True}],
    ids=["per-token", "per-block", "per-group", "symmetric"],
)
def test_flashq_is_per_channel_and_asymmetric(arguments: dict):
    with pytest.raises(
        InvalidInputError, match=r"^metadata 'flashq': expected granularity PerChannel and symmetric=False"
    ):
        TensorFormat(4, metadata="flashq", **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 48}, "page_size: expected 32, 64 or 128 tokens, received 48"),
        ({"page_size": 0}, "page_size: expected 32, 64 or 128 tokens, received 0"),
        ({"sink_tokens": -1}, r"sink_tokens: expected 0 to page_size \(64\), received -1"),
        ({"sink_tokens": 65}, r"sink_tokens: expected 0 to page_size \(64\), received 65"),
        ({"page_size": 32, "sink_tokens": 33}, r"sink_tokens: expected 0 to page_size \(32\), received 33"),
        ({"recent_window": -1}, "recent_window: expected 0 or more tokens, received -1"),
        ({"low_priority_heads": 1.5}, "low_priority_heads: expected a share from 0 to 1, received 1.5"),
        ({"low_priority_heads": float("nan")}, "low_priority_heads: expected a share from 0 to 1, received nan"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_cache_config_checks_its_fields(changes: dict, message: str):
    with pytest.raises(InvalidInputError, match=f"^{message}$"):
        CacheConfig(key=FOUR, value=FOUR, **changes)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: TensorFormat(4, metadata="int4"), "metadata"),
        (lambda: CacheConfig(FOUR, FOUR, open_page="int8"), "open_page"),
        (lambda: CacheConfig(FOUR, FOUR, low_priority_heads=0.5, low_bits=5), "low_bits"),
        (lambda: AttentionConfig(softmax="fast"), "softmax"),
        (lambda: AttentionConfig(query_bits=4), "query_bits"),
        (lambda: AttentionConfig(probability_bits=32), "probability_bits"),
        (lambda: AttentionConfig(chunk_bits=4), "chunk_bits"),
    ],
    ids=["metadata", "open_page", "low_bits", "softmax", "query_bits", "probability_bits", "chunk_bits"],
)
def test_unknown_choices_are_refused(build, name: str):
    """A typing mistake must not select another behaviour in silence."""
    with pytest.raises(InvalidInputError, match=f"^{name}: expected"):
        build()


@pytest.mark.parametrize(
    "changes",
    [
        {"refined_share": 0.25, "refined_bits": 3},
        {"refined_share": 1.5, "refined_bits": 1},
        {"refined_share": -0.1, "refined_bits": 1},
        {"refined_share": 0.25, "refined_bits": 1, "granularity": PerToken()},
        {"refined_share": 0.25, "refined_bits": 1, "metadata": "float16"},
        {"refined_share": 0.25, "refined_bits": 1, "rotate": True},
        {"refined_share": 0.25, "refined_bits": 1, "bits": 8},
    ],
    ids=["3-bits", "share-above-1", "negative-share", "per-token", "float16", "rotated", "9-bits"],
)
def test_refinement_that_no_page_can_hold(changes: dict):
    with pytest.raises(InvalidInputError, match=r"^refinement: expected"):
        TensorFormat(**{"bits": 4, **changes})


@pytest.mark.parametrize(
    "other", [{"softmax": "sas"}, {"softmax": "base2"}, {"query_bits": 8}, {"probability_bits": 8}]
)
def test_a_chunk_in_int8_needs_plain_attention_over_the_cache(other: dict):
    with pytest.raises(
        InvalidInputError, match=r"^chunk_bits 8: expected softmax 'exact' and 16 bits of Q and P, rece"
    ):
        AttentionConfig(chunk_bits=8, **other)
    assert AttentionConfig(chunk_bits=16, **other).chunk_bits == 16


def test_no_preset_computes_a_chunk_in_int8():
    assert {preset.attention.chunk_bits for preset in presets().values()} == {16}


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        get_preset("turbo4").cache.page_size = 32
    assert replace(get_preset("turbo4").cache, page_size=32).page_size == 32
