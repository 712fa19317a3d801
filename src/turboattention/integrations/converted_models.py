"""A GGUF file read by transformers once and kept as safetensors: reading GGUF takes up to a minute every time."""

import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from importlib import util
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from turboattention.errors import MissingDependencyError
from turboattention.integrations.packaged_models import PackagedModel, is_intact, packaged_gguf, sha256_of

_MANIFEST = "manifest.json"


def converted_copy(model: PackagedModel, cache_directory: Path) -> Path:
    """A folder that ``from_pretrained`` reads; made when there is none, or when a file of it is damaged."""
    target = cache_directory / f"{model.name}-{model.sha256[:12]}"
    if not is_complete(target):
        _convert(packaged_gguf(model, cache_directory), target)
    return target


def is_complete(folder: Path) -> bool:
    """Whether every file of ``folder`` has the size and sum that its manifest names."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all(is_intact(folder / name, **entry) for name, entry in manifest.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _convert(gguf: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name, suffix=".tmp"))
    try:
        _write_safetensors(gguf, temporary)
        _write_manifest(temporary)
        # A damaged copy goes; a whole one that another process made in the meantime stays.
        if not is_complete(target):
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokeniser of a GGUF file; MissingDependencyError without the packages that reading it needs."""
    missing = [package for package in ("gguf", "accelerate") if util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"GGUF weights: expected the packages gguf and accelerate, missing {' and '.join(missing)}; "
            f"install with: pip install {' '.join(missing)}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers draws a bar for GGUF files that its own switch for bars does not know.
    with redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    return model, tokenizer


def _write_safetensors(gguf: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    model, tokenizer = read_gguf(gguf, torch.bfloat16)
    # transformers 5.23 refuses save_pretrained on a GGUF model, so its parts are written one by one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {path.name: {"sha256": sha256_of(path), "size": path.stat().st_size} for path in files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
