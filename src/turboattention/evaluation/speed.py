"""Prefill and decode speed at one KV context, baseline and candidates measured in turn on the same prompt."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.evaluation.caches import attention_of, make_cache
from turboattention.evaluation.stream import feed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from turboattention.policy import Policy

PROMPT_TOKENS = 512
DECODE_STEPS = 16
REPEATS = 2
_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Speed:
    """Wall-clock speed of batch 1 on this machine.

    prefill_tokens_per_s: one pass over the whole prompt into an empty cache, the best of the repeats.
    decode_ms_per_token: median of single-token steps after the prompt, over all repeats.
    context: tokens in the cache when decoding starts.
    """

    prefill_tokens_per_s: float
    decode_ms_per_token: float
    context: int


def measure_speed(
    model: "PreTrainedModel",
    prompt: Tensor,
    policies: "Sequence[str | Policy | None]",
    steps: int = DECODE_STEPS,
    repeats: int = REPEATS,
) -> list[Speed]:
    """Speed with each policy (``None``: ordinary attention) on ``prompt``, int64 ``[1, tokens]``.

    The policies take turns in every repeat, so that a machine that slows down slows all of them.
    """
    prompt = prompt.to(model.device)
    for policy in policies:
        _run(model, prompt[:, :_WARM_UP_TOKENS], policy, 1)
    prefill: list[list[float]] = [[] for _ in policies]
    decode: list[list[float]] = [[] for _ in policies]
    for _ in range(repeats):
        for index, policy in enumerate(policies):
            prompt_s, step_s = _run(model, prompt, policy, steps)
            prefill[index].append(prompt_s)
            decode[index].extend(step_s)
    tokens = prompt.shape[1]
    return [
        Speed(tokens / min(seconds), 1000.0 * median(step_s), tokens)
        for seconds, step_s in zip(prefill, decode, strict=True)
    ]


def _run(
    model: "PreTrainedModel", prompt: Tensor, policy: "str | Policy | None", steps: int
) -> tuple[float, list[float]]:
    """Seconds of the prompt pass and of each greedy step after it."""
    cache = make_cache(model, policy)
    with attention_of(model, policy):
        begin = _now(prompt)
        token = feed(model, prompt, cache)[:, -1:].argmax(-1)
        marks = [_now(prompt)]
        for _ in range(steps):
            token = feed(model, token, cache)[:, -1:].argmax(-1)
            marks.append(_now(prompt))
    return marks[0] - begin, [after - before for before, after in pairwise(marks)]


def _now(tensor: Tensor) -> float:
    # A GPU works behind the program's back; wait for it before reading the clock.
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
