"""Output files: checked before the work, written at once or not at all."""

import os
import tempfile
from pathlib import Path

from turboattention.errors import InvalidInputError, invalid


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
        raise _unwritable(path, error) from error


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 under a temporary name beside ``path``, then rename: readers never see half a file."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name[:100]}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: OSError) -> InvalidInputError:
    return invalid("output path", "a writable place", f"{path} ({error.strerror})")
