"""``turboattention review``: a local page on which people judge pairs of answers blind, and what they found."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from turboattention.cli.options import JsonOption, check_outputs, to_json
from turboattention.cli.requirements import require
from turboattention.errors import invalid
from turboattention.files import write_atomic

INSTALL = "pip install 'turboattention[review]'"


def review(
    pairs: Annotated[Path, typer.Argument(help="JSON lines with both answers of each sample: pairs.jsonl of ab.")],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Where judgements are kept (SQLite).")],
    results: Annotated[bool, typer.Option("--results", help="Print what was found so far and stop.")] = False,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="PATH", help="With --results: also write them as Markdown.")
    ] = None,
    json_path: JsonOption = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than loopback reach the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8765,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Another name that raters type, repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of orders and sides.")] = 0,
) -> None:
    """Serve the page until it is interrupted; the same command goes on with the judgements made before."""
    require("fastapi", "uvicorn", "scipy", "numpy", install=INSTALL)
    if not results and (markdown or json_path):
        raise invalid("--json and --markdown", "--results beside them", "none")
    if results and not data.exists():
        raise invalid("--data", "a file with judgements", data)
    check_outputs(data, json_path, markdown)
    if pairs.resolve() in {path.resolve() for path in (data, json_path, markdown) if path is not None}:
        raise invalid("output paths", "other files than the pairs", pairs)

    from turboattention.hosts import is_loopback
    from turboattention.report.review import render_review
    from turboattention.serving.review.analyse import analyse
    from turboattention.serving.review.pairs import read_pairs
    from turboattention.serving.review.server import host_headers, listen, make_server
    from turboattention.serving.review.store import Store

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    file = read_pairs(pairs)
    for line in file.bad_lines:
        say(f"left out: {pairs}, {line}")
    with Store(data, file, seed) as store:
        if results:
            found = analyse(file, store.judgements(), pairs.name, seed)
            text = render_review(found)
            print(text, end="")
            outputs = {json_path: to_json(found.to_dict()) if json_path else "", markdown: text}
            for path, content in outputs.items():
                if path is not None:
                    write_atomic(path, content)
            return
        with listen(host, port) as bound:
            number = bound.getsockname()[1]
            names = host_headers(host, number, allow_host or ())
            if not is_loopback(host):
                say("warning: whoever reaches this address reads the pairs and can judge; nothing is encrypted")
            shown = (allow_host or [host])[0] if not is_loopback(host) else host
            server = make_server(store, file, names)
            say(f"{len(file.pairs)} pairs on http://{shown}:{number}/")
            try:
                server.run(sockets=[bound])
            except KeyboardInterrupt:
                say(f"stopped; {len(store.judgements())} judgements are in {data}")
