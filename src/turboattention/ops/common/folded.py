"""The two products of attention over pages in folded form: codes are multiplied as they are, scales stay outside.

With ``value = code * scale + zero``:

- per channel: ``q . k_t = sum_c (q_c scale_c) code_tc + sum_c q_c zero_c`` and
  ``out_c = scale_c sum_t p_t code_tc + zero_c sum_t p_t``;
- refined channels of K: the same with ``code + unit * refined code``, one small product more;
- per token: ``q . k_t = scale_t sum_c q_c code_tc + zero_t sum_c q_c`` and
  ``out_c = sum_t (p_t scale_t) code_tc + sum_t p_t zero_t``.

Shapes: q and p ``[..., rows, channels or tokens]`` broadcast against codes ``[..., tokens, channels]``.
"""

import torch
from torch import Tensor

from turboattention.quant.codec import Refinement, Side


def fold_scores(q: Tensor, key: Side) -> Tensor:
    """``q k^T`` over pages: ``[..., rows, tokens]``."""
    parts = []
    for codes, scale, zero, columns in _channel_groups(key):
        part = q[..., columns]
        product = codes.transpose(-2, -1).to(q.dtype)
        scale, zero = scale.to(q.dtype), zero.to(q.dtype)
        if scale.shape[-2] == 1:
            folded = part * scale
            parts.append(folded @ product + (part * zero).sum(-1, keepdim=True))
            if key.refinement is not None:
                parts[-1] += _refined_scores(folded, key.refinement)
        else:
            row = scale.transpose(-2, -1), zero.transpose(-2, -1)
            parts.append((part @ product) * row[0] + part.sum(-1, keepdim=True) * row[1])
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _refined_scores(folded: Tensor, refinement: Refinement) -> Tensor:
    """What the lower plane adds: a product over the refined channels alone."""
    index = refinement.channels.unsqueeze(-2).expand(*folded.shape[:-1], -1)
    return (folded.gather(-1, index) * refinement.unit) @ refinement.codes.to(folded.dtype)


def fold_values(p: Tensor, value: Side) -> Tensor:
    """``p v`` over pages: ``[..., rows, channels]`` (still rotated where the format rotates)."""
    parts = []
    for codes, scale, zero, _ in _channel_groups(value):
        scale, zero, product = scale.to(p.dtype), zero.to(p.dtype), codes.to(p.dtype)
        if scale.shape[-2] == 1:
            parts.append((p @ product) * scale + p.sum(-1, keepdim=True) * zero)
        else:
            parts.append((p * scale.transpose(-2, -1)) @ product + p @ zero)
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _channel_groups(side: Side) -> list[tuple[Tensor, Tensor, Tensor, slice]]:
    """Slices over which the scale is either per token or per channel alone."""
    tokens, groups = side.scale.shape[-2:]
    if tokens == 1 or groups == 1:
        return [(side.codes, side.scale, side.zero, slice(None))]
    size = side.codes.shape[-1] // groups
    return [
        (side.codes[..., i * size : (i + 1) * size], side.scale[..., i : i + 1], side.zero[..., i : i + 1],
         slice(i * size, (i + 1) * size))
        for i in range(groups)
    ]  # fmt: skip
