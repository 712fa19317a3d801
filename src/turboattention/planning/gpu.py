"""What is publicly known of a card, read from an editable table."""

import math
import tomllib
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from turboattention.errors import invalid
from turboattention.files import DOCUMENT, read_bytes
from turboattention.typed import is_a

KERNELS_FROM = 8.0  # compute capability of the first cards that read compressed pages
FP8_FROM = 8.9


@dataclass(frozen=True)
class Gpu:
    """A row of the table; units as in ``gpus.toml``.

    capability: CUDA's, 0 for a CPU. dense_tflops, price_per_hour, link_gbs: None where not known.
    """

    name: str
    title: str
    memory_mib: float
    bandwidth_gbs: float
    power_w: float
    capability: float
    source: str
    dense_tflops: float | None = None
    link_gbs: float | None = None
    price_per_hour: float | None = None
    price_source: str = ""

    @property
    def memory_bytes(self) -> float:
        return self.memory_mib * 2**20

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gbs * 1e9


_TEXTS = ("title", "source", "price_source")
_MAY_BE_ZERO = ("capability", "price_per_hour")


def load_gpus(path: Path | None = None) -> dict[str, Gpu]:
    """Cards by name, from the package's table or from a file like it.

    Raises InvalidInputError for a file that cannot be read, unknown or missing keys, and numbers that are not positive.
    """
    if path is None:
        content = (files("turboattention.planning") / "gpus.toml").read_bytes()
    else:
        content = read_bytes("GPU file", path, DOCUMENT, "a readable TOML table")
    try:
        table = tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise invalid("GPU file", "a readable TOML table", f"{path} ({error})") from error
    if not table:
        raise invalid("GPU file", "at least one card", f"{path} without any")
    return {name: _gpu(name, row) for name, row in table.items()}


def _gpu(name: str, row: Any) -> Gpu:
    known = {f.name: f for f in fields(Gpu) if f.name != "name"}
    needed = {key for key, f in known.items() if f.default is MISSING}
    if not isinstance(row, dict) or needed - set(row) or set(row) - set(known):
        wanted = ", ".join(sorted(needed)) + "; " + ", ".join(sorted(set(known) - needed)) + " may be left out"
        raise invalid(f"GPU {name}", f"the keys {wanted}", ", ".join(row) if isinstance(row, dict) else repr(row))
    for key, value in row.items():
        if key in _TEXTS:
            if not isinstance(value, str):
                raise invalid(f"GPU {name}: {key}", "text", repr(value))
            continue
        number = is_a(value, float) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
            raise invalid(f"GPU {name}: {key}", "a positive number", repr(value))
    return Gpu(name, **row)


def find_gpu(name: str, table: dict[str, Gpu]) -> Gpu:
    """A card by its name, whatever its case; raises InvalidInputError that lists the names."""
    for known, gpu in table.items():
        if known.lower() == name.lower():
            return gpu
    raise invalid("GPU", f"one of {', '.join(table)}", repr(name), "or a file with its row: --gpus FILE")
