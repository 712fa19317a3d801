"""A step of a paged cache in C++ against the definition: the same pages, tails, sinks and faults."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboattention.config import get_preset
from turboattention.cpu import library
from turboattention.errors import InvalidInputError
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.append import append_implementation, cpu
from turboattention.ops.append.paged import append_paged

REASON = library.without_library()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SETS = list(range(library.loaded().isa + 1))
ROWS, HEADS = 3, 3


def caches(preset: str, *, window: int, sinks: int, dim: int, dtype: torch.dtype, isa: int) -> list[PagedCache]:
    """Two equal caches, appended to by the definition and by C++; the middle head has a format of its own."""
    config = replace(get_preset(preset).cache, recent_window=window, sink_tokens=sinks)
    plain, int8 = (config.key, config.value), (get_preset("int8").cache.key, config.value)
    return [
        PagedCache(
            config,
            [plain, int8, plain],
            rows=ROWS,
            max_tokens=640,
            head_dim=dim,
            dtype=dtype,
            max_step=5,
            shuffle=1,
            append=append,
        )
        for append in (append_paged, lambda *args, **kwargs: cpu.append_paged(*args, **kwargs, isa=isa))
    ]


def assert_same(a: PagedCache, b: PagedCache) -> None:
    assert torch.equal(a.fault, b.fault)
    pairs = [(x.pool, y.pool) for x, y in zip(a.groups, b.groups, strict=True)]
    for name in ("lengths", "page_tokens", "tail_key", "tail_value", "sink_key", "sink_value"):
        pairs.append((getattr(a, name), getattr(b, name)))
    for x, y in pairs:
        if x is not None:
            assert torch.equal(bytes_of(x), bytes_of(y))


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@settings(max_examples=30)
@given(st.data())
def test_any_history(data: st.DataObject):
    draw = data.draw
    pair = caches(
        draw(st.sampled_from(("turbo4", "turbo3", "turbo2"))), window=draw(st.sampled_from((0, 7, 64))),
        sinks=draw(st.sampled_from((0, 1, 5))), dim=draw(st.sampled_from((64, 80))),
        dtype=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))), isa=draw(st.sampled_from(SETS)),
    )  # fmt: skip
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(1, 5))):
        when = draw(st.sampled_from(("before", "after")))
        tokens = draw(st.integers(1, 5 if when == "before" else 120))
        key, value = (torch.randn(ROWS, HEADS, tokens, pair[0].tail_key.shape[-1], generator=random) for _ in range(2))
        counts = torch.tensor([draw(st.integers(0, tokens)) for _ in range(ROWS)], dtype=torch.int32)
        for cache in pair:
            cache.observe(key.repeat_interleave(2, 1), counts)
            cache.append(key, value, when=when, counts=counts)
        assert_same(*pair)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("fault", ["nan", "infinity", "range", "room"])
def test_faults(fault: str, isa: int):
    pair = caches("turbo4", window=0, sinks=1, dim=64, dtype=torch.float32, isa=isa)
    key, value = (torch.randn(ROWS, HEADS, 130, 64) for _ in range(2))
    if fault == "nan":
        value[1, 2, 100, 3] = torch.nan
    elif fault == "infinity":
        key[1, 0, 129, 3] = -torch.inf
    elif fault == "range":
        key[1, 0, 70, 3] = 1e8
    for cache in pair:
        if fault == "room":
            cache.groups[0].table[1, 0, 1] = 100_000
        cache.append(key, value, when="after")
    assert pair[0].fault[1] != 0
    assert_same(*pair)


def test_chosen_on_this_device():
    cpu_device = torch.device("cpu")
    cache = PagedCache(get_preset("turbo4").cache, [(get_preset("turbo4").cache.key, get_preset("turbo4").cache.value)],
                       rows=1, max_tokens=64, head_dim=64)  # fmt: skip
    assert append_implementation([group.layout for group in cache.groups], cpu_device) == "cpu"
    kivi = get_preset("kivi4").cache
    cache = PagedCache(kivi, [(kivi.key, kivi.value)], rows=1, max_tokens=64, head_dim=64)
    assert append_implementation([group.layout for group in cache.groups], cpu_device) == "reference"


@pytest.mark.parametrize("name", ["pool", "table", "tail_key"])
def test_memory_that_is_not_contiguous_is_refused(name: str):
    """The kernel writes there: a copy would take the new pages with it."""
    cache = caches("turbo4", window=0, sinks=1, dim=64, dtype=torch.float32, isa=0)[1]
    kv = cache.view()
    if name == "tail_key":
        kv = replace(kv, tail_key=kv.tail_key.mT.contiguous().mT)
    else:
        group = kv.groups[0]
        apart = getattr(group, name).mT.contiguous().mT
        kv = replace(kv, groups=(replace(group, **{name: apart}), kv.groups[1]))
    key = torch.zeros(ROWS, HEADS, 1, 64)
    with pytest.raises(InvalidInputError, match=f"{name}: expected contiguous"):
        cpu.append_paged(kv, key, key, when="after", fault=cache.fault, query_power=cache.query_power)
