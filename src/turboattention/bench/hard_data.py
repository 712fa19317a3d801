"""Data on which attention in 8 bits loses most: what tests and probes of INT8 prefill put into random tensors."""

import torch
from torch import Tensor

from turboattention.errors import invalid

TILE = 128  # tokens that share scales
KINDS = ("outlier", "channel", "peaked", "flat", "falling", "constant", "zero")


def harden(kind: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Change ``[..., tokens, head_dim]`` in place; raises InvalidInputError for a kind that is not one of KINDS."""
    match kind:
        case "outlier":
            k[..., :4] *= 10
            k[..., 0] += 8
        case "channel":  # one far above the others, on a mean that is larger still
            k[..., 3] = 100 * k[..., 3] + 1000
        case "peaked":
            q *= 6
        case "flat":
            q *= 0.01
        case "falling":  # by 2^7 from tile to tile
            tile = torch.arange(v.shape[-2], device=v.device) // TILE
            v *= torch.exp2(-7.0 * (tile % 2))[:, None].to(v.dtype)
        case "constant":  # all codes of K are 0, and no factor tells a hidden token from others
            k[:] = k[:, :, :1]
        case "zero":
            q[:], v[:, :, 5:] = 0.0, 0.0
        case _:
            raise invalid("kind", f"one of {', '.join(KINDS)}", repr(kind))
