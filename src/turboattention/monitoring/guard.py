"""From measurements to alarms, and from alarms to responses."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from turboattention.errors import TurboAttentionError
from turboattention.monitoring.limits import Limit

log = logging.getLogger("turboattention.monitoring")
State = Literal["raised", "cleared"]


@dataclass(frozen=True)
class Change:
    """An alarm that was raised or cleared: the layer's measure, the mean of its last window, the bound it crossed."""

    state: State
    layer: str
    measure: str
    value: float
    bound: float
    windows: int

    @property
    def text(self) -> str:
        """One line for people."""
        where = "all layers" if self.layer == "all" else f"layer {self.layer}"
        side = "above" if self.state == "raised" else "below"
        number = f"{self.windows} window{'s' if self.windows > 1 else ''}"
        return f"{where}: {self.measure} {self.value:.4g}, {number} {side} {self.bound:.4g}: alarm {self.state}"


class Response(Protocol):
    """What follows from a change. May raise TurboAttentionError or OSError: it is then tried again."""

    name: str

    def __call__(self, change: Change) -> None: ...


class Observer(Protocol):
    """Learns what a guard does; `metrics.GuardMetrics` is one."""

    def window(self, layer: str, measure: str, mean: float, raised: bool) -> None: ...

    def forgotten(self, layer: str, measure: str) -> None: ...

    def responded(self, name: str, failed: bool) -> None: ...


@dataclass
class _Watched:
    """A layer's measure: its open window, windows in a row beyond a bound, the alarm."""

    total: float = 0.0
    weight: float = 0.0
    checks: int = 0
    beyond: int = 0
    raised: bool = False


class Guard:
    """Closes windows, raises and clears alarms with hysteresis, runs responses.

    A window is closed once it holds the limit's number of checks, so that quiet layers are judged as surely as busy
    ones. One mean beyond a bound and back again starts the count anew.
    """

    def __init__(
        self, limits: Sequence[Limit], responses: Sequence[Response] = (), observer: Observer | None = None
    ) -> None:
        self.limits = {limit.measure: limit for limit in limits}
        self.responses, self.observer = list(responses), observer
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._failed: list[tuple[Response, Change]] = []
        self.ever_raised = False

    @property
    def alarms(self) -> list[tuple[str, str]]:
        """Layer and measure of each alarm that stands."""
        return [key for key, watched in self._watched.items() if watched.raised]

    def add(self, layer: str, measure: str, total: float, weight: float = 1.0, checks: int = 1) -> list[Change]:
        """Measurements of a layer: their sum, what to divide it by, and how many checks they come from."""
        limit = self.limits.get(measure)
        if limit is None or not weight or not checks:
            return []
        watched = self._watched.setdefault((layer, measure), _Watched())
        watched.total += total
        watched.weight += weight
        watched.checks += checks
        if watched.checks < limit.checks:
            return []
        mean = watched.total / watched.weight
        watched.total, watched.weight, watched.checks = 0.0, 0.0, 0
        change = self._judged(watched, limit, layer, mean)
        if self.observer is not None:
            self.observer.window(layer, measure, mean, watched.raised)
        self.retry()
        if change is not None:
            for response in self.responses:
                self._run(response, change)
        return [change] if change else []

    def _judged(self, watched: _Watched, limit: Limit, layer: str, mean: float) -> Change | None:
        high, low = limit.bounds(layer)
        # Not "mean > high": NaN must count as beyond.
        beyond = mean < low or mean == low == 0.0 if watched.raised else not mean <= high
        watched.beyond = watched.beyond + 1 if beyond else 0
        needed = limit.clear_after if watched.raised else limit.raise_after
        if watched.beyond < needed:
            return None
        watched.raised, watched.beyond = not watched.raised, 0
        self.ever_raised |= watched.raised
        state: State = "raised" if watched.raised else "cleared"
        return Change(state, layer, limit.measure, mean, high if watched.raised else low, needed)

    def forget(self, layer: str) -> None:
        """Judge a layer anew: windows and alarms of it are gone."""
        for key in [key for key in self._watched if key[0] == layer]:
            del self._watched[key]
            if self.observer is not None:
                self.observer.forgotten(*key)

    def retry(self) -> None:
        """Try responses again that failed."""
        waiting, self._failed = self._failed, []
        for response, change in waiting:
            self._run(response, change)

    @property
    def unanswered(self) -> int:
        """Responses that failed and wait for `retry`."""
        return len(self._failed)

    def _run(self, response: Callable[[Change], None], change: Change) -> None:
        name = str(getattr(response, "name", response))
        try:
            response(change)
        except (TurboAttentionError, OSError) as error:
            log.error("%s failed and will be tried again: %s", name, " ".join(str(error).split()))
            self._failed.append((response, change))  # type: ignore[arg-type]  # a Response, seen as what it does
        if self.observer is not None:
            failed = any(kept is response and of is change for kept, of in self._failed)
            self.observer.responded(name, failed)
