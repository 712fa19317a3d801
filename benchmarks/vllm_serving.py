"""vLLM with TurboAttention against its own KV caches on one GPU: tokens checked, then times and sizes.

    python benchmarks/vllm_serving.py check                                    # right tokens, on a small random model
    python benchmarks/vllm_serving.py measure --kv turbo_int4 --kv auto --kv fp8 --out benchmarks/results/vllm_h100.csv
    python benchmarks/vllm_serving.py fill --kv turbo_int4 --kv auto --kv fp8 --requests 512 --out FILE
    python benchmarks/vllm_serving.py measure --kv turbo_int4 --layers 32 --ranks 2 --long 4 --out FILE   # two GPUs

``measure`` starts an engine for each KV dtype in a process of its own: random weights in the shape of a Llama,
REQUESTS prompts of TOKENS random tokens, all at once. Time per output token is (time of 65 tokens - time of 1 token) /
64 of the whole job, so it includes the steps where prompts and answers mix; a decode step, in which all requests get a
token and none is a prompt, is (time of 129 tokens - time of 65) / 64; prefill is all prompt tokens over the time of 1
token. Medians of RUNS runs. ``fill`` is one job of as many requests as fit, at most REQUESTS, and NEW tokens for each:
all tokens, of prompts and answers, over its time. With --watch the engine checks that share of steps, with --ranks it
is split over so many GPUs (the plugin must be installed: ranks are processes that find it by its entry point), with
--long the same engine gives a second row: so many requests of 131,072 tokens, one run. Versions and card are in every
row. Without vLLM's entry points (a source tree on PYTHONPATH) the plugin registers itself here.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OUTPUT = 65
LONG = 131072
COLUMNS = (
    "kv", "device", "vllm", "torch", "layers", "requests", "prompt_tokens", "runs", "tpot_ms", "tpot_all_ms",
    "prefill_tokens_per_s", "prefill_all", "kv_tokens", "kv_bytes", "load_s", "graphs", "date", "failure",
    "step_ms", "step_all_ms", "watch", "new_tokens", "tokens_per_s", "ranks",
)  # fmt: skip
OURS = ("turbo_int4", "turbo_k4v2", "turbo_int2")


def llama(layers: int, vocabulary: int = 32000, hidden: int = 4096, heads: int = 32) -> dict[str, Any]:
    """The shape of the table: 32 query heads, 8 KV heads of 128 channels, MLP of 4096 (14336 with 32 layers)."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "head_dim": 128,
        "intermediate_size": 14336 if layers == 32 else hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 4, "vocab_size": vocabulary,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip


def engine(model: Path, kv: str, **options: Any) -> Any:
    """A started engine; our KV dtypes bring their backend."""
    from vllm import LLM

    if kv in OURS:
        from turboattention.integrations.vllm import register

        register()
        options |= {"attention_backend": "TURBO_ATTENTION", "block_size": 64}
    return LLM(
        model=str(model), skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype=kv, disable_log_stats=True,
        **options,
    )  # fmt: skip


