"""Chunked prefill: a compressed prefix plus the chunk itself in INT8, against float64 attention and the definition."""

from collections.abc import Callable
from dataclasses import replace

import caches
import pytest
import torch
from caches import normal
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

import turboattention as ta
from turboattention.config import CHUNK_QUERIES, AttentionConfig
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.kvcache import LayerCache
from turboattention.kvcache.paged import PagedCache
from turboattention.ops import CachedKV, attend, cached_attention, chunked_prefill
from turboattention.ops.common.paged_kv import sequence
from turboattention.ops.dispatch import without_cpu
from turboattention.ops.prefill import over_cache, reference
from turboattention.ops.prefill.int8_prefill import int8_prefill
from turboattention.ops.prefill.reference import AttentionOutput, expand_cache, merge_attention, prefill_attention
from turboattention.ops.prefill.sequences import Sequences
from turboattention.policy import Policy
from turboattention.quant.error import relative_rms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Against float64 attention: the rounding of Q, K and V to INT8 (and of P in a kernel), as in test_prefill_int8.
LIMIT, LSE_LIMIT = 0.03, 0.08
# Kernels against the definition: 8-bit P of the chunk, 16 bits over the prefix.
# Of the largest of thousands of rows: rounding 128 probabilities moves a peaked row's sum by 1 to 2 % (one
# standard deviation).
BUDGET, LSE_BUDGET = 0.015, 0.05
INT8_CHUNK = AttentionConfig(chunk_bits=8)
NO_CPU = without_cpu(DEVICE)
CPU = pytest.param("cpu", marks=pytest.mark.skipif(NO_CPU is not None, reason=str(NO_CPU)))


def policy_of(preset: str, sinks: int | None = None) -> Policy:
    policy = Policy.from_preset(preset)
    return policy if sinks is None else replace(policy, cache=replace(policy.cache, sink_tokens=sinks))


def view_and_queries(
    prefix: int, tokens: int, *, preset: str = "turbo4", head_dim: int = 64, kv_heads: int = 2, ratio: int = 2,
    starts: tuple[int, ...] | None = None, batch: int = 1, dtype: torch.dtype = torch.float16, sinks: int | None = None,
) -> tuple[Tensor, CachedKV]:  # fmt: skip
    """Queries of a chunk, and a cache of ``prefix`` older tokens (compressed) and the chunk itself (exact)."""
    policy = policy_of(preset, sinks)
    cache = LayerCache(policy.cache, policy.head_formats(0, kv_heads))
    batch = batch if starts is None else len(starts)
    key, value = (normal(batch, kv_heads, prefix + tokens, head_dim, seed=i).to(DEVICE, dtype) for i in (1, 2))
    key[..., 3] += 6.0  # what smoothing takes away
    q = normal(batch, kv_heads * ratio, prefix + tokens, head_dim, seed=3).to(DEVICE, dtype)
    cache.set_padding(None if starts is None else torch.tensor(starts, device=DEVICE))
    if prefix:
        cache.append(key[:, :, :prefix], value[:, :, :prefix])
        cache.observe(q[:, :, :prefix])
        cache.commit()
    cache.append(key[:, :, prefix:], value[:, :, prefix:])
    return q[:, :, prefix:], cache.view()


def exact(q: Tensor, view: CachedKV, window: int | None = None) -> AttentionOutput:
    """Attention in float64 over what the codes of the prefix stand for and the exact chunk."""
    key, value = expand_cache(view, torch.float64)
    ratio = q.shape[1] // view.num_kv_heads
    scores = q.double() @ key.repeat_interleave(ratio, 1).mT * q.shape[-1] ** -0.5
    mask = view.visible(q.shape[2], True, window)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ value.repeat_interleave(ratio, 1)
    return AttentionOutput(out, torch.logsumexp(scores, -1))


def run(q: Tensor, view: CachedKV, **arguments: object) -> AttentionOutput:
    prefix, k, v = view.split(q.shape[2])
    return chunked_prefill(q, k, v, prefix, **arguments)


def assert_near(got: AttentionOutput, want: AttentionOutput, limit: float, lse_limit: float) -> None:
    seen = torch.isfinite(want.lse)
    assert torch.isfinite(got.out).all()
    assert relative_rms(got.out, want.out) <= limit
    assert (got.out - want.out).abs().max() <= 0.1 * want.out.abs().max()
    error = (got.lse - want.lse)[seen]
    assert error.abs().max() <= lse_limit
    assert error.square().mean().sqrt() <= lse_limit / 4
    assert (got.lse[~seen] == -torch.inf).all()
    out = got.out.transpose(0, 1) if got.lse.ndim == 2 else got.out  # packed: [tokens, heads, head_dim]
    assert (out[~seen] == 0).all()


