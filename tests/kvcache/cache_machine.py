"""Random operations on a `LayerCache` beside a plain cache (hypothesis state machine).

`tests/kvcache/test_layer_cache.py` runs it for a second or two, `benchmarks/fuzz.py` for as long as one likes.
"""

import io

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain_cache import (
    HEADS,
    RATIO,
    Case,
    Plain,
    assert_attention,
    assert_same,
    assert_unchanged,
    dense_attention,
    flat,
    random_tokens,
    stored,
)
from torch import Tensor

from turboattention.errors import InvalidInputError
from turboattention.kvcache import LayerCache
from turboattention.ops import attend

# Relative RMS errors of attention. Of a kernel against the same codes: the CPU kernels round Q times the scales, and P
# times those of V, to 16 bits. Of a preset against the exact tokens: of 8-bit codes whose channel of +-30 is the worst.
KERNEL_LIMIT = 2e-3
FORMAT_LIMITS = {"fp16": 1e-5, "int8": 5e-2}
FORKS = 3


class CacheMachine(RuleBasedStateMachine):
    def __init__(self, case: Case, name: str = "", device: str = "cpu") -> None:
        super().__init__()
        self.case, self.name, self.device = case, name, device
        self.forks: list[tuple[LayerCache, Plain, int]] = []
        self.cache = case.cache()

    @initialize(
        starts=st.one_of(st.none(), st.lists(st.integers(0, 150), min_size=1, max_size=3)),
        seed=st.integers(0, 99),
        count=st.integers(1, 300),
        dtype=st.sampled_from([torch.float32, torch.float16]),
    )
    def start(self, starts: list[int] | None, seed: int, count: int, dtype: torch.dtype) -> None:
        rows = None if starts is None else torch.tensor(starts)
        self.dtype = dtype
        self.plain = Plain(self.case.config, self.cache.compresses, self.cache.refines, rows, dtype.itemsize)
        self.batch, self.seed, self.verified = 2 if starts is None else len(starts), seed, 0
        self.append(count)

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        self.seed += 2
        key, value = (random_tokens(1000 + self.seed + i, self.batch, count) for i in (0, 1))
        key[..., 5] = key[..., 5] * 4.0 + 10.0
        return key.to(self.dtype), value.to(self.dtype)

    def on_device(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(self.device)

    @rule(count=st.one_of(st.integers(1, 3), st.integers(60, 70), st.integers(1, 160)))
    def append(self, count: int) -> None:
        key, value = self.tokens(count)
        self.cache.append(self.on_device(key), self.on_device(value))
        self.plain.append(key, value)
        self.cache.set_padding(self.on_device(self.plain.starts))
        # Multiples of 1/4, so that sums of their squares are exact in any order.
        q = (random_tokens(self.seed, self.batch, count, HEADS * RATIO) * 4).round() / 4
        self.cache.observe(self.on_device(q))
        self.plain.observe(q)

    @rule(count=st.one_of(st.integers(1, 3), st.integers(30, 100)))
    def step(self, count: int) -> None:
        """What a model does at each step."""
        self.append(count)
        self.settle()

    @rule()
    def settle(self) -> None:
        self.cache.settle()
        self.plain.settle()

    @rule()
    def commit(self) -> None:
        self.cache.commit()
        self.plain.commit()

    @precondition(lambda self: self.plain.keys)
    @rule(tokens=st.one_of(st.integers(0, 64), st.integers(0, 200)))
    def crop(self, tokens: int) -> None:
        length = max(0, len(self.plain.keys) - tokens)
        if self.plain.may_crop(length):
            self.cache.crop(length)
            self.plain.crop(length)
            self.verified = min(self.verified, len(self.plain.pages))
            return
        before = flat(self.cache.state())
        with pytest.raises(InvalidInputError, match=r"^crop: expected at least \d+ tokens \(all that is compressed\)"):
            self.cache.crop(length)
        assert_unchanged(self.cache, before)

    @precondition(lambda self: self.plain.keys)
    @rule(removed=st.sampled_from([0, 1, 1, 2, 99]))
    def crop_at_page_border(self, removed: int) -> None:
        length = max(0, len(self.plain.pages) - removed) * self.case.config.page_size
        self.cache.crop(length)
        self.plain.crop(length)
        self.verified = min(self.verified, len(self.plain.pages))

    @precondition(lambda self: self.plain.keys)
    @rule(data=st.data(), kind=st.sampled_from(["reorder", "select", "repeat"]))
    def change_rows(self, data: st.DataObject, kind: str) -> None:
        rows = list(range(self.batch))
        if kind == "repeat":
            if self.batch > 2:
                return
            rows = [row for row in rows for _ in range(2)]
        else:
            least, most = (len(rows), len(rows)) if kind == "reorder" else (1, 2)
            rows = data.draw(st.lists(st.sampled_from(rows), min_size=least, max_size=most))
        self.cache.map_batch(
            lambda x: x.repeat_interleave(2, 0) if kind == "repeat" else x[torch.tensor(rows, device=x.device)]
        )
        self.plain.map(rows)
        self.batch, self.verified = len(rows), 0

    @rule()
    def fork(self) -> None:
        """Two caches go on from one state, the same tensors at first."""
        other = self.case.cache()
        other.load_state(self.cache.state())
        self.forks = [*self.forks, (other, self.plain.fork(), self.batch)][-FORKS:]

    @precondition(lambda self: self.forks)
    @rule(place=st.integers(0, FORKS - 1))
    def go_on_with_fork(self, place: int) -> None:
        """Whatever the others did since, this one holds what it held."""
        place %= len(self.forks)
        other, self.forks[place] = self.forks[place], (self.cache, self.plain, self.batch)
        (self.cache, self.plain, self.batch), self.verified = other, 0

    @rule(batch=st.integers(1, 3))
    def free(self, batch: int) -> None:
        """Another batch takes the cache over."""
        self.cache.reset()
        self.batch, self.verified = batch, 0
        starts = None if self.plain.starts is None else torch.arange(batch) * 40
        self.plain = Plain(self.case.config, self.cache.compresses, self.cache.refines, starts, self.dtype.itemsize)

    @precondition(lambda self: self.plain.keys)
    @rule(queries=st.sampled_from([1, 1, 2, 5]))
    def attend(self, queries: int) -> None:
        """Attention against float64 over the same codes and, for two presets, over the exact tokens."""
        if queries > len(self.plain.keys):
            return
        self.seed += 1
        q = random_tokens(self.seed, self.batch, queries, HEADS * RATIO)
        found = attend(q.to(self.device), self.cache.view()).cpu()
        if self.plain.starts is not None:
            # What padding sees is of no interest: torch's attention and the kernels differ there.
            columns = torch.arange(len(self.plain.keys) - queries, len(self.plain.keys))
            found = torch.where((columns >= self.plain.starts[:, None])[:, None, :, None], found, 0.0)
        expected = dense_attention(q, *stored(self.cache, self.plain), self.plain.starts)
        assert_attention(found, expected, KERNEL_LIMIT)
        if self.name in FORMAT_LIMITS:
            exact = (torch.stack(x, 2) for x in (self.plain.keys, self.plain.values))
            assert_attention(found, dense_attention(q, *exact, self.plain.starts), FORMAT_LIMITS[self.name])

    @rule()
    def state_round_trip(self) -> None:
        file = io.BytesIO()
        torch.save(self.cache.state(), file)
        file.seek(0)
        self.cache = self.case.cache()
        self.cache.load_state(torch.load(file, weights_only=True))

    @rule(bad=st.sampled_from(["nan", "inf", "large", "value", "heads", "shape", "batch"]))
    def refused_append(self, bad: str) -> None:
        if (bad == "large" and (not self.cache.compresses or self.dtype != torch.float32)) or (
            bad == "batch" and not self.plain.keys
        ):
            return
        key, value = self.tokens(7)
        if bad in ("nan", "inf", "large"):
            key[0, 1, 3, 2] = {"nan": torch.nan, "inf": -torch.inf, "large": 7e4}[bad]
        elif bad == "value":
            value[0, 0, 0, 0] = torch.nan
        elif bad == "heads":
            key, value = key[:, :2], value[:, :2]
        elif bad == "shape":
            value = value[:, :, :5]
        else:
            key, value = key.repeat(3, 1, 1, 1), value.repeat(3, 1, 1, 1)
        name = "value" if bad in ("value", "shape") else "key"
        with pytest.raises(InvalidInputError, match=f"^{name}: expected"):
            self.cache.append(self.on_device(key), self.on_device(value))
        assert self.cache.length == len(self.plain.keys)
        self.commit()

    @invariant()
    def same(self) -> None:
        if hasattr(self, "plain"):
            assert_same(self.cache, self.plain, self.verified)
            self.verified = len(self.plain.pages)

    def teardown(self) -> None:
        """All pages once more, also those verified when they were new, and those of the forks."""
        held = [(self.cache, self.plain)] if hasattr(self, "plain") else []
        for cache, plain in held + [fork[:2] for fork in self.forks]:
            assert_same(cache, plain)
