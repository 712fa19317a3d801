"""``turboattention serve``: vLLM's own server with the plugin configured."""

import os
import shlex
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from turboattention.cli.options import PRESET_HELP
from turboattention.errors import MissingDependencyError, invalid
from turboattention.integrations.vllm.serving import serve_arguments
from turboattention.monitoring.reference import Reference


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model, as vLLM takes it.")],
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="PRESET", help=f"{PRESET_HELP} Default: turbo4.")
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", metavar="FILE", help="Policy file.")] = None,
    watch: Annotated[
        float | None,
        typer.Option("--watch", metavar="SHARE", help="Check this share of sequences against 16-bit attention."),
    ] = None,
    watch_reference: Annotated[
        Path | None,
        typer.Option("--watch-reference", metavar="FILE", help="State of a calibration, for the drift of K and V."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the command of vLLM and stop.")] = False,
) -> None:
    """Start vLLM's server with compressed pages; further options go to ``vllm serve`` as they are."""
    settings: dict[str, Any] | None = None if watch is None else {"share": watch}
    if watch_reference is not None:
        if settings is None:
            raise invalid("--watch-reference", "--watch beside it", "none")
        Reference.load(watch_reference)
        settings["reference"] = str(watch_reference.resolve())
    arguments = serve_arguments(model, preset, policy, context.args, settings)
    print(shlex.join(["vllm", *arguments]), file=sys.stdout if show else sys.stderr, flush=True)
    if show:
        return
    if find_spec("vllm") is None:
        raise MissingDependencyError(
            "vLLM: expected version 0.33 or 0.34, received none; pip install 'turboattention[vllm]'"
        )
    # The layers run in processes of their own; prometheus_client joins the metrics of all through this directory.
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="turboattention-metrics-"))
    # vLLM takes over this process: its signals and exit status are the server's.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments])
