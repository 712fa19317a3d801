"""Run code that a model wrote, with its tests, in a process of its own.

Not a sandbox: the process has limits of time, memory, files and processes, an empty folder, no environment and the
standard library alone, but the rights of its user. Run models that you do not trust in a container.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

SECONDS = 10
MEMORY = 1 << 30
_PASSED = 86  # an exit status that nothing else gives: code that calls sys.exit() has not passed

# The new process limits itself before it runs what it has read.
_START = f"""
import os, resource, sys
code = sys.stdin.read()
for name, limit in (("AS", {MEMORY}), ("CPU", {SECONDS + 1}), ("FSIZE", 0), ("NOFILE", 16), ("CORE", 0), ("NPROC", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
exec(compile(code, "answer", "exec"), {{"__name__": "answer"}})
os._exit({_PASSED})
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether ``program`` runs to its end within ``seconds``, without an exception."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _START],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # Also what it started: the session is its own.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == _PASSED


def all_passes(programs: Sequence[str], workers: int = 2) -> list[bool]:
    """``passes`` for each, ``workers`` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(passes, programs))
