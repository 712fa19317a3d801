"""States that nobody should trust: what `load_state` takes is right, or there is one error and nothing is loaded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_cache import CASES, DIM, HEADS, RATIO, assert_unchanged, flat, random_tokens
from torch import Tensor

from turboattention.errors import InvalidInputError
from turboattention.kvcache import LayerCache
from turboattention.ops import attend
from turboattention.quant.layout import PageLayout

NAMES = ("turbo4", "turbo2", "kivi4", "fp16", "paper4-sinks-and-window")
BATCH, TOKENS = 2, 200


def filled(name: str) -> LayerCache:
    cache = CASES[name].cache()
    cache.append(random_tokens(1, BATCH, TOKENS), random_tokens(2, BATCH, TOKENS))
    cache.observe(random_tokens(3, BATCH, TOKENS, HEADS * RATIO))
    cache.set_padding(torch.tensor([0, 3]))
    cache.commit()
    cache.append(random_tokens(4, BATCH, 2), random_tokens(5, BATCH, 2))
    return cache


def refused(name: str, state: Any, message: str = "") -> None:
    cache = filled(name)
    before = flat(cache.state())
    with pytest.raises(InvalidInputError, match=message) as error:
        cache.load_state(state)
    assert len(str(error.value)) < 500
    assert_unchanged(cache, before)


@pytest.mark.parametrize("name", CASES)
def test_every_state_of_its_own_is_taken(name: str):
    cache = CASES[name].cache()
    for tokens in (0, 1, 70, 130):
        if tokens:
            cache.append(random_tokens(tokens, 1, tokens), random_tokens(tokens + 1, 1, tokens))
            cache.observe(random_tokens(3, 1, tokens, HEADS * RATIO))
            cache.settle()
        other = CASES[name].cache()
        other.load_state(cache.state())
        assert_unchanged(other, flat(cache.state()))


# ---- one thing after the other --------------------------------------------------------------------------------------
def put(*path: Any, value: Any) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


def region(state: dict, name: str) -> Tensor:
    """Of the pages of turbo4's only group, as memory."""
    fmt = CASES["turbo4"].cache().formats[0]
    place = PageLayout(64, DIM, *fmt).regions[name]
    return state["groups"][0]["pages"][..., place.offset : place.offset + place.nbytes]


def claim(x: Tensor) -> Tensor:
    """A file of a few bytes that says it has 2^40 rows."""
    return x[:1].expand(2**40, *x.shape[1:])


