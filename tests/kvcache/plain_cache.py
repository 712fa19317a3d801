"""A plain cache: lists of exact tokens, and everything that a `LayerCache` must hold for them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from turboattention.config import CacheConfig, presets
from turboattention.kvcache import LayerCache
from turboattention.policy import Override, Policy
from turboattention.quant.codec import encode_pages, expand_pages

HEADS, DIM, RATIO = 3, 64, 2
ROLLBACK = 64  # newest tokens of the latest append that a step leaves exact


def random_tokens(seed: int, batch: int, tokens: int, heads: int = HEADS, dim: int = DIM) -> Tensor:
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def variant(preset: str, **changes: int | str) -> CacheConfig:
    return replace(presets()[preset].cache, **changes)


@dataclass(frozen=True)
class Case:
    config: CacheConfig
    overrides: tuple[Override, ...] = ()
    integrity: str = "off"

    def formats(self, heads: int = HEADS) -> list:
        return Policy("test", self.config, overrides=self.overrides).head_formats(0, heads)

    def cache(self, heads: int = HEADS) -> LayerCache:
        return LayerCache(self.config, self.formats(heads), integrity=self.integrity)


CASES = {
    **{name: Case(preset.cache) for name, preset in presets().items()},
    "turbo4-mixed-heads": Case(
        variant("turbo4", sink_tokens=4), (Override(8, head=1), Override(2, head=2, tensor="value"))
    ),
    "turbo3-pages-of-32-window-40": Case(variant("turbo3", page_size=32, sink_tokens=5, recent_window=40)),
    "key-of-one-head-at-16": Case(variant("turbo2"), (Override(16, head=0, tensor="key"),)),
    "paper4-sinks-and-window": Case(variant("paper4", page_size=32, sink_tokens=3, recent_window=10)),
    "turbo4-verified-at-each-read": Case(variant("turbo4", page_size=32), (Override(8, head=1),), "read"),
    "kivi4-without-window": Case(variant("kivi4", recent_window=0, sink_tokens=2)),
}


@dataclass
class Page:
    """What the test remembers of a compressed page."""

    scales: tuple[Tensor, Tensor] | None
    power: Tensor | None


@dataclass
class Plain:
    """The same cache as lists: one tensor for each token, and no bytes."""

    config: CacheConfig
    compresses: bool
    refines: bool
    starts: Tensor | None
    itemsize: int = 4  # of the tokens of a cache that compresses nothing
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    settled: int = 0
    latest: int = 0
    scales: tuple[Tensor, Tensor] | None = None
    power: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def clamps(self) -> bool:
        return self.config.open_page == "int8_clamped"

    def append(self, key: Tensor, value: Tensor) -> None:
        self.commit()
        dtype = torch.float16 if self.compresses else key.dtype
        if self.scales is None and self.clamps:
            k, v = ((x.to(dtype).float().abs().amax((2, 3), keepdim=True) / 119).half() for x in (key, value))
            self.scales = (k, v)
        self.keys += [key[:, :, t].to(dtype) for t in range(key.shape[2])]
        self.values += [value[:, :, t].to(dtype) for t in range(value.shape[2])]
        self.latest = key.shape[2]

    def observe(self, q: Tensor) -> None:
        if not self.refines:
            return
        squares = q.square().clone()
        for row in range(q.shape[0] if self.starts is not None else 0):
            hidden = int(self.starts[row]) - (len(self.keys) - q.shape[2])
            squares[row, :, : max(0, hidden)] = 0.0
        new = squares.unflatten(1, (HEADS, RATIO)).sum((2, 3))
        self.power = new if self.power is None else self.power + new

    def compress(self, keep: int) -> None:
        size = self.config.page_size
        while self.compresses and len(self.keys) - keep >= (len(self.pages) + 1) * size:
            bound = self.clamps and len(self.pages) * size < self.settled
            self.pages.append(Page(self.scales if bound else None, self.power))

    def commit(self) -> None:
        if not self.keys:
            return
        self.compress(self.config.recent_window)
        first = max(self.settled, len(self.pages) * self.config.page_size)
        for t in range(first, len(self.keys) if self.clamps else 0):
            for tokens, scale in zip((self.keys, self.values), self.scales, strict=True):
                unit = scale[:, :, 0].float()
                tokens[t] = (tokens[t].float() / unit).round().clamp(-119, 119) * unit
        if self.clamps:
            self.settled = len(self.keys)
        self.latest = 0

    def settle(self) -> None:
        self.compress(max(self.config.recent_window, min(self.latest, ROLLBACK)))

    def crop(self, length: int) -> None:
        removed = len(self.keys) - length
        del self.keys[length:], self.values[length:], self.pages[length // self.config.page_size :]
        self.settled, self.latest = min(self.settled, length), max(0, self.latest - removed)
        if length == 0:
            self.scales = self.power = None

    def may_crop(self, length: int) -> bool:
        page_tokens = len(self.pages) * self.config.page_size
        return length >= page_tokens or length % self.config.page_size == 0

    def map(self, rows: list[int]) -> None:
        self.keys, self.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]
        self.starts = None if self.starts is None else self.starts[rows]
        self.scales = _rows(self.scales, rows)
        self.power = None if self.power is None else self.power[rows]
        self.pages = [Page(_rows(p.scales, rows), None if p.power is None else p.power[rows]) for p in self.pages]

    def fork(self) -> "Plain":
        """A copy that goes its own way."""
        return replace(self, keys=list(self.keys), values=list(self.values), pages=list(self.pages))

    def real(self, first: int, count: int) -> Tensor:
        """Tokens that may widen a range: neither padding nor sinks."""
        starts = [0] * self.batch if self.starts is None else self.starts.tolist()
        rows = [[t >= start + self.config.sink_tokens for t in range(first, first + count)] for start in starts]
        return torch.tensor(rows)


def _rows(scales: tuple[Tensor, Tensor] | None, rows: list[int]) -> tuple[Tensor, Tensor] | None:
    return None if scales is None else (scales[0][rows], scales[1][rows])


def assert_same(cache: LayerCache, plain: Plain, verified_pages: int = 0) -> None:
    """Everything the cache holds is what the list says; pages before ``verified_pages`` are not encoded again."""
    size = plain.config.page_size
    page_tokens = len(plain.pages) * size
    assert cache.length == len(plain.keys)
    assert cache.page_tokens == page_tokens
    if not plain.keys:
        assert cache.nbytes == 0
        assert cache.num_values == 0
        return
    key, value = torch.stack(plain.keys, 2), torch.stack(plain.values, 2)
    view = cache.view()
    assert view.length == len(plain.keys)
    assert torch.equal(view.tail_key.float().cpu(), key[:, :, page_tokens:].float())
    assert torch.equal(view.tail_value.float().cpu(), value[:, :, page_tokens:].float())
    if plain.pages:
        assert sorted(h for group in cache.groups for h in group.heads) == list(range(HEADS))
    for group in cache.groups:
        assert group.pages.shape == (plain.batch, len(group.heads), len(plain.pages), group.layout.nbytes)
        heads = list(group.heads)
        for p in range(verified_pages, len(plain.pages)):
            tokens, page = slice(p * size, (p + 1) * size), plain.pages[p]
            expected = encode_pages(
                group.layout,
                key[:, heads, tokens],
                value[:, heads, tokens],
                plain.real(p * size, size)[:, None].expand(-1, len(heads), -1),
                None if page.scales is None else (page.scales[0][:, heads], page.scales[1][:, heads]),
                None if page.power is None else page.power[:, heads],
            )
            assert torch.equal(group.pages[:, :, p].cpu(), expected), f"page {p} of heads {heads}"
    _assert_sinks(cache, plain, key, value)
    _assert_bytes(cache, plain)
    assert cache.num_values == 2 * plain.batch * HEADS * DIM * len(plain.keys)


def _assert_sinks(cache: LayerCache, plain: Plain, key: Tensor, value: Tensor) -> None:
    page_tokens = len(plain.pages) * plain.config.page_size
    for row in range(plain.batch):
        start = 0 if plain.starts is None else int(plain.starts[row])
        for slot in range(plain.config.sink_tokens):
            if start + slot < page_tokens:
                assert torch.equal(cache.sink_key[row, :, slot].float().cpu(), key[row, :, start + slot].float())
                assert torch.equal(cache.sink_value[row, :, slot].float().cpu(), value[row, :, start + slot].float())


def _assert_bytes(cache: LayerCache, plain: Plain) -> None:
    config, rows = plain.config, plain.batch * HEADS
    tail = len(plain.keys) - len(plain.pages) * config.page_size
    settled = max(0, plain.settled - len(plain.pages) * config.page_size)
    expected = sum(plain.batch * len(g.heads) * g.layout.nbytes * len(plain.pages) for g in cache.groups)
    expected += 2 * rows * DIM * (settled + (2 if plain.compresses else plain.itemsize) * (tail - settled))
    expected += 2 * rows * 2 if plain.clamps else 0  # the universal scales of K and V
    if cache.sink_key is not None:
        expected += 2 * rows * config.sink_tokens * DIM * cache.sink_key.element_size()
    expected += 0 if plain.starts is None else 8 * plain.batch
    expected += 0 if plain.power is None else 4 * rows * DIM
    assert cache.nbytes == expected
    # No tensor keeps more memory alive than it shows.
    held = [g.pages for g in cache.groups] + list(cache.open.tensors.values())
    held += [x for x in (cache.sink_key, cache.sink_value) if x is not None]
    assert sum(x.untyped_storage().nbytes() for x in held) == sum(x.nbytes for x in held)


def stored(cache: LayerCache, plain: Plain) -> tuple[Tensor, Tensor]:
    """K and V as attention must see them, float64 ``[batch, heads, tokens, dim]``.

    Pages as their (verified) bytes say, all else and the sinks exact.
    """
    key, value = torch.stack(plain.keys, 2).double(), torch.stack(plain.values, 2).double()
    count = len(plain.pages) * plain.config.page_size
    starts = [0] * plain.batch if plain.starts is None else plain.starts.tolist()
    for group in cache.groups if count else ():
        pages = [x.flatten(2, 3).double() for x in expand_pages(group.layout, group.pages.cpu())]
        for row, start in enumerate(starts):
            columns = torch.arange(count)
            coded = columns[(columns < start) | (columns >= start + plain.config.sink_tokens)]
            for exact, codes in zip((key, value), pages, strict=True):
                for i, head in enumerate(group.heads):
                    exact[row, head, coded] = codes[row, i, coded]
    return key, value


def dense_attention(q: Tensor, key: Tensor, value: Tensor, starts: Tensor | None = None) -> Tensor:
    """Causal attention of the newest ``q.shape[2]`` tokens in float64, as a textbook has it."""
    heads, queries, tokens = q.shape[1], q.shape[2], key.shape[2]
    key, value = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = q.double() @ key.transpose(-2, -1) * q.shape[-1] ** -0.5
    columns, rows = torch.arange(tokens), torch.arange(tokens - queries, tokens)[:, None]
    hidden = (columns > rows)[None]
    if starts is not None:
        hidden = hidden | (columns < starts[:, None, None])
    return torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1).nan_to_num(0.0) @ value


def assert_attention(found: Tensor, expected: Tensor, limit: float) -> None:
    """Relative RMS error of the whole, and of each row against the largest number."""
    found = found.double().cpu()
    assert found.isfinite().all()
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)
    assert error <= limit, f"attention: relative RMS error {float(error):.2e}, limit {limit:.2e}"
    most = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert most <= 8 * limit, f"attention: largest error {float(most):.2e}, limit {8 * limit:.2e}"


def flat(state: object) -> list:
    """Leaves of nested dicts and lists."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in [key, *flat(state[key])]]
    if isinstance(state, list | tuple):
        return [leaf for item in state for leaf in flat(item)]
    return [state.clone() if isinstance(state, Tensor) else state]


def assert_unchanged(cache: LayerCache, before: list) -> None:
    after = flat(cache.state())
    assert len(after) == len(before)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
