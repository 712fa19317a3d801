"""What a row ran on: names and versions."""

import subprocess
from typing import Any

import torch

from turboattention import __version__
from turboattention.evaluation.environment import environment


def machine(device: torch.device) -> dict[str, Any]:
    """Device name, versions of torch, triton, turboattention and the driver, date; ``environment`` holds the rest."""
    everything = environment(torch.float16, device)
    return {
        "device": everything["gpu"] or everything["cpu"],
        "torch": str(torch.__version__),
        "triton": triton_version(),
        "turboattention": __version__,
        "driver": _driver() if device.type == "cuda" else None,
        "date": everything["date"],
        "environment": everything,
    }


def triton_version() -> str | None:
    """The version of Triton; None without it."""
    try:
        import triton  # type: ignore[import-untyped,unused-ignore] # has no types, and may be missing
    except ImportError:
        return None
    return str(triton.__version__)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):  # AMD, or a container without the tool
        return None
    return done.stdout.split("\n")[0].strip()
