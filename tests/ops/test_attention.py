"""Attention over pages against dense attention in float64, written here on the values that the codes stand for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import turboattention as ta
from turboattention.config import AttentionConfig, CacheConfig, TensorFormat, presets
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.kvcache import LayerCache
from turboattention.ops import CachedKV, attend, decode_attention, prefill_attention
from turboattention.ops.common.folded import fold_scores, fold_values
from turboattention.ops.prefill import reference
from turboattention.policy import Override, Policy
from turboattention.quant.codec import decode_pages, encode_pages, expand_pages
from turboattention.quant.error import max_error, relative_rms, sqnr_db
from turboattention.quant.granularity import PerToken
from turboattention.quant.layout import PageLayout

PRESETS = tuple(presets())
HEAD_DIMS = (64, 80, 96, 128, 256)
LENGTHS = (1, 63, 64, 65, 111, 200)
PLAIN = AttentionConfig()
# Relative RMS of the output against float64, at rounding level. Measured up to 2.6e-6 in float32. For float64 queries
# 2.7e-7, because pages expand to float32 (rotated formats round there once more); 3e-15 where nothing is rotated.
BOUND = {torch.float32: 6e-6, torch.float64: 6e-7}
# Difference of the log-sum-exp (natural log, returned in float32) per unit of its size. Measured up to 2e-6.
LSE_BOUND = 5e-6


def divides(preset: str, head_dim: int) -> bool:
    return not preset.startswith("kivi") or head_dim % 32 == 0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(
    preset: str | Policy,
    length: int,
    *,
    head_dim: int = 64,
    kv_heads: int = 2,
    batch: int = 2,
    starts: tuple[int, ...] | None = None,
    overrides: tuple[Override, ...] = (),
    chunk: int = 50,
) -> LayerCache:
    """A cache of random tokens, appended in chunks, with every page compressed that may be."""
    policy = replace(Policy.resolve(preset), overrides=overrides)
    cache = LayerCache(policy.cache, policy.head_formats(0, kv_heads))
    key, value, q = (normal(batch, kv_heads, length, head_dim, seed=i) for i in (1, 2, 3))
    key[..., 3] *= 8.0  # an outlier channel
    for first in range(0, length, chunk):
        part = slice(first, first + chunk)
        cache.append(key[:, :, part], value[:, :, part])
        cache.set_padding(None if starts is None else torch.tensor(starts))
        cache.observe(q[:, :, part])
        cache.settle()
    cache.commit()
    return cache


def dense_keys_and_values(kv: CachedKV) -> tuple[Tensor, Tensor]:
    """K and V of all tokens in float64, put together token by token from pages, sinks and tail."""
    batch, heads, tail, dim = kv.tail_key.shape
    key, value = (torch.zeros(batch, heads, kv.page_tokens + tail, dim, dtype=torch.float64) for _ in range(2))
    for group in kv.groups:
        expanded = expand_pages(group.layout, group.pages)
        for slot, head in enumerate(group.heads):
            for page in range(group.pages.shape[2]):
                tokens = slice(page * group.layout.page_size, (page + 1) * group.layout.page_size)
                key[:, head, tokens] = expanded[0][:, slot, page].double()
                value[:, head, tokens] = expanded[1][:, slot, page].double()
    key[:, :, kv.page_tokens :], value[:, :, kv.page_tokens :] = kv.tail_key.double(), kv.tail_value.double()
    if kv.sink_key is not None and kv.sink_value is not None:
        for row in range(batch):
            start = 0 if kv.starts is None else int(kv.starts[row])
            for slot in range(kv.sink_key.shape[2]):
                if start + slot < kv.page_tokens:
                    key[row, :, start + slot] = kv.sink_key[row, :, slot].double()
                    value[row, :, start + slot] = kv.sink_value[row, :, slot].double()
    return key, value


def dense_attention(
    q: Tensor, kv: CachedKV, *, scale: float | None = None, causal: bool = True, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ordinary attention in float64."""
    key, value = dense_keys_and_values(kv)
    ratio, queries, length = q.shape[1] // key.shape[1], q.shape[2], key.shape[2]
    key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    scores = q.double() @ key.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for row in range(q.shape[0]):
        start = 0 if kv.starts is None else int(kv.starts[row])
        scores[row, :, :, :start] = -torch.inf
        for i in range(queries if causal else 0):
            scores[row, :, i, length - queries + i + 1 :] = -torch.inf
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ value, torch.logsumexp(scores, -1)


