"""Tasks with a compressed cache beside the same tasks with a 16-bit cache: the rows behind docs/guidelines.md.

    python benchmarks/tasks.py run --task humaneval --model qwen2.5-coder-0.5b --data HumanEval.jsonl.gz \
        --policy policy.json --preset turbo4 --device cuda --batch 164
    python benchmarks/tasks.py score --task humaneval --model qwen2.5-coder-0.5b --out benchmarks/results/tasks.csv

`run` asks all questions with the 16-bit cache and then with every policy and preset, in the same batches, greedily, and
writes one file of answers for each cache into --answers. `score` judges them (HumanEval: runs the code, task_code.py)
and appends a row for each policy; it needs SciPy and neither model nor GPU. `task_data.py` says where data files are.

Columns: `bits_per_value` counts every byte that the cache of one sequence of `tokens` tokens holds, `tokens` the mean
of prompt and answer with the policy; `items` questions; right answers of both caches; `difference` of the shares with
Tango's 95 % interval for pairs and McNemar's exact p; `lost`, `gained` questions right with one cache alone;
`agreement` the share of equal final answers (HumanEval: both pass or both fail) and `same_text` of equal texts;
`seconds` of the answers with the policy and with 16 bits, prompts included.
"""

import csv
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from task_data import TASKS, load

from turboattention.errors import TurboAttentionError, invalid
from turboattention.evaluation.environment import environment
from turboattention.evaluation.stream import policy_name
from turboattention.evaluation.tasks import Question, bits_per_value, choose, write
from turboattention.integrations.models import load_model
from turboattention.policy import Policy

COLUMNS = (
    "task", "model", "policy", "bits_per_value", "tokens", "items", "correct_16bit", "correct", "difference",
    "difference_low", "difference_high", "mcnemar_p", "lost", "gained", "agreement", "same_text", "batch", "seconds",
    "seconds_16bit", "date", "device", "torch", "transformers", "turboattention", "dtype",
)  # fmt: skip
EXACT = "16-bit"
ANSWERS = Path("build/tasks")

Name = Literal["humaneval", "gsm8k", "mmlu", "cloze"]
Folder = Annotated[Path, typer.Option(help="folder of the files of answers")]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    task: Annotated[Name, typer.Option()],
    model: Annotated[str, typer.Option(help="a name that the command line knows, or a path")],
    data: Annotated[Path | None, typer.Option(help="file of the task; the cloze takes any novel")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="repeatable")] = None,
    policy: Annotated[list[Path] | None, typer.Option(help="policy file; repeatable")] = None,
    items: Annotated[int, typer.Option(min=0, help="questions; 0: HumanEval 164, GSM8K 200, MMLU 281, cloze 100")] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    answers: Folder = ANSWERS,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
) -> None:
    """Answer the questions with each cache."""
    torch.backends.cuda.matmul.allow_tf32 = False  # as quality.py: its noise would flip answers too
    caches = [None, *(Policy.from_preset(name) for name in preset or []), *(Policy.load(path) for path in policy or [])]
    names = [EXACT if cache is None else policy_name(cache) for cache in caches]
    if len(set(names)) < len(names):
        raise invalid("policies", "each name once", ", ".join(names))
    loaded = load_model(model, dtype=getattr(torch, dtype), device=device)
    questions = load(task, data, loaded.tokenizer, items)
    answers.mkdir(parents=True, exist_ok=True)
    for name, cache in zip(names, caches, strict=True):
        start = time.perf_counter()
        if TASKS[task].new_tokens:
            found = write(loaded, questions, cache, batch, TASKS[task].new_tokens, _say)
        else:
            found = choose(loaded, questions, cache, batch, _say)
        seconds = time.perf_counter() - start
        tokens = round(sum(answer.tokens for answer in found) / len(found))
        machine = environment(loaded.model.dtype, loaded.model.device)
        head = {
            "task": task, "model": loaded.name, "policy": name, "tokens": tokens, "batch": batch,
            "bits_per_value": bits_per_value(loaded.model, cache, tokens), "seconds": seconds, "date": machine["date"],
            "device": machine.get("gpu") or machine.get("cpu"), "dtype": machine["dtype"],
            **{package: machine["packages"][package] for package in ("torch", "transformers", "turboattention")},
        }  # fmt: skip
        lines = [head, *(asdict(q) | {"answer": answer.text} for q, answer in zip(questions, found, strict=True))]
        file = _file(answers, task, loaded.name, name)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(file, f"{seconds:.0f} s, {tokens} tokens, {head['bits_per_value']:.2f} bits", file=sys.stderr, flush=True)


