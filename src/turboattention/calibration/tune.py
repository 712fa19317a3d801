"""From sensitivities to a policy: the size whose measured loss meets the target, stepped up or down until it does."""

import math
from collections.abc import Sequence

from turboattention.calibration.allocate import Frontier
from turboattention.calibration.levels import BASE, Choice, cache_bits, policy_of
from turboattention.calibration.result import Point
from turboattention.calibration.session import Session
from turboattention.calibration.target import Target
from turboattention.errors import InvalidInputError, invalid

ROUNDS = 4  # each measures one or two sizes
_FIRST = (0.6, 0.85)  # of the limit: predicted losses to try first
_CLOSE = 0.93  # of the limit: a size that loses so much is small enough
_SAFER = 0.97  # of the guess: half of all guesses would miss the limit


def tune(session: Session, frontier: Frontier, target: Target) -> tuple[Choice, Point]:
    """The smallest measured size that meets the target on the tuning windows; of a target of size, the least loss.

    Raises InvalidInputError for a target out of reach.
    """
    if target.loss is None:
        size = size_of_bits(session, frontier, target.value)
        return frontier.choose(size), _measured(session, frontier, [size])[0]
    seen: dict[int, Point] = {}
    wanted = [target.loss * factor for factor in _FIRST]
    for _ in range(ROUNDS):
        sizes = sorted({frontier.size_for(loss) for loss in wanted} - seen.keys())
        if not sizes:
            break
        seen.update(zip(sizes, _measured(session, frontier, sizes), strict=True))
        if any(target.met(point) and target.loss_seen(point) >= _CLOSE * target.loss for point in seen.values()):
            break
        guess = predicted_at(target.loss, [(frontier.loss(x), target.loss_seen(p)) for x, p in seen.items()])
        wanted = [guess * _SAFER]
    fits = [size for size, point in seen.items() if target.met(point)]
    if not fits:
        best = min(target.loss_seen(point) for point in seen.values())
        raise InvalidInputError(
            f"target: expected a loss that the cache formats can reach, received {target}; the best policy tried loses "
            f"{best:.2g} nats per token, so give a larger one"
        )
    return frontier.choose(min(fits)), seen[min(fits)]


def size_of_bits(session: Session, frontier: Frontier, bits: float) -> int:
    """The largest size whose whole cache, exact tokens and statistics included, has at most so many bits.

    At the length of a held-out window. Raises InvalidInputError below the smallest format.
    """
    shape, tokens = session.shape, session.settings.held_out_tokens

    def held(size: int) -> float:
        return cache_bits(policy_of("", frontier.choose(size), shape), shape, tokens)

    values = shape.layers * shape.kv_heads * 2 * BASE.page_size * shape.head_dim
    low, high = frontier.sizes
    step = max(1, values // 1600)  # 0.005 bits
    for size in range(min(high, math.floor(bits * values / 8)), low - 1, -step):
        if held(size) <= bits:
            return size
    raise invalid("target bits", f"at least {math.ceil(held(low) * 100) / 100:g} for this model", bits)


def predicted_at(limit: float, pairs: Sequence[tuple[float, float]]) -> float:
    """Predicted loss whose measured loss would be ``limit``; pairs: (predicted, measured).

    A line in logarithms between the neighbours of the limit; beyond all of them the ratio of the nearest stays.
    """
    logs = sorted((math.log(max(p, 1e-12)), math.log(max(m, 1e-12))) for p, m in pairs)
    goal = math.log(limit)
    below, above = [x for x in logs if x[1] <= goal], [x for x in logs if x[1] > goal]
    if below and above and below[-1][0] < above[0][0]:
        (x0, y0), (x1, y1) = below[-1], above[0]
        return math.exp(x0 + (goal - y0) * (x1 - x0) / (y1 - y0))
    x, y = below[-1] if below else logs[0]
    return math.exp(x + goal - y)


def _measured(session: Session, frontier: Frontier, sizes: Sequence[int]) -> list[Point]:
    policies = [policy_of(f"{size} bytes", frontier.choose(size), session.shape) for size in sizes]
    rows = session.plan.tuning
    names = [f"tuning window {number}" for number in range(len(rows))]
    return session.measured("tuning", rows, names, [("calibrated", policy) for policy in policies])