def assert_right(q: Tensor, kv: CachedKV, **arguments: float | bool | None) -> None:
    """Both forms agree with each other and with dense attention, output and log-sum-exp."""
    out, lse = dense_attention(q, kv, **arguments)
    folded = prefill_attention(q, kv, **arguments)
    expanded = prefill_attention(q, kv, form="expanded", **arguments)
    bound = BOUND[q.dtype]
    for got in (folded, expanded):
        assert got.out.shape == q.shape
        assert got.out.dtype == q.dtype
        assert got.lse.dtype == torch.float32
        assert relative_rms(got.out, out) < bound
        assert max_error(got.out, out) < 10 * bound
        unseen = torch.isinf(lse)
        assert torch.equal(torch.isneginf(got.lse), unseen)
        assert (got.out[unseen] == 0).all()
        assert max_error(got.lse[~unseen], lse[~unseen]) < LSE_BOUND * max(1.0, lse[~unseen].abs().max().item())
    assert relative_rms(folded.out, expanded.out) < bound


# --- folded, expanded and dense ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_forms_agree_with_dense_attention(preset: str, head_dim: int, dtype: torch.dtype):
    if not divides(preset, head_dim):
        with pytest.raises(UnsupportedError, match=f"groups of 32 channels .*head_dim {head_dim}"):
            ta.attention(*(normal(1, 1, 4, head_dim) for _ in range(3)), config=preset)
        return
    view = filled(preset, 200, head_dim=head_dim, starts=(0, 70)).view()
    assert (view.page_tokens > 0) == (preset != "fp16")
    assert_right(normal(2, 6, 23, head_dim).to(dtype), view)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("preset", PRESETS)
def test_odd_lengths(preset: str, length: int):
    view = filled(preset, length, kv_heads=1).view()
    assert_right(normal(2, 2, min(length, 65), 64), view)


@pytest.mark.parametrize("ratio", [1, 3, 7, 16])
@pytest.mark.parametrize("preset", ["turbo4", "turbo2", "paper3", "kivi4"])
def test_query_heads_per_kv_head(preset: str, ratio: int):
    assert_right(normal(2, 2 * ratio, 9, 64), filled(preset, 200).view())


@pytest.mark.parametrize("queries", [1, 37, 64, 100, 200])
def test_chunk_of_queries(queries: int):
    view = filled("turbo4", 200, starts=(0, 70)).view()
    q = normal(2, 2, 200, 64)[:, :, 200 - queries :]
    assert_right(q, view)
    whole = prefill_attention(normal(2, 2, 200, 64), view).out[:, :, 200 - queries :]
    torch.testing.assert_close(prefill_attention(q, view).out, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "starts",
    [(0, 1), (0, 63), (64, 128), (70, 5), (197, 0), (199, 198), (192, 191), (0, 200)],
    ids=lambda starts: "-".join(map(str, starts)),
)
@pytest.mark.parametrize("preset", ["turbo4", "int8", "kivi2", "paper4", "fp16"])
def test_left_padding(preset: str, starts: tuple[int, int]):
    """Includes rows with fewer real tokens than sinks (197, 199), whole pages of padding and a row of nothing else."""
    policy = Policy.from_preset(preset)
    if policy.cache.sink_tokens:
        policy = replace(policy, cache=replace(policy.cache, sink_tokens=4))
    view = filled(policy, 200, starts=starts).view()
    assert_right(normal(2, 4, 90, 64), view)
    assert_right(normal(2, 4, 1, 64), view)


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_changes_nothing_for_the_other_tokens(preset: str):
    """A row behind one page of padding reads what the same row without padding reads."""
    size = presets()[preset].cache.page_size
    key, value, q = normal(1, 2, 200, 64, seed=1), normal(1, 2, 200, 64, seed=2), normal(1, 4, 10, 64)
    policy = Policy.from_preset(preset)
    outs = []
    for pad in (0, size):
        cache = LayerCache(policy.cache, policy.head_formats(0, 2))
        cache.append(*(torch.cat([torch.zeros(1, 2, pad, 64), x], 2) for x in (key, value)))
        cache.set_padding(torch.tensor([pad]))
        cache.commit()
        outs.append(prefill_attention(q, cache.view()).out)
    torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("preset", ["turbo3", "kivi4", "paper4", "fp16"])
