"""Drafts by n-gram in vLLM on the CPU: the same greedy tokens as transformers' without drafts."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import NEEDS, Answer, answers, check, expected_of, random_llama, started, tokens

from turboattention.errors import UnsupportedError

pytestmark = pytest.mark.slow
vllm = pytest.importorskip("vllm", reason=NEEDS)

NEW = 150
BLOCKS = 9
# What is exact and what is codes differs with drafts and with hits; at 8 bits that moves no logit of this model by TIE.
POLICY = "int8"
NGRAM = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("drafts"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Some repeat themselves, so that drafts are both taken and rejected."""
    chosen = random.Random(0)
    return [[chosen.randrange(3, 300) for _ in range(n)] * times for n, times in ((63, 1), (45, 4), (31, 3), (1, 1))]


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[Answer]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return expected_of(loaded, prompts, NEW, POLICY)


def counted(engine: "vllm.LLM", name: str) -> int:
    return sum(metric.value for metric in engine.get_metrics() if metric.name == f"vllm:spec_decode_num_{name}")


def test_greedy_tokens_are_those_without_drafts(model: Path, prompts: list[list[int]], expected: list[Answer]):
    """With odd chunks, hits and preemption in one engine: vLLM 0.32 starts no second one with drafts in a process."""
    engine = started(
        model, POLICY, speculative_config=NGRAM, disable_log_stats=False, skip_tokenizer_init=True,
        max_num_batched_tokens=90, num_gpu_blocks_override=BLOCKS,
    )  # fmt: skip
    for _ in range(2):
        check(tokens(answers(engine, prompts, NEW)), expected, share=0.3)
    drafted, accepted, preempted = (
        sum(metric.value for metric in engine.get_metrics() if metric.name == f"vllm:{name}")
        for name in ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "num_preemptions")
    )
    assert 0 < accepted < drafted
    assert preempted > 0


@pytest.mark.parametrize(
    ("method", "drafts", "reason"), [("ngram", 65, "at most 64"), ("eagle", 2, "only 'ngram'"), ("ngram", 64, None)]
)
def test_what_is_refused(method: str, drafts: int, reason: str | None):
    from turboattention.integrations.vllm.impl import refuse, speculation

    config = SimpleNamespace(speculative_config=SimpleNamespace(method=method, num_speculative_tokens=drafts))
    if reason is None:
        refuse(*speculation(config))
        return
    with pytest.raises(UnsupportedError, match=reason):
        refuse(*speculation(config))
