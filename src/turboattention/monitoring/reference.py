"""What a calibration saw of K and V, and what it expects: the yardsticks of a watch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.files import RECORDS, read_json
from turboattention.quant.affine import TINY


@dataclass(frozen=True)
class Spread:
    """Of one head's channels over the calibration text: float32 ``[heads, head_dim]``."""

    mean: Tensor
    std: Tensor

    def drift(self, head: int, x: Tensor) -> float:
        """log2 of how far ``[tokens, head_dim]`` is from the mean, in the calibration's standard deviations.

        0: as at calibration; 1: twice as wide, or moved. Root mean square over tokens and channels.
        """
        mean, std = (s[head].to(x.device) for s in (self.mean, self.std))
        distance = ((x.float() - mean) / std.clamp_min(TINY)).square().mean().sqrt()
        return float(distance.clamp_min(TINY).log2())


@dataclass(frozen=True)
class Reference:
    """K and V of every layer: ``{"key": Spread, "value": Spread}``."""

    layers: tuple[dict[str, Spread], ...]

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """The statistics in the state file of a calibration (``turboattention calibrate --state``).

        Raises InvalidInputError for other files, and for states that have no statistics yet.
        """
        data = _json("watch reference", path)
        results = data.get("results") if "turboattention_calibration" in data else None
        results = results if isinstance(results, dict) else {}
        found = [
            entry["statistics"] for name, entry in results.items()
            if name.startswith("sensitivity") and isinstance(entry, dict) and entry.get("statistics")
        ]  # fmt: skip
        if not found:
            raise invalid(
                "watch reference", "the state file of a calibration with its sensitivities", path,
                "write one with turboattention calibrate --state",
            )  # fmt: skip
        try:
            return cls(tuple({side: _spread(layer[side]) for side in ("key", "value")} for layer in found[-1]))
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise invalid("watch reference", "statistics of K and V", f"{path}: {error!r}"[:400]) from error

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raise InvalidInputError unless these are statistics of such a model."""
        shape = tuple(self.layers[0]["key"].mean.shape)
        if (len(self.layers), *shape) != (layers, kv_heads, head_dim):
            raise invalid(
                "watch reference", f"{layers} layers of {kv_heads} KV heads of {head_dim} channels",
                f"{len(self.layers)} of {shape[0]} of {shape[1]}", "calibrate this model",
            )  # fmt: skip


def expected_errors(path: str | Path) -> dict[str, float]:
    """The relative error of the attention output of each layer's worst head, from ``calibrate --json``, by layer."""
    data = _json("calibration result", path)
    heads = data.get("heads")
    if "schema" not in data or not isinstance(heads, list) or not heads:
        raise invalid(
            "calibration result", "errors by head", path, "write it with turboattention calibrate --json"
        )  # fmt: skip
    worst: dict[str, float] = {}
    try:
        for entry in heads:
            layer = str(int(entry["layer"]))
            seen = float(entry["seen"])
            if not 0 <= seen < math.inf:
                raise ValueError(f"seen {seen}")
            worst[layer] = max(worst.get(layer, 0.0), seen)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise invalid("calibration result", "layer and seen of each head", f"{path}: {error}"[:400]) from error
    return worst


def _json(name: str, path: str | Path) -> Mapping[str, Any]:
    data = read_json(name, Path(path), RECORDS)
    if not isinstance(data, dict):
        raise invalid(name, "an object", f"{path}: {type(data).__name__}")
    return data


def _spread(data: Mapping[str, Any]) -> Spread:
    mean, squares = (torch.tensor(data[name], dtype=torch.float64) for name in ("mean", "squares"))
    if mean.dim() != 2 or mean.shape != squares.shape or not mean.numel() or int(data["count"]) < 1:
        raise ValueError(f"mean of shape {tuple(mean.shape)}")
    if not bool(mean.isfinite().all() and squares.isfinite().all() and (squares >= 0).all()):
        raise ValueError("numbers that are not finite, or squares below zero")
    return Spread(mean.float(), (squares / int(data["count"])).sqrt().float())
