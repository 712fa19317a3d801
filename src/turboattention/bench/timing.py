"""Time of a call: a CUDA graph over enough distinct buffers to leave the L2 cache, or the clock on a CPU."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

# Buffers of one measurement together, several times the L2 cache of any supported GPU (50 to 126 MB).
RESIDENT_BYTES = 400_000_000
MOST_BUFFERS = 64
# Calls of one graph: enough that the launch of the graph itself does not count; fewer when that takes longer than this.
CALLS = 16
GRAPH_MS = 50.0
GPU_REPEATS, CPU_REPEATS = 21, 7
MOST_GPU_MS, FEWEST_GPU_REPEATS = 5000.0, 5  # of all repeats together; so many are made however long they take
CPU_MS, MOST_CPU_REPEATS = 100.0, 200  # short calls are repeated for so long, but no more often
CLOCK_SAMPLE_MS = 30.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and spread of the repeats; sm_clock_mhz while it ran (None: unknown)."""

    ms: float
    p10_ms: float
    p90_ms: float
    sm_clock_mhz: int | None = None


def buffers_needed(nbytes: int, device: torch.device) -> int:
    """Distinct copies of ``nbytes`` that a measurement should go through."""
    if device.type != "cuda":
        return 1
    return max(1, min(MOST_BUFFERS, -(-RESIDENT_BYTES // max(1, nbytes))))


def measure(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int | None = None) -> Timing:
    """Time of one of ``calls``, which do the same on different buffers and allocate nothing that a graph can't."""
    if device.type == "cuda":
        return _measure_graph(calls, repeats or GPU_REPEATS)
    return _measure_clock(calls, repeats)


def summary(samples: Sequence[float], sm_clock_mhz: int | None = None) -> Timing:
    """Median and the nearest samples to the 10th and 90th percentile."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return Timing(at(0.5), at(0.1), at(0.9), sm_clock_mhz)


def _measure_clock(calls: Sequence[Callable[[], object]], repeats: int | None) -> Timing:
    calls[0]()
    samples: list[float] = []
    if repeats is None:
        begin = time.perf_counter()
        calls[0]()
        one_ms = 1e3 * (time.perf_counter() - begin)
        repeats = min(MOST_CPU_REPEATS, max(CPU_REPEATS, math.ceil(CPU_MS / max(one_ms, 1e-3))))
    for call in islice(cycle(calls), repeats):
        begin = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - begin))
    return summary(samples)


def _measure_graph(calls: Sequence[Callable[[], object]], repeats: int) -> Timing:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles and allocates; a capture may do neither for the first time
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls[0]()
        end.record()
    torch.cuda.synchronize()
    one_ms = max(begin.elapsed_time(end), 1e-3)
    wanted = min(CALLS, math.ceil(GRAPH_MS / one_ms))
    count = -(-wanted // len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), count):
            out = call()
            if not kept:  # one output alive: all of them would not fit
                kept.append(out if isinstance(out, Tensor) else None)
    repeats = max(min(repeats, int(MOST_GPU_MS / (one_ms * count))), min(repeats, FEWEST_GPU_REPEATS))
    for _ in range(3 if one_ms < GRAPH_MS else 1):
        graph.replay()
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / count)
    return summary(samples, _clock(graph, samples[-1] * count))


def _clock(graph: torch.cuda.CUDAGraph, replay_ms: float) -> int | None:
    """The SM clock while ``graph`` runs; None where the driver does not tell it."""
    for _ in range(max(1, round(CLOCK_SAMPLE_MS / max(replay_ms, 1e-3)))):
        graph.replay()
    try:
        return int(torch.cuda.clock_rate())
    except (ImportError, RuntimeError):  # torch asks NVML, which is a package of its own and not in every container
        return None
    finally:
        torch.cuda.synchronize()
