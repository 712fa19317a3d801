"""An OpenAI-compatible server in a thread whose answers are a function of the prompt, with every kind of failure."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


def numbered(prompt: str) -> list[str]:
    """Six tokens that depend on the prompt alone."""
    return [f" {word}" for word in (prompt.split() or ["nothing"])[-1:] * 3 + ["and", "so", "on"]]


@dataclass
class Fake:
    """answer: tokens of a prompt; behave: what goes wrong with it ("" for nothing)."""

    models: list[str] = field(default_factory=lambda: ["fake"])
    answer: Callable[[str], list[str]] = numbered
    behave: Callable[[str], str] = lambda prompt: ""
    key: str | None = None
    logprobs: bool = True
    usage: bool = True
    prompt_tokens: int = 7
    delay_s: float = 0.0
    logprob: float = -0.25
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    port: int = 0
    listening: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def prompts(self) -> list[str]:
        """Those that were not for warming up."""
        return [prompt for prompt in map(prompt_of, self.asked) if not prompt.startswith("Warm-up")]


def prompt_of(body: dict[str, Any]) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


@contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    server: asyncio.Server

    async def start() -> None:
        nonlocal server
        server = await asyncio.start_server(lambda r, w: _serve(fake, r, w), "127.0.0.1", fake.port)
        fake.port, fake.listening = server.sockets[0].getsockname()[1], server
        ready.set()

    def work() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    async def stop() -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _serve(fake: Fake, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    fake.at_once += 1
    fake.most_at_once = max(fake.most_at_once, fake.at_once)
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-l")), 0
        )
        body = json.loads(await reader.readexactly(length) or b"null")
        await _reply(fake, head, body, writer)
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        fake.at_once -= 1
        writer.close()


async def _reply(fake: Fake, head: str, body: Any, writer: asyncio.StreamWriter) -> None:
    path = head.split()[1]
    fake.paths.append(path)
    sent = next((line.split(" ", 1)[1] for line in head.split("\r\n") if line.lower().startswith("authorization")), "")
    if fake.key is not None and sent != fake.key:
        return _json(writer, 401, {"error": {"message": f"wrong key: {sent}"}})
    if path == "/v1/models":
        return _json(writer, 200, {"data": [{"id": name} for name in fake.models]})
    if body["model"] not in fake.models:
        return _json(writer, 404, {"error": {"message": f"no model {body['model']}"}})
    if "logprobs" in body and not fake.logprobs:
        return _json(writer, 400, {"error": {"message": "logprobs are not supported"}})
    fake.asked.append(body)
    prompt = prompt_of(body)
    wrong = fake.behave(prompt)
    if wrong == "500":
        return _json(writer, 500, {"detail": f"out of memory \x1b[2J, key {sent}"})
    if wrong == "gone":
        return None
    if wrong == "html":
        return _send(writer, 200, "text/html", "<html>busy</html>")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n: hello\n\n")
    tokens = fake.answer(prompt)[: body["max_tokens"]]
    for number, token in enumerate(tokens):
        await writer.drain()
        if fake.delay_s:
            await asyncio.sleep(fake.delay_s)
        if number == 2 and wrong == "slow":
            await asyncio.sleep(30)
        if number == 2 and wrong == "cut":
            return None
        if number == 2 and wrong == "garbage":
            writer.write(b"data: {not json\n\n")
        if number == 2 and wrong == "error":
            writer.write(b'data: {"error": {"message": "engine died"}}\n\n')
        _event(writer, {"choices": [_choice(fake, body, token, number + 1 == len(tokens))]})
    if fake.usage and "stream_options" in body:
        usage = {"prompt_tokens": fake.prompt_tokens, "completion_tokens": len(tokens)}
        _event(writer, {"choices": [], "usage": usage})
    writer.write(b"data: [DONE]\n\n")
    return None


def _choice(fake: Fake, body: dict[str, Any], token: str, last: bool) -> dict[str, Any]:
    finish = "stop" if last else None
    if "messages" in body:
        logprobs = {"content": [{"token": token, "logprob": fake.logprob}]} if "logprobs" in body else None
        return {"delta": {"content": token}, "logprobs": logprobs, "finish_reason": finish}
    logprobs = {"tokens": [token], "token_logprobs": [fake.logprob]} if "logprobs" in body else None
    return {"text": token, "logprobs": logprobs, "finish_reason": finish}


def _event(writer: asyncio.StreamWriter, data: Any) -> None:
    writer.write(f"data: {json.dumps(data)}\n\n".encode())


def _json(writer: asyncio.StreamWriter, status: int, data: Any) -> None:
    _send(writer, status, "application/json", json.dumps(data))


def _send(writer: asyncio.StreamWriter, status: int, kind: str, text: str) -> None:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
    writer.write((head + text).encode())
