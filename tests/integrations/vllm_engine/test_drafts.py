"""Drafts that are taken back leave no trace in pages and tails; needs no vLLM."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from caches import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from turboattention.config import get_preset
from turboattention.integrations.vllm.drafts import Drafts, append_drafts, tail_capacity
from turboattention.ops.append import paged_append_for
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV
from turboattention.quant.layout import PageLayout

HEADS, DIM, SIZE, DRAFTS, PAGES = 2, 64, 64, 5, 4


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any))
def test_rows_and_back(counts: list[int]):
    drafts = Drafts.of(np.array(counts), numbers(*[0] * len(counts)))
    x = normal(sum(counts), 2, 3, seed=1)
    assert torch.equal(drafts.tokens(drafts.rows(x, drafts.right)), x)
    left = drafts.rows(x, drafts.left).transpose(1, 2)
    for row, tokens in enumerate(x.split(counts)):
        assert torch.equal(left[row, : len(tokens)], tokens)
    assert (drafts.left is None) == (len(set(counts)) == 1)


@pytest.mark.parametrize("drafts", [0, 1, 16, 17, 64])
def test_capacity_is_a_page_and_the_drafts(drafts: int):
    assert 64 + drafts <= tail_capacity(drafts) < 64 + drafts + 16


def empty(capacity: int) -> PagedKV:
    cache = get_preset("turbo4").cache
    layout = PageLayout(SIZE, DIM, cache.key, cache.value, cache.sink_tokens)
    pool = torch.zeros(HEADS * PAGES, layout.nbytes, dtype=torch.uint8)
    table = torch.arange(HEADS * PAGES, dtype=torch.int32).view(1, PAGES, HEADS).transpose(1, 2).contiguous()
    key, value = (torch.zeros(1, HEADS, capacity, DIM, dtype=torch.float16) for _ in range(2))
    return PagedKV((PagedGroup(layout, (0, 1), pool, table),), numbers(0), numbers(0), key, value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, DRAFTS)] * 2), min_size=25, max_size=45), st.integers(0, 99))
def test_pages_and_tail_are_those_of_the_accepted_tokens(steps: list[tuple[int, int]], seed: int):
    kv, plain = empty(tail_capacity(DRAFTS)), empty(SIZE)
    append = paged_append_for([kv.groups[0].layout], torch.device("cpu"))
    tokens = normal(2, 1, HEADS, SIZE * PAGES, DIM, seed=seed).half()
    length, fault, none = 0, numbers(0), numbers(0)
    for step, (drafted, accepted) in enumerate(steps):
        count, kept = 1 + drafted, 1 + min(drafted, accepted)
        new = [x[:, :, length : length + count].clone() for x in tokens]
        for x, wrong in zip(new, normal(2, 1, HEADS, count, DIM, seed=1000 + step), strict=True):
            x[:, :, kept:] = 30 * wrong[:, :, kept:].half()  # what is taken back would be seen
        before = replace(kv, lengths=numbers(length), page_tokens=numbers(length // SIZE * SIZE))
        append_drafts(
            append, before, (new[0], new[1]), after=numbers(length + count), counts=numbers(count), none=none,
            fault=fault, query_power=None,
        )  # fmt: skip
        for i in range(length, length + kept):
            at = replace(plain, lengths=numbers(i), page_tokens=numbers(i // SIZE * SIZE))
            append(at, *(x[:, :, i : i + 1] for x in tokens), when="after", fault=fault)
        length += kept
    assert fault.tolist() == [0]
    table = kv.groups[0].table[0, :, : length // SIZE].long()
    assert torch.equal(kv.groups[0].pool[table], plain.groups[0].pool[table])
    open_page = torch.arange(length // SIZE * SIZE, length)
    for ring, stored in ((kv.tail_key, tokens[0]), (kv.tail_value, tokens[1])):
        assert torch.equal(ring[:, :, open_page % ring.shape[2]], stored[:, :, open_page])
