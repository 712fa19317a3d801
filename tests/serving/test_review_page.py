"""The review page in a real browser: keys, clicks, undo, going on, hostile answers, a page of another site."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from browser import Page, find_browser

from turboattention.serving.review.pairs import read_pairs
from turboattention.serving.review.server import host_headers, listen, make_server
from turboattention.serving.review.store import Judgement, Store

BROWSER = find_browser()
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


class Running:
    """The server in a thread of this process."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        file = read_pairs(folder / "pairs.jsonl")
        self.store = Store(folder / "review.sqlite", file, 0).__enter__()
        self.socket = listen("127.0.0.1", port)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.server = make_server(self.store, file, host_headers("127.0.0.1", self.port, ()))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def stop(self) -> list[Judgement]:
        """What was stored. Calling it again does nothing."""
        self.server.should_exit = True
        self.thread.join(30)
        self.socket.close()
        found = self.store.judgements()
        self.store.__exit__(None, None, None)
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"id": f"p{i}", "prompt": f"{EVIL} question {i}", "baseline": {"text": f"{EVIL} baseline {i}"},
             "candidate": {"text": f"candidate {i}\n\n  indented {EVIL}"}} for i in range(4)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed (apt-get install chromium)")
    with Page(BROWSER, tmp_path_factory.mktemp("profile")) as page:
        yield page


def judged(page: Page, count: int) -> None:
    page.wait(f"document.getElementById('progress').textContent.endsWith(': {count} of 4 judged')")


def test_a_person_judges_all_pairs(folder: Path, page: Page) -> None:
    running = Running(folder)
    try:
        page.open(running.url)
        page.click("#name")
        page.type("Ann")
        page.key("Enter")
        judged(page, 0)
        # Answers are text: nothing of them ran or became an element, and white space is kept.
        shown = [page.value(f"document.getElementById('{side}').textContent") for side in ("left", "right")]
        assert sum("baseline" in text for text in shown) == 1
        assert sum("candidate" in text and "\n\n  indented <img src=x" in text for text in shown) == 1
        assert page.value("document.querySelectorAll('main img, main script').length") == 0
        page.key("1")
        judged(page, 1)
        page.key("ArrowUp")
        judged(page, 2)
        page.key("u")
        judged(page, 1)
        page.click("[data-choice=tie]")
        judged(page, 2)
        assert [judgement.choice for judgement in running.stop()] == ["left", "tie"]
        # The server is gone: one clear line, nothing lost. It comes back, and the page goes on after a reload.
        page.key("2")
        page.wait("document.getElementById('error').textContent.startsWith('The server does not answer')")
        running = Running(folder, running.port)
        page.open(running.url)
        judged(page, 2)
        page.key("2")
        judged(page, 3)
        page.click("[data-choice=both_bad]")
        page.wait("!document.getElementById('done').hidden")
        assert page.value("document.title") == "Which answer is better?"
        assert [text for text in page.complaints() if "ERR_CONNECTION_REFUSED" not in text] == []
    finally:
        found = running.stop()
    assert [judgement.choice for judgement in found] == ["left", "tie", "right", "both_bad"]


def test_another_site_can_not_ask(folder: Path, page: Page) -> None:
    """A page of another origin in the same browser: its posts are refused, it reads nothing and frames nothing."""
    running = Running(folder)
    try:
        (folder / "evil.html").write_text(f"<p>evil</p><iframe src='{running.url}'></iframe>")
        page.open(f"file://{folder}/evil.html")
        page.value(
            "window.said = []; for (const type of ['text/plain', 'application/json'])"
            f" fetch('{running.url}api/next', {{method: 'POST', headers: {{'Content-Type': type}},"
            " body: JSON.stringify({rater: 'Eve'})})"
            ".then(r => r.status, e => 'refused').then(x => window.said.push(x)); 1"
        )
        page.wait("window.said.length === 2")
        assert page.value("window.said") == ["refused", "refused"]
        assert any("frame" in text for text in page.complaints())
        assert running.store._db.execute("SELECT COUNT(*) FROM assignment").fetchone() == (0,)
    finally:
        running.stop()
