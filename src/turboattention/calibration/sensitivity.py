"""What each unit (K or V of a head of a layer) costs at each level: KL at the model's output, nats per token.

Estimated for all units from one backward pass of a window. With G the gradient of ``log p(y)`` at K or V as later pages
read it (y drawn from the model) and E what the codes change there,

    KL(exact || changed) ~ 1/2 sum over channels (sum over tokens G E)^2

the quadratic form of the Fisher information. Errors of different tokens of a channel have a common part (a range that
is cut, a page's zero), which adds up where attention is spread; products of different channels are left out, because
their errors hardly know of each other, which makes the estimate of a few windows steady. Measured, for some units, with
the real cache: everything in 16 bits but that unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from turboattention.calibration.capture import Captured
from turboattention.calibration.levels import BASE, TENSORS, Tensor2, Unit, alone
from turboattention.calibration.stored import PAGE, rounding_errors, whole_pages
from turboattention.errors import invalid
from turboattention.evaluation.stream import stream
from turboattention.policy import ModelShape
from turboattention.quant.rotation import rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256  # queries at once: 9 heads of 1,024 tokens take 9 MB a matrix

Table = dict[Unit, dict[str, float]]


def gradients_of_stored(captured: Captured) -> dict[Tensor2, Tensor]:
    """Gradients at K and V through the reads of later pages alone: float32 ``[kv_heads, tokens, head_dim]``.

    A token reads its own page exactly, so that page's error reaches only queries of later pages; sinks are exact.
    """
    assert captured.gradient is not None, "a backward pass has not run"
    kv_heads, tokens, dim = captured.key.shape[1:]
    query, gradient = (x[0].float().reshape(kv_heads, -1, tokens, dim) for x in (captured.query, captured.gradient))
    key, value = captured.key[0].float(), captured.value[0].float()
    at_key, at_value = torch.zeros_like(key), torch.zeros_like(value)
    for first in range(0, tokens, ROWS):
        last = min(first + ROWS, tokens)
        q, g = (x[:, :, first:last].flatten(1, 2) for x in (query, gradient))  # [kv_heads, group * rows, head_dim]
        rows = torch.arange(first, last, device=key.device).repeat(query.shape[1])[:, None]
        columns = torch.arange(last, device=key.device)
        k, v = key[:, :last], value[:, :last]
        scores = (q @ k.transpose(1, 2)).mul_(captured.scale).masked_fill_(columns > rows, -torch.inf)
        weights = scores.softmax(-1)
        along = g @ v.transpose(1, 2)
        along -= (weights * along).sum(-1, keepdim=True)
        weights.masked_fill_((columns // PAGE >= rows // PAGE) | (columns < BASE.sink_tokens), 0.0)
        at_value[:, :last] += weights.transpose(1, 2) @ g
        at_key[:, :last] += (weights * along).transpose(1, 2) @ q * captured.scale
    return {"key": at_key, "value": at_value}


def window_estimates(layers: dict[int, Captured]) -> Table:
    """Sum over the tokens of one window of the estimated KL, for every unit and level."""
    found: Table = {}
    for layer, captured in sorted(layers.items()):
        whole = whole_pages(captured)
        gradients = gradients_of_stored(whole)
        for tensor, level, error in rounding_errors(whole):
            gradient = gradients[tensor]
            if tensor == "value":  # rounded in the rotated basis
                gradient, error = rotate(gradient), rotate(error)
            sums = 0.5 * (gradient * error).double().sum(1).square().sum(1)
            for head, value in enumerate(sums.tolist()):
                found.setdefault(Unit(layer, head, tensor), {})[level] = value
    return found


def add(total: Table, more: Table) -> None:
    """Add ``more`` to ``total`` in place."""
    for unit, levels in more.items():
        kept = total.setdefault(unit, dict.fromkeys(levels, 0.0))
        for level, value in levels.items():
            kept[level] += value


@dataclass(frozen=True)
class Probe:
    """A unit at a level, estimated and measured: KL in nats per token."""

    unit: Unit
    level: str
    estimated: float
    measured: float


def chosen_probes(table: Table, count: int, seed: int) -> list[tuple[Unit, str]]:
    """``count`` units and levels to measure, spread evenly over the order of their estimates."""
    everything = sorted(((unit, level) for unit in table for level in table[unit]), key=lambda x: table[x[0]][x[1]])
    if not 0 < count <= len(everything):
        raise invalid("probes", f"1 to {len(everything)}", count)
    edges = np.linspace(0, len(everything), count + 1).astype(int)
    generator = np.random.default_rng(seed)
    return [everything[generator.integers(low, high)] for low, high in pairwise(edges)]


def measured(
    model: "PreTrainedModel",
    windows: Tensor,
    probes: Sequence[tuple[Unit, str]],
    shape: ModelShape,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[float]:
    """KL in nats per token of each probe through the real cache; windows: int64 ``[rows, tokens + 1]``."""
    policies = [alone(unit, level, shape) for unit, level in probes]
    _, candidates = stream(model, windows, policies, progress)
    return [float(candidate.kl.double().mean()) for candidate in candidates]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    if len(a) != len(b) or len(a) < 2:
        raise invalid("ranks", "two lists of one length, at least 2", f"{len(a)} and {len(b)}")
    x, y = (_ranks(np.asarray(values, dtype=float)) for values in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    ranks: np.ndarray = (ends - (counts - 1) / 2)[inverse]
    return ranks


def table_per_token(sums: Table, tokens: int) -> Table:
    """Sums over ``tokens`` tokens as nats per token."""
    return {unit: {level: value / tokens for level, value in levels.items()} for unit, levels in sums.items()}


def table_to_json(table: Table) -> dict[str, dict[str, float]]:
    """Units as text."""
    return {str(unit): levels for unit, levels in table.items()}


def table_from_json(data: dict[str, dict[str, float]]) -> Table:
    """What `table_to_json` gave."""
    found: Table = {}
    for name, levels in data.items():
        layer, head, tensor = name.split(".")
        if tensor not in TENSORS:
            raise invalid("state", "key or value", tensor)
        found[Unit(int(layer), int(head), tensor)] = {level: float(x) for level, x in levels.items()}
    return found
