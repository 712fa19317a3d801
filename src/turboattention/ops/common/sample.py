"""Which tokens of a sequence stand for all of them."""

import torch
from torch import Tensor


def spread(count: int, length: int, device: torch.device | None = None) -> Tensor:
    """Int64 ``[count]`` tokens, one in each of ``count`` equal parts of a sequence of ``length``; the first is token 0.

    At a golden-ratio place within its part, because equal distances would see a channel that RoPE turns always alike.
    Parts of less than a token repeat some.
    """
    i = torch.arange(count if length else 0, device=device)
    first = i * length // max(count, 1)
    size = (i + 1) * length // max(count, 1) - first
    return first + ((i * 40503 & 0xFFFF) * size >> 16)
