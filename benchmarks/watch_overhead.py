"""What a watch costs a decode step: keeping exact K and V of a few heads always, a check in a sampled share of steps.

    python benchmarks/watch_overhead.py --model smollm2-135m --context 1024 --context 4096 \
        --out benchmarks/results/watch_overhead.csv
    python benchmarks/watch_overhead.py --model qwen2.5-coder-1.5b --context 4096 --context 32768 --device cuda \
        --dtype bfloat16 --out benchmarks/results/watch_overhead.csv

Three requests of one process take turns, block by block: without a watch, with one that never checks, and with one
that checks every step. On a CPU (one thread) it is the processor time of the thread inside of the watch's calls,
because whole steps differ by more than that from block to block where other programs run; on a GPU the wall clock
around blocks that end with a synchronisation. One row for each context:

step_ms        median time of a step without a watch
keep, check    what keeping and what a check add to a step, as a share of it
overhead       keep + SHARE * check: what the watch costs at that share
by             ``calls``: inside of the watch's calls; ``steps``: the difference of whole steps
"""

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

import turboattention as ta
from turboattention.evaluation.environment import environment
from turboattention.evaluation.texts import load_text
from turboattention.integrations.models import load_model
from turboattention.integrations.transformers import Enabled, TurboCache
from turboattention.integrations.transformers_watch import watch
from turboattention.monitoring.settings import WatchSettings

COLUMNS = (
    "model", "preset", "context", "heads", "share", "by", "step_ms", "keep", "check", "overhead", "steps", "rounds",
    "device", "torch", "transformers", "dtype", "threads", "date",
)  # fmt: skip
NEVER = 1e-15


class Clock:
    """Seconds of work: processor time of this thread, or wall time of a GPU that has finished."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.inside = 0.0  # spent in calls of the watch

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time added to `inside`."""

        def counted(*arguments: Any, **more: Any) -> Any:
            start = time.thread_time()
            found = call(*arguments, **more)
            self.inside += time.thread_time() - start
            return found

        return counted


def request(enabled: Enabled, tokens: torch.Tensor, share: float | None, heads: int, clock: Clock) -> TurboCache:
    """A cache that holds ``tokens``, watched with a share of steps; None: not watched."""
    watching = None
    if share is not None:
        watching = watch(enabled, WatchSettings(share=share, heads=heads, memory_mib=4096), limits=[])
    cache = TurboCache(enabled.model.config, enabled.policy)
    for part in tokens.split(512, 1):
        enabled.model(part, past_key_values=cache, logits_to_keep=1)
    if watching is not None:
        watching.close()
        for layer in cache.turbo_layers:
            if layer.observer is not None and not clock.on_gpu:
                layer.observer.appended = clock.counting(layer.observer.appended)  # type: ignore[method-assign]
                layer.observer.attended = clock.counting(layer.observer.attended)  # type: ignore[method-assign]
    return cache


def main(
    out: Annotated[Path, typer.Option(help="CSV file to append to")],
    model: str = "smollm2-135m",
    preset: str = "turbo4",
    context: Annotated[list[int] | None, typer.Option(help="tokens before the steps; repeatable")] = None,
    heads: int = WatchSettings().heads,
    share: float = WatchSettings().share,
    steps: Annotated[int, typer.Option(help="of a block")] = 16,
    rounds: int = 8,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Measure and append rows to OUT."""
    if device == "cpu":
        torch.set_num_threads(1)
    loaded = load_model(model, dtype=getattr(torch, dtype), device=device)
    ids = loaded.tokenizer(load_text("persuasion"), return_tensors="pt").input_ids.to(device)
    where = environment(getattr(torch, dtype), device)
    for length in context or [1024]:
        tokens = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
        clock = Clock(device)
        with ta.enable(loaded.model, preset) as enabled, torch.inference_mode():
            caches = {
                kind: request(enabled, tokens, part, heads, clock)
                for kind, part in (("none", None), ("keep", NEVER), ("check", 1.0))
            }
            times: dict[str, list[float]] = {kind: [] for kind in caches}
            calls: dict[str, list[float]] = {kind: [] for kind in caches}
            for turn in range(rounds + 1):
                for kind, cache in caches.items():
                    clock.inside, start = 0.0, clock.now()
                    for i in range(steps):
                        enabled.model(tokens[:, i : i + 1], past_key_values=cache)
                    if turn:  # the first round warms up
                        times[kind].append((clock.now() - start) / steps)
                        calls[kind].append(clock.inside / steps)
        step = statistics.median(times["none"])
        by = "steps" if clock.on_gpu else "calls"
        none, kept, checked = (
            statistics.median((times if clock.on_gpu else calls)[kind]) for kind in ("none", "keep", "check")
        )
        keep, check = (kept - none) / step, (checked - kept) / step
        row = (
            model, preset, length, heads, share, by, f"{step * 1e3:.3f}", f"{keep:.5f}", f"{check:.4f}",
            f"{keep + share * check:.5f}", steps, rounds, where["gpu"] or where["cpu"], torch.__version__,
            where["packages"]["transformers"], dtype, where["threads"], where["date"],
        )  # fmt: skip
        fresh = not out.exists()
        with out.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, row] if fresh else [row])
        print(dict(zip(COLUMNS, row, strict=True)), flush=True)


if __name__ == "__main__":
    typer.run(main)
