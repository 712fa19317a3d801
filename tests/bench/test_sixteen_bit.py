"""The 16-bit Triton baseline against float64, in the interpreter."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the baseline is written in Triton")

from turboattention.bench.case import Case
from turboattention.bench.data import Sequence16, make_cache16, synthetic
from turboattention.bench.errors import decode_error
from turboattention.bench.read_kernel import reading
from turboattention.bench.sixteen_bit import SplitDecode, Tiles
from turboattention.errors import UnsupportedError

OPS = Path(__file__).parents[1] / "ops"
CPU = torch.device("cpu")
TILES = Tiles(64, 4, 2, 8)


def half(base: Sequence16) -> Sequence16:
    return Sequence16(base.key.half(), base.value.half(), base.peaked.half(), base.flat.half())


def limit(case: Case, base: Sequence16) -> float:
    """Twice the error of PyTorch's own 16-bit attention, sequence by sequence."""
    rows = make_cache16(case, base).sequences()

    def attend(q: torch.Tensor) -> torch.Tensor:
        torch_attention = torch.nn.functional.scaled_dot_product_attention
        parts = [torch_attention(x[None], k[None], v[None], enable_gqa=True) for x, (k, v) in zip(q, rows, strict=True)]
        return torch.cat(parts)

    return 2 * decode_error(attend, base, case.lengths, lambda s, h: base.tokens(h, case.lengths[s]))


@pytest.mark.parametrize(("head_dim", "ratio"), [(64, 3), (80, 1), (128, 4), (256, 2)])
@pytest.mark.parametrize(("tokens", "ragged"), [(1, False), (63, False), (333, False), (333, True)])
def test_against_float64(head_dim: int, ratio: int, tokens: int, ragged: bool) -> None:
    case = Case("decode", 2 * ratio, 2, head_dim, 3, tokens, ragged=ragged)
    base = half(synthetic(case, CPU))
    attend = SplitDecode(make_cache16(case, base), TILES)
    assert (attend.splits > 1) == (tokens > 64)
    error = decode_error(attend, base, case.lengths, lambda s, h: base.tokens(h, case.lengths[s]))
    assert error <= limit(case, base)


def test_too_many_query_heads_are_refused() -> None:
    case = Case("decode", 34, 2, 64, 1, 65)
    base = half(synthetic(case, CPU))
    with pytest.raises(UnsupportedError, match="16 query heads"):
        SplitDecode(make_cache16(case, base), TILES)(base.flat)


@pytest.mark.parametrize("words", [1024, 5 * 1024, 4099])
def test_every_word_is_read(words: int) -> None:
    data = torch.randint(-1000, 1000, (words,), dtype=torch.int32)
    sums = reading(data.view(torch.uint8), 3, 1024)()
    whole = words // 1024 * 1024
    assert int(sums.sum()) == int(data[:whole].sum())


def test_compiles_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(OPS)
    monkeypatch.setenv("PYTHONPATH", str(OPS))
    from compile_kernels import rows_of

    rows = rows_of(Path(__file__).with_name("sixteen_bit_variants.py"))
    assert {row["target"] for row in rows} >= {"sm_80", "sm_90", "gfx942"}
    for row in rows:
        assert row["spills"] == row["loop_spills"] == 0, row
        if row["name"].startswith("split"):
            assert any(op.startswith(("HMMA", "HGMMA", "UTCHMMA", "v_mfma")) for op in row["mnemonics"]), row
