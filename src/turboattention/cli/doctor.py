"""``turboattention doctor``: what this machine can run, which implementations are chosen, and a self-test."""

import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from turboattention.cli.options import JsonOption, check_outputs, to_json
from turboattention.cli.requirements import INSTALL
from turboattention.cli.selftest import self_test
from turboattention.cpu.library import instruction_set, without_library
from turboattention.files import write_atomic
from turboattention.ops import implementations
from turboattention.report.figures import small

OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 17), (5, 23)
OLDEST_GPU = (8, 0)
SELF_TEST_FAILED = 1


def doctor(json_path: JsonOption = None) -> None:
    """Show what this machine can run and why, and test it. Exit status 1 when the self-test fails."""
    check_outputs(json_path)
    checks = self_test()
    passed = all(check.passed for check in checks)
    report = {
        "schema": 1,
        "environment": _environment(),
        "operators": [{"name": n, "implementation": i, "reason": why} for n, (i, why) in implementations().items()],
        "self_test": [{**asdict(check), "passed": check.passed} for check in checks],
        "passed": passed,
    }
    if json_path:
        write_atomic(json_path, to_json(report))
    _show(report)
    if not passed:
        raise typer.Exit(SELF_TEST_FAILED)


def _environment() -> list[dict[str, str]]:
    rows = [
        ("python", platform.python_version(), "3.11 or later is supported"),
        ("torch", str(torch.__version__), f"{torch.get_num_threads()} threads"),
        ("CPU kernels", *_cpu_kernels()),
        ("transformers", _version("transformers"), _transformers()),
        ("triton", _version("triton"), _triton()),
        ("vllm", _version("vllm"), "this version has no vLLM backend"),
        ("CUDA", _gpu(), "--device cuda runs the model and the PyTorch operators there" if _gpu() != "none" else ""),
    ]
    rows += [(name, _version(name), _for(name)) for name in ("jinja2", "matplotlib", "gguf", "accelerate")]
    return [{"name": name, "version": version, "note": note} for name, version, note in rows]


def _cpu_kernels() -> tuple[str, str]:
    missing = without_library()
    if missing:
        return "not built", missing
    return "built", f"{instruction_set()}; chosen for this processor"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _transformers() -> str:
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    installed = _version("transformers")
    numbers = installed.split(".")[:2]
    if not all(number.isdigit() for number in numbers):
        return f"needed for models ({oldest} to {newest}): {INSTALL}"
    inside = OLDEST_TRANSFORMERS <= tuple(map(int, numbers)) <= NEWEST_TRANSFORMERS
    return f"{'in' if inside else 'OUTSIDE'} the supported range {oldest} to {newest}"


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _for(package: str) -> str:
    purpose = "for HTML pages" if package in ("jinja2", "matplotlib") else "for models in GGUF files"
    return purpose if _version(package) != "not installed" else f"{purpose}: {INSTALL}"


def _triton() -> str:
    """What Triton is good for here: its kernels are compiled at first use, for the GPU that is there."""
    if _gpu() == "none":
        return "kernels need a GPU; PyTorch saw none"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_GPU:
        return "kernels need compute capability 8.0 (Ampere) or later; this GPU runs the PyTorch operators"
    if _version("triton") == "not installed":
        return "the kernels are written in it: pip install 'turboattention[triton]'"
    return "compiles the kernels at their first use"


def _show(report: dict[str, Any]) -> None:
    console = Console()
    for title, columns in (
        ("environment", ("name", "version", "note")),
        ("operators", ("name", "implementation", "reason")),
    ):
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in report[title]:
            table.add_row(*(row[column] for column in columns))
        console.print(table, markup=False)
    table = Table("self-test", "error", "limit", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for check in report["self_test"]:
        verdict = "ok" if check["passed"] else "FAILED"
        table.add_row(check["name"], small(check["error"]), small(check["limit"]), verdict)
    console.print(table)
    console.print("All self-tests passed." if report["passed"] else "FAILED: do not trust this installation.")
