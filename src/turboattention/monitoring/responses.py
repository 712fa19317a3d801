"""What a guard does about an alarm."""

import json
import logging
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from turboattention.errors import InvalidInputError, RefusedError, TurboAttentionError, invalid
from turboattention.monitoring import precision
from turboattention.monitoring.guard import Change, Response, log
from turboattention.monitoring.limits import ALL_LAYERS
from turboattention.policy import Policy


class Log:
    """A line in the log."""

    name = "log"

    def __call__(self, change: Change) -> None:
        log.log(logging.ERROR if change.state == "raised" else logging.WARNING, "%s", change.text)


class Webhook:
    """POST of a JSON object: the fields of `Change` and ``text``, which chat services show.

    The address may hold a secret, so that messages name its host alone.
    """

    name = "webhook"

    def __init__(self, url: str, timeout: float = 5.0) -> None:
        """timeout: seconds. Raises InvalidInputError unless url is an http or https address."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise invalid("webhook", "an http or https address", f"{parts.scheme or 'no'} scheme")
        self._url, self.host, self.timeout = url, parts.hostname, timeout

    def __call__(self, change: Change) -> None:
        body = json.dumps({"version": 1, **asdict(change), "text": f"turboattention: {change.text}"}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout):
                pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            status = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else reason
            raise InvalidInputError(f"webhook {self.host}: expected an answer, received {status}") from None


class InBackground:
    """Another response in a thread of its own, because a step must not wait for a network. Failures are logged."""

    def __init__(self, response: Response) -> None:
        self.response, self.name = response, response.name
        self.thread: threading.Thread | None = None

    def __call__(self, change: Change) -> None:
        self.thread = threading.Thread(target=self._run, args=(change,), daemon=True)
        self.thread.start()

    def _run(self, change: Change) -> None:
        try:
            self.response(change)
        except (TurboAttentionError, OSError) as error:
            log.error("%s failed: %s", self.name, " ".join(str(error).split()))


class RaisePrecision:
    """More bits in the layer of an alarm for new requests; requests under way keep their pages.

    current: gives the policy of new requests; use: takes the next one and judges the layer anew.
    """

    name = "raise precision"

    def __init__(self, current: Callable[[], Policy], use: Callable[[Policy, str], None], kv_heads: int) -> None:
        self._current, self._use, self._kv_heads = current, use, kv_heads

    def __call__(self, change: Change) -> None:
        if change.state != "raised" or change.layer == ALL_LAYERS:
            return
        before = self._current()
        after = precision.raised(before, [int(change.layer)], self._kv_heads)
        if after is before:
            log.error("layer %s is at 16 bits already: more precision can't help; another response must", change.layer)
            return
        self._use(after, change.layer)
        bits = sorted({fmt.bits for pair in after.head_formats(int(change.layer), self._kv_heads) for fmt in pair})
        log.warning("layer %s: new requests get %s bits", change.layer, " and ".join(map(str, bits)))


class WritePolicy:
    """A policy file with the layers of all alarms so far at 16 bits, for the next start of a server.

    A running engine has one page size for all its layers, so nothing can be raised in it.
    """

    name = "write policy"

    def __init__(self, policy: Policy, path: Path) -> None:
        self.policy, self.path = policy, path

    def __call__(self, change: Change) -> None:
        if change.state != "raised" or change.layer == ALL_LAYERS:
            return
        after = precision.exact(self.policy, [int(change.layer)])
        after.save(self.path)
        self.policy = after
        log.warning(
            "wrote %s with layer %s at 16 bits. A running server can't change its pages: take it out of the load "
            "balancer, let its requests end, and start it again with turboattention serve --policy %s",
            self.path, change.layer, self.path,
        )  # fmt: skip


class Refuse:
    """New requests are refused while an alarm stands. Without new requests nothing new is measured: `reset` ends it."""

    name = "refuse"

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, str], str] = {}

    def __call__(self, change: Change) -> None:
        key = (change.layer, change.measure)
        if change.state == "raised":
            self._reasons[key] = change.text
        else:
            self._reasons.pop(key, None)

    @property
    def reason(self) -> str | None:
        """Why new requests are refused, None while they are not."""
        return "; ".join(self._reasons.values()) or None

    def admit(self) -> None:
        """Raise RefusedError while requests are refused."""
        if self._reasons:
            raise RefusedError(f"new requests are refused: {self.reason}; reset() of the response lets them in again")

    def reset(self) -> None:
        """Let requests in again."""
        self._reasons.clear()
