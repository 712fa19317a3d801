"""What a measurement ran on."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from turboattention import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def environment(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Versions, processor, GPU, threads, dtype and date, ready for JSON."""
    on_gpu = torch.device(device).type == "cuda"
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        # torch by itself: the name of its build (+cpu, +cu130) is not in the version of every wheel.
        "packages": {"turboattention": __version__, **packages, "torch": torch.__version__},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or platform.machine()
