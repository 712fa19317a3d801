"""Synthetic keys, values and queries, and the two caches made of them: 16 bits, and pages of codes.

One sequence of at most `BASE_TOKENS` tokens is made and quantised; longer ones repeat it and batches copy it, each copy
to its own place in memory: the traffic of a real batch without quantising it all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboattention.bench.case import Case
from turboattention.errors import UnsupportedError
from turboattention.ops.append import compress_pages, real_tokens, reference
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV
from turboattention.quant.codec import expand_pages
from turboattention.quant.layout import PageLayout

BASE_TOKENS = 8192
OUTLIER_CHANNELS = 4
OUTLIER_MEAN = 8.0


@dataclass(frozen=True)
class Sequence16:
    """One sequence in 16 bits: ``key``, ``value`` ``[kv_heads, tokens, head_dim]``; token t is ``t % tokens``.

    peaked, flat: queries ``[batch, query_heads, 1, head_dim]``, whose weights lie on few or on many tokens.
    """

    key: Tensor
    value: Tensor
    peaked: Tensor
    flat: Tensor

    def tokens(self, head: int, length: int) -> tuple[Tensor, Tensor]:
        """K and V of the first ``length`` tokens of a head, ``[length, head_dim]``."""
        index = torch.arange(length, device=self.key.device) % self.key.shape[1]
        return self.key[head, index], self.value[head, index]


@dataclass(frozen=True)
class Cache16:
    """16-bit K and V of a batch, packed: ``[tokens of all sequences x kv_heads, head_dim]``.

    Head h of sequence b begins at row ``offsets[b] * kv_heads + h * lengths[b]``; so an even batch is dense.
    """

    key: Tensor
    value: Tensor
    lengths: tuple[int, ...]
    kv_heads: int

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V as ``[batch, kv_heads, tokens, head_dim]``; raises UnsupportedError for unequal lengths."""
        if len(set(self.lengths)) > 1:
            raise UnsupportedError("needs sequences of one length")
        shape = (len(self.lengths), self.kv_heads, self.lengths[0], -1)
        return self.key.view(shape), self.value.view(shape)

    def sequences(self) -> list[tuple[Tensor, Tensor]]:
        """K and V of each sequence as ``[kv_heads, tokens, head_dim]``."""
        sizes = [length * self.kv_heads for length in self.lengths]
        pairs = zip(self.key.split(sizes), self.value.split(sizes), strict=True)
        return [(k.unflatten(0, (self.kv_heads, -1)), v.unflatten(0, (self.kv_heads, -1))) for k, v in pairs]

    def copy(self) -> "Cache16":
        return Cache16(self.key.clone(), self.value.clone(), self.lengths, self.kv_heads)


def dtype_of(device: torch.device) -> torch.dtype:
    """The 16-bit type of a device: CPUs compute bfloat16 faster than float16."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def generator_on(device: torch.device, seed: int = 0) -> torch.Generator:
    """A source of random numbers on ``device``."""
    return torch.Generator(device=device).manual_seed(seed)


def realistic(heads: int, tokens: int, head_dim: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """float32 K with a few channels of large mean, as real keys have, and V whose size depends on the token."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=random.device, generator=random)

    spread, mean = torch.exp(0.4 * normal(heads, 1, head_dim)), 0.3 * normal(heads, 1, head_dim)
    outliers = torch.randperm(head_dim, device=random.device, generator=random)[:OUTLIER_CHANNELS]
    mean[..., outliers] = OUTLIER_MEAN * torch.sign(normal(heads, 1, OUTLIER_CHANNELS))
    spread[..., outliers] = 1.5
    key = normal(heads, tokens, head_dim) * spread + mean
    value = normal(heads, tokens, head_dim) * torch.exp(0.3 * normal(heads, tokens, 1))
    return key, value


