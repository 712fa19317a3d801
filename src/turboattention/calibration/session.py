"""What the steps of one calibration share: model, tokens, settings, and the state in which finished work is kept."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from turboattention.calibration.measure import Progress, measure, point_from_dict
from turboattention.calibration.plan import make_plan
from turboattention.calibration.result import Kind, Point
from turboattention.calibration.settings import Settings
from turboattention.calibration.state import State, fingerprint
from turboattention.errors import UnsupportedError
from turboattention.integrations.models import LoadedModel
from turboattention.integrations.transformers import TurboCache, model_shape
from turboattention.policy import Policy


class Session:
    """One calibration; `state` decides what is left to do.

    Results are named by everything that decides them, so that other targets and settings use what fits them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        texts: Sequence[str | Path],
        held_out: Sequence[str | Path],
        settings: Settings,
        state: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.loaded, self.model, self.settings, self.progress = loaded, loaded.model, settings, progress
        self.shape = model_shape(self.model.config)
        cache = TurboCache(self.model.config, "turbo4")
        if others := len(cache.layers) - len(cache.turbo_layers):
            raise UnsupportedError(
                f"{type(self.model).__name__}: {others} layers with a sliding window keep their own cache; calibration "
                "needs full attention in every layer"
            )
        self.plan = make_plan(
            loaded.tokenizer, texts, held_out, settings.tokens, settings.window, settings.held_out_tokens,
            loaded.context_length,
        )  # fmt: skip
        self.state = State(state, fingerprint([loaded.name, asdict(self.shape), str(self.model.dtype)]))
        self.seconds: dict[str, float] = {}
        if self.state.get("seconds") is not None:
            self.seconds = self.state.read("seconds", lambda x: {str(name): float(s) for name, s in x.items()})

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds of a step, over all runs that shared the state."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.state.put("seconds", self.seconds)

    def tell(self, done: int, total: int, label: str) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(done, total, label)

    def labelled(self, label: str) -> Progress:
        """Progress of a part under one name."""
        return lambda done, total, _: self.tell(done, total, label)

    def measured(
        self, label: str, rows: Tensor, names: Sequence[str], policies: Sequence[tuple[Kind, Policy]]
    ) -> list[Point]:
        """`measure`, but for what the state already has."""
        seed = self.settings.seed
        read = fingerprint([rows.tolist(), list(names), seed])
        keys = [f"{label} {read} {kind} {policy.name} {fingerprint(asdict(policy))}" for kind, policy in policies]
        missing = [number for number, key in enumerate(keys) if self.state.get(key) is None]
        if missing:
            with self.timed(label):
                chosen = [policies[i] for i in missing]
                fresh = measure(self.model, rows, names, chosen, seed, self.labelled(label))
            for number, point in zip(missing, fresh, strict=True):
                self.state.put(keys[number], asdict(point))
        return [self.state.read(key, point_from_dict) for key in keys]