@app.command()
def score(
    task: Annotated[Name, typer.Option()],
    model: Annotated[str, typer.Option(help="as of run")],
    out: Annotated[Path, typer.Option(help="CSV file to append to")],
    answers: Folder = ANSWERS,
) -> None:
    """Judge the answers of `run` and append rows to OUT."""
    exact = _file(answers, task, model, EXACT)
    if not exact.is_file():
        raise invalid("--answers", f"a file {exact.name}", f"none in {answers}", "run `tasks.py run` first")
    baseline = _read(exact)
    rows = [
        row_of(task, baseline, _read(path))
        for path in sorted(answers.glob(_file(answers, task, model, "*").name))
        if path != exact
    ]
    fresh = not out.exists() or not out.stat().st_size
    with out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{column}={row[column]}" for column in COLUMNS[:16]))


Answers = tuple[dict[str, Any], list[Question], list[str]]


def row_of(task: str, baseline: Answers, candidate: Answers) -> dict[str, Any]:
    """One row of the CSV file from the answers of both caches."""
    from turboattention.serving.statistics import mcnemar, paired_share_interval

    (exact_head, questions, exact_texts), (head, asked, texts) = baseline, candidate
    alike = ("task", "model", "batch", "dtype", "device", "torch")
    if questions != asked or any(exact_head[key] != head[key] for key in alike):
        raise invalid(
            "--answers", f"the same questions, {', '.join(alike)} with both caches", head["policy"], "run again"
        )
    chosen = TASKS[task]
    exact_right, right = chosen.right(questions, exact_texts), chosen.right(questions, texts)
    pairs = list(zip(exact_right, right, strict=True))
    lost, gained, count = pairs.count((True, False)), pairs.count((False, True)), len(pairs)
    interval = paired_share_interval(lost, gained, count)
    if chosen.final is None:
        agreed = count - lost - gained
    else:
        agreed = sum(chosen.final(a) == chosen.final(b) for a, b in zip(exact_texts, texts, strict=True))
    same = sum(a == b for a, b in zip(exact_texts, texts, strict=True))
    return {
        **{column: head[column] for column in COLUMNS if column in head},
        "bits_per_value": f"{head['bits_per_value']:.4f}", "seconds": f"{head['seconds']:.1f}",
        "seconds_16bit": f"{exact_head['seconds']:.1f}", "items": count, "correct_16bit": sum(exact_right),
        "correct": sum(right), "difference": f"{(gained - lost) / count:.4f}",
        "difference_low": f"{interval.low:.4f}", "difference_high": f"{interval.high:.4f}",
        "mcnemar_p": f"{mcnemar(lost, gained):.4f}", "lost": lost, "gained": gained,
        "agreement": f"{agreed / count:.4f}", "same_text": f"{same / count:.4f}",
    }  # fmt: skip


def _file(folder: Path, task: str, model: str, policy: str) -> Path:
    safe = [part.replace(os.sep, "-").replace(" ", "-") for part in (task, model, policy)]
    return folder / f"{'_'.join(safe)}.jsonl"


def _read(path: Path) -> Answers:
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    texts = [line.pop("answer") for line in lines]
    return head, [Question(**line | {"choices": tuple(line["choices"])}) for line in lines], texts


def _say(done: int, total: int, label: str) -> None:
    print(f"{label} {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        app()
    except TurboAttentionError as error:
        sys.exit(str(error))
