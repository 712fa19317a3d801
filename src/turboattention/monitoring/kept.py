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

    Grows in pieces, because growing by copying would for a moment hold twice the bound. Only the last has room.
    """

    def __init__(self, layer: int, head: int, budget: Budget) -> None:
        self.layer, self.head = layer, head
        self.tokens = 0
        self.seen_pages = 0  # pages whose codes have been looked at
        self._budget = budget
        self._pieces: list[tuple[Tensor, Tensor]] = []  # [tokens, head_dim] each
        self._room = 0

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self._pieces)

    # Without gradients, and the same whether or not the step is in inference mode.
    @torch.inference_mode()
    def append(self, key: Tensor, value: Tensor) -> bool:
        """Add ``[tokens, head_dim]``; False, with nothing held any more, where the bound does not admit them."""
        count = key.shape[0]
        first = min(count, self._room)
        if first:
            self._write(key[:first], value[:first])
        if first == count:
            return True
        size = -(-(count - first) // CHUNK_TOKENS) * CHUNK_TOKENS
        dtype = key.dtype if key.dtype.itemsize == 2 else torch.float16
        if not self._budget.admits(self, 2 * size * key.shape[1] * dtype.itemsize):
            self.drop()
            return False
        new_key, new_value = (torch.empty(size, key.shape[1], dtype=dtype, device=key.device) for _ in range(2))
        self._pieces.append((new_key, new_value))
        self._room = size
        self._write(key[first:], value[first:])
        return True

    def _write(self, key: Tensor, value: Tensor) -> None:
        count = key.shape[0]
        old_key, old_value = self._pieces[-1]
        at = old_key.shape[0] - self._room
        old_key[at : at + count].copy_(key)
        old_value[at : at + count].copy_(value)
        self._room -= count
        self.tokens += count

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens``."""
        self._room += self.tokens - tokens
        self.tokens = tokens
        while self._pieces and self._room >= self._pieces[-1][0].shape[0]:
            self._room -= self._pieces.pop()[0].shape[0]

    def drop(self) -> None:
        """Hold nothing any more."""
        self._pieces, self._room, self.tokens = [], 0, 0

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V ``[tokens, head_dim]`` in float32."""
        key, value = (torch.cat([piece[i].float() for piece in self._pieces])[: self.tokens] for i in range(2))
        return key, value
