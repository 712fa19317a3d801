"""INT8 prefill: operands, the definition, and kernels against it (in Triton's interpreter where there is no GPU)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from compile_kernels import MATRIX, rows_of

from turboattention.bench.hard_data import harden
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.ops.common.sample import spread
from turboattention.ops.prefill import int8, int8_prepass, int8_triton
from turboattention.ops.prefill.int8_prefill import Implementation, int8_prefill
from turboattention.ops.prefill.sequences import Sequences
from turboattention.quant.packing import restore_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Error of the kernel against the definition on the same operands: 8-bit probabilities, rounded for each row and tile.
BUDGET = 0.015
# The largest of thousands of rows: rounding 128 probabilities moves a peaked row's sum by 1 to 2 % (one standard
# deviation), and the RMS over all rows far less.
LSE_BUDGET, LSE_RMS = 0.05, 0.008


def tensors(
    heads: int, kv_heads: int, rows: int, tokens: int, dim: int, dtype: torch.dtype = torch.float16, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, rows, dim, device=DEVICE).to(dtype)
    k = (torch.randn(batch, kv_heads, tokens, dim, device=DEVICE) + torch.randn(dim, device=DEVICE)).to(dtype)
    return q, k, torch.randn(batch, kv_heads, tokens, dim, device=DEVICE).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def exact(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(ratio, 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    scores = scores.masked_fill(~int8.visible(q.shape[2], k.shape[2], causal, window, q.device), -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


def run_kernel(
    chunk: int8.Int8Chunk, q: Tensor, causal: bool, window: int | None = None, tiles: int8_triton.Tiles | None = None
) -> tuple[Tensor, Tensor]:
    out = torch.full_like(q, torch.nan)
    lse = q.new_full((q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3], torch.nan, dtype=torch.float32)
    int8_triton.attention(chunk, out, lse, causal=causal, window=window, tiles=tiles)
    return out, lse


def assert_agrees(chunk: int8.Int8Chunk, out: Tensor, lse: Tensor, causal: bool, window: int | None = None) -> None:
    want = int8.int8_attention(chunk, causal=causal, window=window)
    seen = torch.isfinite(want.lse)
    assert torch.isfinite(out).all()
    assert relative(out, want.out) <= BUDGET
    assert (out - want.out).abs().max() <= 0.1 * want.out.abs().max()
    assert (lse[seen] - want.lse[seen]).abs().max() <= LSE_BUDGET
    assert (lse[seen] - want.lse[seen]).square().mean().sqrt() <= LSE_RMS
    assert (lse[~seen] == -torch.inf).all()


# ---- operands and definition --------------------------------------------------------------------------------------
def test_operands_stand_for_the_chunk_within_half_a_step() -> None:
    q, k, v = tensors(4, 2, 70, 200, 80)
    k[..., 7] *= 50
    chunk = int8.quantise_chunk(q, k, v, 0.25)
    assert chunk.q.shape == (4, 128, 128)
    assert chunk.v.shape == (2, 128, 256)
    gain = chunk.gain[0, :, None, :80]
    step = chunk.q_scale.repeat_interleave(64, 1)[:, :70, None]
    scaled = q[0].float() * 0.25 * int8.LOG2E * gain.repeat_interleave(2, 0)
    assert ((chunk.q[:, :70, :80] * step - scaled).abs() <= 0.501 * step).all()
    step = chunk.k_scale.repeat_interleave(128, 1)[:, :200, None]
    smooth = (k[0].float() - k[0].float().mean(1, keepdim=True)) / gain
    assert ((chunk.k[:, :200, :80] * step - smooth).abs() <= 0.501 * step).all()
    step = chunk.v_scale.repeat_interleave(128, 1)[:, :200, None]
    assert ((restore_tokens(chunk.v).mT[:, :200, :80] * step - v[0].float()).abs() <= 0.501 * step).all()
    for codes in (chunk.q, chunk.k, chunk.v):
        assert codes.int().abs().max() == 127
    # What pads is zero: a kernel reads whole blocks.
    assert not chunk.q[:, 70:].any()
    assert not chunk.q[:, :, 80:].any()
    assert not chunk.k[:, 200:].any()
    assert not chunk.v[:, 80:].any()


@pytest.mark.parametrize("causal", [False, True])
def test_definition_is_attention_up_to_the_rounding_of_operands(causal: bool) -> None:
    q, k, v = tensors(4, 2, 130, 300, 64)
    got = int8.int8_attention(int8.quantise_chunk(q, k, v, 0.125), causal=causal)
    out, lse = exact(q, k, v, 0.125, causal)
    assert relative(got.out, out) < 0.03
    # The mean that smoothing took is back: a shift of a whole score would show.
    assert (got.lse - lse).abs().max() < 0.05


def test_smoothing_helps_where_keys_share_an_offset() -> None:
    q, k, v = tensors(2, 2, 128, 256, 64)
    k[..., 3] += 30
    got = int8.int8_attention(int8.quantise_chunk(q, k, v, 0.125), causal=True)
    out, lse = exact(q, k, v, 0.125, True)
    assert relative(got.out, out) < 0.03
    assert (got.lse - lse).abs().max() < 0.05


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(("size", "limit", "lse_limit"), [(1.0, 0.05, 2.0), (0.02, 0.025, 0.08)])
def test_a_large_channel_does_not_coarsen_the_others(
    size: float, limit: float, lse_limit: float, implementation: Implementation
) -> None:
    """One channel of K is 100 times the others, on a mean ten times as large again: with one scale they all become 0.

    size: of the channel in Q. As large as the others there, it makes scores up to 350, of which 0.5 % remain uncertain.
    """
    q, k, v = tensors(4, 2, 256, 256, 64)
    harden("channel", q, k, v)
    q[..., 3] *= size
    out, lse = exact(q, k, v, 0.125, True)
    got = int8_prefill(q, k, v, implementation=implementation)
    assert relative(got.out, out) < limit
    assert (got.lse - lse).abs().max() < lse_limit


@pytest.mark.parametrize(("count", "length"), [(512, 512), (512, 513), (512, 8191), (7, 1 << 22), (128, 5), (3, 0)])
def test_spread_takes_one_token_of_each_part(count: int, length: int) -> None:
    tokens = spread(count, length)
    edges = torch.arange(count + 1) * length // count
    assert len(tokens) == (count if length else 0)
    for token, first, last in zip(tokens.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=bool(length)):
        assert first <= token < max(last, first + 1)
    assert not length or tokens[0] == 0


def test_a_rotating_channel_is_no_mean_of_k() -> None:
    """RoPE turns channels; tokens at equal distances would meet one of them always at the same angle."""
    angle = torch.arange(8192, device=DEVICE) * (2 * torch.pi / 16)
    k = torch.zeros(1, 1, 8192, 64, device=DEVICE)
    k[..., 0], k[..., 1] = angle.cos(), angle.sin()
    chunk = int8.quantise_chunk(k[:, :, :64], k, k, 0.125)
    assert chunk.mean.abs().max() < 0.1


def test_gains_bring_the_channels_of_both_sides_together() -> None:
    q, k, v = tensors(4, 2, 300, 300, 64)
    sizes = torch.tensor([1.0, 4.0, 16.0, 64.0], device=DEVICE)
    k[..., :4] *= sizes
    q[..., 4:8] *= sizes
    gain = int8.quantise_chunk(q, k, v, 0.125).gain[0, :, :64]
    gain = gain / gain[:, 8:].median()
    want = sizes.sqrt().log2()
    assert ((gain[:, :4].log2() - want).abs() <= 0.5).all()
    assert ((gain[:, 4:8].log2() + want).abs() <= 0.5).all()


@pytest.mark.parametrize("make", [int8.quantise_chunk, int8_prepass.quantise_chunk])
def test_gains_of_any_values_are_positive_numbers_and_leave_other_heads_alone(
    make: Callable[[Tensor, Tensor, Tensor, float], int8.Int8Chunk],
) -> None:
    """Of five sequences one is clean; in the first head of the others K, Q or both hold no usual numbers."""
    q, k, v = (x.expand(5, -1, -1, -1).clone() for x in tensors(4, 2, 20, 20, 64, torch.float32))
    for number, x in ((1, k), (2, q)):
        x[number, 0, :, 4] = 0.0
        x[number, 0, 0, 5] = torch.nan
        x[number, 0, :, 6] = torch.inf
    q[3, 0] = k[3, 0] = 0.0
    q[4, 0] = k[4, 0] = torch.linspace(1e-44, 3e38, 64)
    chunk = make(q, k, v, 0.125)
    assert ((chunk.gain > 0) & chunk.gain.isfinite()).all()
    assert (chunk.gain[:, 1] == chunk.gain[0, 1]).all()
    for operand, first in ((chunk.q, 2), (chunk.k, 1)):
        others = operand.unflatten(1, (5, -1))[first:]
        assert (others == others[:, :1]).all()


# ---- pre-pass against the definition -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "tokens", "dim"), [(1, 1, 64), (63, 111, 80), (200, 1100, 128)])
def test_prepass_makes_the_same_codes(rows: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v = tensors(4, 2, rows, tokens, dim, dtype)
    k = (k * 8).round() / 8  # sums of sampled K are then exact in any order, and its codes too
    k = k[:, :, : 1 << (tokens.bit_length() - 1)]
    v = v[:, :, : k.shape[2]]
    k[..., 3] *= 64
    q[..., 5] *= 32
    want = int8.quantise_chunk(q, k, v, dim**-0.5)
    got = int8_prepass.quantise_chunk(q, k, v, dim**-0.5)
    assert torch.equal(got.gain[..., :dim], want.gain[..., :dim])
    assert want.gain[..., :dim].amax() > want.gain[..., :dim].amin() or tokens == 1
    for name in ("q", "q_scale", "k", "k_scale", "v", "v_scale"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.shift[:, :rows], want.shift[:, :rows], atol=1e-5, rtol=1e-5)


def test_prepass_of_strided_and_of_packed_tensors() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(2, 1, 150, 150, 64))
    dense = int8_prepass.quantise_chunk(q, k, v, 0.1)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    lengths = torch.tensor([0, 150], dtype=torch.int32, device=DEVICE)
    got = int8_prepass.quantise_chunk(*packed, 0.1, Sequences.packed(*packed[:2], lengths))
    for name in ("q", "q_scale", "k", "k_scale", "v", "v_scale", "gain"):
        assert torch.equal(getattr(got, name), getattr(dense, name)), name
    want = int8.quantise_chunk(q.contiguous(), k.contiguous(), v.contiguous(), 0.1)
    assert torch.equal(dense.q, want.q)
    assert torch.equal(dense.v, want.v)
    assert (dense.k.int() - want.k.int()).abs().max() <= 1


# ---- the kernel against the definition ------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "tokens", "dim"),
    [(1, 1, 1, 1, 64), (4, 1, 63, 111, 64), (2, 2, 111, 300, 80), (4, 2, 130, 130, 96), (2, 1, 200, 129, 128),
     (1, 1, 70, 140, 256), (8, 2, 1, 300, 128)],
)  # fmt: skip
def test_kernel(heads: int, kv_heads: int, rows: int, tokens: int, dim: int, causal: bool) -> None:
    q, k, v = tensors(heads, kv_heads, rows, tokens, dim)
    chunk = int8_prepass.quantise_chunk(q, k, v, dim**-0.5)
    assert_agrees(chunk, *run_kernel(chunk, q, causal), causal)


@pytest.mark.parametrize("tiles", [
    int8_triton.Tiles(128, 64, 128, 4, 1, True, False),
    int8_triton.Tiles(64, 128, 64, 4, 1, False, False),
    int8_triton.Tiles(128, 32, 64, 4, 1, True, False),
])  # fmt: skip
def test_every_way_to_cut_tiles_gives_the_same(tiles: int8_triton.Tiles) -> None:
    q, k, v = tensors(2, 1, 150, 270, 128, batch=2)
    chunk = int8_prepass.quantise_chunk(q, k, v, 0.1)
    assert_agrees(chunk, *run_kernel(chunk, q, True, tiles=tiles), True)


@pytest.mark.parametrize("window", [1, 40, 129, 1000])
def test_window(window: int) -> None:
    q, k, v = tensors(2, 1, 200, 333, 64)
    chunk = int8_prepass.quantise_chunk(q, k, v, 0.125)
    assert_agrees(chunk, *run_kernel(chunk, q, True, window), True, window)


@pytest.mark.parametrize("kind", ["outlier", "channel", "peaked", "flat", "falling", "constant"])
def test_kernel_on_hard_data(kind: str) -> None:
    q, k, v = tensors(2, 2, 128, 512, 64)
    harden(kind, q, k, v)
    chunk = int8_prepass.quantise_chunk(q, k, v, 0.125)
    for causal in (False, True):
        out, lse = run_kernel(chunk, q, causal)
        want = int8.int8_attention(chunk, causal=causal)
        assert relative(out, want.out) <= (0.025 if kind == "outlier" else BUDGET)
        assert (lse - want.lse).abs().max() <= 0.05


def test_error_does_not_grow_with_length() -> None:
    errors = []
    for tokens in (256, 4096):
        q, k, v = tensors(1, 1, 64, tokens, 64)
        chunk = int8_prepass.quantise_chunk(q, k, v, 0.125)
        out, _ = run_kernel(chunk, q, False)
        errors.append(relative(out, int8.int8_attention(chunk, causal=False).out))
    assert max(errors) <= BUDGET


def test_packed_sequences_of_every_length() -> None:
    lengths = torch.tensor([0, 1, 64, 64, 300], dtype=torch.int32, device=DEVICE)
    longer = torch.tensor([0, 0, 200, 210, 446], dtype=torch.int32, device=DEVICE)
    q = torch.randn(300, 4, 64, device=DEVICE).half()
    k, v = (torch.randn(446, 2, 64, device=DEVICE).half() for _ in range(2))
    sequences = Sequences.packed(q, k, lengths, longer)
    chunk = int8_prepass.quantise_chunk(q, k, v, 0.125, sequences)
    out, lse = run_kernel(chunk, q, True)
    assert_agrees(chunk, out, lse, True)
    # And each sequence alone, as a dense tensor, is the same attention.
    part = [x[None].transpose(1, 2) for x in (q[64:300], k[210:446], v[210:446])]
    alone = int8_prefill(*part, causal=True, scale=0.125, implementation="reference")
    assert relative(out[64:], alone.out[0].transpose(0, 1)) < 0.02


def test_output_dtype_strides_and_true_lse() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = tensors(2, 1, 65, 65, 64, dtype)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        got = int8_prefill(q, k, v, implementation="triton")
        out, lse = exact(q, k, v, 0.125, True)
        assert got.out.dtype == dtype
        assert got.out.stride() == q.stride()
        assert relative(got.out, out) < 0.03
        assert (got.lse - lse).abs().max() < 0.08


# ---- the operator ---------------------------------------------------------------------------------------------------
def test_operator_by_the_definition() -> None:
    q, k, v = (x.cpu() for x in tensors(2, 1, 20, 40, 64))
    want = int8.int8_attention(int8.quantise_chunk(q, k, v, 0.125), causal=True, dtype=torch.float32)
    got = int8_prefill(q, k, v, implementation="reference")
    assert torch.equal(got.out, want.out.half())
    assert torch.equal(got.lse, want.lse)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = (x.cpu() for x in tensors(2, 1, 20, 40, 64))
    with pytest.raises(UnsupportedError, match="softcap"):
        int8_prefill(q, k, v, softcap=30.0)
    with pytest.raises(InvalidInputError, match="Hopper"):
        int8_prefill(q, k, v, implementation="hopper")
    for bad in (
        {"q": q[0]}, {"q": q[..., :48], "k": k[..., :48], "v": v[..., :48]}, {"v": v[:, :, 1:]}, {"q": q.double()},
        {"window": 0}, {"window": 5, "causal": False}, {"scale": 0.0}, {"implementation": "fast"}, {"q": q[:, :, :0]},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            int8_prefill(**({"q": q, "k": k, "v": v} | bad))


# ---- compiled for every GPU -----------------------------------------------------------------------------------------
def test_kernels_compile_to_integer_matrix_instructions_with_few_spills() -> None:
    rows = rows_of(Path(__file__).parent / "prefill_variants.py")
    assert rows
    for row in rows:
        name = f"{row['name']} {row['target']}"
        if row["name"].startswith(("quantise", "measure", "join", "merge")):
            assert row["spills"] == 0, name
            continue
        matrix = {op for op in row["mnemonics"] if op.startswith(MATRIX)}
        integer = {"IGMMA"} if row["target"] == "sm_90" else {"IMMA"} if row["target"].startswith("sm_") else None
        assert matrix, name
        assert integer is None or matrix == integer, name
        assert integer is not None or all("i8" in op for op in matrix), name
        if row["name"].startswith("hopper"):
            assert row["spills"] == 0, name
            # Two products start and two are waited for. The assembler can also make each of their 8 instructions wait
            # for the one before; it then says so only in a note.
            assert row["loop_mnemonics"]["WARPGROUP"] == 4, name
            assert row["loop_instructions"] <= 840, name
        # What is spilled today, so that it does not grow: outputs of 256 channels do not fit registers, and the newest
        # two targets keep a few registers of 128 channels outside.
        newest = row["target"] in ("sm_100", "sm_120")
        known = (("256", 100), ("attention-128", 4 if newest else 0))
        limit = next((most for part, most in known if part in row["name"]), 0)
        assert row["loop_spills"] <= limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (63, 111), (300, 130), (777, 1111), (2048, 2048)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_hopper_kernel(rows: int, tokens: int, dim: int, causal: bool) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    from turboattention.ops.prefill import hopper

    q, k, v = tensors(8, 2, rows, tokens, dim, batch=2)
    # The kernel quantises q itself, and must come to the codes of the chunk that it is judged by.
    chunk = int8_prepass.quantise_chunk(q, k, v, dim**-0.5)
    out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)
    hopper.attention(q, chunk, out, lse, dim**-0.5, causal=causal)
    assert_agrees(chunk, out, lse, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_hopper_kernel_ends_with_values_that_are_no_numbers(which: int, value: float) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    clean = tensors(8, 2, 300, 300, 128)
    want = int8_prefill(*clean, implementation="hopper")
    spoilt = [x.clone() for x in clean]
    spoilt[which][0, 0, 17, 5] = value
    got = int8_prefill(*spoilt, implementation="hopper")
    # Heads of the other KV head see nothing of it; the warpgroups that do must not wait for each other for ever.
    assert torch.equal(got.out[:, 4:], want.out[:, 4:])
    assert torch.equal(got.lse[:, 4:], want.lse[:, 4:])
