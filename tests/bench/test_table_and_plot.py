"""The programs in benchmarks/: every case of the table is valid, and the plot draws what passed."""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROW = {
    "op": "decode", "preset": "turbo4", "query_heads": "32", "kv_heads": "8", "head_dim": "128", "ratio": "3.2",
    "name": "decode 4 bits", "failure": "", "total_tokens": "262144", "bits_per_value": "4.25", "device": "GPU",
    "torch": "2.11", "triton": "3.6.0", "turboattention": "0.1.0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("quick", [False, True])
def test_table(quick: bool) -> None:
    from cases import table

    groups = table(quick)
    assert {"decode 4 bits", "decode 2 bits", "decode K4/V2", "decode ragged", "append", "prefill"} <= groups.keys()
    entries = [entry for group in groups.values() for entry in group]
    assert len(set(entries)) == len(entries)
    assert all(entry.case.name in groups for entry in entries)


def test_plot_leaves_out_what_failed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from plot import _points, plot

    failed: dict[str, Any] = {**ROW, "ratio": "", "failure": "wrong result", "total_tokens": "8192"}
    other = {**ROW, "head_dim": "64"}
    assert plot([failed, other], tmp_path / "plot") == []
    assert _points([ROW, failed, other]) == {"turbo4": {262144: [(3.2, 4.25)]}}
    paths = plot([ROW, failed], tmp_path / "plot")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert all(path.stat().st_size > 1000 for path in paths)
