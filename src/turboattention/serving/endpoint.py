"""An OpenAI-compatible server as one side: checked, warmed up, asked with streaming."""

import asyncio
import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from turboattention.errors import invalid
from turboattention.serving.answer import Answer, Failure, SideName
from turboattention.serving.events import BrokenStreamError, Stream, error_text
from turboattention.serving.prompts import Api, Request
from turboattention.serving.secrets import Secret, hide

_CONNECT_S = 10.0
_BODY = 4096  # bytes read of an error
# A server may refuse what it does not know; the first set that it takes is used for the whole run.
_FEATURES = (("logprobs", "usage"), ("usage",), ("logprobs",), ())
_REFUSALS = (400, 404, 422, 500, 501)


@dataclass
class Endpoint:
    """One server.

    url: its root or its ``/v1``; without user, password or query, which would end up in reports.
    model: None: the one model that the server lists.
    api: auto: chat for requests with messages, completions for the others.
    timeout_s: for a whole answer.
    """

    name: SideName
    url: str
    model: str | None = None
    key: Secret | None = None
    api: Api | Literal["auto"] = "auto"
    timeout_s: float = 120.0
    concurrency: int = 4
    temperature: float = 0.0
    seed: int = 0
    logprobs: bool = True
    features: tuple[str, ...] = ()
    client: httpx2.AsyncClient = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise invalid(
                f"--{self.name}", "an address without user, password, query or fragment", "one with it",
                f"give a key with --{self.name}-key-env or --{self.name}-key-file",
            )  # fmt: skip
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise invalid(f"--{self.name}", "http://HOST:PORT, preset:NAME or policy:FILE", repr(self.url))
        self.url = self.url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.features = ("logprobs",) if self.logprobs else ()
        headers = {"Authorization": f"Bearer {self.key.value}"} if self.key else {}
        limit = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        # The whole answer has its own limit. Proxies and .netrc of the environment are not used, nor redirects
        # followed, so that the key goes to this address alone.
        timeout = httpx2.Timeout(None, connect=min(_CONNECT_S, self.timeout_s))
        self.client = httpx2.AsyncClient(
            headers=headers,
            limits=limit,
            timeout=timeout,
            trust_env=False,
            follow_redirects=False,
            verify=parts.scheme == "https",  # certificates take a tenth of a second to load
        )

    def describe(self) -> dict[str, str]:
        return {"kind": "endpoint", "url": self.url, "model": self.model or "", "api": self.api}

    async def prepare(self, warm_up: list[Request]) -> list[str]:
        await self._find_model()
        wanted = [set_ for set_ in _FEATURES if self.logprobs or "logprobs" not in set_]
        failure: Failure | None = None
        for self.features in wanted:
            failure = (await self.ask(warm_up[0])).error
            if failure is None or failure.status not in (None, *_REFUSALS) or failure.kind == "timeout":
                break
        if failure is not None:
            raise invalid(f"{self.name} {self.url}", "an answer to the warm-up request", failure.message)
        later = await asyncio.gather(*(self.ask(request) for request in warm_up[1:]))
        failed = [answer.error for answer in later if answer.error]
        remarks = [f"{self.name}: {len(failed)} of the warm-up requests failed: {failed[0].message}"] if failed else []
        if self.logprobs and "logprobs" not in self.features:
            remarks.append(f"{self.name}: the server refuses log-probabilities; they are not compared.")
        return remarks

    async def _find_model(self) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                reply = await self.client.get(f"{self.url}/models")
        except (httpx2.HTTPError, OSError, TimeoutError) as error:
            raise invalid(f"--{self.name}", f"a server at {self.url}", self._reason(error), "is it running?") from None
        if reply.status_code in (401, 403):
            raise invalid(f"key of {self.name}", f"one that {self.url} accepts", f"HTTP {reply.status_code}")
        names = _model_names(reply)
        if self.model is None:
            if len(names) != 1:
                listed = ", ".join(names[:8]) or f"none (HTTP {reply.status_code})"
                raise invalid(f"--{self.name}-model", "a name, because the server does not list one model", listed)
            self.model = names[0]
        elif names and self.model not in names:
            raise invalid(f"--{self.name}-model", f"one of {', '.join(names[:8])}", repr(self.model))

    async def ask(self, request: Request) -> Answer:
        answer, stale = await self._once(request)
        # A server may close a connection that has been idle at the moment in which it is used again.
        return (await self._once(request))[0] if stale else answer

    async def _once(self, request: Request) -> tuple[Answer, bool]:
        """The answer, and whether the connection was gone before the server said anything."""
        started_at, start = time.time(), time.perf_counter()
        stream, failure, stale = Stream(), None, False
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._read(request, stream, start)
        except TimeoutError:
            failure = Failure("timeout", f"no whole answer within {self.timeout_s:g} s")
        except BrokenStreamError as error:
            failure = error.failure
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            unreachable = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            stale = not unreachable and not stream.opened
            failure = Failure("unreachable" if unreachable else "cut", self._reason(error))
        if failure is None and not (stream.done or stream.finish):
            failure = Failure("cut", "the stream ended without its end mark")
        return self._answer(request, stream, failure, started_at, time.perf_counter() - start), stale

    async def _read(self, request: Request, stream: Stream, start: float) -> None:
        path, body = self._body(request)
        async with self.client.stream("POST", f"{self.url}/{path}", json=body) as reply:
            stream.opened = True
            kind = reply.headers.get("content-type", "")
            if reply.status_code != 200:
                raise BrokenStreamError(await self._http_failure(reply))
            if "text/event-stream" not in kind:
                raise BrokenStreamError(Failure("protocol", f"expected a stream of events, received {kind[:60]!r}"))
            async for line in reply.aiter_lines():
                stream.line(line, time.perf_counter() - start)
                if stream.done:
                    return

    async def _http_failure(self, reply: httpx2.Response) -> Failure:
        data = b""
        async for part in reply.aiter_bytes():
            data += part
            if len(data) >= _BODY:
                break
        text = data[:_BODY].decode("utf-8", "replace")
        with suppress(ValueError):
            text = error_text(json.loads(text))
        text = " ".join(text.split())[:300]
        return Failure("http", f"HTTP {reply.status_code}: {text or 'no reason given'}", reply.status_code)

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        chat = self.api == "chat" or (self.api == "auto" and bool(request.messages))
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
        }
        if "usage" in self.features:
            body["stream_options"] = {"include_usage": True}
        if chat:
            logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": 1}
            path = "chat/completions"
            body["messages"] = request.chat()
        else:
            logprobs, path = {"logprobs": 1}, "completions"
            body["prompt"] = request.prompt
        return path, body | (logprobs if "logprobs" in self.features else {})

    def _answer(
        self, request: Request, stream: Stream, failure: Failure | None, started_at: float, total_s: float
    ) -> Answer:
        whole = bool(stream.tokens) and all(map(math.isfinite, stream.logprobs))
        answer = Answer(
            id=request.id,
            side=self.name,
            text=stream.text,
            started_at=round(started_at, 6),
            total_s=round(total_s, 6),
            times_s=stream.times_s,
            prompt_tokens=stream.prompt_tokens,
            finish=stream.finish,
            reasoning=stream.reasoning,
            tokens=stream.tokens if whole else None,
            logprobs=[round(value, 6) for value in stream.logprobs] if whole else None,
            error=failure and replace(failure, message=self._hide(failure.message)),
        )
        if stream.completion_tokens is not None:
            return replace(answer, completion_tokens=stream.completion_tokens, counted="usage")
        if stream.tokens:
            return replace(answer, completion_tokens=len(stream.tokens), counted="logprobs")
        return replace(answer, completion_tokens=len(stream.times_s))

    def _reason(self, error: BaseException) -> str:
        return self._hide(" ".join((str(error).strip() or type(error).__name__).split())[:300])

    def _hide(self, text: str) -> str:
        return str(hide(text, (self.key,) if self.key else ()))

    async def close(self) -> None:
        await self.client.aclose()


def _model_names(reply: httpx2.Response) -> list[str]:
    """Names in the server's list; none where it has no list."""
    if reply.status_code != 200:
        return []
    try:
        return [str(model["id"]) for model in reply.json()["data"]]
    except (ValueError, TypeError, KeyError):
        return []
