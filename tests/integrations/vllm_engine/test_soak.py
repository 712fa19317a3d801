"""Hundreds of requests, each against itself alone; `benchmarks/vllm_soak.py` runs the same for as long as one likes."""

from pathlib import Path

import pytest
import soak
from engines import NEEDS, random_llama

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason=NEEDS)

REQUESTS, DISTINCT = 500, 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("soak"))


def test_old_content_of_blocks_and_rows_is_never_read(model: Path):
    """Everything that no request holds is overwritten with NaN and codes of ones between two runs."""
    from turboattention.integrations.vllm.layers import compressed_layers

    asked = soak.requests(20)
    expected = soak.alone(model, asked)
    llm = soak.engine_of(model, num_gpu_blocks_override=soak.BLOCKS, max_num_batched_tokens=200)
    for _ in range(2):
        for (prompt, new), answer in zip(asked, expected, strict=True):
            (output,) = llm.generate([{"prompt_token_ids": prompt}], soak.parameters(new), use_tqdm=False)
            assert soak.first_difference(list(output.outputs[0].token_ids), answer)[1] < soak.TIE
            assert llm.reset_prefix_cache()
            for name, layer in compressed_layers(llm.llm_engine.vllm_config).items():
                context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
                context[name].kv_cache.fill_(0xFF)
                for x in (layer.pages.key, layer.pages.value, layer.pages.power):
                    if x is not None:
                        x.fill_(float("nan"))


@pytest.mark.parametrize("drafts", [0, 5])  # in this order: vLLM 0.32 starts no engine after one with drafts
def test_soak(model: Path, drafts: int):
    different = soak.requests(DISTINCT)
    expected = soak.alone(model, different)
    llm = soak.engine_of(model, **soak.pressed(drafts))
    counts = soak.soak(llm, different, expected, REQUESTS)
    assert counts.wrong == {}
    assert counts.aborted > REQUESTS // 50
    assert counts.finished == REQUESTS - counts.aborted
    assert counts.compared >= 0.5 * counts.tokens
    # Every block is free again (one is vLLM's own), and the map of the rows of open pages has not grown.
    assert soak.free_blocks(llm) == soak.BLOCKS - 1
    assert all(len(rows._row_of_block) <= soak.BLOCKS for rows in soak.row_maps(llm))
    metrics = soak.metric_values(llm)
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:prefix_cache_hits"] > 0
    if drafts:
        assert 0 < metrics["vllm:spec_decode_num_accepted_tokens"] < metrics["vllm:spec_decode_num_draft_tokens"]
