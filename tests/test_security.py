"""What no module may do: run content of a file as code, or hand a text to a shell; by the syntax trees of src."""

import ast
import re
from pathlib import Path

import pytest

import turboattention

SOURCE = Path(turboattention.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "ruamel",
           "code", "codeop", "telnetlib", "xmlrpc", "pty"}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__", "input"}
CALLS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.jit.load", "torch.hub.load",
    "tempfile.mktemp", "numpy.load", "np.load", "numpy.fromfile", "runpy.run_path", "runpy.run_module", "torch.save",
    "shutil.unpack_archive", "tarfile.open",
}  # fmt: skip
# torch.compile makes a function faster; `importlib.import_module` takes fixed names alone, see below.
IMPORTED_BY_NAME = {"__init__.py", "integrations/vllm/plugin.py"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of names, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def faults(tree: ast.AST, file: str) -> list[str]:
    """Lines of a module that are refused, with what is wrong."""
    found = []
    for node in ast.walk(tree):
        wrong = ""
        if isinstance(node, ast.Import):
            wrong = next((x.name for x in node.names if x.name.partition(".")[0] in MODULES), "")
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{x.name}" for x in node.names}
            wrong = next(iter({(node.module or "").partition(".")[0]} & MODULES | names & CALLS), "")
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            options = {x.arg: x.value for x in node.keywords}
            if name in BUILTINS | CALLS:
                wrong = name
            elif name == "torch.load" and not is_constant(options.get("weights_only"), True):
                wrong = "torch.load without weights_only=True"
            elif any(not is_constant(options[x], False) for x in ("shell", "trust_remote_code") if x in options):
                wrong = "shell or trust_remote_code"
            elif name.endswith("import_module") and file not in IMPORTED_BY_NAME:
                wrong = "import_module"
        elif isinstance(node, ast.Dict):  # options of a call that are given as **options
            pairs = [(x.value, y) for x, y in zip(node.keys, node.values, strict=True) if isinstance(x, ast.Constant)]
            wrong = next(
                (str(x) for x, y in pairs if x in ("shell", "trust_remote_code") and not is_constant(y, False)), ""
            )
        if wrong:
            found.append(f"{file}:{getattr(node, 'lineno', '?')}: {wrong}")
    return found


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_of_a_file_is_run() -> None:
    found, modules = [], 0
    for path in sorted(SOURCE.rglob("*.py")):
        found += faults(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(SOURCE).as_posix())
        modules += 1
    assert modules > 150
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import yaml", "eval('1')", "exec(text)", "os.system(x)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=x)", "np.load(x)",
        "subprocess.run(x, shell=True)", "subprocess.run(x, shell=y)", "f(trust_remote_code=True)",
        "from os import system", "torch.save(x, y)",
        "o = {'trust_remote_code': yes}", "importlib.import_module(name)", "__import__(name)", "import os, marshal",
    ],
)  # fmt: skip
def test_the_check_sees(line: str) -> None:
    assert len(faults(ast.parse(line), "x.py")) == 1


def test_what_the_check_lets_through() -> None:
    lines = (
        "model.eval()",
        "torch.compile(f)",
        "torch.load(p, weights_only=True)",
        "f(**{'trust_remote_code': False})",
    )
    assert faults(ast.parse("\n".join((*lines, "re.compile(x)"))), "x.py") == []


def test_names_of_imports_are_constants() -> None:
    """Where modules are imported by name, no name comes from outside."""
    for file in IMPORTED_BY_NAME:
        tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
        calls = [x for x in ast.walk(tree) if isinstance(x, ast.Call) and dotted(x.func).endswith("import_module")]
        assert calls
        for call in calls:
            constant = isinstance(call.args[0], ast.Constant)
            table = isinstance(call.args[0], ast.Subscript) and dotted(call.args[0].value) == "_LAZY"
            assert constant or table, f"{file}:{call.lineno}"


def locked(name: str) -> list[str]:
    """The requirements of a lock, without comments."""
    text = (Path(__file__).parents[1] / "requirements" / name).read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and line != "-r demo.txt"]


def test_locks_pin_exact_versions() -> None:
    pinned = [line for name in ("demo.txt", "test.txt", "newest.txt") for line in locked(name)]
    assert len(pinned) > 70
    assert [line for line in pinned if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", line)] == []


def test_the_lock_with_hashes_has_the_same_versions() -> None:
    def names(lines: list[str]) -> set[str]:
        return {line.partition(" ")[0].lower().replace("_", "-") for line in lines}

    hashed, form = locked("hashed-cpu.txt"), r"[^ ]+==[0-9][0-9A-Za-z.]* --hash=sha256:[0-9a-f]{64}"
    assert names(hashed) == names(locked("demo.txt") + locked("test.txt"))
    assert [line for line in hashed if not re.fullmatch(form, line)] == []


def test_model_folders_without_safetensors_are_refused(tmp_path: Path) -> None:
    """Weights in pickle are not read, even where a model has no others."""
    import json

    import torch
    from tiny import character_tokenizer, tiny_llama

    from turboattention.errors import InvalidInputError
    from turboattention.integrations.models import load_model

    model = tiny_llama(heads=4, kv_heads=2)
    model.config.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInputError, match="safetensors"):
        load_model(tmp_path)
    model.save_pretrained(tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a model was run')\nclass Evil: ...\n")
    assert load_model(tmp_path).model is not None
