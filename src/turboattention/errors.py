"""The exceptions that users can meet.

Every message names the thing, what was expected, what was received and what to do. The command line prints the message
alone and exits with status 2.
"""


class TurboAttentionError(Exception):
    """Base class of every error raised on purpose by this package."""


class InvalidInputError(TurboAttentionError, ValueError):
    """A value, tensor or file given by the user is not acceptable."""


class UnsupportedError(TurboAttentionError):
    """The request is understood but this package does not do it, and says so instead of doing something else."""


class RefusedError(TurboAttentionError):
    """A guard refuses new requests because an alarm stands; the message says which."""


class IntegrityError(TurboAttentionError):
    """Bytes of a cache are not those that were written (debug mode, `kvcache.integrity`); the message says which."""


class MissingDependencyError(TurboAttentionError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""


def invalid(name: str, expected: str, received: object, hint: str = "") -> InvalidInputError:
    """The one wording of all messages about bad input."""
    message = f"{name}: expected {expected}, received {received}"
    return InvalidInputError(f"{message}; {hint}" if hint else message)
