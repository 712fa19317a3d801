"""The only module here that calls our operators: a changed signature changes this file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turboattention import ops
from turboattention.errors import UnsupportedError
from turboattention.ops.common.paged_kv import PagedKV


def implementation_of(op: str, asked: str | None) -> str:
    """The implementation that runs: the asked one, or what the operator chooses on this machine."""
    return asked or ops.implementations()[op][0]


def decode(kv: PagedKV, implementation: str | None) -> Callable[[Tensor], Tensor]:
    """A call on queries ``[batch, heads, 1, head_dim]`` over a paged cache."""
    from turboattention.ops.decode import paged_decode

    def attend(q: Tensor) -> Tensor:
        return paged_decode(q, kv, implementation=implementation).out

    return attend
