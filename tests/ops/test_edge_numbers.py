"""Numbers at the edge, the same everywhere: the definition, the C++ kernels of every instruction set, Triton's kernels.

A result is defined, or there is a clear error. Pages are compared byte for byte, attention by the error against float64
over the same codes; the Triton kernels run in the interpreter here, compiled where there is a GPU. There everything is
marked ``gpu``: ``pytest -m gpu tests/ops/test_edge_numbers.py`` on an H200 runs the compiled kernels and Gluon's.
"""

from collections.abc import Callable

import pytest
import torch
from caches import EDGES, normal, policy_of
from torch import Tensor

from turboattention.config import get_preset
from turboattention.cpu import library
from turboattention.errors import InvalidInputError
from turboattention.kvcache import LayerCache
from turboattention.kvcache.paged import PagedCache
from turboattention.ops import append, attend, cached_attention, paged_decode, prefill_attention
from turboattention.ops.append import cpu as cpu_append
from turboattention.ops.append import paged as paged_append
from turboattention.ops.append import reference
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.decode import cpu as cpu_decode
from turboattention.ops.prefill.reference import expand_cache
from turboattention.policy import Override
from turboattention.quant.error import relative_rms
from turboattention.quant.layout import PageLayout

pytest.importorskip("triton")

from turboattention.ops.append import triton as triton_append
from turboattention.ops.append import triton_paged

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = library.without_library()
SETS = list(range(library.loaded().isa + 1)) if REASON is None else []
NO_CPP = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CPP, GLUON = pytest.param("cpu", marks=NO_CPP), pytest.param("gluon", marks=pytest.mark.gpu)
IMPLEMENTATIONS = ["reference", CPP, "triton", GLUON]
# The interpreter is too slow for all combinations.
ON_GPU = ["triton", GLUON] if DEVICE.type == "cuda" else [GLUON]
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
APPENDS = [
    pytest.param(paged_append.append_paged, id="reference"),
    pytest.param(cpu_append.append_paged, id="cpu", marks=NO_CPP),
    pytest.param(triton_paged.append_paged, id="triton"),
]
MIXED = (Override(8, head=0), Override(2, head=1, tensor="value"))
# Scores of C++ come from q times the scales in 16 bits: relative to the largest score.
SCORE_ERROR = 2.0**-14


KINDS = EDGES | {
    "largest": lambda x: x.sign() * 40000.0,  # with a margin: codes may stand for more than there was
    "float16-subnormal": lambda x: x * 1e-7,
    "as-they-are": lambda x: x,
}


def place(implementation: object) -> torch.device:
    """Where the tensors of an implementation lie: those of C++ on the CPU, also where there is a GPU."""
    return torch.device("cpu") if implementation in ("cpu", cpu_append.append_paged) else DEVICE


def cache_of(
    key: Tensor, value: Tensor, implementation: str = "triton", overrides: tuple[Override, ...] = ()
) -> CachedKV:
    policy = policy_of("turbo4", overrides=overrides)
    cache = LayerCache(policy.cache, policy.head_formats(0, key.shape[1]))
    cache.append(key.to(place(implementation)), value.to(place(implementation)))
    cache.commit()
    return cache.view()


def tensors(length: int, heads: int = 1, dim: int = 64) -> tuple[Tensor, Tensor]:
    return normal(1, heads, length, dim, seed=1), normal(1, heads, length, dim, seed=2)


def queries(heads: int, implementation: str, dim: int = 64, count: int = 1) -> Tensor:
    """float16, as engines have them: Triton's kernels round other dtypes to it."""
    return normal(1, heads, count, dim, seed=3).half().to(place(implementation))


def assert_close(q: Tensor, kv: CachedKV, implementation: str) -> None:
    """Against float64: the scores within their rounding, hence the output within what that changes."""
    want = prefill_attention(q.double(), kv)
    got = cached_attention(q, kv, implementation=implementation)
    assert got.out.isfinite().all()
    error = SCORE_ERROR * float(want.lse.abs().max())
    assert (got.lse - want.lse).abs().max() <= 1e-3 + error
    smallest = 2.0**-24  # of float16: outputs below it are 0
    difference = (got.out.double() - want.out).square().mean().sqrt()
    assert difference <= (2e-3 + min(2 * error, 1.0)) * want.out.square().mean().sqrt() + smallest
    values = expand_cache(kv, torch.float32)[1]
    assert got.out.abs().max() <= 1.01 * values.abs().max() + smallest  # a mean of them, whatever the weights


