"""C++ attention over pages against the definition, on every instruction set that this processor has."""

import math
from functools import partial

import caches
import pytest
import torch
from caches import normal, policy_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import turboattention as ta
from turboattention.config import CacheConfig, TensorFormat
from turboattention.cpu import library
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.kvcache.paged import PagedCache
from turboattention.ops import cached_attention, implementations, paged_decode, prefill_attention
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.decode import cpu
from turboattention.ops.dispatch import choose
from turboattention.ops.prefill.reference import AttentionOutput, expand_cache
from turboattention.policy import Override, Policy
from turboattention.quant.error import relative_rms
from turboattention.quant.granularity import PerToken

REASON = library.without_library()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SETS = range(library.loaded().isa + 1)
PRESETS = ("int8", "turbo4", "turbo3", "turbo2")


filled = partial(caches.filled, mean=8.0)


def queries(kv: CachedKV, ratio: int, count: int = 1) -> Tensor:
    batch, heads, _, dim = kv.tail_key.shape
    return normal(batch, heads * ratio, count, dim, seed=99)


def sixteen_bit_error(q: Tensor, kv: CachedKV, want: AttentionOutput, **arguments: float | None) -> float:
    """Error of attention on what the codes mean, Q, K, P and V rounded to float16, sums exact."""
    key, value = (x.half().double() for x in expand_cache(kv, torch.float64))
    ratio = q.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    scale = arguments.get("scale") or q.shape[-1] ** -0.5
    scores = q.half().double() @ key.mT * scale
    if softcap := arguments.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    mask = kv.visible(q.shape[2], True, arguments.get("window"))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return relative_rms((weights.half().double() @ value / total).half(), want.out)