def generate(llm: Any, prompts: list[list[int]], tokens: int, logprobs: int | None = None) -> list[Any]:
    """Greedy answers of exactly ``tokens`` tokens."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs, detokenize=False)
    found: list[Any] = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    return found


def measure_one(kv: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one KV dtype."""
    import torch
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        (model / "config.json").write_text(json.dumps(llama(given.layers)))
        start = time.perf_counter()
        fill = given.verb == "fill-one"
        sizes = [size for size in (1, 64, 128, 256) if size == 1 or (fill and size < given.requests)]
        sizes = sorted({*sizes, *filter(None, [given.long]), given.requests})
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        watch = {"additional_config": {"turboattention": {"watch": {"share": given.watch}}}} if given.watch else {}
        llm = engine(
            model, kv, load_format="dummy", tensor_parallel_size=given.ranks,
            max_model_len=max(given.tokens, LONG if given.long else 0) + max(3 * OUTPUT, given.new),
            max_num_seqs=given.requests, max_num_batched_tokens=8192, gpu_memory_utilization=given.memory,
            enable_prefix_caching=False,
            compilation_config={"mode": 0, "cudagraph_mode": "NONE"} if given.eager else graphs, **watch,
        )  # fmt: skip
        load = time.perf_counter() - start
    cache = llm.llm_engine.vllm_config.cache_config
    fitting = (cache.num_gpu_blocks or 0) * cache.block_size
    row = {
        "kv": kv, "device": torch.cuda.get_device_name(), "vllm": vllm.__version__, "torch": torch.__version__,
        "layers": given.layers, "requests": given.requests, "prompt_tokens": given.tokens, "runs": given.runs,
        "kv_tokens": fitting, "kv_bytes": cache.kv_cache_memory_bytes or "", "load_s": round(load, 1),
        "graphs": not given.eager, "watch": given.watch or "", "ranks": given.ranks,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if fill:
        requests = min(given.requests, fitting // (given.tokens + given.new))
        prompts = random_prompts(requests, given.tokens)
        generate(llm, prompts[:2], 4)  # compiles what the start has not
        start = time.perf_counter()
        generate(llm, prompts, given.new)
        rate = requests * (given.tokens + given.new) / (time.perf_counter() - start)
        yield row | {"requests": requests, "runs": 1, "new_tokens": given.new, "tokens_per_s": round(rate)}
        return
    yield row | times_of(llm, random_prompts(given.requests, given.tokens), given.runs)
    if given.long:
        shape = {"requests": given.long, "prompt_tokens": LONG, "runs": 1}
        yield row | shape | times_of(llm, random_prompts(given.long, LONG), 1)


def random_prompts(requests: int, tokens: int) -> list[list[int]]:
    """The same ones for every engine."""
    chosen = random.Random(0)
    return [[chosen.randrange(3, 32000) for _ in range(tokens)] for _ in range(requests)]


def times_of(llm: Any, prompts: list[list[int]], runs: int) -> dict[str, Any]:
    """Medians over runs of the three times of a job, as the module's docstring defines them."""
    generate(llm, prompts[:2], 4)  # compiles what the start has not
    first, tpot, step = [], [], []
    for _ in range(runs):
        times = []
        for tokens in (1, OUTPUT, 2 * OUTPUT - 1):
            start = time.perf_counter()
            generate(llm, prompts, tokens)
            times.append(time.perf_counter() - start)
        first.append(sum(map(len, prompts)) / times[0])
        tpot.append((times[1] - times[0]) / (OUTPUT - 1) * 1e3)
        step.append((times[2] - times[1]) / (OUTPUT - 1) * 1e3)
    return {
        "tpot_ms": round(statistics.median(tpot), 3), "tpot_all_ms": " ".join(f"{x:.3f}" for x in tpot),
        "prefill_tokens_per_s": round(statistics.median(first)), "prefill_all": " ".join(f"{x:.0f}" for x in first),
        "step_ms": round(statistics.median(step), 3), "step_all_ms": " ".join(f"{x:.3f}" for x in step),
    }  # fmt: skip


def measure(given: argparse.Namespace) -> int:
    """Each KV dtype in its own process; a failure is a row with its reason."""
    failed = 0
    for kv in given.kv:
        command = [sys.executable, __file__, f"{given.verb}-one", "--kv", kv, *sys.argv[2:]]
        print(f"== {kv}", flush=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            printed, _ = process.communicate(timeout=given.timeout)
            reason = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            reason = f"more than {given.timeout:.0f} s"
        lines = [line for line in printed.splitlines() if line.startswith("ROW ")]
        rows = [json.loads(line[4:]) for line in lines]
        if len(rows) < 1 + bool(given.long and given.verb == "measure"):
            rows.append({"kv": kv, "failure": reason})
        if given.log:
            with Path(given.log).open("a") as file:
                file.write(printed)
        if "failure" in rows[-1]:
            print(printed[-3000:])
            failed = 1
        for row in rows:
            print(json.dumps(row), flush=True)
            append_row(Path(given.out), row)
    return failed


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one row, with the header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def random_model(folder: Path) -> None:
    """A small random Llama whose logits differ enough for a greedy choice to be stable."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {k: v for k, v in llama(4, 1000, 1024, 8).items() if k not in ("architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.05)).to(torch.bfloat16)
    model.save_pretrained(folder)


def check_one(kv: str, given: argparse.Namespace) -> dict[str, Any]:
    """Answers of one engine to prompts of mixed lengths: at once, again from the prefix cache, and in small chunks."""
    chosen = random.Random(1)
    prompts = [[chosen.randrange(3, 1000) for _ in range(n)] for n in (1, 5, 63, 64, 65, 300, 1000, 2048)]
    options: dict[str, Any] = {}
    if kv in OURS and given.policy:
        options["additional_config"] = {"turboattention": {"policy": given.policy}}
    if given.eager:
        options["enforce_eager"] = True
    else:
        options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    llm = engine(
        Path(given.model), kv, max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=given.chunk,
        kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.2, **options,
    )  # fmt: skip
    answers = []
    for _ in range(2):
        found = [output.outputs[0] for output in generate(llm, prompts, 100, logprobs=1)]
        answers.append([
            {"tokens": list(x.token_ids), "logprobs": [next(iter(y.values())).logprob for y in x.logprobs]}
            for x in found
        ])  # fmt: skip
    return {"kv": kv, "answers": answers}


def check(given: argparse.Namespace) -> int:
    """Greedy answers of our cache at 8 bits, where rounding hardly shows, against vLLM's own 16-bit cache."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder))
        # All at once, each with memory of its own size, because starting and compiling takes most of the time.
        running = {}
        for name, kv, policy, chunk in (
            ("16 bits", "auto", "", 8192),
            ("int8", "turbo_int4", "int8", 8192),
            ("int8, chunks of 333", "turbo_int4", "int8", 333),
            ("turbo4", "turbo_int4", "", 8192),
        ):
            command = [sys.executable, __file__, "check-one", "--kv", kv, "--policy", policy, "--model", folder,
                       "--chunk", str(chunk), *(["--eager"] if given.eager else [])]  # fmt: skip
            running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        results = {}
        end = time.monotonic() + given.timeout
        for name, process in running.items():
            try:
                printed, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
            lines = [line for line in printed.splitlines() if line.startswith("ROW ")]
            if lines:
                results[name] = json.loads(lines[-1][4:])["answers"]
            else:
                print(printed[-3000:])
                print(f"FAILED {name}: exit status {process.returncode}", flush=True)
    if "16 bits" not in results:
        return 1
    base = results["16 bits"][0]
    for name, runs in results.items():
        for turn, run in enumerate(runs):
            same = [common(a["tokens"], b["tokens"]) for a, b in zip(run, base, strict=True)]
            errors = [
                max((abs(x - y) for x, y in zip(a["logprobs"][:n], b["logprobs"][:n], strict=True)), default=0.0)
                for a, b, n in zip(run, base, same, strict=True)
            ]
            print(f"{name}, run {turn}: same tokens of 100 {same}, largest logprob difference {max(errors):.4f}")
    return int(len(results) < len(running))


def common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> int:
    """Run one of the verbs of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("check", "measure", "fill", "measure-one", "fill-one", "check-one"))
    parser.add_argument("--kv", action="append", default=[])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share the model (tensor parallel)")
    parser.add_argument("--long", type=int, default=0, help="requests of a second row with 131,072 tokens; 0: none")
    parser.add_argument("--memory", type=float, default=0.6)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one engine")
    parser.add_argument("--new", type=int, default=256, help="tokens of each answer of fill")
    parser.add_argument("--watch", type=float, default=0.0, help="share of steps that are checked; 0: no watch")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--out", default="benchmarks/results/vllm_h100.csv")
    parser.add_argument("--log", default="", help="file that gets what the engines of measure print")
    parser.add_argument("--policy", default="")
    parser.add_argument("--model", default="")
    parser.add_argument("--chunk", type=int, default=8192)
    given = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if given.verb in ("measure-one", "fill-one"):
        for row in measure_one(given.kv[0], given):
            print("ROW " + json.dumps(row), flush=True)
        return 0
    if given.verb == "check-one":
        print("ROW " + json.dumps(check_one(given.kv[0], given)), flush=True)
        return 0
    return check(given) if given.verb == "check" else measure(given)


if __name__ == "__main__":
    sys.exit(main())
