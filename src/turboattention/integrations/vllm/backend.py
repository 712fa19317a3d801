"""The backend classes that vLLM asks what is supported and how a page looks."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout, KVQuantMode

from turboattention.checks import SUPPORTED_HEAD_DIMS
from turboattention.integrations.vllm.builder import TurboMetadataBuilder
from turboattention.integrations.vllm.delegate import PLAIN_DTYPES, builder_class, impl_class, is_ours
from turboattention.integrations.vllm.impl import SLIDING_HINT, TurboAttentionImpl
from turboattention.integrations.vllm.plugin import BACKEND, CPU_DTYPE
from turboattention.integrations.vllm.settings import (
    DTYPES,
    PAGE_TOKENS,
    page_layout,
    remember,
    remembered,
    resolve_policy,
)


def flash_attention() -> type[AttentionBackend]:
    """vLLM's backend for layers with 16-bit pages on a GPU."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend  # imports CUDA extensions

    return FlashAttentionBackend  # type: ignore[no-any-return]


def cpu_attention() -> type[AttentionBackend]:
    """The same on a CPU."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # imports CPU extensions

    return CPUAttentionBackend  # type: ignore[no-any-return]


class TurboAttentionBackend(AttentionBackend):  # type: ignore[misc]  # vLLM is absent where types are checked
    """TURBO_ATTENTION: pages of 64 tokens in the layout of this package, one for each KV head.

    Layers with a 16-bit KV dtype (those of ``--kv-cache-dtype-skip-layers``) are FlashAttention's.
    """

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [*DTYPES, *PLAIN_DTYPES]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> Any:
        return impl_class(TurboAttentionImpl, flash_attention)

    @staticmethod
    def get_builder_cls() -> Any:
        return builder_class(TurboMetadataBuilder, flash_attention)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [PAGE_TOKENS]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(SUPPORTED_HEAD_DIMS)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # A connector moves blocks; the open page of a sequence is not in a block.
        return False

    @classmethod
    def validate_configuration(cls, **asked: Any) -> list[str]:
        """Reasons why a layer can't be had; vLLM makes one error of them at the start."""
        config = get_current_vllm_config_or_none()
        whole = None if config is None else config.cache_config.cache_dtype
        if whole is not None and whole not in DTYPES:
            return [f"kv-cache-dtype {whole}: expected one of {', '.join(DTYPES)}"]
        if asked.get("kv_cache_dtype") in PLAIN_DTYPES:
            reasons: list[str] = flash_attention().validate_configuration(**asked)
        else:
            reasons = super().validate_configuration(**asked)
            if asked.get("has_sliding_window"):
                reasons.append(SLIDING_HINT)
        return reasons

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The size of our pages, for layers with one of our KV dtypes; calling it again changes nothing."""
        if is_ours(spec) or spec.kv_quant_mode == KVQuantMode.NONE:
            return spec
        config = get_current_vllm_config_or_none()  # for hybrid models vLLM asks before there are layers
        if config is not None:
            remember(resolve_policy(config.cache_config.cache_dtype, config.additional_config))
        layout = page_layout(remembered().cache, spec.head_size)
        return replace(spec, dtype=torch.uint8, state_content_bytes=layout.nbytes // PAGE_TOKENS)


class CpuTurboAttentionBackend(TurboAttentionBackend):
    """The same in the slot of vLLM's CPU backend, for tests: the KV dtype ``fp8`` stands for ours there."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [CPU_DTYPE, *PLAIN_DTYPES]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> Any:
        return impl_class(TurboAttentionImpl, cpu_attention)

    @staticmethod
    def get_builder_cls() -> Any:
        return builder_class(TurboMetadataBuilder, cpu_attention)
