"""Compile kernels for every supported GPU on a machine without one, and count what the compiler made.

Runs as a program of its own, because the tests run kernels in Triton's interpreter, which can't compile:

    python tests/ops/compile_kernels.py MODULE        # prints one JSON row for each variant and target of MODULE

MODULE is a path like ``tests/ops/decode_variants.py`` that defines ``VARIANTS``, a list of `Variant`.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NVIDIA = (80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942")
TARGETS = (*(f"sm_{arch}" for arch in NVIDIA), *AMD)


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel.

    kernel: a ``triton.jit`` or ``gluon.jit`` function. types: of the run-time arguments by name (``*fp16``, ``i32``);
    pointers count as aligned to 16 bytes. constants: values of the ``constexpr`` arguments. targets: names from TARGETS.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[str, ...] = TARGETS
    options: Mapping[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()  # pointers and integers that are not known to be multiples of 16


def gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def compile_variant(variant: Variant, target: str) -> Any:
    """The compiled kernel; raises what the compiler raises."""
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    source_type = GluonASTSource if isinstance(variant.kernel, GluonJITFunction) else ASTSource
    names = variant.kernel.arg_names
    missing = set(names) - set(variant.types) - set(variant.constants)
    if missing:
        raise ValueError(f"{variant.name}: no type or constant for {sorted(missing)}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.types.items()
        if kind.startswith("*") and name not in variant.unaligned
    }
    source = source_type(variant.kernel, signature, dict(variant.constants), aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    return triton.compile(source, target=gpu_target(target), options=options)


def describe(variant: Variant, target: str) -> dict[str, Any]:
    """Spills, instructions of the whole kernel and of its hottest loop, by mnemonic."""
    compiled = compile_variant(variant, target)
    row: dict[str, Any] = {"name": variant.name, "target": target, "shared": compiled.metadata.shared}
    if target.startswith("sm_"):
        text = compiled.asm["sass"]
        code = nvidia_instructions(text)
        row["spills"] = sum(1 for _, op, _ in code if op.startswith(("LDL", "STL")))
        row["registers"] = None
    else:
        text = compiled.asm["amdgcn"]
        code = amd_instructions(text)
        row["spills"] = int(re.search(r"\.private_segment_fixed_size: (\d+)", text)[1])  # type: ignore[index]
    loop = hottest_loop(code)
    row["instructions"] = len(code)
    row["mnemonics"] = Counter(op.split(".")[0] for _, op, _ in code)
    row["loop_instructions"] = len(loop)
    row["loop_mnemonics"] = Counter(op.split(".")[0] for _, op, _ in loop)
    row["loop_spills"] = sum(1 for _, op, _ in loop if op.startswith(("LDL", "STL", "scratch_")))
    return row


Instruction = tuple[str, str, str]  # label before it or "", mnemonic, operands


def nvidia_instructions(text: str) -> list[Instruction]:
    """Instructions of Triton's SASS listing, labels attached to the instruction that follows."""
    out: list[Instruction] = []
    label = ""
    for line in text.splitlines():
        if line.rstrip().endswith(":") and "\t" not in line:
            label = line.strip()[:-1]
            continue
        if "\t" not in line:
            continue
        words = line.split("\t", 1)[1].split(None, 1)
        if words and words[0].startswith("@"):
            words = words[1].split(None, 1) if len(words) > 1 else words
        if words:
            out.append((label, words[0].rstrip(";"), words[1] if len(words) > 1 else ""))
            label = ""
    return out


def amd_instructions(text: str) -> list[Instruction]:
    """Instructions of an AMD listing."""
    out: list[Instruction] = []
    label = ""
    for line in text.splitlines():
        stripped = line.split(";")[0].strip()
        if re.match(r"^\.?L[\w$]*:", stripped):
            label = stripped.split(":")[0]
        elif re.match(r"^[vs]_|^ds_|^buffer_|^global_|^flat_|^scratch_", stripped):
            words = stripped.split(None, 1)
            out.append((label, words[0], words[1] if len(words) > 1 else ""))
            label = ""
    return out


MATRIX = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "v_mfma")


def hottest_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most matrix instructions (the most instructions where none has any)."""
    where = {label: index for index, (label, _, _) in enumerate(code) if label}
    loops = []
    for index, (_, op, operands) in enumerate(code):
        if not op.startswith(("BRA", "s_cbranch", "s_branch")):
            continue
        for name in re.findall(r"\.?L[\w$#]+", operands):
            if where.get(name, index + 1) <= index:
                loops.append((where[name], index))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [code[first : last + 1] for first, last in inner]
    return max(bodies, key=lambda body: (sum(i[1].startswith(MATRIX) for i in body), len(body)), default=[])


def rows_of(module: Path) -> list[dict[str, Any]]:
    """What `describe` says of every variant in a module, from a fresh process without the interpreter."""
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__)), str(module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(path: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variant in module.VARIANTS:
        for target in variant.targets:
            print(json.dumps(describe(variant, target)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
