"""Bookkeeping of the cache against a plain list of tokens kept here: random operations, then single rules."""

import pytest
import torch
from cache_machine import CacheMachine
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from plain_cache import (
    CASES,
    DIM,
    HEADS,
    RATIO,
    Case,
    assert_unchanged,
    flat,
    random_tokens,
    variant,
)

from turboattention.config import presets
from turboattention.errors import InvalidInputError
from turboattention.kvcache import LayerCache
from turboattention.ops import prefill_attention
from turboattention.quant.codec import expand_pages
from turboattention.quant.error import sqnr_db
from turboattention.quant.layout import PageLayout
from turboattention.quant.progressive import head_priority, low_priority_heads


@pytest.mark.parametrize("name", CASES)
def test_random_operations_against_a_plain_list(name: str):
    # Without shrinking: a failure prints its at most 20 steps at once instead of after minutes.
    chosen = settings(max_examples=20, stateful_step_count=20, derandomize=True, phases=[Phase.generate])
    run_state_machine_as_test(lambda: CacheMachine(CASES[name], name), settings=chosen)


# --- single rules ---


def filled(case: Case, tokens: int, batch: int = 1) -> LayerCache:
    cache = case.cache()
    cache.append(random_tokens(1, batch, tokens), random_tokens(2, batch, tokens))
    return cache


def test_pages_never_change_once_written():
    cache = filled(CASES["turbo4"], 64)
    cache.commit()
    first = cache.groups[0].pages[:, :, 0].clone()
    for seed in range(3, 203):
        cache.append(random_tokens(seed, 1, 1), random_tokens(seed + 1, 1, 1))
        cache.observe(random_tokens(seed + 2, 1, 1, HEADS * RATIO))
        cache.settle()
    assert cache.page_tokens == 256
    assert torch.equal(cache.groups[0].pages[:, :, 0], first)


@pytest.mark.parametrize("pieces", [[64, 64, 72], [63, 1, 1, 135], [1] * 200], ids=["pages", "odd", "single"])
@pytest.mark.parametrize("name", ["turbo4", "turbo2", "kivi4", "int8"])
def test_pages_do_not_depend_on_how_tokens_arrive(name: str, pieces: list[int]):
    key, value, done = random_tokens(1, 2, 200), random_tokens(2, 2, 200), 0
    cache, whole = CASES[name].cache(), CASES[name].cache()
    for count in pieces:
        cache.append(key[:, :, done : done + count], value[:, :, done : done + count])
        cache.settle()
        done += count
    whole.append(key, value)
    for x in (cache, whole):
        x.commit()
    assert cache.page_tokens == whole.page_tokens > 0
    assert all(torch.equal(a.pages, b.pages) for a, b in zip(cache.groups, whole.groups, strict=True))


def test_newest_tokens_of_a_step_can_be_taken_back():
    cache = filled(CASES["turbo4"], 100)
    cache.settle()
    assert cache.page_tokens == 0  # 100 tokens arrived together, the newest 64 may still be taken back
    cache.crop(40)
    cache.append(random_tokens(3, 1, 30), random_tokens(4, 1, 30))
    cache.settle()
    assert cache.length == 70
    assert cache.page_tokens == 0
    cache.append(random_tokens(5, 1, 1), random_tokens(6, 1, 1))
    assert cache.length == 71
    assert cache.page_tokens == 64


def test_crop_into_a_page_is_refused_in_full_words():
    cache = filled(CASES["turbo4"], 200)
    cache.commit()
    with pytest.raises(InvalidInputError) as error:
        cache.crop(100)
    assert str(error.value) == (
        "crop: expected at least 192 tokens (all that is compressed) or a multiple of the page size 64, received 100; "
        "crop before the next token is appended, or set a larger recent_window"
    )
    assert cache.length == 200


@pytest.mark.parametrize("length", [-1, 201])
def test_crop_outside_is_refused(length: int):
    cache = filled(CASES["turbo4"], 200)
    with pytest.raises(InvalidInputError, match=f"length: expected 0 to 200 tokens, received {length}"):
        cache.crop(length)


