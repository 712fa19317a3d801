"""The same bits for a sequence whatever else is in the batch: what holds for each implementation, and what does not."""

import pytest
import torch
from caches import normal, paged, policy_of
from torch import Tensor

from turboattention.cpu.library import without_library
from turboattention.errors import InvalidInputError
from turboattention.kvcache.paged import PagedCache
from turboattention.ops import paged_decode
from turboattention.ops.common.paged_kv import PagedKV, sequences_of

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_CPP = pytest.mark.skipif(without_library() is not None, reason=str(without_library()))
KERNELS = [pytest.param("cpu", marks=NO_CPP), "triton"]


def cache_of(lengths: tuple[int, ...], preset: str = "turbo2") -> tuple[Tensor, PagedCache]:
    cache = paged(policy_of(preset), lengths, kv_heads=1, device=DEVICE)
    return normal(len(lengths), 2, 1, 64, seed=9).half().to(DEVICE), cache


def same(q: Tensor, kv: PagedKV, row: int, **how: object) -> bool:
    """Whether sequence ``row`` gives the same bits in the batch and alone."""
    together = paged_decode(q, kv, **how)
    alone = paged_decode(q[row : row + 1], sequences_of(kv, row, row + 1), **how)
    return torch.equal(together.out[row], alone.out[0]) and torch.equal(together.lse[row], alone.lse[0])


@pytest.mark.parametrize(("lengths", "split"), [((330, 40, 1), 2), ((330, 600, 70), 3)])
def test_a_fixed_split_of_triton_does_not_depend_on_the_batch(lengths: tuple[int, ...], split: int):
    q, cache = cache_of(lengths)
    assert same(q, cache.view(), 0, implementation="triton", split=split)


@NO_CPP
@pytest.mark.parametrize("split", [1, 8])
def test_a_fixed_split_of_cpp_depends_neither_on_the_batch_nor_on_threads(split: int, monkeypatch: pytest.MonkeyPatch):
    q, cache = cache_of((5000, 4000, 6000, 63, 1))
    kv = cache.view()
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(same(q, kv, row, implementation="cpu", split=split) for row in range(5))
        found.append(paged_decode(q, kv, implementation="cpu", split=split).out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_definition_never_depends_on_the_batch():
    q, cache = cache_of((330, 400, 70, 1))
    assert all(same(q, cache.view(), row, implementation="reference") for row in range(4))


@NO_CPP
def test_without_it_the_division_follows_the_batch(monkeypatch: pytest.MonkeyPatch):
    """Not wished for: it loads every processor. If this fails, the documentation promises too little."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    q, cache = cache_of((5000, 40000))
    assert not same(q, cache.view(), 0, implementation="cpu")


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_split_changes_rounding_alone(implementation: str):
    q, cache = cache_of((330, 130))
    want = paged_decode(q, cache.view(), implementation="reference").out
    got = paged_decode(q, cache.view(), implementation=implementation, split=2).out
    assert (got - want).abs().max() < 2e-3
    assert torch.equal(got, paged_decode(q, cache.view(), implementation=implementation, split=2).out)


@pytest.mark.parametrize("arguments", [{"split": 0}, {"split": 2, "programs": 3}], ids=str)
def test_bad_splits_are_refused(arguments: dict[str, int]):
    q, cache = cache_of((70,))
    with pytest.raises(InvalidInputError, match="split: expected 1 or more pages, and no programs"):
        paged_decode(q, cache.view(), **arguments)


def test_pages_and_statistics_of_a_row_are_its_own():
    """Of an append: nothing that a row writes depends on the others."""
    policy = policy_of("turbo2")
    key, value, q = (normal(3, 1, 100, 64, seed=i).half().to(DEVICE) for i in range(3))
    pages, caches = [], []
    for rows in (1, 3):
        cache = PagedCache(
            policy.cache, policy.head_formats(0, 1), rows=rows, max_tokens=128, head_dim=64, device=DEVICE
        )
        cache.observe(q[:rows])
        cache.append(key[:rows], value[:rows], when="after")
        pages.append(cache.groups[0].pool[int(cache.groups[0].table[0, 0, 0])])
        caches.append(cache)
    assert torch.equal(*pages)
    for name in ("tail_key", "tail_value", "sink_key", "sink_value", "query_power"):
        assert torch.equal(*(getattr(cache, name)[0] for cache in caches)), name
