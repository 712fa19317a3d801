"""Chunks of several sequences in one tensor: the same cache as by an append for each, and sums of squared queries."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="one of the implementations is written in Triton")

from turboattention.config import presets
from turboattention.errors import InvalidInputError
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.append import cpu, paged, triton_paged
from turboattention.ops.append.packed import QUERY_SAMPLES, Packed, add_packed_queries
from turboattention.ops.append.triton_queries import add_packed_queries as queries_kernel
from turboattention.ops.dispatch import without_cpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM = 2, 80
NO_CPP = without_cpu(torch.device("cpu"))
IMPLEMENTATIONS = [
    pytest.param(paged.append_paged, torch.device("cpu"), id="definition"),
    pytest.param(triton_paged.append_paged, DEVICE, id="triton"),
    pytest.param(
        cpu.append_paged, torch.device("cpu"), id="cpu", marks=pytest.mark.skipif(bool(NO_CPP), reason=str(NO_CPP))
    ),
]


def cache_of(append: Callable[..., None], device: torch.device) -> PagedCache:
    config = presets()["turbo4"].cache
    cache = PagedCache(
        config, [(config.key, config.value)] * HEADS, rows=3, max_tokens=320, head_dim=DIM, dtype=torch.float16,
        device=device, shuffle=1, append=append,
    )  # fmt: skip
    for x in (cache.tail_key, cache.tail_value):
        x.fill_(torch.nan)  # what was not written must not be read
    return cache


@pytest.mark.parametrize(("append", "device"), IMPLEMENTATIONS)
def test_same_cache_as_one_append_for_each_row(append: Callable[..., None], device: torch.device) -> None:
    expected, got = cache_of(paged.append_paged, torch.device("cpu")), cache_of(append, device)
    for seed, counts in enumerate(((70, 0, 193), (31, 64, 1), (0, 0, 5))):
        random = torch.Generator().manual_seed(seed)
        gaps = (3, 1, 2)  # tokens of others before each sequence
        starts = [sum(counts[:i]) + sum(gaps[: i + 1]) for i in range(3)]
        rows = torch.randn(2, 3, HEADS, max(counts), DIM, generator=random)
        packed = torch.full((2, 1, HEADS, sum(counts) + sum(gaps), DIM), torch.nan)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            packed[:, 0, :, start : start + count] = rows[:, row, :, :count]
        real = torch.tensor(counts, dtype=torch.int32)
        expected.append(*rows.half(), when="after", counts=real)
        where = Packed(torch.tensor(starts, dtype=torch.int32, device=device), max(counts))
        got._append(
            got.view(), *packed.half().to(device), when="after", fault=got.fault, counts=real.to(device),
            query_power=got.query_power, packed=where,
        )  # fmt: skip
        for x in ("lengths", "page_tokens"):
            getattr(got, x).copy_(getattr(expected, x))
    assert expected.page_tokens.tolist() == [64, 64, 192]
    assert got.fault.tolist() == [0, 0, 0]
    assert torch.equal(expected.groups[0].pool, got.groups[0].pool.cpu())
    for name in ("tail_key", "tail_value", "sink_key", "sink_value"):
        x, y = getattr(expected, name), getattr(got, name).cpu()
        assert torch.equal(x.view(torch.int16), y.view(torch.int16)), name  # bits: unwritten slots are NaN


@pytest.mark.parametrize(("append", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_row_without_new_tokens_is_compressed_too(
    append: Callable[..., None], device: torch.device, when: str
) -> None:
    """A decode step leaves a full page exact; the next step writes it, as `advance` says, whoever gets tokens then."""
    expected, got = cache_of(paged.append_paged, torch.device("cpu")), cache_of(append, device)
    first, one = torch.randn(2, 3, HEADS, 63, DIM).half(), torch.randn(2, 3, HEADS, 1, DIM).half()
    new = torch.randn(2, 1, HEADS, 5, DIM).half()
    none_first = torch.tensor([0, 0, 5], dtype=torch.int32)
    for cache in (expected, got):
        place = cache.lengths.device
        cache.append(*first.to(place), when="after")
        cache.append(*one.to(place), when="before")
        assert cache.page_tokens.tolist() == [0, 0, 0]
    expected.append(*new.expand(-1, 3, -1, -1, -1), when="after", counts=none_first)
    assert expected.page_tokens.tolist() == [64, 64, 64]
    where = Packed(torch.tensor([0, 5, 0], dtype=torch.int32, device=device), 5)
    room = got.tail_key.new_full((3, HEADS, 64 + 5, DIM), torch.nan)
    room[:, :, :64] = got.tail_key
    values = room.clone()
    values[:, :, :64] = got.tail_value
    got.tail_key, got.tail_value = room, values  # slots of tokens 0 .. 63 are the same
    got._append(
        got.view(), *new.to(device), when=when, fault=got.fault, counts=none_first.to(device),
        query_power=got.query_power, packed=where,
    )  # fmt: skip
    assert torch.equal(expected.groups[0].pool, got.groups[0].pool.cpu())


def test_packed_needs_counts_and_nothing_of_a_step() -> None:
    cache = cache_of(paged.append_paged, torch.device("cpu"))
    new = torch.zeros(1, HEADS, 8, DIM, dtype=torch.float16)
    where = Packed(torch.zeros(3, dtype=torch.int32), 4)
    with pytest.raises(InvalidInputError, match="packed: expected with counts"):
        paged.append_paged(cache.view(), new, new, when="after", fault=cache.fault, packed=where)


def sums(queries: Tensor, starts: list[int], counts: list[int]) -> Tensor:
    """Squares of every query of each sequence, in float64."""
    squares = queries.double().square().unflatten(1, (HEADS, -1)).sum(2)
    return torch.stack([squares[a : a + n].sum(0) for a, n in zip(starts, counts, strict=True)])


@pytest.mark.parametrize("implementation", [add_packed_queries, queries_kernel], ids=["dispatched", "kernel"])
def test_squares_of_queries(implementation: Callable[..., Tensor]) -> None:
    """Short chunks count whole, a long one by its sample; rows that begin anew forget, others are not touched.

    Pages of the chunks see what came before and the queries of the page that the chunk begins in, all of them.
    """
    torch.manual_seed(0)
    starts, counts, rows = [2, 40, 40], [38, 0, QUERY_SAMPLES], [3, 0, 2]
    long = QUERY_SAMPLES * 5 + 3
    starts, counts, rows = [*starts, 40 + QUERY_SAMPLES], [*counts, long], [*rows, 4]
    queries = torch.randn(starts[-1] + long, 3 * HEADS, DIM, device=DEVICE)
    queries[:2] = torch.nan
    before = torch.rand(6, HEADS, DIM, device=DEVICE)
    power = before.clone()
    numbers = {
        name: torch.tensor(x, dtype=torch.int32, device=DEVICE)
        for name, x in (("rows", rows), ("counts", counts), ("lengths", [60, 7, 128, 100]))
    }
    keep = torch.tensor([1.0, 1.0, 0.0, 0.0], device=DEVICE)
    where = Packed(torch.tensor(starts, dtype=torch.int32, device=DEVICE), long)
    early = implementation(power, queries.half(), where, **numbers, keep=keep, page_size=64)
    first = sums(queries.half(), starts, [4, 0, 64, 28]).float()
    assert torch.allclose(early[[3, 0, 2, 4]], before[[3, 0, 2, 4]] * keep[:, None, None] + first, rtol=1e-5)
    exact = sums(queries.half(), starts, counts).float()
    assert torch.equal(power[[0, 1, 5]], before[[0, 1, 5]])
    assert torch.allclose(power[3], before[3] + exact[0], rtol=1e-5)
    assert torch.allclose(power[2], exact[2], rtol=1e-5)
    # A sum over 256 x 3 squares of normal numbers has a relative deviation of 5 %.
    assert (power[4] / exact[3] - 1).abs().max() < 0.25


def test_rows_of_statistics_must_fit() -> None:
    number = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(InvalidInputError, match=r"keep: expected contiguous torch.float32 \[2\]"):
        add_packed_queries(
            torch.zeros(3, HEADS, DIM), torch.zeros(4, HEADS, DIM), Packed(number, 2), rows=number, counts=number,
            keep=torch.ones(2, dtype=torch.float64), lengths=number, page_size=64,
        )  # fmt: skip
