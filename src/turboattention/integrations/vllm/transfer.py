"""Small numbers from the host to the device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: "np.ndarray[Any, Any]", device: torch.device) -> Tensor:
    """A copy that the host does not wait for: out of pageable memory CUDA first waits for the kernels before it."""
    found = torch.from_numpy(numbers)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