def test_chunked_prefill(preset: str):
    """Every chunk, attended to as a model does (append, view, settle), equals dense attention over what it may read."""
    policy = Policy.from_preset(preset)
    cache = LayerCache(policy.cache, policy.head_formats(0, 2))
    key, value, q = (normal(2, 2, 300, 64, seed=i) for i in range(3))
    outs, done = [], 0
    for size in (1, 62, 1, 1, 90, 100, 45):
        chunk = slice(done, done + size)
        cache.append(key[:, :, chunk], value[:, :, chunk])
        cache.set_padding(torch.tensor([0, 30]))
        cache.observe(q[:, :, chunk])
        assert_right(q[:, :, chunk], cache.view())
        outs.append(attend(q[:, :, chunk], cache.view()))
        cache.settle()
        done += size
    if preset == "fp16":
        mask = torch.ones(300, 300, dtype=torch.bool).tril()[None].repeat(2, 1, 1)
        mask[1, :, :30] = False
        exact = scaled_dot_product_attention(q, key, value, attn_mask=mask[:, None])
        real = torch.tensor([[True] * 300, [False] * 30 + [True] * 270])[:, None, :, None].expand_as(q)
        torch.testing.assert_close(torch.cat(outs, 2)[real], exact[real], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": 0.3},
        {"scale": 1.0, "softcap": 5.0},
        {"softcap": 50.0},
        {"causal": False},
        {"causal": False, "softcap": 2.0, "scale": 0.01},
    ],
    ids=lambda arguments: "-".join(f"{k}={v}" for k, v in arguments.items()),
)
@pytest.mark.parametrize("preset", ["turbo4", "paper4", "kivi2", "fp16"])
def test_scale_softcap_and_no_mask(preset: str, arguments: dict[str, float]):
    # Smaller queries: the exponential multiplies the rounding of scores, which are large with these scales.
    assert_right(0.25 * normal(2, 4, 20, 64), filled(preset, 200, starts=(0, 70)).view(), **arguments)


def test_lse_merges_two_halves():
    """What the log-sum-exp is for: attention over two parts of the tokens, merged, is attention over all."""
    key, value, q = (normal(1, 2, 128, 64, seed=i) for i in range(3))
    parts = [CachedKV((), 0, key[:, :, i : i + 64], value[:, :, i : i + 64]) for i in (0, 64)]
    a, b = (prefill_attention(q[:, :, :5], part, causal=False) for part in parts)
    whole = prefill_attention(q[:, :, :5], CachedKV((), 0, key, value), causal=False)
    share = torch.sigmoid(a.lse - b.lse)[..., None]
    torch.testing.assert_close(share * a.out + (1 - share) * b.out, whole.out, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.logaddexp(a.lse, b.lse), whole.lse, atol=2e-6, rtol=0)


# --- protections and mixed formats ---


def test_sinks_are_read_exactly():
    """With all attention on one sink the output is its exact V; without sinks it is what the codes stand for."""
    key, value = normal(1, 1, 64, 64, seed=1), normal(1, 1, 64, 64, seed=2).half().float()
    key[0, 0, 2] = 4.0
    q = torch.full((1, 1, 1, 64), 4.0)
    errors = []
    for sinks in (4, 0):
        policy = Policy.from_preset("turbo2")
        cache = LayerCache(replace(policy.cache, sink_tokens=sinks), policy.head_formats(0, 1))
        cache.append(key, value)
        cache.commit()
        errors.append(max_error(decode_attention(q, cache.view()).out[0, 0, 0], value[0, 0, 2]))
    assert errors[0] < 1e-6
    assert errors[1] > 0.1


