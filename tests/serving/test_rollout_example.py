"""The example of docs/rollout.md, all its steps on a tiny model: two servers and the router between them."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("scipy")

from tiny import CONTEXT, character_tokenizer, tiny_llama

from turboattention.integrations.models import LoadedModel

EXAMPLE = Path(__file__).parents[2] / "examples" / "rollout"


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A close candidate passes all steps; one that is too far ends at the pilot, and no traffic goes to it."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    # Tests of the reports draw the plots; here they would take most of the time.
    monkeypatch.setattr("turboattention.report.ab_page.render_ab", lambda *_: "")
    import rollout
    import router
    import server

    loaded = LoadedModel(tiny_llama(spread=0.05), character_tokenizer(), "tiny", CONTEXT)
    prompts = (f"{number}: the quick brown fox jumps over the lazy dog. " * 4 for number in range(6))
    asked, share = tmp_path / "asked.jsonl", tmp_path / "share"
    asked.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    options = ["--requests", str(asked), "--max-tokens", "6", "--min-samples", "2", "--max-logprob-distance"]
    with ExitStack() as stack:
        first, second = (stack.enter_context(serving(server.make_server(loaded, p))) for p in ("16-bit", "turbo2"))
        between = router.make_router(first, second, share)
        sides = first, second, stack.enter_context(serving(between))
        strict = list(rollout.steps(*sides, share, tmp_path / "strict", [*options, "1e-9"]))
        assert [(name, status) for name, _, status in strict] == [("noise", 0), ("pilot", 1)]
        counts = between.RequestHandlerClass.counts
        assert counts == {"baseline": 0, "candidate": 0}
        shares = []
        for name, _, status in rollout.steps(*sides, share, tmp_path / "mild", [*options, "1"]):
            shares.append((name, status, share.read_text(), counts["candidate"] > 0, counts["baseline"] > 0))
    assert [row[:3] for row in shares] == [
        *(("noise", 0, "0"), ("pilot", 0, "0"), ("canary", 0, "0.2")), ("full", 0, "1"), ("back", 0, "0"),
    ]  # fmt: skip
    assert counts["candidate"] >= 6, "all requests of the full step"
    assert counts["baseline"] >= 6 + 1, "all of the way back, some of the canary's"
    result = json.loads((tmp_path / "mild" / "back" / "result.json").read_text())
    assert result["paired"]["same"][0] == 1.0
