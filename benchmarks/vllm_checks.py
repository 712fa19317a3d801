"""Right answers of the vLLM plugin where only a GPU tells: drafts by n-gram, a soak with aborts, skipped layers.

    python benchmarks/vllm_checks.py all --model FOLDER --timeout 400   # all at once, each engine in a process

FOLDER holds a real model with its tokeniser (`integrations.converted_models.converted_copy` makes one). Our cache is at
8 bits, where rounding hardly shows. A line for each check says ``ok`` or ``FAILED``; the exit status is 1 if any did.
Tokens are compared up to the first near tie of the reference, and how many were compared is printed. Every engine gets
1 GiB for pages, so that all run side by side.

ngram  greedy tokens with drafts, with CUDA graphs and without, against none; drafts taken and rejected are counted
soak   REQUESTS requests with shared beginnings, little memory and aborts, against quiet runs; all blocks free after it
skip   layers 0 and 2 left to FlashAttention, against vLLM's own 16-bit cache
ranks  two tensor-parallel ranks against one (two GPUs, the plugin installed; not part of all)
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIE = 0.3  # of logprobs: logits above 16 are 0.125 apart in bfloat16
NEW = 150
BLOCKS, SEQUENCES = 24, 8
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SKIP = ["0", "2"]
TEXT = "python-code"
# name: (KV dtype, options); "check" entries compare with "reference" entries of the same work.
ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {"kv_cache_dtype": "auto"},
    "plain": {},
    "ngram": {"speculative_config": NGRAM, "disable_log_stats": False},
    "ngram eager": {"speculative_config": NGRAM, "disable_log_stats": False, "enforce_eager": True},
    "skip": {"kv_cache_dtype_skip_layers": SKIP},
    "soak": {"num_gpu_blocks_override": BLOCKS, "max_num_batched_tokens": 512, "disable_log_stats": False},
    "soak ngram": {
        "num_gpu_blocks_override": BLOCKS, "max_num_batched_tokens": 512, "disable_log_stats": False,
        "speculative_config": NGRAM,
    },
    "alone": {"enable_prefix_caching": False},
    "two ranks": {"tensor_parallel_size": 2},
    "two ranks bf16": {"tensor_parallel_size": 2, "kv_cache_dtype": "auto"},
}  # fmt: skip
CHECKS = {
    "ngram": {"plain": "bf16", "ngram": "plain", "ngram eager": "plain"},
    "soak": {"soak": "alone", "soak ngram": "alone"},
    "skip": {"skip": "bf16"},
    "ranks": {"two ranks": "plain", "two ranks bf16": "bf16"},
}


def started(name: str, model: str) -> Any:
    """The engine of that name."""
    from vllm import LLM

    from turboattention.integrations.vllm import register

    register()
    given = {
        "kv_cache_dtype": "turbo_int4", "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 1024,
        "max_num_seqs": SEQUENCES, "kv_cache_memory_bytes": 1 << 30, "disable_log_stats": True,
        "gpu_memory_utilization": 0.1, **ENGINES[name],
    }  # fmt: skip
    if given["kv_cache_dtype"] != "auto":
        given |= {
            "attention_backend": "TURBO_ATTENTION", "block_size": 64,
            "additional_config": {"turboattention": {"policy": "int8"}},
        }  # fmt: skip
    if not given.get("enforce_eager"):
        given["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return LLM(model=model, **given)


def parameters(new: int) -> Any:
    """Greedy, with the two best of each token."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=2, detokenize=False)


def answer(output: Any) -> dict[str, Any]:
    """Tokens of an output, and by how much each was ahead."""
    best = [sorted((x.logprob for x in step.values()), reverse=True) for step in output.outputs[0].logprobs]
    return {"tokens": list(output.outputs[0].token_ids), "ahead": [x[0] - x[1] for x in best]}


def text_tokens(model: str) -> list[int]:
    """The bundled text in the model's tokens."""
    from transformers import AutoTokenizer

    from turboattention.evaluation.texts import encode, load_text

    return encode(AutoTokenizer.from_pretrained(model), load_text(TEXT))


def prompts(text: list[int]) -> list[list[int]]:
    """Of mixed lengths; the last ones repeat themselves, which n-gram drafts like."""
    made = [text[1000 * i :][:n] for i, n in enumerate((1, 63, 64, 65, 300))]
    return made + [text[6000 + 1000 * i :][:n] * 4 for i, n in enumerate((16, 40, 77))]


def requests(text: list[int], count: int) -> list[tuple[list[int], int]]:
    """Prompts with one of a few beginnings, and how many tokens to make of each."""
    chosen = random.Random(0)
    made = []
    for _ in range(count):
        own, first = chosen.choice((1, 3, 17, 63, 64, 65, 300)), chosen.randrange(256, len(text) - 300)
        prompt = text[: chosen.choice((0, 64, 100, 128, 256))] + text[first : first + own]
        made.append((prompt, chosen.choice((1, 2, 30, 70, 130))))
    return made