def test_as_many_sinks_as_a_page():
    policy = Policy.from_preset("turbo3")
    policy = replace(policy, cache=replace(policy.cache, sink_tokens=64))
    assert_right(normal(2, 4, 20, 64), filled(policy, 200, starts=(0, 70)).view())
    assert_right(normal(2, 4, 20, 64), filled(policy, 200).view())


def test_recent_window_is_read_exactly():
    policy = Policy.from_preset("turbo2")
    policy = replace(policy, cache=replace(policy.cache, recent_window=72))
    view = filled(policy, 200).view()
    assert view.page_tokens == 128
    assert view.tail_key.shape[2] == 72
    assert torch.equal(view.tail_value, normal(2, 2, 200, 64, seed=2)[:, :, 128:].half())
    assert_right(normal(2, 4, 20, 64), view)


MIXED = {
    "bits-by-head": (Override(8, head=0), Override(2, head=2)),
    "key-4-value-2": (Override(2, tensor="value"),),
    "key-3-of-one-head": (Override(3, head=1, tensor="key"),),
    "key-16-of-one-head": (Override(16, head=1, tensor="key"),),
    "value-16-of-one-head": (Override(16, head=1, tensor="value"),),
    "one-head-at-16": (Override(16, head=2),),
    "all-different": (
        Override(2, head=0),
        Override(8, head=0, tensor="value"),
        Override(3, head=1),
        Override(8, head=2, tensor="key"),
    ),
}


@pytest.mark.parametrize("overrides", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("preset", ["turbo4", "paper4", "kivi4"])
def test_mixed_bits(preset: str, overrides: tuple[Override, ...]):
    cache = filled(preset, 200, kv_heads=3, overrides=overrides, starts=(0, 70))
    assert sorted(h for g in cache.groups for h in g.heads) == [0, 1, 2]
    assert_right(normal(2, 6, 20, 64), cache.view())


@pytest.mark.parametrize("tensor", ["key", "value", "both"])
@pytest.mark.parametrize("preset", ["turbo4", "turbo2", "kivi4"])
def test_override_to_16_bits_keeps_the_values(preset: str, tensor: str):
    """A tensor at 16 bits comes back as its float16 values while the others are compressed."""
    cache = filled(preset, 256, kv_heads=2, overrides=(Override(16, head=1, tensor=tensor),))
    dense = dense_keys_and_values(cache.view())
    plain = [normal(2, 2, 256, 64, seed=i) for i in (1, 2)]
    plain[0][..., 3] *= 8.0
    for name, got, exact in zip(("key", "value"), dense, plain, strict=True):
        if tensor in (name, "both"):
            torch.testing.assert_close(got[:, 1], exact[:, 1].half().double(), atol=1e-6, rtol=0)
        assert sqnr_db(got[:, 0], exact[:, 0]) > 5.0


# --- one product at a time ---


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "fp16"])
def test_folded_products_of_one_page(preset: str, head_dim: int):
    config = presets()[preset].cache
    layout = PageLayout(config.page_size, head_dim, config.key, config.value)
    page = encode_pages(layout, *(normal(config.page_size, head_dim, seed=i) for i in (1, 2)))
    decoded = decode_pages(layout, page)
    q, p = normal(5, head_dim), torch.softmax(normal(5, config.page_size), -1)
    key, value = decoded.key.expand().double(), decoded.value.expand().double()
    # The zero point is a sum of its own, which partly cancels the codes' product: a few units of rounding more.
    assert relative_rms(fold_scores(q, decoded.key), q.double() @ key.T) < 3e-6
    assert relative_rms(fold_values(p, decoded.value), p.double() @ value) < 3e-6


# --- blocks of queries, decode, arithmetic of the presets ---


