"""Content that nobody should trust: random bytes, and valid files cut, mutated, nested and blown up."""

import json
import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

HUGE = (2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e308, math.nan, math.inf, -math.inf)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.sampled_from(HUGE) | st.floats()
    | st.text(max_size=8) | st.sampled_from(["", "\0", "../../etc/passwd", "\ud800", "9" * 300])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=6
)
SPECIAL = (
    b"", b"\0", b"null", b"[]", b"{}", b'"x"', b"NaN", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 100_000,
    b'{"a":' * 100_000, b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b'{"\\ud800": 1}',
)  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value stands in parsed JSON, for every value."""
    found = [path]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def changed(data: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None] | None, value: Any = None) -> Any:
    """A copy of parsed JSON with the value at ``path`` replaced, or ``change`` of its container and key."""
    if not path:
        return value
    copy = json.loads(json.dumps(data))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    if change is None:
        holder[path[-1]] = value
    else:
        change(holder, path[-1])
    return copy


def _delete(holder: Any, key: Any) -> None:
    del holder[key]


def _rename(holder: Any, key: Any) -> None:
    holder[f"{key}_" if isinstance(holder, dict) else 0] = holder[key]


@st.composite
def mutations(draw: st.DrawFn, valid: Any) -> bytes:
    """JSON of ``valid`` with one to three of its values replaced, deleted or renamed."""
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(data)))
        change = draw(st.sampled_from([None, None, _delete, _rename]))
        data = changed(data, path, change, draw(VALUES))
        if not isinstance(data, dict | list) or not data:
            break
    return json.dumps(data).encode()


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """``valid`` cut, with some bytes overwritten, or with a piece of it twice."""
    kind = draw(st.sampled_from(["cut", "bytes", "twice"]))
    at = draw(st.integers(0, len(valid) - 1))
    if kind == "cut":
        return valid[:at]
    if kind == "twice":
        return valid[:at] + valid[max(0, at - draw(st.integers(1, 40))) :]
    new = draw(st.binary(min_size=1, max_size=8))
    return valid[:at] + new + valid[at + len(new) :]


def contents(valid: Any, lines: bool = False) -> st.SearchStrategy[bytes]:
    """Everything that may be in the place of ``valid`` (JSON, or the bytes of another format).

    lines: one object a line, and others beside it.
    """
    if isinstance(valid, bytes):
        return st.binary(max_size=60) | st.sampled_from(SPECIAL) | damaged(valid)
    text = json.dumps(valid).encode()
    one = st.binary(max_size=60) | st.sampled_from(SPECIAL) | damaged(text) | mutations(valid)
    one |= VALUES.map(lambda x: json.dumps(x).encode())
    return st.lists(one, min_size=1, max_size=3).map(b"\n".join) if lines else one
