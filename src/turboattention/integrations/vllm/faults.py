"""Fault bits that the append kernels leave: read without making the host wait, never lost in silence."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from turboattention.integrations.vllm.metrics import FAULTS
from turboattention.integrations.vllm.report import log

EVERY = 16  # steps between two looks on a GPU
_TEXTS = {
    "not_finite": "NaN or infinite K or V",
    "beyond_float16": "K or V too large for the scales of a page",
    "no_room": "a page outside of the block table",
}


class FaultWatch:
    """Looks at the fault bits ``int32 [sequences]`` of the steps before, logs what it finds and counts it.

    count: gets the kind and the number of sequences. Bits are cleared once they have been read.
    """

    def __init__(self, fault: Tensor, count: Callable[[str, int], None]) -> None:
        self._fault, self._count = fault, count
        self._host = torch.zeros(fault.shape, dtype=torch.int32, pin_memory=fault.is_cuda)
        self._event = torch.cuda.Event() if fault.is_cuda else None
        self._steps, self._copying = 0, False

    def look(self) -> None:
        """Once a step, before its kernels."""
        if self._event is None:
            self._read(self._fault)
        elif self._copying and self._event.query():
            self._copying = False
            self._read(self._host)
        elif not self._copying and self._steps % EVERY == 0:
            self._host.copy_(self._fault, non_blocking=True)
            self._event.record()
            self._copying = True
        self._steps += 1

    def forget(self) -> None:
        """Drop what steps on invented tokens have left (profiling, capture)."""
        self._fault.zero_()
        self._copying = False

    def _read(self, found: Tensor) -> None:
        bits: np.ndarray[tuple[int, ...], np.dtype[np.int32]] = found.numpy()
        if not bits.any():
            return
        for bit, kind in FAULTS.items():
            sequences = int(np.count_nonzero(bits & bit))
            if sequences:
                self._count(kind, sequences)
                log.error(
                    "TurboAttention: %s in %d sequences of a step: their answers are wrong from there on. The model "
                    "or its weights make such numbers; see turboattention_faults_total",
                    _TEXTS[kind], sequences,
                )  # fmt: skip
        self._fault.zero_()
