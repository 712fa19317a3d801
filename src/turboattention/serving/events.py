"""The stream of an OpenAI-compatible server: lines of server-sent events to text, tokens, times and counts."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from turboattention.files import parse_json
from turboattention.serving.answer import Failure


class BrokenStreamError(Exception):
    """The stream says that there will be no whole answer, or is not what the API says."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class Stream:
    """Collects; ``line`` takes each line with its time in s after the request."""

    text: str = ""
    reasoning: str = ""
    times_s: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str | None = None
    opened: bool = False  # the server has begun to answer
    done: bool = False

    def line(self, line: str, seconds: float) -> None:
        """Raises BrokenStreamError."""
        if not line.startswith("data:"):  # comments that keep the connection alive, names of events, empty lines
            return
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            self.done = True
            return
        try:
            self._event(parse_json(data), seconds)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise BrokenStreamError(Failure("protocol", f"an event that is not of the API: {data[:120]}")) from error

    def _event(self, event: Any, seconds: float) -> None:
        if event.get("error"):
            raise BrokenStreamError(Failure("http", f"error in the stream: {error_text(event)}"))
        usage = event.get("usage")
        if usage:
            self.prompt_tokens, self.completion_tokens = (
                _count(usage["prompt_tokens"]),
                _count(usage["completion_tokens"]),
            )
        for choice in event.get("choices", [])[:1]:
            self._choice(choice, seconds)

    def _choice(self, choice: dict[str, Any], seconds: float) -> None:
        delta = choice.get("delta")
        if delta is None:
            text, reasoning = choice.get("text") or "", ""
        else:
            text = delta.get("content") or ""
            reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        self.text, self.reasoning = self.text + text, self.reasoning + reasoning
        if text or reasoning:
            self.times_s.append(round(seconds, 6))
        self._logprobs(choice.get("logprobs") or {})
        finish = choice.get("finish_reason")
        if finish is not None and not isinstance(finish, str):
            raise TypeError("finish_reason")
        self.finish = finish or self.finish

    def _logprobs(self, data: dict[str, Any]) -> None:
        if data.get("content"):
            pairs = [(item["token"], item["logprob"]) for item in data["content"]]
        else:
            pairs = list(zip(data.get("tokens") or [], data.get("token_logprobs") or [], strict=True))
        for token, logprob in pairs:
            self.tokens.append(str(token))
            # A server without a value sends null; it must not pass for a probability of one.
            self.logprobs.append(math.nan if logprob is None else float(logprob))


def _count(value: Any) -> int:
    count = int(value)
    if not 0 <= count < 2**53:
        raise ValueError("a count of tokens")
    return count


def error_text(body: Any) -> str:
    """The message inside the usual shapes of an error, in one line of at most 300 characters."""
    found = body
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(text.split())[:300]
