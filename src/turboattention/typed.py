"""From parsed JSON to dataclasses, every value checked against its annotation."""

import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from turboattention.errors import invalid

T = TypeVar("T")


def build(kind: type[T], data: Any, where: str) -> T:
    """``kind`` (a dataclass, or a NamedTuple given as a list) of ``data``; raises InvalidInputError with the place.

    Keys must be fields, fields without a default must be there. A float takes whole numbers too, ``nan`` and ``inf`` as
    Python's JSON spells them; what reads a number says itself where those have no meaning.
    """
    found: T = _checked(kind, data, where)
    return found


def _checked(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin = get_origin(kind)
    if origin is Literal:
        return _plain(where, value, f"one of {', '.join(map(repr, get_args(kind)))}", _is_one_of(get_args(kind)))
    if origin in (Union, types.UnionType):
        wanted = [one for one in get_args(kind) if one is not type(None)]
        return None if value is None and len(wanted) < len(get_args(kind)) else _checked(wanted[0], value, where)
    if origin in (list, tuple):
        found = [_checked(get_args(kind)[0], x, f"{where}[{i}]") for i, x in enumerate(_list(where, value))]
        return origin(found)
    if origin is dict:
        items = _plain(where, value, "an object", lambda x: isinstance(x, dict)).items()
        return {key: _checked(get_args(kind)[1], x, f"{where}.{key}"[:80]) for key, x in items}
    if isinstance(kind, type) and issubclass(kind, tuple):
        return _named_tuple(kind, value, where)
    return _plain(where, value, f"a value of type {kind.__name__}", lambda x: is_a(x, kind))


def is_a(value: Any, kind: type) -> bool:
    """Whether a value of JSON is an int, float, bool or str, as its annotation says; True is no number."""
    if kind is float:
        return isinstance(value, float) or (is_a(value, int) and abs(value) < 2**1023)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _plain(where: str, value: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
    if not accepts(value):
        raise invalid(where, expected, short(value))
    return value


def _is_one_of(choices: tuple[Any, ...]) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def _list(where: str, value: Any) -> list[Any]:
    found: list[Any] = _plain(where, value, "a list", lambda x: isinstance(x, list | tuple))
    return found


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    data = _plain(where, value, "an object", lambda x: isinstance(x, dict))
    known = {f.name: f for f in fields(kind)}
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    for odd in (*(key for key in data if key not in known), *(name for name in needed if name not in data)):
        raise invalid(where, f"the keys {', '.join(known)}", f"{short(odd)} {'missing' if odd in known else 'too'}")
    hints = _hints(kind)
    return kind(**{name: _checked(hints[name], x, f"{where}.{name}") for name, x in data.items()})


def _named_tuple(kind: Any, value: Any, where: str) -> Any:
    hints, items = _hints(kind), _list(where, value)
    if len(items) != len(hints):
        raise invalid(where, f"the {len(hints)} values {', '.join(hints)}", f"{len(items)}")
    return kind(*(_checked(hint, x, f"{where}.{name}") for (name, hint), x in zip(hints.items(), items, strict=True)))


def short(value: Any) -> str:
    """For an error: at most 80 characters, however large or deep the value is."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:80]
