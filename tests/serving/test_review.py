"""The review without a browser: pairs, the store, who may ask, and what the judgements say."""

import json
import os
import re
import signal
import sqlite3
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("scipy")

from fake_server import Fake, numbered, running
from fastapi.testclient import TestClient

from turboattention.cli.main import main
from turboattention.errors import InvalidInputError
from turboattention.report.review import render_review
from turboattention.serving.review import store as store_module
from turboattention.serving.review.analyse import alpha, analyse, wilson
from turboattention.serving.review.app import LONGEST_BODY, create_app
from turboattention.serving.review.pairs import PairFile, check_same_pairs, read_pairs
from turboattention.serving.review.result import ReviewResult
from turboattention.serving.review.server import host_headers, listen
from turboattention.serving.review.store import Judgement, Store, StoreError, assign

HOST = "127.0.0.1:8765"
OURS = {"Host": HOST, "Origin": f"http://{HOST}"}


def row(index: int) -> str:
    sides = {side: {"text": f"{side} {index}"} for side in ("baseline", "candidate")}
    return json.dumps({"id": f"p{index}", "prompt": f"question {index}", "references": [], **sides})


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(row(index) + "\n" for index in range(5)))
    return path


@pytest.fixture
def store(tmp_path: Path, pairs: Path) -> Iterator[Store]:
    with Store(tmp_path / "review.sqlite", read_pairs(pairs), seed=3) as store:
        yield store


@pytest.fixture
def client(store: Store, pairs: Path) -> Iterator[TestClient]:
    app = create_app(store, read_pairs(pairs), host_headers("127.0.0.1", 8765, ()))
    with TestClient(app, base_url=f"http://{HOST}", headers=OURS) as client:
        yield client


def test_bad_lines_are_named_and_the_others_kept(pairs: Path) -> None:
    bad = ["{", "[]", '{"id": "x", "prompt": "p", "baseline": {"text": "t"}}', '{"id": 7}', "\xff",
           row(9).replace("question 9", "\\ud800")]  # fmt: skip
    pairs.write_bytes("\n".join([row(0), *bad, "", row(1)]).encode("latin-1"))
    file = read_pairs(pairs)
    assert list(file.pairs) == ["p0", "p1"]
    assert [line.split(":")[0] for line in file.bad_lines] == [f"line {n}" for n in (2, 3, 4, 5, 6, 7)]
    assert file.bad_lines[0] == "line 2: not JSON"
    assert "candidate.text: expected text" in file.bad_lines[2]
    assert "surrogate" in file.bad_lines[5]
    pairs.write_text(f"{row(0)}\n{{\n{row(0)}\n")
    with pytest.raises(InvalidInputError, match=r"id: expected each once, received 'p0' in lines 1 and 3"):
        read_pairs(pairs)
    pairs.write_text("{\n")
    with pytest.raises(InvalidInputError, match=r"at least one pair, received line 1: not JSON"):
        read_pairs(pairs)


def test_sides_are_balanced_and_differ_between_raters() -> None:
    names = [f"p{i}" for i in range(100)]
    ann, bob = assign(names, "Ann", 0), assign(names, "Bob", 0)
    assert ann == assign(names, "Ann", 0)
    assert ann != bob != assign(names, "Bob", 1)
    for order in (ann, bob):
        assert sorted(pair for pair, _ in order) == sorted(names)
        assert sum(left for _, left in order) == 50
    same = sum(dict(ann)[name] == dict(bob)[name] for name in names)
    assert 30 <= same <= 70