def counters(llm: Any) -> dict[str, float]:
    """vLLM's own counters."""
    return {metric.name.removeprefix("vllm:"): metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def work(name: str, model: str, count: int) -> dict[str, Any]:
    """What one engine answers: to `prompts` twice, or to `requests`."""
    llm, text = started(name, model), text_tokens(model)
    if name == "alone":
        # Answers do not depend on what runs beside them but for rounding; few at a time keeps that small and fast.
        asked = [({"prompt_token_ids": prompt}, parameters(new)) for prompt, new in requests(text, count)]
        found = llm.generate([x for x, _ in asked], [x for _, x in asked], use_tqdm=False)
        return {"answers": {str(i): answer(x) for i, x in enumerate(found)}}
    if name.startswith("soak"):
        return soak(llm, requests(text, count))
    result: dict[str, Any] = {"answers": {}}
    for turn in range(2):  # the second time with prefix hits
        found = llm.generate([{"prompt_token_ids": p} for p in prompts(text)], parameters(NEW), use_tqdm=False)
        result["answers"] |= {f"{turn}.{i}": answer(x) for i, x in enumerate(found)}
    if "speculative_config" in ENGINES[name]:
        found_counters = counters(llm)
        drafted, accepted = (found_counters[f"spec_decode_num_{x}_tokens"] for x in ("draft", "accepted"))
        result["note"] = f"{accepted:.0f} of {drafted:.0f} drafts taken"
        result["failure"] = None if 0 < accepted < drafted else "drafts were not both taken and rejected"
    return result


def soak(llm: Any, asked: list[tuple[list[int], int]]) -> dict[str, Any]:
    """Arrivals and aborts at random."""
    engine, chosen = llm.llm_engine, random.Random(2)
    waiting, running, done, aborted = list(enumerate(asked)), set(), {}, 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(chosen.randrange(3)):
            if waiting and len(running) < 3 * SEQUENCES:
                number, (prompt, new) = waiting.pop(0)
                engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters(new))
                running.add(str(number))
        if running and chosen.random() < 0.04:
            gone = chosen.choice(sorted(running))
            engine.abort_request([gone])
            running.discard(gone)
            aborted += 1
        for output in engine.step():
            if output.finished:
                done[output.request_id] = answer(output)
                running.discard(output.request_id)
    for _ in range(3):  # with asynchronous scheduling the last steps end later
        engine.step()
    free = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    found = counters(llm)
    failures = [
        f"{BLOCKS - 1 - free} blocks are not free" if free != BLOCKS - 1 else "",
        "no preemption" if not found["num_preemptions"] else "",
        "no prefix hits" if not found["prefix_cache_hits"] else "",
        f"{len(done)} answers to {len(asked) - aborted} requests" if len(done) != len(asked) - aborted else "",
    ]
    note = f"{aborted} aborted, {found['num_preemptions']:.0f} preemptions, {found['prefix_cache_hits']:.0f} tokens hit"
    return {"answers": done, "note": note, "failure": "; ".join(filter(None, failures)) or None}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> tuple[str, str | None]:
    """How many tokens agree up to the first near tie, and a failure where the difference is no tie."""
    same, total, failure = 0, 0, None
    for key, got in found.items():
        tokens, ahead = expected[key]["tokens"], expected[key]["ahead"]
        at = next((i for i, (a, b) in enumerate(zip(got["tokens"], tokens, strict=False)) if a != b), None)
        if at is not None and ahead[at] >= TIE:
            failure = failure or f"answer {key} differs at token {at}, {ahead[at]:.3f} ahead"
        same, total = same + (len(got["tokens"]) if at is None else at), total + len(got["tokens"])
    if same < total / 2:
        failure = failure or "too few tokens compared"
    return f"{same} of {total} tokens equal", failure


def run(verbs: list[str], given: argparse.Namespace) -> int:
    """All engines of the verbs at once, then the comparisons."""
    names = sorted({name for verb in verbs for pair in CHECKS[verb].items() for name in pair})
    failed, results, running = 0, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        end = time.monotonic() + given.timeout
        for name in names:
            log = Path(folder) / f"{name}.log"
            command = [sys.executable, __file__, "one", "--name", name, "--model", given.model]
            command += ["--requests", str(given.requests)]
            with log.open("w") as file:
                running[name] = (subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT), log)
        for name, (process, log) in running.items():
            try:
                process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            lines = log.read_text(errors="replace").splitlines()
            rows = [line for line in lines if line.startswith("ROW ")]
            if rows:
                results[name] = json.loads(rows[-1][4:])
            else:
                failed = 1
                print(f"FAILED {name}: exit status {process.returncode}\n" + "\n".join(lines[-25:]), flush=True)
            for line in lines:
                if "TurboAttention:" in line and name in ("plain", "skip"):
                    print(f"  {name}: {line[line.index('TurboAttention:') :]}")
    for verb in verbs:
        for name, reference in CHECKS[verb].items():
            if name not in results or reference not in results:
                continue
            text, failure = compare(results[name]["answers"], results[reference]["answers"])
            failure = failure or results[name].get("failure")
            failed |= failure is not None
            note = results[name].get("note", "")
            state = "ok" if failure is None else "FAILED"
            print(f"{state} {verb}: {name} against {reference}: {text}; {note} {failure or ''}")
    return int(failed)


def main() -> int:
    """Run the verbs of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=(*CHECKS, "all", "one"))
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for everything")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--name", default="")
    parser.add_argument("--model", required=True, help="folder of a model with its tokeniser")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if given.verb == "one":
        print("ROW " + json.dumps(work(given.name, given.model, given.requests)), flush=True)
        return 0
    return run([verb for verb in CHECKS if verb != "ranks"] if given.verb == "all" else [given.verb], given)


if __name__ == "__main__":
    sys.exit(main())
