"""Feed the same tokens to ordinary attention and to every candidate, in lockstep, and keep numbers per position.

Chunks are as long as a page, so that a position attends to what a decode step would: compressed pages and the exact
open page. All windows are rows of one batch. Logits live for one chunk only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.evaluation.caches import attention_of, finish, held_bytes, held_values, make_cache
from turboattention.evaluation.divergence import kl_divergence, negative_log_likelihood, same_top_token
from turboattention.evaluation.forms import compile_forms

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from turboattention.policy import Policy

CHUNK = 64
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done


@dataclass(frozen=True)
class BaselineStream:
    """Ordinary attention over all windows.

    nll: -log p of the next token in nats, float32 ``[rows, tokens]``.
    kv_bytes: 2 bytes for each value that its cache holds at the end.
    """

    nll: Tensor
    kv_bytes: int


@dataclass(frozen=True)
class CandidateStream:
    """One policy over the same windows; tensors are ``[rows, tokens]``.

    kl: KL(baseline || candidate) in nats.
    same_top: whether the most likely next token is the baseline's.
    kv_bytes, num_values: what its cache holds at the end, all full pages compressed.
    """

    nll: Tensor
    kl: Tensor
    same_top: Tensor
    kv_bytes: int
    num_values: int


def stream(
    model: "PreTrainedModel",
    windows: Tensor,
    policies: "Sequence[str | Policy]",
    progress: Progress | None = None,
    chunk: int = CHUNK,
) -> tuple[BaselineStream, list[CandidateStream]]:
    """Teacher-forced pass: every token but the last of a window is fed, and each predicts the next.

    windows: int64 ``[rows, tokens + 1]``.
    progress: called after every chunk of every cache, on a GPU also while kernels are compiled.
    """
    windows = windows.to(model.device)
    tokens = windows.shape[1] - 1
    caches = [make_cache(model, policy) for policy in (None, *policies)]
    nll: list[list[Tensor]] = [[] for _ in caches]
    kl: list[list[Tensor]] = [[] for _ in caches]
    same: list[list[Tensor]] = [[] for _ in caches]
    starts = range(0, tokens, chunk)
    done, total = 0, len(starts) * len(caches)
    if model.device.type == "cuda":
        if progress is not None:
            progress(done, total, "kernels")
        compile_forms(model, policies, len(windows), chunk)
    for start in starts:
        stop = min(start + chunk, tokens)
        targets = windows[:, start + 1 : stop + 1]
        reference = torch.empty(0)
        for index, (policy, cache) in enumerate(zip((None, *policies), caches, strict=True)):
            with attention_of(model, policy):
                logits = feed(model, windows[:, start:stop], cache)
            nll[index].append(negative_log_likelihood(logits, targets).cpu())
            if policy is None:
                reference = logits
            else:
                kl[index].append(kl_divergence(reference, logits).cpu())
                same[index].append(same_top_token(reference, logits).cpu())
            done += 1
            if progress is not None:
                progress(done, total, "16-bit" if policy is None else policy_name(policy))
    for cache in caches:
        finish(cache)
    baseline = BaselineStream(torch.cat(nll[0], 1), held_bytes(caches[0]))
    candidates = [
        CandidateStream(
            torch.cat(nll[index], 1),
            torch.cat(kl[index], 1),
            torch.cat(same[index], 1),
            held_bytes(caches[index]),
            held_values(caches[index]),
        )
        for index in range(1, len(caches))
    ]
    return baseline, candidates


@torch.inference_mode()
def feed(model: "PreTrainedModel", tokens: Tensor, cache: "Cache") -> Tensor:
    """Logits ``[rows, positions, vocabulary]`` of ``tokens`` after what ``cache`` holds; the cache grows by them."""
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
    return logits


def policy_name(policy: "str | Policy") -> str:
    """Name of a preset or policy."""
    return policy if isinstance(policy, str) else policy.name
