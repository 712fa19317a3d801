"""Random steps of an engine on a `PagedCache` beside a plain one (hypothesis state machine).

Sequences grow, are preempted and freed, share pages, take drafts and lose some of them; pages go from one to another.
`tests/kvcache/test_paged.py` runs it shortly, `benchmarks/fuzz.py` for as long as one likes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from cache_machine import FORMAT_LIMITS, KERNEL_LIMIT
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from plain_cache import assert_attention
from plain_paged import CONFIGS, DIM, HEADS, MAX_STEP, MAX_TOKENS, RATIO, ROWS, PlainPaged, formats_of
from torch import Tensor

from turboattention.kvcache.paged import PagedCache
from turboattention.ops.append import advance
from turboattention.ops.append.packed import Packed
from turboattention.ops.append.paged import NOT_FINITE
from turboattention.ops.common.paged_kv import PagedKV
from turboattention.ops.decode import paged_decode
from turboattention.ops.dispatch import Implementation

row_numbers = st.integers(0, ROWS - 1)


def counts_up_to(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(0, most)] * ROWS)


class PagedMachine(RuleBasedStateMachine):
    def __init__(
        self,
        name: str,
        append: Callable[..., None] | None = None,
        implementation: Implementation | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.name, self.device, self.implementation = name, device, implementation
        self.config = CONFIGS[name]
        self.append_paged = append

    @initialize(seed=st.integers(0, 999), counts=counts_up_to(150))
    def start(self, seed: int, counts: tuple[int, ...]) -> None:
        self.cache = PagedCache(
            self.config, formats_of(self.config), rows=ROWS, max_tokens=MAX_TOKENS, head_dim=DIM, max_step=MAX_STEP,
            append=self.append_paged, device=self.device,
        )  # fmt: skip
        self.plain = PlainPaged(self.config, self.cache)
        self.seed, self.verified, self.drafts = seed, [0] * ROWS, [0] * ROWS
        self.chunk(counts)

    def random(self, heads: int, tokens: int) -> Tensor:
        self.seed += 1
        return torch.randn(ROWS, heads, tokens, DIM, generator=torch.Generator().manual_seed(self.seed))

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """K, V and queries; squares of the queries have exact sums in any order."""
        key, value, q = (self.random(heads, count) for heads in (HEADS, HEADS, HEADS * RATIO))
        key[..., 5] = key[..., 5] * 4.0 + 10.0
        return key.half(), value.half(), (q * 4).round() / 4

    def take(self, key: Tensor, value: Tensor, q: Tensor, counts: list[int], when: str, packed: bool = False) -> None:
        """One step of both caches; queries of a chunk are seen before its pages are compressed."""
        longest = max(1, *counts)
        told = torch.tensor(counts, dtype=torch.int32, device=self.device)
        key, value, q = (x[:, :, :longest] for x in (key, value, q))
        squares = q.square().unflatten(1, (HEADS, RATIO)).sum(2)
        if when == "after":
            self.cache.observe(q.to(self.device), told)
        for row, count in enumerate(counts):
            state = self.plain.rows[row]
            if when == "after" and self.cache.query_power is not None:
                state.power = state.power + squares[row, :, :count].sum(1)
            length = len(state.keys)
            state.keys += [key[row, :, t] for t in range(count)]
            state.values += [value[row, :, t] for t in range(count)]
            self.plain.allocate(row, self.plain.plan(row, length, count, when), self.seed)
            if when == "before" and self.cache.query_power is not None:
                state.power = state.power + squares[row, :, :count].sum(1)
        if packed:
            self.append_packed(key, value, counts, when)
        else:
            self.cache.append(key.to(self.device), value.to(self.device), when=when, counts=told)
        if when == "before":
            self.cache.observe(q.to(self.device), told)
        self.drafts = list(counts) if when == "before" else [0] * ROWS

    def append_packed(self, key: Tensor, value: Tensor, counts: list[int], when: str) -> None:
        """The real tokens alone, one sequence after the other, as engines hand them over."""
        told = torch.tensor(counts, dtype=torch.int32, device=self.device)
        starts = torch.cat([told.new_zeros(1), told.cumsum(0, dtype=torch.int32)[:-1]])
        key, value = (
            torch.cat([x[row, :, :count] for row, count in enumerate(counts)], 1)[None].to(self.device)
            for x in (key, value)
        )
        cache, window = self.cache, self.config.recent_window
        cache._append(
            cache.view(), key, value, when=when, fault=cache.fault, window=window, counts=told,
            query_power=cache.query_power, packed=Packed(starts, max(counts)),
        )  # fmt: skip
        lengths, page_tokens = advance(
            cache.lengths, cache.page_tokens, max(counts), when=when, page_size=self.config.page_size, window=window,
            counts=told,
        )  # fmt: skip
        cache.lengths.copy_(lengths)
        cache.page_tokens.copy_(page_tokens)

    def fitting(self, counts: tuple[int, ...]) -> list[int]:
        return [min(count, self.plain.room(row)) for row, count in enumerate(counts)]

    @rule(counts=counts_up_to(MAX_STEP))
    def decode(self, counts: tuple[int, ...]) -> None:
        self.take(*self.tokens(MAX_STEP), self.fitting(counts), "before")

    @rule(counts=st.one_of(counts_up_to(90), counts_up_to(3)))
    def chunk(self, counts: tuple[int, ...]) -> None:
        self.take(*self.tokens(max(1, *counts)), self.fitting(counts), "after")

    @rule(counts=counts_up_to(70), when=st.sampled_from(["before", "after"]))
    def packed(self, counts: tuple[int, ...], when: str) -> None:
        most = MAX_STEP if when == "before" else 70
        fitting = self.fitting(tuple(min(count, most) for count in counts))
        if any(fitting):
            self.take(*self.tokens(most), fitting, when, packed=True)

    @rule(rejected=counts_up_to(MAX_STEP))
    def reject_drafts(self, rejected: tuple[int, ...]) -> None:
        """The newest tokens of the latest decode step are taken back: only the lengths change."""
        for row, count in enumerate(rejected):
            count = min(count, self.drafts[row])
            state = self.plain.rows[row]
            state.keys, state.values = (x[: len(x) - count] for x in (state.keys, state.values))
            self.cache.lengths[row] -= count
        self.drafts = [0] * ROWS

    @rule(row=row_numbers)
    def free(self, row: int) -> None:
        self.cache.free([row])
        self.plain.free(row)
        self.verified[row] = self.drafts[row] = 0

    @rule(row=row_numbers)
    def preempt(self, row: int) -> None:
        """Freed, and later computed again from its tokens: in one chunk."""
        state = self.plain.rows[row]
        self.free(row)
        if state.keys:
            key, value = (x.expand(ROWS, -1, -1, -1) for x in state.tokens())
            q = (self.random(HEADS * RATIO, key.shape[2]) * 4).round() / 4
            self.take(key, value, q, [len(state.keys) if r == row else 0 for r in range(ROWS)], "after")

    @rule(source=row_numbers, row=row_numbers, pages=st.integers(1, 3))
    def share_prefix(self, source: int, row: int, pages: int) -> None:
        pages = min(pages, len(self.plain.rows[source].pages))
        if source != row and pages and self.config.page_size * pages >= self.config.sink_tokens:
            self.free(row)
            self.plain.share(source, row, pages)

    @rule(row=row_numbers, value=st.sampled_from([torch.nan, torch.inf]))
    def bad_token(self, row: int, value: float) -> None:
        """The fault is said of its row, and freeing the row is the way out."""
        counts = self.fitting((1,) * ROWS)
        key, tokens, q = self.tokens(1)
        if counts[row]:
            key[row, 1, 0, 3] = value
            self.take(key, tokens, q, counts, "before")
            assert self.cache.fault.tolist() == [NOT_FINITE if r == row else 0 for r in range(ROWS)]
            self.free(row)

    @rule()
    def poison(self) -> None:
        self.plain.poison()

    @rule()
    def attend(self) -> None:
        """Decode of all rows that hold tokens against float64 over the codes and, for int8, over the exact tokens."""
        held = [row for row in range(ROWS) if self.plain.rows[row].keys]
        if not held:
            return
        q = self.random(HEADS * RATIO, 1)[held]
        view = self.cache.view()
        index = torch.tensor(held, device=self.device)
        groups = tuple(replace(group, table=group.table[index]) for group in view.groups)
        rows = (
            None if x is None else x[index]
            for x in (view.lengths, view.page_tokens, view.tail_key, view.tail_value, view.sink_key, view.sink_value)
        )
        found = paged_decode(q.to(self.device), PagedKV(groups, *rows), implementation=self.implementation).out
        for i, row in enumerate(held):
            assert_attention(found[i], self.plain.attention(q[i], row, exact=False), KERNEL_LIMIT)
            if self.name in FORMAT_LIMITS:
                assert_attention(found[i], self.plain.attention(q[i], row, exact=True), FORMAT_LIMITS[self.name])

    @invariant()
    def same(self) -> None:
        if hasattr(self, "plain"):
            self.plain.assert_same(self.verified)
            self.verified = [len(row.pages) for row in self.plain.rows]

    def teardown(self) -> None:
        """All pages once more, also those verified when they were new."""
        if hasattr(self, "plain") and not self.cache.fault.any():
            self.plain.assert_same([0] * ROWS)