CHANGES: dict[str, tuple[Callable[[dict], None], str]] = {
    "refined-channel-beyond-head_dim": (lambda s: region(s, "key_refined_index")[1, 0, 1, 2].fill_(DIM),
                                        r"state.groups\[0\].pages: key_refined_index: expected numbers from 0 to"),
    "scale-no-number": (lambda s: region(s, "value_page_scale")[0, 1, 0].fill_(255), "page_scale: expected finite"),
    "fewer-pages": (put("groups", 0, "pages", value=lambda x: x[:, :, :1]), r"torch.uint8 \[2, 3, 3, \d+\]"),
    "more-pages-counted": (put("page_count", value=4), r"torch.uint8 \[2, 3, 4, \d+\]"),
    "no-pages-counted": (put("page_count", value=0), r"torch.uint8 \[2, 3, 0, \d+\]"),
    "negative": (put("page_count", value=-1), "state.page_count: expected a whole number from 0"),
    "huge": (put("page_count", value=2**62), "state.page_count: expected a whole number from 0"),
    "true": (put("latest", value=True), "state.latest: expected a whole number"),
    "float": (put("page_count", value=2.0), "state.page_count: expected a whole number"),
    "pages-of-another-type": (put("groups", 0, "pages", value=lambda x: x.int()), "expected torch.uint8"),
    "pages-of-another-batch": (put("groups", 0, "pages", value=lambda x: x[:1]), r"expected torch.uint8 \[2, 3, 3"),
    "pages-too-short": (put("groups", 0, "pages", value=lambda x: x[..., :-8]), "expected torch.uint8"),
    "pages-without-memory": (put("groups", 0, "pages", value=lambda x: x[:1].clone().expand_as(x)), "memory for"),
    "other-bits": (put("groups", 0, "key_bits", value=2), r"groups\[0\].key_bits: expected 4, received 2"),
    "heads-beyond": (put("groups", 0, "heads", value=(0, 1, 7)), r"\[0\].heads: expected a whole number from 0 to 2"),
    "head-negative": (put("groups", 0, "heads", value=(0, 1, -1)), r"groups\[0\].heads: expected"),
    "head-twice": (put("groups", 0, "heads", value=(0, 1, 1)), "each of 3 heads in one group"),
    "no-group": (put("groups", value=[]), "each of 3 heads in one group"),
    "open-without-tokens-beside-pages": (put("open", value=None), "no tokens"),
    "tail-of-another-dtype": (put("open", "tensors", "key", value=lambda x: x.float()), "expected torch.float16"),
    "dtype-of-another-tail": (put("open", "dtype", value=torch.float32), "state.open.dtype: expected one of"),
    "no-dtype": (put("open", "dtype", value="float16"), "state.open.dtype: expected one of"),
    "a-tensor-as-dtype": (put("open", "dtype", value=torch.ones(9, 999)), "expected one of .* received a tensor of"),
    "tail-of-another-head": (put("open", "tensors", "key", value=lambda x: x[:, :1]), r"\[any, 3, any, any\]"),
    "value-shorter": (put("open", "tensors", "value", value=lambda x: x[:, :, 1:]), "tensors.value: expected"),
    "tail-no-number": (put("open", "tensors", "key", value=lambda x: x * torch.nan), "tensors.key: expected finite"),
    "tail-infinite": (put("open", "tensors", "value", value=lambda x: x / 0), "tensors.value: expected finite"),
    "tail-claims-rows": (put("open", "tensors", "key", value=claim), "memory for shape"),
    "a-tensor-more": (lambda s: s["open"]["tensors"].update(other=torch.ones(1)), "open.tensors: expected the names"),
    "no-sinks": (put("sink_key", value=None), "state.sink_key: expected 1 sinks beside 3 pages"),
    "sinks-too-many": (put("sink_value", value=lambda x: x.repeat(1, 1, 2, 1)), "state.sink_value: expected torch"),
    "padding-negative": (put("starts", value=torch.tensor([0, -1])), "state.starts: expected numbers from 0"),
    "padding-beyond-int32": (put("starts", value=torch.tensor([0, 2**40])), "state.starts: expected numbers from 0"),
    "padding-of-another-batch": (put("starts", value=torch.tensor([0])), r"state.starts: expected torch.int64 \[2\]"),
    "power-no-number": (put("query_power", value=lambda x: x * torch.nan), "query_power: expected numbers"),
    "power-of-another-head": (put("query_power", value=lambda x: x[:, :1]), "query_power: expected torch.float32"),
    "sums-of-other-pages": (put("checksums", value=[torch.zeros(2, 3, 1).long()]), r"state.checksums\[0\]"),
    "sums-too-many": (put("checksums", value=[torch.zeros(2, 3, 3).long()] * 2), "as many as groups"),
    "a-name-less": (lambda s: s.pop("latest"), "state: expected the names page_count"),
    "a-name-more": (lambda s: s.update(length=3), "state: expected the names page_count"),
    "a-list": (put("groups", 0, value=[1, 2]), r"state.groups\[0\]: expected an object"),
    "no-tensor": (put("sink_key", value=5), "state.sink_key: expected a tensor, received 5"),
    "meta": (put("groups", 0, "pages", value=lambda x: x.to("meta")), r"state.groups\[0\].pages: expected a tensor"),
    "sparse": (put("starts", value=lambda x: x.to_sparse()), "state.starts: expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_one_wrong_thing(kind: str):
    state = copy.deepcopy(filled("turbo4").state())
    change, message = CHANGES[kind]
    change(state)
    refused("turbo4", state, message)


@pytest.mark.parametrize("name", NAMES)
def test_states_of_other_policies(name: str):
    for other in NAMES:
        if other != name:
            refused(other, filled(name).state())


@pytest.mark.parametrize("state", [None, 5, [], "state", {}, {1: 2}])
def test_no_state_at_all(state: Any):
    refused("turbo4", state, "^state: expected")


# ---- anything -------------------------------------------------------------------------------------------------------
TENSORS = st.sampled_from([
    torch.zeros(0), torch.tensor(7), torch.ones(1, 1, 1, 1), torch.full((2, 2, 3, DIM), torch.nan),
    torch.zeros(2, 2, 1, DIM, dtype=torch.float16), torch.zeros(2, 2, 2, 2**12, dtype=torch.uint8),
    torch.zeros(1).expand(2**20, 2**20), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, 2, dtype=torch.int64),
])  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([2**62, -1, 0, 1])
)
VALUES = SCALARS | TENSORS | st.lists(SCALARS | TENSORS, max_size=3) | st.just({}) | st.just(torch.float16)


