"""vLLM on the CPU on a real model, against our transformers path; `engines` says how to run it."""

import pytest
from engines import NEEDS, Answer, answers, check, expected_of, load_model, model_folder, started, tokens

from turboattention.evaluation.texts import encode, load_text

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason=NEEDS)

LENGTHS = (300, 128, 5)
NEW = 24
BLOCKS = 9  # one of them is vLLM's own
ENGINES = {
    "plain": {},
    "odd chunks": {"max_num_batched_tokens": 77, "enable_prefix_caching": False},
    "preemption": {"num_gpu_blocks_override": BLOCKS, "enable_prefix_caching": False},
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    ids = encode(load_model().tokenizer, load_text("python-code"))
    return [ids[1000 * i : 1000 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[Answer]:
    return expected_of(load_model().model, prompts, NEW)


@pytest.mark.parametrize("name", ENGINES)
def test_greedy_tokens_are_those_of_transformers(name: str, prompts: list[list[int]], expected: list[Answer]):
    if name == "preemption":  # not all sequences fit at once
        assert sum(-(-(n + NEW) // 64) for n in LENGTHS) > BLOCKS - 1
    check(tokens(answers(started(**ENGINES[name]), prompts, NEW)), expected)


def test_qwen():
    """Qwen2.5-Coder-0.5B: biases of Q, K and V, and large channels of K."""
    name = "qwen2.5-coder-0.5b"
    loaded = load_model(name)
    ids = encode(loaded.tokenizer, load_text("python-code"))
    prompts = [ids[:150], ids[1000:1005]]
    wanted = expected_of(loaded.model, prompts, NEW)
    del loaded
    check(tokens(answers(started(model_folder(name)), prompts, NEW)), wanted)


def test_prefix_hits(prompts: list[list[int]], expected: list[Answer]):
    engine = started()
    answers(engine, prompts, NEW)
    # The prefix is read as codes now, where the first time it was part of an exact chunk: ties may fall otherwise.
    again = answers(engine, prompts, NEW)
    assert [x.num_cached_tokens for x in again] == [(n - 1) // 64 * 64 for n in LENGTHS]
    check(tokens(again), expected)
