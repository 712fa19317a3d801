"""Entry point: runs a verb; a mistake of the user becomes one line on stderr and exit status 2."""

import sys
from collections.abc import Sequence

from turboattention.cli.requirements import require
from turboattention.errors import TurboAttentionError
from turboattention.report.words import printable

MISTAKE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``turboattention`` with ``arguments`` (default: those of the process) and return the exit status."""
    try:
        require("typer", "rich")
        from turboattention.cli.app import run  # needs typer

        return run(sys.argv[1:] if arguments is None else arguments)
    except TurboAttentionError as error:
        print("error:", printable(" ".join(str(error).split())), file=sys.stderr)  # it may quote a server
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
