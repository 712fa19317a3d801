"""Ask both sides all requests: in turns, with bounded concurrency, every answer written as it comes."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from turboattention.errors import TurboAttentionError
from turboattention.serving.answer import Side
from turboattention.serving.prompts import Request
from turboattention.serving.store import Store

Progress = Callable[[int, int, str], None]  # answers there, answers in all, what is being done
WAVES = 4  # requests of a turn, in multiples of the concurrency
UNREACHABLE = 5  # failed connections in a row that end the run
_WARM_UP_TOKENS = 16


class OutageError(TurboAttentionError):
    """A server is gone; what it answered before is kept."""


async def ask_all(
    store: Store,
    sides: Sequence[Side],
    requests: Sequence[Request],
    concurrency: int = 4,
    warm_up: int = 2,
    progress: Progress | None = None,
) -> None:
    """Ask what the store does not hold yet.

    The sides take turns, so that a machine that both share serves one of them at a time; who begins alternates, so that
    a machine that slows down slows both. Remarks of the sides are kept by the store.
    Raises OutageError, store.DiskError, or what a side raises before the first request.
    """
    if all((request.id, side.name) in store.answers for request in requests for side in sides):
        return
    total = len(requests) * len(sides)
    try:
        for side in sides:
            _tell(progress, len(store.answers), total, f"{side.name}: warming up")
            remarks = await side.prepare(_warm_up(requests, warm_up))
            store.pin(side.name, side.describe(), remarks)
        size = WAVES * concurrency
        for number, start in enumerate(range(0, len(requests), size)):
            turn = requests[start : start + size]
            for side in sides if number % 2 == 0 else reversed(sides):
                await _turn(store, side, turn, concurrency, total, progress)
            store.settle()
    finally:
        for side in sides:
            await side.close()


def _warm_up(requests: Sequence[Request], count: int) -> list[Request]:
    """As long as real requests but with another beginning, so that no prefix cache knows the real ones."""
    return [_disguised(requests[number % len(requests)], number) for number in range(max(1, count))]


def _disguised(request: Request, number: int) -> Request:
    mark = f"Warm-up {number}. "
    messages = request.messages
    if messages:
        messages = ({**messages[0], "content": mark + messages[0]["content"]}, *messages[1:])
    return replace(
        request,
        id=f"warm-up-{number}",
        prompt=mark + request.prompt if request.prompt else "",
        messages=messages,
        max_tokens=min(_WARM_UP_TOKENS, request.max_tokens),
    )


async def _turn(
    store: Store, side: Side, requests: Sequence[Request], concurrency: int, total: int, progress: Progress | None
) -> None:
    left = iter([request for request in requests if (request.id, side.name) not in store.answers])
    failed = 0

    async def worker(left: Iterator[Request]) -> None:
        nonlocal failed
        for request in left:
            answer = await side.ask(request)
            store.add(answer)
            _tell(progress, len(store.answers), total, side.name)
            unreachable = answer.error is not None and answer.error.kind == "unreachable"
            failed = failed + 1 if unreachable else 0
            if failed >= UNREACHABLE and answer.error is not None:
                raise OutageError(
                    f"{side.name}: expected a server, received {answer.error.message} {failed} times in a row; "
                    "start it and run the same command with --retry-errors"
                )

    tasks = [asyncio.create_task(worker(left)) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # The cancelled ones must be over before the connections close.
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell(progress: Progress | None, done: int, total: int, label: str) -> None:
    if progress is not None:
        progress(done, total, label)
