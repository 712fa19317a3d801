"""The watch of transformers: answers are the same to the bit, faults are found where they are, responses act."""

import gc
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tiny import VOCABULARY, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import turboattention as ta
from turboattention.errors import InvalidInputError, RefusedError, UnsupportedError
from turboattention.integrations.transformers import TurboCache
from turboattention.integrations.transformers_watch import Watch, watch
from turboattention.monitoring.kept import Kept
from turboattention.monitoring.limits import Limit
from turboattention.monitoring.settings import WatchSettings
from turboattention.monitoring.shadow import Check
from turboattention.policy import Override, Policy

LAYERS, KV_HEADS = 4, 2
ALL = WatchSettings(share=1.0, heads=LAYERS * KV_HEADS)
QUICK = [Limit("relative_error", 0.25, checks=2, raise_after=2, clear_after=2)]
LOGGER = "turboattention.monitoring"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(LAYERS, heads=4, kv_heads=KV_HEADS, spread=0.08)


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def steps(model: LlamaForCausalLM, cache: TurboCache, count: int, seed: int = 9) -> Tensor:
    """Logits of ``count`` decode steps of random tokens, all rows the same."""
    batch = cache.turbo_layers[0].cache.view().tail_key.shape[0]
    tokens = prompt(count, seed=seed).expand(batch, -1)
    return torch.cat([model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(count)], 1)


@torch.inference_mode()
def begun(model: LlamaForCausalLM, policy: str | Policy, tokens: int = 150, batch: int = 1) -> TurboCache:
    cache = TurboCache(model.config, policy)
    model(prompt(tokens, batch), past_key_values=cache)
    cache.commit()
    return cache


def recorded(watching: Watch) -> list[Check]:
    """Every check from now on."""
    found: list[Check] = []
    inner = watching.watcher._checked

    def record(*arguments: object) -> Check:
        found.append(inner(*arguments))  # type: ignore[arg-type]
        return found[-1]

    watching.watcher._checked = record  # type: ignore[method-assign, assignment]
    return found


def test_answers_are_equal_to_the_bit_and_errors_are_those_of_the_codes(model: LlamaForCausalLM):
    """With padding, a batch, several lengths of chunks and greedy generation; no draw of torch's generator is used."""
    inputs = prompt(150, batch=3)
    mask = torch.ones_like(inputs)
    mask[1, :70] = 0
    answers = []
    for watched in (False, True):
        with ta.enable(model, "turbo3") as enabled, torch.inference_mode():
            watching = watch(enabled, ALL) if watched else None
            checks = recorded(watching) if watching else []
            torch.manual_seed(3)
            answers.append([
                model.generate(inputs, attention_mask=mask, max_new_tokens=12, do_sample=True, pad_token_id=0),
                steps(model, begun(model, enabled.policy, batch=2), 5), torch.rand(3),
            ])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert {(c.layer, c.head) for c in checks} == {(x, h) for x in range(LAYERS) for h in range(KV_HEADS)}
    assert all(0.001 < c.relative_error < 0.3 and 0 < c.kl < 0.1 for c in checks), checks
    with ta.enable(model, "int8") as enabled:
        checks = recorded(watch(enabled, ALL))
        steps(model, begun(model, "int8"), 5)
    assert checks
    assert max(c.relative_error for c in checks) < 0.02


