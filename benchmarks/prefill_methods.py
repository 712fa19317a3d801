"""What `prefill_errors.py` compares: attention with the weights of INT8, FP8 and bfloat16 kernels, computed on a CPU.

Scores are in log2 units here; -inf marks a token that the row does not see.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from turboattention.ops.prefill.int8 import (
    KEY_BLOCK,
    LEVELS,
    LOG2E,
    QUERY_BLOCK,
    Int8Chunk,
    code_values,
    int8_attention,
    visible,
)
from turboattention.ops.prefill.sequences import BLOCK, Sequences
from turboattention.quant.packing import restore_tokens

METHODS = ("int8", "int8_rounded", "fp8", "bfloat16")
FP8 = torch.float8_e4m3fn
# FlashAttention-3's: the running maximum becomes 2^8, and tokens of a tile by head_dim (hopper/softmax.h, tile_size.h).
FP8_OFFSET, FP8_TILE = 8, {64: 160, 128: 224}
NEGLIGIBLE = 24.0  # a weight 2^24 times smaller than the row's largest is lost in a float32 sum


def errors(q: Tensor, k: Tensor, v: Tensor, scale: float, chunk: Int8Chunk, rows: int) -> dict[str, Tensor]:
    """Relative RMS error of each of METHODS against float64 causal attention.

    q: ``[heads, tokens, head_dim]``, k and v the same with KV heads, tokens a multiple of 128; chunk: their operands.
    rows: how many at the end are compared, and how many in spread blocks of 128.
    Returns float64 ``[heads + 1]``: of each head, then of all together.
    """
    heads, tokens, dim = q.shape
    group = heads // k.shape[0]
    q, k, v = q.double() * (scale * LOG2E), k.double(), v.double()
    q_fp8, k_fp8, v_fp8 = (fp8_values(x.unflatten(0, (k.shape[0], -1))).flatten(0, 1) for x in (q, k, v))
    squares = {name: torch.zeros(heads, dtype=torch.float64) for name in ("exact", *METHODS)}
    for first in measured_blocks(tokens, rows):
        part, end = block_of(chunk, first), first + BLOCK
        defined = int8_attention(part, causal=True).out[0]
        q_int8 = code_values(part.q, part.q_scale, QUERY_BLOCK)[..., :dim]
        k_int8 = code_values(part.k, part.k_scale, KEY_BLOCK)[..., :dim]
        v_int8 = code_values(restore_tokens(part.v).mT, part.v_scale, KEY_BLOCK)[..., :dim]
        hidden = ~visible(BLOCK, end, True, None, q.device)
        for head in range(heads):
            kv, these = head // group, slice(first, end)
            scores = (q[head, these] @ k[kv, :end].mT).masked_fill_(hidden, -torch.inf)
            exact = weighted(scores, v[kv, :end], "exact", BLOCK)
            out = {"exact": torch.zeros_like(exact), "int8": defined[head]}
            out["bfloat16"] = weighted(scores, v[kv, :end], "bfloat16", BLOCK)
            scores = (q_int8[head] @ k_int8[kv].mT).masked_fill_(hidden, -torch.inf)
            out["int8_rounded"] = weighted(scores, v_int8[kv], "int8_rounded", KEY_BLOCK)
            scores = (q_fp8[head, these] @ k_fp8[kv, :end].mT).masked_fill_(hidden, -torch.inf)
            out["fp8"] = weighted(scores, v_fp8[kv, :end], "fp8", FP8_TILE[dim])
            for name, result in out.items():
                squares[name][head] += (result - exact).square().sum()
    norm = squares.pop("exact")
    return {name: torch.cat([x / norm, x.sum(0, True) / norm.sum(0, True)]).sqrt() for name, x in squares.items()}


def weighted(scores: Tensor, v: Tensor, kind: str, tile: int) -> Tensor:
    """Attention of scores ``[rows, tokens]`` over v ``[tokens, channels]``, float64, with one kind of weights.

    kind: "exact"; "bfloat16", rounded; "int8_rounded", 127 levels below the maximum of row and tile, sum of the rounded
    ones; "fp8", e4m3 below 2^8 times the running maximum from the last tile to the first, sum of the unrounded ones.
    tile: tokens.
    """
    top = maxima(scores, tile)
    if kind == "fp8":
        top = top.flip(-1).cummax(-1).values.flip(-1)
    elif kind != "int8_rounded":
        top = top.amax(-1, keepdim=True).expand_as(top)
    back = torch.exp2(top - top.amax(-1, keepdim=True)).repeat_interleave(tile, -1)[..., : scores.shape[-1]]
    # A row that sees nothing of a tile gives -inf minus -inf there, and has no weight.
    p = torch.exp2(scores - top.repeat_interleave(tile, -1)[..., : scores.shape[-1]]).nan_to_num_(0.0)
    if kind == "int8_rounded":
        p = rounded = (LEVELS * p).round()
    elif kind == "fp8":
        p = p * 2**FP8_OFFSET
        rounded = p.float().to(FP8).double()
    else:
        rounded = p.bfloat16().double() if kind == "bfloat16" else p
    return (rounded * back) @ v / (p * back).sum(-1, keepdim=True)


def maxima(scores: Tensor, tile: int) -> Tensor:
    """Largest score of each row in each tile: ``[..., rows, tokens]`` -> ``[..., rows, tiles]``."""
    whole: Tensor = pad(scores, (0, -scores.shape[-1] % tile), value=-torch.inf)
    return whole.reshape(*scores.shape[:-1], -1, tile).amax(-1)


def fp8_values(x: Tensor) -> Tensor:
    """What e4m3 codes of ``[kv_heads, ...]`` stand for, with one scale per KV head as FlashAttention-3 takes it."""
    scale = x.flatten(1).abs().amax(1).clamp_min(1e-30) / torch.finfo(FP8).max
    scale = scale.reshape(-1, *[1] * (x.dim() - 1))
    return (x / scale).float().to(FP8).to(x.dtype) * scale


def measured_blocks(tokens: int, rows: int) -> list[int]:
    """First rows of blocks of 128: ``rows`` rows at the end and as many spread from the start."""
    count = min(rows, tokens) // BLOCK
    last = {tokens - BLOCK * (i + 1) for i in range(count)}
    return sorted(last | {i * tokens // count // BLOCK * BLOCK for i in range(count)})


def block_of(chunk: Int8Chunk, first: int) -> Int8Chunk:
    """A chunk of one sequence cut to 128 queries from ``first`` on and the keys up to their end."""
    end = first + BLOCK
    return Int8Chunk(
        q=chunk.q[:, first:end],
        q_scale=chunk.q_scale[:, first // QUERY_BLOCK : end // QUERY_BLOCK],
        k=chunk.k[:, :end],
        k_scale=chunk.k_scale[:, : end // KEY_BLOCK],
        v=chunk.v[..., :end],
        v_scale=chunk.v_scale[:, : end // KEY_BLOCK],
        shift=chunk.shift[:, first:end],
        mean=chunk.mean,
        gain=chunk.gain,
        sequences=Sequences(1, BLOCK, end),
        head_dim=chunk.head_dim,
    )


def skippable(chunk: Int8Chunk, every: int = 1) -> tuple[float, float]:
    """Share of the causal half's tiles (64 rows, 128 tokens) in which every row's largest weight is below 2^-24.

    every: of how many blocks of 64 rows one is looked at. Returns the share against each row's final maximum, which
    only a second pass knows, and against the largest score up to this tile, which the kernel knows.
    """
    q = code_values(chunk.q, chunk.q_scale, QUERY_BLOCK, torch.float32)
    k = code_values(chunk.k, chunk.k_scale, KEY_BLOCK, torch.float32)
    tiles = final = running = 0
    for first in range(0, q.shape[1], QUERY_BLOCK * every):
        end = first + QUERY_BLOCK
        rows = q[:, first:end].unflatten(0, (k.shape[0], -1)).flatten(1, 2)
        scores = (rows @ k[:, :end].mT).unflatten(1, (-1, QUERY_BLOCK))
        scores.masked_fill_(~visible(QUERY_BLOCK, end, True, None, q.device), -torch.inf)
        top = maxima(scores, KEY_BLOCK)
        tiles += top[..., 0, :].numel()
        final += int((top < top.amax(-1, keepdim=True) - NEGLIGIBLE).all(-2).sum())
        running += int((top < top.cummax(-1).values - NEGLIGIBLE).all(-2).sum())
    return final / tiles, running / tiles
