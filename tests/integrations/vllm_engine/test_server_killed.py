"""SIGKILL of a process of vLLM's server under load, as the out-of-memory killer does.

Clients get an error or a whole right answer and none hangs, nothing is left running, and a restart with the same
folders and port answers right.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import NEEDS, options, plugin_environment, random_llama

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason=NEEDS)

SECONDS = 400  # for a start, on shared cores
SOON = 60  # from the kill to the end of everything
TIE = 0.2  # as in the soak, of the same model at the same bits
CLIENTS, NEW = 12, 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = random_llama(tmp_path_factory.mktemp("killed"))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def processes(session: int) -> dict[int, str]:
    """Titles of the living processes of a session, by number. Their variables would not do: titles overwrite them."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):  # it has ended, or is no process
            continue
    return found


class Server:
    """vLLM's server with our plugin in the CPU slot."""

    def __init__(self, model: Path, environment: dict[str, str], port: int, ranks: int, log: Path) -> None:
        self.model, self.log, self.url = str(model), log, f"http://127.0.0.1:{port}"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--host", "127.0.0.1",
            "--port", str(port), "--dtype", "float32", "--kv-cache-dtype", "fp8", "--enforce-eager", "--block-size",
            "64", "--max-model-len", "512", "--max-num-seqs", "4", "--tensor-parallel-size", str(ranks),
            "--additional-config", json.dumps(options("int8")["additional_config"]),
        ]  # fmt: skip
        bind = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env={**environment, **bind}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + SECONDS
        while True:
            assert self.process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)

    def ask(self, prompt: list[int], new: int = NEW) -> tuple[list[int], list[float]]:
        """Greedy tokens of an answer, and by how much each was ahead of the second."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True,
            "logprobs": 2, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            (choice,) = json.loads(answer.read())["choices"]
        best = [sorted(step.values(), reverse=True) for step in choice["logprobs"]["top_logprobs"]]
        return choice["token_ids"], [x[0] - x[1] if len(x) > 1 else 0.0 for x in best]

    def end(self) -> None:
        """Of everything that is left; what tracks shared memory ends last and removes it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(SOON)
        for number, title in processes(self.process.pid).items():
            if "resource_tracker" not in title:
                os.kill(number, signal.SIGKILL)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Any]:
    """Servers with the same port and folders, one after the other."""
    environment, made = plugin_environment(tmp_path), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(ranks: int) -> Server:
        made.append(Server(model, environment, port, ranks, tmp_path / f"log{len(made)}"))
        return made[-1]

    yield one
    for server in made:
        server.end()


def assert_right(found: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    """Equal until a near tie of the request alone."""
    different = next((i for i, (a, b) in enumerate(zip(found[0], expected[0], strict=True)) if a != b), None)
    assert different is None or expected[1][different] < TIE, (different, expected[1][different])


@pytest.mark.parametrize(("ranks", "victim"), [(1, "EngineCore"), (1, "Worker"), (2, "Worker")])
def test_sigkill_under_load(start: Any, ranks: int, victim: str):
    shared = set(os.listdir("/dev/shm"))
    first = start(ranks)
    chosen = random.Random(0)
    prompts = [[chosen.randrange(3, 300) for _ in range(n)] for n in (150, 64, 5, 200)]
    expected = [first.ask(prompt) for prompt in prompts]
    whole, errors = [0], []

    def client(number: int) -> None:
        """Asks until the server fails."""
        while not errors:
            which = number % len(prompts)
            try:
                answer = first.ask(prompts[which])
            except (OSError, urllib.error.HTTPError) as error:  # a refused or broken connection, status 500
                errors.append(error)
                return
            assert_right(answer, expected[which])
            whole[0] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        while whole[0] < CLIENTS:
            time.sleep(0.1)
        number = max(n for n, name in processes(first.process.pid).items() if victim in name)
        os.kill(number, signal.SIGKILL)
        begin = time.monotonic()
        for one in clients:
            one.result(SOON)  # no hang, and no wrong answer
        answered = time.monotonic() - begin
    assert errors
    assert first.process.wait(SOON) is not None
    while (left := processes(first.process.pid)) and time.monotonic() < begin + SOON:
        time.sleep(0.2)
    assert not left
    print(f"{victim} of {ranks}: {whole[0]} whole answers; clients had an error after {answered:.1f} s, all processes "
          f"ended after {time.monotonic() - begin:.1f} s; first error {errors[0]!r}; "
          f"left in /dev/shm: {sorted(set(os.listdir('/dev/shm')) - shared)}")  # fmt: skip
    second = start(ranks)
    for prompt, before in zip(prompts, expected, strict=True):
        assert second.ask(prompt)[0] == before[0]
