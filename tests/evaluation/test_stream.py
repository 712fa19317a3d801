"""The lockstep of baseline and candidates on a tiny model."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from turboattention.errors import UnsupportedError
from turboattention.evaluation.caches import attention_of, held_bytes, held_values, make_cache
from turboattention.evaluation.stream import feed, stream
from turboattention.policy import Policy

TOKENS = 300
VALUES = 2 * 2 * 2 * 1 * TOKENS * 64  # K and V, layers, rows, heads, tokens, head_dim


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(2, 200, (2, TOKENS + 1))


def test_baseline_is_the_model(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    """Chunked and whole give the same log likelihoods: teacher forcing, each position predicts the next token."""
    baseline, candidates = stream(model, rows, [])
    with torch.no_grad():
        logits = model(rows).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    torch.testing.assert_close(baseline.nll, expected, rtol=1e-4, atol=1e-5)
    assert baseline.kv_bytes == 2 * VALUES
    assert candidates == []


def test_unquantised_candidate_equals_the_baseline(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    baseline, (candidate,) = stream(model, rows, ["fp16"])
    torch.testing.assert_close(candidate.nll, baseline.nll, rtol=1e-4, atol=1e-5)
    assert float(candidate.kl.max()) < 1e-5
    assert float(candidate.same_top.float().mean()) > 0.99
    assert candidate.num_values == VALUES


def test_fewer_bits_cost_more(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    _, candidates = stream(model, rows, ["int8", Policy.from_preset("turbo4"), "turbo2"])
    divergences = [float(candidate.kl.mean()) for candidate in candidates]
    assert 0.0 < divergences[0] < divergences[1] < divergences[2]
    sizes = [candidate.kv_bytes for candidate in candidates]
    assert sizes[0] > sizes[1] > sizes[2]
    for candidate in candidates:
        assert candidate.nll.shape == candidate.kl.shape == candidate.same_top.shape == (2, TOKENS)


def test_candidates_do_not_disturb_each_other(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    _, together = stream(model, rows, ["turbo2", "turbo4"])
    _, (alone,) = stream(model, rows, ["turbo4"])
    assert torch.equal(together[1].kl, alone.kl)
    assert model.config._attn_implementation == "sdpa"


def test_nothing_is_compressed_before_a_page_is_full(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    """Positions of the first page attend to exact K and V, so that they diverge by the rounding to float16 alone."""
    _, (candidate,) = stream(model, rows, ["turbo2"])
    assert float(candidate.kl[:, :64].max()) < 1e-4 < float(candidate.kl[:, 65:].mean())


def test_progress_counts_every_chunk_of_every_cache(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    seen: list[tuple[int, int, str]] = []
    stream(model, rows, ["turbo4"], progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, 11))
    assert {total for _, total, _ in seen} == {10}
    assert [label for _, _, label in seen[:2]] == ["16-bit", "turbo4"]


@pytest.mark.parametrize("policy", [None, "turbo4"])
def test_a_copy_leaves_the_original_alone(model: LlamaForCausalLM, rows: torch.Tensor, policy: str | None) -> None:
    """A deep copy goes on exactly as the original would, and the original does not notice."""
    cache = make_cache(model, policy)
    with attention_of(model, policy):
        feed(model, rows[:, :100], cache)
        copies = [copy.deepcopy(cache) for _ in range(2)]
        held = held_bytes(cache), held_values(cache), cache.get_seq_length()
        other = feed(model, rows[:, 200:290], copies[0])
        assert (held_bytes(cache), held_values(cache), cache.get_seq_length()) == held
        assert copies[0].get_seq_length() == 190
        assert torch.equal(feed(model, rows[:, 100:190], copies[1]), feed(model, rows[:, 100:190], cache))
        assert not torch.equal(other, feed(model, rows[:, 100:190], copy.deepcopy(cache)))


def test_branch_made_outside_still_uses_compressed_attention(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    """A layer reads from the configuration which attention is on; a copied configuration would stay as it was."""
    cache = make_cache(model, "turbo4")
    with attention_of(model, "turbo4"):
        feed(model, rows[:, :100], cache)
    copied = copy.deepcopy(cache)
    with attention_of(model, "turbo4"):
        assert torch.equal(feed(model, rows[:, 100:101], copied), feed(model, rows[:, 100:101], cache))


def test_ordinary_cache_is_refused_under_compressed_attention(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    cache = DynamicCache(config=model.config)
    feed(model, rows[:, :10], cache)
    with attention_of(model, "turbo4"), pytest.raises(UnsupportedError, match="expected a TurboCache"):
        feed(model, rows[:, 10:11], cache)
