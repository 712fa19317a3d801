"""A run of ``ab`` that is killed (SIGKILL) while answers come, and goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("scipy")

from fake_server import Fake, running

from turboattention.cli.main import main
from turboattention.serving.store import ANSWERS

COUNT = 40


def test_a_killed_process_loses_no_answer_and_asks_none_twice(tmp_path: Path) -> None:
    asked = tmp_path / "requests.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"say w{i}", "max_tokens": 8}) + "\n" for i in range(COUNT)))
    out = tmp_path / "run"

    def slowly(prompt: str) -> str:
        time.sleep(0.05)
        return ""

    with running(Fake(behave=slowly)) as one, running(Fake(behave=slowly)) as two:
        arguments = [
            "ab", "--baseline", one.url, "--candidate", two.url, "--requests", str(asked), "--out", str(out),
            "--concurrency", "2",
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "turboattention", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        answers = out / ANSWERS
        end = time.monotonic() + 120
        while not answers.exists() or answers.read_bytes().count(b"\n") < COUNT // 2:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        whole = answers.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        kept = whole.count(b"\n")
        assert COUNT // 2 <= kept < 2 * COUNT
        for fake in (one, two):
            fake.asked.clear()
        assert main(arguments) == 0
        again = [prompt for fake in (one, two) for prompt in fake.prompts() if prompt.startswith("say w")]
    assert answers.read_bytes().startswith(whole)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len({(row["id"], row["side"]) for row in rows}) == len(rows) == 2 * COUNT
    assert all(row["error"] is None for row in rows)
    # Warm-up asks some of the first requests again; no other is asked twice.
    assert len(again) - (2 * COUNT - kept) <= 4