def test_a_chunk_and_a_padded_row_are_compared_at_their_own_places(model: LlamaForCausalLM):
    """The second request watches row 1, which has padding: an error at the level of 8 bits, not of wrong tokens."""
    with ta.enable(model, "int8") as enabled, torch.inference_mode():
        watching = watch(enabled, ALL)
        checks = recorded(watching)
        for _ in range(2):
            cache = TurboCache(model.config, "int8")
            mask = torch.ones(2, 250, dtype=torch.int64)
            mask[1, :70] = 0
            for first, last in ((0, 150), (150, 250)):
                model(prompt(250, 2)[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
    assert len(checks) == 2 * LAYERS * KV_HEADS
    assert max(c.relative_error for c in checks) < 0.02
    assert all(c.codes["key"].values == (64 * 64 * 2) - 64 for c in checks[: LAYERS * KV_HEADS])  # all but the sink
    assert checks[-1].codes["key"].values == (64 * 128) - 71 * 64  # nor 70 tokens of padding


def test_a_corrupted_scale_raises_the_alarm_of_its_layer_alone(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
):
    with ta.enable(model, "turbo4") as enabled:
        watching = watch(enabled, ALL, limits=QUICK)
        cache = begun(model, "turbo4")
        steps(model, cache, 2)
        assert not watching.guard.alarms
        group = cache.turbo_layers[2].cache.groups[0]
        name = "value_page_scale"
        with torch.inference_mode():
            group.layout.write(group.pages, name, group.layout.read(group.pages, name) * 16)
        with caplog.at_level(logging.WARNING, LOGGER):
            steps(model, cache, 4)
    assert watching.guard.alarms == [("2", "relative_error")]
    assert [r.message.split(":")[0] for r in caplog.records] == ["layer 2"]


def outliers(model: LlamaForCausalLM, layer: int) -> LlamaForCausalLM:
    """The same model with the K of a layer six times as large: two bits of it move the scores by more than one."""
    changed = LlamaForCausalLM(model.config).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.model.layers[layer].self_attn.k_proj.weight.mul_(6.0)
    return changed


def test_two_bits_in_a_layer_with_outliers_are_found_and_raised_for_new_requests(
    model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
):
    policy = replace(Policy.resolve("turbo4"), overrides=(Override(2, layer=1, search=False),))
    changed = outliers(model, 1)
    with ta.enable(changed, policy) as enabled, caplog.at_level(logging.WARNING, LOGGER):
        watching = watch(enabled, ALL, limits=QUICK, respond=("log", "raise"))
        first = begun(changed, policy)
        steps(changed, first, 6)
        assert {layer for layer, _ in watching.guard.alarms} <= {"1"}
        assert "layer 1: new requests get 4 bits" in caplog.text
        assert watching.generation == 1
        # The request under way keeps its pages, and is no reason for a second step.
        steps(changed, first, 6)
        assert watching.generation == 1
        bits = [enabled.policy.head_formats(layer, KV_HEADS)[0][0].bits for layer in range(LAYERS)]
        assert bits == [4, 4, 4, 4]
        with torch.inference_mode():
            changed.generate(prompt(150), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert watching.guard.alarms == []


@torch.inference_mode()
def test_new_requests_are_refused_until_reset(model: LlamaForCausalLM):
    limits = [Limit("relative_error", 0.0, checks=1, raise_after=1)]
    with ta.enable(model, "turbo4") as enabled:
        watching = watch(enabled, ALL, limits=limits, respond=("refuse",))
        cache = begun(model, "turbo4")
        steps(model, cache, 1)
        steps(model, cache, 1)  # a request under way goes on
        for fresh in (None, TurboCache(model.config, "turbo4")):
            with pytest.raises(RefusedError, match=r"layer \d: relative_error .* above 0: alarm raised"):
                model(prompt(5), past_key_values=fresh, use_cache=True)
        assert watching.refuse is not None
        watching.refuse.reset()
        model(prompt(5), use_cache=True)
        watching.close()
        assert enabled.observer is None


def test_memory_is_bounded_and_given_back(model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture):
    """Two heads of 512 tokens fit, further ones do not; the next request has the memory of the one before."""
    one = 2 * 512 * 64 * 2
    settings = WatchSettings(share=1.0, heads=LAYERS * KV_HEADS, memory_mib=2.5 * one / 2**20)
    with ta.enable(model, "turbo4") as enabled, caplog.at_level(logging.WARNING, LOGGER):
        watching = watch(enabled, settings)
        for request in range(2):
            cache = begun(model, "turbo4")
            steps(model, cache, 3)
            assert watching.watcher.budget.used == 2 * one
            assert watching.watcher.checks == 2 * 3 * (request + 1)
            del cache
            gc.collect()
            assert watching.watcher.budget.used == 0
    assert watching.watcher.skipped == {"memory": 2 * 6}
    assert len(caplog.records) == 1  # said once


def test_rolled_back_tokens_and_rearranged_batches(model: LlamaForCausalLM):
    with ta.enable(model, "int8") as enabled:
        watching = watch(enabled, ALL)
        checks = recorded(watching)
        cache = begun(model, "int8")
        steps(model, cache, 4, seed=1)
        cache.crop(-1)
        steps(model, cache, 4, seed=2)
        assert max(c.relative_error for c in checks) < 0.02
        before = len(checks)
        cache.batch_repeat_interleave(2)
        steps(model, cache, 2)
        assert len(checks) == before
        assert watching.watcher.skipped == {"batch rearranged": LAYERS * KV_HEADS}


def test_a_check_that_fails_never_ends_an_answer(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    def no_memory(*_: object) -> Check:
        raise torch.OutOfMemoryError("tried to allocate")

    with ta.enable(model, "turbo4") as enabled:
        watching = watch(enabled, ALL)
        monkeypatch.setattr(watching.watcher, "_checked", no_memory)
        steps(model, begun(model, "turbo4"), 2)
        assert watching.watcher.skipped == {"error": 2 * LAYERS * KV_HEADS}
        monkeypatch.setattr(Kept, "append", no_memory)
        steps(model, begun(model, "turbo4"), 2)
    assert watching.watcher.skipped == {"error": 3 * LAYERS * KV_HEADS}  # once for each head, which is then left


def test_mistakes(model: LlamaForCausalLM, tmp_path: Path):
    with ta.enable(model, "fp16") as enabled, pytest.raises(UnsupportedError, match="nothing below 16 bits"):
        watch(enabled)
    wrong = tmp_path / "state.json"
    wrong.write_text("{}")
    with ta.enable(model, "turbo4") as enabled:
        for more, words in (
            ({"respond": ("shout",)}, "log, raise, refuse"),
            ({"webhook": "ftp://x/secret"}, "http or https"),
            ({"settings": WatchSettings(reference=str(wrong))}, "calibrate --state"),
        ):
            with pytest.raises(InvalidInputError, match=words):
                watch(enabled, **more)  # type: ignore[arg-type]
        with watch(enabled), pytest.raises(UnsupportedError, match="watched already"):
            watch(enabled)
        watch(enabled)