@pytest.mark.parametrize("config", [PLAIN, AttentionConfig(softmax="base2"), AttentionConfig(query_bits=8)], ids=repr)
@pytest.mark.parametrize("block", [64, 128, 1024])
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int, config: AttentionConfig):
    view, q = filled("turbo4", 300, batch=1).view(), normal(1, 2, 300, 64)
    expected = prefill_attention(q, view, config=config)
    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    got = prefill_attention(q, view, config=config)
    assert relative_rms(got.out, expected.out) < BOUND[torch.float32]
    assert max_error(got.lse, expected.lse) < LSE_BOUND * expected.lse.abs().max().item()


def test_blocks_of_queries_change_nothing_for_8_bit_probabilities(monkeypatch: pytest.MonkeyPatch):
    """The scale of P belongs to a tile of the paper, not to the block of rows that happens to be computed together."""
    view, q = filled("paper4", 300, batch=1).view(), normal(1, 2, 300, 64)
    config = presets()["paper4"].attention
    expected = prefill_attention(q, view, config=config).out
    monkeypatch.setattr(reference, "QUERY_BLOCK", 64)
    assert relative_rms(prefill_attention(q, view, config=config).out, expected) < 1e-6


def test_block_that_divides_nothing(monkeypatch: pytest.MonkeyPatch):
    view, q = filled("turbo4", 111, starts=(0, 20)).view(), normal(2, 2, 111, 64)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 7)
    assert_right(q, view)
    assert_right(q, view, causal=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_decode_is_prefill_of_one_token(preset: str):
    view, q, config = filled(preset, 200, starts=(0, 70)).view(), normal(2, 6, 1, 64), presets()[preset].attention
    one = decode_attention(q, view, scale=0.2, softcap=9.0, config=config)
    same = prefill_attention(q, view, scale=0.2, softcap=9.0, config=config)
    assert torch.equal(one.out, same.out)
    assert torch.equal(one.lse, same.lse)
    last = prefill_attention(torch.cat([normal(2, 6, 7, 64, seed=3), q], 2), view)
    torch.testing.assert_close(decode_attention(q, view).out, last.out[:, :, -1:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["paper4", "paper3"])
def test_forms_agree_in_the_arithmetic_of_the_paper(name: str):
    """In float32 a tie of the 8-bit rounding may fall either way: one step of P (1/119) in few elements."""
    config = presets()[name].attention
    view, q = filled(name, 200, starts=(0, 70)).view(), normal(2, 4, 50, 64)
    a = prefill_attention(q, view, config=config)
    b = prefill_attention(q, view, config=config, form="expanded")
    exact, lse = dense_attention(q, view)
    seen = torch.isfinite(lse)
    assert relative_rms(a.out, b.out) < 2e-3
    assert torch.equal(torch.isneginf(a.lse), ~seen)
    assert (a.out[~seen] == 0).all()
    assert max_error(a.lse[seen], lse[seen]) < 0.05  # that of INT8 queries
    assert sqnr_db(a.out, exact) > 20.0


@pytest.mark.parametrize("bits", [8, 16])
def test_base2_arithmetic(bits: int):
    config = AttentionConfig(softmax="base2", probability_bits=bits)
    view, q = filled("turbo4", 200, starts=(0, 70)).view(), normal(2, 4, 50, 64)
    exact, _ = dense_attention(q, view)
    assert sqnr_db(prefill_attention(q, view, config=config).out, exact) > (35.0 if bits == 8 else 70.0)


# --- torch's own attention, and the function for everyone ---


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "whole"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "tokens", "head_dim"),
    [(2, 2, 200, 200, 64), (6, 2, 111, 200, 80), (7, 1, 1, 65, 128), (3, 3, 63, 63, 60), (16, 1, 5, 300, 256)],
)
def test_fp16_equals_torch(causal: bool, heads: int, kv_heads: int, queries: int, tokens: int, head_dim: int):
    q = normal(2, heads, queries, head_dim)
    k, v = normal(2, kv_heads, tokens, head_dim, seed=1), normal(2, kv_heads, tokens, head_dim, seed=2)
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries) if causal else None
    exact = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True)
    got = ta.attention(q, k, v, causal=causal, scale=0.2, config="fp16")
    torch.testing.assert_close(got, exact, atol=2e-6, rtol=0)