def places(data: Any, path: tuple = ()) -> list[tuple]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def of_a_tensor(data: st.DataObject, x: Tensor) -> Any:
    """``x`` cut, widened, of another dtype, or with bytes overwritten."""
    kind = data.draw(st.sampled_from(["cut", "repeat", "dtype", "bytes", "squeeze"]))
    if kind == "bytes" and x.numel():
        raw = x.clone().contiguous()
        flat_bytes = raw.view(-1).view(torch.uint8)
        for _ in range(data.draw(st.integers(1, 4))):
            flat_bytes[data.draw(st.integers(0, len(flat_bytes) - 1))] = data.draw(st.integers(0, 255))
        return raw
    if kind == "dtype":
        return x.to(data.draw(st.sampled_from([torch.float32, torch.int32, torch.uint8, torch.bool])))
    dim = data.draw(st.integers(0, max(x.dim() - 1, 0)))
    if kind == "squeeze" or not x.dim():
        return x.unsqueeze(dim)
    if kind == "cut":
        return x.narrow(dim, 0, data.draw(st.integers(0, x.shape[dim])))
    return x.repeat_interleave(2, dim)


def wrong(data: st.DataObject, state: dict) -> Any:
    state = {**state, "groups": [dict(group) for group in state["groups"]]}
    state["open"] = {"dtype": state["open"]["dtype"], "tensors": dict(state["open"]["tensors"])}
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(state)[1:]))
        holder = state
        for key in path[:-1]:
            holder = holder[key]
        old = holder[path[-1]]
        if isinstance(old, Tensor) and data.draw(st.booleans()):
            holder[path[-1]] = of_a_tensor(data, old)
        elif isinstance(holder, dict) and data.draw(st.integers(0, 5)) == 0:
            del holder[path[-1]]
        else:
            holder[path[-1]] = data.draw(VALUES)
    return state


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(data=st.data())
def test_anything(name: str, data: st.DataObject):
    """One to three things changed: refused and nothing loaded, or a cache that goes on without a traceback."""
    cache = filled(name)
    before = flat(cache.state())
    refusal = error_of(lambda: cache.load_state(wrong(data, filled(name).state())))
    if refusal is not None:
        assert len(refusal) < 500
        assert_unchanged(cache, before)
    elif cache.open is not None:
        error_of(lambda: goes_on(cache))  # a head_dim, for example, that no page has


def error_of(call: Callable[[], None]) -> str | None:
    """The one error of a call; every other is raised."""
    try:
        call()
    except InvalidInputError as error:
        return str(error)
    return None


def goes_on(cache: LayerCache) -> None:
    rows, _, _, dim = cache.open.tensors["key"].shape
    out = attend(torch.ones(rows, HEADS * RATIO, 1, dim), cache.view())
    assert out.shape == (rows, HEADS * RATIO, 1, dim)
    key = torch.ones(rows, HEADS, 70, dim)
    cache.append(key, key)
    cache.commit()
