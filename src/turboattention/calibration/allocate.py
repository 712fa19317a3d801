"""Which level each unit gets: the cheapest policy for a loss, or the least loss for a size.

One option of every group (a head of a layer, or a whole layer where an engine needs equal pages) is chosen, a pair of
levels of K and V: a multiple-choice knapsack. Costs are whole numbers of the page alignment, so that dynamic
programming solves it exactly for every size at once. Losses are taken to add up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from turboattention.calibration.levels import PLAIN_LEVELS, Choice, Unit, page_bytes, uniform
from turboattention.calibration.observe import LayerStatistics
from turboattention.calibration.sensitivity import Table
from turboattention.errors import invalid
from turboattention.policy import ModelShape
from turboattention.quant.progressive import low_priority_heads

Granularity = Literal["head", "layer"]


@dataclass(frozen=True)
class Option:
    """A pair of levels of a group: bytes of one page of each of its heads, and its loss in nats per token."""

    key: str
    value: str
    cost: int
    loss: float


def options(
    table: Table, shape: ModelShape, per: Granularity = "head"
) -> dict[tuple[tuple[int, int], ...], list[Option]]:
    """The options of each group of heads ``((layer, head), ...)``, those alone that no other beats, cheapest first."""
    costs = page_bytes(shape.head_dim)
    heads = [(layer, head) for layer in range(shape.layers) for head in range(shape.kv_heads)]
    groups = [(x,) for x in heads] if per == "head" else [
        tuple((layer, head) for head in range(shape.kv_heads)) for layer in range(shape.layers)
    ]  # fmt: skip
    found: dict[tuple[tuple[int, int], ...], list[Option]] = {}
    for group in groups:
        everything = [
            Option(
                key, value, len(group) * cost,
                sum(table[Unit(*x, "key")][key] + table[Unit(*x, "value")][value] for x in group),
            )
            for (key, value), cost in costs.items()
        ]  # fmt: skip
        found[group] = _undominated(everything)
    return found


def _undominated(everything: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(everything, key=lambda x: (x.cost, x.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


class Frontier:
    """The least loss for every size."""

    def __init__(self, groups: Mapping[tuple[tuple[int, int], ...], Sequence[Option]]) -> None:
        """groups: options of each group, cheapest first, from `options`."""
        self._groups = list(groups.items())
        self._least = sum(found[0].cost for _, found in self._groups)
        extra = [[option.cost - found[0].cost for option in found] for _, found in self._groups]
        self._step = math.gcd(*(x for row in extra for x in row)) or 1
        self._extra = [[x // self._step for x in row] for row in extra]
        room = sum(row[-1] for row in self._extra)
        best = np.zeros(room + 1)
        self._picked: list[np.ndarray] = []
        for (_, found), row in zip(self._groups, self._extra, strict=True):
            new = np.full(room + 1, np.inf)
            picked = np.zeros(room + 1, dtype=np.uint8)
            for number, (option, cost) in enumerate(zip(found, row, strict=True)):
                loss = np.full(room + 1, np.inf)
                loss[cost:] = best[: room + 1 - cost] + option.loss
                better = loss < new
                new[better], picked[better] = loss[better], number
            best = new
            self._picked.append(picked)
        self._loss = best

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of one page of every head: the fewest and the most that can be had."""
        return self._least, self._least + self._step * (len(self._loss) - 1)

    def loss(self, size: int) -> float:
        """Least loss with at most ``size`` bytes for one page of every head."""
        return float(self._loss[self._place(size)])

    def choose(self, size: int) -> Choice:
        """The choice with that loss."""
        place = self._place(size)
        choice: dict[tuple[int, int], tuple[str, str]] = {}
        for number in reversed(range(len(self._groups))):
            group, found = self._groups[number]
            picked = int(self._picked[number][place])
            place -= self._extra[number][picked]
            choice.update(dict.fromkeys(group, (found[picked].key, found[picked].value)))
        return choice

    def size_for(self, loss: float) -> int:
        """The fewest bytes whose loss is at most ``loss``; the most bytes where none is."""
        fits = np.flatnonzero(self._loss <= loss)
        return self._least + self._step * (int(fits[0]) if len(fits) else len(self._loss) - 1)

    def _place(self, size: int) -> int:
        if size < self._least:
            raise invalid("size", f"at least {self._least} bytes for a page of every head", size)
        return min((size - self._least) // self._step, len(self._loss) - 1)


def size_of(choice: Choice, head_dim: int) -> int:
    """Bytes of one page of every head."""
    costs = page_bytes(head_dim)
    return sum(costs[pair] for pair in choice.values())


def loss_of(choice: Choice, table: Table) -> float:
    """Predicted KL of a choice in nats per token."""
    return sum(
        table[Unit(layer, head, "key")][key] + table[Unit(layer, head, "value")][value]
        for (layer, head), (key, value) in choice.items()
    )


def papers_rule(
    statistics: Sequence[LayerStatistics], shape: ModelShape, high: str = "4", low: str = "2", share: float = 0.5
) -> Choice:
    """Heads of the lowest gap x deviation of a layer at ``low``, K and V apart (arXiv 2412.08585); others ``high``."""
    if not {high, low} <= set(PLAIN_LEVELS):
        raise invalid("levels", f"two of {', '.join(PLAIN_LEVELS)}", f"{high} and {low}")
    choice = dict(uniform(high, high, shape))
    for layer, seen in enumerate(statistics):
        lowered = [set(low_priority_heads(x.priority, share)) for x in (seen.key, seen.value)]
        for head in range(shape.kv_heads):
            key, value = (low if head in heads else high for heads in lowered)
            choice[layer, head] = (key, value)
    return choice
