"""``turboattention watch``: limits and alarms over the metrics of a running server."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from turboattention.cli.options import JsonOption, check_outputs, to_json
from turboattention.config import presets
from turboattention.errors import MissingDependencyError, UnsupportedError, invalid
from turboattention.files import read_bytes, write_atomic
from turboattention.monitoring.guard import Guard, Response
from turboattention.monitoring.limits import MEASURES, chosen_limits
from turboattention.monitoring.reference import expected_errors
from turboattention.monitoring.responses import Log, Refuse, Webhook, WritePolicy
from turboattention.monitoring.settings import NO_CLIENT
from turboattention.policy import Policy

DASHBOARD = Path(__file__).parents[1] / "monitoring" / "grafana.json"
_LONGEST_ADDRESS = 2**16  # bytes of its file


def watch(
    metrics_url: Annotated[
        str | None, typer.Option("--metrics-url", metavar="URL", help="The server's /metrics.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="MEASURE=HIGH[:LOW]", help=f"Repeatable; measures: {', '.join(MEASURES)}."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Result of calibrate --json: limits layer by layer."),
    ] = None,
    factor: Annotated[
        float, typer.Option("--factor", help="How many times the calibration's error a layer may have.")
    ] = 3.0,
    interval: Annotated[float, typer.Option("--interval", metavar="SECONDS", help="Between two reads.")] = 15.0,
    reads: Annotated[
        int | None, typer.Option("--reads", min=2, help="Stop after so many; default: run until stopped.")
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Own /metrics and /ready; port 0: any.")
    ] = "127.0.0.1:9109",
    webhook: Annotated[
        str | None,
        typer.Option("--webhook", metavar="URL_OR_@FILE", help="POST each alarm there; @FILE holds the address."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", metavar="PRESET_OR_FILE", help="What the server runs; with --write-policy."),
    ] = None,
    write_policy: Annotated[
        Path | None,
        typer.Option("--write-policy", metavar="PATH", help="Policy for the next start, offending layers at 16 bits."),
    ] = None,
    refuse: Annotated[bool, typer.Option("--refuse", help="/ready answers 503 while an alarm stands.")] = False,
    dashboard: Annotated[
        Path | None, typer.Option("--dashboard", metavar="PATH", help="Write the Grafana dashboard there and stop.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Judge a server started with ``serve --watch`` by limits; exit status 1 when an alarm was raised."""
    check_outputs(json_path, write_policy, dashboard)
    if dashboard is not None:
        write_atomic(dashboard, DASHBOARD.read_text(encoding="utf-8"))
        print(f"wrote {dashboard}")
        return
    if metrics_url is None:
        raise invalid("--metrics-url", "the address of the server's /metrics", "none")
    if not metrics_url.startswith(("http://", "https://")):
        raise invalid("--metrics-url", "an http or https address", repr(metrics_url))
    if not 0 < interval < float("inf"):
        raise invalid("--interval", "more than 0 seconds", interval)
    host, port = _address(listen)
    expected = None if calibration is None else expected_errors(calibration)
    limits = chosen_limits(limit or (), expected, factor)
    responses: list[Response] = [Log()]
    if webhook is not None:
        responses.append(Webhook(_from_file(webhook)))
    if write_policy is not None:
        responses.append(WritePolicy(_policy(policy), write_policy))
    elif policy is not None:
        raise invalid("--policy", "--write-policy beside it", "none")
    refusing = Refuse() if refuse else None
    responses += [refusing] if refusing is not None else []
    try:
        from turboattention.monitoring.sidecar import Sidecar, SidecarMetrics, serve
    except ModuleNotFoundError as error:
        raise MissingDependencyError(NO_CLIENT) from error

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    own = SidecarMetrics()
    guard = Guard(limits, responses, own.guard)
    sidecar = Sidecar(metrics_url, guard, own)
    server = serve(host, port, own, refusing)
    print(f"watching {metrics_url}; own metrics at http://{host}:{server.server_port}/metrics", flush=True)
    try:
        sidecar.run(interval, reads)
    finally:
        server.shutdown()
        server.server_close()
        if json_path is not None:
            write_atomic(json_path, to_json({
                "schema": 1, "reads": sidecar.reads, "failed_reads": sidecar.failed, "checks": sidecar.checks,
                "alarm_raised": guard.ever_raised, "unanswered_responses": guard.unanswered,
                "standing": [{"layer": layer, "measure": measure} for layer, measure in guard.alarms],
                "last_failure": sidecar.reason,
            }))  # fmt: skip
    fine = sidecar.verdict()
    standing = ", ".join(f"layer {layer} {measure}" for layer, measure in guard.alarms) or "none"
    print(
        f"{sidecar.reads} reads ({sidecar.failed} failed), {sidecar.checks} checks; alarms that stand: {standing}"
    )  # fmt: skip
    if not fine:
        raise typer.Exit(1)


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise invalid("--listen", "HOST:PORT", repr(listen))
    return host.strip("[]"), int(port)


def _from_file(webhook: str) -> str:
    """The address itself, or what the file behind @ holds: command lines can be read by everyone on a machine."""
    if not webhook.startswith("@"):
        return webhook
    content = read_bytes("--webhook", Path(webhook[1:]), _LONGEST_ADDRESS)
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise invalid("--webhook", "a readable file", f"{webhook[1:]} ({error})") from error


def _policy(name: str | None) -> Policy:
    if name is None:
        raise invalid("--write-policy", "--policy beside it (what the server runs)", "none")
    found = Policy.from_preset(name) if name in presets() else Policy.load(name)
    if any(override.bits != 16 for override in found.overrides):
        raise UnsupportedError(f"--policy {name}: engines hold no policy with bits that differ between layers")
    return found
