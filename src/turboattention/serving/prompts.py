"""The requests of an A/B run: read from JSONL, with bad lines reported and the others kept, or bundled."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from turboattention.errors import invalid
from turboattention.evaluation.texts import BUNDLED_TEXTS, load_text
from turboattention.files import RECORDS, parse_json, read_bytes
from turboattention.typed import short

Api = Literal["completions", "chat"]
MAX_TOKENS = 128
MOST_TOKENS = 2**31 - 1  # what servers can count
KEYS = ("id", "prompt", "messages", "reference", "max_tokens", "metadata")

_BUNDLED_CHARACTERS = 3000  # about 700 tokens: ten pages, so that most of what is read is compressed
_BUNDLED_TOKENS = 32
_NOUNS = ("harbour", "orchard", "library", "chapel", "quarry", "bakery", "foundry", "meadow")


@dataclass(frozen=True)
class Request:
    """What both sides are asked.

    prompt: text to go on with, or "" where ``messages`` (role and content each) are given.
    references: accepted answers; none: the sample has no task score.
    max_tokens: most tokens of the answer.
    """

    id: str
    prompt: str
    messages: tuple[dict[str, str], ...] = ()
    references: tuple[str, ...] = ()
    max_tokens: int = MAX_TOKENS

    def text(self) -> str:
        """The prompt as one text, for people."""
        return self.prompt or "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)

    def chat(self) -> list[dict[str, str]]:
        """The prompt as messages."""
        return list(self.messages) or [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class BadLine:
    """A line of the request file that was left out, counted from 1, and why."""

    number: int
    reason: str


def read_requests(path: Path, max_tokens: int = MAX_TOKENS) -> tuple[list[Request], list[BadLine]]:
    """Good requests in their order, and the lines that were left out; raises when no line is good.

    max_tokens: for lines without one of their own.
    """
    lines = read_bytes("--requests", path, RECORDS, "a readable JSONL file").split(b"\n")
    good: dict[str, Request] = {}
    bad: list[BadLine] = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            request = _request(parse_json(text), number, max_tokens)
            if request.id in good:
                raise invalid("id", "one of its own", f"{request.id!r} again")
            good[request.id] = request
        except UnicodeDecodeError as error:
            bad.append(BadLine(number, f"not UTF-8 ({error.reason} at byte {error.start})"))
        except json.JSONDecodeError as error:
            bad.append(BadLine(number, f"not JSON ({error.msg} at column {error.colno})"))
        except ValueError as error:  # InvalidInputError too
            bad.append(BadLine(number, str(error)))
    if not good:
        first = f"; line {bad[0].number}: {bad[0].reason}" if bad else ""
        raise invalid("--requests", "at least one good line", f"none of {len(bad)} in {path}{first}")
    return list(good.values()), bad


def _request(data: Any, number: int, max_tokens: int) -> Request:
    if not isinstance(data, dict):
        raise invalid("line", "a JSON object", type(data).__name__)
    unknown = sorted(set(data) - set(KEYS))
    if unknown:
        raise invalid("keys", f"some of {', '.join(KEYS)}", ", ".join(unknown), "put other data under 'metadata'")
    name = data.get("id", f"line-{number}")
    if not isinstance(name, str | int) or isinstance(name, bool) or not str(name).strip():
        raise invalid("id", "a text or a number", short(name))
    if ("prompt" in data) == ("messages" in data):
        raise invalid("line", "'prompt' or 'messages'", "both" if "prompt" in data else "neither")
    tokens = data.get("max_tokens", max_tokens)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 < tokens <= MOST_TOKENS:
        raise invalid("max_tokens", f"a number from 1 to {MOST_TOKENS}", short(tokens))
    prompt = data.get("prompt", "")
    if "prompt" in data and (not isinstance(prompt, str) or not prompt):
        raise invalid("prompt", "text", short(prompt))
    messages = _messages(data["messages"]) if "messages" in data else ()
    return Request(_plain(str(name)), _plain(prompt), messages, _references(data.get("reference")), tokens)


def _messages(data: Any) -> tuple[dict[str, str], ...]:
    good = isinstance(data, list) and data and all(isinstance(message, dict) for message in data)
    if not good or not all(
        set(message) == {"role", "content"} and all(isinstance(part, str) for part in message.values())
        for message in data
    ):
        raise invalid("messages", "a list of objects with the texts 'role' and 'content'", short(data))
    return tuple({"role": _plain(message["role"]), "content": _plain(message["content"])} for message in data)


def _references(data: Any) -> tuple[str, ...]:
    if data is None:
        return ()
    several = data if isinstance(data, list) else [data]
    if not several or not all(isinstance(text, str) and text.strip() for text in several):
        raise invalid("reference", "text, or a list of accepted texts", short(data))
    return tuple(map(_plain, several))


def has_halves(text: str) -> bool:
    """Whether a text holds halves of surrogate pairs: JSON can spell them, no server takes and no file keeps them."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _plain(text: str) -> str:
    if has_halves(text):
        raise invalid("text", "Unicode without lone surrogates", repr(text[:40]))
    return text


def bundled_requests() -> list[Request]:
    """48 requests of about 700 tokens from the bundled texts: 36 with a code to find, 12 to continue.

    Short prompts would prove nothing about a cache that compresses from the second page on.
    """
    requests = []
    for name in BUNDLED_TEXTS:
        text = load_text(name)
        for index in range(16):
            start = 2000 + index * (len(text) - 2000 - _BUNDLED_CHARACTERS) // 16
            part = text[start : start + _BUNDLED_CHARACTERS]
            label = f"{name}-{index:02d}"
            if index % 4 == 3:
                requests.append(Request(f"{label}-continue", part, max_tokens=_BUNDLED_TOKENS))
            else:
                requests.append(_hidden_code(f"{label}-code", part, index))
    return requests


def _hidden_code(label: str, part: str, index: int) -> Request:
    noun = _NOUNS[index % len(_NOUNS)]
    code = str(int(hashlib.sha256(label.encode()).hexdigest(), 16) % 900_000 + 100_000)
    # Between two words at a depth that differs from request to request.
    cut = part.find(" ", len(part) * (1 + index) // 20)
    fact = f"\n\nThe secret code for the {noun} is {code}.\n\n"
    asked = f"\n\nQuestion: What is the secret code for the {noun}?\nAnswer: The secret code for the {noun} is"
    return Request(label, part[:cut] + fact + part[cut:] + asked, references=(code,), max_tokens=_BUNDLED_TOKENS)


def fingerprint(requests: Sequence[Request]) -> str:
    """SHA-256 of what is asked, whatever the layout of the file."""
    return hashlib.sha256(json.dumps([asdict(request) for request in requests]).encode()).hexdigest()