def synthetic(case: Case, device: torch.device) -> Sequence16:
    """The sequence that all of ``case`` is made of, and queries for it."""
    random = generator_on(device)
    size = case.config.page_size
    tokens = min(BASE_TOKENS, -(-max(case.lengths) // size) * size)
    key, value = realistic(case.kv_heads, tokens, case.head_dim, random)
    shape = (case.batch, case.kv_heads, case.query_heads // case.kv_heads, case.head_dim)
    noise = torch.randn(shape, device=device, generator=random)
    chosen = torch.randint(min(tokens, *case.lengths), shape[:3], device=device, generator=random)
    heads = torch.arange(case.kv_heads, device=device)[None, :, None]
    centred = (key - key.mean(1, keepdim=True))[heads, chosen]
    dtype = dtype_of(device)
    peaked, flat = ((x.flatten(1, 2).unsqueeze(2)).to(dtype).contiguous() for x in (noise + centred, 0.5 * noise))
    return Sequence16(key.to(dtype), value.to(dtype), peaked, flat)


def make_cache16(case: Case, base: Sequence16) -> Cache16:
    """All tokens in 16 bits."""
    parts: list[list[Tensor]] = [[], []]
    for length in case.lengths:
        index = torch.arange(length, device=base.key.device) % base.key.shape[1]
        for part, x in zip(parts, (base.key, base.value), strict=True):
            part.append(x[:, index].flatten(0, 1))
    return Cache16(torch.cat(parts[0]), torch.cat(parts[1]), case.lengths, case.kv_heads)


def check_form(case: Case) -> None:
    """Raise UnsupportedError for forms that a paged cache does not hold."""
    if case.config.low_priority_heads or case.config.open_page != "exact":
        raise UnsupportedError(f"{case.form}: heads chosen while running and an 8-bit open page have no paged cache")


def query_power(base: Sequence16) -> Tensor:
    """Squared queries of each KV head and channel, ``[kv_heads, head_dim]``: they choose the refined channels."""
    grouped = base.peaked.float().squeeze(2).unflatten(1, (base.key.shape[0], -1))
    power: Tensor = grouped.square().sum((0, 2))
    return power


def make_paged(case: Case, base: Sequence16) -> PagedKV:
    """The cache after the newest token was appended: pages were compressed before it came, so it is exact."""
    check_form(case)
    config, device, heads = case.config, base.key.device, case.kv_heads
    layout = PageLayout(config.page_size, case.head_dim, config.key, config.value)
    size, sinks = config.page_size, config.sink_tokens
    kept = tuple(max(0, length - 1 - config.recent_window) // size * size for length in case.lengths)
    group = _group(layout, encode_base(layout, base, sinks), [tokens // size for tokens in kept], case.order)
    capacity = size + config.recent_window
    slots = torch.arange(capacity, device=device)
    lengths, pages = (torch.tensor(x, dtype=torch.int32, device=device) for x in (case.lengths, kept))
    token = pages[:, None] + (slots - pages[:, None]) % capacity
    tails = []
    for x in (base.key, base.value):
        tail = x[:, token % base.key.shape[1]].transpose(0, 1)
        # Slots without a token hold anything in a real cache; NaN shows when one of them is read.
        tails.append(torch.where((token < lengths[:, None])[:, None, :, None], tail, torch.nan).contiguous())
    exact = [x[None, :, :sinks].expand(case.batch, heads, sinks, -1).contiguous() for x in (base.key, base.value)]
    sink = exact if sinks else [None, None]
    return PagedKV((group,), lengths, pages, tails[0], tails[1], sink[0], sink[1])


def encode_base(layout: PageLayout, base: Sequence16, sinks: int) -> Tensor:
    """The pages of the sequence, ``[kv_heads, pages, layout.nbytes]``; on CPUs by the kernel with the same bytes."""
    compress = compress_pages if base.key.device.type == "cpu" else reference.compress_pages
    valid = real_tokens(0, base.key.shape[1], None, sinks, base.key.device)
    return compress(layout, base.key[None], base.value[None], valid, None, query_power(base)[None])[0]


def _group(layout: PageLayout, pages: Tensor, counts: Sequence[int], order: str) -> PagedGroup:
    heads, available = pages.shape[:2]
    device = pages.device
    total = heads * sum(counts)
    place = torch.arange(total, device=device)
    if order == "random":
        place = torch.randperm(total, device=device, generator=generator_on(device, 1))
    table = torch.zeros(len(counts), heads, max(1, *counts), dtype=torch.int32, device=device)
    source = torch.empty(total, dtype=torch.int64, device=device)
    first = 0
    for row, count in enumerate(counts):
        used = place[first : first + heads * count].view(heads, count)
        table[row, :, :count] = used
        which = torch.arange(count, device=device) % available + available * torch.arange(heads, device=device)[:, None]
        source[used] = which
        first += heads * count
    pool = pages.flatten(0, 1)[source] if total else pages.new_zeros(1, layout.nbytes)
    return PagedGroup(layout, tuple(range(heads)), pool, table)


def copy_paged(kv: PagedKV) -> PagedKV:
    """The same cache elsewhere in memory. What is small is shared."""
    groups = tuple(PagedGroup(g.layout, g.heads, g.pool.clone(), g.table) for g in kv.groups)
    tails = (kv.tail_key.clone(), kv.tail_value.clone())
    return PagedKV(groups, kv.lengths, kv.page_tokens, *tails, kv.sink_key, kv.sink_value)


def bytes_read(case: Case, kv: PagedKV) -> int:
    """Bytes of pages, exact tokens and sinks that attention reads (the page table, 4 bytes a page, is not counted)."""
    pages = sum(g.pool.shape[0] * g.layout.nbytes for g in kv.groups) if int(kv.page_tokens.max()) else 0
    token = 2 * case.kv_heads * case.head_dim * kv.tail_key.element_size()
    exact = case.total_tokens - int(kv.page_tokens.sum())
    sinks = 0 if kv.sink_key is None else kv.sink_key.shape[2] * case.batch
    return pages + (exact + sinks) * token


def expand_sequence(kv: PagedKV, sequence: int, head: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence and head as float64 ``[length, head_dim]``: what the codes mean, sinks and tail exact."""
    length, paged = int(kv.lengths[sequence]), int(kv.page_tokens[sequence])
    group = next(g for g in kv.groups if head in g.heads)
    ids = group.table[sequence, group.heads.index(head), : paged // group.layout.page_size].long()
    tail = torch.arange(paged, length, device=ids.device) % kv.tail_key.shape[2]
    both = []
    codes = expand_pages(group.layout, group.pool[ids])
    for paged_part, tails, sinks in zip(codes, (kv.tail_key, kv.tail_value), (kv.sink_key, kv.sink_value), strict=True):
        x = torch.cat([paged_part.flatten(0, 1).double(), tails[sequence, head, tail].double()])
        if sinks is not None and paged:
            x[: sinks.shape[2]] = sinks[sequence, head].double()
        both.append(x)
    return both[0], both[1]
