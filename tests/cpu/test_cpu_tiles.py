"""AMX without a processor that has it: tiles emulated in plain C++, the same results as those of AVX2 bit for bit."""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from caches import filled, normal, policy_of

from turboattention.cpu import library
from turboattention.ops.decode import cpu
from turboattention.ops.prefill import int8_cpu
from turboattention.ops.prefill.sequences import Sequences

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("hatchling", reason="hatchling, the build backend, is not installed")
sys.path.insert(0, str(ROOT))
import hatch_build  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library.without_library() is not None, reason=str(library.without_library())),
    pytest.mark.skipif(platform.machine() != "x86_64" or library.loaded().isa < 1, reason="no AVX2 to compare with"),
]
AVX2, AMX = 1, 3


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("tiles") / "kernels.so"
    extra = ("-O1", hatch_build.EMULATED)
    assert hatch_build.build(ROOT / hatch_build.SOURCES, path, extra, sets=hatch_build.EMULATED_SETS) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "PATH", path)
        library.loaded.cache_clear()
        assert library.loaded().isa == AMX
        assert "AMX" in library.instruction_set()
        yield
    library.loaded.cache_clear()


@pytest.mark.parametrize("preset", ["int8", "turbo4", "turbo3", "turbo2"])
@pytest.mark.parametrize(
    ("head_dim", "ratio", "length", "count"),
    [(64, 3, 130, 1), (80, 1, 200, 1), (96, 2, 64, 3), (128, 4, 593, 1), (256, 5, 329, 1), (64, 16, 777, 2),
     (80, 7, 500, 9), (128, 12, 70, 1)],
)  # fmt: skip
def test_decode(preset: str, head_dim: int, ratio: int, length: int, count: int):
    kv = filled(policy_of(preset), length, head_dim=head_dim, mean=8.0)
    q = normal(1, 2 * ratio, count, head_dim, seed=9)
    want, got = (cpu.attend(q, kv, scale=head_dim**-0.5, isa=isa) for isa in (AVX2, AMX))
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "tokens", "dim"),
    [(1, 1, 1, 1, 64), (4, 1, 63, 111, 64), (2, 2, 111, 300, 80), (4, 2, 130, 130, 96), (2, 1, 200, 129, 128),
     (1, 1, 70, 140, 256), (3, 1, 66, 17, 64)],
)  # fmt: skip
def test_prefill(heads: int, kv_heads: int, rows: int, tokens: int, dim: int, causal: bool):
    q = normal(2, heads, rows, dim, seed=0)
    k, v = (normal(2, kv_heads, tokens, dim, seed=i) for i in (1, 2))
    sequences = Sequences.dense(q, k)
    want, got = (int8_cpu.attention(q, k, v, sequences, scale=dim**-0.5, causal=causal, isa=isa) for isa in (AVX2, AMX))
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)