def test_cache_goes_on_after_a_crop_at_a_page_border():
    """Cropped to 64 and refilled with other tokens it equals a cache that saw only those."""
    key, value = random_tokens(1, 1, 64), random_tokens(2, 1, 64)
    other = random_tokens(7, 1, 100), random_tokens(8, 1, 100)
    a, b = CASES["turbo3"].cache(), CASES["turbo3"].cache()
    a.append(torch.cat([key, key], 2), torch.cat([value, value], 2))
    a.commit()
    a.crop(64)
    b.append(key, value)
    for cache in (a, b):
        cache.append(*other)
        cache.commit()
    assert torch.equal(a.groups[0].pages, b.groups[0].pages)
    assert torch.equal(a.sink_key, b.sink_key)
    assert torch.equal(a.view().tail_key, b.view().tail_key)


@pytest.mark.parametrize("window", [1, 40, 64, 100])
def test_recent_window_stays_exact(window: int):
    case = Case(variant("turbo2", recent_window=window))
    key, value = random_tokens(1, 1, 300), random_tokens(2, 1, 300)
    cache = case.cache()
    for t in range(0, 300, 7):
        cache.append(key[:, :, t : t + 7], value[:, :, t : t + 7])
        view = cache.view()
        exact = view.tail_key.shape[2]
        assert exact >= min(view.length, window)
        assert torch.equal(view.tail_value, value[:, :, view.length - exact : view.length].half())
        cache.settle()
    cache.commit()
    assert cache.page_tokens == (300 - window) // 64 * 64


@pytest.mark.parametrize("name", ["turbo4", "paper4", "kivi4"])
@pytest.mark.parametrize("bad", [torch.nan, -7e4], ids=["nan", "beyond-float16"])
def test_refused_values_leave_the_cache_as_it_was(name: str, bad: float):
    """As it was: pages, open page, and what may still be taken back."""
    cache = filled(CASES[name], 200)
    cache.settle()
    before = flat(cache.state())
    key, value = random_tokens(3, 1, 5), random_tokens(4, 1, 5)
    value[0, 2, 4, 9] = bad
    with pytest.raises(InvalidInputError, match=r"^value: expected (finite values|magnitudes up to 6.55e\+04)"):
        cache.append(key, value)
    assert_unchanged(cache, before)


def test_refused_message_says_where():
    key = random_tokens(1, 1, 5)
    key[0, 2, 4, 9] = torch.nan
    message = r"key: expected finite values, received 1 NaN or Inf, the first at index \(0, 2, 4, 9\)"
    with pytest.raises(InvalidInputError, match=message):
        CASES["turbo4"].cache().append(key, random_tokens(2, 1, 5))


@pytest.mark.parametrize("name", ["turbo4", "paper4", "kivi4", "key-of-one-head-at-16"])
def test_bfloat16_beyond_float16_is_refused(name: str):
    """bfloat16 reaches 3e38, the metadata of a page 65504: what can't be stored must not turn into NaN or infinity."""
    key, value = (random_tokens(i, 1, 200).bfloat16() for i in (1, 2))
    key[0, 0, 30, 5] = 1e9
    cache = CASES[name].cache()
    cache.append(key, value)  # the open page of a bfloat16 model is in bfloat16
    with pytest.raises(InvalidInputError, match="expected magnitudes up to 65504, received"):
        cache.commit()
    key[0, 0, 30, 5] = 6e4
    cache = CASES[name].cache()
    cache.append(key, value)
    cache.commit()
    for group in cache.groups:
        assert all(torch.isfinite(x).all() for x in expand_pages(group.layout, group.pages))


