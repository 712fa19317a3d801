"""What a fixed split costs on the CPU: decode of ragged and of single sequences with and without it.

    python benchmarks/split_cost.py --threads 2

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
BATCHES = {"one of 16k": (16384,), "8 of 2k": (2048,) * 8, "ragged, 100 to 8k": (100, 500, 1000, 4000, 8192)}


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    """Parse arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = get_preset("turbo4").cache
    for name, lengths in BATCHES.items():
        cache = PagedCache(
            config, [(config.key, config.value)] * HEADS, rows=len(lengths), max_tokens=max(lengths), head_dim=DIM
        )
        counts = torch.tensor(lengths, dtype=torch.int32)
        key = torch.randn(len(lengths), HEADS, max(lengths), DIM).half()
        cache.append(key, key, when="after", counts=counts)
        q = torch.randn(len(lengths), HEADS * RATIO, 1, DIM).half()
        calls: dict[str, Callable[[], object]] = {"by the batch": lambda q=q, c=cache: paged_decode(q, c.view())}
        for split in (16, 64):
            calls[f"split {split}"] = lambda q=q, c=cache, s=split: paged_decode(q, c.view(), split=s)
        times: dict[str, list[float]] = {of: [] for of in calls}
        for _ in range(arguments.rounds):
            for of, call in calls.items():
                times[of].append(milliseconds(call))
        shown = ", ".join(f"{of} {statistics.median(x):.2f} ms (best {min(x):.2f})" for of, x in times.items())
        print(f"{name}: {shown}")


if __name__ == "__main__":
    main()
