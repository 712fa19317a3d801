"""Keys of endpoints: read from a file or a named environment variable, shown to nobody."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turboattention.errors import invalid
from turboattention.files import read_bytes

HIDDEN = "[key]"
_LONGEST = 2**16  # bytes of its file
_SHORTEST = 8  # a shorter "key" would be found in ordinary text everywhere


@dataclass(frozen=True)
class Secret:
    """A key; its representation does not hold it."""

    value: str = field(repr=False)

    def __str__(self) -> str:
        return HIDDEN


def read_key(option: str, variable: str | None, file: Path | None) -> Secret | None:
    """The key of one side, or None; ``option`` names the side in errors, which never quote the key."""
    if variable is not None and file is not None:
        raise invalid(f"--{option}-key-env and --{option}-key-file", "one of them", "both")
    if variable is not None:
        if variable not in os.environ:
            # Someone who gives the key itself must not find it in a log.
            raise invalid(f"--{option}-key-env", "the NAME of a variable that is set", "a name that is not set")
        return _checked(f"--{option}-key-env", os.environ[variable])
    if file is not None:
        name = f"--{option}-key-file"
        try:
            return _checked(name, read_bytes(name, file, _LONGEST, "a readable text file").decode("utf-8"))
        except UnicodeDecodeError:
            raise invalid(name, "a readable text file", f"{file} (not UTF-8)") from None
    return None


def _checked(name: str, text: str) -> Secret:
    key = text.strip()
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        received = f"{len(key)} characters" if key.isascii() else "other characters"
        raise invalid(name, f"one line of at least {_SHORTEST} printable ASCII characters without spaces", received)
    return Secret(key)


def hide(data: Any, secrets: Sequence[Secret]) -> Any:
    """``data`` (JSON-like) with every occurrence of a key in its texts replaced."""
    if isinstance(data, str):
        for secret in secrets:
            for spelling in (secret.value, json.dumps(secret.value)[1:-1]):  # a server may quote it as JSON
                data = data.replace(spelling, HIDDEN)
        return data
    if isinstance(data, dict):
        return {key: hide(value, secrets) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [hide(value, secrets) for value in data]
    return data