def test_fp16_preset_keeps_any_finite_value():
    key = torch.full((1, HEADS, 70, DIM), 3e38)
    cache = CASES["fp16"].cache()
    cache.append(key, key)
    cache.commit()
    assert cache.page_tokens == 0
    assert torch.equal(cache.view().tail_key, key)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ((1, 3, 64), (1, 3, 5, 64), "key: expected 4 dimensions"),
        ((1, 2, 5, 64), (1, 2, 5, 64), r"key: expected 3 heads, received shape \(1, 2, 5, 64\)"),
        ((1, 3, 5, 64), (1, 3, 5, 80), "value: expected head_dim 64"),
        ((1, 3, 5, 64), (1, 3, 6, 64), r"value: expected the shape of key \(1, 3, 5, 64\)"),
        ((2, 3, 5, 64), (2, 3, 5, 64), "key: expected batch 1, received 2"),
        ((1, 3, 5, 128), (1, 3, 5, 128), "key: expected head_dim 64"),
    ],
    ids=["dimensions", "heads", "value-head_dim", "tokens", "batch", "head_dim-of-the-cache"],
)
def test_append_refuses_shapes(key: tuple[int, ...], value: tuple[int, ...], message: str):
    cache = filled(CASES["turbo4"], 10)
    with pytest.raises(InvalidInputError, match=message):
        cache.append(torch.zeros(key), torch.zeros(value))
    assert cache.length == 10


@pytest.mark.parametrize("name", CASES)
def test_append_of_no_tokens(name: str):
    """Whatever their number: none, before the first and between others."""
    none = random_tokens(1, 1, 0)
    cache = CASES[name].cache()
    cache.append(none, none)
    assert cache.length == 0
    cache.append(random_tokens(1, 1, 70), random_tokens(2, 1, 70))
    cache.append(none, none)
    cache.commit()
    assert cache.length == 70
    other = filled(CASES[name], 70)
    other.commit()
    assert torch.equal(cache.view().tail_key, other.view().tail_key)


def test_state_of_another_policy_is_refused():
    cache = filled(CASES["turbo4"], 128)
    cache.commit()
    message = r"^state.groups\[0\].key_bits: expected 2, received 4; use the same policy"
    with pytest.raises(InvalidInputError, match=message):
        CASES["turbo2"].cache().load_state(cache.state())


def test_reset_forgets_everything():
    cache = filled(CASES["paper4-sinks-and-window"], 128)
    cache.set_padding(torch.tensor([3]))
    cache.commit()
    cache.reset()
    assert cache.length == cache.nbytes == cache.num_values == 0
    assert_unchanged(cache, flat(CASES["paper4-sinks-and-window"].cache().state()))


# --- the paper's buffer and heads ---


def test_paper_buffer_clamps_to_its_first_scale():
    """Scale from the first tokens (maximum 2, so 2 / 119); a later 5 is stored as 2, a later 1 within half a step."""
    cache = CASES["paper4"].cache()
    first = torch.zeros(1, HEADS, 3, DIM)
    first[..., 1, 0] = 2.0
    cache.append(first, first)
    later = torch.zeros(1, HEADS, 2, DIM)
    later[..., 0, 0], later[..., 0, 1], later[..., 1, 2] = 5.0, 1.0, -7.0
    cache.append(later, later)
    assert torch.equal(cache.view().tail_key[:, :, 3:], later)  # still exact: it may be taken back
    cache.settle()
    cache.commit()
    tail = cache.view().tail_key
    scale = float(torch.tensor(2 / 119).half())
    assert tail[0, 0, 3, 0] == pytest.approx(119 * scale)
    assert tail[0, 0, 4, 2] == pytest.approx(-119 * scale)
    assert tail[0, 0, 3, 1] == pytest.approx(round(1 / scale) * scale)
    assert cache.open.tensors["key_codes"].dtype == torch.int8
    assert cache.nbytes == 2 * HEADS * (5 * DIM + 2)


