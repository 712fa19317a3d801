"""Requests with small memory, hits, preemption, drafts and aborts, each answer against that of the request alone."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from engines import Answer, started

BLOCKS, SEQUENCES = 12, 6
# Logits of this model move so far at 8 bits, as what is exact and what is codes differs with hits and preemption.
TIE = 0.2
PREFIXES = (0, 64, 100, 128)
Request = tuple[list[int], int]  # prompt, tokens to make of it


def engine_of(model: Path, **more: Any) -> Any:
    return started(model, "int8", skip_tokenizer_init=True, max_num_seqs=SEQUENCES, max_model_len=400, **more)


def pressed(drafts: int) -> dict[str, Any]:
    """Options of an engine with little memory, hits, statistics, and drafts by n-gram."""
    more: dict[str, Any] = {
        "num_gpu_blocks_override": BLOCKS, "max_num_batched_tokens": 200, "disable_log_stats": False,
        "enable_prefix_caching": True,
    }  # fmt: skip
    if drafts:
        more["speculative_config"] = {
            "method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 2, "prompt_lookup_min": 1
        }  # fmt: skip
    return more


def parameters(new: int) -> Any:
    import vllm

    return vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=2, detokenize=False)


def requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts with one of a few beginnings, and how many tokens to make of each."""
    chosen = random.Random(seed)
    shared = [chosen.randrange(3, 300) for _ in range(max(PREFIXES))]
    made = []
    for _ in range(count):
        own = chosen.choice((1, 3, 17, 63, 64, 65, 150))
        prompt = shared[: chosen.choice(PREFIXES)] + [chosen.randrange(3, 300) for _ in range(own)]
        made.append((prompt, chosen.choice((1, 2, 30, 70, 100))))
    return made


def alone(model: Path, asked: list[Request]) -> list[Answer]:
    """Answers of requests with nothing beside them."""
    llm = engine_of(model, enable_prefix_caching=False)
    found = []
    for prompt, new in asked:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters(new), use_tqdm=False)
        found.append(answer_of(output))
    return found


def answer_of(output: Any) -> Answer:
    """Greedy tokens, and by how much each was ahead of the second."""
    best = [sorted((x.logprob for x in step.values()), reverse=True) for step in output.outputs[0].logprobs]
    return list(output.outputs[0].token_ids), [x[0] - x[1] for x in best]


def first_difference(got: list[int], expected: Answer) -> tuple[int, float]:
    """Tokens that agree, and by how much the request alone was sure of the next one; 0.0 where all agree.

    Infinite where one answer ends before the other.
    """
    tokens, ahead = expected
    different = next((i for i, (a, b) in enumerate(zip(got, tokens, strict=False)) if a != b), None)
    if different is None:
        return len(got), 0.0 if len(got) == len(tokens) else inf
    return different, ahead[different]


@dataclass
class Counts:
    """What happened.

    compared, tokens: of the answers, those that agree until the first difference, and all. margins: of the answers that
    differ, how sure the request alone was there; those beyond TIE are wrong, by number of the request. parted: of those
    that differ, prompt and answer up to and with the first token that does. moved: the most that the lead of a token
    has moved where both chose it, of each answer.
    """

    asked: int = 0
    aborted: int = 0
    finished: int = 0
    compared: int = 0
    tokens: int = 0
    steps: int = 0
    margins: dict[int, float] = field(default_factory=dict)
    parted: dict[int, list[int]] = field(default_factory=dict)
    moved: list[float] = field(default_factory=list)

    @property
    def wrong(self) -> dict[int, float]:
        return {number: margin for number, margin in self.margins.items() if margin >= TIE}


def soak(
    llm: Any, different: list[Request], expected: list[Answer], count: int, seed: int = 1,
    each: Callable[[Counts], None] | None = None,
) -> Counts:  # fmt: skip
    """Ask ``count`` requests chosen of ``different``, abort some; ``each`` is called after every step."""
    chosen, engine, counts = random.Random(seed), llm.llm_engine, Counts()
    running: dict[str, int] = {}
    while counts.asked < count or engine.has_unfinished_requests():
        for _ in range(chosen.randrange(3)):
            if counts.asked < count and len(running) < 3 * SEQUENCES:
                number, which = str(counts.asked), chosen.randrange(len(different))
                prompt, new = different[which]
                engine.add_request(number, {"prompt_token_ids": prompt}, parameters(new))
                running[number] = which
                counts.asked += 1
        if running and chosen.random() < 0.04:
            gone = chosen.choice(sorted(running))
            engine.abort_request([gone])
            del running[gone]
            counts.aborted += 1
        for output in engine.step():
            if output.finished and output.request_id in running:
                which = running.pop(output.request_id)
                got, lone = answer_of(output), expected[which]
                same, margin = first_difference(got[0], lone)
                counts.finished += 1
                counts.tokens += len(got[0])
                counts.compared += same
                moved = (abs(a - b) for a, b in zip(got[1][:same], lone[1][:same], strict=True))
                counts.moved.append(max(moved, default=0.0))
                if margin:
                    counts.margins[int(output.request_id)] = margin
                    counts.parted[int(output.request_id)] = different[which][0] + got[0][: same + 1]
        counts.steps += 1
        if each is not None:
            each(counts)
    return counts


def read_again(llm: Any, sequence: list[int]) -> set[int]:
    """What comes after a sequence when all of it is read again with nothing beside it, as after preemption.

    Once for each number of blocks that may come from the prefix cache. More of it is codes then than while it was made.
    """
    found = set()
    for hit in range(0, len(sequence), 64):
        assert llm.reset_prefix_cache()
        for tokens in filter(None, (sequence[:hit], sequence)):
            (output,) = llm.generate([{"prompt_token_ids": tokens}], parameters(1), use_tqdm=False)
        found.add(answer_of(output)[0][0])
    return found


def free_blocks(llm: Any) -> int:
    """Blocks that no request holds; vLLM keeps one for itself."""
    return int(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def metric_values(llm: Any) -> dict[str, float]:
    """vLLM's counters by name."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def row_maps(llm: Any) -> list[Any]:
    """The maps from blocks to rows of the open pages, of each group of layers."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return [group.get_metadata_builder()._map for groups in runner.attn_groups for group in groups]
