"""A plain paged cache: for each row the exact tokens, its pages in a pool with an owner count, and no codes."""

from dataclasses import dataclass, field, replace

import torch
from plain_cache import dense_attention
from torch import Tensor

from turboattention.config import CacheConfig, TensorFormat, presets
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.common.paged_kv import PagedGroup
from turboattention.quant.codec import encode_pages, expand_pages

ROWS, HEADS, RATIO, DIM, MAX_STEP, MAX_TOKENS = 3, 3, 2, 64, 5, 320
NOWHERE = 2**30  # of a table entry that no page belongs to


def config_of(preset: str, **changes: int) -> CacheConfig:
    return replace(presets()[preset].cache, **changes)


CONFIGS = {
    "int8": config_of("int8"),
    "turbo4": config_of("turbo4"),
    "turbo2-pages-of-32-window-7-sinks-5": config_of("turbo2", page_size=32, sink_tokens=5, recent_window=7),
    "kivi4-without-window": config_of("kivi4", recent_window=0),
}


def formats_of(config: CacheConfig) -> list[tuple[TensorFormat, TensorFormat]]:
    """The middle head has a format of its own."""
    return [(config.key, config.value), (presets()["int8"].cache.key, config.value), (config.key, config.value)]


@dataclass
class Row:
    """One sequence: tokens ``[heads, dim]`` each, and of each full page its places by group and its statistics."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    power: Tensor = field(default_factory=lambda: torch.zeros(HEADS, DIM))
    pages: list[list[list[int]]] = field(default_factory=list)  # [page][group][head of the group]
    powers: list[Tensor] = field(default_factory=list)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """K and V ``[heads, tokens, dim]``."""
        return torch.stack(self.keys, 1), torch.stack(self.values, 1)


class PlainPaged:
    """What a `PagedCache` with the table of this class must hold."""

    def __init__(self, config: CacheConfig, cache: PagedCache) -> None:
        self.config, self.cache = config, cache
        self.rows = [Row() for _ in range(ROWS)]
        self.owners = [[0] * len(group.pool) for group in cache.groups]
        self.free_places = [list(range(len(group.pool))) for group in cache.groups]
        for group in cache.groups:
            group.table.fill_(NOWHERE)

    def page_tokens(self, row: int) -> int:
        return len(self.rows[row].pages) * self.config.page_size

    def plan(self, row: int, length: int, new: int, when: str) -> int:
        """Pages that a row has after a step."""
        final = (length + new if when == "after" else length) - self.config.recent_window
        return max(len(self.rows[row].pages), max(0, final) // self.config.page_size)

    def allocate(self, row: int, count: int, pick: int) -> None:
        """Give a row places for ``count`` pages in all and put them into the table; ``pick`` says which."""
        state = self.rows[row]
        for page in range(len(state.pages), count):
            places = []
            for number, group in enumerate(self.cache.groups):
                free = self.free_places[number]
                taken = [free.pop((pick + 7 * page) % len(free)) for _ in group.heads]
                for place in taken:
                    self.owners[number][place] += 1
                group.table[row, :, page] = torch.tensor(taken, dtype=torch.int32)
                places.append(taken)
            state.pages.append(places)
            state.powers.append(state.power.clone())

    def room(self, row: int) -> int:
        """Tokens that a row may still get: the table ends there, and every row can have its share of the pool."""
        return MAX_TOKENS - len(self.rows[row].keys)

    def share(self, source: int, row: int, pages: int) -> None:
        """``row``, empty, begins with the first pages of ``source``: as prefix caching has it."""
        a, b, size = self.rows[source], self.rows[row], self.config.page_size
        b.keys, b.values = a.keys[: pages * size], a.values[: pages * size]
        b.pages, b.powers, b.power = a.pages[:pages], a.powers[:pages], a.power.clone()
        for places in b.pages:
            for number, taken in enumerate(places):
                for place in taken:
                    self.owners[number][place] += 1
        cache = self.cache
        for group in cache.groups:
            group.table[row, :, :pages] = group.table[source, :, :pages]
        cache.lengths[row] = cache.page_tokens[row] = pages * size
        for x in (cache.sink_key, cache.sink_value, cache.query_power):
            if x is not None:
                x[row] = x[source]

    def free(self, row: int) -> None:
        for places in self.rows[row].pages:
            for number, taken in enumerate(places):
                for place in taken:
                    self.owners[number][place] -= 1
                    if not self.owners[number][place]:
                        self.free_places[number].append(place)
        for group in self.cache.groups:
            group.table[row] = NOWHERE
        self.rows[row] = Row()

    def poison(self) -> None:
        """Garbage wherever no token is: free pages, free slots of the tails, sinks of rows without any."""
        cache, capacity = self.cache, self.cache.tail_key.shape[2]
        for group, owners in zip(cache.groups, self.owners, strict=True):
            group.pool[[place for place, count in enumerate(owners) if not count]] = 255
        for number, row in enumerate(self.rows):
            used = {t % capacity for t in range(self.page_tokens(number), len(row.keys))}
            free = [slot for slot in range(capacity) if slot not in used]
            cache.tail_key[number][:, free] = torch.nan
            cache.tail_value[number][:, free] = torch.nan
            if cache.sink_key is not None and cache.sink_value is not None:
                cache.sink_key[number, :, len(row.keys) :] = torch.nan
                cache.sink_value[number, :, len(row.keys) :] = torch.nan

    def encoded(self, row: int, page: int, group: PagedGroup) -> Tensor:
        """The bytes ``[heads of the group, nbytes]`` that a page must have."""
        state, size, heads = self.rows[row], self.config.page_size, list(group.heads)
        tokens = range(page * size, (page + 1) * size)
        key, value = (torch.stack([x[t][heads] for t in tokens], 1) for x in (state.keys, state.values))
        valid = torch.tensor([t >= self.config.sink_tokens for t in tokens])
        power = None if self.cache.query_power is None else state.powers[page][heads]
        return encode_pages(group.layout, key, value, valid.expand(len(heads), -1), query_power=power)

    def assert_same(self, verified: list[int]) -> None:
        """Lengths, tails, sinks, table and pages; of each row pages before ``verified`` are not encoded again."""
        cache, capacity = self.cache, self.cache.tail_key.shape[2]
        assert cache.fault.tolist() == [0] * ROWS
        assert cache.lengths.tolist() == [len(row.keys) for row in self.rows]
        assert cache.page_tokens.tolist() == [self.page_tokens(row) for row in range(ROWS)]
        for number, row in enumerate(self.rows):
            for index, group in enumerate(cache.groups):
                table = torch.tensor([places[index] for places in row.pages], dtype=torch.int32)
                assert torch.equal(group.table[number, :, : len(row.pages)].cpu().T, table.view(-1, len(group.heads)))
                for page in range(verified[number], len(row.pages)):
                    found = group.pool[row.pages[page][index]].cpu()
                    assert torch.equal(found, self.encoded(number, page, group)), f"row {number}, page {page}"
            if not row.keys:
                continue
            slots = torch.arange(self.page_tokens(number), len(row.keys))
            for found, exact, sinks in zip(
                (cache.tail_key, cache.tail_value), row.tokens(), (cache.sink_key, cache.sink_value), strict=True
            ):
                assert torch.equal(found[number].cpu()[:, slots % capacity], exact[:, slots])
                if sinks is not None:
                    count = min(self.config.sink_tokens, len(row.keys))
                    assert torch.equal(sinks[number].cpu()[:, :count], exact[:, :count])
            if cache.query_power is not None:
                assert torch.equal(cache.query_power[number].cpu(), row.power)

    def attention(self, q: Tensor, row: int, *, exact: bool) -> Tensor:
        """Of ``q [heads, 1, dim]`` in float64, over the exact tokens or over what the pages stand for."""
        state, size = self.rows[row], self.config.page_size
        key, value = (x.double() for x in state.tokens())
        for number, group in enumerate(self.cache.groups if not exact else ()):
            for page, places in enumerate(state.pages):
                coded = torch.arange(page * size, (page + 1) * size)
                coded = coded[coded >= self.config.sink_tokens]
                parts = expand_pages(group.layout, group.pool[places[number]].cpu())
                for full, codes in zip((key, value), parts, strict=True):
                    for i, head in enumerate(group.heads):
                        full[head, coded] = codes[i, coded - page * size].double()
        return dense_attention(q[None], key[None], value[None])[0]
