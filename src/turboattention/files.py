"""Files of others: read up to a size, as JSON that is never deeper or longer than Python can hold."""

import json
from pathlib import Path
from typing import Any

from turboattention.errors import InvalidInputError, invalid

DOCUMENT = 64 * 2**20  # bytes of a file that is one object: a policy, a config, a table
RECORDS = 2**30  # bytes of a file of lines, or of the state of a calibration
_BLOCK = 2**20


def read_bytes(name: str, path: Path, largest: int, expected: str = "a readable file", hint: str = "") -> bytes:
    """The whole content; raises InvalidInputError for what cannot be read and for more than ``largest`` bytes.

    Read in blocks and not by the size that the file says it has: a device or a pipe has none and may never end.
    """
    parts, size = [], 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size += len(block)
                if size > largest:
                    raise invalid(name, f"at most {largest} bytes", f"more in {path}", hint)
                parts.append(block)
    except OSError as error:
        raise invalid(name, expected, f"{path} ({error.strerror})", hint) from error
    except ValueError as error:
        if isinstance(error, InvalidInputError):
            raise
        raise invalid(name, expected, f"{str(path)!r} ({error})", hint) from error  # a NUL in the path
    return b"".join(parts)


def parse_json(text: bytes | str) -> Any:
    """``json.loads`` whose every refusal is a ValueError: too deep, not UTF-8, a number of thousands of digits."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(name: str, path: Path, largest: int, expected: str = "JSON", hint: str = "") -> Any:
    """The parsed content of a file; raises InvalidInputError as `read_bytes` does, and for what is no JSON."""
    data = read_bytes(name, path, largest, hint=hint)
    try:
        return parse_json(data)
    except ValueError as error:
        raise invalid(name, expected, f"{path}: {error}", hint) from error