def test_a_rater_goes_on_after_a_restart(tmp_path: Path, pairs: Path) -> None:
    path, file = tmp_path / "review.sqlite", read_pairs(pairs)
    with Store(path, file, 0) as store:
        first = store.place("Ann")
        store.judge(" Ann ", 0, "left")
        store.judge("Ann", 1, "tie")
        assert store.undo("Ann")
        with pytest.raises(InvalidInputError, match="not judged yet"):
            store.judge("Ann", 0, "right")
        with pytest.raises(InvalidInputError, match="choice: expected one of left"):
            store.judge("Ann", 1, "best")
        for name in ("", " ", "x" * 65, "a\nb", "\ud800"):
            with pytest.raises(InvalidInputError, match="name: expected 1 to 64"):
                store.place(name)
        assert not store.undo("Bob")
    with Store(path, file, 0) as store:
        assert store.place("Ann")[:2] == (1, 5)
        assert store.judgements() == [Judgement("Ann", str(first.pair), first.candidate_left, "left")]
        for position in range(1, 5):
            store.judge("Ann", position, "tie")
        assert store.place("Ann").pair is None
    other = PairFile({"p0": file.pairs["p0"]}, ())
    for changed, seed, words in ((other, 0, "the pairs that"), (file, 1, "the seed that")):
        with pytest.raises(InvalidInputError, match=words), Store(path, changed, seed):
            pass
    for content in (b"not a database, but long enough to be taken for one" * 20, None):
        path.unlink()
        if content is None:
            sqlite3.connect(path).executescript("CREATE TABLE mine (x)")
        else:
            path.write_bytes(content)
        with pytest.raises(InvalidInputError, match="a file of turboattention review"), Store(path, file, 0):
            pass


def test_a_full_disk_and_a_locked_file_lose_nothing(
    store: Store, client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path
) -> None:
    client.post("/api/next", json={"rater": "Ann"})
    assert client.post("/api/judge", json={"rater": "Ann", "position": 0, "choice": "tie"}).status_code == 200
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # how SQLite meets a full disk
    answers = [client.post("/api/next", json={"rater": f"rater {i}" + "x" * 50}) for i in range(40)]
    full = next(answer for answer in answers if answer.status_code != 200)
    assert full.status_code == 503
    assert re.search(r"full; judgements before are kept: make room", full.json()["error"])
    store._db.execute(f"PRAGMA max_page_count = {pages + 100}")
    assert client.post("/api/judge", json={"rater": "Ann", "position": 1, "choice": "tie"}).json()["position"] == 2
    store._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    locked = client.post("/api/judge", json={"rater": "Ann", "position": 2, "choice": "tie"})
    assert (locked.status_code, "locked" in locked.json()["error"]) == (503, True)
    monkeypatch.setattr(store_module, "WAIT_S", 0.05)
    with pytest.raises(StoreError, match="locked"), Store(store.path, read_pairs(pairs), 3):
        pass
    other.execute("ROLLBACK")
    assert client.post("/api/judge", json={"rater": "Ann", "position": 2, "choice": "tie"}).status_code == 200
    assert len(store.judgements()) == 3


def test_a_rater_sees_no_sides(client: TestClient, store: Store) -> None:
    found = client.post("/api/next", json={"rater": "Ann"}).json()
    assert set(found) == {"position", "total", "pair", "choices"}
    assert set(found["pair"]) == {"prompt", "left", "right"}
    place = store.place("Ann")
    assert found["pair"]["left"].startswith("candidate" if place.candidate_left else "baseline")
    assert found["pair"]["left"][-1] == found["pair"]["prompt"][-1] == str(place.pair)[-1]


