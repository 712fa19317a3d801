"""A whole A/B run: what stays the same, the questions, the result, also when it is cut short."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turboattention.errors import TurboAttentionError
from turboattention.evaluation.environment import environment
from turboattention.serving.analyse import analyse
from turboattention.serving.answer import Side
from turboattention.serving.limits import Limits
from turboattention.serving.prompts import BadLine, Request, fingerprint
from turboattention.serving.result import ABResult
from turboattention.serving.run import OutageError, Progress, ask_all
from turboattention.serving.scores import Score
from turboattention.serving.secrets import Secret
from turboattention.serving.store import DiskError, Store


@dataclass(frozen=True)
class Settings:
    """What both sides share. timeout_s: for a whole answer; concurrency: requests in flight; warm_up: requests."""

    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 4
    timeout_s: float = 120.0
    warm_up: int = 2
    logprobs: bool = True
    score: Score = "contains"


@dataclass(frozen=True)
class Outcome:
    """stopped_by: why the run is partial: KeyboardInterrupt, or an error that the user has to see."""

    result: ABResult
    stopped_by: BaseException | None = None


def run_ab(
    out: Path,
    sides: Sequence[Side],
    requests: Sequence[Request],
    limits: Limits,
    settings: Settings = Settings(),  # frozen
    bad_lines: Sequence[BadLine] = (),
    secrets: tuple[Secret, ...] = (),
    retry_errors: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Ask, keep, compare. A folder ``out`` with a part of the same run is gone on with.

    sides: baseline and candidate.
    Raises TurboAttentionError for what cannot start; an outage, a full disk and Ctrl-C give a partial result.
    """
    kept: dict[str, Any] = {
        "requests": {"sha256": fingerprint(requests), "count": len(requests)},
        **{side.name: side.describe() for side in sides},
        **asdict(settings),
        "limits": asdict(limits),
    }
    stopped: BaseException | None = None
    with Store(out, kept, secrets, retry_errors) as store:
        try:
            store.save_requests(requests)
            asyncio.run(ask_all(store, sides, requests, settings.concurrency, settings.warm_up, progress))
        except (OutageError, DiskError, KeyboardInterrupt) as error:
            stopped = error
        why = "interrupted" if isinstance(stopped, KeyboardInterrupt) else str(stopped or "")
        result = analyse(
            requests, store.answers, limits, _environment(sides), kept | store.found, bad_lines,
            store.remarks, why, settings.score,
        )  # fmt: skip
        try:
            store.save_pairs(requests)
        except TurboAttentionError as error:
            stopped = stopped or error
    return Outcome(result, stopped)


def _environment(sides: Sequence[Side]) -> dict[str, Any]:
    machine = environment()
    if all(side.describe()["kind"] == "endpoint" for side in sides):
        # The servers' own machines are not known; this one only asks.
        return {f"asking machine: {name}": machine[name] for name in ("platform", "cpu", "date")}
    return machine
