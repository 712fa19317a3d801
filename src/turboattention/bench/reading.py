"""The speed limit of a kernel that must read some bytes: one that does nothing else."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turboattention.bench.timing import measure

WORDS = 1024
PROGRAMS = (4, 8, 16)  # for each multiprocessor; the best one counts


def read_ms(buffers: Sequence[Tensor]) -> float | None:
    """Milliseconds to read one of the contiguous ``buffers`` (uint8); None on a GPU without Triton."""
    device = buffers[0].device
    if device.type != "cuda":
        words = [x.flatten()[: x.numel() // 8 * 8].view(torch.int64) for x in buffers]
        return measure([_summing(x) for x in words], device).ms
    try:
        from turboattention.bench.read_kernel import reading
    except ImportError:
        return None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(measure([reading(x, count * processors, WORDS) for x in buffers], device).ms for count in PROGRAMS)


def _summing(words: Tensor) -> Callable[[], Tensor]:
    return lambda: words.sum()