def assert_like_the_definition(q: Tensor, kv: CachedKV, isa: int | None = None, **arguments: float | None) -> None:
    want = prefill_attention(q.double(), kv, **arguments)
    scale = arguments.pop("scale", None) or q.shape[-1] ** -0.5
    got = cpu.attend(q, kv, scale=scale, isa=isa, **arguments)
    assert got.out.dtype == q.dtype
    assert relative_rms(got.out, want.out) <= 2 * sixteen_bit_error(q, kv, want, scale=scale, **arguments)
    assert torch.equal(got.lse.isinf(), want.lse.isinf())
    finite = want.lse.isfinite()
    assert (got.lse - want.lse)[finite].abs().max() <= 1e-3 + 2e-4 * want.lse[finite].abs().max()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("head_dim", "ratio", "length"),
    [(64, 3, 130), (80, 1, 200), (96, 2, 64), (128, 4, 193), (256, 2, 129), (64, 16, 777)],
)
def test_decode(preset: str, head_dim: int, ratio: int, length: int, isa: int):
    kv = filled(policy_of(preset), length, head_dim=head_dim)
    assert_like_the_definition(queries(kv, ratio), kv, isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(("ratio", "count"), [(1, 5), (3, 17), (16, 1), (33, 1), (7, 70), (5, 2)])
def test_chunks_and_ratios(ratio: int, count: int, isa: int):
    kv = filled(policy_of("turbo4"), 200, kv_heads=1)
    assert_like_the_definition(queries(kv, ratio, count), kv, isa)


@pytest.mark.parametrize("ratio", range(1, 17))
def test_every_ratio(ratio: int):
    kv = filled(policy_of("turbo4"), 321, kv_heads=1)
    assert_like_the_definition(queries(kv, ratio), kv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_of_queries_and_tokens(dtype: torch.dtype):
    kv = filled(policy_of("turbo4"), 150, dtype=dtype)
    q = queries(kv, 2).to(dtype)
    want = prefill_attention(q.double(), kv).out
    bound = 4e-3 if dtype == torch.bfloat16 else 5e-4  # the output's own rounding
    got = cached_attention(q, kv, implementation="cpu").out
    assert got.dtype == dtype
    assert relative_rms(got, want) < bound


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(
    "arguments",
    [{"softcap": 5.0}, {"window": 50}, {"window": 1}, {"window": 150, "softcap": 20.0}, {"scale": 0.3}],
    ids=str,
)
def test_softcap_window_and_scale(arguments: dict[str, float], count: int):
    kv = filled(policy_of("turbo4"), 260)
    assert_like_the_definition(queries(kv, 2, count), kv, **arguments)


@pytest.mark.parametrize("count", [1, 5])
def test_padding_sinks_and_window_of_exact_tokens(count: int):
    kv = filled(policy_of("turbo2", sinks=4, window=70), 300, batch=3, starts=(0, 3, 130))
    assert kv.page_tokens
    assert_like_the_definition(queries(kv, 2, count), kv)


def test_a_row_that_sees_nothing_is_zero():
    kv = filled(policy_of("turbo4"), 200, batch=2, starts=(0, 200))
    got = cpu.attend(queries(kv, 2), kv, scale=0.125)
    assert not got.out[1].any()
    assert got.lse[1].isneginf().all()


def test_not_causal():
    kv = filled(policy_of("turbo4"), 200)
    q = queries(kv, 2, 7)
    want = prefill_attention(q.double(), kv, causal=False)
    assert relative_rms(cpu.attend(q, kv, scale=0.125, causal=False).out, want.out) < 4e-4


def test_without_sinks_and_with_many():
    for sinks in (0, 64):
        kv = filled(policy_of("turbo4", sinks=sinks), 200)
        assert_like_the_definition(queries(kv, 2), kv)


def test_heads_and_tensors_with_different_bits():
    overrides = (Override(2, head=0, tensor="value"), Override(8, head=2), Override(3, head=1, tensor="key"))
    kv = filled(policy_of("turbo4", overrides=overrides), 200, kv_heads=4)
    assert len(kv.groups) == 4
    assert_like_the_definition(queries(kv, 2), kv)


def test_pages_of_128_tokens_and_other_zeros():
    """K symmetric, V asymmetric and not rotated, four more bits for half of the channels: no preset has these."""
    formats = (
        CacheConfig(TensorFormat(4, symmetric=True), TensorFormat(3, PerToken()), page_size=128),
        CacheConfig(TensorFormat(2, refined_share=0.5, refined_bits=4), TensorFormat(2, PerToken(), rotate=True), 128),
    )
    for config in formats:
        kv = filled(Policy("other", config), 300, head_dim=128)
        assert_like_the_definition(queries(kv, 4), kv)


@settings(max_examples=40)
@given(st.data())
def test_any_shape(data: st.DataObject):
    """Odd lengths, ratios, chunks, windows, sinks, padding, formats: in one call."""
    draw = data.draw
    length = draw(st.integers(1, 400))
    policy = policy_of(draw(st.sampled_from(PRESETS)), draw(st.integers(0, 5)), draw(st.integers(0, 90)))
    batch = draw(st.integers(1, 2))
    starts = tuple(draw(st.integers(0, length - 1)) for _ in range(batch)) if draw(st.booleans()) else None
    dim = draw(st.sampled_from((64, 80, 96, 128, 256)))
    kv = filled(policy, length, head_dim=dim, kv_heads=draw(st.integers(1, 3)), batch=batch, starts=starts)
    q = queries(kv, draw(st.integers(1, 9)), draw(st.integers(1, min(length, 20))))
    window = draw(st.none() | st.integers(1, 500))
    want = prefill_attention(q.double(), kv, window=window)
    got = cpu.attend(q, kv, scale=dim**-0.5, window=window, isa=draw(st.sampled_from(list(SETS))))
    assert torch.equal(got.lse.isinf(), want.lse.isinf())
    assert relative_rms(got.out, want.out) < 6e-4 if want.out.any() else not got.out.any()


def test_the_same_bits_for_the_same_threads():
    kv = filled(policy_of("turbo4"), 3000)
    q = queries(kv, 3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first = cpu.attend(q, kv, scale=0.125)
            for _ in range(5):
                again = cpu.attend(q, kv, scale=0.125)
                assert torch.equal(first.out, again.out)
                assert torch.equal(first.lse, again.lse)
            assert_like_the_definition(q, kv)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("preset", PRESETS)
def test_paged_with_nan_where_nothing_is(preset: str):
    """Rows of many lengths in shuffled pages; free slots of tails and free pages hold NaN and wild bytes."""
    policy = policy_of(preset)
    lengths = [1, 63, 64, 65, 500, 129]
    cache = PagedCache(
        policy.cache, policy.head_formats(0, 2), rows=len(lengths), max_tokens=512, head_dim=64, shuffle=1,
        dtype=torch.float32,
    )  # fmt: skip
    for group in cache.groups:
        group.pool.fill_(0xFF)
    cache.tail_key.fill_(torch.nan)
    cache.tail_value.fill_(torch.nan)
    key, value, q = (normal(len(lengths), 2, 500, 64, seed=i) for i in range(3))
    cache.observe(q)
    cache.append(key, value, when="after", counts=torch.tensor(lengths, dtype=torch.int32))
    cache.check()
    query = normal(len(lengths), 6, 1, 64, seed=9)
    want = paged_decode(query.double(), cache.view(), scale=0.125, implementation="reference")
    got = paged_decode(query, cache.view(), scale=0.125, implementation="cpu")
    assert relative_rms(got.out, want.out) < 4e-4
    assert (got.lse - want.lse).abs().max() < 2e-3


def test_a_table_that_points_outside_is_refused():
    policy = policy_of("turbo4")
    cache = PagedCache(
        policy.cache, policy.head_formats(0, 1), rows=1, max_tokens=128, head_dim=64, dtype=torch.float32
    )
    cache.append(normal(1, 1, 100, 64, seed=0), normal(1, 1, 100, 64, seed=1), when="after")
    cache.groups[0].table[0, 0, 0] = 1000
    with pytest.raises(InvalidInputError, match="page table"):
        paged_decode(normal(1, 1, 1, 64, seed=2), cache.view(), implementation="cpu")


def test_strides_of_any_kind():
    kv = filled(policy_of("turbo4"), 200)
    q = queries(kv, 2, 5)
    want = cpu.attend(q, kv, scale=0.125).out
    other = q.transpose(1, 2).contiguous().transpose(1, 2)  # tokens outermost
    padded = torch.cat([q, q], -1)[..., :64]
    reversed_channels = q.flip(-1).contiguous().flip(-1).mT.contiguous().mT  # channels not contiguous
    for x in (other, padded, reversed_channels):
        assert torch.equal(cpu.attend(x, kv, scale=0.125).out, want)


def test_chosen_without_being_asked_for():
    kv = filled(policy_of("turbo4"), 200)
    q = queries(kv, 2)
    assert torch.equal(cached_attention(q, kv).out, cached_attention(q, kv, implementation="cpu").out)
    for preset in PRESETS:
        chosen = implementations(preset, device=torch.device("cpu"))
        assert chosen["decode"][0] == "cpu"
        assert chosen["append"][0] == "cpu"


@pytest.mark.parametrize(
    ("preset", "reason"), [("kivi4", "metadata float16"), ("paper4", "softmax sas"), ("fp16", "16 bits")]
)
def test_what_the_kernels_do_not_read_goes_to_the_definition_with_a_reason(preset: str, reason: str):
    name, why = implementations(preset)["decode"]
    assert name == "reference"
    assert reason in why
    assert ta.attention(*(normal(1, 2, 100, 64, seed=i) for i in range(3)), config=preset).isfinite().all()


def test_asked_for_where_it_can_not_be_had():
    kv = filled(policy_of("kivi4"), 300)
    with pytest.raises(UnsupportedError, match="metadata float16"):
        cached_attention(queries(kv, 2), kv, implementation="cpu")
    layouts = tuple(group.layout for group in filled(policy_of("turbo4"), 100).groups)
    with pytest.raises(UnsupportedError, match="tensors on meta"):
        choose(layouts, torch.device("meta"), torch.float16, wanted="cpu")
    with pytest.raises(UnsupportedError, match="float64"):
        choose(layouts, torch.device("cpu"), torch.float64, wanted="cpu")


def test_gradients_come_from_the_definition():
    kv = filled(policy_of("turbo4", sinks=0), 100)
    q = queries(kv, 2).requires_grad_()
    cached_attention(q, kv).out.sum().backward()
    assert q.grad is not None
    assert math.isfinite(float(q.grad.sum()))
