"""The definition of INT8 prefill: a chunk of fresh queries over its own fresh K and V, both products on integers.

`quantise_chunk` makes the operands that every kernel reads; `int8_attention` says what attention over them is, with
unrounded probabilities. Derivations and the error budget are in README.md; `int8_prefill` is the operator.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.ops.common.sample import spread
from turboattention.ops.prefill.reference import AttentionOutput
from turboattention.ops.prefill.sequences import BLOCK, Sequences
from turboattention.quant.packing import permute_tokens, restore_tokens

LEVELS = 127
QUERY_BLOCK = 64  # query rows that share a scale: the rows that one warpgroup of a matrix unit works on
KEY_BLOCK = BLOCK  # tokens that share a scale of K and one of V: a tile of the kernels
ROWS = 512  # queries that the definition computes together: bounds the score matrix, changes no result
SMALLEST = 1e-30  # of a block's largest magnitude: zeros then give codes 0 and no division by 0
KEY_SAMPLES = 512  # tokens of a sequence that say what K's mean is and how large its channels are
QUERY_SAMPLES = 128  # the same for Q: query rows of all heads of a KV head
SMALLEST_SHARE = 2.0**-8  # of a head's largest channel that a channel counts as: bounds what a sample may miss
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Int8Chunk:
    """INT8 operands, heads outermost, tokens at the padded positions of `Sequences`, channels padded with zeros.

    width: ``head_dim`` rounded up to a power of two. What lies between two sequences is never read.

    q:       int8 ``[heads, padded_q, width]``, of q * scale * log2(e) * gain
    q_scale: float32 ``[heads, padded_q / 64]``
    k:       int8 ``[kv_heads, padded_k, width]``, of (k - mean) / gain
    k_scale: float32 ``[kv_heads, padded_k / 128]``
    v:       int8 ``[kv_heads, width, padded_k]``, tokens in the order of `quant.packing.permute_tokens`
    v_scale: float32 ``[kv_heads, padded_k / 128]``
    shift:   float32 ``[heads, padded_q]``, scale * (q . mean of k): what smoothing took from every score of the row
    mean:    float32 ``[sequences, kv_heads, width]``, of k over KEY_SAMPLES tokens of its sequence (`spread`)
    gain:    float32 ``[sequences, kv_heads, width]``, of `channel_gains`

    A kernel that quantises queries itself gets a chunk whose q, q_scale and shift have no rows.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    shift: Tensor
    mean: Tensor
    gain: Tensor
    sequences: Sequences
    head_dim: int


def padded_width(head_dim: int) -> int:
    """Channels that are stored: the next power of two, which matrix tiles need."""
    return 1 << (head_dim - 1).bit_length()


