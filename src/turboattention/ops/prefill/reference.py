"""The definition of prefill: a chunk of queries attends to the pages before it and to its own exact tokens."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from turboattention.checks import check_heads
from turboattention.config import AttentionConfig
from turboattention.errors import invalid
from turboattention.ops.common.cached_kv import CachedKV
from turboattention.ops.common.folded import fold_scores, fold_values
from turboattention.ops.softmax import base2_softmax, sas_softmax
from turboattention.quant.affine import TINY
from turboattention.quant.codec import decode_pages, expand_pages
from turboattention.quant.progressive import STAGE1_LIMIT, quantize_stage1
from turboattention.quant.rotation import rotate

Form = Literal["folded", "expanded"]
# Rows of queries computed together: bounds the score matrix of a long prompt, changes no result.
QUERY_BLOCK = 256
TILE = 64


class AttentionOutput(NamedTuple):
    """``out [batch, heads, queries, head_dim]`` like q; ``lse [batch, heads, queries]`` float32, natural log."""

    out: Tensor
    lse: Tensor


def prefill_attention(
    q: Tensor,
    kv: CachedKV,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    config: AttentionConfig | None = None,
    form: Form = "folded",
) -> AttentionOutput:
    """Attention of the last ``q.shape[2]`` tokens of the cache over all of it (not causal: of any tokens).

    q: ``[batch, heads, queries, head_dim]``, heads a multiple of the KV heads (query head h reads KV head h // ratio).
    scale: factor of the scores, ``head_dim ** -0.5`` when None. softcap: ``cap * tanh(score / cap)`` when given.
    window: a token sees only that many last tokens, itself included; not causal, it is counted from the same place.
    form: ``folded`` multiplies codes and keeps scales outside; ``expanded`` dequantises first. They agree to rounding.
    Rows that see nothing (padding), and queries that hold NaN or infinity, give zeros and an lse of -inf. Computes in
    float32 (float64 for float64 q).
    Raises InvalidInputError for shapes that do not fit.
    """
    check_queries(q, kv, causal)
    config = config or AttentionConfig()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(work).unflatten(1, (kv.num_kv_heads, -1))
    mask = kv.visible(q.shape[2], causal, window)
    source = _Folded(kv, work, config) if form == "folded" else _Expanded(kv, work, config)
    outs, lses = [], []
    for first in range(0, q.shape[2], QUERY_BLOCK):
        rows = slice(first, min(first + QUERY_BLOCK, q.shape[2]))
        block = grouped[:, :, :, rows]
        if config.query_bits == 8:
            block = _round_tiles(block)
        scores = source.scores(block) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, rows if mask.shape[1] > 1 else slice(None)], -torch.inf)
        outs.append(source.values(_probabilities(scores, config)))
        lse = torch.logsumexp(scores, -1)
        lses.append(lse.where(lse < torch.inf, -torch.inf))  # of a query that is no number: as the kernels do
    out = torch.cat(outs, 3).flatten(1, 2).to(q.dtype)
    return AttentionOutput(out, torch.cat(lses, 3).flatten(1, 2).float())


def merge_attention(a: AttentionOutput, b: AttentionOutput) -> AttentionOutput:
    """Attention of the same queries over two disjoint sets of tokens together, from that over each.

    out ``[..., head_dim]`` with lse ``[...]``: ``lse = log(e^lse_a + e^lse_b)`` and
    ``out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b``, in the dtype of ``a.out``. A part that saw nothing has
    zeros and -inf.
    """
    share = torch.sigmoid(a.lse - b.lse).nan_to_num(0.0)[..., None]  # NaN: neither saw anything
    out = torch.lerp(b.out.to(share.dtype), a.out.to(share.dtype), share)
    return AttentionOutput(out.to(a.out.dtype), torch.logaddexp(a.lse, b.lse))


def check_queries(q: Tensor, kv: CachedKV, causal: bool) -> None:
    """Raise InvalidInputError unless ``q`` fits the cache; causal: its tokens are the cache's newest."""
    check_heads("q", q, head_dim=kv.tail_key.shape[-1])
    if q.shape[1] % kv.num_kv_heads:
        raise invalid("q", f"a multiple of {kv.num_kv_heads} KV heads", f"{q.shape[1]} heads")
    if q.shape[0] != kv.tail_key.shape[0]:
        raise invalid("q", f"batch {kv.tail_key.shape[0]} as the cache", q.shape[0])
    if causal and q.shape[2] > kv.length:
        raise invalid("q", f"at most {kv.length} queries (the tokens of the cache)", q.shape[2])
    if not q.shape[2]:
        raise invalid("q", "at least 1 query", 0)


def _probabilities(scores: Tensor, config: AttentionConfig) -> Tensor:
    match config.softmax:
        case "sas":
            weights = sas_softmax(scores).to(scores.dtype)
        case "base2":
            levels = 255 if config.probability_bits == 8 else None
            return base2_softmax(scores, probability_levels=levels).weights.to(scores.dtype)
        case "exact":
            # A row without any visible token is all -inf: softmax gives NaN where attention means zero.
            weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return _round_probabilities(weights) if config.probability_bits == 8 else weights


def _round_probabilities(p: Tensor) -> Tensor:
    """P to INT8 with a scale for each tile (64 rows x 64 tokens), maximum / 119 (the paper, section 3.5 step 7)."""
    rows = []
    for part in p.split(TILE, -2):
        units = [(tile.amax((-2, -1), keepdim=True) / STAGE1_LIMIT).clamp_min(TINY) for tile in part.split(TILE, -1)]
        tiles = [(tile / unit).round() * unit for tile, unit in zip(part.split(TILE, -1), units, strict=True)]
        rows.append(torch.cat(tiles, -1))
    return torch.cat(rows, -2)


def _round_tiles(x: Tensor) -> Tensor:
    """Stage 1 of FlashQ on 64-row tiles, back as float: what INT8 operands make of Q and of a fresh chunk."""
    parts = []
    for first in range(0, x.shape[-2], TILE):
        tile = quantize_stage1(x[..., first : first + TILE, :])
        parts.append(tile.codes.to(x.dtype) * tile.scale.to(x.dtype))
    return torch.cat(parts, -2) if parts else x


class _Tail:
    """Exact tokens: the tail and the sinks, common to both forms."""

    def __init__(self, kv: CachedKV, work: torch.dtype, config: AttentionConfig) -> None:
        self.kv = kv
        self.key, self.value = kv.tail_key.to(work), kv.tail_value.to(work)
        if config.query_bits == 8:
            self.key, self.value = _round_tiles(self.key), _round_tiles(self.value)
        self.sinks = kv.sink_columns() if kv.sink_key is not None and kv.page_tokens else None

    def scores(self, q: Tensor) -> Tensor:
        return q @ self.key.transpose(-2, -1)[:, :, None]

    def values(self, p: Tensor) -> Tensor:
        return p[..., self.kv.page_tokens :] @ self.value[:, :, None]


class _Folded(_Tail):
    """Scores and outputs straight from the codes."""

    def __init__(self, kv: CachedKV, work: torch.dtype, config: AttentionConfig) -> None:
        super().__init__(kv, work, config)
        self.decoded = [(g, decode_pages(g.layout, g.pages)) for g in kv.groups]

    def scores(self, q: Tensor) -> Tensor:
        batch, heads, ratio, rows, _ = q.shape
        scores = q.new_empty(batch, heads, ratio, rows, self.kv.length)
        for group, pages in self.decoded:
            x = q[:, list(group.heads)]
            x = rotate(x) if group.layout.key.rotated else x
            part = fold_scores(x.flatten(2, 3).unsqueeze(2), pages.key)  # [B, heads, pages, ratio * rows, tokens]
            part = part.transpose(2, 3).flatten(-2).unflatten(2, (ratio, rows))
            scores[:, list(group.heads), :, :, : self.kv.page_tokens] = part
        scores[..., self.kv.page_tokens :] = super().scores(q)
        if self.sinks is not None and self.kv.sink_key is not None:
            columns, paged = (x[:, None, None, None].expand(*scores.shape[:-1], -1) for x in self.sinks)
            exact = q @ self.kv.sink_key.to(q.dtype).transpose(-2, -1)[:, :, None]
            scores.scatter_(-1, columns, torch.where(paged, exact, scores.gather(-1, columns)))
        return scores

    def values(self, p: Tensor) -> Tensor:
        out = super().values(p)
        if self.sinks is not None and self.kv.sink_value is not None:
            columns, paged = (x[:, None, None, None].expand(*p.shape[:-1], -1) for x in self.sinks)
            at_sinks = p.gather(-1, columns) * paged
            out += at_sinks @ self.kv.sink_value.to(p.dtype)[:, :, None]
            p = p.scatter(-1, columns, torch.where(paged, 0.0, p.gather(-1, columns)))
        ratio, rows = p.shape[2:4]
        for group, pages in self.decoded:
            x = p[:, list(group.heads), :, :, : self.kv.page_tokens].flatten(2, 3)
            x = x.unflatten(-1, (-1, group.layout.page_size)).transpose(2, 3)  # [B, heads, pages, ratio * rows, tokens]
            part = fold_values(x, pages.value).sum(2).unflatten(2, (ratio, rows))
            out[:, list(group.heads)] += rotate(part) if group.layout.value.rotated else part
        return out


class _Expanded(_Tail):
    """Dequantise, then ordinary attention."""

    def __init__(self, kv: CachedKV, work: torch.dtype, config: AttentionConfig) -> None:
        super().__init__(kv, work, config)
        self.key, self.value = expand_cache(kv, work, self.key, self.value)

    def values(self, p: Tensor) -> Tensor:
        return p @ self.value[:, :, None]


def expand_cache(
    kv: CachedKV, dtype: torch.dtype, tail_key: Tensor | None = None, tail_value: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """K and V of every token as ``[batch, kv_heads, length, head_dim]``: what the codes mean, sinks and tail exact."""
    tail_key = kv.tail_key if tail_key is None else tail_key
    tail_value = kv.tail_value if tail_value is None else tail_value
    batch, heads, _, dim = tail_key.shape
    key = tail_key.new_empty(batch, heads, kv.length, dim, dtype=dtype)
    value = torch.empty_like(key)
    for group in kv.groups:
        k, v = expand_pages(group.layout, group.pages)
        key[:, list(group.heads), : kv.page_tokens] = k.flatten(2, 3).to(dtype)
        value[:, list(group.heads), : kv.page_tokens] = v.flatten(2, 3).to(dtype)
    key[:, :, kv.page_tokens :], value[:, :, kv.page_tokens :] = tail_key, tail_value
    if kv.sink_key is not None and kv.sink_value is not None and kv.page_tokens:
        columns, paged = kv.sink_columns()
        index = columns[:, None, :, None].expand(-1, heads, -1, dim)
        for exact, full in ((kv.sink_key, key), (kv.sink_value, value)):
            full.scatter_(2, index, torch.where(paged[:, None, :, None], exact.to(dtype), full.gather(2, index)))
    return key, value