# ---- the definition against float64 ---------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["fp16", "turbo4", "kivi4", "paper4"])
@pytest.mark.parametrize(
    ("prefix", "tokens", "head_dim", "ratio"),
    [(1, 64, 64, 1), (63, 65, 96, 3), (64, 111, 128, 4), (200, 70, 256, 2), (300, 300, 64, 7)],
)
def test_definition(preset: str, prefix: int, tokens: int, head_dim: int, ratio: int):
    q, view = view_and_queries(prefix, tokens, preset=preset, head_dim=head_dim, ratio=ratio, batch=2)
    got = run(q, view, implementation="reference")
    assert got.out.dtype == q.dtype
    assert got.lse.dtype == torch.float32
    assert_near(got, exact(q, view), LIMIT, LSE_LIMIT)


@pytest.mark.parametrize("window", [1, 2, 40, 70, 100, 1000])
def test_window_of_the_definition(window: int):
    q, view = view_and_queries(200, 70)
    assert_near(run(q, view, window=window, implementation="reference"), exact(q, view, window), LIMIT, LSE_LIMIT)


PADDING = (0, 30, 129, 130, 135, 200)  # the prefix ends at 130, the chunk at 200


def test_left_padding_of_the_definition():
    """Padding inside the prefix, up to its end, into the chunk, and a row of nothing else."""
    q, view = view_and_queries(130, 70, starts=PADDING, sinks=4)
    assert_near(run(q, view, implementation="reference"), exact(q, view), LIMIT, LSE_LIMIT)
    windowed = run(q, view, window=90, implementation="reference")
    assert_near(windowed, exact(q, view, 90), LIMIT, LSE_LIMIT)


def test_the_prefix_is_not_rounded_further():
    """With nearly all weight on the prefix the result has the error of 16-bit attention, not that of INT8."""
    q, view = view_and_queries(200, 64, dtype=torch.float32)
    prefix, k, v = view.split(64)
    q[..., 0], k[..., 0] = 8.0, -40.0
    got = chunked_prefill(q, k, v, prefix, implementation="reference")
    assert relative_rms(got.out, prefill_attention(q, prefix, causal=False).out) < 1e-5


def test_nothing_before_the_chunk_is_int8_prefill():
    q, view = view_and_queries(0, 111, batch=2)
    prefix, k, v = view.split(111)
    want = int8_prefill(q, k, v, implementation="reference")
    for empty in (None, prefix):
        got = chunked_prefill(q, k, v, empty, implementation="reference")
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)


def test_nothing_before_the_chunk_for_kernels():
    q, view = view_and_queries(0, 70)
    prefix, k, v = view.split(70)
    want = int8_prefill(q, k, v, implementation="triton")
    for empty in (None, prefix):
        assert torch.equal(chunked_prefill(q, k, v, empty, implementation="triton").out, want.out)


# ---- merge ----------------------------------------------------------------------------------------------------------
def test_merge_of_two_parts_is_the_whole():
    key, value, q = (normal(1, 2, 128, 64, seed=i) for i in range(3))
    halves = [CachedKV((), 0, key[:, :, i : i + 64], value[:, :, i : i + 64]) for i in (0, 64)]
    whole = prefill_attention(q[:, :, :5], CachedKV((), 0, key, value), causal=False)
    got = merge_attention(*(prefill_attention(q[:, :, :5], half, causal=False) for half in halves))
    torch.testing.assert_close(got.out, whole.out, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.lse, whole.lse, atol=2e-6, rtol=0)


def test_merge_where_a_part_saw_nothing():
    out, lse = normal(3, 64, seed=1), torch.tensor([1.0, -500.0, 80.0])
    nothing = AttentionOutput(torch.zeros(3, 64), torch.full((3,), -torch.inf))
    for a, b in ((nothing, AttentionOutput(out, lse)), (AttentionOutput(out, lse), nothing)):
        got = merge_attention(a, b)
        assert torch.equal(got.out, out)
        assert torch.equal(got.lse, lse)
    got = merge_attention(nothing, nothing)
    assert (got.out == 0).all()
    assert (got.lse == -torch.inf).all()


