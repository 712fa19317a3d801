"""vLLM in processes of its own on the CPU: two tensor-parallel ranks, and the server with its metrics.

The processes find our plugin as a user's do, by an entry point; here it is one that fills the CPU slot.
"""

import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import NEEDS, check, expected_of, model_folder, options, plugin_environment, random_llama

from turboattention.monitoring.scrape import totals

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason=NEEDS)

NEW = 48
SECONDS = 400
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    llm = LLM(**asked["options"])
    parameters = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True)
    prompts = [{"prompt_token_ids": p} for p in asked["prompts"]]
    found = llm.generate(prompts, parameters, use_tqdm=False)
    print("ANSWER " + json.dumps([list(x.outputs[0].token_ids) for x in found]), flush=True)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return plugin_environment(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("ranks"))


def test_two_ranks(model: Path, environment: dict[str, str]):
    """A KV head on each rank gives the tokens of transformers."""
    from transformers import AutoModelForCausalLM

    chosen = random.Random(0)
    prompts = [[chosen.randrange(3, 300) for _ in range(n)] for n in (150, 64, 5)]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = expected_of(loaded, prompts, NEW, "int8")
    given = options("int8", model=str(model), tensor_parallel_size=2, skip_tokenizer_init=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps({"options": given, "prompts": prompts, "new": NEW}),
        env={**environment, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, (done.stdout + done.stderr)[-4000:]
    check(json.loads(lines[-1][7:]), expected)


def get(url: str, data: dict[str, Any] | None = None) -> str:
    request = urllib.request.Request(url, None if data is None else json.dumps(data).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def test_server_shows_the_metrics_of_the_plugin(environment: dict[str, str], tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = options(kv_cache_dtype_skip_layers=["0"])
    given["additional_config"]["turboattention"]["watch"] = {"share": 1.0, "heads": 87}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder()),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--kv-cache-dtype", "fp8", "--enforce-eager",
        "--block-size", "64", "--max-model-len", "512", "--max-num-seqs", "4", "--kv-cache-dtype-skip-layers", "0",
        "--additional-config", json.dumps(given["additional_config"]),
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                get(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        body = {"model": str(model_folder()), "prompt": "def add(a, b):", "max_tokens": 3, "temperature": 0}
        assert json.loads(get(f"http://127.0.0.1:{port}/v1/completions", body))["choices"][0]["text"]
        get(f"http://127.0.0.1:{port}/v1/completions", {**body, "prompt": "def add(a, b):\n    return a + b\n" * 12})
        text = get(f"http://127.0.0.1:{port}/metrics")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    for line in (
        'turboattention_layers{pages="compressed",rank="0"} 29.0',
        'turboattention_layers{pages="16bit",rank="0"} 1.0',
        'turboattention_faults_total{kind="not_finite",rank="0"} 0.0',
    ):
        assert line in text, text[-3000:]
    assert 'turboattention_kv_tokens{format="turbo4",rank="0"}' in text
    assert "vllm:num_requests_running" in text
    # What the sidecar makes of it: each compressed layer has been checked, and not found wanting.
    found = {layer: x for (layer, measure), x in totals(text).items() if measure == "relative_error"}
    assert set(found) == {str(layer) for layer in range(1, 30)}
    assert all(0 < x.total / x.weight < 0.25 for x in found.values()), found
    assert "TurboAttention: policy turbo4: 29 of 30 attention layers compressed" in log.read_text()
