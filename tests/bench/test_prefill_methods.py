"""Emulations and the count of tiles behind benchmarks/prefill_errors.py, on cases with known answers."""

from pathlib import Path

import pytest
import torch

from turboattention.ops.prefill.int8 import int8_attention, quantise_chunk

NO = -torch.inf


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


def double(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_exact_weights_are_a_softmax() -> None:
    from prefill_methods import weighted

    torch.manual_seed(0)
    scores, v = torch.randn(5, 300).double(), torch.randn(300, 3).double()
    scores[0, 7:] = NO
    want = torch.softmax(scores * torch.tensor(2.0).log(), -1) @ v
    torch.testing.assert_close(weighted(scores, v, "exact", 128), want)
    for kind, limit in (("bfloat16", 2e-3), ("int8_rounded", 2e-2), ("fp8", 3e-2)):
        error = float((weighted(scores, v, kind, 128) - want).norm() / want.norm())
        assert 0 < error < limit, kind


@pytest.mark.parametrize(
    ("kind", "scores", "weights"),
    [
        ("int8_rounded", [0.0, -8.0, NO, NO], [127, 0, 0, 0]),  # 127 / 256 rounds to 0 in the maximum's own tile
        ("int8_rounded", [0.0, NO, -8.0, NO], [127, 0, 127 / 256, 0]),  # and is a whole level in another tile
        ("fp8", [0.0, -1.0, -17.0, NO], [256, 128, 2**-9, 0]),  # 2^-9 is the smallest code of e4m3
        ("fp8", [0.0, NO, -1.0, -18.0], [256, 0, 128, 2**-10]),  # from the last tile on: below its own maximum -1
    ],
)
def test_weights_by_hand(kind: str, scores: list[float], weights: list[float]) -> None:
    """Tiles of two tokens. V is the identity, so the result is the weights over their sum."""
    from prefill_methods import weighted

    got = weighted(double(scores), torch.eye(4, dtype=torch.float64), kind, 2)
    kept = double(weights)
    total = kept.sum() if kind == "int8_rounded" else double(scores).exp2().sum() * 256
    torch.testing.assert_close(got, kept / total)


def test_fp8_values_share_a_scale_per_kv_head() -> None:
    from prefill_methods import fp8_values

    x = torch.tensor([[[448.0, 1.0], [17.0, 0.0]], [[4480.0, 10.0], [170.0, 0.0]]])
    # 17 lies between the codes 16 and 18 and goes to the even one.
    want = torch.tensor([[[448.0, 1.0], [16.0, 0.0]], [[4480.0, 10.0], [160.0, 0.0]]])
    torch.testing.assert_close(fp8_values(x), want)


def test_rows_of_a_chunk_are_those_of_the_definition() -> None:
    from prefill_methods import block_of

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 384, 64), torch.randn(1, 2, 384, 64), torch.randn(1, 2, 384, 64)
    chunk = quantise_chunk(q, k, v, 0.125)
    got, want = int8_attention(block_of(chunk, 128), causal=True), int8_attention(chunk, causal=True)
    torch.testing.assert_close(got.out, want.out[:, :, 128:256])
    torch.testing.assert_close(got.lse, want.lse[:, :, 128:256])


def test_errors() -> None:
    from prefill_methods import METHODS, errors, measured_blocks

    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, 512, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    found = errors(q, k, v, 0.125, quantise_chunk(q[None], k[None], v[None], 0.125), rows=256)
    assert set(found) == set(METHODS)
    assert all(x.shape == (5,) and x[:4].min() <= x[4] <= x[:4].max() for x in found.values())
    assert found["bfloat16"][4] < found["int8"][4] < found["int8_rounded"][4] < found["fp8"][4]
    assert measured_blocks(512, 256) == [0, 256, 384]
    assert measured_blocks(4096, 256) == [0, 2048, 3840, 3968]


@pytest.mark.parametrize(("peak", "final", "running"), [(0, 12 / 20, 12 / 20), (384, 6 / 20, 0.0)])
def test_skippable_tiles(peak: int, final: float, running: float) -> None:
    """One key outweighs all others, in the first tile or in the fourth: 8 blocks of rows see 20 tiles of 512 tokens."""
    from prefill_methods import skippable

    q, k = torch.zeros(1, 2, 512, 64), torch.zeros(1, 1, 512, 64)
    q[..., 0], k[0, 0, peak, 0] = 1.0, 400.0
    chunk = quantise_chunk(q, k, torch.ones_like(k), 0.125)
    assert skippable(chunk) == (final, running)


def test_record_is_what_the_cache_holds() -> None:
    """K and V as transformers caches them are those after RoPE; the pass ends behind the last wanted layer."""
    from prefill_errors import record
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model, ids, cache = LlamaForCausalLM(config).eval(), torch.arange(40)[None], DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    found = record(model, ids, {0, 1})
    assert set(found) == {0, 1}
    for index, (q, k, v, scale) in found.items():
        assert q.shape == (1, 4, 40, 16)
        assert scale == 16**-0.5
        torch.testing.assert_close(k, cache.layers[index].keys.bfloat16())
        torch.testing.assert_close(v, cache.layers[index].values.bfloat16())
