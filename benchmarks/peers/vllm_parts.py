"""Imports Triton kernels of vLLM from its Python files alone, without its compiled extension and its dependencies.

Where all of vLLM is installed and loads, it is used as it is. Otherwise stand-ins for the five modules that the kernels
import (platform, logger, environment, arithmetic, Triton) let them load; nothing of what is measured is replaced.
"""

import importlib
import sys
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from turboattention.errors import UnsupportedError

OPS = "vllm.v1.attention.ops"


class KVQuantMode(IntEnum):
    """The names that the kernels compare with; the values are vLLM's."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    NVFP4 = 5


def load(name: str) -> ModuleType:
    """Module ``name`` of vLLM; raises UnsupportedError with the reason when it can't be had."""
    if "vllm.platforms" not in sys.modules:
        if find_spec("vllm") is None:
            raise UnsupportedError("vllm is not installed, not even its Python files")
        if find_spec("triton") is None:
            raise UnsupportedError("vLLM's kernels need Triton")
        _stand_in()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"{name} does not load: {error}") from error


def _stand_in() -> None:
    spec = find_spec("vllm")
    assert spec is not None
    root = Path(next(iter(spec.submodule_search_locations or ())))
    if (root / "__init__.py").exists():
        return  # a whole vLLM: its own modules
    import triton
    import triton.language as tl

    for name in ("vllm", "vllm.v1", "vllm.v1.attention", OPS, "vllm.model_executor", "vllm.model_executor.layers",
                 "vllm.model_executor.layers.quantization"):  # fmt: skip
        _module(name).__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    for name in ("vllm.utils", "vllm.model_executor.layers.quantization.turboquant"):
        _module(name).__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    _module("vllm.envs", VLLM_BATCH_INVARIANT=False)
    quiet = SimpleNamespace(
        **dict.fromkeys(("debug", "debug_once", "info", "info_once", "warning", "warning_once"), _say)
    )
    _module("vllm.logger", init_logger=lambda name: quiet)
    _module("vllm.triton_utils", tl=tl, triton=triton)
    _module("vllm.utils.math_utils", largest_power_of_2_divisor=lambda n: n & -n)
    _module("vllm.v1.kv_cache_interface", KVQuantMode=KVQuantMode)
    _module("vllm.platforms", current_platform=_Platform())


def _module(name: str, **content: Any) -> Any:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


def _say(*arguments: object) -> None:
    """Nothing: what vLLM would log about its start does not matter here."""


class _Platform:
    """What the kernels ask about the GPU."""

    def is_cuda(self) -> bool:
        return torch.cuda.is_available() and torch.version.hip is None

    def is_cuda_alike(self) -> bool:
        return torch.cuda.is_available()

    def is_rocm(self) -> bool:
        return torch.version.hip is not None

    def is_xpu(self) -> bool:
        return False

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def has_device_capability(self, capability: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= capability

    def is_device_capability_family(self, capability: int) -> bool:
        return torch.cuda.get_device_capability()[0] == capability // 10
