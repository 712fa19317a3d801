"""Checksums of pages, a debug mode of the caches: a flipped bit or a page of another is said, not computed with.

A page is written once, so its checksum never changes until it is freed. It is the sum of its 32-bit words, each times
an odd 64-bit number of its own, modulo 2^64: a change within one word changes it for certain, other changes are missed
with a chance of about 2^-32. It finds faults, not forgeries.
"""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from turboattention.errors import IntegrityError
from turboattention.ops.common.cached_kv import HeadGroup
from turboattention.ops.common.paged_kv import PagedGroup

Integrity = Literal["off", "demand", "read"]
"""``demand``: pages are checked by ``verify``; ``read``: also whenever a view is taken."""
INTEGRITIES: tuple[Integrity, ...] = ("off", "demand", "read")
PAGES_AT_ONCE = 4096  # bounds the memory of the products, 16 times that of the pages
SHOWN = 8  # differences named in a message
NONE = -1  # no page: in the copy of the table


@lru_cache(maxsize=16)
def _factors(words: int, device: torch.device) -> Tensor:
    """Odd int64 ``[words]``, always the same."""
    generator = torch.Generator().manual_seed(1)
    low, high = (torch.randint(2**32, (words,), generator=generator) for _ in range(2))
    return ((high << 32) ^ low | 1).to(device)


def checksum(pages: Tensor) -> Tensor:
    """int64 ``[...]`` of uint8 pages ``[..., nbytes]``, nbytes a multiple of 4."""
    words = pages.contiguous().view(torch.int32)
    flat = words.reshape(-1, words.shape[-1])
    factors = _factors(words.shape[-1], pages.device)
    sums = [(part.long() * factors).sum(-1) for part in flat.split(PAGES_AT_ONCE)]
    return (torch.cat(sums) if sums else flat.new_zeros(0, dtype=torch.int64)).view(words.shape[:-1])


def raise_for(found: list[str]) -> None:
    """Raise IntegrityError that names the differences found, if any."""
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise IntegrityError(
            f"pages: expected what was written, received {'; '.join(found[:SHOWN])}{more}; the cache is unusable: free "
            "the sequences named, and look for faulty memory or for code that writes or reuses pages"
        )


def group_differences(group: HeadGroup, sums: Tensor) -> list[str]:
    """Pages of a contiguous cache that are not those whose checksums are ``sums`` ``[batch, heads, pages]``."""
    if sums.shape != group.pages.shape[:-1]:
        return [f"heads {group.heads}: pages {tuple(group.pages.shape[:-1])}, written {tuple(sums.shape)}"]
    return [
        f"row {row}, head {group.heads[head]}, page {page}: other bytes than were written"
        for row, head, page in (checksum(group.pages) != sums).nonzero().tolist()
    ]


class PoolChecksums:
    """What one pool of pages and its table must hold: of each page its sum, of each sequence its pages.

    sums: int64 ``[pages of the pool]``. table: int32 as the group's, NONE where a sequence has no page. Every method
    waits for the device.
    """

    def __init__(self, group: PagedGroup) -> None:
        """group: its pool and table are followed by reference; nothing in them belongs to a sequence yet."""
        self.group = group
        self.sums = checksum(group.pool)
        self.table = torch.full_like(group.table, NONE)

    def written(self, before: Tensor, after: Tensor) -> None:
        """Sequences had ``before`` full pages (int ``[batch]``) and have ``after`` now: the new ones are remembered."""
        column = torch.arange(self.table.shape[2], device=self.table.device)
        new = ((column >= before[:, None]) & (column < after[:, None]))[:, None].expand_as(self.table)
        self.table[new] = self.group.table[new]
        # What lies outside of the pool was not written: the cache's fault bits say so.
        places = self.table[new].long()
        places = places[(places >= 0) & (places < len(self.sums))]
        self.sums[places] = checksum(self.group.pool[places])

    def freed(self, rows: Tensor) -> None:
        """The pages of some sequences are nobody's: who writes them before they are given out again is found."""
        self.table[rows] = NONE

    def differences(self, pages: Tensor) -> list[str]:
        """What is wrong with the table and the pool, sequences having ``pages`` full pages (int ``[batch]``)."""
        found = []
        column = torch.arange(self.table.shape[2], device=self.table.device)
        read = (column < pages[:, None])[:, None].expand_as(self.table)
        heads = self.group.heads
        owned = self.table != NONE
        for row, head, page in (read & ~owned).nonzero().tolist():
            found.append(f"row {row}, head {heads[head]}, page {page}: read, but never written or freed")
        for row, head, page in (owned & ~read).nonzero().tolist():
            found.append(f"row {row}, head {heads[head]}, page {page}: written, but the length ends before it")
        for row, head, page in (owned & read & (self.group.table != self.table)).nonzero().tolist():
            now, then = int(self.group.table[row, head, page]), int(self.table[row, head, page])
            found.append(f"row {row}, head {heads[head]}, page {page}: in place {now} of the pool, written to {then}")
        for place in (checksum(self.group.pool) != self.sums).nonzero().flatten().tolist():
            owners = (self.table == place).nonzero().tolist()
            of = ", ".join(f"row {row}, head {heads[head]}, page {page}" for row, head, page in owners)
            found.append(f"{of or 'a page of nobody'} (place {place}): other bytes than were written")
        return found