def empty_chunk(q: Tensor, k: Tensor, sequences: Sequences, *, queries: bool = True) -> Int8Chunk:
    """Operands without content, for `quantise_chunk` and its kernel to fill; arguments as there.

    queries: with room for those of the queries.
    """
    heads, kv_heads = sequences.heads(q), sequences.heads(k)
    rows, tokens, width = sequences.padded_q if queries else 0, sequences.padded_k, padded_width(q.shape[-1])

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    return Int8Chunk(
        q=new(torch.int8, heads, rows, width),
        q_scale=new(torch.float32, heads, rows // QUERY_BLOCK),
        k=new(torch.int8, kv_heads, tokens, width),
        k_scale=new(torch.float32, kv_heads, tokens // KEY_BLOCK),
        v=new(torch.int8, kv_heads, width, tokens),
        v_scale=new(torch.float32, kv_heads, tokens // KEY_BLOCK),
        shift=new(torch.float32, heads, rows),
        mean=new(torch.float32, sequences.batch, kv_heads, width),
        gain=new(torch.float32, sequences.batch, kv_heads, width),
        sequences=sequences,
        head_dim=q.shape[-1],
    )


def quantise_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences | None = None) -> Int8Chunk:
    """INT8 operands of a chunk.

    q: ``[batch, heads, queries, head_dim]``, or packed ``[tokens, heads, head_dim]``; k, v the same with KV heads.
    scale: factor of the scores. sequences: of packed tensors; dense ones need none.
    Raises InvalidInputError for shapes that do not fit.
    """
    sequences = sequences or Sequences.dense(q, k)
    sequences.check(q, k, v)
    chunk = empty_chunk(q, k, sequences)
    ratio = chunk.q.shape[0] // chunk.k.shape[0]
    for number, (rows, tokens) in enumerate(zip(sequences.spans_q(), sequences.spans_k(), strict=True)):
        x, key, value = rows.read(q).float(), tokens.read(k).float(), tokens.read(v).float()
        sample = key[:, spread(min(KEY_SAMPLES, tokens.length), tokens.length, key.device)]
        mean = sample.sum(1, keepdim=True) / max(sample.shape[1], 1)
        key = key - mean
        gain = channel_gains(sample - mean, x)[:, None]
        chunk.mean[number] = _widen(mean.squeeze(1), chunk.k.shape[-1])
        chunk.gain[number] = _widen(gain.squeeze(1), chunk.k.shape[-1], 1.0)
        chunk.shift[:, rows.padded] = _pad(scale * (x @ mean.repeat_interleave(ratio, 0).mT).squeeze(-1), rows.blocks)
        x = x * (gain * (scale * LOG2E)).repeat_interleave(ratio, 0)
        codes, chunk.q_scale[:, rows.scales(QUERY_BLOCK)] = _quantise(_pad(x, rows.blocks, 1), QUERY_BLOCK)
        chunk.q[:, rows.padded] = _widen(codes, chunk.q.shape[-1])
        key = key * gain.reciprocal()
        codes, chunk.k_scale[:, tokens.scales(KEY_BLOCK)] = _quantise(_pad(key, tokens.blocks, 1), KEY_BLOCK)
        chunk.k[:, tokens.padded] = _widen(codes, chunk.k.shape[-1])
        codes, chunk.v_scale[:, tokens.scales(KEY_BLOCK)] = _quantise(_pad(value, tokens.blocks, 1), KEY_BLOCK)
        chunk.v[:, :, tokens.padded] = permute_tokens(_widen(codes, chunk.v.shape[1]).mT)
    return chunk


def channel_gains(key: Tensor, q: Tensor) -> Tensor:
    """What Q's channels are multiplied by and K's divided by, so that neither side has few large ones under one scale.

    sqrt(a / b): a is the largest magnitude of a channel of ``key``, b that of QUERY_SAMPLES query rows, both as shares
    of the head's largest channel and at least SMALLEST_SHARE. Maxima do not depend on the order of tokens. The rows are
    spread over the sequence, and the heads of a KV head take turns.

    key: float32 ``[kv_heads, tokens, channels]``, sampled tokens of k without the mean; q: ``[heads, queries,
    channels]``. Returns float32 ``[kv_heads, channels]``, finite and above 0 whatever the inputs are.
    """
    rows = spread(QUERY_SAMPLES, q.shape[1], q.device)
    grouped = q.unflatten(0, (key.shape[0], -1))
    sample = grouped[:, torch.arange(len(rows), device=q.device) % grouped.shape[1], rows]
    # Through float64, because torch's float32 root on a CPU is not the nearest number.
    return (_shares(key) / _shares(sample)).double().sqrt().float()


def _shares(x: Tensor) -> Tensor:
    """Largest magnitudes of channels of ``[kv_heads, tokens, channels]``, divided by the head's largest.

    What is no number counts as the largest.
    """
    largest = torch.nn.functional.pad(x.abs(), (0, 0, 0, 1)).amax(1)  # 0 where there is no token
    share = largest / largest.amax(1, keepdim=True)
    return torch.where(share < 1, share.clamp_min(SMALLEST_SHARE), 1.0)


def int8_attention(
    chunk: Int8Chunk, *, causal: bool, window: int | None = None, dtype: torch.dtype = torch.float64
) -> AttentionOutput:
    """Attention over the values that the operands stand for, probabilities unrounded: what kernels are judged by.

    causal: the queries are the last tokens of the keys. window: a query sees at most the last ``window`` tokens, itself
    included (needs ``causal``). dtype: in which this computes and returns.
    Returns out like q of `quantise_chunk` (dense: ``[batch, heads, queries, head_dim]``) and lse
    ``[batch, heads, queries]`` (packed: ``[heads, tokens]``), natural logarithm of the sum over the true scores; rows
    that see nothing give zeros and -inf.
    """
    sequences = chunk.sequences
    ratio = chunk.q.shape[0] // chunk.k.shape[0]
    outs, lses = [], []
    for rows, tokens in zip(sequences.spans_q(), sequences.spans_k(), strict=True):
        scale = chunk.q_scale[:, rows.scales(QUERY_BLOCK)]
        q = code_values(chunk.q[:, rows.padded], scale, QUERY_BLOCK, dtype)[:, : rows.length]
        scale = chunk.k_scale[:, tokens.scales(KEY_BLOCK)]
        k = code_values(chunk.k[:, tokens.padded], scale, KEY_BLOCK, dtype)[:, : tokens.length]
        v_codes = restore_tokens(chunk.v[:, :, tokens.padded]).mT
        scale = chunk.v_scale[:, tokens.scales(KEY_BLOCK)]
        v = code_values(v_codes, scale, KEY_BLOCK, dtype)[:, : tokens.length]
        k, v = k.repeat_interleave(ratio, 0), v.repeat_interleave(ratio, 0)
        seen = visible(rows.length, tokens.length, causal, window, q.device)
        parts, sums = [], []
        for part, mask in zip(q.split(ROWS, 1), seen.split(ROWS), strict=True):
            scores = (part @ k.mT / LOG2E).masked_fill(~mask, -torch.inf)
            # A row without any visible token is all -inf: softmax gives NaN where attention means zero.
            parts.append(torch.softmax(scores, -1).nan_to_num(0.0) @ v)
            sums.append(torch.logsumexp(scores, -1))
        outs.append(torch.cat(parts, 1))
        lses.append(torch.cat(sums, 1) + chunk.shift[:, rows.padded][:, : rows.length].to(dtype))
    out = [x[..., : chunk.head_dim] for x in outs]
    if sequences.is_packed:
        return AttentionOutput(torch.cat(out, 1).transpose(0, 1), torch.cat(lses, 1))
    return AttentionOutput(torch.stack(out), torch.stack(lses))


def code_values(codes: Tensor, scale: Tensor, block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What codes ``[heads, tokens, channels]`` with a scale for every ``block`` tokens stand for."""
    return codes.to(dtype) * scale.to(dtype).repeat_interleave(block, 1)[..., None]


def visible(rows: int, tokens: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """bool ``[rows, tokens]``: which token each query sees; the last query is at the last token."""
    query = torch.arange(rows, device=device)[:, None] + (tokens - rows)
    key = torch.arange(tokens, device=device)
    seen = key <= query if causal else torch.ones(rows, tokens, dtype=torch.bool, device=device)
    return seen if window is None else seen & (key > query - window)


def check_window(window: int | None, causal: bool) -> None:
    """Raise unless ``window`` is None, or at least 1 and causal."""
    if window is not None and window < 1:
        raise invalid("window", "at least 1 token", window)
    if window is not None and not causal:
        raise invalid("window", "causal=True", "causal=False", "a window counts back from the query")


def _quantise(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """float32 ``[heads, tokens, channels]`` -> int8 codes like it, float32 scales ``[heads, tokens / block]``."""
    blocks = x.unflatten(1, (-1, block))
    top = blocks.abs().amax((2, 3)).clamp_min(SMALLEST)
    # A tensor, because 127 / top must be one float32 division, as in the kernel.
    inverse = torch.full_like(top, LEVELS) / top
    codes = (blocks * inverse[:, :, None, None]).round().to(torch.int8).flatten(1, 2)
    return codes, top / LEVELS


def _pad(x: Tensor, blocks: int, channels: int = 0) -> Tensor:
    """Zeros behind the tokens, up to ``blocks`` whole blocks; ``channels`` counts the dimensions after the tokens."""
    return torch.nn.functional.pad(x, (0, 0) * channels + (0, blocks * BLOCK - x.shape[1]))


def _widen(x: Tensor, width: int, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=value)
