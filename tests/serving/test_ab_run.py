"""A whole run over two servers: turns, resuming after any cut, outages, a full disk, Ctrl-C, what the result says."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("scipy")

from fake_server import Fake, numbered, running
from hypothesis import given, settings
from hypothesis import strategies as st

from turboattention.errors import InvalidInputError
from turboattention.serving.answer import SIDES
from turboattention.serving.endpoint import Endpoint
from turboattention.serving.limits import Limits
from turboattention.serving.prompts import Request
from turboattention.serving.run import OutageError
from turboattention.serving.secrets import Secret
from turboattention.serving.session import Outcome, Settings, run_ab
from turboattention.serving.store import ANSWERS, PAIRS, DiskError

REQUESTS = [Request(f"q{i}", f"say w{i}", references=(f"w{i}",)) for i in range(30)]
FEW = REQUESTS[:15]  # two turns
KEY = "sk-secret-0123456789"


def changed(prompt: str) -> list[str]:
    """Prompts that end with 7 get another first token, those that end with 8 another last one."""
    tokens = numbered(prompt)
    if prompt.endswith("7"):
        return [" wrong", *([" word"] * 2), *tokens[3:]]
    return [*tokens[:-1], " off"] if prompt.endswith("8") else tokens


def compare(out: Path, fakes: tuple[Fake, Fake], limits: Limits | None = None, **options: Any) -> Outcome:
    chosen = Settings(concurrency=options.pop("concurrency", 3), timeout_s=5)
    requests = options.pop("requests", REQUESTS)
    secrets = options.get("secrets", ())
    key = secrets[0] if secrets else None
    sides = [
        Endpoint(name, fake.url, key=key, concurrency=chosen.concurrency, timeout_s=5)
        for name, fake in zip(SIDES, fakes, strict=True)
    ]
    return run_ab(out, sides, requests, limits or Limits(), chosen, **options)


@contextmanager
def two(first: Fake | None = None, second: Fake | None = None) -> Iterator[tuple[Fake, Fake]]:
    with running(first or Fake()) as a, running(second or Fake(answer=changed, logprob=-0.5)) as b:
        yield a, b


def contents(path: Path) -> list[tuple[Any, ...]]:
    """All but the times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((row["id"], row["side"], row["text"], str(row["tokens"]), str(row["error"])) for row in rows)


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    limits = Limits(max_score_drop=0.5, min_agreement=0.99, max_error_rate=0.2, max_logprob_distance=0.3)
    with two() as fakes:
        result = compare(tmp_path / "run", fakes, limits).result
    assert (result.stopped, result.verdict, result.requests) == ("", "fail", 30)
    assert [check.outcome for check in result.checks] == ["pass", "fail", "pass", "pass"]
    paired = result.paired
    assert (paired.pairs, paired.scored, paired.lost, paired.gained) == (30, 30, 3, 0)
    assert paired.same is not None
    assert paired.same.value == pytest.approx(24 / 30)
    assert paired.score_difference is not None
    assert paired.score_difference.value == pytest.approx(-0.1)
    assert paired.mcnemar_p == 0.25
    assert paired.first_difference == 2.5, "three part at token 0, three at 5"
    assert paired.logprob_difference is not None
    assert paired.logprob_difference.value == pytest.approx(-0.25)
    assert paired.logprob_tokens == 24 * 6 + 3 * 5
    assert result.baseline.score == 1.0
    assert result.candidate.tokens == 6
    assert [(flip.kind, flip.id) for flip in result.flips] == [
        *(("lost", name) for name in ("q7", "q17", "q27")), *(("differs", name) for name in ("q8", "q18", "q28")),
    ]  # fmt: skip
    assert {fake.most_at_once for fake in fakes} == {3}, "bounded, and the bound is used"
    pairs = [json.loads(line) for line in (tmp_path / "run" / PAIRS).read_text().splitlines()]
    assert len(pairs) == 30
    assert pairs[7] == {
        "id": "q7", "prompt": "say w7", "references": ["w7"],
        "baseline": {"text": " w7 w7 w7 and so on"}, "candidate": {"text": " wrong word word and so on"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, tuple[Fake, Fake]]]:
    """A finished run, its servers still there."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with two() as fakes:
        compare(folder, fakes, requests=FEW)
        yield folder, fakes


@settings(max_examples=10)
@given(st.floats(0, 1))
def test_a_run_that_was_killed_goes_on(whole: tuple[Path, tuple[Fake, Fake]], share: float) -> None:
    """Whatever byte was the last, the answers in the end are the same and none is asked twice."""
    folder, fakes = whole
    part = folder.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    data = (folder / ANSWERS).read_bytes()
    cut = data[: round(share * len(data))]
    (part / ANSWERS).write_bytes(cut)
    (part / PAIRS).unlink()
    for fake in fakes:
        fake.asked.clear()
    result = compare(part, fakes, requests=FEW).result
    assert result.stopped == ""
    assert contents(part / ANSWERS) == contents(folder / ANSWERS)
    assert sum(len(fake.prompts()) for fake in fakes) == 2 * len(FEW) - cut.count(b"\n")
    assert (part / PAIRS).read_bytes() == (folder / PAIRS).read_bytes()


def test_a_changed_run_is_refused(whole: tuple[Path, tuple[Fake, Fake]], tmp_path: Path) -> None:
    folder, (first, second) = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"requests": FEW[:-1]}, "requests sha256"),
        ({"limits": Limits(max_score_drop=0.1)}, "limits max_score_drop: None.*before the answers are seen"),
        ({"concurrency": 2}, "concurrency: 3"),
    ]
    for options, words in changes:
        with pytest.raises(InvalidInputError, match=f"--out: expected the run that .*{words}.*choose a new folder"):
            compare(folder, (first, second), **{"requests": FEW, **options})
    with pytest.raises(InvalidInputError, match="baseline url"):
        compare(folder, (second, first), requests=FEW)
    second.models, kept = ["other"], second.models
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / ANSWERS).write_bytes(before[ANSWERS][: len(before[ANSWERS]) // 2])
    with pytest.raises(InvalidInputError, match=r"candidate model: fake.*received candidate model: other"):
        compare(tmp_path / "run", (first, second), requests=FEW)
    second.models = kept
    (tmp_path / "run" / ANSWERS).write_bytes(b"")
    compare(tmp_path / "run", (second, first), requests=FEW)  # without answers nothing is bound
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_line_that_cannot_be_read_is_asked_again(whole: tuple[Path, tuple[Fake, Fake]], tmp_path: Path) -> None:
    folder, fakes = whole
    shutil.copytree(folder, tmp_path / "run")
    lines = (folder / ANSWERS).read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / ANSWERS).write_bytes(b"".join([*lines[:4], lines[4][:30] + b"\n", *lines[5:]]))
    result = compare(tmp_path / "run", fakes, requests=FEW).result
    assert result.paired.pairs == 15
    assert any("line 5 cannot be read and is asked again" in remark for remark in result.remarks)


def test_an_outage_keeps_what_was_answered(tmp_path: Path) -> None:
    with running(Fake()) as first:
        with running(Fake()) as second:
            compare_two = (first, second)
            port = second.port
            second.behave = lambda prompt: _close_after(second, 12)
            outcome = compare(tmp_path / "run", compare_two, Limits(max_error_rate=0.1))
        assert isinstance(outcome.stopped_by, OutageError)
        assert "candidate: expected a server" in outcome.result.stopped
        assert "--retry-errors" in outcome.result.stopped
        assert outcome.result.candidate.errors["unreachable"] >= 5
        with running(Fake(port=port)) as second:
            again = compare(tmp_path / "run", (first, second), Limits(max_error_rate=0.1), retry_errors=True).result
            assert (again.stopped, again.paired.pairs, again.candidate.errors) == ("", 30, {})
            assert len(second.prompts()) <= 30 - 8, "answers from before the outage were kept"


def _close_after(fake: Fake, count: int) -> str:
    """The listening socket goes, as when a process dies."""
    if len(fake.prompts()) == count and fake.listening is not None:
        fake.listening.close()
    return ""


def test_a_full_disk_keeps_whole_lines(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with two() as fakes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (7000, hard))
        try:
            outcome = compare(tmp_path / "run", fakes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert isinstance(outcome.stopped_by, DiskError)
        kept = contents(tmp_path / "run" / ANSWERS)
        assert 10 < len(kept) < 60
        assert f"{len(kept)} answers are kept" in outcome.result.stopped
        assert compare(tmp_path / "run", fakes).result.paired.pairs == 30
        assert sum(len(fake.prompts()) for fake in fakes) <= 60 + 3, "at most those in flight were asked twice"


def test_an_interrupt_gives_a_partial_result(tmp_path: Path) -> None:
    def behave(prompt: str) -> str:
        if prompt == "say w20":
            os.kill(os.getpid(), signal.SIGINT)
        return ""

    with two(Fake(behave=behave)) as fakes:
        outcome = compare(tmp_path / "run", fakes, Limits(max_error_rate=0.5))
    assert isinstance(outcome.stopped_by, KeyboardInterrupt)
    assert outcome.result.stopped == "interrupted"
    kept = contents(tmp_path / "run" / ANSWERS)
    assert outcome.result.baseline.answers + outcome.result.candidate.answers == len(kept) < 60
    assert len((tmp_path / "run" / PAIRS).read_text().splitlines()) == outcome.result.paired.pairs > 0


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    second_words = []

    def behave(prompt: str) -> str:
        if prompt == "say w5":
            with pytest.raises(InvalidInputError) as error:
                compare(tmp_path / "run", fakes)
            second_words.append(str(error.value))
        return ""

    with two(Fake(behave=behave)) as fakes:
        assert compare(tmp_path / "run", fakes).result.paired.pairs == 30
    assert "no other run uses now" in second_words[0]


def test_mixed_tokenizers_are_said_and_not_compared(tmp_path: Path) -> None:
    def letters(prompt: str) -> list[str]:
        return [*"".join(numbered(prompt))]

    for name, fake in (("split", Fake(answer=letters)), ("counts", Fake(prompt_tokens=9))):
        with two(second=fake) as fakes:
            limits = Limits(max_tpot_ratio=10, max_logprob_distance=10, min_agreement=0.5)
            result = compare(tmp_path / name, fakes, limits).result
        assert "Mixed tokenizers or prompt templates" in result.remarks[0]
        assert result.paired.logprob_difference is None
        assert result.paired.tpot_ratio is None
        assert result.paired.length_unit == "characters"
        assert [check.outcome for check in result.checks] == ["pass", "not enough data", "not enough data"]
        assert "different tokens" in result.checks[1].reason


def test_remarks_of_the_first_part_are_kept(tmp_path: Path) -> None:
    with two(Fake(logprobs=False)) as fakes:
        first = compare(tmp_path / "run", fakes, requests=FEW[:2]).result
        again = compare(tmp_path / "run", fakes, requests=FEW[:2]).result
    assert any("baseline: the server refuses log-probabilities" in remark for remark in first.remarks)
    assert again.remarks == first.remarks
    assert again.to_dict()["paired"] == first.to_dict()["paired"]


def test_keys_reach_no_file(tmp_path: Path) -> None:
    """The server repeats the key in its answers and in its errors."""
    fake = Fake(
        key=f"Bearer {KEY}",
        answer=lambda prompt: [f" your key is {KEY}", " sk-secret", "-0123456789"],
        behave=lambda prompt: "500" if prompt.endswith("9") else "",
    )
    with running(fake) as first:
        result = compare(tmp_path / "run", (first, first), secrets=(Secret(KEY),)).result
    assert result.baseline.errors == {"http": 3}
    assert "key Bearer [key]" in result.baseline.error_examples[0]
    assert KEY not in json.dumps(result.to_dict())
    files = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    assert {"run.json", ANSWERS, PAIRS, "requests.jsonl"} == set(files)
    for text in files.values():
        assert KEY not in text
        assert "-0123456789" not in text, "nor in pieces"
