"""The paged cache against one `LayerCache` for each row: the same pages, exact tokens and sinks after any history."""

from dataclasses import replace

import paged_machine
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from turboattention.config import CacheConfig, TensorFormat, presets
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.kvcache import LayerCache
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.append import advance, paged_append_for, tail_capacity
from turboattention.ops.append.paged import append_paged, rotate_positions
from turboattention.ops.dispatch import Implementation
from turboattention.quant.layout import PageLayout

ROWS, HEADS, DIM, MAX_STEP = 2, 3, 64, 5


def config_of(preset: str, **changes: int) -> CacheConfig:
    return replace(presets()[preset].cache, **{"page_size": 32, **changes})


def mixed(config: CacheConfig) -> list[tuple[TensorFormat, TensorFormat]]:
    """The middle head has a format of its own."""
    return [(config.key, config.value), (presets()["int8"].cache.key, config.value), (config.key, config.value)]


CONFIGS = {
    "turbo4": config_of("turbo4"),
    "turbo2-sinks-and-window": config_of("turbo2", sink_tokens=5, recent_window=7),
    "kivi4": config_of("kivi4", recent_window=0),
    "window-of-a-page": config_of("int8", recent_window=32, sink_tokens=0),
}
# How a row grows in a step: (when, new tokens, real tokens of each row), or a row to free.
steps = st.one_of(
    st.tuples(st.just("before"), st.integers(1, MAX_STEP), st.tuples(*[st.integers(0, MAX_STEP)] * ROWS)),
    st.tuples(st.just("after"), st.integers(1, 90), st.tuples(*[st.integers(0, 90)] * ROWS)),
    st.integers(0, ROWS - 1),
)


