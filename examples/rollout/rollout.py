"""A rollout from pilot to canary to full, and back, on two local servers; docs/rollout.md explains each step.

python examples/rollout/rollout.py --out build/rollout                    # starts two transformers servers
python examples/rollout/rollout.py --out build/rollout --baseline URL --candidate URL
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
from router import make_router

from turboattention.cli.main import main as turboattention

LIMITS = ("--max-score-drop", "0.2", "--max-error-rate", "0.2", "--max-logprob-distance", "0.05")
FOLDER = Path(__file__).parent


def steps(
    baseline: str, candidate: str, router: str, share: Path, out: Path, options: list[str]
) -> Iterator[tuple[str, str, int]]:
    """Name, what it says, exit status of each step; stops at the first that does not pass, with the traffic taken back.

    options: of each ``turboattention ab``, limits among them.
    """
    plan = (
        ("noise", "0", baseline, baseline, "the baseline against itself: how much differs without any change"),
        ("pilot", "0", baseline, candidate, "recorded requests, no user sees an answer"),
        ("canary", "0.2", baseline, router, "a fifth of the users' requests go to the candidate"),
        ("full", "1", baseline, router, "all of them; the baseline stays up"),
        ("back", "0", baseline, router, "the way back, tried before it is needed"),
    )
    for name, part, first, second, meaning in plan:
        share.write_text(part)
        sides = ["--baseline", first, "--candidate", second, "--out", str(out / name)]
        status = turboattention(["ab", *sides, *options])
        yield name, meaning, status
        if status != 0:
            share.write_text("0")
            return


@contextmanager
def started(policy: str, port: int, model: str) -> Iterator[str]:
    """The address of a server in a process of its own, once it answers."""
    options = ["--policy", policy, "--port", str(port), "--model", model]
    process = subprocess.Popen([sys.executable, str(FOLDER / "server.py"), *options])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise SystemExit(f"the server of {policy} ended with status {process.returncode}")
            try:
                httpx2.get(f"{url}/v1/models", trust_env=False)
                break
            except httpx2.ConnectError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """Run all steps and print how each went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--baseline", help="a server that is up; default: transformers, 16-bit cache")
    parser.add_argument("--candidate", help="a server that is up; default: transformers, --policy")
    parser.add_argument("--policy", default="turbo4")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--port", type=int, default=8001, help="and the next two: second server, router")
    arguments, options = parser.parse_known_args()
    if not any(option.startswith(("--max-score", "--max-error", "--max-logprob", "--min-agree")) for option in options):
        options += LIMITS
    arguments.out.mkdir(parents=True, exist_ok=True)
    share = arguments.out / "share"
    share.write_text("0")
    with ExitStack() as stack:
        urls = [arguments.baseline, arguments.candidate]
        for number, policy in enumerate(("16-bit", arguments.policy)):
            if urls[number] is None:
                urls[number] = stack.enter_context(started(policy, arguments.port + number, arguments.model))
        # Always the same address, so that a run that was cut short goes on.
        server = make_router(urls[0], urls[1], share, arguments.port + 2)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        router = f"http://127.0.0.1:{server.server_address[1]}"
        done = list(steps(urls[0], urls[1], router, share, arguments.out, options))
        server.shutdown()
    for name, meaning, status in done:
        print(f"{name:8} exit status {status}: {meaning}")
    return done[-1][2]


if __name__ == "__main__":
    sys.exit(main())
