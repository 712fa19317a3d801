"""Chunks of a step in parts that fit the workspace."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from turboattention.integrations.vllm.parts import WORKSPACE_TOKENS, parts_of

chunks = st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 9_000)), min_size=1, max_size=9)


@given(chunks)
def test_every_token_is_in_one_part_that_fits(sequences: list[tuple[int, int]]) -> None:
    """A part holds several sequences only where they fit together; its bounds are those of its own sequences."""
    new = torch.tensor([n for _, n in sequences])
    after = torch.tensor([before + n for before, n in sequences], dtype=torch.int32)
    starts = [0, *torch.cumsum(new, 0).tolist()]
    cu = torch.tensor(starts, dtype=torch.int32)
    parts = parts_of(cu, starts, after, after.tolist())
    assert sum(part.tokens.stop - part.tokens.start for part in parts) == starts[-1]
    for part in parts:
        own = after[part.first : part.last]
        assert part.last == part.first + 1 or part.total <= WORKSPACE_TOKENS
        assert (part.total, part.longest) == (int(own.sum()), int(own.max()))
        assert part.cu_q.diff().tolist() == new[part.first : part.last].tolist()
        assert part.cu_k.diff().tolist() == own.tolist()
        assert int(part.cu_q[0]) == int(part.cu_k[0]) == 0
        assert part.tokens == slice(starts[part.first], starts[part.last])
    assert all(a.last <= b.first for a, b in pairwise(parts))
