"""One answer of one side: a line of the raw file, and what every side can do."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from turboattention.errors import invalid
from turboattention.serving.prompts import Request
from turboattention.serving.secrets import Secret, hide
from turboattention.typed import build

SIDES: tuple["SideName", "SideName"] = ("baseline", "candidate")
SideName = Literal["baseline", "candidate"]
# unreachable: no connection; http: a status other than 200, or an error in the stream; timeout; cut: the stream ended
# early; protocol: not what the API says; refused: the local model cannot take the request.
ErrorKind = Literal["unreachable", "http", "timeout", "cut", "protocol", "refused"]


@dataclass(frozen=True)
class Failure:
    """Why there is no whole answer."""

    kind: ErrorKind
    message: str
    status: int | None = None  # HTTP


@dataclass(frozen=True)
class Answer:
    """Seconds count from the moment the request was sent.

    text: the answer, or what had come before the error.
    reasoning: what a reasoning model wrote before it, where the server keeps it apart.
    tokens, logprobs: the written tokens as texts and their natural log-probabilities, both or neither.
    prompt_tokens, completion_tokens: as the server counted; without its count, tokens of ``logprobs`` or pieces of the
        stream (``counted`` says which).
    times_s: arrival of each piece of the stream that held text.
    """

    id: str
    side: SideName
    text: str
    started_at: float  # Unix time, s
    total_s: float
    times_s: list[float]
    completion_tokens: int = 0
    counted: Literal["usage", "logprobs", "pieces"] = "pieces"
    prompt_tokens: int | None = None
    finish: str | None = None
    reasoning: str = ""
    tokens: list[str] | None = None
    logprobs: list[float] | None = None
    error: Failure | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first piece with text."""
        return self.times_s[0] if self.times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first, up to the end of the stream; None for answers of one token.

        The token that ends an answer has no text and no piece of its own, but the server took its time for it.
        """
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.completion_tokens - 1)

    def to_dict(self, secrets: tuple[Secret, ...] = ()) -> dict[str, Any]:
        """JSON-ready and without keys; tokens go where hiding changed the text, which they would spell."""
        data: dict[str, Any] = hide(asdict(self), secrets)
        if data["text"] != self.text:
            data["tokens"] = data["logprobs"] = None
        return {"id": self.id, "side": self.side, **data}

    @staticmethod
    def from_dict(data: Any) -> "Answer":
        """Raises for anything that `to_dict` does not write."""
        answer = build(Answer, data, "answer")
        times = (answer.total_s, answer.started_at, *answer.times_s)
        if not all(0 <= x < math.inf for x in times) or min(answer.completion_tokens, answer.prompt_tokens or 0) < 0:
            raise invalid("answer", "finite times and counts from 0", f"those of {answer.id[:80]!r}")
        if answer.tokens is not None and len(answer.tokens) != len(answer.logprobs or ()):
            raise invalid("answer", "a log-probability of each token", f"those of {answer.id[:80]!r}")
        return answer


class Side(Protocol):
    """One of the two that are compared."""

    name: SideName

    def describe(self) -> dict[str, str]:
        """What must not change when a run goes on: kind, address or policy, model; never a key."""

    async def prepare(self, warm_up: list[Request]) -> list[str]:
        """Check and warm up; returns remarks for the report, raises TurboAttentionError when it cannot work."""

    async def ask(self, request: Request) -> Answer:
        """Errors of the side are in the answer."""

    async def close(self) -> None:
        """Let go of connections."""