# ---- kernels against the definition ---------------------------------------------------------------------------------
# Few queries and heads: the interpreter takes a tenth of a second for each.
@pytest.mark.parametrize(
    ("prefix", "tokens", "head_dim", "ratio", "preset"),
    [(64, 20, 64, 3, "turbo4"), (130, 17, 80, 1, "turbo2"), (150, 9, 128, 2, "int8")],
)
@pytest.mark.parametrize("implementation", ["triton", CPU])
def test_kernels(prefix: int, tokens: int, head_dim: int, ratio: int, preset: str, implementation: str):
    q, view = view_and_queries(prefix, tokens, preset=preset, head_dim=head_dim, ratio=ratio, kv_heads=1)
    got = run(q, view, implementation=implementation)
    assert got.out.dtype == q.dtype
    assert_near(got, run(q, view, implementation="reference"), BUDGET, LSE_BUDGET)
    assert_near(got, exact(q, view), LIMIT, LSE_LIMIT)


@pytest.mark.parametrize("implementation", ["triton", CPU])
@pytest.mark.parametrize("window", [1, 15, 100])
def test_window_of_kernels(window: int, implementation: str):
    q, view = view_and_queries(130, 20, kv_heads=1)
    got = run(q, view, window=window, implementation=implementation)
    assert_near(got, run(q, view, window=window, implementation="reference"), BUDGET, LSE_BUDGET)


def test_window_of_several_launches(monkeypatch: pytest.MonkeyPatch):
    from turboattention.ops.decode import launch

    monkeypatch.setattr(launch, "QUERY_BLOCK", 8)
    q, view = view_and_queries(130, 20, kv_heads=1)
    got = run(q, view, window=100, implementation="triton")
    assert_near(got, run(q, view, window=100, implementation="reference"), BUDGET, LSE_BUDGET)


def test_a_dense_chunk_with_its_sequences_named():
    q, view = view_and_queries(64, 20, kv_heads=1, ratio=1)
    prefix, k, v = view.split(q.shape[2])
    got = chunked_prefill(q, k, v, prefix, sequences=Sequences.dense(q, k), implementation="triton")
    want = run(q, view, implementation="triton")
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("implementation", ["triton", CPU])
def test_left_padding_of_kernels(implementation: str):
    q, view = view_and_queries(70, 15, starts=(0, 30, 69, 75, 85), sinks=4, kv_heads=1, ratio=1)
    want = run(q, view, implementation="reference")
    assert_near(run(q, view, implementation=implementation), want, BUDGET, LSE_BUDGET)


@pytest.mark.parametrize("implementation", ["reference", "triton", CPU])
def test_padding_may_hold_anything(implementation: str):
    q, view = view_and_queries(64, 20, starts=(0, 70), kv_heads=1, ratio=1)
    want = run(q, view, implementation="reference")
    view = replace(view, tail_key=view.tail_key.clone(), tail_value=view.tail_value.clone())
    for x in (q, view.tail_key, view.tail_value):
        x[1, :, :6] = torch.nan
    assert_near(run(q, view, implementation=implementation), want, BUDGET, LSE_BUDGET)


def test_kernels_never_expand_a_page(monkeypatch: pytest.MonkeyPatch):
    q, view = view_and_queries(130, 4, kv_heads=1)

    def refuse(*_: object) -> None:
        raise AssertionError("a page was turned back into 16 bits")

    for name in ("decode_pages", "expand_pages"):
        monkeypatch.setattr(reference, name, refuse)
    for implementation in ("triton", *(() if NO_CPU else ("cpu",))):
        assert torch.isfinite(run(q, view, implementation=implementation).out).all()
    with pytest.raises(AssertionError, match="a page was turned back"):
        run(q, view, implementation="reference")


# ---- paged, sequences of any lengths --------------------------------------------------------------------------------
PREFIXES, CHUNKS = (0, 130, 64, 1), (10, 1, 0, 7)


def paged(prefixes: tuple[int, ...], head_dim: int = 64) -> PagedCache:
    return caches.paged(policy_of("turbo4"), prefixes, head_dim=head_dim, device=DEVICE)