@pytest.mark.parametrize("implementation", ["reference", CPP, *ON_GPU])
@pytest.mark.parametrize("side", ["key", "value", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind: str, side: str, implementation: str):
    key, value = tensors(130)
    change = KINDS[kind]
    key, value = change(key) if side != "value" else key, change(value) if side != "key" else value
    kv = cache_of(key, value, implementation)
    assert_close(queries(2, implementation), kv, implementation)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_in_triton(kind: str):
    """One page and two exact tokens: the interpreter is slow."""
    kv = cache_of(*(KINDS[kind](x) for x in tensors(66)))
    assert_close(queries(2, "triton"), kv, "triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e4])
def test_queries(scale: float, implementation: str):
    """Of zeros and of the smallest float16 numbers the scores are 0, so the output is the mean of V."""
    kv = cache_of(*tensors(66), implementation)
    q = queries(2, implementation) * scale
    assert_close(q, kv, implementation)
    if scale < 1e-6:
        lse = cached_attention(q, kv, implementation=implementation).lse
        assert (lse - torch.tensor(66.0).log()).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("implementation", "kind"),
    [(name, kind) for name in ("reference", "cpu") for kind in ("as-they-are", "outliers", "all-equal")]
    + [("triton", "outliers")]
    + [pytest.param("gluon", kind, marks=pytest.mark.gpu) for kind in ("as-they-are", "outliers", "all-equal")],
)
def test_head_dim_256_with_16_query_heads_and_mixed_bits(kind: str, implementation: str):
    if implementation == "cpu" and REASON is not None:
        pytest.skip(str(REASON))
    heads = 2 if implementation == "triton" else 3
    key, value = tensors(66, heads=heads, dim=256)
    kv = cache_of(KINDS[kind](key), value, implementation, overrides=MIXED)
    assert len(kv.groups) == heads
    assert_close(queries(16 * heads, implementation, 256), kv, implementation)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("preset", "dim"), [("turbo4", 64), ("int8", 256), ("turbo2", 80)])