def test_who_may_ask(client: TestClient) -> None:
    ask = {"rater": "Eve"}
    for headers in (
        {"Host": "evil.example:8765", "Origin": "http://evil.example:8765"},  # DNS rebinding: both agree
        {"Host": "127.0.0.1:80"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://{HOST}"},
        {"Origin": f"http://{HOST}.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert client.post("/api/next", json=ask, headers=headers).status_code == 403, headers
    del client.headers["origin"]
    assert client.post("/api/next", json=ask).status_code == 403  # browsers always send it
    assert client.get("/", headers={"Host": "evil.example:8765"}).status_code == 403
    assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    crossing = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert client.get("/review.js", headers=crossing).status_code == 403
    assert client.get("/", headers=crossing | {"Sec-Fetch-Mode": "navigate"}).status_code == 200  # a link was followed


def test_nothing_else_can_be_had(client: TestClient) -> None:
    for path in ("/docs", "/openapi.json", "/redoc", "/api/results", "/review.py", "/../pairs.jsonl", "/page/review.js",
                 "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/review.sqlite"):  # fmt: skip
        assert client.get(path).status_code == 404, path
    assert client.get("/api/next").status_code == 405
    for body, status in (
        ({"rater": "Ann", "extra": 1}, 422),
        ({"rater": 7}, 422),
        ({"rater": "Ann", "position": "0", "choice": "left"}, 422),
        ({"rater": "Ann", "position": 99, "choice": "left"}, 422),
        ({"rater": "Ann", "position": 2**70, "choice": "left"}, 422),
        ({"rater": "x" * LONGEST_BODY}, 413),
    ):
        assert client.post("/api/judge", json=body).status_code == status, body
    assert (
        client.post("/api/judge", content=b'{"rater": "\\ud800', headers={"Content-Type": "text/plain"}).status_code
        == 422
    )
    for path, kind in (("/", "text/html"), ("/review.js", "text/javascript"), ("/review.css", "text/css"), ("/x", "")):
        answer = client.get(path)
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
    page = client.get("/").text + client.get("/review.js").text
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(|style=|onclick", page)


def test_addresses() -> None:
    assert "localhost:1" in host_headers("127.0.0.1", 1, ())
    assert host_headers("192.0.2.7", 1, ("Box.example",)) == {"192.0.2.7:1", "box.example:1"}
    assert host_headers("0.0.0.0", 80, ("box",)) == {"box:80", "box"}
    with pytest.raises(InvalidInputError, match="--allow-host: expected the name that raters will type"):
        host_headers("0.0.0.0", 1, ())
    with listen("127.0.0.1", 0) as bound, pytest.raises(InvalidInputError, match="a free port"):
        listen("127.0.0.1", bound.getsockname()[1])


def test_alpha_of_the_published_example() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: 0.743."""
    raters = ("123321412...", "1233224125.3", ".3332342251.", "1233244125 1".replace(" ", "1")[:11] + ".")
    units = [[row[i] for row in raters if row[i] != "."] for i in range(12)]
    found = alpha([unit for unit in units if unit])
    assert found == pytest.approx(0.743, abs=5e-4)
    assert alpha([["a", "a"], ["b", "b"]]) == 1
    assert alpha([["a", "a"], ["a", "a"]]) is None
    assert alpha([["a"], ["b"]]) is None


def test_what_judgements_say(pairs: Path) -> None:
    file = read_pairs(pairs)
    votes = [  # the candidate is on the left for Ann, on the right for Bob
        Judgement("Ann", "p0", True, "left"), Judgement("Bob", "p0", False, "right"),
        Judgement("Ann", "p1", True, "left"), Judgement("Bob", "p1", False, "tie"),
        Judgement("Ann", "p2", True, "right"), Judgement("Bob", "p2", False, "both_bad"),
        Judgement("Ann", "p3", True, "tie"),
    ]  # fmt: skip
    found = analyse(file, votes, "pairs.jsonl", 3)
    assert (found.pairs, found.judged, found.counts.total) == (5, 4, 7)
    assert Counter(vars(found.counts)) == {"candidate": 3, "baseline": 1, "tie": 2, "both_bad": 1}
    assert found.preferred is not None
    assert found.preferred[0] == pytest.approx(2 / 3)
    assert found.preferred == wilson(2, 3)
    assert found.net is not None
    assert found.net.value == pytest.approx((1 + 0.5 - 0.5 + 0) / 4)
    assert found.net.low <= found.net.value <= found.net.high
    assert found.left == wilson(2, 4)
    assert found.agreement is not None
    assert found.agreement.samples == 3
    # Wilson's interval of 8 of 10, as in Agresti and Coull (1998).
    interval = wilson(8, 10)
    assert interval is not None
    assert interval[1:3] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    empty = analyse(file, [], "pairs.jsonl", 3)
    assert (empty.preferred, empty.net, empty.agreement) == (None, None, None)
    assert "| pairs judged | 0 of 5; 0 judgements, 0 raters |" in render_review(empty)


def test_the_command_prints_results(
    capsys: pytest.CaptureFixture[str], store: Store, pairs: Path, tmp_path: Path
) -> None:
    with pairs.open("a") as file:
        file.write("{\n")
    name = "<b>|Ann|</b>"
    store.place(name)
    store.judge(name, 0, "left")
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    base = ["review", str(pairs), "--data", str(store.path)]
    assert main([*base, "--seed", "3", "--results", "--json", str(out), "--markdown", str(markdown)]) == 0
    captured = capsys.readouterr()
    assert captured.out == markdown.read_text()
    assert "\\<b\\>\\|Ann\\|\\</b\\>" in captured.out
    assert "line 6: not JSON" in captured.err
    assert "line 6: not JSON" in captured.out
    loaded = ReviewResult.load(out)
    assert loaded == analyse(read_pairs(pairs), store.judgements(), pairs.name, 3)
    data = json.loads(out.read_text())
    assert (data["judged"], data["pairs"], data["schema"]) == (1, 5, 1)
    for arguments, words in (
        ([*base, "--seed", "4", "--results"], "the seed that"),
        ([*base, "--json", str(out)], "--results beside them"),
        ([*base, "--results", "--json", str(store.path)], "different files"),
        ([*base, "--results", "--json", str(pairs)], "other files than the pairs"),
        (["review", str(pairs), "--data", str(tmp_path / "none"), "--results"], "a file with judgements"),
        (["review", str(tmp_path / "none"), "--data", str(tmp_path / "new")], "readable file of JSON lines"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_judgements_go_into_the_report_of_the_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From `ab` through judgements back to its report, for which no server is asked again."""
    asked, out, review = tmp_path / "asked.jsonl", tmp_path / "run", tmp_path / "review.json"
    asked.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"say w{i}"}) + "\n" for i in range(4)))
    with running(Fake()) as first, running(Fake(answer=lambda prompt: [*numbered(prompt)[:-1], " off"])) as second:
        sides = ["--baseline", first.url, "--candidate", second.url]
        run = ["ab", *sides, "--requests", str(asked), "--out", str(out)]
        assert main(run) == 0
    data = tmp_path / "review.sqlite"
    with Store(data, read_pairs(out / "pairs.jsonl"), 0) as store:
        for rater in ("Ann", "Bob"):
            while (place := store.place(rater)).pair is not None:
                store.judge(rater, place.position, "right" if place.candidate_left else "left")
    assert main(["review", str(out / "pairs.jsonl"), "--data", str(data), "--results", "--json", str(review)]) == 0
    capsys.readouterr()
    assert main([*run, "--review", str(review)]) == 0
    row = "4 of 4; 8 judgements, 2 raters"
    shown = capsys.readouterr().out, (out / "report.md").read_text(), (out / "report.html").read_text()
    for text in shown:
        assert row in text
        assert "0.0% (0.0% to 49.0%; 4)" in text
    with pytest.raises(InvalidInputError, match="those of other pairs"):
        check_same_pairs("0" * 64, out / "pairs.jsonl")
    review.write_text("{}")
    assert main([*run, "--review", str(review)]) == 2
    assert "the JSON of turboattention review" in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted(
    capsys: pytest.CaptureFixture[str], pairs: Path, tmp_path: Path
) -> None:
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
    pages = []

    def visit_and_interrupt() -> None:
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/", timeout=20) as answer:
                    pages.append(answer.read())
                break
            except OSError:
                time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit_and_interrupt)
    visitor.start()
    assert main(["review", str(pairs), "--data", str(tmp_path / "r.sqlite"), "--port", str(port)]) == 0
    visitor.join()
    assert b"Which answer is better?" in pages[0]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"5 pairs on http://127.0.0.1:{port}/"
    assert said[-1] == f"stopped; 0 judgements are in {tmp_path / 'r.sqlite'}"