def test_sinks_from_the_paper_buffer_are_what_the_buffer_held():
    """Also when the first page was compressed while all was exact: the sinks of a row with more padding come later."""
    cache = CASES["paper4-sinks-and-window"].cache()
    for count in (45, 1):
        cache.append(random_tokens(count, 2, count), random_tokens(count + 1, 2, count))
        cache.set_padding(torch.tensor([0, 35]))
    assert cache.page_tokens == 32
    before = cache.view().tail_key[1, :, 3:6]  # tokens 35 to 37, in INT8 by now
    cache.append(random_tokens(3, 2, 40), random_tokens(4, 2, 40))
    cache.commit()
    assert cache.page_tokens == 64
    assert torch.equal(cache.sink_key[1], before)


def test_paper3_lowers_half_of_the_heads_by_the_priority_of_its_first_pages():
    case = Case(presets()["paper3"].cache)
    spread = torch.tensor([4.0, 1.0, 3.0, 2.0])[None, :, None, None]
    shape = torch.linspace(0.2, 1.0, DIM)
    key = random_tokens(1, 1, 128, 4) * spread * shape
    value = random_tokens(2, 1, 128, 4) * spread.flip(1) * shape
    cache = case.cache(heads=4)
    cache.append(key, value)
    cache.commit()
    bits = {h: (g.layout.key.bits, g.layout.value.bits) for g in cache.groups for h in g.heads}
    assert bits == {0: (4, 2), 1: (2, 4), 2: (4, 2), 3: (2, 4)}
    assert low_priority_heads(head_priority(key), 0.5) == [1, 3]


# --- bytes ---

# Bytes of one page of one KV head, added up by hand: codes of K and V, refined plane of K, float16 then byte metadata,
# and the gaps: before regions, which begin at multiples of up to 64, and at the end of the page, a multiple of 128 (of
# 16 for paper4 and KIVI). Pages of 64 tokens, of 32 for KIVI. D = 128, then D = 64.
PAGE_BYTES = {
    # codes 2 x 8192; K 2 + 2 and V 2 for the page; K scale and zero of 128 channels, V scale of 64 tokens, which begins
    # at 16646 + 58 (8326 + 58)
    "int8": (16384 + 6 + 320 + 58, 8192 + 6 + 192 + 58),
    # codes 2 x 4096; 12 (6) refined channels of 64 bits and their index; V's scales at 8562 + 14 (4284 + 4), end
    # 8640 + 64 (4352)
    "turbo4": (8192 + 12 * 8 + 6 + 320 + 12 + 14 + 64, 4096 + 6 * 8 + 6 + 192 + 6 + 4),
    "turbo3": (6144 + 12 * 8 + 6 + 320 + 12 + 14 + 64, 3072 + 6 * 8 + 6 + 192 + 6 + 4),
    # 32 refined channels (16 for D = 64) of 2 bits; their index at 4868 + 28 (2436 + 12), V's scales at 4930 + 62
    # (2466 + 30), end 5056 + 64
    "turbo2": (4096 + 32 * 16 + 6 + 320 + 32 + 28 + 62 + 64, 2048 + 16 * 16 + 6 + 192 + 16 + 12 + 30),
    # K and V: one float16, integer scale and offset of every channel; V's scales at 8452 + 60 (4228 + 60)
    "paper4": (8192 + 4 + 512 + 60, 4096 + 4 + 256 + 60),
    # 32 tokens: K 128 x 2 float16; V 32 tokens x 4 groups x 2 float16
    "kivi4": (4096 + 512 + 512, 2048 + 256 + 256),
    "kivi2": (2048 + 512 + 512, 1024 + 256 + 256),
}
# At 2 bits for half of the heads (floor) of K and V; a head may be low in one and not in the other.
PAPER_SIDE_BYTES = {4: (4096 + 2 + 256, 2048 + 2 + 128), 2: (2048 + 2 + 256, 1024 + 2 + 128)}


