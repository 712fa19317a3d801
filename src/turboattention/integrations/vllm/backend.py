"""The backend classes that vLLM asks what is supported and how a page looks."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout, KVQuantMode

from turboattention.checks import SUPPORTED_HEAD_DIMS
from turboattention.integrations.vllm.impl import TurboAttentionImpl
from turboattention.integrations.vllm.metadata import TurboMetadataBuilder
from turboattention.integrations.vllm.plugin import BACKEND
from turboattention.integrations.vllm.settings import (
    DTYPES,
    PAGE_TOKENS,
    page_layout,
    remember,
    remembered,
    resolve_policy,
)


class TurboAttentionBackend(AttentionBackend):  # type: ignore[misc]  # vLLM is absent where types are checked
    """TURBO_ATTENTION: pages of 64 tokens in the layout of this package, one for each KV head."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(DTYPES)

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[TurboAttentionImpl]:
        return TurboAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TurboMetadataBuilder]:
        return TurboMetadataBuilder

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
    def customize_spec(cls, spec: Any) -> Any:
        """The size of our pages, for layers with one of our KV dtypes; calling it again changes nothing."""
        if spec.state_content_bytes is not None or not cls._is_ours(spec):
            return spec
        config = get_current_vllm_config_or_none()  # for hybrid models vLLM asks before there are layers
        if config is not None:
            remember(resolve_policy(config.cache_config.cache_dtype, config.additional_config))
        layout = page_layout(remembered().cache, spec.head_size)
        return replace(spec, dtype=torch.uint8, state_content_bytes=layout.nbytes // PAGE_TOKENS)

    @classmethod
    def _is_ours(cls, spec: Any) -> bool:
        return bool(spec.kv_quant_mode != KVQuantMode.NONE)


class CpuTurboAttentionBackend(TurboAttentionBackend):
    """The same in the slot of vLLM's CPU backend, for tests: every layer is ours, also with the KV dtype ``auto``."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @classmethod
    def _is_ours(cls, spec: Any) -> bool:
        return True
