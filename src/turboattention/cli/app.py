"""The typer app and its verbs."""

import shlex
from collections.abc import Sequence

import typer

from turboattention.cli.ab import ab
from turboattention.cli.bench import bench
from turboattention.cli.calibrate import calibrate
from turboattention.cli.compare import compare
from turboattention.cli.doctor import doctor
from turboattention.cli.generate import generate
from turboattention.cli.options import examples
from turboattention.cli.plan import plan
from turboattention.cli.review import review
from turboattention.cli.serve import serve
from turboattention.cli.watch import watch
from turboattention.errors import InvalidInputError

NAME = "turboattention"

app = typer.Typer(
    name=NAME,
    help="Attention with a compressed key/value cache: measure it, use it, check this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(
    epilog=examples(
        "turboattention compare",
        "turboattention compare --preset turbo4 --preset turbo3 --tokens 4096 --html comparison.html",
        "turboattention compare --model qwen2.5-coder-0.5b --text notes.txt --json comparison.json",
    )
)(compare)
app.command(
    epilog=examples(
        'turboattention generate --chat --prompt "What is a lighthouse?"',
        'turboattention generate --prompt "def quicksort(items):" --model qwen2.5-coder-0.5b --preset turbo3',
        'turboattention generate --prompt "Once upon a time" --temperature 0.8 --seed 7 --json story.json',
    )
)(generate)
app.command(
    epilog=examples(
        "turboattention calibrate --out policy.json",
        "turboattention calibrate --texts notes.txt --target max-kl=0.005 --out policy.json --report report.html",
        "turboattention calibrate --model qwen2.5-coder-0.5b --target bits=3.25 --state run.json --out policy.json",
    )
)(calibrate)
app.command(
    epilog=examples(
        "turboattention doctor",
        "turboattention doctor --json doctor.json",
        "python -m turboattention doctor",
    )
)(doctor)
app.command(
    epilog=examples(
        "turboattention bench decode --tokens 4096 --preset turbo4",
        "turboattention bench decode --device cuda --batch 8 --tokens 32768 --ragged --json decode.json",
        "turboattention bench prefill --device cuda --tokens 16384 --no-causal",
    )
)(bench)
app.command(
    epilog=examples(
        "turboattention plan qwen2.5-coder-1.5b --gpu L40S",
        "turboattention plan ./model --gpu H100 --prompt 32768 --output 1024 --json plan.json",
        "turboattention plan config.json --gpu RTX4090 --weight-bits 4.5 --batch 8 --price 0.50",
    )
)(plan)
app.command(
    epilog=examples(
        "turboattention review run/pairs.jsonl --data review.sqlite",
        "turboattention review run/pairs.jsonl --data review.sqlite --results --json review.json --markdown review.md",
        "turboattention review run/pairs.jsonl --data review.sqlite --host 0.0.0.0 --allow-host box.example",
    )
)(review)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples(
        "turboattention serve meta-llama/Llama-3.1-8B-Instruct",
        "turboattention serve Qwen/Qwen3-8B --preset turbo2 --max-num-seqs 128 --port 8001",
        "turboattention serve ./model --policy policy.json --tensor-parallel-size 2 --show",
    ),
)(serve)
app.command(
    epilog=examples(
        "turboattention watch --metrics-url http://127.0.0.1:8000/metrics",
        "turboattention watch --metrics-url http://gpu1:8000/metrics --limit relative_error=0.15:0.1 --webhook @h.txt",
        "turboattention watch --metrics-url http://gpu1:8000/metrics --reads 40 --interval 15 --json canary.json",
    )
)(watch)
app.command(
    epilog=examples(
        "turboattention ab --baseline http://old:8000 --candidate http://new:8000 --requests asked.jsonl --out pilot",
        "turboattention ab --baseline preset:16-bit --candidate preset:turbo4 --samples 12 --out try",
        "turboattention ab --baseline http://old:8000 --candidate http://new:8000 --baseline-key-env OLD_KEY "
        "--max-score-drop 0.02 --max-tpot-ratio 1.1 --max-error-rate 0.01 --out pilot",
    )
)(ab)


def run(arguments: Sequence[str]) -> int:
    """Run the app; usage errors become InvalidInputError. Returns the exit status."""
    command = shlex.join([NAME, *arguments])
    try:
        status = app(args=list(arguments) or ["--help"], prog_name=NAME, standalone_mode=False, obj=command)
    except typer.TyperException as error:
        raise InvalidInputError(error.format_message()) from error
    except typer.Abort:
        raise KeyboardInterrupt from None
    return status if isinstance(status, int) else 0
