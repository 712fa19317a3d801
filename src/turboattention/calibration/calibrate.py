"""Find the cheapest policy that meets a target, and measure on held-out text what it costs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from turboattention.calibration.allocate import Frontier, loss_of, options
from turboattention.calibration.breaks import find_breaks
from turboattention.calibration.capture import score_gradients
from turboattention.calibration.levels import Choice, policy_of
from turboattention.calibration.measure import Progress, error_by_depth
from turboattention.calibration.observe import LayerStatistics
from turboattention.calibration.result import CalibrationResult, LayerBits, ProbeResult
from turboattention.calibration.safe_zone import EXACT, head_errors, held_out_points, other_sizes, retrieval
from turboattention.calibration.sensitivity import (
    Table,
    add,
    chosen_probes,
    measured,
    spearman,
    table_from_json,
    table_per_token,
    table_to_json,
    window_estimates,
)
from turboattention.calibration.session import Session
from turboattention.calibration.settings import Settings
from turboattention.calibration.state import fingerprint
from turboattention.calibration.target import Target
from turboattention.calibration.tune import tune
from turboattention.evaluation.environment import environment
from turboattention.evaluation.texts import BUNDLED_TEXTS, text_name
from turboattention.integrations.models import LoadedModel, load_model
from turboattention.integrations.packaged_models import DEFAULT_MODEL
from turboattention.policy import ModelShape, Policy

_SEEDS = 1_000_003  # between the seeds of windows of neighbouring runs
PROBE_TOKENS = 384  # of a tuning window, for the measured sensitivities
DEPTH_TOKENS = 512  # of the first held-out text


class Calibration(NamedTuple):
    """A policy and how it was found."""

    policy: Policy
    result: CalibrationResult


def calibrate(
    model: LoadedModel | str | Path = DEFAULT_MODEL,
    texts: Sequence[str | Path] = BUNDLED_TEXTS,
    target: str | Target = "max-kl=0.01",
    held_out: Sequence[str | Path] = (),
    settings: Settings | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """The cheapest policy of this model that meets ``target`` on calibration text, measured on held-out text.

    model: a loaded model, or what ``load_model`` takes (then in float32 on the CPU).
    texts, held_out: names of bundled texts or paths; without held-out texts the beginning of each text is held out.
    target: ``max-kl=``, ``max-ppl-increase=`` or ``bits=``.
    state: a file to keep finished steps in; a run with the same arguments goes on from it.
    progress: called with steps done, steps in all and the name of the step.
    Raises UnsupportedError for models that can't be calibrated, InvalidInputError for a target out of reach.
    """
    settings = settings or Settings()
    goal = Target.parse(target) if isinstance(target, str) else target
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    session = Session(loaded, texts, held_out, settings, state, progress)

    table, statistics = sensitivities(session)
    probes = _probes(session, table)
    frontier = Frontier(options(table, session.shape, settings.per))
    choice, tuning = tune(session, frontier, goal)
    policy = policy_of(f"calibrated {goal}", choice, session.shape)

    others = other_sizes(session, frontier)
    points = held_out_points(session, policy, others, statistics)
    found = retrieval(session, policy, others)
    with session.timed("errors by depth and head"):
        depth = error_by_depth(session.model, session.plan.held_out[:1, :DEPTH_TOKENS], policy)
        heads = head_errors(session, policy)
    result = CalibrationResult(
        environment=environment(session.model.dtype, session.model.device),
        model=loaded.name,
        texts=[text_name(x) for x in texts],
        held_out=session.plan.held_out_names,
        tokens=(len(session.plan.sensitivity) + len(session.plan.tuning)) * settings.window,
        held_out_tokens=settings.held_out_tokens,
        target=str(goal),
        per=settings.per,
        seed=settings.seed,
        predicted_kl=loss_of(choice, table),
        tuning=tuning,
        points=points,
        within_target=goal.met(points[0]),
        layers=_layer_bits(policy, choice, table, session.shape),
        probes=probes,
        spearman=spearman([x.estimated for x in probes], [x.measured for x in probes]) if len(probes) > 1 else None,
        depth=depth,
        heads=heads,
        retrieval=found,
        retrieval_tokens=settings.needles,
        breaks=find_breaks(points, goal.loss, found, next((x for x in found if x.name == EXACT), None)),
        seconds=session.seconds,
    )
    return Calibration(replace(policy, provenance=_provenance(result)), result)


def sensitivities(session: Session) -> tuple[Table, list[LayerStatistics]]:
    """Estimates in nats per token and statistics of Q, K and V, in one pass over the windows.

    The draws of a window follow from its number, so that a run that was stopped finds the same.
    """
    windows = session.plan.sensitivity[:, :-1]
    key = f"sensitivity by channel {fingerprint([windows.tolist(), session.settings.seed])}"
    done, sums, statistics = 0, Table(), list[LayerStatistics]()
    if session.state.get(key) is not None:
        done, sums, statistics = session.state.read(key, _saved)
    for number in range(done, len(windows)):
        session.tell(number, len(windows), "sensitivities")
        with session.timed("sensitivities"):
            generator = torch.Generator().manual_seed(session.settings.seed * _SEEDS + number)
            window = windows[number : number + 1].to(session.model.device)
            layers = [captured for _, captured in sorted(score_gradients(session.model, window, generator).items())]
            sizes = [(x.query.shape[1], x.key.shape[1], x.key.shape[3]) for x in layers]
            statistics = statistics or [LayerStatistics.empty(*size) for size in sizes]
            for seen, captured in zip(statistics, layers, strict=True):
                seen.update(captured.query, captured.key, captured.value)
            add(sums, window_estimates(dict(enumerate(layers))))
        session.state.put(key, {
            "windows": number + 1, "sums": table_to_json(sums), "statistics": [x.to_dict() for x in statistics],
        })  # fmt: skip
    return table_per_token(sums, windows.numel()), statistics


def _saved(data: Any) -> tuple[int, Table, list[LayerStatistics]]:
    statistics = [LayerStatistics.from_dict(x) for x in data["statistics"]]
    return int(data["windows"]), table_from_json(data["sums"]), statistics


def _probes(session: Session, table: Table) -> list[ProbeResult]:
    """Some estimates beside their measurement on the beginning of a tuning window."""
    if not session.settings.probes:
        return []
    chosen = chosen_probes(table, session.settings.probes, session.settings.seed)
    rows = session.plan.tuning[:1, : PROBE_TOKENS + 1]
    key = f"probes {fingerprint([rows.tolist(), [(str(unit), level) for unit, level in chosen]])}"
    if session.state.get(key) is None:
        with session.timed("probes"):
            fresh = measured(session.model, rows, chosen, session.shape, session.labelled("probes"))
        session.state.put(key, fresh)
    values = session.state.read(key, lambda found: [float(x) for x in found])
    return [
        ProbeResult(str(unit), level, table[unit][level], value)
        for (unit, level), value in zip(chosen, values, strict=True)
    ]


def _layer_bits(policy: Policy, choice: Choice, table: Table, shape: ModelShape) -> list[LayerBits]:
    total = loss_of(choice, table) or 1.0
    found = []
    for layer in range(shape.layers):
        formats = policy.head_formats(layer, shape.kv_heads)
        key = sum(k.bits + k.refined_bits * k.refined_share for k, _ in formats) / len(formats)
        value = sum(v.bits for _, v in formats) / len(formats)
        loss = loss_of({x: levels for x, levels in choice.items() if x[0] == layer}, table)
        found.append(LayerBits(layer, key, value, loss / total))
    return found


def _provenance(result: CalibrationResult) -> dict[str, object]:
    measured_on = result.chosen
    return {
        "target": result.target,
        "model": result.model,
        "texts": result.texts,
        "tokens": result.tokens,
        "seed": result.seed,
        "held_out": result.held_out,
        "held_out_tokens": result.held_out_tokens,
        "kl": measured_on.kl,
        "added_nats": measured_on.added_nats,
        "bits_per_value": measured_on.bits_per_value,
    }
