"""Builds the C++ kernels of `turboattention.cpu` into the wheel, or, without a compiler, leaves them out and says so.

The library has a plain C interface: it includes neither Python's nor PyTorch's headers and links neither, so that one
file serves every version of both. See docs/decisions/0006-cpu-kernels-are-an-optional-library.md.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("src/turboattention/cpu/kernels")
TARGET = Path("src/turboattention/cpu/_kernels.so")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
# Bytes of pages are judged bit by bit: no sum and product may be fused there.
EXACT = ["-ffp-contract=off"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8"]
Sets = Mapping[str, tuple[str, list[str]]]
# Of each instruction set: the macro that says it is there, and its flags. Plain C++ is always there.
SETS: Sets = {"avx2": ("TA_HAS_AVX2", AVX2), "avx512": ("TA_HAS_AVX512", AVX512), "amx": ("TA_HAS_AMX", AMX)}
# For tests where there is no AMX: tiles in plain C++ (kernels/tiles.hpp), the rest of those files for AVX2.
EMULATED = "-DTA_TILES_EMULATED"
EMULATED_SETS: Sets = {"avx2": SETS["avx2"], "amx": ("TA_HAS_AMX", AVX2)}
SECONDS = 600


class CpuKernels(BuildHookInterface):  # type: ignore[misc] # hatchling has no types
    """The hook that pyproject.toml names ``custom``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; on success the library joins the wheel, whose tag then names the platform."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        reason = build(root / SOURCES, root / TARGET)
        if reason:
            (root / TARGET).unlink(missing_ok=True)
            self.app.display_warning(f"CPU kernels left out, PyTorch will do their work: {reason}")
            return
        build_data["pure_python"] = False
        build_data["artifacts"].append(str(TARGET))
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"


def build(
    sources: Path, target: Path, extra: Sequence[str] = (), program: Path | None = None, sets: Sets = SETS
) -> str | None:
    """Compile ``sources`` into the shared library ``target``; None, or why that was not possible.

    extra: flags for every file and for the linker, for example those of a sanitizer. program: a source with ``main``;
    then ``target`` is a program. sets: the instruction sets besides plain C++, as `SETS`.
    """
    if sys.platform != "linux":
        return f"made for Linux, this is {sys.platform}"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler found (CXX, c++, g++ or clang++)"
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands([*compiler, *COMMON, *extra], sources, program, sets, Path(folder))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failures = [text for text in pool.map(_run, commands) if text]
        if failures:
            return failures[0]
        made = Path(folder) / target.name
        kind = [] if program else ["-shared"]
        objects = [command[-1] for command in commands]
        failure = _run([*compiler, *COMMON, *extra, *kind, *objects, "-o", str(made), "-pthread", "-ldl"])
        if failure:
            return failure
        # Renamed into place: a running process keeps the file that it has opened.
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy(made, beside)
        os.replace(beside, target)
    return None


def _commands(compiler: list[str], sources: Path, program: Path | None, sets: Sets, folder: Path) -> list[list[str]]:
    """One command for each file; those of an instruction set that the compiler does not know are left out."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    there = {name: chosen for name, chosen in sets.items() if x86 and _compiles(compiler, chosen[1], folder)}
    macros = [f"-D{macro}=1" for macro, _ in there.values()]
    commands = []
    for source in [*sorted(sources.glob("*.cpp")), *([program] if program else [])]:
        family = source.stem.rpartition("_")[2]
        if family in SETS and family not in there:
            continue
        own = [*(there[family][1] if family in there else []), *(EXACT if source.stem.startswith("append") else [])]
        place = ["-I", str(sources)] if source == program else []
        out = folder / f"{source.stem}.o"
        commands.append([*compiler, *own, *macros, *place, "-c", str(source), "-o", str(out)])
    return commands


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: CXX where it is set, as every build does, else the usual names."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def _compiles(compiler: list[str], flags: list[str], folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("#include <immintrin.h>\nint main() { return 0; }\n", encoding="utf-8")
    return _run([*compiler, *flags, "-c", str(probe), "-o", str(folder / "probe.o")]) is None


def _run(command: list[str]) -> str | None:
    """None, or the last words of a command that failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
    return f"{command[0]}: {errors[0] if errors else f'exit status {done.returncode}'}"
