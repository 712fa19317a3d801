"""Which steps are checked and which heads are watched: decided by a seed alone, so that a run can be repeated."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

_MASK = (1 << 64) - 1


def _mixed(number: int) -> int:
    """SplitMix64's finaliser: a bijection of 64-bit numbers that looks random."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


@dataclass(frozen=True)
class Sampler:
    """Takes each unit with probability ``share``, whatever was asked before: a hash of seed and unit decides.

    So all layers of a step agree without talking to each other, and torch's random numbers are not touched.
    """

    share: float
    seed: int = 0

    def takes(self, *unit: int) -> bool:
        """Whether the unit (request number, step number) is in the sample."""
        state = _mixed(self.seed)
        for number in unit:
            state = _mixed(state ^ (number & _MASK))
        return state < self.share * 2.0**64


class Rotation:
    """Turns of heads (layer, head): each comes once before any comes twice, in an order that the seed decides.

    Heads of a layer follow each other: a request then watches few layers, and most of what keeping costs is that the
    code of a layer's first head is not in the processor's cache.
    """

    def __init__(self, items: Sequence[tuple[int, int]], seed: int = 0) -> None:
        self._items, self._random = list(items), random.Random(seed)
        self._waiting: list[tuple[int, int]] = []

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next ``count`` distinct items, fewer where there are not so many."""
        taken: list[tuple[int, int]] = []
        while len(taken) < min(count, len(self._items)):
            # Where one order ends and the next begins, an item already taken waits for the next turn.
            index = next((i for i, item in enumerate(self._waiting) if item not in taken), None)
            if index is None:
                self._waiting += self._shuffled()
            else:
                taken.append(self._waiting.pop(index))
        return taken

    def _shuffled(self) -> list[tuple[int, int]]:
        items = self._random.sample(self._items, len(self._items))
        layers = list(dict.fromkeys(layer for layer, _ in items))
        return sorted(items, key=lambda item: layers.index(item[0]))
