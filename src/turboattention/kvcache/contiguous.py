"""The cache of one layer: compressed pages, oldest first, then the open page; all sequences of a batch equally long."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from turboattention.checks import check_heads
from turboattention.config import CacheConfig, TensorFormat, check_choice, with_bits
from turboattention.errors import InvalidInputError, invalid
from turboattention.kvcache.integrity import INTEGRITIES, Integrity, checksum, group_differences, raise_for
from turboattention.kvcache.open_page import ClampedOpenPage, OpenPage
from turboattention.kvcache.saved_state import SavedState, read_state
from turboattention.ops.append import add_query_power, compress_pages, full_pages, gather_sinks, real_tokens
from turboattention.ops.common.cached_kv import CachedKV, HeadGroup
from turboattention.quant.layout import PageLayout
from turboattention.quant.progressive import head_priority, low_priority_heads

HeadFormat = tuple[TensorFormat, TensorFormat]  # of K and of V
# The newest tokens of the latest update stay exact until the next one, so that a speculative decoder can take them
# back.
ROLLBACK_TOKENS = 64


class LayerCache:
    """K and V of one layer.

    ``append`` new tokens, let attention read ``view()``, then ``settle()``: full pages are compressed once, never
    again. Tokens of the latest ``append`` (at most 64) stay exact until the next one or ``commit``, so that ``crop``
    can drop them.
    """

    def __init__(self, config: CacheConfig, formats: Sequence[HeadFormat], *, integrity: Integrity = "off") -> None:
        """config: page size, protections; formats: of K and V for each KV head.

        integrity: a debug mode that keeps a checksum of each page (see `verify`): ``demand``, or ``read`` to verify at
        every ``view`` as well; both wait for the device.
        """
        check_choice("integrity", integrity, INTEGRITIES)
        self.integrity = integrity
        self.config = config
        self.formats = tuple(formats)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.groups: list[HeadGroup] = []
        self.checksums: list[Tensor] = []  # of the pages of each group, empty with integrity off
        self.page_count = 0
        self.open: OpenPage | None = None
        self.sink_key: Tensor | None = None
        self.sink_value: Tensor | None = None
        self.starts: Tensor | None = None
        self.query_power: Tensor | None = None
        self.latest = 0

    @property
    def compresses(self) -> bool:
        """Whether any head is stored below 16 bits."""
        return any(fmt.bits < 16 for pair in self.formats for fmt in pair)

    @property
    def page_tokens(self) -> int:
        return self.page_count * self.config.page_size

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.page_tokens + (self.open.tokens if self.open else 0)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens ``[batch, kv_heads, tokens, head_dim]`` (K after RoPE), whatever their number.

        Raises InvalidInputError for a wrong shape, NaN, Inf or values beyond the storage dtype; nothing is added then,
        nor when memory ends (torch.OutOfMemoryError): the same call may be tried again.
        """
        check_heads("key", key, heads=len(self.formats))
        check_heads("value", value, heads=len(self.formats), head_dim=key.shape[-1])
        if key.shape != value.shape:
            raise invalid("value", f"the shape of key {tuple(key.shape)}", tuple(value.shape))
        if self.open is not None:
            batch, _, _, head_dim = self.open.tensors["key"].shape
            check_heads("key", key, head_dim=head_dim)
            if key.shape[0] != batch:
                raise invalid("key", f"batch {batch}", key.shape[0])
        if not key.shape[2]:
            return
        page = self._new_open_page(key.dtype) if self.open is None else self.open
        key, value = page.checked("key", key), page.checked("value", value)
        with self._all_or_nothing():
            self._commit()
            self.open = page
            page.append(key, value)
            self.latest = key.shape[2]

    def set_padding(self, starts: Tensor | None) -> None:
        """Number of left-padding tokens of each row, int64 ``[batch]``: never attended to, no part of a range."""
        self.starts = starts

    @property
    def refines(self) -> bool:
        """Whether any head spends more bits on some channels of K."""
        return any(key.refined_bits for key, _ in self.formats)

    def observe(self, q: Tensor) -> None:
        """See the queries ``[batch, heads, tokens, head_dim]`` of the newest tokens: they tell where K matters."""
        if not self.refines:
            return
        real = None
        if self.starts is not None:
            columns = torch.arange(self.length - q.shape[2], self.length, device=q.device)
            real = columns >= self.starts[:, None]
        self.query_power = add_query_power(self.query_power, q, len(self.formats), real)

    def view(self) -> CachedKV:
        """What attention reads. Invalid after the next change of the cache. Verified with ``integrity="read"``."""
        if self.open is None or not self.open.tensors:
            raise InvalidInputError("cache: expected tokens to attend to, received an empty cache; append first")
        if self.integrity == "read":
            self.verify()
        key, value = self.open.read()
        return CachedKV(tuple(self.groups), self.page_tokens, key, value, self.sink_key, self.sink_value, self.starts)

    def verify(self) -> None:
        """Raise IntegrityError unless every page holds what was written; with ``integrity`` on.

        Exact tokens (open page, sinks) are not covered.
        """
        pairs = zip(self.groups, self.checksums, strict=True) if self.checksums else ()
        raise_for([text for group, sums in pairs for text in group_differences(group, sums)])

    def settle(self) -> None:
        """Compress the full pages that the next step can no longer take back."""
        keep = max(self.config.recent_window, min(self.latest, ROLLBACK_TOKENS))
        if self.open is not None and full_pages(self.open.tokens, self.config.page_size, keep):
            with self._all_or_nothing():
                self._compress(keep)

    def commit(self) -> None:
        """All tokens are final: compress every full page older than the recent window."""
        with self._all_or_nothing():
            self._commit()

    def _commit(self) -> None:
        if self.open is None or not self.open.tensors:
            return
        self._compress(keep=self.config.recent_window)
        self.open.settle()
        self.latest = 0

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens. What `observe` saw of the others stays in the statistics.

        Raises InvalidInputError when that would cut a compressed page in two: its exact values are gone.
        """
        self.check_crop(length)
        if length == 0:
            self.reset()
            return
        if self.open is None:
            return
        removed, pages = self.length - length, length // self.config.page_size
        with self._all_or_nothing():
            if length < self.page_tokens:
                self.open.drop_last(self.open.tokens)
                self.page_count = pages
                self.groups = [HeadGroup(g.layout, g.heads, g.pages[:, :, :pages].clone()) for g in self.groups]
                self.checksums = [sums[:, :, :pages].clone() for sums in self.checksums]
            else:
                self.open.drop_last(removed)
            self.latest = max(0, self.latest - removed)

    def check_crop(self, length: int) -> None:
        """Raise what ``crop(length)`` would raise."""
        size = self.config.page_size
        if not 0 <= length <= self.length:
            raise invalid("length", f"0 to {self.length} tokens", length)
        if length < self.page_tokens and length % size:
            raise invalid(
                "crop",
                f"at least {self.page_tokens} tokens (all that is compressed) or a multiple of the page size {size}",
                length,
                "crop before the next token is appended, or set a larger recent_window",
            )

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` (select, reorder or repeat rows: dimension 0) to everything held."""
        with self._all_or_nothing():
            self.groups = [HeadGroup(g.layout, g.heads, change(g.pages)) for g in self.groups]
            self.checksums = [change(sums) for sums in self.checksums]
            if self.open is not None:
                self.open.map(change)
            if self.sink_key is not None and self.sink_value is not None:
                self.sink_key, self.sink_value = change(self.sink_key), change(self.sink_value)
            if self.starts is not None:
                self.starts = change(self.starts)
            if self.query_power is not None:
                self.query_power = change(self.query_power)

    @property
    def nbytes(self) -> int:
        """Every byte held: codes, metadata, sinks, recent window, open page, padding table, query statistics."""
        tensors = [group.pages for group in self.groups]
        tensors += [x for x in (self.sink_key, self.sink_value, self.starts, self.query_power) if x is not None]
        return sum(x.nbytes for x in tensors) + (self.open.nbytes if self.open else 0)

    @property
    def num_values(self) -> int:
        """Values of K and V that the cache stands for, padding included."""
        if self.open is None or not self.open.tensors:
            return 0
        batch, heads, _, dim = self.open.tensors["key"].shape
        return 2 * batch * heads * dim * self.length

    def state(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere: tensors and plain numbers."""
        return {
            "page_count": self.page_count,
            "latest": self.latest,
            "groups": [
                {"key_bits": g.layout.key.bits, "value_bits": g.layout.value.bits, "heads": g.heads, "pages": g.pages}
                for g in self.groups
            ],
            "open": None if self.open is None else {"dtype": self.open.dtype, "tensors": dict(self.open.tensors)},
            "sink_key": self.sink_key,
            "sink_value": self.sink_value,
            "starts": self.starts,
            "query_power": self.query_power,
            "checksums": list(self.checksums),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned from a cache with the same configuration.

        Raises InvalidInputError, with the place, for anything else; the cache then stays as it was.
        """
        self.take_over(self.read_state(state))

    def read_state(self, state: dict[str, Any]) -> SavedState:
        """``state`` checked against the configuration of this cache, for `take_over`; see `saved_state`."""
        return read_state(state, self.config, self.formats)

    def take_over(self, saved: SavedState) -> None:
        """Hold what `read_state` returned."""
        with self._all_or_nothing():
            self.reset()
            self.page_count, self.latest, self.groups = saved.page_count, saved.latest, list(saved.groups)
            self.sink_key, self.sink_value = saved.sink_key, saved.sink_value
            self.starts, self.query_power = saved.starts, saved.query_power
            if saved.open is not None:
                self.open = self._new_open_page(saved.open[0])
                self.open.tensors = dict(saved.open[1])
            if self.integrity != "off":
                # Of a cache that kept none: what is here now counts as written.
                self.checksums = list(saved.checksums) or [checksum(group.pages) for group in self.groups]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What an error (memory that ends) leaves behind is what was there before: no tensor is changed in place."""
        before, page = dict(vars(self)), self.open
        tensors = {} if page is None else dict(page.tensors)
        try:
            yield
        except BaseException:
            vars(self).update(before)
            if page is not None:
                page.tensors = tensors
            raise

    def _new_open_page(self, dtype: torch.dtype) -> OpenPage:
        stored = torch.float16 if self.compresses and dtype.itemsize > 2 else dtype
        return ClampedOpenPage(stored) if self.config.open_page == "int8_clamped" else OpenPage(stored)

    def _layout(self, formats: HeadFormat) -> PageLayout:
        head_dim = 0 if self.open is None else self.open.tensors["key"].shape[-1]
        return PageLayout(self.config.page_size, head_dim, *formats)

    def _compress(self, keep: int) -> None:
        if self.open is None or not self.compresses:
            return
        size = self.config.page_size
        count = full_pages(self.open.tokens, size, keep)
        if count == 0:
            return
        key, value = (x[:, :, : count * size] for x in self.open.read())
        if not self.groups:
            self._form_groups(key, value)
        if self.config.sink_tokens:
            self._keep_sinks(key, value)
        # The first pages may hold tokens that are already in INT8 with the buffer's scale: they must keep it.
        bound = -(-min(self.open.scaled_tokens, count * size) // size)
        new = []
        for group in self.groups:
            parts = []
            for first, last, scales in ((0, bound, self.open.tile_scales()), (bound, count, None)):
                if last > first:
                    parts.append(self._encode(group, key, value, first * size, last * size, scales))
            new.append(HeadGroup(group.layout, group.heads, torch.cat([group.pages, *parts], 2)))
        if self.integrity != "off":
            added = [checksum(group.pages[:, :, self.page_count :]) for group in new]
            old = self.checksums or [sums[:, :, :0] for sums in added]
            self.checksums = [torch.cat(pair, 2) for pair in zip(old, added, strict=True)]
        self.groups = new
        self.open.drop_first(count * size)
        self.page_count += count

    def _encode(
        self, group: HeadGroup, key: Tensor, value: Tensor, first: int, last: int, scales: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        heads = list(group.heads)
        valid = real_tokens(self.page_tokens + first, last - first, self.starts, self.config.sink_tokens, key.device)
        chosen = None if scales is None else (scales[0][:, heads], scales[1][:, heads])
        power = None if self.query_power is None else self.query_power[:, heads]
        return compress_pages(
            group.layout, key[:, heads, first:last], value[:, heads, first:last], valid, chosen, power
        )

    def _keep_sinks(self, key: Tensor, value: Tensor) -> None:
        if self.sink_key is None or self.sink_value is None:
            shape = (*key.shape[:2], self.config.sink_tokens, key.shape[3])
            assert self.open is not None  # it holds these tokens
            self.sink_key, self.sink_value = (x.new_zeros(shape, dtype=self.open.read_dtype) for x in (key, value))
        self.sink_key = gather_sinks(self.sink_key, key, self.page_tokens, self.starts)
        self.sink_value = gather_sinks(self.sink_value, value, self.page_tokens, self.starts)

    def _form_groups(self, key: Tensor, value: Tensor) -> None:
        """Heads with equal formats share a group; the paper's rule lowers some heads from the first data seen."""
        formats = list(self.formats)
        share, bits = self.config.low_priority_heads, self.config.low_bits
        if share:
            low = [low_priority_heads(head_priority(x), share) for x in (key, value)]
            formats = [
                (with_bits(k, bits) if h in low[0] else k, with_bits(v, bits) if h in low[1] else v)
                for h, (k, v) in enumerate(formats)
            ]
        groups = []
        for pair in dict.fromkeys(formats):
            heads = tuple(h for h, other in enumerate(formats) if other == pair)
            layout = self._layout(pair)
            pages = torch.empty(key.shape[0], len(heads), 0, layout.nbytes, dtype=torch.uint8, device=key.device)
            groups.append(HeadGroup(layout, heads, pages))
        self.groups = groups
