"""What two models say about the same positions: negative log likelihood, KL divergence, equality of the best token.

Logits are ``[rows, positions, vocabulary]`` of any dtype; the vocabulary is large, so they go to float32 in slices.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SLICE = 64  # positions computed at once: 39 MB a tensor at a vocabulary of 152k


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, float32 ``[rows, positions]``; ``targets`` is int64 of the same shape."""
    flat = targets.reshape(-1)
    parts = [
        torch.nn.functional.cross_entropy(part.float(), flat[rows], reduction="none") for rows, part in _slices(logits)
    ]
    return torch.cat(parts).view(targets.shape)


def kl_divergence(baseline: Tensor, candidate: Tensor) -> Tensor:
    """KL(baseline || candidate) in nats, float32 ``[rows, positions]``."""
    parts = []
    for (_, expected), (_, received) in zip(_slices(baseline), _slices(candidate), strict=True):
        log_p, log_q = expected.float().log_softmax(-1), received.float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        # Rounding gives values like -1e-8 for equal distributions; the divergence itself is never negative.
        parts.append(kl.clamp_min(0.0))
    return torch.cat(parts).view(baseline.shape[:-1])


def same_top_token(baseline: Tensor, candidate: Tensor) -> Tensor:
    """Whether the most likely token is the same, bool ``[rows, positions]``."""
    return baseline.argmax(-1) == candidate.argmax(-1)


def _slices(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    flat = logits.flatten(0, -2)
    for start in range(0, flat.shape[0], SLICE):
        rows = slice(start, start + SLICE)
        yield rows, flat[rows]
