"""Sequences of a million tokens, and pools in which a page lies further out than 31 bits count.

On a GPU: ``pytest -m gpu tests/ops/test_long_sequences.py`` (about 12 GB of its memory).
"""

from dataclasses import replace

import pytest
import torch
from caches import normal, paged, policy_of
from torch import Tensor

pytest.importorskip("triton")

from turboattention.cpu import library
from turboattention.kvcache.paged import PagedCache
from turboattention.ops import cached_attention, chunked_prefill, paged_decode
from turboattention.ops.common.cached_kv import CachedKV, HeadGroup
from turboattention.ops.common.paged_kv import PagedKV, sequence
from turboattention.ops.prefill import int8, int8_prepass, int8_triton
from turboattention.ops.prefill.expand import expand_with_chunk
from turboattention.ops.prefill.int8_prefill import int8_prefill
from turboattention.ops.prefill.reference import AttentionOutput, merge_attention, prefill_attention
from turboattention.quant.error import relative_rms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
CPP = pytest.param("cpu", marks=pytest.mark.skipif(library.without_library() is not None, reason="no C++ kernels"))
GLUON = pytest.param("gluon", marks=pytest.mark.gpu)
MILLION = 2**20
PAGES_AT_ONCE = 1024  # of the definition in float64
# Of kernels against the definition, as in test_decode_kernels.
BUDGET, LSE_BUDGET = 6e-4, 2e-3
# Absolute, of the first channel beside values of size 1. There codes and zeros, 30 each, leave 0.002: 8e-5
# off on average on an H200, at 131,077 tokens as at a million, for every split (tensor cores cut what they add).
FIRST_CHANNEL = 1.5e-4


def place(implementation: str) -> torch.device:
    return torch.device("cpu") if implementation == "cpu" else DEVICE


def written(preset: str, tokens: int, heads: int, dim: int, device: torch.device) -> PagedCache:
    """One sequence of random tokens, appended by the kernels of the device."""
    policy = policy_of(preset)
    cache = PagedCache(
        policy.cache, policy.head_formats(0, heads), rows=1, max_tokens=tokens, head_dim=dim, device=device
    )
    random = torch.Generator(device).manual_seed(1)
    for first in range(0, tokens, 2**16):
        shape = (1, heads, min(2**16, tokens - first), dim)
        key, value = (torch.randn(shape, generator=random, device=device) for _ in range(2))
        key[..., 3] *= 8.0
        cache.append(key.half(), value.half(), when="after")
    cache.check()
    return cache


