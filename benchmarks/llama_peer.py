"""llama.cpp with its compressed caches beside ours: the same GGUF weights, texts, machine and run.

    pip install llama-cpp-python     # compiles llama.cpp; not one of our dependencies
    python benchmarks/llama_peer.py --out benchmarks/results/llama_cpp.csv

llama.cpp computes with the weights as the file holds them (Q4_1 for the default model), transformers turns them into
float32 first. So times of a token say little side by side; what a context adds to that time (`added_ms`) says more.
Quality is of each engine against its own 16-bit cache on the same tokens.
"""

import csv
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import llama_cpp
import torch
import typer
from torch import Tensor

from turboattention import __version__
from turboattention.evaluation.caches import attention_of, make_cache
from turboattention.evaluation.divergence import kl_divergence, negative_log_likelihood
from turboattention.evaluation.environment import environment
from turboattention.evaluation.stream import stream
from turboattention.evaluation.texts import windows
from turboattention.integrations.models import LoadedModel, load_model
from turboattention.integrations.packaged_models import (
    DEFAULT_MODEL,
    PACKAGED_MODELS,
    default_cache_directory,
    packaged_gguf,
)

SHORT = 64  # tokens of the context that `added_ms` counts from
STEPS = 24
TEXT = "persuasion"
TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}  # of a value, a float16 scale for each 32 included
OURS = ("int8", "turbo4", "turbo2")
COLUMNS = (
    "engine", "cache", "bits_per_value", "context", "prefill_tokens_per_s", "ms_per_token", "added_ms", "perplexity",
    "kl", "tokens_scored", "text", "threads", "device", "torch", "llama_cpp_python", "turboattention", "date",
)  # fmt: skip
Row = dict[str, Any]


def timed(prompt: Callable[[], object], step: Callable[[], object], threads: int) -> tuple[float, float]:
    """Seconds of the prompt, and the median milliseconds of a step of one token, always the same one.

    With one thread its processor time: other programs on a shared machine then do not count.
    """
    now = time.process_time if threads == 1 else time.perf_counter
    begin = now()
    prompt()
    marks = [now()]
    for _ in range(STEPS):
        step()
        marks.append(now())
    return marks[0] - begin, 1e3 * median(b - a for a, b in pairwise(marks))


def llama(path: Path, cache: str, tokens: int, threads: int, logits_all: bool = False) -> llama_cpp.Llama:
    """A context of llama.cpp with flash attention."""
    return llama_cpp.Llama(
        str(path), n_ctx=tokens + STEPS + 8, n_threads=threads, n_threads_batch=threads, flash_attn=True,
        type_k=TYPES[cache], type_v=TYPES[cache], logits_all=logits_all, verbose=False,
    )  # fmt: skip


def llama_speed(path: Path, cache: str, ids: list[int], threads: int) -> tuple[float, float]:
    """As `timed`."""
    model = llama(path, cache, len(ids), threads)
    found = timed(lambda: model.eval(ids), lambda: model.eval(ids[:1]), threads)
    model.close()
    return found


def our_speed(model: LoadedModel, policy: str | None, ids: list[int]) -> tuple[float, float]:
    """As `timed`."""
    cache, tokens = make_cache(model.model, policy), torch.tensor([ids])

    def run(x: Tensor) -> None:
        model.model(input_ids=x, past_key_values=cache, use_cache=True, logits_to_keep=1)

    with attention_of(model.model, policy):
        return timed(lambda: run(tokens), lambda: run(tokens[:, :1]), torch.get_num_threads())


def llama_logits(path: Path, cache: str, ids: list[int], threads: int) -> Tensor:
    """float32 ``[tokens, vocabulary]``."""
    model = llama(path, cache, len(ids), threads, logits_all=True)
    model.eval(ids)
    logits = torch.from_numpy(model.scores[: len(ids)].copy())
    model.close()
    return logits


