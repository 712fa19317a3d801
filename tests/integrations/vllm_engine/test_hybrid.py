"""A model with attention and short convolutions in vLLM on the CPU: our pages beside the state of the others."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import NEEDS, TIE, options, started

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason=NEEDS)

NEW = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LFM2."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"conv_dim": 128, "conv_L_cache": 3, "block_dim": 128, "block_ff_dim": 256, "block_multiple_of": 64}
    config = Lfm2Config(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"] * 2, initializer_range=0.2,
        max_position_embeddings=1024, block_auto_adjust_ff_dim=False, block_ffn_dim_multiplier=1.0, **sizes,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hybrid")
    Lfm2ForCausalLM(config).float().save_pretrained(folder)
    return folder


def greedy(engine: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Tokens, and by how much each was ahead."""
    parameters = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=2, detokenize=False)
    found = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return [
        (
            list(x.outputs[0].token_ids),
            [abs(float.__sub__(*(y.logprob for y in list(step.values())[:2]))) for step in x.outputs[0].logprobs],
        )
        for x in found
    ]


def test_tokens_are_those_of_a_stock_engine(model: Path):
    """In the same chunks, on which the convolutions of vLLM 0.32 on CPUs depend.

    The stock engine comes first: our backend then takes its slot for good.
    """
    chosen = random.Random(0)
    prompts = [[chosen.randrange(3, 300) for _ in range(n)] for n in (150, 64, 5)]
    stock = options(model=str(model), skip_tokenizer_init=True, max_num_batched_tokens=128)
    del stock["kv_cache_dtype"], stock["additional_config"]
    expected = greedy(vllm.LLM(**stock), prompts)
    engine = started(model, "int8", skip_tokenizer_init=True, max_num_batched_tokens=128)
    same = 0
    for (got, _), (tokens, ahead) in zip(greedy(engine, prompts), expected, strict=True):
        different = next((i for i, (a, b) in enumerate(zip(got, tokens, strict=True)) if a != b), None)
        assert different is None or ahead[different] < TIE, (different, ahead[different])
        same += NEW if different is None else different
    assert same >= NEW * len(prompts) / 3
