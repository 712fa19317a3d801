"""Policies measured on windows through the real cache, and how one thing relates to depth."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turboattention.calibration.result import Kind, Point
from turboattention.evaluation.caches import attention_of, make_cache
from turboattention.evaluation.compare import kl_by_position
from turboattention.evaluation.statistics import mean_interval
from turboattention.evaluation.stream import CHUNK, stream
from turboattention.policy import Policy
from turboattention.typed import build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]


def measure(
    model: "PreTrainedModel",
    windows: Tensor,
    names: Sequence[str],
    policies: Sequence[tuple[Kind, Policy]],
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Point]:
    """A point for each policy; ``names`` are those of the windows' texts."""
    baseline, candidates = stream(model, windows, [policy for _, policy in policies], progress)
    points = []
    for (kind, policy), found in zip(policies, candidates, strict=True):
        kl, kl_ci = mean_interval(found.kl, seed)
        added, added_ci = mean_interval(found.nll - baseline.nll, seed)
        points.append(
            Point(
                name=policy.name,
                kind=kind,
                bits_per_value=8 * found.kv_bytes / found.num_values,
                kl=kl,
                kl_ci=kl_ci,
                added_nats=added,
                added_nats_ci=added_ci,
                top1_agreement=float(found.same_top.double().mean()),
                kl_by_text=dict(zip(names, found.kl.double().mean(1).tolist(), strict=True)),
                kl_by_position=kl_by_position(found.kl),
            )
        )
    return points


def point_from_dict(data: Any) -> Point:
    """What ``asdict`` and JSON made of a point."""
    return build(Point, data, "point")


@torch.inference_mode()
def error_by_depth(model: "PreTrainedModel", window: Tensor, policy: Policy) -> list[float]:
    """Relative RMS error of the hidden state after each layer; window: int64 ``[1, tokens]``."""
    caches = [make_cache(model, None), make_cache(model, policy)]
    squares: list[list[float]] = []
    for chunk in window.to(model.device).split(CHUNK, dim=1):
        states = []
        for which, cache in zip((None, policy), caches, strict=True):
            with attention_of(model, which):
                out = model(input_ids=chunk, past_key_values=cache, use_cache=True, output_hidden_states=True)
            states.append(out.hidden_states[1:])
        pairs = [(a.float(), b.float()) for a, b in zip(*states, strict=True)]
        squares.append([x for a, b in pairs for x in (float((a - b).square().sum()), float(a.square().sum()))])
    totals = torch.tensor(squares, dtype=torch.float64).sum(0).unflatten(0, (-1, 2))
    errors: list[float] = (totals[:, 0] / totals[:, 1].clamp_min(1e-300)).sqrt().tolist()
    return errors
