"""``turboattention plan``: what a model needs on a GPU, how fast and at what cost, before anything is bought."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from turboattention.cli.options import JsonOption, check_outputs, to_json
from turboattention.cli.requirements import require
from turboattention.errors import invalid
from turboattention.files import write_atomic

WIDTH = 140  # of a table in a file or a pipe
LONG_PROMPT = 8192


def plan(
    model: Annotated[
        str, typer.Argument(help="A config.json, a folder with one, a packaged name, or a hub name in the local cache.")
    ],
    gpu: Annotated[str, typer.Option("--gpu", help="A card of the table.")] = "H100",
    gpus: Annotated[
        Path | None, typer.Option("--gpus", metavar="FILE", help="A table of cards instead of the package's.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt", help="Tokens of a prompt; default: 8192, or as many as the model takes.")
    ] = None,
    output: Annotated[int, typer.Option("--output", help="Tokens of an answer.")] = 512,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Requests at once; default: as many as fit in 16 bits.")
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", help="The engine takes no more at once.")] = 256,
    weight_bits: Annotated[
        float | None, typer.Option("--weight-bits", help="Of a stored weight, scales included; default: 16.")
    ] = None,
    memory_share: Annotated[
        float, typer.Option("--memory-share", help="Of the card's memory, as vLLM's --gpu-memory-utilization.")
    ] = 0.9,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", help="Cards that share every layer, as vLLM's.")
    ] = 1,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Dollars an hour instead of the table's.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Size, largest batch, predicted speed, cost and energy of every cache, and where nothing is gained."""
    require("transformers")
    check_outputs(json_path)

    from turboattention.planning.gpu import find_gpu, load_gpus
    from turboattention.planning.model import read_model
    from turboattention.planning.plan import Workload
    from turboattention.planning.plan import plan as make
    from turboattention.report.plan import print_plan

    card = find_gpu(gpu, load_gpus(gpus))
    if price is not None:
        card = replace(card, price_per_hour=price, price_source="--price")
    facts = read_model(model)
    if facts.quantization and weight_bits is None:
        raise invalid(
            "--weight-bits", f"the bits of a weight: the config says {facts.quantization}, which does not count them",
            "none", "for example --weight-bits 4.5 for groups of 32 at 4 bits, 8 for FP8",
        )  # fmt: skip
    bits = 16.0 if weight_bits is None else weight_bits
    asked = max(1, min(LONG_PROMPT, facts.context - output)) if prompt is None else prompt
    result = make(facts, card, Workload(asked, output, batch, max_batch, bits, memory_share, tensor_parallel_size))
    if json_path:
        write_atomic(json_path, to_json(result.to_dict()))
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    print_plan(result, console)
