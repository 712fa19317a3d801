"""What vLLM calls in each of its processes: registration, nothing else."""

from importlib import import_module
from importlib.metadata import version

from turboattention.errors import UnsupportedError
from turboattention.integrations.vllm.settings import DTYPES

BACKEND = "TURBO_ATTENTION"
CPU_DTYPE = "fp8"  # stands for our KV dtypes in the CPU slot, where no dtype can be added
_GPU_CLASS = "turboattention.integrations.vllm.backend.TurboAttentionBackend"
_CPU_CLASS = "turboattention.integrations.vllm.backend.CpuTurboAttentionBackend"


def register() -> None:
    """Add the backend and the KV dtypes to this process. Calling it again changes nothing.

    Raises UnsupportedError for a vLLM without the hooks (before 0.33).
    """
    registry = import_module("vllm.v1.attention.backends.registry")
    cache = import_module("vllm.config.cache")
    if not hasattr(cache, "register_kv_cache_dtype"):
        raise UnsupportedError(f"vLLM: expected version 0.33 or 0.34, received {_version()}; it takes no new KV dtypes")
    if BACKEND not in registry.AttentionBackendEnum.__members__:
        registry.register_backend(BACKEND, _GPU_CLASS)
    for name in DTYPES:
        if name not in cache.KV_CACHE_DTYPES:
            cache.register_kv_cache_dtype(name)(_handler(name))


def register_for_cpu() -> None:
    """Put the backend into the slot that vLLM's CPU platform always takes: how the plugin is tested without a GPU.

    The policy is then ``additional_config={"turboattention": {"policy": ...}}`` with the KV dtype ``fp8``, which stands
    for ours: vLLM 0.32 takes no new ones.
    """
    registry = import_module("vllm.v1.attention.backends.registry")
    registry.register_backend(registry.AttentionBackendEnum.CPU_ATTN, _CPU_CLASS)


def _version() -> str:
    return version("vllm")


def _handler(dtype: str) -> type:
    """What `register_kv_cache_dtype` wants of a KV dtype: bytes that our own backend understands."""
    torch = import_module("torch")
    interface = import_module("vllm.v1.kv_cache_interface")

    class Handler:
        name = dtype

        def torch_dtype(self) -> object:
            return torch.uint8

        def quant_mode(self) -> object:
            return interface.KVQuantMode.CUSTOM

    return Handler
