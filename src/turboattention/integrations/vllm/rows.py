"""Which row of the open-page pool belongs to each sequence of a batch."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from turboattention.errors import UnsupportedError
from turboattention.integrations.vllm.settings import PAGE_TOKENS


class Assigned(NamedTuple):
    """row: of the pool. source: the row that holds the query statistics of the tokens before, or None."""

    row: int
    source: int | None


class RowMap:
    """Rows for a runner that does not say which request a sequence is (vLLM's older one, on CPUs).

    A block that is partly filled belongs to one sequence, so its number is the key. A row whose blocks have been given
    to others is found by age; a lost open page is an error, never another sequence's content.
    """

    def __init__(self, rows: int, drafts: int = 0) -> None:
        """drafts: tokens of a step that may be taken back."""
        self._drafts = drafts
        self._row_of_block: dict[int, int] = {}
        self._blocks_of_row: dict[int, set[int]] = {}
        self._by_age: OrderedDict[int, None] = OrderedDict.fromkeys(range(rows))  # oldest first

    def assign(self, before: Sequence[int], after: Sequence[int], tables: Sequence[Sequence[int]]) -> list[Assigned]:
        """Rows of a batch for one step.

        before, after: tokens of each sequence before and after the step. tables: its blocks.
        Raises UnsupportedError when a sequence's open page has been given away.
        """
        found: list[Assigned | None] = []
        for tokens, table in zip(before, tables, strict=True):
            row = self._row_of_block.get(table[(tokens - 1) // PAGE_TOKENS]) if tokens else None
            if tokens % PAGE_TOKENS == 0:
                found.append(None)
                continue
            if row is None:
                raise UnsupportedError("open-page pool: too few rows for the sequences that wait; lower max_num_seqs")
            self._by_age.move_to_end(row)
            found.append(Assigned(row, row))
        taken = {entry.row for entry in found if entry}
        result = []
        for entry, tokens, end, table in zip(found, before, after, tables, strict=True):
            if entry is None:
                # A full page is nobody's alone: a new row, with the statistics of whoever filled that page.
                source = self._row_of_block.get(table[(tokens - 1) // PAGE_TOKENS]) if tokens else None
                row = next(row for row in self._by_age if row not in taken and row != source)
                taken.add(row)
                self._by_age.move_to_end(row)
                entry = Assigned(row, source)
            # After drafts that are taken back the sequence goes on from an earlier block.
            first = max(tokens, end - 1 - self._drafts)
            self._own(entry.row, table[first // PAGE_TOKENS : max(end - 1, first) // PAGE_TOKENS + 1])
            result.append(entry)
        return result

    def _own(self, row: int, blocks: Sequence[int]) -> None:
        for old in self._blocks_of_row.get(row, ()):
            if self._row_of_block.get(old) == row:
                del self._row_of_block[old]
        self._blocks_of_row[row] = set(blocks)
        self._row_of_block.update(dict.fromkeys(blocks, row))
