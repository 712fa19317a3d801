"""No memory for the open pages: the start ends with one error that says how much was wanted and what to lower."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import NEEDS, answers, random_llama, started, tokens

from turboattention.config import get_preset
from turboattention.integrations.vllm import pool
from turboattention.integrations.vllm.settings import page_layout


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No memory for zeros that the module of the open pages asks for."""
    zeros = torch.zeros

    def without_memory(*shape: Any, **named: Any) -> torch.Tensor:
        if sys._getframe(1).f_code.co_filename == pool.__file__:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return zeros(*shape, **named)

    monkeypatch.setattr(torch, "zeros", without_memory)
    return monkeypatch


@pytest.mark.usefixtures("full")
def test_rows_without_memory():
    layout = page_layout(get_preset("turbo4").cache, 64)
    with pytest.raises(torch.OutOfMemoryError) as error:
        pool.OpenPages.allocate(layout, 50, 2, torch.float16, torch.device("cpu"))
    # 2 * 50 * 2 * 64 * 64 numbers of 2 bytes, and the statistics of the queries: 50 * 2 * 64 of 4 bytes.
    assert str(error.value) == (
        "open pages of a layer: expected 1.6 MiB for 50 rows of 64 tokens, received no memory (CUDA out of memory. "
        "Tried to allocate 2.00 MiB.); lower --max-num-seqs, or free memory of the device"
    )


def test_sums_of_queries_do_not_follow_the_default_dtype():
    layout = page_layout(get_preset("turbo4").cache, 64)
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it makes a model of that dtype
    try:
        pages = pool.OpenPages.allocate(layout, 5, 2, torch.bfloat16, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert pages.power is not None
    assert pages.power.dtype == torch.float32
    assert pages.key.dtype == pages.value.dtype == torch.bfloat16


@pytest.mark.slow
def test_start_without_memory_and_then_with(full: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("vllm", reason=NEEDS)
    model = random_llama(tmp_path)
    with pytest.raises(torch.OutOfMemoryError, match=r"open pages of a layer: .* lower --max-num-seqs"):
        started(model, skip_tokenizer_init=True)
    full.undo()
    engine = started(model, skip_tokenizer_init=True, dtype="bfloat16")
    assert len(tokens(answers(engine, [[5, 6, 7]], 70))[0]) == 70
