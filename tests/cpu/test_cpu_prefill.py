"""C++ INT8 prefill against the definition, on every instruction set that this processor has."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from caches import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboattention.bench.hard_data import harden
from turboattention.cpu import library
from turboattention.errors import InvalidInputError
from turboattention.ops import implementations
from turboattention.ops.prefill import int8, int8_cpu
from turboattention.ops.prefill.int8_prefill import int8_prefill
from turboattention.ops.prefill.reference import AttentionOutput
from turboattention.ops.prefill.sequences import Sequences
from turboattention.quant.error import relative_rms

REASON = library.without_library()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SETS = range(library.loaded().isa + 1)
# As in tests/ops/test_prefill_int8.py: 8-bit probabilities, rounded for each row and tile.
BUDGET, LSE_BUDGET, LSE_RMS = 0.015, 0.05, 0.008
GUARD = 1024


def tensors(
    heads: int, kv_heads: int, rows: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(batch, heads, rows, dim, seed=0)
    k, v = (normal(batch, kv_heads, tokens, dim, seed=i) for i in (1, 2))
    k[..., 3] += 5.0  # what smoothing takes away
    return q.to(dtype), k.to(dtype), v.to(dtype)


def assert_agrees(q: Tensor, k: Tensor, v: Tensor, got: AttentionOutput, budget: float = BUDGET, **how: object) -> None:
    sequences = how.pop("sequences", None)
    want = int8.int8_attention(int8.quantise_chunk(q, k, v, q.shape[-1] ** -0.5, sequences), **how)
    seen = want.lse.isfinite()
    assert got.out.isfinite().all()
    assert got.out.dtype == q.dtype
    if seen.any():
        assert relative_rms(got.out, want.out) <= budget
        error = (got.lse - want.lse)[seen]
        assert error.abs().max() <= LSE_BUDGET
        assert budget > BUDGET or error.square().mean().sqrt() <= LSE_RMS
    assert (got.lse[~seen] == -torch.inf).all()
    out = got.out.transpose(0, 1) if got.lse.ndim == 2 else got.out
    assert (out[~seen] == 0).all()


def run(q: Tensor, k: Tensor, v: Tensor, isa: int | None = None, **how: object) -> AttentionOutput:
    sequences = how.pop("sequences", None) or Sequences.dense(q, k)
    return int8_cpu.attention(q, k, v, sequences, scale=q.shape[-1] ** -0.5, isa=isa, **how)


def run_between_guards(patch: pytest.MonkeyPatch, *arguments: object, **how: object) -> AttentionOutput:
    """`run` with outputs full of NaN between guards, which must stand there afterwards."""
    around: list[Tensor] = []

    def empty(shape: torch.Size, *, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        whole = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)
        whole[:GUARD] = whole[-GUARD:] = 7.0
        around.append(whole)
        return whole[GUARD : GUARD + count].view(shape)

    with patch.context() as only_here:
        only_here.setattr(torch, "empty", empty)
        only_here.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype))
        got = run(*arguments, **how)
    assert len(around) == 2
    for whole in around:
        assert (whole[:GUARD] == 7.0).all()
        assert (whole[-GUARD:] == 7.0).all()
    return got


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "tokens", "dim"),
    [(1, 1, 1, 1, 64), (4, 1, 63, 111, 64), (2, 2, 111, 300, 80), (4, 2, 130, 130, 96), (2, 1, 200, 129, 128),
     (1, 1, 70, 140, 256), (8, 2, 1, 300, 128), (3, 1, 66, 17, 64)],
)  # fmt: skip
def test_shapes(
    heads: int, kv_heads: int, rows: int, tokens: int, dim: int, causal: bool, isa: int, monkeypatch: pytest.MonkeyPatch
):
    q, k, v = tensors(heads, kv_heads, rows, tokens, dim, batch=2)
    got = run_between_guards(monkeypatch, q, k, v, isa, causal=causal)
    assert_agrees(q, k, v, got, causal=causal)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("window", [1, 40, 129, 1000])
def test_window(window: int, isa: int):
    q, k, v = tensors(2, 1, 200, 333, 64)
    assert_agrees(q, k, v, run(q, k, v, isa, causal=True, window=window), causal=True, window=window)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", ["outlier", "channel", "peaked", "flat", "falling", "constant", "zero"])
def test_hard_data(kind: str, isa: int):
    # Eight heads: "falling" makes 1.4 % on average, and two heads alone are up to 0.1 % off that.
    q, k, v = tensors(8, 8, 128, 512, 64)
    harden(kind, q, k, v)
    for causal in (False, True):
        budget = 0.025 if kind == "outlier" else BUDGET
        assert_agrees(q, k, v, run(q, k, v, isa, causal=causal), budget, causal=causal)


@pytest.mark.parametrize("isa", SETS)
def test_a_large_channel_does_not_coarsen_the_others(isa: int):
    """As in tests/ops/test_prefill_int8.py, against float64 attention on the inputs themselves."""
    q, k, v = tensors(4, 2, 256, 256, 64)
    harden("channel", q, k, v)
    q[..., 3] *= 0.02
    key, value = (x.double().repeat_interleave(2, 1) for x in (k, v))
    hidden = ~int8.visible(256, 256, True, None, q.device)
    scores = (q.double() @ key.mT * 0.125).masked_fill(hidden, -torch.inf)
    got = run(q, k, v, isa, causal=True)
    assert relative_rms(got.out, torch.softmax(scores, -1) @ value) < 0.025
    assert (got.lse - torch.logsumexp(scores, -1)).abs().max() < 0.08


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_no_numbers_stay_in_their_head(which: int, value: float, isa: int):
    inputs = tensors(4, 2, 130, 130, 64)
    want = run(*inputs, isa, causal=True)
    for spot in ((0, 0, 17, 5), (0, 0, slice(None), 5), (0, 0)):
        inputs[which][spot] = value
        got = run(*inputs, isa, causal=True)
        assert torch.equal(got.out[:, 2:], want.out[:, 2:])
        assert torch.equal(got.lse[:, 2:], want.lse[:, 2:])


@pytest.mark.parametrize("isa", SETS)
def test_every_extreme_code(isa: int):
    """Codes of 127 alone in both products: the largest sums there are."""
    q, k = torch.ones(1, 1, 64, 256), torch.ones(1, 1, 128, 256)
    k[:, :, 64:] = -1.0  # the mean is 0
    v = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0).expand(1, 1, 128, 256)
    for sign in (1.0, -1.0):
        got = run(sign * q, k, v, isa, causal=False)
        assert_agrees(sign * q, k, v, got, causal=False)
        assert (got.out - v[:, :, :64]).abs().max() < 1e-5


@pytest.mark.parametrize("isa", SETS)
def test_packed_sequences_of_every_length(isa: int):
    lengths, longer = torch.tensor([0, 1, 64, 64, 300]).int(), torch.tensor([0, 0, 200, 210, 446]).int()
    q, k, v = (normal(n, h, 64, seed=n + h) for n, h in ((300, 4), (446, 2), (446, 2)))
    sequences = Sequences.packed(q, k, lengths, longer)
    got = run(q, k, v, isa, sequences=sequences, causal=True)
    assert_agrees(q, k, v, got, sequences=sequences, causal=True)
    for (a, b), (c, d) in zip(pairwise(lengths.tolist()), pairwise(longer.tolist()), strict=True):
        if b > a and d > c:
            alone = run(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])), isa, causal=True)
            assert torch.equal(got.out[a:b], alone.out[0].transpose(0, 1))
            assert torch.equal(got.lse[:, a:b], alone.lse[0])


def test_lengths_that_point_outside_are_refused():
    q, k, v = (normal(20, 2, 64, seed=i) for i in range(3))
    for numbers in ([0, 21], [0, 15, 10], [-1, 20]):
        sequences = replace(Sequences.packed(q, k, torch.tensor([0, 20]).int()), batch=len(numbers) - 1)
        wrong = torch.tensor(numbers).int()
        with pytest.raises(InvalidInputError, match="cu_q"):
            run(q, k, v, sequences=replace(sequences, cu_q=wrong, cu_k=wrong), causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_strides(dtype: torch.dtype):
    q, k, v = tensors(2, 1, 65, 65, 64, dtype)
    want = run(q, k, v, causal=True)
    assert_agrees(q.float(), k.float(), v.float(), AttentionOutput(want.out.float(), want.lse), causal=True)
    outermost = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = run(outermost, k.mT.contiguous().mT, v, causal=True)
    assert got.out.stride() == outermost.stride()
    assert torch.equal(got.out, want.out)
    reversed_channels = run(q.mT.contiguous().mT, k, v, causal=True)
    assert torch.equal(reversed_channels.out, want.out)


def test_the_same_bits_for_the_same_call_and_any_number_of_threads():
    q, k, v = tensors(4, 2, 300, 300, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(run(q, k, v, causal=True).out)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


@settings(max_examples=40)
@given(st.data())
def test_any_shape(data: st.DataObject):
    kv_heads, ratio = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    rows, tokens = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 300))
    q, k, v = tensors(kv_heads * ratio, kv_heads, rows, tokens, data.draw(st.sampled_from([64, 80, 128])))
    causal = data.draw(st.booleans())
    window = data.draw(st.none() | st.integers(1, 300)) if causal else None
    got = run(q, k, v, data.draw(st.sampled_from(SETS)), causal=causal, window=window)
    assert_agrees(q, k, v, got, 0.02, causal=causal, window=window)


def test_chosen_without_being_asked_for():
    q, k, v = tensors(2, 1, 70, 70, 64)
    want = int8_prefill(q, k, v, implementation="cpu")
    assert torch.equal(int8_prefill(q, k, v).out, want.out)
    assert not torch.equal(int8_prefill(q, k, v, implementation="reference").out, want.out)
    assert implementations("turbo4", device=torch.device("cpu"))["int8_prefill"][0] == "cpu"
