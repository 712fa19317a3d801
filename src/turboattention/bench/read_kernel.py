# Triton has no types:
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"
"""A kernel that reads a buffer and keeps what makes the reads necessary."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read_kernel(words, out, count, WORDS: tl.constexpr):
    """Sums of ``count`` int32 words, strided over the programs; the rest after whole steps is left out."""
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * WORDS
    total = tl.zeros([WORDS], tl.int32)
    for first in range(program * WORDS, count - WORDS + 1, step):
        total += tl.load(words + first + tl.arange(0, WORDS))
    tl.store(out + program * WORDS + tl.arange(0, WORDS), total)


def reading(buffer: Tensor, programs: int, words: int) -> Callable[[], Tensor]:
    """A call that reads a contiguous uint8 ``buffer`` with so many programs; its int32 sums ``[programs, words]``."""
    data = buffer.flatten()
    data = data[: data.numel() // 4 * 4].view(torch.int32)
    out = torch.empty(programs, words, dtype=torch.int32, device=buffer.device)

    def call() -> Tensor:
        read_kernel[(programs,)](data, out, data.numel(), words, num_warps=4, num_stages=3)
        return out

    return call
