"""Whether the header of a GGUF file is one: sizes and counts against the file before a library allocates by them.

The reader of the package gguf believes the counts of a file: an array of bytes that claims 2**60 items is read for
ever, past the end of the file, and which reader transformers uses differs between its versions. Here each count is
bounded by the bytes that are left. Nothing of the content is kept.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import BinaryIO

from turboattention.errors import invalid

_STRING, _ARRAY = 8, 9
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by GGUF type
_UNSIGNED = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}
_KEYS, _TENSORS, _ITEMS = 2**16, 2**20, 2**24  # most of a file; items: of all arrays together
_LONGEST_NAME = 2**16
_DIMENSIONS = 4
_MOST_ELEMENTS = 2**40  # of a tensor
_MOST_LAYERS = 4096
_LARGEST_WIDTH = 2**31


def check_gguf(path: Path) -> None:
    """Raise InvalidInputError, with the place, unless the header of ``path`` fits into the file."""
    try:
        with path.open("rb") as file:
            _Header(file, path).check()
    except OSError as error:
        raise invalid("GGUF file", "a readable file", f"{path} ({error.strerror})") from error


class _Header:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = path.stat().st_size
        self.items = 0
        self.keys: dict[str, int | None] = {}
        self.blocks: set[int] = set()

    def check(self) -> None:
        if self._take(4, "magic") != b"GGUF":
            raise self._wrong("magic", "GGUF", "something else")
        if (version := self._number("<I", "version")) not in (2, 3):
            raise self._wrong("version", "2 or 3, little-endian", version)
        tensors = self._count("tensors", _TENSORS)
        for _ in range(self._count("keys", _KEYS)):
            self._key()
        for _ in range(tensors):
            self._tensor()
        self._check_model()

    def _wrong(self, what: str, expected: str, received: object) -> Exception:
        return invalid(f"GGUF file {self.path}: {what}", expected, received, "the file may be damaged")

    def _take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise self._wrong(what, f"{size} bytes", f"{self.left} up to the end of the file")
        self.left -= size
        data = self.file.read(size)
        if len(data) != size:
            raise self._wrong(what, f"{size} bytes", len(data))
        return data

    def _number(self, form: str, what: str) -> int:
        found: int = struct.unpack(form, self._take(struct.calcsize(form), what))[0]
        return found

    def _count(self, what: str, most: int) -> int:
        count = self._number("<Q", f"number of {what}")
        if count > min(most, self.left):  # each takes at least one byte
            raise self._wrong(f"number of {what}", f"at most {min(most, self.left)}", count)
        return count

    def _skip(self, size: int, what: str) -> None:
        if size > self.left:
            raise self._wrong(what, f"{size} bytes", f"{self.left} up to the end of the file")
        self.left -= size
        self.file.seek(size, 1)

    def _name(self, what: str) -> str:
        size = self._number("<Q", what)
        if size > _LONGEST_NAME:
            raise self._wrong(what, f"at most {_LONGEST_NAME} bytes", size)
        try:
            return self._take(size, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(what, "UTF-8", error.reason) from None

    def _key(self) -> None:
        name = self._name("name of a key")
        if name in self.keys:
            raise self._wrong(f"key {name!r}"[:100], "once", "twice")
        kind = self._number("<I", f"type of {name!r}"[:100])
        if kind in _UNSIGNED:
            self.keys[name] = self._number(_UNSIGNED[kind], f"value of {name!r}"[:100])
        else:
            self.keys[name] = None
            self._value(kind, f"value of {name!r}"[:100])

    def _value(self, kind: int, what: str) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind], what)
        elif kind == _STRING:
            self._skip(self._number("<Q", what), what)
        elif kind == _ARRAY:
            of, count = self._number("<I", what), self._number("<Q", what)
            self.items += count
            if self.items > _ITEMS or of == _ARRAY:
                raise self._wrong(what, f"arrays of at most {_ITEMS} items, without arrays in them", count)
            if of in _SCALARS:
                self._skip(_SCALARS[of] * count, what)
                return
            for _ in range(count):
                self._value(of, what)
        else:
            raise self._wrong(what, "a type of GGUF", kind)

    def _tensor(self) -> None:
        name = self._name("name of a tensor")
        what = f"tensor {name!r}"[:100]
        dimensions, elements = self._number("<I", what), 1
        if dimensions > _DIMENSIONS:
            raise self._wrong(what, f"at most {_DIMENSIONS} dimensions", dimensions)
        for _ in range(dimensions):
            elements *= self._number("<Q", what)
            if elements > _MOST_ELEMENTS:
                raise self._wrong(what, f"at most {_MOST_ELEMENTS} elements", "more")
        self._skip(4, what)  # its type, which the reader knows better
        if self._number("<Q", what) > self.path.stat().st_size:
            raise self._wrong(what, "a place in the file", "one behind its end")
        prefix, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if prefix == "blk" and number.isascii() and number.isdigit() and len(number) < 8:
            self.blocks.add(int(number))

    def _check_model(self) -> None:
        """A model is made by these numbers before its weights are read."""
        for name, value in self.keys.items():
            if value is None or name.startswith(("general.", "tokenizer.")):
                continue
            if name.endswith(".block_count"):
                if value > min(len(self.blocks), _MOST_LAYERS):
                    raise self._wrong(f"key {name!r}"[:100], f"the {len(self.blocks)} layers that have weights", value)
            elif value > _LARGEST_WIDTH:
                raise self._wrong(f"key {name!r}"[:100], f"at most {_LARGEST_WIDTH}", value)
