"""The chunks of a step in parts whose K and V, written out in 16 bits with what came before, fit a workspace."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from turboattention.ops.prefill.expand import bounds

WORKSPACE_TOKENS = 131072  # 512 MiB of K and V with 8 KV heads of 128 channels


@dataclass(frozen=True)
class ChunkPart:
    """Chunks ``first .. last - 1`` of a step.

    tokens: theirs among the packed tokens of all chunks. cu_q, cu_k: int32 ``[last - first + 1]``, where each chunk,
    and each with the tokens before it, begins and ends, from 0. total, longest: bounds of the latter.
    """

    first: int
    last: int
    tokens: slice
    cu_q: Tensor
    cu_k: Tensor
    total: int
    longest: int


def parts_of(cu: Tensor, starts: Sequence[int], after: Tensor, contexts: Sequence[int]) -> tuple[ChunkPart, ...]:
    """Parts without empty ones.

    cu: int32 ``[chunks + 1]`` on the device, where each chunk begins and ends among the chunks' tokens; starts: the
    same on the host. after: int32 ``[chunks]``, tokens of each sequence with its chunk; contexts: bounds on the host.
    """
    found = []
    for first, last in _runs(contexts):
        tokens = slice(starts[first], starts[last])
        if tokens.start < tokens.stop:
            found.append(
                ChunkPart(
                    first, last, tokens, cu[first : last + 1] - starts[first], bounds(after[first:last]),
                    sum(contexts[first:last]), max(contexts[first:last]),
                )
            )  # fmt: skip
    return tuple(found)


def _runs(contexts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of sequences whose contexts together fit the workspace; one that does not fit is alone."""
    first, held = 0, 0
    for i, tokens in enumerate(contexts):
        if i > first and held + tokens > WORKSPACE_TOKENS:
            yield first, i
            first, held = i, 0
        held += tokens
    yield first, len(contexts)
