"""Errors against attention in float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from turboattention.bench.data import Sequence16

Tokens = Callable[[int, int], tuple[Tensor, Tensor]]  # (sequence, KV head) -> float64 or 16-bit K, V [length, head_dim]


def attention64(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of ``q`` ``[rows, head_dim]`` over ``[tokens, head_dim]`` in float64."""
    scores = (q.double() @ key.double().T) * q.shape[-1] ** -0.5
    return torch.softmax(scores, -1) @ value.double()


def relative_rms64(out: Tensor, expected: Tensor) -> float:
    """Relative RMS in float64; NaN stays NaN."""
    return float((out.double() - expected).norm() / expected.norm())


def largest(errors: list[float]) -> float:
    """The largest error; NaN when there is one, which max() may overlook."""
    return max(errors) if all(math.isfinite(error) for error in errors) else math.nan


def checked_heads(kv_heads: int) -> tuple[int, ...]:
    """The first and the last KV head."""
    return tuple(sorted({0, kv_heads - 1}))


def checked_sequences(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The longest sequence, and the shortest where they differ."""
    ends = {max(range(len(lengths)), key=lengths.__getitem__), min(range(len(lengths)), key=lengths.__getitem__)}
    return tuple(sorted(ends))


def decode_error(
    attend: Callable[[Tensor], Tensor], base: Sequence16, lengths: tuple[int, ...], tokens: Tokens
) -> float:
    """The largest error of ``attend(q)`` ``[batch, heads, 1, head_dim]`` over peaked and flat queries.

    Two KV heads of the longest and the shortest sequence are compared, all others must be finite.
    """
    errors = []
    kv_heads = base.key.shape[0]
    for q in (base.peaked, base.flat):
        out = attend(q)
        if not bool(out.isfinite().all()):
            return float("nan")
        grouped_q, grouped = (x.squeeze(2).unflatten(1, (kv_heads, -1)) for x in (q, out))
        for sequence in checked_sequences(lengths):
            got, expected = [], []
            for head in checked_heads(kv_heads):
                key, value = tokens(sequence, head)
                expected.append(attention64(grouped_q[sequence, head], key, value))
                got.append(grouped[sequence, head])
            errors.append(relative_rms64(torch.stack(got), torch.stack(expected)))
    return largest(errors)
