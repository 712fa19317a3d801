"""What a comparison compiles before it begins, on the CPU: the forms it finds and what each of them runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import LlamaForCausalLM

import turboattention.evaluation.forms as forms
from turboattention.config import presets
from turboattention.evaluation.stream import CHUNK, stream
from turboattention.integrations.transformers import model_shape
from turboattention.ops import CachedKV, attend
from turboattention.policy import Override, Policy


def test_equal_heads_are_one_form(model: LlamaForCausalLM) -> None:
    shape = replace(model_shape(model.config), layers=3, kv_heads=4)
    mixed = Policy("mixed", Policy.from_preset("turbo4").cache, overrides=(Override(2, 1, 2, "value"), Override(16, 0)))
    found = forms.distinct_forms([Policy.from_preset("turbo4"), mixed, Policy.from_preset("fp16")], shape)
    assert [(key.bits, value.bits) for _, (key, value) in found] == [(4, 4), (4, 2)]


@pytest.mark.parametrize("preset", [*presets()])
@pytest.mark.parametrize("chunk", [CHUNK, 1, 100])
def test_every_form_is_written_and_read(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, preset: str, chunk: int
) -> None:
    """Attention has seen pages behind the first one, which holds the exact first tokens."""
    pages: list[int] = []

    def watched(q: torch.Tensor, kv: CachedKV, **options: object) -> torch.Tensor:
        pages.append(max((group.pages.shape[2] for group in kv.groups), default=0))
        return attend(q, kv, **options)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(forms, "attend", watched)
    count = forms.compile_forms(model, [preset], rows=2, chunk=chunk)
    assert count == (preset != "fp16")
    assert not count or (pages[0] == 0 and max(pages) >= 2)


@pytest.mark.gpu
def test_a_comparison_compiles_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    model = tiny_llama(layers=2, heads=8, kv_heads=4).to("cuda")
    bits = [Override(2 + (layer + head) % 3, layer, head, "key") for layer in range(2) for head in range(4)]
    mixed = Policy("mixed", Policy.from_preset("turbo4").cache, overrides=(*bits, Override(2, 1, 2, "value")))
    rows = torch.randint(2, 200, (3, 5 * CHUNK + 1))
    assert forms.compile_forms(model, [mixed, "turbo2"], len(rows), CHUNK) == 5
    compiled: list[str] = []

    def listener(**found: Any) -> None:
        if not found["cache_hit"]:
            compiled.append(found["src"].name)

    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    stream(model, rows, [mixed, "turbo2"])
    assert compiled == []
