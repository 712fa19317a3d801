"""Load a causal language model by a known name, a local path or a hub name."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turboattention.errors import InvalidInputError, MissingDependencyError, TurboAttentionError, invalid
from turboattention.integrations.converted_models import check_weights, converted_copy, read_gguf
from turboattention.integrations.packaged_models import DEFAULT_MODEL, PACKAGED_MODELS, default_cache_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    context_length: most tokens of a sequence that the model was made for.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    context_length: int


def load_model(
    name_or_path: str | Path = DEFAULT_MODEL,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cache_directory: Path | None = None,
) -> LoadedModel:
    """Load a model with transformers.

    name_or_path: a name in ``PACKAGED_MODELS``, a folder or GGUF file on this machine, or a hub name ``owner/name``.
    cache_directory: where converted copies of packaged models are kept; default ``~/.cache/turboattention``.
    """
    _require_transformers()
    name = str(name_or_path)
    cache = default_cache_directory() if cache_directory is None else cache_directory
    with quiet():
        try:
            model, tokenizer = _read(name, cache, dtype)
            model = model.to(torch.device(device)).eval()
        except TurboAttentionError:
            raise
        # Whatever transformers and the file formats raise for an unreadable model becomes one line.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidInputError(f"model: cannot load {name!r}: {reason}") from error
    return LoadedModel(model, tokenizer, name, _context_length(model))


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "models need the package transformers; install with: pip install 'turboattention[transformers]'"
        ) from error


def _read(name: str, cache_directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokeniser from wherever ``name`` points to."""
    if name in PACKAGED_MODELS:
        return _from_pretrained(str(converted_copy(PACKAGED_MODELS[name], cache_directory)), dtype)
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return read_gguf(path, dtype)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise _unknown(name, "a folder without config.json")
        return _from_pretrained(name, dtype)
    if not _HUB_NAME.fullmatch(name):
        raise _unknown(name)
    return _from_pretrained(name, dtype, local_files_only=_is_downloaded(name))


def _is_downloaded(name: str) -> bool:
    """Whether the hub's files are on this machine; when not, the hub is asked once, with a short time limit."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    # The client's network library decides the types of these errors, and they differ between versions.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _unknown(name, f"the hub says: {reason}") from error
    return False


def _unknown(name: str, reason: str = "") -> InvalidInputError:
    known = ", ".join(PACKAGED_MODELS)
    received = f"{name!r} ({reason})" if reason else repr(name)
    return invalid("model", f"one of {known}, a path or a hub name that can be reached", received)


def _from_pretrained(location: str, dtype: torch.dtype, local_files_only: bool = True) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # trust_remote_code is named because transformers otherwise asks at the terminal; weights in pickle are not read.
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local_files_only}
    tokenizer = AutoTokenizer.from_pretrained(location, **options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        location, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
    )
    model, info = loaded
    check_weights(location, info)
    return model, tokenizer


def _context_length(model: "PreTrainedModel") -> int:
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else 2**31 - 1


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and log lines, which would tear a table or a bar of ours."""
    from transformers.utils import logging as library

    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
