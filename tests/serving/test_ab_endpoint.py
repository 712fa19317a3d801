"""A server as a side: what is asked, what comes back, and every way in which it can go wrong."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("scipy")

from fake_server import Fake, running

from turboattention.errors import InvalidInputError
from turboattention.serving.agreement import agreement
from turboattention.serving.answer import Answer
from turboattention.serving.endpoint import Endpoint
from turboattention.serving.prompts import Request, bundled_requests, read_requests
from turboattention.serving.scores import score
from turboattention.serving.secrets import Secret, hide, read_key

KEY = 'sk-"quoted"\\secret-0123'


def ask(fake: Fake, *requests: Request, **options: Any) -> tuple[list[str], list[Answer]]:
    async def work() -> tuple[list[str], list[Answer]]:
        side = Endpoint("baseline", fake.url, **options)
        try:
            remarks = await side.prepare([Request("warm-up-0", "Warm-up 0. x")])
            return remarks, [await side.ask(request) for request in requests]
        finally:
            await side.close()

    return asyncio.run(work())


@pytest.mark.parametrize("request_", [Request("a", "say hi"), Request("a", "", ({"role": "user", "content": "hi"},))])
def test_both_apis_give_the_same_answer(request_: Request) -> None:
    with running(Fake()) as fake:
        remarks, [answer] = ask(fake, request_)
    assert remarks == []
    assert fake.paths[-1] == ("/v1/chat/completions" if request_.messages else "/v1/completions")
    assert answer.text == " hi hi hi and so on"
    assert answer.tokens == [" hi", " hi", " hi", " and", " so", " on"]
    assert answer.logprobs == [-0.25] * 6
    assert (answer.prompt_tokens, answer.completion_tokens, answer.counted) == (7, 6, "usage")
    assert answer.finish == "stop"
    assert answer.error is None
    assert len(answer.times_s) == 6
    assert 0 < answer.times_s[0] <= answer.times_s[-1] <= answer.total_s
    assert answer.tpot_s == pytest.approx((answer.total_s - answer.times_s[0]) / 5)
    assert fake.asked[-1]["temperature"] == 0
    assert fake.asked[-1]["seed"] == 0
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


@pytest.mark.parametrize(
    ("behave", "kind", "words", "text"),
    [
        ("500", "http", "HTTP 500: out of memory", ""),
        ("html", "protocol", "text/html", ""),
        ("slow", "timeout", "within 0.4 s", " hi hi"),
        ("cut", "cut", "without its end mark", " hi hi"),
        ("gone", "cut", "disconnected", ""),
        ("garbage", "protocol", "{not json", " hi hi"),
        ("error", "http", "engine died", " hi hi"),
    ],
)
def test_failures_are_in_the_answer(behave: str, kind: str, words: str, text: str) -> None:
    wrong = Fake(behave=lambda prompt: "" if prompt.startswith("Warm-up") else behave)
    with running(wrong) as fake:
        _, [answer] = ask(fake, Request("a", "say hi"), timeout_s=0.4)
    assert answer.error is not None
    assert answer.error.kind == kind
    assert words in answer.error.message
    assert answer.text == text, "what came before is kept"


def test_a_connection_that_had_been_closed_is_opened_again() -> None:
    def behave(prompt: str) -> str:
        return "gone" if fake.prompts() == ["say hi"] else ""

    with running(Fake(behave=behave)) as fake:
        _, [answer] = ask(fake, Request("a", "say hi"))
    assert answer.error is None
    assert fake.prompts() == ["say hi"] * 2


def test_a_server_that_is_gone() -> None:
    with running(Fake()) as fake:
        pass
    with pytest.raises(InvalidInputError, match="--baseline: expected a server at http"):
        ask(fake)


@pytest.mark.parametrize(
    ("fake", "options", "words"),
    [
        (Fake(models=["a", "b"]), {}, "--baseline-model: expected a name, .*received a, b"),
        (Fake(models=["a", "b"]), {"model": "c"}, "--baseline-model: expected one of a, b, received 'c'"),
        (Fake(key="Bearer right"), {}, "key of baseline: expected one that"),
        (Fake(behave=lambda _: "500"), {}, "an answer to the warm-up request, received HTTP 500"),
    ],
)
def test_what_is_refused_before_the_run(fake: Fake, options: dict[str, Any], words: str) -> None:
    with running(fake), pytest.raises(InvalidInputError, match=words):
        ask(fake, **options)


def test_a_server_without_log_probabilities_and_counts() -> None:
    with running(Fake(logprobs=False, usage=False)) as fake:
        remarks, [answer] = ask(fake, Request("a", "say hi"))
    assert remarks == ["baseline: the server refuses log-probabilities; they are not compared."]
    assert answer.tokens is None
    assert answer.logprobs is None
    assert (answer.completion_tokens, answer.counted) == (6, "pieces")


@pytest.mark.parametrize("url", ["http://me:pw123456@host:1", "http://host:1?key=pw123456", "ftp://host", "preset"])
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="--candidate") as error:
        Endpoint("candidate", url)
    assert "pw123456" not in str(error.value)


def test_keys_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    (tmp_path / "key").write_text(KEY)
    key = read_key("baseline", "MY_KEY", None)
    assert key == read_key("baseline", None, tmp_path / "key") == Secret(KEY)
    assert KEY not in f"{key} {key!r}"
    assert hide({"a": [f"x{KEY}y", 1]}, (Secret(KEY),)) == {"a": ["x[key]y", 1]}
    spelled = Answer("a", "baseline", f"it is {KEY}", 0.0, 0.0, [], tokens=[*KEY], logprobs=[0.0] * len(KEY))
    assert "secret" not in json.dumps(spelled.to_dict((Secret(KEY),)))
    assert spelled.to_dict((Secret(KEY),))["tokens"] is None, "they would spell it"
    (tmp_path / "key").write_text("two words and\nlines-0123456")
    for wrong in ((KEY, None), (None, tmp_path / "key"), (None, tmp_path / "none"), ("A", tmp_path / "key")):
        with pytest.raises(InvalidInputError, match="--baseline-key-") as error:
            read_key("baseline", *wrong)
        assert KEY not in str(error.value)
        assert "lines-0123456" not in str(error.value)


LINES = """
{"id": "a", "prompt": "x", "reference": ["1", "one"], "max_tokens": 5, "metadata": {"any": 1}}
{"id": "b", "messages": [{"role": "user", "content": "hello"}], "reference": "2"}
{"prompt": "without an id"}
{broken
["no object"]
{"id": "a", "prompt": "again"}
{"id": "c", "promt": "x"}
{"id": "d", "prompt": "x", "messages": []}
{"id": "e"}
{"id": "f", "prompt": ""}
{"id": "g", "messages": [{"role": "user"}]}
{"id": "h", "prompt": "x", "max_tokens": 0}
{"id": "i", "prompt": "x", "reference": []}
{"id": "j", "prompt": "\\ud800"}
""".replace("\n", "\r\n")


def test_bad_lines_are_reported_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.encode() + b'{"id": "k", "prompt": "\xff"}\n{"id": 12, "prompt": "last"}')
    good, bad = read_requests(path, max_tokens=9)
    assert [request.id for request in good] == ["a", "b", "line-4", "12"]
    assert [request.max_tokens for request in good] == [5, 9, 9, 9]
    assert good[0].references == ("1", "one")
    assert good[1].chat() == [{"role": "user", "content": "hello"}]
    assert [line.number for line in bad] == list(range(5, 17))
    words = (
        *("not JSON", "a JSON object", "one of its own", "promt", "both", "neither", "prompt: expected text"),
        *("messages", "max_tokens", "reference", "surrogates", "not UTF-8"),
    )
    assert [line.reason for line, word in zip(bad, words, strict=True) if word not in line.reason] == []
    path.write_text("{}\n")
    with pytest.raises(InvalidInputError, match=r"at least one good line, received none of 1 .*line 1"):
        read_requests(path)


def test_bundled_requests_are_long_enough_to_be_compressed() -> None:
    requests = bundled_requests()
    assert len({request.id for request in requests}) == 48
    scored = [request for request in requests if request.references]
    assert len(scored) == 36
    assert all(request.references[0] in request.prompt for request in scored)
    assert min(len(request.prompt) for request in requests) >= 3000


@pytest.mark.parametrize(
    ("text", "reference", "contains", "normalised", "exact"),
    [
        ("The answer is 4.", "4", True, False, False),
        ("It is 42", "4", False, False, False),
        ("the Eiffel tower!", "Eiffel Tower", True, True, False),
        (" 4 ", "4", True, True, True),
        ("a + b", "+", True, False, False),
    ],
)
def test_scores(text: str, reference: str, contains: bool, normalised: bool, exact: bool) -> None:
    assert score("contains", text, ["never", reference]) == contains
    assert score("normalised", text, ["never", reference]) == normalised
    assert score("exact", text, ["never", reference]) == exact


def test_agreement() -> None:
    def answer(*tokens: str, logprob: float = -0.5) -> Answer:
        written = list(tokens)
        return Answer("a", "baseline", "".join(tokens), 0, 0, [], tokens=written, logprobs=[logprob] * len(written))

    found = agreement(answer("a", "bc", "d"), answer("a", "bd", "x", logprob=-0.75))
    assert (found.same, found.prefix, found.prefix_tokens, found.share) == (False, 2, 1, 0.5)
    assert found.logprob_differences == [-0.25]
    assert not found.split_differently
    assert agreement(answer("a", "bc"), answer("a", "b", "c")).split_differently
    assert agreement(answer("a", "b"), answer("a", "b")).same
    assert not agreement(answer("a"), answer("a", "b")).split_differently