class Rows:
    """A `LayerCache` for each row."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.caches = [LayerCache(config, mixed(config)) for _ in range(ROWS)]

    def append(self, when: str, key: Tensor, value: Tensor, q: Tensor, counts: list[int]) -> None:
        for row, (cache, count) in enumerate(zip(self.caches, counts, strict=True)):
            part = (slice(row, row + 1), slice(None), slice(0, count))
            if when == "after":  # its queries are known before its pages are compressed
                cache.observe(q[part])
            cache.commit()
            cache.append(key[part], value[part])
            if when == "after":
                cache.commit()
            else:
                cache.observe(q[part])

    def free(self, row: int) -> None:
        self.caches[row] = LayerCache(self.config, mixed(self.config))


def assert_same(paged: PagedCache, rows: Rows) -> None:
    view = paged.view()
    size, capacity = paged.config.page_size, view.tail_key.shape[2]
    assert paged.fault.tolist() == [0] * ROWS
    for row, cache in enumerate(rows.caches):
        length, page_tokens = int(view.lengths[row]), int(view.page_tokens[row])
        assert (length, page_tokens) == (cache.length, cache.page_tokens)
        if not length:
            continue
        for group, other in zip(view.groups, cache.groups, strict=False):
            assert group.heads == other.heads
            assert torch.equal(group.pool[group.table[row, :, : page_tokens // size].long()], other.pages[0])
        exact = cache.view()
        slots = torch.arange(page_tokens, length) % capacity
        assert torch.equal(view.tail_key[row][:, slots], exact.tail_key[0])
        assert torch.equal(view.tail_value[row][:, slots], exact.tail_value[0])
        if exact.sink_key is not None:
            assert torch.equal(view.sink_key[row], exact.sink_key[0])
            assert torch.equal(view.sink_value[row], exact.sink_value[0])


@pytest.mark.parametrize("shuffle", [None, 3])
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25)
@given(history=st.lists(steps, min_size=3, max_size=10))
def test_any_history(name: str, shuffle: int | None, history: list):
    config = CONFIGS[name]
    paged = PagedCache(
        config, mixed(config), rows=ROWS, max_tokens=1024, head_dim=DIM, max_step=MAX_STEP, shuffle=shuffle
    )
    rows = Rows(config)
    random = torch.Generator().manual_seed(len(history))
    for step in history:
        if isinstance(step, int):
            paged.free([step])
            rows.free(step)
            continue
        when, tokens, real = step
        counts = [min(count, tokens) for count in real]
        key, value = (torch.randn(ROWS, HEADS, tokens, DIM, generator=random) for _ in range(2))
        q = torch.randn(ROWS, 2 * HEADS, tokens, DIM, generator=random)
        told = torch.tensor(counts, dtype=torch.int32)
        if when == "after":
            paged.observe(q, told)
        paged.append(key, value, when=when, counts=told)
        if when == "before":
            paged.observe(q, told)
        rows.append(when, key, value, q, counts)
        assert_same(paged, rows)


@pytest.mark.parametrize("implementation", ["reference", None], ids=["reference", "default"])
@pytest.mark.parametrize("name", paged_machine.CONFIGS)
def test_random_steps_of_an_engine(name: str, implementation: Implementation | None):
    """Pages come from one pool and go from row to row; `benchmarks/fuzz.py` runs the same for longer."""
    append = append_paged if implementation == "reference" else None
    chosen = settings(max_examples=5, stateful_step_count=20, phases=[Phase.generate])
    run_state_machine_as_test(lambda: paged_machine.PagedMachine(name, append, implementation), settings=chosen)


def test_decode_over_many_pages():
    """Without counts, one token at a time, beyond the capacity of the ring."""
    config = CONFIGS["turbo4"]
    paged, rows = PagedCache(config, mixed(config), rows=ROWS, max_tokens=200, head_dim=DIM), Rows(config)
    for _ in range(150):
        key, value, q = (torch.randn(ROWS, heads, 1, DIM) for heads in (HEADS, HEADS, HEADS))
        paged.append(key, value)
        paged.observe(q)
        rows.append("before", key, value, q, [1] * ROWS)
    assert paged.page_tokens.tolist() == [128, 128]
    assert_same(paged, rows)


def test_pages_of_a_row_do_not_depend_on_the_other():
    config = CONFIGS["turbo4"]
    key, value = torch.randn(ROWS, HEADS, 100, DIM), torch.randn(ROWS, HEADS, 100, DIM)
    pages = []
    for other in (0, 57):
        paged = PagedCache(config, mixed(config), rows=ROWS, max_tokens=128, head_dim=DIM)
        paged.append(key, value, when="after", counts=torch.tensor([100, other], dtype=torch.int32))
        group = paged.groups[0]
        pages.append(group.pool[group.table[0, :, :3].long()])
    assert torch.equal(*pages)


@pytest.mark.parametrize("width", [DIM // 2, DIM])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_rope_is_rotation_by_complex_numbers(rows: int, width: int):
    """Channels c and c + D / 2 are the parts of a complex number; K is stored after the product."""
    angle = torch.rand(rows, 7, DIM // 2, dtype=torch.float64) * 6
    cos, sin = (x.repeat(1, 1, width * 2 // DIM).float() for x in (angle.cos(), angle.sin()))
    key = torch.randn(ROWS, HEADS, 7, DIM)
    numbers = torch.complex(key[..., : DIM // 2].double(), key[..., DIM // 2 :].double())
    turned = numbers * torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate_positions(key, cos, sin).double(), expected, rtol=1e-5, atol=1e-6)
    config = CONFIGS["turbo4"]
    a, b = (PagedCache(config, mixed(config), rows=ROWS, max_tokens=64, head_dim=DIM, max_step=7) for _ in range(2))
    a.append(key, key, rope=(cos, sin))
    b.append(rotate_positions(key, cos, sin), key)
    assert torch.equal(a.tail_key, b.tail_key)
    assert torch.equal(a.sink_key, b.sink_key)


def test_advance_is_out_of_place_and_counts_by_hand():
    """Pages of 32, window 4: before the step 40 - 4 tokens are final, after it 40 + 30 - 4."""
    lengths, page_tokens = torch.tensor([40, 3, 0], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    for when, counts, expected in (
        ("before", None, ([70, 33, 30], [32, 0, 0])),
        ("after", None, ([70, 33, 30], [64, 0, 0])),
        ("after", torch.tensor([0, 50, 2], dtype=torch.int32), ([40, 33, 2], [32, 0, 0])),
    ):
        got = advance(lengths, page_tokens, 30, when=when, page_size=32, window=4, counts=counts)
        assert [x.tolist() for x in got] == list(expected)
        assert all(x.dtype == torch.int32 for x in got)
    assert lengths.tolist() == [40, 3, 0]
    assert page_tokens.tolist() == [0, 0, 0]


def test_bytes_by_hand():
    """turbo4 at 32 tokens a page: two groups, and 100 tokens of one row."""
    config = CONFIGS["turbo4"]
    paged = PagedCache(config, mixed(config), rows=ROWS, max_tokens=100, head_dim=DIM)
    page = [PageLayout(32, DIM, *pair).nbytes for pair in mixed(config)]
    pages = 4  # for 100 tokens
    exact = 2 * 2 * HEADS * DIM  # bytes of a token: K and V in float16
    allocated = ROWS * pages * (sum(page) + 4 * HEADS) + ROWS * exact * (32 + 1) + 3 * 4 * ROWS
    assert paged.nbytes == allocated + ROWS * HEADS * DIM * 4
    assert paged.used_nbytes == paged.num_values == 0
    tokens = torch.randn(ROWS, HEADS, 100, DIM)
    paged.append(tokens, tokens, when="after", counts=torch.tensor([100, 0], dtype=torch.int32))
    assert paged.used_nbytes == 3 * sum(page) + exact * (4 + 1) + HEADS * DIM * 4
    assert paged.num_values == 2 * HEADS * DIM * 100
    assert paged.nbytes == allocated + ROWS * HEADS * DIM * 4


@pytest.mark.parametrize("seed", [None, 7])
def test_table_holds_every_page_once(seed: int | None):
    config = CONFIGS["turbo4"]
    paged = PagedCache(config, mixed(config), rows=ROWS, max_tokens=100, head_dim=DIM, shuffle=seed)
    for group in paged.groups:
        assert group.table.dtype == torch.int32
        assert sorted(group.table.flatten().tolist()) == list(range(group.pool.shape[0]))
        assert (group.table.flatten().tolist() == list(range(group.pool.shape[0]))) == (seed is None)


def test_refilled_row_overwrites_the_padding_and_all_else_of_its_pages():
    config = CONFIGS["turbo4"]
    paged = PagedCache(config, mixed(config), rows=ROWS, max_tokens=64, head_dim=DIM)
    for group in paged.groups:
        group.pool.fill_(0xA5)
    tokens = torch.randn(ROWS, HEADS, 64, DIM)
    paged.append(tokens, tokens, when="after")
    first = [group.pool.clone() for group in paged.groups]
    paged.free(torch.arange(ROWS))
    for group in paged.groups:
        group.pool.fill_(0x5A)
    paged.append(tokens, tokens, when="after")
    assert all(torch.equal(group.pool, old) for group, old in zip(paged.groups, first, strict=True))


# --- what is refused ---


def paged_of(**changes: object) -> PagedCache:
    config = CONFIGS["turbo4"]
    return PagedCache(config, mixed(config), **{"rows": ROWS, "max_tokens": 64, "head_dim": DIM, **changes})


@pytest.mark.parametrize("preset", ["paper4", "paper3"])
def test_buffer_of_the_paper_is_refused(preset: str):
    config = presets()[preset].cache
    with pytest.raises(UnsupportedError, match="paged cache: the paper's clamped buffer and low-priority heads"):
        PagedCache(config, mixed(config), rows=1, max_tokens=64, head_dim=DIM)


def test_sizes_are_refused():
    for change in ({"rows": 0}, {"max_tokens": 0}, {"max_step": 0}):
        with pytest.raises(InvalidInputError, match="rows, max_tokens, max_step: expected 1 or more each"):
            paged_of(**change)


def test_layouts_that_a_gpu_kernel_cannot_write_are_refused():
    layout = PageLayout(32, 64, CONFIGS["kivi4"].key, CONFIGS["kivi4"].value)
    with pytest.raises(UnsupportedError, match="paged append on cuda: key: the append kernel writes two-level"):
        paged_append_for([layout], torch.device("cuda"))
    assert paged_append_for([layout], torch.device("cpu")) is append_paged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(ROWS, 2, 1, DIM)}, "key: expected 3 heads"),
        ({"key": torch.zeros(1, HEADS, 1, DIM)}, "key: expected batch 2 and at least 1 token"),
        ({"value": torch.zeros(ROWS, HEADS, 2, DIM)}, "value: expected the shape of key"),
        ({"when": "later"}, "when: expected one of before, after, received 'later'"),
        ({"counts": torch.zeros(ROWS, dtype=torch.int64)}, r"counts: expected contiguous torch.int32 \[2\]"),
        ({"rope": (torch.zeros(1, 1, 16),) * 2}, r"rope: expected cos and sin \[2 or 1, 1, 32 or 64\]"),
        (
            dict.fromkeys(("key", "value"), torch.zeros(ROWS, HEADS, 2, DIM)),
            "tail: expected a window of 0 or more and a capacity of 33 tokens, received 0 and 32",
        ),
    ],
    ids=["heads", "rows", "value", "when", "counts", "rope", "capacity"],
)
def test_arguments_are_refused(change: dict[str, object], message: str):
    paged = paged_of()
    arguments = {"key": torch.zeros(ROWS, HEADS, 1, DIM), "value": torch.zeros(ROWS, HEADS, 1, DIM), **change}
    with pytest.raises(InvalidInputError, match=message):
        paged.append(**arguments)
    assert paged.lengths.tolist() == [0, 0]


def test_observe_refuses_shapes():
    with pytest.raises(InvalidInputError, match="q: expected 2 rows and a multiple of 3 heads"):
        paged_of().observe(torch.zeros(ROWS, 4, 1, DIM))


def test_capacity_of_the_tail_is_the_least_that_works():
    """A step of n tokens before compression leaves up to window + a page - 1 old ones; after it none of the new."""
    assert tail_capacity(32, 7, 5, "before") == 7 + 31 + 5
    assert tail_capacity(32, 7, 1000, "after") == 7 + 31


def test_check_names_the_rows_and_reasons():
    paged = paged_of()
    paged.check()
    tokens = torch.zeros(ROWS, HEADS, 96, DIM)
    tokens[1, 0, 3, 3] = torch.nan
    paged.append(tokens, tokens, when="after", counts=torch.tensor([64, 96], dtype=torch.int32))
    with pytest.raises(InvalidInputError, match=r"row 1: .* received NaN, Inf or a value .*, more tokens than fit"):
        paged.check()
    paged.free([1])
    paged.check()
