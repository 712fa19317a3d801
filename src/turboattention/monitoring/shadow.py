"""The shadow check: what a step computed over the cache, against 16-bit attention of the same queries."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turboattention.monitoring.codes import CodeRates, code_rates
from turboattention.ops.common.cached_kv import CachedKV, HeadGroup
from turboattention.ops.prefill.reference import expand_cache
from turboattention.quant.codec import expand_keys

# What NaN, infinity and everything larger count as: one broken step must not make a sum useless for ever.
CAP = 100.0


@dataclass(frozen=True)
class Check:
    """One KV head of one step.

    tokens: of the context. relative_error: RMS of the output's error over the RMS of the output, over the head's
    queries. kl: KL(16-bit || as stored) of the attention's weights, nats, mean of the queries. codes: of the pages not
    seen before, by ``key`` and ``value``. drift: log2 of the size of K and V against the calibration's.
    """

    layer: int
    head: int
    tokens: int
    relative_error: float
    kl: float
    codes: dict[str, CodeRates] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)


def capped(value: float) -> float:
    """At most CAP; NaN too."""
    return min(value, CAP) if value == value else CAP


def chosen_rows(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` rows, evenly spaced, the last one always."""
    if count <= most:
        return list(range(count))
    return sorted({count - 1 - (i * count) // most for i in range(most)})


def one_head(kv: CachedKV, row: int, head: int) -> CachedKV:
    """The cache of one KV head of one sequence; copies nothing."""
    one = kv.row(row)
    groups = tuple(
        HeadGroup(g.layout, (0,), g.pages[:, g.heads.index(head)].unsqueeze(1)) for g in one.groups if head in g.heads
    )
    tail = one.tail_key[:, head : head + 1], one.tail_value[:, head : head + 1]
    sink_key, sink_value = (None if x is None else x[:, head : head + 1] for x in (one.sink_key, one.sink_value))
    return CachedKV(groups, one.page_tokens, *tail, sink_key, sink_value, one.starts)


def scores_of(
    query: Tensor, key: Tensor, rows: list[int], new: int, scale: float, softcap: float | None, start: int
) -> Tensor:
    """Causal scores ``[heads, rows, tokens]`` of some of the newest ``new`` tokens; what is not seen is -inf.

    query: ``[heads, rows, head_dim]``; key: ``[tokens, head_dim]``; start: first token that is no padding.
    """
    scores = query.float() @ key.T * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(key.shape[0], device=key.device)
    last = torch.tensor(rows, device=key.device)[:, None] + (key.shape[0] - new)
    return scores.masked_fill((columns > last) | (columns < start), -torch.inf)


def attention_errors(
    query: Tensor, out: Tensor | None, exact: tuple[Tensor, Tensor],
    stored: tuple[Tensor, Tensor | None],
    rows: list[int], new: int, scale: float, softcap: float | None = None, start: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Relative error of the output and KL of the weights.

    query, out: ``[heads, rows, head_dim]``, ``rows`` of the newest ``new`` tokens; out: None to compute it from what
    is stored. exact, stored: K and V ``[tokens, head_dim]``, float32; the stored V may be None where out is given.
    """
    scores = scores_of(query, exact[0], rows, new, scale, softcap, start)
    changed = scores_of(query, stored[0], rows, new, scale, softcap, start)
    logs, other = scores.log_softmax(-1), changed.log_softmax(-1)
    weights = logs.exp()
    right = weights @ exact[1]
    if out is None:
        assert stored[1] is not None  # the caller's part
        out = other.exp() @ stored[1]
    found = out.float()
    # 0 where nothing is seen: -inf minus -inf would be NaN.
    kl = float(torch.where(weights > 0, weights * (logs - other), 0.0).sum(-1).mean())
    size = float(right.square().mean().sqrt())
    error = float((found - right).square().mean().sqrt())
    relative = error / size if size else (0.0 if error == 0.0 else math.inf)
    return capped(relative), capped(max(kl, 0.0))


def codes_of_new_pages(
    stored: CachedKV, exact: tuple[Tensor, Tensor], seen: int, most: int, sinks: int, start: int
) -> dict[str, CodeRates]:
    """Rates of the newest pages beyond the first ``seen``, at most ``most`` of them.

    stored: one head of one sequence (`one_head`); sinks: exact first tokens behind ``start`` tokens of padding.
    """
    if not stored.groups:
        return {}
    layout, size = stored.groups[0].layout, stored.groups[0].layout.page_size
    count = stored.page_tokens // size
    first = max(seen, count - most)
    if first >= count:
        return {}
    pages = stored.groups[0].pages[0, 0, first:count]
    key, value = (x[first * size : count * size].unflatten(0, (-1, size)) for x in exact)
    place = torch.arange(first * size, count * size, device=pages.device).unflatten(0, (-1, size))
    return code_rates(layout, pages, key, value, place >= start + sinks)


def stored_keys(stored: CachedKV) -> Tensor:
    """K alone of `stored_values`."""
    tail = stored.tail_key[0, 0].float()
    if not stored.groups:
        return tail
    paged = expand_keys(stored.groups[0].layout, stored.groups[0].pages[0, 0]).flatten(0, 1)
    key = torch.cat([paged, tail])
    if stored.sink_key is not None and stored.page_tokens:
        columns, inside = (x[0] for x in stored.sink_columns())
        key[columns[inside]] = stored.sink_key[0, 0, inside].float()
    return key


def stored_values(stored: CachedKV) -> tuple[Tensor, Tensor]:
    """K and V ``[tokens, head_dim]`` as attention reads them, float32."""
    key, value = expand_cache(stored, torch.float32)
    return key[0, 0], value[0, 0]
