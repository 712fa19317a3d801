"""Files: read up to a size, as JSON never deeper or longer than Python can hold; written whole or not at all."""

import json
import os
import secrets
import tempfile
from contextlib import suppress
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


def check_writable(path: Path) -> None:
    """Raise unless a file could be written at ``path`` now; leaves nothing behind."""
    if path.is_dir():
        raise invalid("output path", "a file", f"the directory {path}")
    if not path.parent.is_dir():
        raise invalid("output path", "a file in an existing directory", path, f"create {path.parent} first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}."):
            pass
        if path.exists():  # replacing needs the directory alone, but a write-protected file is meant to stay
            path.open("ab").close()
    except OSError as error:
        raise _unwritable("output path", path, error) from error


def write_atomic(path: Path, text: str, name: str = "output path") -> None:
    """Write ``text`` as UTF-8 under a temporary name beside ``path``, then rename: readers never see half a file.

    Raises InvalidInputError, in which the file is called ``name``.
    """
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}"
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError, ValueError):  # nothing to remove where nothing could be made
            temporary.unlink()
        if isinstance(error, OSError):
            raise _unwritable(name, path, error) from error
        raise


def _unwritable(name: str, path: Path, error: OSError) -> InvalidInputError:
    return invalid(name, "a writable file", f"{path} ({error.strerror})")
