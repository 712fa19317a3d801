"""Compile kernels for every supported GPU on a machine without one, and count what the compiler made.

Runs as a program of its own, because the tests run kernels in Triton's interpreter, which can't compile:

    python tests/ops/compile_kernels.py MODULE [PART]   # prints one JSON row for each variant and target of MODULE

MODULE is a path like ``tests/ops/decode_variants.py`` that defines ``VARIANTS``, a list of `Variant`; with PART only
those whose name contains it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

NVIDIA = (80, 86, 89, 90, 100, 120)
AMD = ("gfx90a", "gfx942")
TARGETS = (*(f"sm_{arch}" for arch in NVIDIA), *AMD)


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel.

    kernel: a ``triton.jit`` or ``gluon.jit`` function. types: of the run-time arguments by name (``*fp16``, ``i32``);
    pointers count as aligned to 16 bytes, unless in ``unaligned``, and numbers in ``multiples`` as multiples of 16.
    constants: values of the ``constexpr`` arguments.
    targets: names from TARGETS. note: what a test wants to find in the row.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[str, ...] = TARGETS
    options: Mapping[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    multiples: tuple[str, ...] = ()
    note: Mapping[str, Any] = field(default_factory=dict)


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
        if name in variant.multiples or (kind.startswith("*") and name not in variant.unaligned)
    }
    source = source_type(variant.kernel, signature, dict(variant.constants), aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    return triton.compile(source, target=gpu_target(target), options=options)


def describe(variant: Variant, target: str) -> dict[str, Any]:
    """Spills, instructions of the whole kernel and of its hottest loop, by mnemonic."""
    compiled = compile_variant(variant, target)
    row: dict[str, Any] = {"name": variant.name, "target": target, "shared": compiled.metadata.shared, **variant.note}
    row["lanes"] = variant.num_warps * (32 if target.startswith("sm_") else 64)
    if target.startswith("sm_"):
        code = nvidia_instructions(disassemble(compiled.asm["cubin"]))
        row["spills"] = sum(1 for i in code if i.mnemonic.startswith(("LDL", "STL")))
    else:
        text = compiled.asm["amdgcn"]
        code = amd_instructions(text)
        row["spills"] = int(re.search(r"\.private_segment_fixed_size: (\d+)", text)[1])  # type: ignore[index]
    loop = hottest_loop(code)
    row["instructions"] = len(code)
    row["mnemonics"] = Counter(i.mnemonic.split(".")[0] for i in code)
    row["loop_instructions"] = len(loop)
    row["loop_mnemonics"] = Counter(i.mnemonic.split(".")[0] for i in loop)
    row["loop_spills"] = sum(1 for i in loop if i.mnemonic.startswith(("LDL", "STL", "scratch_")))
    return row


class Instruction(NamedTuple):
    """One instruction; target: the index of the one that it may branch to, or -1."""

    mnemonic: str
    target: int


def disassemble(cubin: bytes) -> str:
    """The listing of the disassembler that ships with Triton (Triton's own listing ends after 4,096 instructions)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def nvidia_instructions(text: str) -> list[Instruction]:
    """Instructions of a listing, one every 16 bytes."""
    out: list[Instruction] = []
    for line in text.splitlines():
        found = re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", line)
        if found is None:
            continue
        target = re.search(r"0x([0-9a-f]+)", found[3]) if found[2].startswith("BRA") else None
        out.append(Instruction(found[2], int(target[1], 16) // 16 if target else -1))
    return out


def amd_instructions(text: str) -> list[Instruction]:
    """Instructions of an AMD listing."""
    found: list[tuple[str, str]] = []
    where: dict[str, int] = {}
    for line in text.splitlines():
        stripped = line.split(";")[0].strip()
        if label := re.match(r"^(\.?L[\w$]*):", stripped):
            where[label[1]] = len(found)
        elif re.match(r"^[vs]_|^ds_|^buffer_|^global_|^flat_|^scratch_", stripped):
            mnemonic, _, operands = stripped.partition(" ")
            found.append((mnemonic, operands.strip()))
    branches = ("s_cbranch", "s_branch")
    return [Instruction(op, where.get(args, -1) if op.startswith(branches) else -1) for op, args in found]


MATRIX = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "v_mfma")


def hottest_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most matrix instructions (the most instructions where none has any)."""
    loops = [(i.target, index) for index, i in enumerate(code) if 0 <= i.target <= index]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [code[first : last + 1] for first, last in inner]
    return max(bodies, key=lambda body: (sum(i.mnemonic.startswith(MATRIX) for i in body), len(body)), default=[])


def rows_of(module: Path) -> list[dict[str, Any]]:
    """What `describe` says of every variant in a module, from a fresh process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__)), str(module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def variants_of(path: str) -> list[Variant]:
    """``VARIANTS`` of a module given by its path."""
    sys.path.insert(0, str(Path(__file__).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    variants: list[Variant] = module.VARIANTS
    return variants


def described(task: tuple[str, int, str]) -> str:
    """The JSON row of one variant and target, in a process of the pool."""
    path, index, target = task
    return json.dumps(describe(variants_of(path)[index], target))


def main(path: str, part: str = "") -> None:
    # The module that defines Variant must be one and the same in the pool's processes and in `path`.
    sys.modules["compile_kernels"] = sys.modules["__main__"]
    chosen = [(i, variant) for i, variant in enumerate(variants_of(path)) if part in variant.name]
    tasks = [(path, i, target) for i, variant in chosen for target in variant.targets]
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(described, tasks):
            print(row, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
