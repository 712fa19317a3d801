"""Optional packages, checked before they are imported deep inside a run."""

from importlib.util import find_spec

from turboattention.errors import MissingDependencyError

INSTALL = "pip install 'turboattention[demo]'"


def require(*packages: str, install: str = INSTALL) -> None:
    """Raise unless all ``packages`` are installed; the message holds the command that installs them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"packages: expected {', '.join(missing)}, received none; install with: {install}")
