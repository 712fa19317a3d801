"""The first thing that breaks as bits go down."""

from collections.abc import Callable, Sequence

from turboattention.calibration.result import Break, Point, Retrieval

KL_LIMIT = 0.01  # nats per token, where the target says none
TOP1_LIMIT = 0.95
RETRIEVAL_LOSS = 0.10  # share of codes found with 16 bits and lost


def find_breaks(
    points: Sequence[Point], loss: float | None, retrieval: Sequence[Retrieval], exact: Retrieval | None
) -> list[Break]:
    """For each measure the calibrated size with the most bits beyond its limit; the first break stands first."""
    limit = KL_LIMIT if loss is None else loss
    sizes = [x for x in points if x.kind in ("chosen", "calibrated")]
    found = [
        _first("KL, nats per token", limit, sizes, lambda x: x.kl),
        *(_first(f"KL of {name}", limit, sizes, _of_text(name)) for name in sizes[0].kl_by_text),
        _first("KL of the last quarter of a window", limit, sizes, _late),
        _first("share of changed top tokens", 1 - TOP1_LIMIT, sizes, lambda x: 1 - x.top1_agreement),
    ]
    if exact is not None:
        bits = {x.name for x in sizes}
        lost = [(x.bits_per_value, exact.exact - x.exact) for x in retrieval if x.name in bits]
        beyond = max(((b, v) for b, v in lost if v > RETRIEVAL_LOSS), default=(None, None))
        found.append(Break("share of secret codes lost", RETRIEVAL_LOSS, *beyond))
    return sorted(found, key=lambda x: -1.0 if x.bits_per_value is None else x.bits_per_value, reverse=True)


def _first(measure: str, limit: float, points: Sequence[Point], value: Callable[[Point], float]) -> Break:
    beyond = [x for x in points if value(x) > limit]
    if not beyond:
        return Break(measure, limit, None, None)
    worst = max(beyond, key=lambda x: x.bits_per_value)
    return Break(measure, limit, worst.bits_per_value, value(worst))


def _of_text(name: str) -> Callable[[Point], float]:
    return lambda point: point.kl_by_text[name]


def _late(point: Point) -> float:
    curve = point.kl_by_position.y
    tail = curve[-max(1, len(curve) // 4) :]
    return sum(tail) / len(tail)