def test_pages_are_the_same_bytes(preset: str, dim: int, kind: str):
    config = get_preset(preset).cache
    layout = PageLayout(64, dim, config.key, config.value)
    key, value = (KINDS[kind](x) for x in tensors(64, dim=dim))
    want = reference.compress_pages(layout, key, value)
    for isa in SETS:
        assert torch.equal(cpu_append.compress_pages(layout, key, value, isa=isa), want)
    for compress in (reference.compress_pages, triton_append.compress_pages):
        assert torch.equal(compress(layout, key.to(DEVICE), value.to(DEVICE)).cpu(), want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_values_that_rotation_brings_beyond_float16_are_refused():
    config = get_preset("turbo2").cache
    layout = PageLayout(64, 80, config.key, config.value)
    key, value = (x.sign().to(DEVICE) for x in tensors(64, dim=80))
    for compress in (reference.compress_pages, append.compress_pages, triton_append.compress_pages):
        with pytest.raises(InvalidInputError, match="up to 65504"):
            compress(layout, key, value * 60000)


# --- no numbers ---


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("bad", "count"), [(torch.nan, 1), (torch.inf, 3), (-torch.inf, 1)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_a_query_that_is_no_number_sees_nothing_and_spoils_no_other(bad: float, count: int, implementation: str):
    kv = cache_of(*tensors(70), implementation)
    q = queries(4, implementation, count=1 if implementation == "gluon" else count)
    want = cached_attention(q, kv, implementation=implementation)
    q[0, 1, 0, 5] = bad
    got = cached_attention(q, kv, implementation=implementation)
    assert not got.out[0, 1, 0].any()
    assert got.lse[0, 1, 0] == -torch.inf
    other = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
    other[0, 1, 0] = False
    assert torch.equal(got.out[other], want.out[other])
    assert torch.equal(got.lse[other], want.lse[other])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_keys_and_values_that_are_no_numbers_are_refused(side: int, bad: float):
    x = list(tensors(70))
    x[side][0, 0, 3, 7] = bad
    with pytest.raises(InvalidInputError, match=f"^{('key', 'value')[side]}: expected finite values"):
        cache_of(*x)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
@pytest.mark.parametrize("implementation", APPENDS)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_an_engine_is_told_the_row(implementation: Callable[..., None], bad: float, when: str):
    """1e6 is beyond the float16 of the tail. The other row's bytes are those of a batch without the fault."""
    config = get_preset("turbo4").cache
    device = place(implementation)
    key, value = (normal(2, 1, 66, 64, seed=i).to(device) for i in (1, 2))
    spoilt = key.clone()
    spoilt[0, 0, 65, 3] = bad
    caches = []
    for tokens in (key, spoilt):
        cache = PagedCache(config, [(config.key, config.value)], rows=2, max_tokens=128, head_dim=64,
                           append=implementation, device=device)  # fmt: skip
        cache.append(tokens[:, :, :65], value[:, :, :65], when="after")
        cache.append(tokens[:, :, 65:], value[:, :, 65:], when=when)
        caches.append(cache)
    assert caches[0].fault.tolist() == [0, 0]
    assert caches[1].fault.tolist() == [1, 0]
    with pytest.raises(InvalidInputError, match="row 0: expected finite values and room, received NaN, Inf or a value"):
        caches[1].check()
    for name in ("tail_key", "tail_value"):
        assert torch.equal(getattr(caches[0], name)[1], getattr(caches[1], name)[1])
    assert torch.equal(*(cache.groups[0].pool[cache.groups[0].table[1, 0].long()] for cache in caches))


# --- lengths ---


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_sequences_of_no_token_and_of_one(implementation: str):
    """An empty sequence sees nothing (engines pad batches with them), one token sees itself alone."""
    config, device = get_preset("turbo4").cache, place(implementation)
    cache = PagedCache(config, [(config.key, config.value)], rows=3, max_tokens=128, head_dim=64, device=device)
    key, value = (normal(3, 1, 70, 64, seed=i).half().to(device) for i in (1, 2))
    cache.append(key, value, when="after", counts=torch.tensor([0, 1, 70], dtype=torch.int32, device=device))
    q = normal(3, 2, 1, 64, seed=3).half().to(device)
    got = paged_decode(q, cache.view(), implementation=implementation)
    assert not got.out[0].any()
    assert (got.lse[0] == -torch.inf).all()
    assert torch.equal(got.out[1, :, 0], value[1, :, 0].expand(2, -1))
    score = (q[1, :, 0].double() @ key[1, 0, 0].double()) * 0.125
    assert torch.allclose(got.lse[1, :, 0].double(), score, atol=1e-4)
    assert got.out[2].isfinite().all()


def test_contiguous_cache_of_no_token_and_of_one():
    policy = policy_of("turbo4")
    cache = LayerCache(policy.cache, policy.head_formats(0, 1))
    cache.append(*tensors(0))
    with pytest.raises(InvalidInputError, match="cache: expected tokens to attend to, received an empty cache"):
        cache.view()
    key, value = tensors(1)
    cache.append(key, value)
    got = attend(normal(1, 2, 1, 64, seed=3), cache.view())
    assert torch.allclose(got, value.half().float().expand(1, 2, 1, 64), atol=1e-6)


# --- INT32 accumulators at their bound ---


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_code_the_largest(sign: float, implementation: str):
    """8 bits, head_dim 256, q and weights all at the largest 16-bit operand: 255 x 32639 x 256 is 0.992 of 2^31."""
    policy = policy_of("int8", sinks=0)
    layout = PageLayout(64, 256, policy.cache.key, policy.cache.value)
    pages = 8 if implementation == "cpu" else 2
    key, value = tensors(64 * pages + 1, dim=256)
    cache = LayerCache(policy.cache, policy.head_formats(0, 1))
    device = place(implementation)
    cache.append((key * 1e-3).to(device), value.to(device))
    cache.commit()
    kv = cache.view()
    for name, number in (
        ("key_codes", 255), ("value_codes", 255), ("key_scale", 255), ("value_scale", 255), ("key_zero", 0),
        ("key_page_scale", 2.0**-16), ("value_page_scale", 2.0**-8),
    ):  # fmt: skip
        region = layout.regions[name]
        layout.write(kv.groups[0].pages, name, torch.full((1, 1, pages, *region.shape), number).to(device))
    q = torch.full((1, 16, 1, 256), sign, device=device)
    want = prefill_attention(q.double(), kv)
    for isa in SETS if implementation == "cpu" else [None]:
        if isa is None:
            got = cached_attention(q, kv, implementation=implementation)
        else:
            got = cpu_decode.attend(q, kv, scale=256**-0.5, isa=isa)
        assert relative_rms(got.out, want.out) < 1e-3, isa
        assert (got.lse - want.lse).abs().max() < 1e-3
