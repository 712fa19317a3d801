"""The frontier is the best there is, and the other allocators do what they say."""

import itertools
import random

import pytest
import torch

from turboattention.calibration.allocate import Frontier, Option, loss_of, options, papers_rule, size_of
from turboattention.calibration.levels import TENSORS, Unit, levels, page_bytes
from turboattention.calibration.observe import LayerStatistics
from turboattention.calibration.sensitivity import Table
from turboattention.errors import InvalidInputError
from turboattention.policy import ModelShape

SHAPE = ModelShape("llama", 2, 2, 64)


def table(seed: int = 0) -> Table:
    generator = random.Random(seed)
    return {
        Unit(layer, head, tensor): {
            level: generator.uniform(0.1, 10.0) * 4.0 ** -(fmt.bits + fmt.refined_bits * fmt.refined_share)
            for level, fmt in levels(tensor, 64).items()
        }
        for layer in range(2)
        for head in range(2)
        for tensor in TENSORS
    }


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_is_better_than_the_frontier(seed: int) -> None:
    generator = random.Random(seed)
    groups = {}
    for number in range(4):
        costs = sorted(generator.sample(range(3, 40), 4))
        losses = sorted((generator.random() for _ in costs), reverse=True)
        groups[((number, 0),)] = [
            Option(str(i), "v", 128 * cost, loss) for i, (cost, loss) in enumerate(zip(costs, losses, strict=True))
        ]
    frontier = Frontier(groups)
    everything = [
        (sum(x.cost for x in picked), sum(x.loss for x in picked)) for picked in itertools.product(*groups.values())
    ]
    low, high = frontier.sizes
    assert (low, high) == (min(c for c, _ in everything), max(c for c, _ in everything))
    for size in range(low, high + 200, 77):
        best = min(loss for cost, loss in everything if cost <= size)
        assert frontier.loss(size) == pytest.approx(best)
        choice = frontier.choose(size)
        picked = [groups[(x,)][int(pair[0])] for x, pair in choice.items()]
        assert sum(x.cost for x in picked) <= size
        assert sum(x.loss for x in picked) == pytest.approx(best)
    wanted = everything[len(everything) // 2][1]
    assert frontier.loss(frontier.size_for(wanted)) <= wanted
    with pytest.raises(InvalidInputError, match=r"^size: expected at least"):
        frontier.loss(low - 1)


@pytest.mark.parametrize("per", ["head", "layer"])
def test_sizes_and_losses_of_choices(per: str) -> None:
    losses = table()
    frontier = Frontier(options(losses, SHAPE, per))  # type: ignore[arg-type]
    low, high = frontier.sizes
    assert low == 4 * min(page_bytes(64).values())
    for size in (low, (low + high) // 2, high):
        choice = frontier.choose(size)
        assert size_of(choice, 64) <= size
        assert loss_of(choice, losses) == pytest.approx(frontier.loss(size))
        if per == "layer":
            assert all(choice[layer, 0] == choice[layer, 1] for layer in range(2))
    assert frontier.loss(low) > frontier.loss(high)


def test_the_papers_rule_lowers_half_of_the_heads() -> None:
    wide = torch.linspace(1, 5, 64)
    statistics = []
    for order in ((1.0, 3.0), (3.0, 1.0)):
        seen = LayerStatistics.empty(4, 2, 64)
        x = torch.randn(1, 2, 50, 64) * wide * torch.tensor(order)[:, None, None]
        seen.update(torch.randn(1, 4, 50, 64), x, x.flip(1))
        statistics.append(seen)
    choice = papers_rule(statistics, SHAPE)
    assert choice[0, 0] == ("2", "4")
    assert choice[0, 1] == ("4", "2")
    assert choice[1, 0] == ("4", "2")
    assert choice[1, 1] == ("2", "4")
