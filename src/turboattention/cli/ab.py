"""``turboattention ab``: the same requests to two servers or presets, and a verdict against limits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import typer
from rich.console import Console

from turboattention.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    check_device,
    check_outputs,
    progress_bar,
    to_json,
)
from turboattention.cli.requirements import require
from turboattention.errors import TurboAttentionError
from turboattention.files import write_atomic
from turboattention.report.words import printable

if TYPE_CHECKING:
    from turboattention.integrations.models import LoadedModel
    from turboattention.serving.result import ABResult
    from turboattention.serving.review.result import ReviewResult

STATUS = {"pass": 0, "no limits": 0, "fail": 1, "not enough data": 3}
_SIDE = "http://HOST:PORT of an OpenAI-compatible server, preset:NAME, policy:FILE, or preset:16-bit."


def ab(
    context: typer.Context,
    baseline: Annotated[str, typer.Option("--baseline", metavar="SIDE", help=_SIDE)],
    candidate: Annotated[str, typer.Option("--candidate", metavar="SIDE", help=_SIDE)],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Everything goes here; an unfinished run goes on.")
    ],
    requests: Annotated[
        Path | None, typer.Option("--requests", metavar="JSONL", help="Default: 48 bundled requests of 700 tokens.")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="The first so many requests alone.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Where a request says nothing.")] = 128,
    baseline_model: Annotated[str | None, typer.Option("--baseline-model", metavar="NAME")] = None,
    candidate_model: Annotated[str | None, typer.Option("--candidate-model", metavar="NAME")] = None,
    baseline_key_env: Annotated[
        str | None, typer.Option("--baseline-key-env", metavar="NAME", help="Variable that holds the key.")
    ] = None,
    candidate_key_env: Annotated[str | None, typer.Option("--candidate-key-env", metavar="NAME")] = None,
    baseline_key_file: Annotated[Path | None, typer.Option("--baseline-key-file", metavar="FILE")] = None,
    candidate_key_file: Annotated[Path | None, typer.Option("--candidate-key-file", metavar="FILE")] = None,
    api: Annotated[
        Literal["auto", "chat", "completions"],
        typer.Option("--api", help="auto: chat for requests with messages, completions for those with a prompt."),
    ] = "auto",
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight.")] = 4,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for a whole answer.")] = 120.0,
    warm_up: Annotated[int, typer.Option("--warm-up", min=1, help="Requests before the first that counts.")] = 2,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Given to the servers.")] = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs/--no-logprobs", help="Ask for log-probabilities.")] = True,
    score: Annotated[
        Literal["contains", "exact", "normalised"], typer.Option("--score", help="How an answer meets a reference.")
    ] = "contains",
    max_score_drop: Annotated[float | None, typer.Option("--max-score-drop", help="Share of right answers.")] = None,
    min_agreement: Annotated[float | None, typer.Option("--min-agreement", help="Share of equal texts.")] = None,
    max_error_rate: Annotated[float | None, typer.Option("--max-error-rate", help="Of the candidate.")] = None,
    max_ttft_ratio: Annotated[float | None, typer.Option("--max-ttft-ratio", help="Time to first token.")] = None,
    max_tpot_ratio: Annotated[float | None, typer.Option("--max-tpot-ratio", help="Time per token.")] = None,
    max_length_drift: Annotated[float | None, typer.Option("--max-length-drift", help="Of mean lengths.")] = None,
    max_logprob_distance: Annotated[
        float | None, typer.Option("--max-logprob-distance", help="Nats per token, mean absolute difference.")
    ] = None,
    min_samples: Annotated[int, typer.Option("--min-samples", help="With fewer there is no verdict.")] = 20,
    confidence: Annotated[float, typer.Option("--confidence", help="Of all intervals.")] = 0.95,
    review: Annotated[
        Path | None, typer.Option("--review", metavar="JSON", help="Of review --results, for the reports.")
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again what failed before.")] = False,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME_OR_PATH", help="Of preset:NAME and policy:FILE.")
    ] = "smollm2-135m",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    json_path: JsonOption = None,
) -> None:
    """Ask two sides the same requests and judge the candidate: exit status 0 pass, 1 fail, 3 not enough data."""
    require("httpx2", "scipy", "jinja2", "matplotlib", install="pip install 'turboattention[serving]'")
    check_outputs(json_path)

    from turboattention.serving.choose import Spec, make_sides
    from turboattention.serving.limits import Limits
    from turboattention.serving.prompts import bundled_requests, read_requests
    from turboattention.serving.review.result import ReviewResult
    from turboattention.serving.secrets import read_key
    from turboattention.serving.session import Settings, run_ab

    judged = None if review is None else ReviewResult.load(review)

    limits = Limits(
        max_score_drop, min_agreement, max_error_rate, max_ttft_ratio, max_tpot_ratio, max_length_drift,
        max_logprob_distance, min_samples, confidence,
    )  # fmt: skip
    settings = Settings(temperature, seed, concurrency, timeout, warm_up, logprobs, score)
    asked, bad = read_requests(requests, max_tokens) if requests else (bundled_requests(), [])
    asked = asked[:samples]
    keys = [
        read_key("baseline", baseline_key_env, baseline_key_file),
        read_key("candidate", candidate_key_env, candidate_key_file),
    ]
    specs = [
        Spec("baseline", baseline, baseline_model, keys[0]),
        Spec("candidate", candidate, candidate_model, keys[1]),
    ]
    if any(spec.local for spec in specs):
        require("transformers")
        check_device(device)
    for line in bad:
        _say(f"{requests}, line {line.number} left out: {line.reason}")

    def load() -> "LoadedModel":
        from turboattention.integrations.models import load_model

        return load_model(model, dtype=getattr(torch, dtype), device=device)

    with progress_bar("Starting") as progress:
        sides = make_sides(specs, settings, api, asked, load)
        secrets = tuple(key for key in keys if key is not None)
        outcome = run_ab(out, sides, asked, limits, settings, bad, secrets, retry_errors, progress)
    try:
        _report(outcome.result, out, json_path, str(context.obj), judged)
    except TurboAttentionError:
        if outcome.stopped_by is None:
            raise
        _say("the report of what was answered could not be written; the answers are kept")
    if outcome.stopped_by is not None:
        raise outcome.stopped_by
    raise typer.Exit(STATUS[outcome.result.verdict])


def _report(result: "ABResult", out: Path, json_path: Path | None, command: str, review: "ReviewResult | None") -> None:
    from turboattention.report.ab import markdown, print_ab
    from turboattention.report.ab_page import render_ab
    from turboattention.serving.review.pairs import check_same_pairs
    from turboattention.serving.store import PAIRS

    if review is not None:
        check_same_pairs(review.fingerprint, out / PAIRS)
    print_ab(result, Console(), review)
    data = to_json(result.to_dict())
    outputs = {out / "result.json": data, out / "report.md": markdown(result, command, review)}
    outputs[out / "report.html"] = render_ab(result, command, review)
    for path, text in (outputs | ({json_path: data} if json_path else {})).items():
        write_atomic(path, text)
        _say(f"wrote {path}")


def _say(text: str) -> None:
    Console(stderr=True).print(printable(text), markup=False, highlight=False)
