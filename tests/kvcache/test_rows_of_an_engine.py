"""Tails with rows for more sequences than the batch, sinks in the pages: the numbers of a cache of the batch alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turboattention.config import get_preset
from turboattention.errors import InvalidInputError
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.append import advance, cpu, paged, triton_paged
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV, sequence
from turboattention.ops.prefill.over_cache import over_cache
from turboattention.quant.layout import PageLayout
from turboattention.quant.packing import packed_bytes

BATCH, HEADS, DIM, BLOCKS = 3, 2, 64, 12
STEPS = (("after", 70), ("after", 1), ("after", 60), ("after", 1), ("after", 1))
APPENDS = {"reference": paged.append_paged, "cpu": cpu.append_paged, "triton": triton_paged.append_paged}


class Engine:
    """Blocks, open pages and query statistics as an engine keeps them."""

    def __init__(self) -> None:
        cache = get_preset("turbo2").cache
        self.layout = PageLayout(64, DIM, cache.key, cache.value, cache.sink_tokens)
        self.pool = torch.full((BLOCKS * HEADS, self.layout.nbytes), 255, dtype=torch.uint8)
        self.tails = [torch.full((7, HEADS, 64, DIM), torch.nan, dtype=torch.float16) for _ in range(2)]
        self.power = torch.zeros(7, HEADS, DIM)
        self.rows = torch.tensor([5, 0, 3], dtype=torch.int32)
        blocks = torch.tensor([[7, 2, 9], [4, 1, 10], [3, 6, 8]], dtype=torch.int32)
        self.first, self.table = blocks[:, 0].contiguous(), blocks[:, None] * HEADS + torch.arange(HEADS)[:, None]
        self.lengths = torch.zeros(BATCH, dtype=torch.int32)
        self.paged = torch.zeros(BATCH, dtype=torch.int32)

    def view(self) -> PagedKV:
        sinks = []
        for name in ("sink_key", "sink_value"):
            first = self.layout.regions[name].offset // 2
            words = self.pool.view(torch.float16).view(BLOCKS, HEADS, -1)
            sinks.append(words[..., first : first + DIM].unflatten(-1, (1, DIM)))
        group = PagedGroup(self.layout, tuple(range(HEADS)), self.pool, self.table.to(torch.int32).contiguous())
        return PagedKV((group,), self.lengths, self.paged, *self.tails, *sinks, self.rows, self.first)

    def append(self, name: str, key: Tensor, value: Tensor, when: str, queries: Tensor | None = None) -> None:
        fault = torch.zeros(BATCH, dtype=torch.int32)
        APPENDS[name](self.view(), key, value, when=when, fault=fault, query_power=self.power, queries=queries)
        assert not fault.any()
        self.lengths, self.paged = advance(self.lengths, self.paged, key.shape[2], when=when, page_size=64)


def filled(name: str) -> tuple[PagedCache, Engine]:
    config = get_preset("turbo2").cache
    own = PagedCache(config, [(config.key, config.value)] * HEADS, rows=BATCH, max_tokens=192, head_dim=DIM)
    engine = Engine()
    generator = torch.Generator().manual_seed(0)
    for when, tokens in STEPS:
        key, value = (torch.randn(BATCH, HEADS, tokens, DIM, generator=generator) for _ in range(2))
        q = torch.randn(BATCH, 3 * HEADS, tokens, DIM, generator=generator)
        own.observe(q)
        if tokens > 1:
            engine.power[engine.rows] = own.query_power
        own.append(key, value, when=when)
        engine.append(name, key, value, when, q[:, :, 0] if tokens == 1 else None)
        torch.testing.assert_close(engine.power[engine.rows], own.query_power, rtol=1e-6, atol=0)
    assert not engine.power[[1, 2, 4, 6]].any()
    return own, engine


@pytest.mark.parametrize("name", APPENDS)
def test_statistics_of_a_step_count_real_tokens_only(name: str):
    engine = Engine()
    key, q = torch.randn(BATCH, HEADS, 1, DIM), torch.randn(BATCH, 2 * HEADS, DIM, dtype=torch.float16)
    q[1] = torch.nan
    counts, fault = torch.tensor([1, 0, 1], dtype=torch.int32), torch.zeros(BATCH, dtype=torch.int32)
    APPENDS[name](
        engine.view(), key, key, when="after", fault=fault, counts=counts, query_power=engine.power, queries=q
    )  # fmt: skip
    expected = q.float().square().unflatten(1, (HEADS, 2)).sum(2)
    assert torch.equal(engine.power[engine.rows[[0, 2]].long()], expected[[0, 2]])
    assert not engine.power[[0, 1, 2, 4, 6]].any()
    with pytest.raises(InvalidInputError, match="queries: expected"):
        APPENDS[name](engine.view(), key, key, when="after", fault=fault, query_power=engine.power, queries=q[:, :3])


@pytest.mark.parametrize("name", APPENDS)
def test_append_finds_the_rows_of_each_sequence(name: str):
    own, engine = filled(name)
    got = engine.view()
    codes = engine.layout.regions["sink_key"].offset
    for b in range(BATCH):
        expected, found = sequence(own.view(), b), sequence(got, b)
        plain = expected.groups[0].layout
        for region in plain.regions:
            x = engine.layout.read(found.groups[0].pages, region)
            assert torch.equal(x, plain.read(expected.groups[0].pages, region)), region
        assert torch.equal(found.tail_key, expected.tail_key)
        assert torch.equal(found.tail_value, expected.tail_value)
        assert torch.equal(found.sink_key, expected.sink_key)
        assert torch.equal(found.sink_value, expected.sink_value)
    untouched = [row for row in range(7) if row not in engine.rows.tolist()]
    assert engine.tails[0][untouched].isnan().all()
    assert (engine.pool[[0, 1, 10, 11, 22, 23]] == 255).all()  # of no sequence
    assert codes >= packed_bytes(64 * DIM, 2) * 2


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("queries", [1, 5])
def test_attention_finds_the_rows_of_each_sequence(implementation: str, queries: int):
    own, engine = filled("reference")
    q = torch.randn(BATCH, 4, queries, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float16)
    expected = over_cache(q, own.view(), implementation=implementation)
    # A snapshot of the tail goes with sinks that stay where they are.
    view = engine.view()
    copied = replace(view, tail_key=view.tail_key[engine.rows], tail_value=view.tail_value[engine.rows], tail_rows=None)
    for kv in (view, copied):
        found = over_cache(q, kv, implementation=implementation)
        assert torch.equal(found.out, expected.out)
        assert torch.equal(found.lse, expected.lse)