def definition(q: Tensor, kv: PagedKV, head: int) -> AttentionOutput:
    """Of the query heads of one KV head over all tokens of the one sequence, in float64, some pages after the other."""
    (group,) = kv.groups
    length, paged_tokens = int(kv.lengths[0]), int(kv.page_tokens[0])
    own, size = slice(head, head + 1), group.layout.page_size
    slots = torch.arange(paged_tokens, length, device=q.device) % kv.tail_key.shape[2]
    tail = (x[:, own, slots].double() for x in (kv.tail_key, kv.tail_value))
    found = prefill_attention(q.double(), CachedKV((), 0, *tail), causal=False)
    nothing = kv.tail_key[:, own, :0]
    for first in range(0, paged_tokens // size, PAGES_AT_ONCE):
        places = group.table[:, own, first : min(first + PAGES_AT_ONCE, paged_tokens // size)].long()
        pages = HeadGroup(group.layout, (0,), group.pool[places])
        sinks = (None, None) if first or kv.sink_key is None else (kv.sink_key[:, own], kv.sink_value[:, own])
        part = CachedKV((pages,), places.shape[2] * size, nothing, nothing, *sinks)
        found = merge_attention(found, prefill_attention(q.double(), part, causal=False))
    return found


@pytest.mark.skipif(library.without_library() is not None, reason="no C++ kernels")
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["turbo4", "turbo2"])
def test_a_million_tokens_on_a_cpu(preset: str):
    kv = written(preset, MILLION + 5, 1, 64, torch.device("cpu")).view()
    q = normal(1, 4, 1, 64, seed=3).half()
    want = definition(q, kv, 0)
    for got in (paged_decode(q, kv, implementation="cpu"), paged_decode(q, kv, implementation="cpu", split=64)):
        assert relative_rms(got.out, want.out) < BUDGET
        assert (got.lse - want.lse).abs().max() < LSE_BUDGET
    got = paged_decode(q, kv, implementation="reference")
    assert relative_rms(got.out, want.out) < 1e-3  # its output too is float16
    assert (got.lse - want.lse).abs().max() < LSE_BUDGET


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["turbo4", "turbo2"])
def test_a_million_tokens_on_a_gpu(preset: str):
    kv = written(preset, MILLION + 5, 8, 128, DEVICE).view()
    q = normal(1, 32, 1, 128, seed=3).half().to(DEVICE)
    decoded = [paged_decode(q, kv, implementation=name, split=split)
               for name in ("gluon", "triton") for split in (None, 64)]  # fmt: skip
    chunk = [normal(1, heads, 64, 128, seed=i).half().to(DEVICE) for i, heads in ((4, 32), (5, 8), (6, 8))]
    chunked = chunked_prefill(*chunk, kv)
    for head in (0, 7):
        own, kv_own = slice(4 * head, 4 * head + 4), slice(head, head + 1)
        want = definition(q[:, own], kv, head)
        for got in decoded:
            assert relative_rms(got.out[:, own, :, 1:], want.out[..., 1:]) < BUDGET
            assert (got.out[:, own, :, 0] - want.out[..., 0]).square().mean().sqrt() < FIRST_CHANNEL
            assert (got.lse[:, own] - want.lse).abs().max() < LSE_BUDGET
        itself = int8_prefill(chunk[0][:, own], *(x[:, kv_own] for x in chunk[1:]), implementation="reference")
        before = definition(chunk[0][:, own], kv, head)
        want = merge_attention(before, AttentionOutput(itself.out.double(), itself.lse))
        assert relative_rms(chunked.out[:, own], want.out) < 0.015
        assert (chunked.lse[:, own] - want.lse).abs().max() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["hopper", "triton"])
def test_int8_prefill_over_a_million_tokens(implementation: str):
    if implementation == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    random = torch.Generator(DEVICE).manual_seed(1)
    q, k, v = (torch.randn(1, heads, tokens, 128, generator=random, device=DEVICE).half()
               for heads, tokens in ((2, 128), (1, MILLION), (1, MILLION)))  # fmt: skip
    chunk = int8_prepass.quantise_chunk(q, k, v, 128**-0.5)
    out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)
    if implementation == "hopper":
        from turboattention.ops.prefill import hopper

        hopper.attention(q, chunk, out, lse, 128**-0.5, causal=True)
    else:
        int8_triton.attention(chunk, out, lse, causal=True)
    want = int8.int8_attention(chunk, causal=True)
    assert relative_rms(out, want.out) < 0.015
    assert (lse - want.lse).abs().max() < 0.05


# ---- offsets --------------------------------------------------------------------------------------------------------
def moved(kv: PagedKV) -> PagedKV:
    """The same cache with every second page beyond 2^31 words of 16 bits; on a CPU only what is written takes room."""
    (group,) = kv.groups
    count = 2**32 // group.layout.nbytes + 1 + len(group.pool)
    table = torch.where(group.table % 2 == 1, count - 1 - group.table, group.table)
    pool = torch.empty(count, group.layout.nbytes, dtype=torch.uint8, device=group.pool.device)
    pool[table.long()] = group.pool[group.table.long()]
    return replace(kv, groups=(replace(group, pool=pool, table=table),))


def paged_of(implementation: str, length: int = 200) -> PagedCache:
    """Two sequences with one KV head; no entry of the table is out of range."""
    policy = policy_of("turbo4")
    cache = PagedCache(policy.cache, policy.head_formats(0, 1), rows=2, max_tokens=256, head_dim=64,
                       device=place(implementation))  # fmt: skip
    key, value = (normal(2, 1, length, 64, seed=i).half().to(place(implementation)) for i in (1, 2))
    cache.append(key, value, when="after")
    return cache


