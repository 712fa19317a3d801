"""Who imports what: the direction of calls, and `import turboattention` with torch alone and without side effects."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TORCH_ALONE = """
import sys
import torch

BLOCKED = {blocked}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked by the test: {{name}}", name=name)

for name in [m for m in sys.modules if m.partition(".")[0] in BLOCKED]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
before = set(sys.modules)
import turboattention
names = {{m.partition(".")[0] for m in set(sys.modules) - before}}
print(*sorted(names - {{"turboattention", "torch"}} - set(sys.stdlib_module_names)))
assert turboattention.__version__
"""

SIDE_EFFECTS = """
import os, sys, warnings
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    return {
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "mask functions": sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "random state": torch.get_rng_state().tolist(),
        "warning filters": list(warnings.filters),
        "path": list(sys.path),
    }

before = state()
import turboattention
after = state()
print(*[name for name in before if before[name] != after[name]])
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_direction_of_calls() -> None:
    pytest.importorskip("importlinter", reason="import-linter is not installed (extra 'dev')")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_imports_with_torch_alone() -> None:
    blocked = ["transformers", "triton", "vllm", "rich", "typer", "matplotlib", "numpy", "gguf", "safetensors"]
    assert run(TORCH_ALONE.format(blocked=blocked)) == ""


def test_import_leaves_no_trace() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'transformers')")
    assert run(SIDE_EFFECTS) == ""
