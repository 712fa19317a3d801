"""Exact K and V of a few heads, kept beside the compressed cache within a bound of bytes."""

from weakref import WeakSet

import torch
from torch import Tensor

CHUNK_TOKENS = 512


class Budget:
    """Bytes that all kept heads together may hold."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: WeakSet[Kept] = WeakSet()

    @property
    def used(self) -> int:
        """Bytes held now; heads of requests that are gone count no more."""
        return sum(kept.nbytes for kept in self._kept)

    def admits(self, kept: "Kept", more: int) -> bool:
        """Whether ``kept`` may hold ``more`` bytes than now."""
        self._kept.add(kept)
        return self.used + more <= self.limit


class Kept:
    """K and V of one KV head of one sequence as they came, in 16 bits: what 16-bit attention would read.

    Grows in pieces, because growing by copying would for a moment hold twice the bound.
    """

    def __init__(self, layer: int, head: int, budget: Budget) -> None:
        self.layer, self.head = layer, head
        self.tokens = 0
        self.seen_pages = 0  # pages whose codes have been looked at
        self._budget = budget
        self._pieces: list[Tensor] = []  # [2, tokens, head_dim]
        self._free = 0

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces)

    # Without gradients, and the same whether or not the step is in inference mode.
    @torch.inference_mode()
    def append(self, key: Tensor, value: Tensor) -> bool:
        """Add ``[tokens, head_dim]``; False, with nothing held any more, where the bound does not admit them."""
        count, dim = key.shape
        dtype = key.dtype if key.dtype.itemsize == 2 else torch.float16
        missing = count - self._free
        if missing > 0:
            size = -(-missing // CHUNK_TOKENS) * CHUNK_TOKENS
            if not self._budget.admits(self, 2 * size * dim * dtype.itemsize):
                self.drop()
                return False
            self._pieces.append(torch.empty(2, size, dim, dtype=dtype, device=key.device))
            self._free += size
        done = 0
        end = sum(piece.shape[1] for piece in self._pieces) - self._free
        start = 0
        for piece in self._pieces:
            at, room = max(0, end + done - start), piece.shape[1]
            take = min(room - at, count - done)
            if take > 0:
                piece[0, at : at + take] = key[done : done + take]
                piece[1, at : at + take] = value[done : done + take]
                done += take
            start += room
        self._free -= count
        self.tokens += count
        return True

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens``."""
        self._free += self.tokens - tokens
        self.tokens = tokens

    def drop(self) -> None:
        """Hold nothing any more."""
        self._pieces, self._free, self.tokens = [], 0, 0

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V ``[tokens, head_dim]`` in float32."""
        both = torch.cat([piece.float() for piece in self._pieces], 1)[:, : self.tokens]
        return both[0], both[1]