def speed_rows(model: LoadedModel, path: Path, contexts: list[int], threads: int) -> Iterator[Row]:
    """Every cache of both engines at every context, in turn. llama.cpp reads a long prompt slowly on a CPU."""
    ids = windows(model.tokenizer, [TEXT], max(contexts), None)[0].tolist()
    short: dict[tuple[str, str | None], float] = {}
    for context in (SHORT, *contexts):
        for engine, caches in (("transformers", (None, "turbo4")), ("llama.cpp", tuple(TYPES))):
            for cache in caches:
                prompt = ids[:context]
                if engine == "llama.cpp":
                    seconds, ms = llama_speed(path, cache, prompt, threads)
                else:
                    seconds, ms = our_speed(model, cache, prompt)
                added = ms - short.setdefault((engine, cache), ms)
                row = {"engine": engine, "cache": cache or "float32", "context": context, "ms_per_token": f"{ms:.4g}"}
                row |= {"prefill_tokens_per_s": f"{context / seconds:.4g}", "added_ms": f"{added:.4g}"}
                yield row | {"bits_per_value": BITS.get(str(cache), "" if cache else 32)}


def quality_rows(model: LoadedModel, path: Path, tokens: int, threads: int) -> list[Row]:
    """Perplexity of each cache, and its divergence from the same engine's cache of 16 bits (ours: float32)."""
    window = windows(model.tokenizer, [TEXT], tokens, None)
    ids, targets = window[0, :-1].tolist(), window[:, 1:]
    rows: list[Row] = []
    reference = torch.empty(0)
    for cache in TYPES:
        logits = llama_logits(path, cache, ids, threads)[None]
        reference = logits if cache == "f16" else reference
        nll, kl = negative_log_likelihood(logits, targets).mean(), kl_divergence(reference, logits).mean()
        rows.append({"engine": "llama.cpp", "cache": cache, "bits_per_value": BITS[cache], "nll": nll, "kl": kl})
    baseline, found = stream(model.model, window, OURS)
    rows.append(
        {"engine": "transformers", "cache": "float32", "bits_per_value": 32, "nll": baseline.nll.mean(), "kl": 0}
    )
    for name, one in zip(OURS, found, strict=True):
        bits = f"{8 * one.kv_bytes / one.num_values:.3g}"
        rows.append(
            {
                "engine": "transformers",
                "cache": name,
                "bits_per_value": bits,
                "nll": one.nll.mean(),
                "kl": one.kl.mean(),
            }
        )
    for row in rows:
        row["perplexity"] = f"{float(torch.as_tensor(row.pop('nll')).exp()):.5g}"
        row |= {"kl": f"{float(row['kl']):.3g}", "tokens_scored": tokens}
        print(row, flush=True)
    return rows


def main(
    out: Annotated[Path, typer.Option(help="CSV file to append to")],
    context: Annotated[list[int] | None, typer.Option(help="tokens before the timed steps, repeatable")] = None,
    tokens: Annotated[int, typer.Option(help="tokens scored for perplexity; 0 leaves it out")] = 2048,
    threads: Annotated[int, typer.Option(help="of both engines")] = 2,
) -> None:
    """Measure and append rows to OUT."""
    torch.set_num_threads(threads)
    model = load_model(DEFAULT_MODEL)
    path = packaged_gguf(PACKAGED_MODELS[DEFAULT_MODEL], default_cache_directory())
    known = environment(torch.float32, torch.device("cpu"))
    common = {
        "text": TEXT, "threads": threads, "device": known["cpu"], "torch": torch.__version__, "date": known["date"],
        "llama_cpp_python": metadata.version("llama-cpp-python"), "turboattention": __version__,
    }  # fmt: skip
    fresh = not out.exists()
    with out.open("a", newline="", encoding="utf-8", buffering=1) as file, torch.inference_mode():
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in quality_rows(model, path, tokens, threads) if tokens else []:
            writer.writerow(common | row)
        for row in speed_rows(model, path, context or [4096, 8000], threads):
            print(row, flush=True)
            writer.writerow(common | row)


if __name__ == "__main__":
    typer.run(main)
