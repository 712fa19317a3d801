"""What the plugin takes hold of in vLLM, word by word: a release that changes it fails here first, with the name."""

import dataclasses
import inspect
from typing import Any

import pytest
from engines import NEEDS

pytest.importorskip("vllm", reason=NEEDS)

from vllm.config import get_layers_from_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends import registry
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVQuantMode

from turboattention.integrations.vllm.backend import CpuTurboAttentionBackend, TurboAttentionBackend
from turboattention.integrations.vllm.impl import TurboAttentionImpl
from turboattention.integrations.vllm.metadata import TurboMetadataBuilder


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_signatures() -> None:
    for function, expected in (
        (AttentionImpl.forward, "layer query key value kv_cache attn_metadata output output_scale output_block_scale"),
        (AttentionImpl.__init__, "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype "
                                 "logits_soft_cap attn_type kv_sharing_target_layer_name"),
        (AttentionMetadataBuilder.__init__, "kv_cache_spec layer_names vllm_config device"),
        (AttentionMetadataBuilder.build, "common_prefix_len common_attn_metadata fast_build"),
        (AttentionMetadataBuilder.build_for_cudagraph_capture, "common_attn_metadata"),
        (AttentionMetadataBuilder.get_cudagraph_support, "vllm_config kv_cache_spec"),
        (AttentionBackend.customize_spec, "spec"),
        (AttentionBackend.get_supported_kernel_block_sizes, "kv_cache_spec"),
        (get_layers_from_vllm_config, "vllm_config layer_type layer_names"),
    ):  # fmt: skip
        assert parameters(function) == expected.split(), function.__qualname__
    assert parameters(registry.register_backend)[:2] == ["backend", "class_path"]


def test_what_must_be_ours() -> None:
    """A new abstract method, or a question of the backend that we answer under a name nobody asks any more."""
    for ours in (TurboAttentionBackend, CpuTurboAttentionBackend, TurboAttentionImpl, TurboMetadataBuilder):
        assert not ours.__abstractmethods__, ours
    answered = {name for name in vars(TurboAttentionBackend) if not name.startswith("_")}
    assert {name for name in answered if not hasattr(AttentionBackend, name)} == set()
    for name in ("forward_includes_kv_cache_update", "supported_dtypes", "supported_kv_cache_dtypes"):
        assert hasattr(AttentionBackend, name), name
    assert set(parameters(AttentionImpl.__init__)) <= set(parameters(TurboAttentionImpl.__init__))
    assert parameters(TurboAttentionImpl.forward) == parameters(AttentionImpl.forward)
    assert set(parameters(AttentionMetadataBuilder.__init__)) == set(parameters(TurboMetadataBuilder.__init__))


def test_fields_that_are_read() -> None:
    common = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {
        "query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs",
        "num_actual_tokens", "block_table_tensor", "req_idx", "is_prefilling",
    } <= common  # fmt: skip
    spec = {field.name for field in dataclasses.fields(AttentionSpec)}
    assert {"block_size", "num_kv_heads", "head_size", "dtype", "kv_quant_mode", "state_content_bytes"} <= spec
    assert {"LBHNC"} <= {layout.name for layout in KVCacheLayout}
    assert {"NONE"} <= {mode.name for mode in KVQuantMode}
    assert {"ALWAYS", "UNIFORM_BATCH", "UNIFORM_SINGLE_TOKEN_DECODE", "NEVER"} == {x.name for x in AttentionCGSupport}
    assert AttentionType.DECODER
    assert registry.AttentionBackendEnum.CPU_ATTN
