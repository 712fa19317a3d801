"""Chunks of several sequences, one after the other in one tensor, as an append takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from turboattention.errors import invalid
from turboattention.ops.append.reference import add_query_power
from turboattention.ops.common.sample import spread
from turboattention.ops.dispatch import without_triton

# Of more queries of a chunk so many are squared, spread over it: they only put channels in an order.
QUERY_SAMPLES = 256


@dataclass(frozen=True)
class Packed:
    """Where the new tokens of each sequence are.

    starts: int32 ``[batch]``, the first of each. longest: bound of how many one has, which the host knows.
    """

    starts: Tensor
    longest: int


def add_packed_queries(
    power: Tensor, queries: Tensor, packed: Packed, *, rows: Tensor, counts: Tensor, keep: Tensor, lengths: Tensor,
    page_size: int,
) -> Tensor:  # fmt: skip
    """Sums of squared queries (`encode_pages`) with the queries of chunks: ``power[row] * keep + squares``, in place.

    power: float32 ``[rows of the tail, kv_heads, head_dim]``. queries: ``[tokens, heads, head_dim]``.
    rows, counts, lengths: int32 ``[batch]``, the row, the new tokens and the tokens before them of each sequence.
    keep: float32 ``[batch]``, 0 where a row begins anew, else 1.
    Of a chunk of more than QUERY_SAMPLES tokens so many count, each for its share of the chunk.

    Returns what the pages of these chunks are to be compressed with, of the shape of ``power`` and set in ``rows``: the
    sums up to the end of the page that a chunk begins in. Every page of the chunk ends there or later, so that none
    depends on what stands behind it, which another request that shares the page may not have.

    On GPUs a kernel, which waits for nothing. Raises InvalidInputError for shapes and dtypes that do not fit.
    """
    _, heads, dim = power.shape
    if queries.dim() != 3 or queries.shape[1] % heads or queries.shape[2] != dim:
        raise invalid("queries", f"[tokens, a multiple of {heads}, {dim}]", tuple(queries.shape))
    for name, x, dtype in (
        ("starts", packed.starts, torch.int32), ("rows", rows, torch.int32), ("counts", counts, torch.int32),
        ("keep", keep, torch.float32), ("lengths", lengths, torch.int32),
    ):  # fmt: skip
        if x.shape != rows.shape or x.dim() != 1 or x.dtype != dtype or not x.is_contiguous():
            raise invalid(name, f"contiguous {dtype} {list(rows.shape)}", f"{x.dtype} {tuple(x.shape)}")
    if without_triton(power.device) is None:
        from turboattention.ops.append.triton_queries import add_packed_queries as kernel  # needs Triton

        return kernel(power, queries, packed, rows=rows, counts=counts, keep=keep, lengths=lengths, page_size=page_size)
    early = torch.empty_like(power)
    numbers = zip(*(x.tolist() for x in (packed.starts, counts, rows, lengths, keep)), strict=True)
    for start, count, row, length, kept in numbers:
        before = power[row] * kept
        first = queries[start : start + min(count, page_size - length % page_size)]
        early[row] = before + _squares(first, heads)
        samples = min(count, QUERY_SAMPLES)
        seen = queries[start + spread(samples, count, queries.device)]
        power[row] = before + _squares(seen, heads) * (count / max(samples, 1))
    return early


def _squares(queries: Tensor, heads: int) -> Tensor:
    return add_query_power(None, queries.transpose(0, 1)[None], heads, None)[0]
