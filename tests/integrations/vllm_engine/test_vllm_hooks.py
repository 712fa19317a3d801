"""What the plugin takes hold of in vLLM, word by word: a release that changes it fails here first, with the name."""

import dataclasses
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from engines import NEEDS
from hooks import MEMBERS, SIGNATURES, differences

pytest.importorskip("vllm", reason=NEEDS)

import vllm
from vllm.v1.attention import backend
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends import registry
from vllm.v1.kv_cache_interface import AttentionSpec

from turboattention.integrations.vllm.backend import CpuTurboAttentionBackend, TurboAttentionBackend
from turboattention.integrations.vllm.builder import TurboMetadataBuilder
from turboattention.integrations.vllm.impl import TurboAttentionImpl


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_names_in_the_source() -> None:
    """Of the installed vLLM; for CPUs it is one release behind and has no KV dtypes of plugins yet."""
    assert differences(Path(vllm.__file__).parent.parent, gpu=False) == []


def test_a_change_of_the_source_is_named(tmp_path: Path) -> None:
    text = Path(backend.__file__).read_text()
    for old, new in (
        ("    slot_mapping: torch.Tensor", "    slots: torch.Tensor"),
        ("common_prefix_len: int", "prefix_len: int"),
        ("def get_name() -> str:", "def get_name() -> str: ...\n\n    @abstractmethod\n    def get_more() -> str:"),
    ):
        assert old in text
        text = text.replace(old, new)
    changed = tmp_path / "vllm" / "v1" / "attention" / "backend.py"
    changed.parent.mkdir(parents=True)
    changed.write_text(text)
    found = [line.partition(":")[2] for line in differences(tmp_path) if line.startswith(f"{backend.__name__}:")]
    assert len(found) == 3
    assert "CommonAttentionMetadata: no slot_mapping" in found
    assert "AttentionBackend: a new abstract method get_more" in found
    assert any(line.startswith("AttentionMetadataBuilder.build: expected arguments") for line in found)
    assert "vllm.config: no get_current_vllm_config" in differences(tmp_path)  # that file is not there


def test_signatures() -> None:
    """As Python has them, which decorators may change."""
    for place, expected in SIGNATURES.items():
        module, _, name = place.partition(":")
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert parameters(found) == expected.split(), place
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
    for fields in (CommonAttentionMetadata, AttentionSpec):
        expected = MEMBERS[f"{fields.__module__}:{fields.__name__}"]
        assert set(expected.split()) <= {field.name for field in dataclasses.fields(fields)}
    assert {x.name for x in AttentionCGSupport} == set(MEMBERS[f"{backend.__name__}:AttentionCGSupport"].split())
    assert registry.AttentionBackendEnum.CPU_ATTN