def test_fp16_with_more_queries_than_tokens():
    q, k, v = normal(2, 2, 150, 64), normal(2, 2, 40, 64, seed=1), normal(2, 2, 40, 64, seed=2)
    exact = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ta.attention(q, k, v, causal=False, config="fp16"), exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", PRESETS)
def test_dtype_and_shape_of_the_result(preset: str, dtype: torch.dtype):
    q, k, v = normal(2, 4, 70, 64).to(dtype), normal(2, 2, 200, 64).to(dtype), normal(2, 2, 200, 64).to(dtype)
    out = ta.attention(q, k, v, config=preset)
    assert out.dtype == dtype
    assert out.shape == q.shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("preset", ["int8", "turbo4", "turbo3", "turbo2"])
def test_each_token_reads_what_a_decode_step_reads(preset: str):
    q, k, v = normal(1, 4, 200, 64), normal(1, 2, 200, 64, seed=1), normal(1, 2, 200, 64, seed=2)
    policy = Policy.from_preset(preset)
    cache = LayerCache(policy.cache, policy.head_formats(0, 2))
    steps = []
    for t in range(200):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        cache.observe(q[:, :, t : t + 1])
        steps.append(attend(q[:, :, t : t + 1], cache.view()))
        cache.settle()
    torch.testing.assert_close(ta.attention(q, k, v, config=preset), torch.cat(steps, 2), atol=2e-3, rtol=0)


def test_default_is_turbo4_and_policies_work():
    q, k, v = (normal(1, 2, 200, 64, seed=i) for i in range(3))
    assert torch.equal(ta.attention(q, k, v), ta.attention(q, k, v, config="turbo4"))
    wide = replace(Policy.from_preset("turbo2"), overrides=(Override(8),))
    exact = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert sqnr_db(ta.attention(q, k, v, config=wide), exact) > 35.0


def test_attend_gives_the_same_whichever_implementation_runs():
    """`attend` uses torch's attention while nothing is compressed: same result wherever a row sees something."""
    view, q = filled("turbo4", 30, starts=(0, 12)).view(), normal(2, 2, 30, 64)
    got, defined = attend(q, view), prefill_attention(q, view)
    seen = torch.isfinite(defined.lse)
    assert seen.sum() == 2 * (30 + 18)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[seen], defined.out[seen], atol=1e-5, rtol=0)


# --- quality ---


def outlier_keys(batch: int = 1, heads: int = 2, tokens: int = 512, dim: int = 128) -> Tensor:
    """Keys like those of real models: a few channels with an offset ten times the spread of the others."""
    key = normal(batch, heads, tokens, dim, seed=1)
    key[..., [5, 40, 77, 101]] = key[..., [5, 40, 77, 101]] * 3.0 + torch.tensor([30.0, -25.0, 15.0, 40.0])
    return key


def plain_per_token(bits: int) -> Policy:
    stored = TensorFormat(bits, PerToken(), metadata="float16")
    return Policy("per-token", CacheConfig(key=stored, value=stored))


QUALITY_FLOORS_DB = {"int8": 39.5, "turbo4": 20.0, "turbo3": 14.5, "turbo2": 9.5}


def test_turbo4_beats_plain_per_token_4_bits():
    """Floors in dB on the output of attention, about 2 dB below what is measured."""
    key, value, q = outlier_keys(), normal(1, 2, 512, 128, seed=2), normal(1, 4, 512, 128)
    exact = scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)
    quality = {p: sqnr_db(ta.attention(q, key, value, config=p), exact) for p in ("int8", "turbo4", "turbo3", "turbo2")}
    plain = sqnr_db(ta.attention(q, key, value, config=plain_per_token(4)), exact)
    assert quality["int8"] > quality["turbo4"] > quality["turbo3"] > quality["turbo2"]
    assert quality["turbo4"] > plain + 20.0
    for preset, floor in QUALITY_FLOORS_DB.items():
        assert quality[preset] > floor, preset


# --- bad input ---


