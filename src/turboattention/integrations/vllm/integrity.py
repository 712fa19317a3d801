"""Checksums of the pages in vLLM's blocks, a debug mode: what a step reads must be what an earlier step has written."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboattention.integrations.vllm.settings import PAGE_TOKENS
from turboattention.kvcache.integrity import checksum, raise_for

if TYPE_CHECKING:
    from turboattention.integrations.vllm.metadata import Lengths, TurboMetadata  # imports vLLM


class BlockChecksums:
    """Of one layer. Every method waits for the device, so no part of it can be in a CUDA graph."""

    def __init__(self, nbytes: int, every: int) -> None:
        """nbytes: of a page. every: steps from one verification to the next."""
        self._nbytes, self._every, self._steps = nbytes, every, 0
        self._sums: Tensor | None = None  # int64 [pages of the pool], made with the first page
        self._known: Tensor | None = None  # bool [pages of the pool], which have been written

    def verify(self, name: str, kv_cache: Tensor, meta: "TurboMetadata") -> None:
        """Before a step: raise IntegrityError unless all full pages of its sequences hold what was written.

        name: of the layer. kv_cache: as in `OpenPages.view`.
        """
        self._steps += 1
        if self._steps % self._every:
            return
        pool, found = kv_cache.view(torch.uint8).view(-1, self._nbytes), []
        for numbers in _parts(meta):
            read = _pages(numbers, torch.zeros_like(numbers.before), numbers.before)
            places = numbers.table[read].long()
            if not len(places):
                continue
            if self._sums is None or self._known is None:
                wrong = torch.ones_like(places, dtype=torch.bool)
            else:
                wrong = ~self._known[places] | (checksum(pool[places]) != self._sums[places])
            for index, place in zip(read.nonzero()[wrong].tolist(), places[wrong].tolist(), strict=True):
                heads = numbers.table.shape[1]
                found.append(
                    f"{name}, block {place // heads}, head {index[1]}, tokens {index[2] * PAGE_TOKENS} to "
                    f"{(index[2] + 1) * PAGE_TOKENS - 1}: other bytes than were written"
                )
        raise_for(found)

    def written(self, kv_cache: Tensor, meta: "TurboMetadata") -> None:
        """After a step: remember the pages that are full now; drafts that fill one may do so again."""
        pool = kv_cache.view(torch.uint8).view(-1, self._nbytes)
        if self._sums is None or self._known is None:
            self._sums = torch.zeros(len(pool), dtype=torch.int64, device=pool.device)
            self._known = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
        for numbers in _parts(meta):
            places = numbers.table[_pages(numbers, numbers.before, numbers.after)].long()
            self._sums[places] = checksum(pool[places])
            self._known[places] = True


def _parts(meta: "TurboMetadata") -> Iterator["Lengths"]:
    yield meta.decoding
    if meta.prefilling is not None:
        yield meta.prefilling


def _pages(numbers: "Lengths", before: Tensor, after: Tensor) -> Tensor:
    """bool as the table, pages that are full with ``after`` tokens and are not with ``before``."""
    column = torch.arange(numbers.table.shape[2], device=numbers.table.device)
    first, last = before // PAGE_TOKENS, after // PAGE_TOKENS
    return ((column >= first[:, None]) & (column < last[:, None]))[:, None].expand_as(numbers.table)
