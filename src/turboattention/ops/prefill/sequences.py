"""Where the tokens of a batch lie: in the caller's tensors, and in operands that begin each sequence at a new block.

Packed sequences get their padded position from their own offset alone, ``(first // 128 + number) * 128``: two sequences
never overlap, and neither the host nor a kernel needs to add up the lengths of the sequences before.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from turboattention.checks import check_head_dim
from turboattention.errors import invalid

BLOCK = 128


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence. number: which sequence. first, length: its tokens among the caller's. start: padded."""

    number: int
    first: int
    length: int
    start: int
    packed: bool

    @property
    def blocks(self) -> int:
        return -(-self.length // BLOCK)

    @property
    def padded(self) -> slice:
        return slice(self.start, self.start + self.blocks * BLOCK)

    def scales(self, block: int) -> slice:
        return slice(self.start // block, (self.start + self.blocks * BLOCK) // block)

    def read(self, x: Tensor) -> Tensor:
        """The sequence's part of a tensor of the caller as ``[heads, length, head_dim]``."""
        return x[self.first : self.first + self.length].transpose(0, 1) if self.packed else x[self.number]


@dataclass(frozen=True)
class Sequences:
    """Lengths of a batch; make one with `dense` or `packed`.

    max_q, max_k: longest sequence, of queries and of keys. total_q, total_k: tokens of packed tensors (0 when dense).
    cu_q, cu_k: int32 ``[batch + 1]``, cumulative lengths of packed tensors.
    """

    batch: int
    max_q: int
    max_k: int
    total_q: int = 0
    total_k: int = 0
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @classmethod
    def dense(cls, q: Tensor, k: Tensor) -> "Sequences":
        """Of ``[batch, heads, tokens, head_dim]``: every sequence has the same length."""
        if q.dim() != 4 or k.dim() != 4:
            shapes = f"shapes {tuple(q.shape)} and {tuple(k.shape)}"
            hint = "packed [tokens, heads, head_dim] needs Sequences.packed(...)"
            raise invalid("q, k", "4 dimensions [batch, heads, tokens, head_dim]", shapes, hint)
        return cls(q.shape[0], q.shape[2], k.shape[2])

    @classmethod
    def packed(
        cls,
        q: Tensor,
        k: Tensor,
        cu_q: Tensor,
        cu_k: Tensor | None = None,
        *,
        max_q: int | None = None,
        max_k: int | None = None,
    ) -> "Sequences":
        """Of ``[tokens, heads, head_dim]`` with cumulative lengths.

        cu_q, cu_k: int32 ``[batch + 1]`` from 0 to the number of tokens; ``cu_k`` is ``cu_q`` when None. max_q, max_k:
        the longest lengths; when None they are read from the device, which waits for it.
        """
        cu_k, max_k = (cu_q, max_k or max_q) if cu_k is None else (cu_k, max_k)
        for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
            if cu.dim() != 1 or cu.numel() < 2 or cu.dtype != torch.int32:
                raise invalid(name, "int32 [batch + 1], at least 2 numbers", f"{cu.dtype} {tuple(cu.shape)}")
        if cu_q.shape != cu_k.shape:
            raise invalid("cu_k", f"{cu_q.numel()} numbers as cu_q", cu_k.numel())
        max_q = int(cu_q.diff().max()) if max_q is None else max_q
        max_k = int(cu_k.diff().max()) if max_k is None else max_k
        return cls(cu_q.numel() - 1, max_q, max_k, q.shape[0], k.shape[0], cu_q.contiguous(), cu_k.contiguous())

    @property
    def is_packed(self) -> bool:
        return self.cu_q is not None

    @property
    def padded_q(self) -> int:
        """Rows of the operand of Q, all sequences together."""
        return self._padded(self.max_q, self.total_q)

    @property
    def padded_k(self) -> int:
        """Tokens of the operands of K and V, all sequences together."""
        return self._padded(self.max_k, self.total_k)

    def _padded(self, longest: int, total: int) -> int:
        return (total // BLOCK + self.batch if self.is_packed else self.batch * -(-longest // BLOCK)) * BLOCK

    def heads(self, x: Tensor) -> int:
        """Heads of a tensor of the caller."""
        return int(x.shape[1])

    def spans_q(self) -> list[Span]:
        """Where each sequence's queries lie. Waits for the device when packed."""
        return self._spans(self.cu_q, self.max_q)

    def spans_k(self) -> list[Span]:
        """Where each sequence's tokens lie. Waits for the device when packed."""
        return self._spans(self.cu_k, self.max_k)

    def _spans(self, cu: Tensor | None, longest: int) -> list[Span]:
        if cu is None:
            blocks = -(-longest // BLOCK)
            return [Span(b, 0, longest, b * blocks * BLOCK, packed=False) for b in range(self.batch)]
        ends = cu.tolist()
        return [
            Span(b, first, end - first, (first // BLOCK + b) * BLOCK, packed=True)
            for b, (first, end) in enumerate(pairwise(ends))
        ]

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise unless three tensors of the caller fit together and these lengths."""
        dims, names = (3, "[tokens, heads, head_dim]") if self.is_packed else (4, "[batch, heads, tokens, head_dim]")
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != dims:
                raise invalid(name, f"{dims} dimensions {names}", f"shape {tuple(x.shape)}")
            if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                raise invalid(name, "dtype float16, bfloat16 or float32", x.dtype)
            if x.device != q.device:
                raise invalid(name, f"device {q.device} as q", x.device)
        check_head_dim(q.shape[-1])
        if k.shape != v.shape:
            raise invalid("v", f"shape {tuple(k.shape)} as k", f"shape {tuple(v.shape)}")
        if k.shape[-1] != q.shape[-1]:
            raise invalid("k", f"head_dim {q.shape[-1]} as q", f"shape {tuple(k.shape)}")
        if not k.shape[1] or q.shape[1] % k.shape[1]:
            raise invalid("q", f"a multiple of {k.shape[1]} KV heads", f"{q.shape[1]} heads")
        if not self.is_packed and k.shape[0] != q.shape[0]:
            raise invalid("k", f"batch {q.shape[0]} as q", k.shape[0])
        if not q.numel() or not k.numel():
            raise invalid("q, k", "at least 1 query and 1 token", f"shapes {tuple(q.shape)} and {tuple(k.shape)}")
