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

from turboattention.errors import MissingDependencyError, invalid
from turboattention.files import DOCUMENT, read_json
from turboattention.integrations.gguf_header import check_gguf
from turboattention.integrations.packaged_models import PackagedModel, is_intact, packaged_gguf, sha256_of

_MANIFEST, _WEIGHTS = "manifest.json", "model.safetensors"


def converted_copy(model: PackagedModel, cache_directory: Path) -> Path:
    """A folder that ``from_pretrained`` reads; made when there is none, or when a file of it is damaged."""
    target = cache_directory / f"{model.name}-{model.sha256[:12]}"
    if not is_complete(target):
        _convert(packaged_gguf(model, cache_directory), target)
    return target


def is_complete(folder: Path) -> bool:
    """Whether every file of ``folder`` has the size and sum that its manifest names."""
    try:
        manifest = read_json("manifest", folder / _MANIFEST, DOCUMENT)
        # A name is that of a file of this folder: never a way out of it.
        plain = all(Path(name).name == name and set(entry) == {"sha256", "size"} for name, entry in manifest.items())
        whole = plain and {"config.json", _WEIGHTS} <= set(manifest)
        return whole and all(is_intact(folder / name, **entry) for name, entry in manifest.items())
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
    """Model and tokeniser of a GGUF file.

    Raises MissingDependencyError without the packages that reading it needs, InvalidInputError for a header that does
    not fit the file and for a file that lacks weights of the model.
    """
    missing = [package for package in ("gguf", "accelerate") if util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"GGUF weights: expected the packages gguf and accelerate, missing {' and '.join(missing)}; "
            f"install with: pip install {' '.join(missing)}"
        )
    check_gguf(gguf)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers draws a bar for GGUF files that its own switch for bars does not know.
    with redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=dtype, output_loading_info=True
        )
    model, info = loaded
    check_weights(str(gguf), info)
    return model, tokenizer


def check_weights(name: str, info: dict[str, Any]) -> None:
    """Raise unless every weight came from the file: transformers fills absent ones with random numbers, and only logs.

    info: what ``from_pretrained(output_loading_info=True)`` says.
    """
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise invalid(f"weights of {name}", "every tensor of the model", f"{len(absent)} absent, first {absent[0]}")


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
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {path.name: {"sha256": sha256_of(path), "size": path.stat().st_size} for path in files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
