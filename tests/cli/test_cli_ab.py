"""`ab` on the command line: exit statuses, files, mistakes, keys."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("httpx2")
pytest.importorskip("scipy")

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from fake_server import Fake, numbered, running

from turboattention.cli.main import main

KEY = "sk-0123456789abcdef"
FILES = ["answers.jsonl", "pairs.jsonl", "report.html", "report.md", "requests.jsonl", "result.json", "run.json"]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"say w{i}", "reference": f"w{i}"} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        (["--max-error-rate", "0.2", "--max-length-drift", "0.1"], 0),
        (["--max-error-rate", "0.2", "--min-agreement", "0.9"], 1),
        (["--max-error-rate", "0.2", "--max-score-drop", "0.001"], 3),
    ],
)
def test_the_verdict_is_the_exit_status(
    limits: list[str], status: int, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(Fake()) as first, running(Fake(answer=lambda prompt: [*numbered(prompt)[:-1], " off"])) as second:
        sides = ["--baseline", first.url, "--candidate", second.url]
        arguments = ["ab", *sides, "--requests", str(asked), "--out", str(tmp_path / "run"), *limits]
        assert main([*arguments, "--json", str(tmp_path / "out.json")]) == status
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    captured = capsys.readouterr()
    assert "line 25 left out: not JSON" in " ".join(captured.err.split())
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["paired"]["pairs"] == 24
    assert data["verdict"] == {0: "pass", 1: "fail", 3: "not enough data"}[status]
    assert "line 25 of the request file was left out" in (tmp_path / "run" / "report.md").read_text()
    assert data["bad_lines"][0]["line"] == 25


def test_an_interrupt_leaves_a_partial_report(
    asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a key that the server repeats is in no file and no message."""
    monkeypatch.setenv("AB_KEY", KEY)

    def behave(prompt: str) -> str:
        if prompt == "say w15":
            os.kill(os.getpid(), signal.SIGINT)
        return "500" if prompt == "say w3" else ""

    fake = Fake(key=f"Bearer {KEY}", behave=behave, answer=lambda prompt: [f" {KEY}", " it is"])
    with running(fake):
        sides = [option for side in ("baseline", "candidate") for option in (f"--{side}", fake.url)]
        keys = [option for side in ("baseline", "candidate") for option in (f"--{side}-key-env", "AB_KEY")]
        status = main(
            ["ab", *sides, *keys, "--requests", str(asked), "--out", str(tmp_path / "run"), "--concurrency", "2"]
        )
    assert status == 130
    captured = capsys.readouterr()
    assert "PARTIAL" in captured.out
    assert "AB_KEY" in (tmp_path / "run" / "report.md").read_text()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    for text in (captured.out, captured.err, *(path.read_text() for path in (tmp_path / "run").iterdir())):
        assert KEY not in text
        assert "\x1b" not in text, "a server does not steer the terminal"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--candidate", "http://127.0.0.1:9"], "--baseline"),
        (
            ["--baseline", "http://127.0.0.1:9", "--candidate", "http://127.0.0.1:9"],
            "a server at http://127.0.0.1:9/v1",
        ),
        (["--baseline", "x", "--candidate", "preset:turbo4"], "--baseline: expected http"),
        (["--baseline", "preset:turbo4", "--candidate", "preset:turbo5"], "preset: expected one of"),
        (["--baseline", "http://127.0.0.1:9", "--candidate", "x", "--requests", "none.jsonl"], "--requests: expected"),
        (["--baseline", "http://a", "--candidate", "http://b", "--max-score-drop", "-1"], "--max-score-drop"),
        (["--baseline", "http://a", "--candidate", "http://b", "--baseline-key-env", "NO_SUCH"], "--baseline-key-env"),
    ],
)
def test_mistakes(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ab", *arguments, "--out", "run"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert words in lines[-1]