def packed_chunk(head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = sum(CHUNKS)
    q, k, v = (normal(total, heads, head_dim, seed=i).to(DEVICE, torch.float16) for i, heads in
               ((4, 4), (5, 2), (6, 2)))  # fmt: skip
    cu = torch.tensor([sum(CHUNKS[:i]) for i in range(len(CHUNKS) + 1)], dtype=torch.int32, device=DEVICE)
    return q, k, v, cu


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("implementation", ["reference", "triton", CPU])
def test_packed_chunks_over_a_paged_prefix(implementation: str, window: int | None):
    cache, (q, k, v, cu) = paged(PREFIXES), packed_chunk()
    sequences = Sequences.packed(q, k, cu, max_q=max(CHUNKS))
    got = chunked_prefill(q, k, v, cache.view(), sequences=sequences, window=window, implementation=implementation)
    assert got.lse.shape == (4, sum(CHUNKS))
    assert torch.isfinite(got.out).all()
    for row, (first, last) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        if first == last:
            continue
        alone = sequence(cache.view(), row)
        own = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
        tail = [torch.cat([old, new], 2) for old, new in ((alone.tail_key, own[1]), (alone.tail_value, own[2]))]
        want = exact(own[0], replace(alone, tail_key=tail[0], tail_value=tail[1]), window)
        part = AttentionOutput(got.out[first:last].transpose(0, 1)[None], got.lse[None, :, first:last])
        assert_near(part, want, LIMIT, LSE_LIMIT)


@pytest.mark.parametrize("implementation", ["reference", "triton", CPU])
def test_dense_chunk_over_a_paged_prefix(implementation: str):
    cache = paged((0, 130))
    q, k, v = (normal(2, heads, 9, 64, seed=i).to(DEVICE, torch.float16) for i, heads in ((4, 4), (5, 2), (6, 2)))
    got = chunked_prefill(q, k, v, cache.view(), implementation=implementation)
    for row in range(2):
        one = slice(row, row + 1)
        want = chunked_prefill(q[one], k[one], v[one], sequence(cache.view(), row), implementation="reference")
        assert_near(AttentionOutput(got.out[one], got.lse[one]), want, BUDGET, LSE_BUDGET)


# ---- the switch -----------------------------------------------------------------------------------------------------
def test_16_bits_are_what_they_were():
    q, view = view_and_queries(200, 111)
    assert AttentionConfig().chunk_bits == 16
    want = over_cache.over_cache(q, view)
    for got in (cached_attention(q, view), cached_attention(q, view, config=AttentionConfig(chunk_bits=16))):
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)
    assert torch.equal(attend(q, view), want.out)


@pytest.mark.parametrize("prefix", [0, 200])
def test_8_bits_are_for_chunks_of_64_and_more(prefix: int):
    q, view = view_and_queries(prefix, CHUNK_QUERIES)
    got = attend(q, view, config=INT8_CHUNK)
    want = run(q, view)
    assert torch.equal(got, want.out)
    assert torch.equal(cached_attention(q, view, config=INT8_CHUNK).lse, want.lse)
    exact_out = attend(q, view)
    assert not torch.equal(got, exact_out)
    assert relative_rms(got, exact_out) < LIMIT
    for short in (1, CHUNK_QUERIES - 1):
        part = q[:, :, -short:]
        assert torch.equal(attend(part, view, config=INT8_CHUNK), attend(part, view))
    whole = attend(q, view, causal=False, config=INT8_CHUNK)
    assert torch.equal(whole, attend(q, view, causal=False))


def test_function_takes_the_policy():
    q, k, v = normal(1, 4, 200, 64, seed=1), normal(1, 2, 256, 64, seed=2), normal(1, 2, 256, 64, seed=3)
    exactly = ta.attention(q, k, v, config="turbo4")
    policy = replace(Policy.from_preset("turbo4"), attention=INT8_CHUNK)
    got = ta.attention(q, k, v, config=policy)
    # 256 - 200 = 56: the first 8 queries are a step of their own, too short for INT8.
    assert torch.equal(got[:, :, :8], exactly[:, :, :8])
    assert not torch.equal(got, exactly)
    assert relative_rms(got, exactly) < LIMIT
    assert torch.equal(ta.attention(q, k, v, causal=False, config=policy), ta.attention(q, k, v, causal=False))


