"""The cache of one layer as engines use it: rows of any length in pools of pages, all numbers on the device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turboattention.checks import check_heads
from turboattention.config import CacheConfig, TensorFormat, check_choice
from turboattention.errors import InvalidInputError, UnsupportedError, invalid
from turboattention.kvcache.integrity import INTEGRITIES, Integrity, PoolChecksums, raise_for
from turboattention.ops.append import When, add_query_power, advance, paged_append_for, tail_capacity
from turboattention.ops.append.paged import check_step
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV
from turboattention.quant.layout import PageLayout

HeadFormat = tuple[TensorFormat, TensorFormat]  # of K and of V


class PagedCache:
    """K and V of one layer for a fixed number of rows (sequences), allocated once.

    ``append`` new tokens of all rows, let attention read ``view()``, ``free`` rows for new sequences. Nothing waits for
    the device (on CPUs nothing has to): no method but `check`, `used_nbytes` and `num_values` reads a number from it.
    """

    def __init__(
        self,
        config: CacheConfig,
        formats: Sequence[HeadFormat],
        *,
        rows: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        max_step: int = 1,
        shuffle: int | None = None,
        append: Callable[..., None] | None = None,
        integrity: Integrity = "off",
    ) -> None:
        """Allocate everything.

        config: page size, sinks, recent window. formats: of K and V for each KV head. rows, max_tokens: sequences and
        the length of each. dtype: of the exact tokens. max_step: most new tokens of a step with ``when="before"``.
        shuffle: seed of a random order of the pages in the pools; None: in order. append: an implementation of
        `ops.append.paged.append_paged`; None: the one for the device. integrity: a debug mode that keeps a checksum of
        each page (see `verify`): ``demand``, or ``read`` to verify at every ``view`` as well; both wait for the device.
        Raises InvalidInputError and, for formats that the device's kernel can't write, UnsupportedError.
        """
        if config.open_page != "exact" or config.low_priority_heads:
            raise UnsupportedError("paged cache: the paper's clamped buffer and low-priority heads need LayerCache")
        if rows < 1 or max_tokens < 1 or max_step < 1:
            raise invalid("rows, max_tokens, max_step", "1 or more each", (rows, max_tokens, max_step))
        check_choice("integrity", integrity, INTEGRITIES)
        self.config = config
        self.formats = tuple(formats)
        self.max_step = max_step
        place = torch.device(device)
        heads, size = len(self.formats), config.page_size
        capacity = tail_capacity(size, config.recent_window, max_step, "before")
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=place)
        self.page_tokens = torch.zeros_like(self.lengths)
        self.fault = torch.zeros_like(self.lengths)
        self.tail_key = torch.zeros(rows, heads, capacity, head_dim, dtype=dtype, device=place)
        self.tail_value = torch.zeros_like(self.tail_key)
        sinks = (rows, heads, config.sink_tokens, head_dim)
        self.sink_key = torch.zeros(sinks, dtype=dtype, device=place) if config.sink_tokens else None
        self.sink_value = None if self.sink_key is None else torch.zeros_like(self.sink_key)
        refines = any(key.refined_channels(head_dim) for key, _ in self.formats)
        self.query_power = torch.zeros(rows, heads, head_dim, device=place) if refines else None
        pages = -(-max_tokens // size)
        self.groups = tuple(
            _group(PageLayout(size, head_dim, *pair), self.formats, rows, pages, shuffle, place)
            for pair in dict.fromkeys(self.formats)
        )
        self._verify_views = integrity == "read"
        self._checksums = () if integrity == "off" else tuple(PoolChecksums(group) for group in self.groups)
        self._append = append or paged_append_for([group.layout for group in self.groups], place)

    def append(
        self,
        key: Tensor,
        value: Tensor,
        *,
        when: When = "before",
        counts: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add tokens ``[rows, kv_heads, n, head_dim]`` to every row; arguments as `ops.append.paged.append_paged`.

        ``before`` (decode) compresses what was there before, ``after`` (a chunk of a prompt) the new tokens as well;
        in both cases all but the recent window. A row with ``counts`` 0 gets nothing.
        Raises InvalidInputError for shapes; bad values and a full table set bits of ``fault``, see `check`. When memory
        ends (torch.OutOfMemoryError) nothing is added; only checksums may fail after it, which `verify` then finds.
        """
        size, window = self.config.page_size, self.config.recent_window
        view = self.view()
        check_step(
            view, key, value, when=when, fault=self.fault, window=window, counts=counts, rope=rope,
            query_power=self.query_power,
        )  # fmt: skip
        # All that needs memory comes before what changes the cache.
        lengths, page_tokens = advance(
            self.lengths, self.page_tokens, key.shape[2], when=when, page_size=size, window=window, counts=counts
        )
        pages = (self.page_tokens // size, page_tokens // size) if self._checksums else None
        self._append(
            view, key, value, when=when, fault=self.fault, window=window, counts=counts, rope=rope,
            query_power=self.query_power,
        )  # fmt: skip
        # In place, because captured graphs read these tensors.
        self.lengths.copy_(lengths)
        self.page_tokens.copy_(page_tokens)
        if pages is not None:
            for sums in self._checksums:
                sums.written(*pages)

    def observe(self, q: Tensor, counts: Tensor | None = None) -> None:
        """See the queries ``[rows, heads, n, head_dim]`` of the newest tokens: they tell where K matters.

        counts: int32 ``[rows]``, the first so many of each row are real.
        """
        if self.query_power is None:
            return
        rows, heads, dim = self.query_power.shape
        check_heads("q", q, head_dim=dim)
        if q.shape[0] != rows or q.shape[1] % heads:
            raise invalid("q", f"{rows} rows and a multiple of {heads} heads", f"shape {tuple(q.shape)}")
        real = None if counts is None else torch.arange(q.shape[2], device=q.device) < counts[:, None]
        self.query_power.copy_(add_query_power(self.query_power, q, heads, real))

    def view(self) -> PagedKV:
        """What attention reads, always up to date: it owns nothing. Verified first with ``integrity="read"``."""
        if self._verify_views:
            self.verify()
        return PagedKV(
            self.groups, self.lengths, self.page_tokens, self.tail_key, self.tail_value, self.sink_key, self.sink_value
        )

    def free(self, rows: Tensor | Sequence[int]) -> None:
        """Empty some rows (a tensor of row numbers on the device, or host numbers); their next token is their first."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.lengths.device)
        for x in (self.lengths, self.page_tokens, self.fault, self.query_power):
            if x is not None:
                x.index_fill_(0, index, 0)
        for sums in self._checksums:
            sums.freed(index)

    def verify(self) -> None:
        """Raise IntegrityError unless every page holds what was written and the table says where it is.

        With ``integrity`` on. Finds flipped bits, pages written after they were freed or by others, table entries that
        point elsewhere, pages read that no append wrote. Exact tokens (tail, sinks) are not covered: they change.
        """
        pages = self.page_tokens // self.config.page_size
        raise_for([text for sums in self._checksums for text in sums.differences(pages)])

    def check(self) -> None:
        """Wait for the device and raise InvalidInputError for rows whose tokens are unusable."""
        for row, bits in enumerate(self.fault.tolist()):
            if bits:
                reasons = ("NaN, Inf or a value beyond the dtype", "a range beyond float16", "more tokens than fit")
                found = ", ".join(reason for bit, reason in enumerate(reasons) if bits >> bit & 1)
                raise InvalidInputError(f"row {row}: expected finite values and room, received {found}; free the row")

    @property
    def nbytes(self) -> int:
        """Every byte allocated: pools, tables, tails, sinks, lengths, query statistics."""
        tensors = [x for group in self.groups for x in (group.pool, group.table)]
        tensors += [self.lengths, self.page_tokens, self.fault, self.tail_key, self.tail_value]
        tensors += [x for x in (self.sink_key, self.sink_value, self.query_power) if x is not None]
        return sum(x.nbytes for x in tensors)

    @property
    def used_nbytes(self) -> int:
        """Bytes of the tokens held: their pages, exact tail, sinks and query statistics. Waits for the device."""
        paged: list[int] = self.page_tokens.tolist()
        lengths: list[int] = self.lengths.tolist()
        page = sum(len(group.heads) * group.layout.nbytes for group in self.groups)
        token = 2 * len(self.formats) * self.tail_key.shape[3] * self.tail_key.itemsize
        exact = sum(lengths) - sum(paged) + sum(min(n, self.config.sink_tokens) for n in lengths)
        statistics = 0 if self.query_power is None else self.query_power[0].nbytes * sum(n > 0 for n in lengths)
        return sum(paged) // self.config.page_size * page + exact * token + statistics

    @property
    def num_values(self) -> int:
        """Values of K and V that the cache stands for. Waits for the device."""
        return 2 * len(self.formats) * self.tail_key.shape[3] * int(self.lengths.sum())


def _group(
    layout: PageLayout,
    formats: tuple[HeadFormat, ...],
    rows: int,
    pages: int,
    shuffle: int | None,
    device: torch.device,
) -> PagedGroup:
    """The heads with the formats of ``layout``, a pool for all their pages and a table of all its places."""
    heads = tuple(h for h, pair in enumerate(formats) if pair == (layout.key, layout.value))
    count = rows * len(heads) * pages
    if shuffle is None:
        order = torch.arange(count, dtype=torch.int32)
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(shuffle)).to(torch.int32)
    table = order.view(rows, len(heads), pages).to(device)
    return PagedGroup(layout, heads, torch.zeros(count, layout.nbytes, dtype=torch.uint8, device=device), table)
