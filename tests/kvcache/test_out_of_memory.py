"""An allocation fails, one after the other: the cache is what it was, and the same call works once there is memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_cache import CASES, DIM, HEADS, RATIO, assert_unchanged, flat, random_tokens
from plain_paged import CONFIGS, formats_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from turboattention.errors import IntegrityError
from turboattention.kvcache import LayerCache
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.append.paged import append_paged
from turboattention.ops.decode import paged_decode

ROWS = 2


class Memory(TorchDispatchMode):
    """Counts the operations that return new memory; that of number ``end`` and those after it fail."""

    def __init__(self, end: int | None = None) -> None:
        super().__init__()
        self.count, self.end = 0, end

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(x.alias_info is None and isinstance(x.type, torch.TensorType) for x in func._schema.returns):
            if self.count == self.end:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
            self.count += 1
        return func(*args, **(kwargs or {}))


def allocations(change: Callable[[], object]) -> int:
    """Of a call that is made with memory enough."""
    with Memory() as memory:
        change()
    return memory.count


def survive(change: Callable[[], object], total: int, check: Callable[[], None]) -> int:
    """Let the call fail at each of its ``total`` allocations (of many the first, the last and some), then succeed.

    ``check`` after each failure. Returns how many there were.
    """
    chosen = sorted({*range(min(total, 12)), *range(max(0, total - 25), total), *range(0, total, max(1, total // 12))})
    for end in chosen:
        with pytest.raises(torch.OutOfMemoryError), Memory(end):
            change()
        check()
    change()
    return len(chosen)


# --- contiguous ---


def changes(cache: LayerCache) -> list[Callable[[], object]]:
    """Every way to change a cache: prompts, single tokens, pages that fill up, rows that move, tokens taken back."""

    def append(seed: int, count: int) -> Callable[[], object]:
        key, value = random_tokens(seed, ROWS, count), random_tokens(seed + 1, ROWS, count)
        return lambda: cache.append(key, value)

    def observe(seed: int, count: int) -> Callable[[], object]:
        q = random_tokens(seed, ROWS, count, HEADS * RATIO)
        return lambda: cache.observe(q)

    rows = torch.tensor([1, 0])
    return [
        append(1, 150), observe(3, 150), cache.settle, append(4, 1), observe(6, 1), cache.settle, append(7, 70),
        lambda: cache.map_batch(lambda x: x[rows]), lambda: cache.crop(210), append(9, 3), cache.commit,
        append(11, 130), cache.commit, lambda: cache.crop(cache.page_tokens or 100), lambda: cache.crop(64),
        append(13, 70), cache.commit,
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_contiguous_cache_is_as_before(name: str):
    cache, reference, first = (CASES[name].cache() for _ in range(3))
    for change in changes(first):  # what is made once and kept, such as factors of checksums
        change()
    failures = 0
    for number, (change, undisturbed) in enumerate(zip(changes(cache), changes(reference), strict=True)):
        before, total = flat(cache.state()), allocations(undisturbed)
        failures += survive(change, total, lambda before=before: assert_unchanged(cache, before))
        assert_unchanged(cache, flat(reference.state()))
        assert cache.length == reference.length, number
    assert failures > 20


def test_state_that_cannot_be_taken_over_changes_nothing():
    case = CASES["turbo4-verified-at-each-read"]
    cache, other = case.cache(), case.cache()
    for seed, x in enumerate((cache, other)):
        x.append(random_tokens(seed, 1, 150), random_tokens(seed + 2, 1, 150))
        x.commit()
    before, state = flat(cache.state()), {**other.state(), "checksums": []}  # so that they are made
    total = allocations(lambda: case.cache().load_state(state))
    assert survive(lambda: cache.load_state(state), total, lambda: assert_unchanged(cache, before)) > 0
    cache.verify()


# --- paged ---


def held(cache: PagedCache) -> list[Tensor]:
    """All that a paged cache answers for: numbers, statistics, and of each row its pages, exact tokens and sinks."""
    found = [cache.lengths, cache.page_tokens, cache.fault]
    size, capacity = cache.config.page_size, cache.tail_key.shape[2]
    for row, (length, paged) in enumerate(zip(cache.lengths.tolist(), cache.page_tokens.tolist(), strict=True)):
        found += [group.pool[group.table[row, :, : paged // size].long()] for group in cache.groups]
        slots = torch.arange(paged, length) % capacity
        found += [cache.tail_key[row][:, slots], cache.tail_value[row][:, slots]]
        if cache.sink_key is not None:
            count = min(length, cache.config.sink_tokens)
            found += [cache.sink_key[row, :, :count], cache.sink_value[row, :, :count]]
    found += [] if cache.query_power is None else [cache.query_power]
    return [x.clone() for x in found]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def paged_pair(name: str, append: Callable[..., None] | None, **more: Any) -> tuple[PagedCache, PagedCache]:
    config = CONFIGS[name]
    given = {"rows": ROWS, "max_tokens": 320, "head_dim": DIM, "max_step": 5, "append": append, **more}
    cache, reference = (PagedCache(config, formats_of(config), **given) for _ in range(2))
    return cache, reference


STEPS = [("after", 150, (150, 70)), ("before", 3, (3, 0)), ("before", 5, (5, 5)), ("after", 80, (80, 11)),
         ("before", 1, (1, 1))] + [("before", 5, (5, 4))] * 8  # fmt: skip


@pytest.mark.parametrize("append", [None, append_paged], ids=["default", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_paged_cache_is_as_before(name: str, append: Callable[..., None] | None):
    cache, reference = paged_pair(name, append)
    failures = 0
    for seed, (when, count, real) in enumerate(STEPS):
        key, value = (random_tokens(2 * seed + i, ROWS, count) for i in (0, 1))
        q = random_tokens(100 + seed, ROWS, count, HEADS * RATIO)
        told = torch.tensor(real, dtype=torch.int32)
        before = held(cache)
        for call in ("append", "observe"):
            arguments: Any = (key, value) if call == "append" else (q, told)
            named: Any = {"when": when, "counts": told} if call == "append" else {}

            def change(x: PagedCache, call: str = call, arguments: Any = arguments, named: Any = named) -> None:
                getattr(x, call)(*arguments, **named)

            total = allocations(lambda change=change: change(reference))
            failures += survive(
                lambda change=change: change(cache), total, lambda before=before: assert_equal(held(cache), before)
            )
            before = held(cache)
            assert_equal(before, held(reference))
        outputs = [paged_decode(q[:, :, :1], x.view(), scale=0.125).out for x in (cache, reference)]
        assert torch.equal(*outputs)
    assert failures > 60


def test_triton_kernels_write_nothing_when_the_second_group_has_no_memory(monkeypatch: pytest.MonkeyPatch):
    """The interpreter makes copies of its own, so here only what the launch itself needs fails."""
    from turboattention.ops.append import triton_paged

    cache, _ = paged_pair("turbo4", triton_paged.append_paged)
    numbers, before = triton_paged._head_numbers, [cache.tail_key.clone(), *(g.pool.clone() for g in cache.groups)]

    def fails_later(heads: tuple[int, ...], device: torch.device) -> Tensor:
        if heads == cache.groups[-1].heads:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return numbers(heads, device)

    monkeypatch.setattr(triton_paged, "_head_numbers", fails_later)
    with pytest.raises(torch.OutOfMemoryError):
        cache.append(random_tokens(1, ROWS, 150), random_tokens(2, ROWS, 150), when="after")
    assert cache.lengths.tolist() == [0, 0]
    assert_equal([cache.tail_key, *(g.pool for g in cache.groups)], before)


@pytest.mark.parametrize("append", [None, append_paged], ids=["default", "reference"])
def test_bits_of_a_fault_do_not_stay_when_the_append_failed(append: Callable[..., None] | None):
    cache, reference = paged_pair("turbo4", append)
    key = random_tokens(1, ROWS, 70)
    key[1, 0, 3, 3] = torch.nan
    total = allocations(lambda: reference.append(key, key, when="after"))
    survive(
        lambda: cache.append(key, key, when="after"),
        total,
        lambda: assert_equal([cache.fault], [torch.zeros_like(cache.fault)]),
    )
    assert cache.fault.tolist() == [0, 1]


def test_checksums_without_memory_are_loud():
    """A debug mode: the tokens are there, their sums may not be; then `verify` says so, and nothing is wrong unseen."""
    cache, reference = paged_pair("turbo4", None, integrity="demand")
    key, value = random_tokens(1, ROWS, 150), random_tokens(2, ROWS, 150)
    outcomes = []
    for end in range(allocations(lambda: reference.append(key, value, when="after"))):
        cache.free(range(ROWS))
        with pytest.raises(torch.OutOfMemoryError), Memory(end):
            cache.append(key, value, when="after")
        if cache.lengths.tolist() == [0, 0]:
            outcomes.append("nothing was added")
            continue
        assert_equal(held(cache), held(reference))
        with pytest.raises(IntegrityError):
            cache.verify()
        outcomes.append("found")
    assert set(outcomes) == {"nothing was added", "found"}
    cache.free(range(ROWS))
    cache.append(key, value, when="after")
    cache.verify()
