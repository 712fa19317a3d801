"""Everything that the report says of a policy, from held-out text alone."""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from turboattention.calibration.allocate import Frontier, papers_rule
from turboattention.calibration.bounds import head_bound
from turboattention.calibration.capture import capturing
from turboattention.calibration.levels import cache_bits, policy_of
from turboattention.calibration.observe import LayerStatistics
from turboattention.calibration.result import HeadError, Kind, Point, Retrieval
from turboattention.calibration.session import Session
from turboattention.calibration.state import fingerprint
from turboattention.calibration.tune import size_of_bits
from turboattention.errors import InvalidInputError
from turboattention.evaluation.retrieval import needle_score
from turboattention.policy import Policy

OTHER_SIZES = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0)  # bits per value of the curve beside the chosen policy
UNIFORM = ("turbo4", "turbo3", "turbo2")
OTHER_PRESETS: tuple[tuple[Kind, str], ...] = (
    ("paper", "paper4"), ("paper", "paper3"), ("kivi", "kivi4"), ("kivi", "kivi2"),
)  # fmt: skip
EXACT = "16-bit"


def other_sizes(session: Session, frontier: Frontier) -> list[Policy]:
    """The same allocation at the other sizes that this model can have; none without ``settings.curve``."""
    found = []
    for bits in OTHER_SIZES if session.settings.curve else ():
        try:
            size = size_of_bits(session, frontier, bits)
        except InvalidInputError:  # fewer bits than the smallest format
            continue
        found.append(policy_of(f"calibrated {bits:g}", frontier.choose(size), session.shape))
    return found


def held_out_points(
    session: Session, policy: Policy, others: Sequence[Policy], statistics: Sequence[LayerStatistics]
) -> list[Point]:
    """The chosen policy first, then what it is compared with."""
    policies: list[tuple[Kind, Policy]] = [("chosen", policy)]
    policies += [("uniform", Policy.from_preset(name)) for name in UNIFORM]
    policies += [("calibrated", other) for other in others]
    if session.settings.curve:
        rule = papers_rule(statistics, session.shape)
        policies.append(("rule", policy_of("paper's rule, our formats", rule, session.shape)))
        policies += [(kind, Policy.from_preset(name)) for kind, name in OTHER_PRESETS]
    return session.measured("held-out text", session.plan.held_out, session.plan.held_out_names, policies)


def retrieval(session: Session, policy: Policy, others: Sequence[Policy]) -> list[Retrieval]:
    """Secret codes found with 16 bits, the chosen policy, its other sizes and the uniform presets."""
    length = session.settings.needles
    if not length:
        return []
    tested: list[Policy | None] = [None, policy, *others, *map(Policy.from_preset, UNIFORM)]
    found = []
    for number, chosen in enumerate(tested):
        session.tell(number, len(tested), "secret codes")
        name = EXACT if chosen is None else chosen.name
        key = f"needles {length} {name} {'' if chosen is None else fingerprint(asdict(chosen))}"
        if session.state.get(key) is None:
            with session.timed("secret codes"):
                score = needle_score(session.model, session.loaded.tokenizer, chosen, length)
            bits = 16.0 if chosen is None else cache_bits(chosen, session.shape, length // 64 * 64)
            session.state.put(key, [bits, score.exact, score.gold_nll])
        found.append(Retrieval(name, *session.state.read(key, lambda values: list(map(float, values)))))
    return found


def head_errors(session: Session, policy: Policy) -> list[HeadError]:
    """Bound and error of every head, on the beginning of the first held-out text."""
    window = session.plan.held_out[:1, : session.settings.window].to(session.model.device)
    with torch.inference_mode(), capturing(session.model) as layers:
        session.model(input_ids=window, use_cache=False)
        return [
            HeadError(layer, head, *head_bound(captured, head, *formats)[:2])
            for layer, captured in sorted(layers.items())
            for head, formats in enumerate(policy.head_formats(layer, session.shape.kv_heads))
        ]