@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (3, 64)], ids=["8-heads-of-128", "3-heads-of-64"])
@pytest.mark.parametrize("name", [*PAGE_BYTES, "fp16"])
def test_bits_per_value_at_4096_tokens(name: str, heads: int, dim: int):
    cache = Case(presets()[name].cache).cache(heads)
    for first in range(0, 4096, 1024):
        cache.append(*(random_tokens(first + i, 1, 1024, heads, dim) for i in (0, 1)))
        cache.observe(random_tokens(first, 1, 1, heads, dim))
    cache.commit()
    values = 2 * heads * 4096 * dim
    if name == "fp16":
        expected = values * 4  # a float32 model keeps its float32
    else:
        pages, exact = (124, 128) if name.startswith("kivi") else (64, 0)
        expected = heads * (pages * PAGE_BYTES[name][dim == 64] + 2 * 2 * dim * exact)
        expected += 2 * 2 * heads * dim * presets()[name].cache.sink_tokens
        expected += 2 * 2 * heads if name == "paper4" else 0  # the universal scales
        expected += 4 * heads * dim if name in ("turbo4", "turbo3", "turbo2") else 0  # the squared queries
    assert cache.nbytes == expected
    assert cache.num_values == values
    assert cache.nbytes * 8 / cache.num_values == pytest.approx(BITS_PER_VALUE[name][dim == 64], abs=1e-3)


# The same as bits per value: what a table shows (D = 128 with 8 heads, D = 64 with 3).
BITS_PER_VALUE = {
    "int8": (8.1914, 8.2539),
    "turbo4": (4.2578, 4.2578),
    "turbo3": (3.2578, 3.2578),
    "turbo2": (2.5078, 2.5078),
    "paper4": (4.2813, 4.3125),
    "kivi4": (5.344, 5.344),
    "kivi2": (3.406, 3.406),
    "fp16": (32.0, 32.0),
}


@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (3, 64)], ids=["8-heads-of-128", "3-heads-of-64"])
def test_bytes_of_paper3(heads: int, dim: int):
    """Every group's page is its two sides and a gap before V's scales; on each side half of the heads are low.

    Codes and scales of K are a multiple of 64 bytes in every group, then come two float16, and V's scales at the next.
    """
    cache = Case(presets()["paper3"].cache).cache(heads)
    cache.append(*(random_tokens(i, 1, 1024, heads, dim) for i in (0, 1)))
    cache.commit()
    total = 0
    for group in cache.groups:
        used = sum(PAPER_SIDE_BYTES[f.bits][dim == 64] for f in (group.layout.key, group.layout.value))
        total += len(group.heads) * 16 * (used + 60)
    assert cache.nbytes == total + 2 * 2 * heads
    for side in ("key", "value"):
        assert sum(len(g.heads) for g in cache.groups if getattr(g.layout, side).bits == 2) == heads // 2


def test_layout_of_a_page_answers_its_bytes():
    for name, (wide, narrow) in PAGE_BYTES.items():
        config = presets()[name].cache
        for dim, expected in ((128, wide), (64, narrow)):
            assert PageLayout(config.page_size, dim, config.key, config.value).nbytes == expected, (name, dim)


def test_float16_and_bfloat16_models_keep_their_dtype_in_the_open_page():
    for dtype in (torch.float16, torch.bfloat16):
        cache = CASES["turbo4"].cache()
        cache.append(random_tokens(1, 1, 70).to(dtype), random_tokens(2, 1, 70).to(dtype))
        cache.commit()
        assert cache.view().tail_key.dtype == dtype
        assert cache.sink_key.dtype == dtype


def test_quality_of_each_preset_in_order():
    """More bits, less error: the cache's own K, in dB."""
    key, value = random_tokens(1, 1, 256), random_tokens(2, 1, 256)
    q = random_tokens(3, 1, 8, HEADS * RATIO)
    exact = CASES["fp16"].cache()
    exact.append(key, value)
    expected = prefill_attention(q, exact.view(), causal=False).out
    decibels = []
    for name in ("int8", "turbo4", "turbo3", "turbo2"):
        cache = CASES[name].cache()
        cache.append(key, value)
        cache.commit()
        decibels.append(sqnr_db(prefill_attention(q, cache.view(), causal=False).out, expected))
    assert decibels == sorted(decibels, reverse=True)
    assert decibels[0] > 38
    assert decibels[-1] > 4