@pytest.mark.parametrize("implementation", ["reference", CPP, "triton", GLUON])
def test_decode_of_pages_far_out(implementation: str):
    kv = paged_of(implementation).view()
    q = normal(2, 2, 1, 64, seed=3).half().to(place(implementation))
    far = moved(kv)
    assert int(far.groups[0].table.max()) * far.groups[0].layout.nbytes > 2**32
    want = paged_decode(q, kv, implementation=implementation)
    got = paged_decode(q, far, implementation=implementation)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_expansion_of_pages_far_out(implementation: str):
    kv = paged_of(implementation).view()
    key, value = (normal(6, 1, 64, seed=i).half().to(DEVICE) for i in (4, 5))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
    want, got = (
        expand_with_chunk(view, key, value, cu, total=406, longest=204, implementation=implementation)
        for view in (kv, moved(kv))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("implementation", ["reference", CPP, "triton"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_append_of_pages_far_out(implementation: str):
    from turboattention.ops.append import cpu, paged, triton_paged

    modules = {"reference": paged, "cpu": cpu, "triton": triton_paged}
    device = place(implementation)
    near = paged_of(implementation)
    far = moved(paged_of(implementation).view())  # with a tail of its own
    key, value = (normal(2, 1, 60, 64, seed=i).half().to(device) for i in (4, 5))
    fault = torch.zeros(2, dtype=torch.int32, device=device)
    for kv in (near.view(), far):
        modules[implementation].append_paged(kv, key, value, when="after", fault=fault)
    assert fault.tolist() == [0, 0]
    (a,), (b,) = near.groups, far.groups
    assert torch.equal(b.pool[b.table.long()], a.pool[a.table.long()])


@pytest.mark.parametrize("implementation", [CPP, "triton", GLUON])
def test_contiguous_pages_far_out(implementation: str):
    """The second row of a batch begins beyond 2^31 words of 16 bits."""
    kv = sequence(paged_of(implementation).view(), 0)
    (group,) = kv.groups
    q = normal(1, 2, 1, 64, seed=3).half().to(place(implementation)).expand(2, -1, -1, -1)
    twice = [x.expand(2, -1, -1, -1).contiguous() for x in (kv.tail_key, kv.tail_value, kv.sink_key, kv.sink_value)]
    answers = []
    for room in (3, 2**32 // group.layout.nbytes + 1):
        pages = torch.empty(2, 1, room, group.layout.nbytes, dtype=torch.uint8, device=q.device)
        pages[:, :, :3] = group.pages
        view = CachedKV((replace(group, pages=pages),), kv.page_tokens, *twice)
        answers.append(cached_attention(q, view, implementation=implementation))
    assert relative_rms(answers[1].out, answers[0].out) < BUDGET  # another division of the work
    assert torch.equal(answers[1].out[0], answers[1].out[1])


@pytest.mark.parametrize("implementation", [CPP, pytest.param("triton", marks=pytest.mark.gpu), GLUON])
@pytest.mark.parametrize("split", [None, 1])
def test_four_million_tokens_of_a_few_pages(split: int | None, implementation: str):
    """The table names the same three pages again and again: the output is theirs, the LSE the logarithm of times more.

    65,536 programs of one page each: numbers of pages times numbers of programs reach 2^32.
    """
    policy = policy_of("turbo4", sinks=0)
    few = paged(policy, (192,), kv_heads=1, device=place(implementation)).view()
    (group,) = few.groups
    times = 2**16 // 3 + 1
    table = group.table[:, :, :3].repeat(1, 1, times)
    tokens = torch.full((1,), 192 * times, dtype=torch.int32, device=place(implementation))
    many = replace(few, groups=(replace(group, table=table),), lengths=tokens, page_tokens=tokens)
    q = normal(1, 2, 1, 64, seed=3).half().to(place(implementation))
    want = paged_decode(q.double(), few, implementation="reference")
    got = paged_decode(q, many, implementation=implementation, split=split)
    assert relative_rms(got.out, want.out) < BUDGET
    assert (got.lse - want.lse - torch.tensor(float(times)).log()).abs().max() < LSE_BUDGET
