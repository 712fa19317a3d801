"""The compiled library: where it is, whether it fits, and what it runs on."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from turboattention.cpu.structs import ABI_VERSION
from turboattention.errors import InvalidInputError, UnsupportedError

PATH = Path(__file__).with_name("_kernels.so")
INSTRUCTION_SETS = ("plain C++", "AVX2", "AVX-512 VNNI", "AMX-INT8 and AVX-512 VNNI")
NO_MEMORY, BAD_TABLE, BEYOND_FLOAT16, BAD_LENGTHS = 1, 2, 3, 4


class Loaded(NamedTuple):
    """The library, or None with the reason; isa: the widest instruction set of this processor that it has."""

    library: ctypes.CDLL | None
    reason: str
    isa: int = 0


@lru_cache(maxsize=1)
def loaded() -> Loaded:
    """Load the library once."""
    if not PATH.exists():
        return Loaded(None, "the CPU kernels were not built; install turboattention where a C++ compiler is")
    try:
        library = ctypes.CDLL(str(PATH))
        version = int(library.ta_abi_version())
        for name in ("ta_attend", "ta_append", "ta_compress", "ta_prefill"):
            getattr(library, name).argtypes = [ctypes.c_char_p]  # the bytes of a struct
    except (OSError, AttributeError) as error:
        return Loaded(None, f"the CPU kernels can't be loaded: {error}; install turboattention again")
    if version != ABI_VERSION:
        return Loaded(None, f"the CPU kernels are of another version ({version}); install turboattention again")
    return Loaded(library, "", int(library.ta_isa()))


def without_library() -> str | None:
    """None where the kernels run, else why not."""
    return loaded().reason or None


def instruction_set() -> str:
    """What the kernels use on this processor, in words."""
    return INSTRUCTION_SETS[loaded().isa]


def call(name: str, arguments: bytes) -> int:
    """Call a function of the library, without Python's lock; raises UnsupportedError where there is no library.

    arguments: of `structs.pack`.

    Returns 0, from compression BEYOND_FLOAT16, from prefill BAD_LENGTHS; raises MemoryError, and InvalidInputError
    for a page table that points outside of its pool.
    """
    library, reason, _ = loaded()
    if library is None:
        raise UnsupportedError(f"implementation 'cpu': {reason}")
    status = int(getattr(library, name)(arguments))
    if status == NO_MEMORY:
        raise MemoryError(f"CPU kernels: no memory for {name}")
    if status == BAD_TABLE:
        raise InvalidInputError("page table: expected pages of the pool, received an entry outside of it")
    return status
