"""INT8 prefill and chunked prefill with numbers at their edge: kernels against the definition on the same operands.

Triton's kernel runs in the interpreter here. On an H200 ``pytest -m gpu tests/ops/test_edge_prefill.py`` runs it
compiled, and the Hopper kernel, which the operator takes there.
"""

import pytest
import torch
from caches import EDGES, normal, paged, policy_of
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from turboattention.ops import chunked_prefill
from turboattention.ops.dispatch import without_cpu
from turboattention.ops.prefill import int8, int8_prepass, int8_triton
from turboattention.ops.prefill.int8_prefill import int8_prefill
from turboattention.ops.prefill.reference import AttentionOutput
from turboattention.ops.prefill.sequences import Sequences

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
NO_CPU = without_cpu(torch.device("cpu"))
CPP = pytest.param("cpu", marks=pytest.mark.skipif(NO_CPU is not None, reason=str(NO_CPU)))
IS_HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
HOPPER = pytest.param(
    "hopper", marks=[pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU (sm_90)")]
)
# As in test_prefill_int8: 127 levels of a probability, against the definition on the same operands.
BUDGET, LSE_BUDGET = 0.025, 0.05
SMALLEST = 2.0**-24  # of float16
# Of the largest score: where K's mean is added up in another order, a code of K may be another.
ONE_CODE = 1 / 254


KINDS = EDGES | {
    "largest": lambda x: x.sign() * 60000.0,  # with a margin: codes may stand for more than there was
    "float16-subnormal": lambda x: (x * 1e-7).half().float(),
}


def place(implementation: str) -> torch.device:
    return torch.device("cpu") if implementation == "cpu" else DEVICE


def attention(
    q: Tensor, k: Tensor, v: Tensor, implementation: str, causal: bool
) -> tuple[AttentionOutput, AttentionOutput]:
    """By a kernel, and by the definition on the operands that the kernel read (C++ keeps its own to itself)."""
    scale = q.shape[-1] ** -0.5
    if implementation == "cpu":
        want = int8.int8_attention(int8.quantise_chunk(q, k, v, scale), causal=causal)
        return int8_prefill(q, k, v, causal=causal, implementation="cpu"), want
    chunk = int8_prepass.quantise_chunk(q, k, v, scale)
    got = AttentionOutput(torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32))
    if implementation == "hopper":
        from turboattention.ops.prefill import hopper

        hopper.attention(q, chunk, *got, scale, causal=causal)
    else:
        int8_triton.attention(chunk, *got, causal=causal)
    return got, int8.int8_attention(chunk, causal=causal)


def assert_near(got: Tensor, want: Tensor) -> None:
    difference = (got.double() - want.double()).square().mean().sqrt()
    assert difference <= BUDGET * want.double().square().mean().sqrt() + SMALLEST


def assert_near_lse(got: Tensor, want: Tensor, rounding: float = 1e-5) -> None:
    """The mean that smoothing took away comes back in float32: its rounding is that of the largest score."""
    assert (got - want).abs().max() <= LSE_BUDGET + rounding * want.abs().max()


def assert_like(got: AttentionOutput, want: AttentionOutput, v: Tensor) -> None:
    """Outputs are means of V within the budget."""
    assert got.out.isfinite().all()
    assert_near(got.out, want.out)
    assert got.out.double().abs().max() <= 1.02 * v.double().abs().max() + SMALLEST
    assert_near_lse(got.lse, want.lse)


@pytest.mark.parametrize("implementation", ["triton", HOPPER, CPP])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind: str, dim: int, implementation: str):
    """``largest`` has scores of 200,000, which float32 rounds to 1/64: probabilities above the last code would wrap."""
    dtype = torch.float32 if kind == "float32-subnormal" else torch.float16
    q = normal(1, 2, 70, dim, seed=1).to(place(implementation), dtype)
    k, v = (KINDS[kind](normal(1, 1, 130, dim, seed=i)).to(place(implementation), dtype) for i in (2, 3))
    got, want = attention(q, k, v, implementation, causal=True)
    assert_like(got, want, v)


@pytest.mark.parametrize("implementation", ["triton", HOPPER, CPP])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e4])
def test_queries(scale: float, implementation: str):
    q = (normal(1, 2, 70, 64, seed=1) * scale).to(place(implementation), torch.float16)
    k, v = (normal(1, 1, 200, 64, seed=i).to(place(implementation), torch.float16) for i in (2, 3))
    assert_like(*attention(q, k, v, implementation, causal=True), v)


