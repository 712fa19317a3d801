"""Running statistics of Q, K and V: one pass, constant memory, batches merged exactly (Chan, Golub and LeVeque)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboattention.errors import invalid

_FIELDS = ("mean", "squares", "low", "high")


@dataclass
class RunningStatistics:
    """Per head and channel of one tensor of one layer; all tensors float64 ``[heads, head_dim]``.

    count: tokens seen. mean. squares: sum of squared distances from the mean. low, high: smallest and largest value.
    """

    count: int
    mean: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def empty(cls, heads: int, head_dim: int) -> "RunningStatistics":
        """Nothing seen yet."""
        zeros = torch.zeros(heads, head_dim, dtype=torch.float64)
        return cls(0, zeros, zeros.clone(), torch.full_like(zeros, torch.inf), torch.full_like(zeros, -torch.inf))

    def update(self, x: Tensor) -> None:
        """See ``[batch, heads, tokens, head_dim]`` (any float dtype)."""
        if x.dim() != 4 or (x.shape[1], x.shape[3]) != tuple(self.mean.shape):
            heads, dim = self.mean.shape
            raise invalid("x", f"[batch, {heads}, tokens, {dim}]", tuple(x.shape))
        count = x.shape[0] * x.shape[2]
        if not count:
            return
        values = x.detach().double().cpu().transpose(1, 2).flatten(0, 1)  # [tokens, heads, head_dim]
        mean = values.mean(0)
        shift, total = mean - self.mean, self.count + count
        self.squares += (values - mean).square().sum(0) + shift.square() * (self.count * count / total)
        self.mean += shift * (count / total)
        self.low, self.high = torch.minimum(self.low, values.amin(0)), torch.maximum(self.high, values.amax(0))
        self.count = total

    @property
    def std(self) -> Tensor:
        """Standard deviation over tokens."""
        return (self.squares / max(1, self.count)).sqrt()

    @property
    def priority(self) -> Tensor:
        """The paper's priority of each head: gap x deviation of the channel ranges (arXiv 2412.08585), ``[heads]``."""
        gap = self.high.amax(-1) - self.low.amin(-1)
        return gap * (self.high - self.low).std(-1, correction=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"count": self.count, **{name: getattr(self, name).tolist() for name in _FIELDS}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunningStatistics":
        """What `to_dict` gave."""
        tensors = (torch.tensor(data[name], dtype=torch.float64) for name in _FIELDS)
        return cls(int(data["count"]), *tensors)


@dataclass
class LayerStatistics:
    """Q, K (both after RoPE) and V of one layer."""

    query: RunningStatistics
    key: RunningStatistics
    value: RunningStatistics

    @classmethod
    def empty(cls, heads: int, kv_heads: int, head_dim: int) -> "LayerStatistics":
        """Nothing seen yet."""
        return cls(*(RunningStatistics.empty(n, head_dim) for n in (heads, kv_heads, kv_heads)))

    def update(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See the same tokens of all three."""
        for statistics, x in ((self.query, query), (self.key, key), (self.value, value)):
            statistics.update(x)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name).to_dict() for name in ("query", "key", "value")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerStatistics":
        """What `to_dict` gave."""
        return cls(*(RunningStatistics.from_dict(data[name]) for name in ("query", "key", "value")))
