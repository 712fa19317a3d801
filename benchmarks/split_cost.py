"""What a fixed split costs: decode of ragged and of single sequences with and without it.

    python benchmarks/split_cost.py --threads 2
    python benchmarks/split_cost.py --device cuda

Times are medians of rounds in which both take turns, because the cores of a machine are often shared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from turboattention.config import get_preset
from turboattention.kvcache.paged import PagedCache
from turboattention.ops import paged_decode

HEADS, RATIO, DIM = 8, 4, 128
BATCHES = {
    "one of 16k": (16384,), "8 of 2k": (2048,) * 8, "32 of 8k": (8192,) * 32,
    "ragged, 100 to 8k": (100, 500, 1000, 4000, 8192),
}  # fmt: skip
CALLS = 20  # in one graph


def timed(call: Callable[[], object], device: str) -> Callable[[], float]:
    """Gives the milliseconds of one call; on a GPU of a graph of calls, which never waits for Python."""
    if device == "cpu":

        def on_cpu() -> float:
            begin = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - begin)

        return on_cpu
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()

    def on_gpu() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / CALLS

    return on_gpu


def main() -> None:
    """Parse arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = get_preset("turbo4").cache
    for name, lengths in BATCHES.items():
        on = arguments.device
        cache = PagedCache(
            config, [(config.key, config.value)] * HEADS, rows=len(lengths), max_tokens=max(lengths), head_dim=DIM,
            device=on,
        )  # fmt: skip
        counts = torch.tensor(lengths, dtype=torch.int32, device=on)
        key = torch.randn(len(lengths), HEADS, max(lengths), DIM, device=on).half()
        cache.append(key, key, when="after", counts=counts)
        q = torch.randn(len(lengths), HEADS * RATIO, 1, DIM, device=on).half()
        calls = {"by the batch": timed(lambda q=q, c=cache: paged_decode(q, c.view()), on)}
        for split in (16, 64):
            calls[f"split {split}"] = timed(lambda q=q, c=cache, s=split: paged_decode(q, c.view(), split=s), on)
        times: dict[str, list[float]] = {of: [] for of in calls}
        for _ in range(arguments.rounds):
            for of, call in calls.items():
                times[of].append(call())
        shown = ", ".join(f"{of} {statistics.median(x):.3f} ms (best {min(x):.3f})" for of, x in times.items())
        print(f"{name}: {shown}")


if __name__ == "__main__":
    main()
