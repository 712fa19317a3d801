"""Attention kernels over pages against the definition: in Triton's interpreter here, compiled where there is a GPU."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import caches
import pytest
import torch
from caches import normal, policy_of
from compile_kernels import rows_of
from torch import Tensor

from turboattention.config import AttentionConfig, CacheConfig, TensorFormat, get_preset
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.kvcache import LayerCache
from turboattention.ops import cached_attention, paged_decode, prefill_attention
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.paged_kv import PagedGroup, PagedKV
from turboattention.ops.dispatch import choose, without_gluon, without_portable
from turboattention.ops.prefill.reference import expand_cache
from turboattention.policy import Override, Policy
from turboattention.quant.error import relative_rms
from turboattention.quant.granularity import PerToken
from turboattention.quant.layout import PageLayout

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GUARD = 7


filled = partial(caches.filled, device=DEVICE)


def queries(kv: CachedKV, ratio: int, count: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    batch, heads, _, dim = kv.tail_key.shape
    return normal(batch, heads * ratio, count, dim, seed=99).to(DEVICE, dtype)


def sixteen_bit_error(q: Tensor, kv: CachedKV, **arguments: float | int | None) -> float:
    """Error of float16 attention (P rounded before P V, as every kernel does) on float16 K and V, against float64."""
    key, value = (x.half().double() for x in expand_cache(kv, torch.float64))
    exact = replace(kv, groups=(), page_tokens=0, tail_key=key, tail_value=value, sink_key=None, sink_value=None)
    scores = q.double().unflatten(1, (key.shape[1], -1)) @ key[:, :, None].transpose(-2, -1) * q.shape[-1] ** -0.5
    if softcap := arguments.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    mask = exact.visible(q.shape[2], True, arguments.get("window"))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0.0)
    total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
    want = (weights @ value[:, :, None] / total).flatten(1, 2)
    got = (weights.half().double() @ value[:, :, None] / total).half().flatten(1, 2)
    return relative_rms(got, want)


def assert_like_the_definition(
    q: Tensor, kv: CachedKV, implementation: str = "triton", **arguments: float | int | None
) -> None:
    want = prefill_attention(q.double(), kv, **arguments)
    got = cached_attention(q, kv, implementation=implementation, **arguments)
    assert got.out.dtype == q.dtype
    limit = 2 * max(sixteen_bit_error(q, kv, **arguments), 1e-4)
    assert relative_rms(got.out, want.out) <= limit
    assert torch.equal(got.lse.isinf(), want.lse.isinf())
    finite = want.lse.isfinite()
    assert (got.lse - want.lse)[finite].abs().max() < 2e-3


@pytest.mark.parametrize("preset", ["int8", "turbo4", "turbo3", "turbo2"])
@pytest.mark.parametrize(
    ("head_dim", "ratio", "length"), [(64, 3, 130), (80, 1, 200), (96, 2, 64), (128, 4, 193), (256, 2, 129)]
)
def test_decode(preset: str, head_dim: int, ratio: int, length: int):
    kv = filled(policy_of(preset), length, head_dim=head_dim)
    assert_like_the_definition(queries(kv, ratio), kv)


@pytest.mark.parametrize(("ratio", "count"), [(1, 5), (3, 17), (16, 1), (33, 1), (7, 35), (1, 70)])
def test_chunks_and_ratios(ratio: int, count: int):
    kv = filled(policy_of("turbo4"), 200, kv_heads=1)
    assert_like_the_definition(queries(kv, ratio, count), kv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_of_queries(dtype: torch.dtype):
    kv = filled(policy_of("turbo4"), 150)
    q = queries(kv, 2).to(torch.bfloat16).to(dtype)
    want = prefill_attention(q.double(), kv).out
    bound = 4e-3 if dtype == torch.bfloat16 else 5e-4  # the output's own rounding
    assert relative_rms(cached_attention(q, kv, implementation="triton").out, want) < bound


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


def test_without_sinks():
    kv = filled(policy_of("turbo4", sinks=0), 200)
    assert_like_the_definition(queries(kv, 2), kv)


def test_heads_and_tensors_with_different_bits():
    overrides = (Override(2, head=0, tensor="value"), Override(8, head=2), Override(3, head=1, tensor="key"))
    kv = filled(policy_of("turbo4", overrides=overrides), 200, kv_heads=4)
    assert len(kv.groups) == 4
    assert_like_the_definition(queries(kv, 2), kv)


def test_asymmetric_values_and_symmetric_keys():
    stored = CacheConfig(key=TensorFormat(4, symmetric=True), value=TensorFormat(4, PerToken()), sink_tokens=2)
    kv = filled(replace(Policy.resolve("turbo4"), cache=stored), 200)
    assert_like_the_definition(queries(kv, 2), kv)


def test_a_page_of_zeros_and_of_equal_keys():
    policy = policy_of("turbo4", sinks=0)
    cache = LayerCache(policy.cache, policy.head_formats(0, 1))
    key, value = torch.zeros(1, 1, 130, 64, device=DEVICE), normal(1, 1, 130, 64, seed=1).to(DEVICE)
    value[:, :, :64] = 0.0
    key[:, :, 64:128] = 3.0
    cache.append(key, value)
    cache.commit()
    assert_like_the_definition(queries(cache.view(), 2), cache.view())


def paged(presets_of: CachedKV, lengths: tuple[int, ...], policy: Policy, **shape: int) -> PagedKV:
    """Sequences of several lengths in one pool, pages in random order; unused memory is NaN or garbage."""
    views = [filled(policy, length, seed=i, **shape) for i, length in enumerate(lengths)]
    batch, heads, _, dim = len(views), *presets_of.tail_key.shape[1:]
    capacity, most = 128, max(view.page_tokens for view in views) // 64
    tail = {
        name: torch.full((batch, heads, capacity, dim), torch.nan, dtype=torch.float16, device=DEVICE) for name in "kv"
    }
    sinks = [torch.zeros(batch, heads, policy.cache.sink_tokens, dim, dtype=torch.float16, device=DEVICE) for _ in "kv"]
    order = torch.randperm(batch * heads * most + 5, generator=torch.Generator().manual_seed(4)).int().to(DEVICE)
    layout = presets_of.groups[0].layout
    pool = torch.full((len(order), layout.nbytes), 255, dtype=torch.uint8, device=DEVICE)
    table = torch.full((batch, heads, max(most, 1)), 2**30, dtype=torch.int32, device=DEVICE)
    used = 0
    for i, view in enumerate(views):
        for name, exact in (("k", view.tail_key), ("v", view.tail_value)):
            slots = torch.arange(view.page_tokens, view.length) % capacity
            tail[name][i, :, slots] = exact[0].half()
        if not view.page_tokens:
            continue
        for target, exact in zip(sinks, (view.sink_key, view.sink_value), strict=True):
            assert exact is not None
            target[i] = exact[0].half()
        count = view.page_tokens // 64
        ids = order[used : used + heads * count].view(heads, count)
        used += heads * count
        table[i, :, :count] = ids
        pool[ids.long()] = view.groups[0].pages[0]
    ints = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (lengths, [v.page_tokens for v in views]))
    group = PagedGroup(layout, tuple(range(heads)), pool, table)
    return PagedKV((group,), *ints, tail["k"], tail["v"], *(sinks if policy.cache.sink_tokens else (None, None)))


LENGTHS = (1, 63, 64, 65, 300, 129, 2)


@pytest.mark.parametrize(("preset", "programs"), [("turbo4", 1), ("turbo2", 4), ("turbo4", 40)])
def test_paged_decode_of_a_ragged_batch(preset: str, programs: int):
    policy = policy_of(preset)
    kv = paged(filled(policy, 64), LENGTHS, policy)
    q = normal(len(LENGTHS), 6, 1, 64, seed=8).to(DEVICE, torch.float16)
    want = paged_decode(q.double(), kv, implementation="reference")
    got = paged_decode(q, kv, implementation="triton", programs=programs)
    assert relative_rms(got.out, want.out) < 6e-4
    assert (got.lse - want.lse).abs().max() < 2e-3
    again = paged_decode(q, kv, implementation="triton", programs=programs)
    assert torch.equal(got.out, again.out)
    assert torch.equal(got.lse, again.lse)


def test_paged_decode_with_a_window_reads_no_older_page():
    policy = policy_of("turbo4")
    kv = paged(filled(policy, 64), LENGTHS, policy)
    q = normal(len(LENGTHS), 4, 1, 64, seed=8).to(DEVICE, torch.float16)
    want = paged_decode(q.double(), kv, implementation="reference", window=100)
    kv.groups[0].table[4, :, :2] = 2**30  # tokens 0 to 127 of 300: not seen through a window of 100
    got = paged_decode(q, kv, implementation="triton", window=100, programs=3)
    assert relative_rms(got.out, want.out) < 6e-4


def test_one_sequence_does_not_see_another():
    policy = policy_of("turbo4")
    kv = paged(filled(policy, 64), LENGTHS, policy)
    q = normal(len(LENGTHS), 4, 1, 64, seed=8).to(DEVICE, torch.float16)
    alone = replace(
        kv, groups=(replace(kv.groups[0], table=kv.groups[0].table[4:5]),), lengths=kv.lengths[4:5],
        page_tokens=kv.page_tokens[4:5], tail_key=kv.tail_key[4:5], tail_value=kv.tail_value[4:5],
        sink_key=kv.sink_key[4:5], sink_value=kv.sink_value[4:5],
    )  # fmt: skip
    together = paged_decode(q, kv, implementation="triton", programs=6).out[4:5]
    single = paged_decode(q[4:5], alone, implementation="triton", programs=6).out
    assert relative_rms(together, single) < 3e-4  # another division of the work, another order of the sums


def test_choices_say_why():
    layout = PageLayout(64, 128, get_preset("turbo4").cache.key, get_preset("turbo4").cache.value)
    assert without_portable(layout) is None
    assert without_gluon(layout) is None
    chosen = choose((layout,), torch.device("cpu"), torch.float16)
    assert chosen.reason.startswith("C++ kernels" if chosen.implementation == "cpu" else "tensors on cpu")
    cpu = torch.device("cpu")
    for other, reason in (("kivi4", "metadata float16"), ("paper4", "metadata flashq"), ("fp16", "stored in 16 bits")):
        cache = get_preset(other).cache
        bad = PageLayout(cache.page_size, 128, cache.key, cache.value)
        assert reason in str(without_portable(bad))
        with pytest.raises(UnsupportedError, match="implementation 'triton': K: "):
            choose((bad,), cpu, torch.float16, wanted="triton")
    with pytest.raises(UnsupportedError, match="implementation 'triton': softmax sas"):
        choose((layout,), cpu, torch.float16, config=AttentionConfig(softmax="sas"), wanted="triton")
    with pytest.raises(UnsupportedError, match="implementation 'triton': float64"):
        choose((layout,), cpu, torch.float64, wanted="triton")
    with pytest.raises(UnsupportedError, match="implementation 'gluon': tensors on cpu"):
        choose((layout,), cpu, torch.float16, wanted="gluon")
    for three in (replace(layout, key=TensorFormat(3)), replace(layout, head_dim=80), replace(layout, page_size=32)):
        assert without_gluon(three) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"window": 0}, "window: expected 1 or more"), ({"softcap": 0.0}, "softcap: expected a positive number")],
)
def test_bad_arguments(arguments: dict[str, float], message: str):
    policy = policy_of("turbo4")
    kv = paged(filled(policy, 64), (65, 3), policy)
    q = normal(2, 4, 1, 64, seed=8).to(DEVICE, torch.float16)
    with pytest.raises(InvalidInputError, match=message):
        paged_decode(q, kv, **arguments)
    with pytest.raises(InvalidInputError, match="q: expected"):
        paged_decode(q[:1], kv)


def test_every_gpu_has_its_kernels():
    """No spills in hot loops, matrix instructions in them, and a bound on instructions for each value of the cache."""
    rows = rows_of(Path(__file__).with_name("decode_variants.py"))
    assert {row["target"] for row in rows} == {
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90",
        "sm_100",
        "sm_120",
        "gfx90a",
        "gfx942",
    }
    for row in rows:
        named = f"{row['name']} on {row['target']}"
        hot = row["loop_mnemonics"]
        matrix = sum(n for name, n in hot.items() if name.startswith(("HMMA", "HGMMA", "UTCHMMA", "v_mfma")))
        assert matrix >= 12, named
        assert row["loop_spills"] <= row["loop_spills_allowed"], named
        assert row["loop_instructions"] * row["lanes"] <= row["instructions_per_value"] * row["values"], named


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["int8", "turbo4", "turbo2"])
@pytest.mark.parametrize(
    ("head_dim", "ratio", "length"), [(64, 3, 130), (128, 4, 1000), (128, 16, 193), (128, 20, 65), (256, 2, 129)]
)
def test_gluon_decode(preset: str, head_dim: int, ratio: int, length: int):
    kv = filled(policy_of(preset), length, head_dim=head_dim)
    assert_like_the_definition(queries(kv, ratio), kv, "gluon")
    assert_like_the_definition(queries(kv, ratio), kv, "gluon", softcap=5.0)
    assert_like_the_definition(queries(kv, ratio), kv, "gluon", window=60)


@pytest.mark.gpu
def test_gluon_padding_and_mixed_bits():
    kv = filled(policy_of("turbo2", sinks=4, window=70), 300, batch=3, starts=(0, 3, 130))
    assert_like_the_definition(queries(kv, 2), kv, "gluon")
    overrides = (Override(2, head=0, tensor="value"), Override(8, head=2), Override(2, head=1, tensor="key"))
    kv = filled(policy_of("turbo4", overrides=overrides), 200, kv_heads=4)
    assert_like_the_definition(queries(kv, 2), kv, "gluon")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["gluon", "triton"])
def test_a_graph_follows_lengths_on_the_device(implementation: str):
    policy = policy_of("turbo4")
    kv = paged(filled(policy, 64), LENGTHS, policy)
    q = normal(len(LENGTHS), 4, 1, 64, seed=8).to(DEVICE, torch.float16)
    paged_decode(q, kv, implementation=implementation)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode(q, kv, implementation=implementation).out
    for shorter in (0, 1):
        kv.lengths[4] -= shorter
        graph.replay()
        want = paged_decode(q.double(), kv, implementation="reference").out
        assert relative_rms(out, want) < 6e-4
