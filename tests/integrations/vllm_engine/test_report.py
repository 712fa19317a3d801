"""The report of the start and the fault bits; needs no vLLM."""

import logging

import pytest
import torch

from turboattention.integrations.vllm.faults import FaultWatch
from turboattention.integrations.vllm.report import LayerCache, StartReport, say
from turboattention.ops.append.paged import BEYOND_FLOAT16, NOT_FINITE

MIB = 2**20


def report(skipped: dict[int, str]) -> StartReport:
    """Four layers of 8 KV heads of 128 channels, turbo4."""
    layers = tuple(
        LayerCache(f"model.layers.{i}.attn", skipped[i], 4096, 4096)
        if i in skipped
        else LayerCache(f"model.layers.{i}.attn", None, 1152, 4096, MIB)
        for i in range(4)
    )
    return StartReport("turbo4", layers, 9216 * 1000, 33, other=1)


def test_numbers():
    found = report({1: "kv-cache-dtype-skip-layers"})
    assert (found.compressed, found.token_bytes, found.plain_bytes) == (3, 7552, 16384)
    assert found.tokens == 9216 * 1000 // 7552
    # Without our pages nobody needs open pages: their memory counts for the others.
    assert found.tokens_at(16) == (9216 * 1000 + 3 * MIB) // 16384
    assert found.tokens_at(8) == (9216 * 1000 + 3 * MIB) // 8192


def test_lines_name_layers_and_reasons():
    text = "\n".join(report({0: "sliding window of 512 tokens", 2: "kv-cache-dtype-skip-layers"}).lines())
    for part in (
        "policy turbo4: 2 of 4 attention layers compressed", "16-bit pages (sliding window of 512 tokens): 0",
        "16-bit pages (kv-cache-dtype-skip-layers): 2", "1 layers with a state of their own",
        "10496 bytes in pages (BF16 16384, FP8 8192)", "BF16 690 (1.27x)", "open pages: 2.0 MiB for 33 rows",
    ):  # fmt: skip
        assert part in text


def test_nothing_compressed_is_a_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "vllm.turboattention"):
        say(report(dict.fromkeys(range(4), "kv-cache-dtype-skip-layers")))
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "TurboAttention: no layer of this process is compressed"
    ]


def test_faults_are_logged_counted_and_cleared(caplog: pytest.LogCaptureFixture):
    fault, counted = torch.zeros(5, dtype=torch.int32), []
    watch = FaultWatch(fault, lambda kind, sequences: counted.append((kind, sequences)))
    watch.look()
    assert not counted
    fault[1], fault[3] = NOT_FINITE, NOT_FINITE | BEYOND_FLOAT16
    with caplog.at_level(logging.ERROR, "vllm.turboattention"):
        watch.look()
    assert counted == [("not_finite", 2), ("beyond_float16", 1)]
    assert [r.levelno for r in caplog.records] == [logging.ERROR] * 2
    assert fault.tolist() == [0] * 5
    watch.look()
    assert len(counted) == 2


def test_faults_of_invented_steps_are_dropped():
    fault, counted = torch.ones(2, dtype=torch.int32), []
    watch = FaultWatch(fault, lambda kind, sequences: counted.append(kind))
    watch.forget()
    watch.look()
    assert not counted