# ---- what does not fit ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v, p: ((q, k, v, p), {"softcap": 30.0}), UnsupportedError, "softcap: .*chunk_bits 16"),
        (lambda q, k, v, p: ((q.requires_grad_(), k, v, p), {}), UnsupportedError, "has no gradient; .*chunk_bits 16"),
        (lambda q, k, v, p: ((q, k, v, p), {"window": 0}), InvalidInputError, "window: expected at least 1"),
        (lambda q, k, v, p: ((q, k, v, p), {"scale": 0.0}), InvalidInputError, "scale: expected a positive"),
        (lambda q, k, v, p: ((q.double(), k, v, p), {}), InvalidInputError, "q: expected dtype"),
        (lambda q, k, v, p: ((q[:, :, 1:], k, v, p), {}), InvalidInputError, "k: expected the same tokens as q"),
        (lambda q, k, v, p: ((q[:1], k[:1], v[:1], p), {}), InvalidInputError, "prefix: expected batch 1, 2 KV heads"),
        (lambda q, k, v, p: ((q, k, v, p), {"implementation": "gluon"}), InvalidInputError, "implementation: expected"),
    ],
    ids=["softcap", "gradient", "window", "scale", "dtype", "tokens", "batch", "implementation"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: Callable[..., tuple], error: type[Exception], message: str):
    q, view = view_and_queries(100, 64, batch=2, dtype=torch.float32)
    prefix, k, v = view.split(64)
    positional, named = change(q, k, v, prefix)
    with pytest.raises(error, match=message):
        chunked_prefill(*positional, **named)


def test_what_does_not_fit_the_switch_is_refused():
    q, view = view_and_queries(64, 64)
    with pytest.raises(
        InvalidInputError, match=r"^tokens: expected at most 64 \(those not yet in pages\), received 65"
    ):
        cached_attention(torch.cat([q, q[:, :, :1]], 2), view, config=INT8_CHUNK)
    with pytest.raises(UnsupportedError, match=r"^softcap: .*use 16 bits"):
        attend(q, view, softcap=30.0, config=INT8_CHUNK)
    q, k, v, cu = packed_chunk()
    _, prefix = view_and_queries(64, 1, batch=len(CHUNKS))
    with pytest.raises(InvalidInputError, match="prefix: expected a PagedKV with packed sequences"):
        chunked_prefill(q, k, v, prefix, sequences=Sequences.packed(q, k, cu))


# ---- on a GPU -------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["int8", "turbo4", "turbo3", "turbo2"])
@pytest.mark.parametrize(
    ("prefix", "tokens", "head_dim", "ratio"),
    [(64, 64, 64, 1), (1000, 777, 80, 3), (4096, 2048, 128, 4), (2049, 1111, 128, 7), (300, 130, 256, 2)],
)
def test_gpu(prefix: int, tokens: int, head_dim: int, ratio: int, preset: str, dtype: torch.dtype):
    q, view = view_and_queries(prefix, tokens, preset=preset, head_dim=head_dim, ratio=ratio, batch=2, dtype=dtype)
    got = cached_attention(q, view, config=INT8_CHUNK)
    assert_near(got, run(q, view, implementation="reference"), BUDGET, LSE_BUDGET)
    assert_near(run(q, view, window=500), run(q, view, window=500, implementation="reference"), BUDGET, LSE_BUDGET)


@pytest.mark.gpu
def test_gpu_left_padding():
    q, view = view_and_queries(1000, 700, starts=(0, 3, 999, 1000, 1300, 1700), sinks=4, head_dim=128)
    assert_near(run(q, view), run(q, view, implementation="reference"), BUDGET, LSE_BUDGET)


@pytest.mark.gpu
def test_gpu_packed_chunks_wait_for_nothing():
    cache, (q, k, v, cu) = paged(PREFIXES, 128), packed_chunk(128)
    sequences = Sequences.packed(q, k, cu, max_q=max(CHUNKS))
    want = chunked_prefill(q, k, v, cache.view(), sequences=sequences, implementation="reference")
    chunked_prefill(q, k, v, cache.view(), sequences=sequences)  # compiles, and copies the numbers of the heads
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = chunked_prefill(q, k, v, cache.view(), sequences=sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_near(got, want, BUDGET, LSE_BUDGET)


@pytest.mark.gpu
def test_gpu_memory_holds_no_copy_of_the_prefix():
    q, view = view_and_queries(32768, 256, head_dim=128, kv_heads=8)
    run(q, view)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(q, view)
    of_one_tensor = 8 * 32768 * 128 * 2
    assert torch.cuda.max_memory_allocated() - before < of_one_tensor
