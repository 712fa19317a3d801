"""``turboattention bench`` on small shapes of this machine's CPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from torch import Tensor

from turboattention.bench import adapters
from turboattention.bench.result import COLUMNS
from turboattention.cli.main import main
from turboattention.ops.common.paged_kv import PagedKV

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from exact_decode import exact_decode

SMALL = ["--query-heads", "4", "--kv-heads", "2", "--head-dim", "64", "--tokens", "200"]


def test_append(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "append", *SMALL, "--batch", "2", "--json", str(tmp_path / "out.json")]) == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["schema"] == 1
    assert {"packages", "cpu", "threads", "date"} <= data["environment"].keys()
    (row,) = data["rows"]
    assert tuple(row) == COLUMNS
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["candidate_ms"])
    assert "append turbo4 2x200" in " ".join(capsys.readouterr().out.split())


def test_decode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapters, "decode", exact_decode)
    arguments = ["bench", "decode", *SMALL, "--batch", "2", "--ragged", "--contiguous", "--preset", "turbo2-unrefined"]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["ragged"], row["page_order"], row["preset"]) == (True, "contiguous", "turbo2-unrefined")


def test_a_wrong_result_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(kv: PagedKV, implementation: str | None) -> Callable[[Tensor], Tensor]:
        return torch.zeros_like

    monkeypatch.setattr(adapters, "decode", broken)
    assert main(["bench", "decode", *SMALL, "--json", str(tmp_path / "out.json")]) == 1
    assert "FAILED: decode turbo4 1x200" in " ".join(capsys.readouterr().out.split())
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["candidate_ms"] is None
    assert "wrong result" in row["failure"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["decode", "--preset", "turbo5"], "preset: expected one of"),
        (["decode", "--query-heads", "5"], "a multiple of 8 KV heads"),
        (["decode", "--tokens", "0"], "tokens: expected 1 or more"),
        (["prefill", "--ragged", "--batch", "2"], "ragged batch"),
        (["forward"], "forward"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err
