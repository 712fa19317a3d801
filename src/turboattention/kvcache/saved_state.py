"""A saved state of a contiguous cache, looked at before anything of it is believed: kernels trust what a cache holds.

Everything that a kernel takes for an offset or a size is checked (shapes, dtypes, numbers of pages, indices of refined
channels), and that no number is NaN or infinite. What the codes say can't be checked: see `integrity`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboattention.checks import FLOAT_DTYPES
from turboattention.config import CacheConfig, TensorFormat, with_bits
from turboattention.errors import invalid
from turboattention.ops.common.cached_kv import HeadGroup
from turboattention.quant.layout import PageLayout

LARGEST = 2**31 - 1  # tokens and padding are int32 in kernels
SAME_POLICY = "use the same policy"
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class SavedState:
    """What `LayerCache.state` returned, checked. open: dtype and tensors of the open page."""

    page_count: int
    latest: int
    groups: list[HeadGroup]
    open: tuple[torch.dtype, dict[str, Tensor]] | None
    sink_key: Tensor | None
    sink_value: Tensor | None
    starts: Tensor | None
    query_power: Tensor | None
    checksums: list[Tensor]


KEYS = ("page_count", "latest", "groups", "open", "sink_key", "sink_value", "starts", "query_power")


def read_state(state: Any, config: CacheConfig, formats: Sequence[tuple[TensorFormat, TensorFormat]]) -> SavedState:
    """The state of a cache with this configuration; raises InvalidInputError, with the place, for any other."""
    data = _object("state", state, KEYS, ("checksums",))
    count, latest = (_number(f"state.{name}", data[name]) for name in ("page_count", "latest"))
    starts, power = data["starts"], data["query_power"]
    heads = len(formats)
    if data["open"] is None:
        batch = dim = None
        for name in ("sink_key", "sink_value"):
            _equal(f"state.{name}", data[name], None, "no tokens")
        _equal("state.page_count", count, 0, "no tokens")
        opened = None
    else:
        opened = _open_page(data["open"], config, formats)
        batch, _, tokens, dim = opened[1]["key"].shape
        tokens += opened[1]["key_codes"].shape[2] if "key_codes" in opened[1] else 0
        if count * config.page_size + tokens > LARGEST:
            raise invalid("state", f"at most {LARGEST} tokens", count * config.page_size + tokens)
        _sinks(data, config, (batch, heads, config.sink_tokens, dim), opened, count)
    groups = _groups(data["groups"], config, formats, batch, dim, count)
    if starts is not None:
        _tensor("state.starts", starts, (batch,), (torch.int64,))
        _within("state.starts", starts, 0, LARGEST)
    if power is not None:
        _tensor("state.query_power", power, (batch, heads, dim), (torch.float32,))
        _within("state.query_power", power, 0.0, float(torch.finfo(torch.float32).max))
    sums = _list("state.checksums", data.get("checksums", []))
    if sums:
        _equal("state.checksums", len(sums), len(groups), "as many as groups")
    for i, (x, group) in enumerate(zip(sums, groups, strict=bool(sums))):
        _tensor(f"state.checksums[{i}]", x, tuple(group.pages.shape[:3]), (torch.int64,))
    _one_device([*(g.pages for g in groups), *sums, *(opened[1].values() if opened else ()), data["sink_key"],
                 data["sink_value"], starts, power])  # fmt: skip
    return SavedState(count, latest, groups, opened, data["sink_key"], data["sink_value"], starts, power, sums)


def _open_page(
    state: Any, config: CacheConfig, formats: Sequence[tuple[TensorFormat, TensorFormat]]
) -> tuple[torch.dtype, dict[str, Tensor]]:
    data = _object("state.open", state, ("dtype", "tensors"))
    dtype = data["dtype"]
    compresses = any(fmt.bits < 16 for pair in formats for fmt in pair)
    known = FLOAT_DTYPES if not compresses else (torch.float16, torch.bfloat16)
    if not isinstance(dtype, torch.dtype) or dtype not in known:
        raise invalid("state.open.dtype", f"one of {', '.join(map(str, known))}", _short(dtype), SAME_POLICY)
    clamped = config.open_page == "int8_clamped"
    scales, codes = ("key_scale", "value_scale"), ("key_codes", "value_codes")
    tensors = _object("state.open.tensors", data["tensors"], ("key", "value", *(scales if clamped else ())),
                      codes if clamped else ())  # fmt: skip
    heads = len(formats)
    key = _tensor("state.open.tensors.key", tensors["key"], (None, heads, None, None), (dtype,))
    batch, _, tokens, dim = key.shape
    if not batch or not dim:
        raise invalid("state.open.tensors.key", "at least 1 row and 1 channel", f"shape {tuple(key.shape)}")
    _tensor("state.open.tensors.value", tensors["value"], (batch, heads, tokens, dim), (dtype,))
    for name in scales if clamped else ():
        _tensor(f"state.open.tensors.{name}", tensors[name], (batch, heads, 1, 1), (torch.float16,))
    settled = None
    for name in codes:
        if (name in tensors) != (codes[0] in tensors):
            raise invalid("state.open.tensors", "codes of both K and V or of neither", sorted(tensors))
        if name in tensors:
            x = _tensor(f"state.open.tensors.{name}", tensors[name], (batch, heads, settled, dim), (torch.int8,))
            settled = x.shape[2]
    for name in ("key", "value", *(scales if clamped else ())):
        _within(f"state.open.tensors.{name}", tensors[name])
    return dtype, dict(tensors)


def _sinks(
    data: dict[str, Any], config: CacheConfig, shape: Shape, opened: tuple[torch.dtype, dict[str, Tensor]], count: int
) -> None:
    """Both or neither; where there are pages there are sinks."""
    dtype = torch.float32 if config.open_page == "int8_clamped" else opened[0]
    wanted = bool(config.sink_tokens and count)
    for name in ("sink_key", "sink_value"):
        x = data[name]
        if wanted and x is None:
            raise invalid(f"state.{name}", f"{config.sink_tokens} sinks beside {count} pages", None, SAME_POLICY)
        if x is not None:
            _tensor(f"state.{name}", x, shape, (dtype,))
            _within(f"state.{name}", x)
    if (data["sink_key"] is None) != (data["sink_value"] is None):
        raise invalid("state.sink_value", "sinks of both K and V or of neither", "one of them")


def _groups(
    state: Any, config: CacheConfig, formats: Sequence[tuple[TensorFormat, TensorFormat]], batch: int | None,
    dim: int | None, count: int,
) -> list[HeadGroup]:  # fmt: skip
    groups: list[HeadGroup] = []
    seen: list[int] = []
    for i, saved in enumerate(_list("state.groups", state)):
        where = f"state.groups[{i}]"
        data = _object(where, saved, ("key_bits", "value_bits", "heads", "pages"))
        heads = tuple(_number(f"{where}.heads", h, len(formats) - 1) for h in _list(f"{where}.heads", data["heads"]))
        if not heads or batch is None or dim is None:
            raise invalid(where, "heads, and tokens beside the pages", "none")
        pair: list[TensorFormat] = []
        for side, fmt in zip(("key", "value"), formats[heads[0]], strict=True):
            known = {fmt.bits, config.low_bits} if config.low_priority_heads else {fmt.bits}
            bits = data[f"{side}_bits"]
            if type(bits) is not int or bits not in known:
                expected = " or ".join(map(str, sorted(known)))
                raise invalid(f"{where}.{side}_bits", expected, _short(bits), SAME_POLICY)
            pair.append(with_bits(fmt, bits))
        layout = PageLayout(config.page_size, dim, pair[0], pair[1])
        pages = _tensor(f"{where}.pages", data["pages"], (batch, len(heads), count, layout.nbytes), (torch.uint8,))
        _page_numbers(f"{where}.pages", layout, pages)
        groups.append(HeadGroup(layout, heads, pages))
        seen += heads
    if (seen or count) and sorted(seen) != list(range(len(formats))):
        raise invalid("state.groups", f"each of {len(formats)} heads in one group", f"heads {seen}"[:80])
    return groups


def _page_numbers(where: str, layout: PageLayout, pages: Tensor) -> None:
    """Refined channels that are channels (kernels read Q and scales there), and float16 that are numbers."""
    for name, region in layout.regions.items():
        if name.endswith("refined_index"):
            _within(f"{where}: {name}", layout.read(pages, name), 0, layout.head_dim - 1)
        elif region.dtype == torch.float16:
            _within(f"{where}: {name}", layout.read(pages, name))


def _object(where: str, value: Any, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(where, "an object", _short(value))
    names = {name for name in value if isinstance(name, str)}
    if len(names) < len(value) or names - {*needed, *optional} or {*needed} - names:
        raise invalid(where, f"the names {', '.join(needed)}", ", ".join(sorted(names))[:80], SAME_POLICY)
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise invalid(where, "a list", _short(value))
    return list(value)


def _number(where: str, value: Any, most: int = LARGEST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise invalid(where, f"a whole number from 0 to {most}", _short(value))
    return value


def _equal(where: str, value: Any, expected: object, why: str) -> None:
    if value is not expected and (isinstance(value, Tensor) or value != expected):
        raise invalid(where, f"{expected} ({why})", _short(value))


def _tensor(where: str, x: Any, shape: Shape, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """``x`` if it has this shape (None: any size) and one of the dtypes, and memory for all of its elements."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.device.type == "meta":
        raise invalid(where, "a tensor", _short(x))
    fits = x.dim() == len(shape) and all(b is None or a == b for a, b in zip(x.shape, shape, strict=True))
    if x.dtype not in dtypes or not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise invalid(where, f"{kinds} [{sizes}]", f"{x.dtype} {list(x.shape)}", SAME_POLICY)
    # A file may claim any size for a few bytes, with strides of 0; a copy of that would take all memory.
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise invalid(where, f"memory for shape {tuple(x.shape)}", f"{x.untyped_storage().nbytes()} bytes")
    return x


def _within(where: str, x: Tensor, low: float = -torch.inf, high: float = torch.inf) -> None:
    """Raise unless all of ``x`` are finite numbers from ``low`` to ``high``."""
    if not x.numel():
        return
    least, most = (n.item() for n in x.aminmax())  # NaN where there is one
    if not (least >= low and most <= high and abs(least) < torch.inf and abs(most) < torch.inf):
        wanted = "finite numbers" if low == -torch.inf else f"numbers from {low} to {high}"
        raise invalid(where, wanted, f"{least} to {most}", "the state is damaged")


def _one_device(tensors: Sequence[Tensor | None]) -> None:
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        raise invalid("state", "tensors of one device", ", ".join(sorted(devices)))


def _short(value: object) -> str:
    """What was received, in a few characters."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a larger number"
    return (
        repr(value)[:80] if isinstance(value, str | float | bool | None) else f"a value of type {type(value).__name__}"
    )