@pytest.mark.parametrize("implementation", ["triton", HOPPER, CPP])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_code_the_largest(sign: float, dim: int, implementation: str):
    """Codes of Q, K and V all +-127; a tile's sum of P V is 127 x 127 x 128.

    With head_dim 256 a score is 127 x 127 x 256, 0.98 of 2^22, up to where adding to bits makes a float of an integer.
    """
    if implementation == "hopper" and dim > 128:
        pytest.skip("head_dim up to 128 for the Hopper kernel")
    tokens = 256
    k = torch.ones(1, 1, tokens, dim)
    k[:, :, ::2] = -1.0  # a mean of 0: nothing is taken away
    q = torch.full((1, 2, 64, dim), sign)
    # Small scores, so that every weight is near the largest.
    q, k, v = (x.to(place(implementation), torch.float16) for x in (q * 2.0**-8, k, torch.ones_like(k)))
    assert_like(*attention(q, k, v, implementation, causal=False), v)


@pytest.mark.parametrize("implementation", ["triton", HOPPER, CPP])
@pytest.mark.parametrize(("side", "bad"), [("q", torch.nan), ("q", torch.inf), ("k", -torch.inf), ("v", torch.nan)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_what_is_no_number_stays_in_its_sequence_and_kv_head(side: str, bad: float, implementation: str):
    """Scales are shared by 64 and 128 tokens, gains by a KV head: its other rows change, all else keeps its bits."""
    lengths = (20, 70, 1)
    cu = torch.tensor([0, 20, 90, 91], dtype=torch.int32, device=place(implementation))
    x = {
        name: normal(91, heads, 64, seed=i).to(place(implementation), torch.float16)
        for i, (name, heads) in enumerate({"q": 4, "k": 2, "v": 2}.items())
    }
    sequences = Sequences.packed(x["q"], x["k"], cu, max_q=max(lengths))
    want = int8_prefill(**x, sequences=sequences, implementation=implementation)
    x[side] = x[side].clone()
    x[side][30, 0, 5] = bad  # the second sequence, the first head
    got = int8_prefill(**x, sequences=sequences, implementation=implementation)
    other = torch.ones(91, 4, dtype=torch.bool, device=place(implementation))
    other[20:90, :2] = False
    assert want.out.isfinite().all()
    assert torch.equal(got.out[other], want.out[other])
    assert torch.equal(got.lse.T[other], want.lse.T[other])


@pytest.mark.parametrize("implementation", ["triton", CPP, pytest.param(None, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["as-they-are", "outliers", "largest", "float16-subnormal"])
def test_chunks_over_histories(kind: str, implementation: str | None):
    """Chunks of many tokens, one and none behind histories of many, one and none; None takes Hopper's kernel there."""
    device = place(implementation or "")
    change = KINDS.get(kind, lambda x: x)
    prefixes, chunks = (0, 130, 64, 1), (9, 1, 0, 7)
    view = paged(policy_of("turbo4"), prefixes, kv_heads=1, device=device).view()
    q = normal(17, 2, 64, seed=4).to(device, torch.float16)
    k, v = (change(normal(17, 1, 64, seed=i)).to(device, torch.float16) for i in (5, 6))
    cu = torch.tensor([0, 9, 10, 10, 17], dtype=torch.int32, device=device)
    sequences = Sequences.packed(q, k, cu, max_q=max(chunks))
    want = chunked_prefill(q, k, v, view, sequences=sequences, implementation="reference")
    got = chunked_prefill(q, k, v, view, sequences=sequences, implementation=implementation)
    assert got.out.isfinite().all()
    for first, last in ((0, 9), (9, 10), (10, 17)):
        assert_near(got.out[first:last], want.out[first:last])
    assert_near_lse(got.lse, want.lse, ONE_CODE)


@pytest.mark.parametrize("implementation", ["triton", CPP, pytest.param(None, marks=pytest.mark.gpu)])
def test_a_chunk_with_16_query_heads_of_256_channels(implementation: str | None):
    device = place(implementation or "")
    view = paged(policy_of("turbo2"), (130,), head_dim=256, kv_heads=1, device=device).view()
    q, k, v = (normal(1, heads, 9, 256, seed=i).to(device, torch.float16) for i, heads in ((4, 16), (5, 1), (6, 1)))
    want = chunked_prefill(q, k, v, view, implementation="reference")
    got = chunked_prefill(q, k, v, view, implementation=implementation)
    assert_near(got.out, want.out)
    assert_near_lse(got.lse, want.lse)
