"""Layers that stay with vLLM's own backend: a skip list, sliding windows; and what the start says of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import NEEDS, answers, check, expected_of, load_model, model_folder, random_llama, started, tokens

from turboattention.config import get_preset
from turboattention.errors import UnsupportedError
from turboattention.evaluation.texts import encode, load_text
from turboattention.policy import Override, Policy

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason=NEEDS)

NEW = 16
SKIPPED = (0, 29)


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the plugin says: vLLM's loggers do not pass on what they get, so pytest does not see it."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.turboattention")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    ids = encode(load_model().tokenizer, load_text("python-code"))
    return [ids[1000 * i : 1000 * i + n] for i, n in enumerate((200, 70, 5))]


def test_skipped_layers_are_as_exact_layers_of_the_policy(prompts: list[list[int]], tmp_path: Path):
    overrides = tuple(Override(16, layer=layer) for layer in SKIPPED)
    policy = Policy("edges", get_preset("turbo4").cache, overrides=overrides)
    policy.save(tmp_path / "policy.json")
    expected = expected_of(load_model().model, prompts, NEW, policy)
    engine = started(
        policy=str(tmp_path / "policy.json"), kv_cache_dtype_skip_layers=[str(x) for x in SKIPPED],
        max_num_batched_tokens=150,
    )  # fmt: skip
    with logged() as messages:  # the cache is there with the first step
        found = answers(engine, prompts, NEW)
    check(tokens(found), expected)
    text = "\n".join(messages)
    for part in (
        "policy edges: 28 of 30 attention layers compressed", "16-bit pages (kv-cache-dtype-skip-layers): 0, 29",
        "KV tokens fit into 1.00 GiB", "open pages: ",
    ):  # fmt: skip
        assert part in text


def test_a_policy_with_exact_layers_needs_the_skip_list(tmp_path: Path):
    Policy("edges", get_preset("turbo4").cache, overrides=(Override(16, layer=0),)).save(tmp_path / "policy.json")
    with pytest.raises(ValueError, match="kv-cache-dtype-skip-layers"):
        started(policy=str(tmp_path / "policy.json"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 3: two layers with a window, then one without, twice."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=96, layer_types=kinds, initializer_range=0.1,
        max_position_embeddings=1024, query_pre_attn_scalar=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("windowed")
    Gemma3ForCausalLM(config).float().save_pretrained(folder)
    return folder


def test_sliding_windows_stay_with_vllm(windowed: Path):
    """In blocks of four pages, as vLLM chooses them on a GPU: larger than a block of the windows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(windowed, dtype=torch.float32).eval()
    chosen = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 500, (n,), generator=chosen).tolist() for n in (300, 130, 9)]
    # At 8 bits hardly anything is rounded, so transformers' own cache is the measure.
    expected = expected_of(model, prompts, NEW, None)
    engine = started(
        windowed, "int8", kv_cache_dtype_skip_layers=["sliding_window"], skip_tokenizer_init=True,
        max_num_batched_tokens=128, block_size=256,
    )  # fmt: skip
    check(tokens(answers(engine, prompts, NEW)), expected)
    check(tokens(answers(engine, prompts, NEW)), expected)
    assert compressed(engine) == 2


def compressed(engine: Any) -> int:
    from turboattention.integrations.vllm.layers import compressed_layers

    return len(compressed_layers(engine.llm_engine.vllm_config))


def test_sliding_windows_are_refused_without_the_skip_list(windowed: Path):
    with pytest.raises(UnsupportedError, match="skip-layers sliding_window"):
        started(windowed, "int8", skip_tokenizer_init=True)


def test_padded_pages_are_refused(windowed: Path):
    engine = started(windowed, "int8", kv_cache_dtype_skip_layers=["sliding_window"], skip_tokenizer_init=True)
    with pytest.raises(UnsupportedError, match="--block-size"):
        answers(engine, [[3, 4]], 1)


def test_layer_names_and_skip_list_agree():
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(model_folder()).num_hidden_layers == SKIPPED[1] + 1


def test_a_fault_is_logged_and_counted(tmp_path: Path):
    """K beyond what the open pages hold, as of a model whose numbers overflow."""
    from prometheus_client import REGISTRY
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_llama(tmp_path), dtype=torch.float32)
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(1e6)
    model.save_pretrained(tmp_path)

    def counted() -> float:
        labels = {"rank": "0", "kind": "not_finite"}
        return REGISTRY.get_sample_value("turboattention_faults_total", labels) or 0.0

    engine, before = started(tmp_path, skip_tokenizer_init=True), counted()
    with logged() as messages:
        answers(engine, [[3, 4, 5], [6]], 3)
    assert counted() >= before + 2
    assert any("NaN or infinite K or V in 2 sequences" in message for message in messages)
    assert REGISTRY.get_sample_value("turboattention_layers", {"rank": "0", "pages": "compressed"}) == 2
