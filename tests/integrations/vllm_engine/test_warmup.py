"""Steps on invented tokens before the first request: they reach every kernel and leave nothing behind."""

import random
from pathlib import Path

import pytest
from engines import NEEDS, answers, random_llama, started, tokens

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason=NEEDS)


@pytest.mark.parametrize("width", [1, 3])
def test_answers_are_those_without(width: int, tmp_path: Path):
    from turboattention.integrations.vllm.layers import compressed_layers
    from turboattention.integrations.vllm.warmup import warm_up

    drafts = {"speculative_config": {"method": "ngram", "num_speculative_tokens": width - 1, "prompt_lookup_max": 3}}
    engine = started(
        random_llama(tmp_path), skip_tokenizer_init=True, enable_prefix_caching=False, **(drafts if width > 1 else {})
    )
    choose = random.Random(0)
    prompts = [[choose.randrange(300) for _ in range(n)] for n in (150, 64, 3)]
    expected = tokens(answers(engine, prompts, 70))
    layers = compressed_layers(engine.llm_engine.vllm_config)
    spare = next(iter(layers.values())).pages.key.shape[0] - 1
    assert warm_up(layers.values(), sequences=64, blocks=8, spare_row=spare, width=width) == 1
    assert all(not layer.pages.power[spare].any() for layer in layers.values())
    assert tokens(answers(engine, prompts, 70)) == expected