def view_of_two_rows() -> CachedKV:
    return filled("turbo4", 100).view()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 64), r"q: expected 4 dimensions \[batch, heads, tokens, head_dim\], received shape \(2, 4, 64\)"),
        ((2, 4, 3, 80), r"q: expected head_dim 64, received shape \(2, 4, 3, 80\)"),
        ((2, 3, 3, 64), "q: expected a multiple of 2 KV heads, received 3 heads"),
        ((2, 4, 101, 64), r"q: expected at most 100 queries \(the tokens of the cache\), received 101"),
        ((3, 4, 3, 64), "q: expected .*2"),
        ((1, 4, 3, 64), "q: expected .*2"),
    ],
    ids=["dimensions", "head_dim", "heads", "queries", "batch", "batch-of-1"],
)
def test_prefill_refuses_shapes(shape: tuple[int, ...], message: str):
    with pytest.raises(InvalidInputError, match=message):
        prefill_attention(torch.zeros(shape), view_of_two_rows())


def test_decode_refuses_more_than_one_token():
    with pytest.raises(InvalidInputError, match=r"q: expected \[batch, heads, 1, head_dim\], received shape"):
        decode_attention(torch.zeros(2, 4, 2, 64), view_of_two_rows())


def test_integers_are_refused():
    with pytest.raises(InvalidInputError, match=r"q: expected dtype float16.* received torch.int64"):
        prefill_attention(torch.zeros(2, 4, 2, 64, dtype=torch.long), view_of_two_rows())


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((4, 10, 64), (1, 2, 10, 64), (1, 2, 10, 64), "q: expected 4 dimensions"),
        ((1, 4, 10, 64), (2, 10, 64), (1, 2, 10, 64), "k: expected 4 dimensions"),
        ((1, 4, 10, 64), (1, 2, 10, 80), (1, 2, 10, 80), "k: expected head_dim 64"),
        ((1, 4, 10, 64), (1, 3, 10, 64), (1, 3, 10, 64), "q: expected a multiple of 3 KV heads"),
        ((1, 4, 11, 64), (1, 2, 10, 64), (1, 2, 10, 64), "q: expected at most 10 queries"),
        ((1, 4, 10, 64), (1, 2, 10, 64), (1, 2, 9, 64), "v: expected"),
        ((1, 4, 10, 64), (1, 2, 10, 64), (1, 2, 10, 80), "v: expected"),
        ((1, 4, 10, 64), (1, 2, 10, 64), (1, 1, 10, 64), "v: expected"),
        ((3, 4, 10, 64), (1, 2, 10, 64), (1, 2, 10, 64), "q: expected .*1"),
        ((1, 4, 10, 60), (1, 2, 10, 60), (1, 2, 10, 60), "head_dim: expected one of 64, 80, 96, 128, 256, received 60"),
        ((1, 4, 0, 64), (1, 2, 10, 64), (1, 2, 10, 64), "q: expected"),
    ],
    ids=[
        "q-dims",
        "k-dims",
        "k-dim",
        "heads",
        "queries",
        "v-tokens",
        "v-dim",
        "v-heads",
        "batch",
        "dim-60",
        "no-query",
    ],
)
def test_attention_names_the_argument(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str):
    with pytest.raises(InvalidInputError, match=message):
        ta.attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 70000.0])
@pytest.mark.parametrize("name", ["k", "v"])
def test_attention_refuses_values(name: str, bad: float):
    tensors = {"k": normal(1, 2, 10, 64), "v": normal(1, 2, 10, 64)}
    tensors[name][0, 1, 7, 3] = bad
    with pytest.raises(InvalidInputError, match=f"^{name}[a-z]*: expected (finite values|magnitudes up to 6.55e.04)"):
        ta.attention(normal(1, 2, 10, 64), **tensors)


def test_empty_cache_is_refused():
    policy = Policy.from_preset("turbo4")
    with pytest.raises(InvalidInputError, match="cache: expected tokens to attend to, received an empty cache"):
        LayerCache(policy.cache, policy.head_formats(0, 2)).view()


def test_unknown_preset_is_refused():
    with pytest.raises(InvalidInputError, match=r"preset: expected one of fp16, int8, turbo4.*received 'turbo5'"):
        ta.attention(*(normal(1, 1, 4, 64) for _ in range(3)), config="turbo5")
