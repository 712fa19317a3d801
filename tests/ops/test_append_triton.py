"""The append kernel against the definition, bit for bit: every region, every byte around it."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turboattention.config import CacheConfig, TensorFormat, presets
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.append import paged, reference
from turboattention.ops.append import triton as kernel
from turboattention.ops.append import triton_paged as paged_kernel
from turboattention.ops.append.page_spec import supports
from turboattention.quant.granularity import PerChannel, PerGroup, PerToken
from turboattention.quant.layout import PageLayout

DIMS = (64, 80, 96, 128, 256)
NAMES = ("int8", "turbo4", "turbo3", "turbo2")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layout_of(name: str, dim: int, page_size: int = 64) -> PageLayout:
    cache = presets()[name].cache
    return PageLayout(page_size, dim, cache.key, cache.value)


def outliers(*shape: int, seed: int = 0) -> Tensor:
    """Values as K and V have them: channels of different sizes and offsets, in float16."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=random)
    x = x * torch.rand(shape[-1], generator=random).add(0.1) + torch.randn(shape[-1], generator=random)
    x[..., 5] *= 20
    return x.half()


def assert_same(
    layout: PageLayout, key: Tensor, value: Tensor, valid: Tensor | None = None, query_power: Tensor | None = None
) -> None:
    """The definition runs on the CPU: a GPU must give the bytes of a CPU."""
    given = (None if x is None else x.to(DEVICE) for x in (key, value, valid, query_power))
    got = kernel.compress_pages(layout, *given).cpu()
    expected = reference.compress_pages(layout, key, value, valid, query_power=query_power)
    wrong = [name for name in layout.regions if not torch.equal(layout.read(got, name), layout.read(expected, name))]
    assert wrong == []
    assert torch.equal(got, expected)  # the padding, too


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_presets(name: str, dim: int):
    key, value = outliers(1, 2, 128, dim, seed=1), outliers(1, 2, 128, dim, seed=2)
    assert_same(layout_of(name, dim), key, value, query_power=torch.rand(1, 2, dim) ** 4)


FORMATS = {
    "no-search": (TensorFormat(4), TensorFormat(4, PerToken())),
    "search": (TensorFormat(2, search=True), TensorFormat(3, PerToken(), search=True)),
    "rotated": (TensorFormat(3), TensorFormat(2, PerToken(), rotate=True)),
    "symmetric": (TensorFormat(8, search=True), TensorFormat(4, PerToken(), symmetric=True)),
    "symmetric-search": (TensorFormat(2), TensorFormat(8, PerToken(), symmetric=True, search=True)),
    "all-refined": (
        TensorFormat(4, search=True, refined_share=1.0, refined_bits=4),
        TensorFormat(8, PerToken(), rotate=True),
    ),
    "refined-by-2": (TensorFormat(3, refined_share=0.3, refined_bits=2), TensorFormat(2, PerToken(), symmetric=True)),
    "one-refined": (TensorFormat(2, refined_share=1 / 64, refined_bits=1), TensorFormat(3, PerToken(), symmetric=True)),
}


@pytest.mark.parametrize(("dim", "page_size"), [(64, 32), (80, 64), (96, 128)])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, dim: int, page_size: int):
    layout = PageLayout(page_size, dim, *FORMATS[name])
    assert_same(layout, outliers(1, 1, page_size, dim, seed=3), outliers(1, 1, page_size, dim, seed=4))


def special(kind: str, dim: int) -> Tensor:
    x = outliers(1, 1, 64, dim, seed=5).float()
    match kind:
        case "zeros":
            return torch.zeros_like(x)
        case "negative-zeros":
            return torch.where(x > 0, 0.0, -0.0)
        case "constant":
            return torch.full_like(x, -3.0)
        case "constant-channels":
            x[..., ::3] = torch.randn(x[..., ::3].shape[-1])
            return x
        case "ties":  # integers and halves: every code and every tie between two of them
            return (torch.arange(64)[:, None] + torch.arange(dim)).remainder(31).div(2)[None, None]
        case "equal-channels":  # all harms alike: the lowest channels are refined
            return torch.linspace(-1, 1, 64)[None, None, :, None].expand(1, 1, 64, dim).contiguous()
        case "huge":
            return (x / x.abs().max()) * 65000 / dim**0.5
        case "subnormal":
            return x * 1e-7
        case "tiny":  # below every float16: scales and zeros end at the smallest one
            return x * 1e-20
    return x * 1e-38  # float32 subnormals


@pytest.mark.parametrize(
    "kind",
    [
        "zeros",
        "negative-zeros",
        "constant",
        "constant-channels",
        "ties",
        "equal-channels",
        "huge",
        "subnormal",
        "tiny",
        "denormal",
    ],
)
@pytest.mark.parametrize("name", ("int8", "turbo4", "turbo2"))
def test_special_values(name: str, kind: str):
    x = special(kind, 64)
    assert_same(layout_of(name, 64), x, x)


@pytest.mark.parametrize("name", ["turbo4", "turbo2"])
def test_tokens_that_do_not_count(name: str):
    """Scattered, a whole page, none; a row of the mask for each row or one for all. They hold huge values."""
    layout = layout_of(name, 80)
    key, value = outliers(2, 1, 128, 80, seed=6), outliers(2, 1, 128, 80, seed=7)
    valid = torch.rand(2, 128) > 0.2
    valid[1, :64] = False
    key[~valid[:, None]] *= 100
    assert_same(layout, key, value, valid)
    assert_same(layout, key, value, (torch.arange(128) >= 3)[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_strides_and_dtypes(dtype: torch.dtype):
    """Tokens before heads as projections give them, a slice of a larger tensor, every other channel."""
    layout = layout_of("turbo3", 64)
    key = outliers(2, 64, 3, 64, seed=8).to(dtype).transpose(1, 2)
    assert_same(layout, key, torch.randn(2, 5, 70, 64).to(dtype)[:, 1:4, 3:67])
    assert_same(layout, key.flip(-1), torch.randn(2, 3, 64, 128).to(dtype)[..., ::2])


def test_no_pages():
    layout = layout_of("turbo4", 64)
    for shape in ((1, 2, 0, 64), (0, 2, 64, 64)):
        x = torch.zeros(shape, device=DEVICE)
        assert kernel.compress_pages(layout, x, x).shape == (*shape[:2], shape[2] // 64, layout.nbytes)


# --- faults ---


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("bad", "bits"), [(torch.nan, 1), (torch.inf, 1), (-torch.inf, 1), (3e38, 2), (-1e7, 2)])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_faults(bad: float, bits: int, side: str):
    """The definition raises; the kernel says it in a word for each row, or raises when it was given none."""
    layout = layout_of("turbo4", 64)
    pair = {"key": torch.randn(3, 2, 64, 64), "value": torch.randn(3, 2, 64, 64)}
    pair[side][1, 1, 17, 23] = bad
    fault = torch.tensor([4, 0, 0], dtype=torch.int32, device=DEVICE)
    key, value = (x.to(DEVICE) for x in pair.values())
    pages = kernel.compress_pages(layout, key, value, fault=fault).cpu()
    assert fault.tolist() == [4, bits, 0]
    alone = reference.compress_pages(layout, pair["key"][::2], pair["value"][::2])
    assert torch.equal(pages[::2], alone)
    with pytest.raises(InvalidInputError):
        reference.compress_pages(layout, *pair.values())
    with pytest.raises(InvalidInputError, match=r"expected finite values .* received others in rows \[1\]"):
        kernel.compress_pages(layout, key, value)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_largest_ranges_are_no_fault():
    """65504 and what rounds to it fit; what rounds to infinity does not."""
    layout = PageLayout(64, 64, *FORMATS["no-search"])
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, 3, 5] = -65519.0
    assert_same(layout, x, torch.zeros_like(x))
    x[0, 0, 3, 5] = -65520.0
    with pytest.raises(InvalidInputError):
        kernel.compress_pages(layout, x.to(DEVICE), x.to(DEVICE))


# --- refusals ---


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (TensorFormat(16), FORMATS["search"][1], "key: the append kernel stores 8, 4, 3 or 2 bits, not 16"),
        (FORMATS["search"][0], TensorFormat(16), "value: the append kernel stores 8, 4, 3 or 2 bits, not 16"),
        (TensorFormat(4, PerToken()), FORMATS["search"][1], "key: the append kernel needs scales PerChannel"),
        (TensorFormat(4), TensorFormat(4, PerGroup(32)), "value: the append kernel needs scales PerToken"),
        (TensorFormat(4, metadata="float16"), FORMATS["search"][1], "two-level metadata, not float16"),
        (TensorFormat(4), TensorFormat(4, PerChannel(), metadata="flashq"), "two-level metadata, not flashq"),
        (TensorFormat(4, symmetric=True), FORMATS["search"][1], "stores K asymmetric and unrotated"),
        (TensorFormat(4, rotate=True), FORMATS["search"][1], "stores K asymmetric and unrotated"),
    ],
)
def test_unsupported_layouts(key: TensorFormat, value: TensorFormat, reason: str):
    layout = PageLayout(64, 64, key, value)
    assert reason in (supports(layout) or "")
    x = torch.zeros(1, 1, 64, 64, device=DEVICE)
    with pytest.raises(UnsupportedError, match=reason):
        kernel.compress_pages(layout, x, x)


def test_supported_presets():
    assert [name for name in presets() if supports(layout_of(name, 96)) is None] == list(NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 2, 65, 64)}, "value: expected the shape and dtype of key"),
        (dict.fromkeys(("key", "value"), torch.zeros(1, 2, 65, 64)), "key: expected a multiple of 64 tokens"),
        ({"value": torch.zeros(1, 2, 64, 64).half()}, "value: expected the shape and dtype of key"),
        ({"valid": torch.zeros(1, 63, dtype=torch.bool)}, r"valid: expected bool \[1 or 1, 64\]"),
        ({"query_power": torch.zeros(1, 2, 63)}, r"query_power: expected float32 \[1, 2, 64\]"),
        ({"fault": torch.zeros(2, dtype=torch.int32)}, r"fault: expected int32 \[1\]"),
    ],
    ids=["tokens", "pages", "dtype", "valid", "power", "fault"],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Tensor], message: str):
    arguments = {"key": torch.zeros(1, 2, 64, 64), "value": torch.zeros(1, 2, 64, 64), **change}
    with pytest.raises(InvalidInputError, match=message):
        kernel.compress_pages(layout_of("turbo4", 64), **arguments)


# --- paged append ---


@dataclass(frozen=True)
class Step:
    when: paged.When
    tokens: int
    counts: tuple[int, ...] | None = None
    rope: int = 0  # channels of cos and sin


CASES = {
    "turbo4": ({}, "turbo4", 64, torch.float16),
    "turbo2-sinks-and-window": ({"sink_tokens": 5, "recent_window": 9}, "turbo2", 80, torch.bfloat16),
    "turbo3-pages-of-32": ({"page_size": 32, "sink_tokens": 0}, "turbo3", 96, torch.float16),
}
STEPS = (
    Step("after", 70, (70, 33), 0),
    Step("before", 1),
    Step("before", 4, (0, 4)),
    Step("after", 131, (131, 64)),
    Step("before", 3, rope=1),
    Step("before", 1),
    Step("after", 65, (1, 65), rope=2),
    Step("before", 1, (0, 0)),
)


def caches_of(config: CacheConfig, formats: list, dim: int, dtype: torch.dtype, **options: object) -> list[PagedCache]:
    """The same empty cache twice: for the definition, on the CPU, and for the kernel."""
    return [
        PagedCache(
            config, formats, rows=2, head_dim=dim, dtype=dtype, device=device, append=append,
            **{"max_tokens": 320, "max_step": 4, "shuffle": 1, **options},
        )
        for device, append in (("cpu", paged.append_paged), (DEVICE, paged_kernel.append_paged))
    ]  # fmt: skip


def surround(cache: PagedCache) -> list[Tensor]:
    """Move pools into larger tensors full of 0xA5, so that a byte written outside is seen; returns those tensors."""
    whole = []
    groups = []
    for group in cache.groups:
        pages, nbytes = group.pool.shape
        around = torch.full((pages + 2, nbytes), 0xA5, dtype=torch.uint8, device=group.pool.device)
        groups.append(replace(group, pool=around[1:-1]))
        whole.append(around)
    cache.groups = tuple(groups)
    return whole


@pytest.mark.parametrize("name", CASES)
def test_steps(name: str):
    """Decode steps and chunks, ragged, with and without RoPE, two groups of heads; every byte of the pools is equal."""
    changes, preset, dim, dtype = CASES[name]
    config = replace(presets()[preset].cache, **changes)
    formats = [(config.key, config.value), (presets()["int8"].cache.key, config.value), (config.key, config.value)]
    caches = caches_of(config, formats, dim, dtype)
    pools = [surround(cache) for cache in caches]
    for cache in caches:
        for x in (cache.tail_key, cache.tail_value):
            x.fill_(torch.nan)  # what was not written must not be read
    for number, step in enumerate(STEPS):
        key, value = (outliers(2, step.tokens, 3, dim, seed=10 * number + i).transpose(1, 2) for i in (0, 1))
        q = torch.randn(2, 6, step.tokens, dim)
        counts = None if step.counts is None else torch.tensor(step.counts, dtype=torch.int32)
        angles = [torch.randn(2 if step.rope == 1 else 1, step.tokens, dim * step.rope // 2) for _ in range(2)]
        for cache in caches:
            cache.append(
                key.to(cache.lengths.device), value.to(cache.lengths.device), when=step.when,
                counts=None if counts is None else counts.to(cache.lengths.device),
                rope=(angles[0].to(cache.lengths.device), angles[1].to(cache.lengths.device)) if step.rope else None,
            )  # fmt: skip
            power = cache.query_power
            assert power is not None
            # The same statistics for both: a GPU may add the squares in another order.
            power += q.square().unflatten(1, (3, 2)).sum((2, 3)).to(power.device)
    assert_same_state(caches, pools)
    assert caches[0].page_tokens.min() >= 128


def assert_same_state(caches: list[PagedCache], pools: list[list[Tensor]]) -> None:
    a, b = caches
    assert a.fault.tolist() == [0, 0]
    for name in ("lengths", "page_tokens", "fault"):
        assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name
    for name in ("tail_key", "tail_value", "sink_key", "sink_value"):
        x, y = getattr(a, name), getattr(b, name)
        if x is not None:  # bits, because unwritten slots are NaN
            assert torch.equal(x.view(torch.int16), y.cpu().view(torch.int16)), name
    for one, other in zip(*pools, strict=True):
        assert torch.equal(one, other.cpu())


def test_chunk_that_ends_in_a_page_of_the_tail():
    """40 tokens wait, 24 complete their page, 64 fill one of their own, 6 go to the tail, over slots just read."""
    config = replace(presets()["turbo4"].cache, sink_tokens=0)
    caches = caches_of(config, [(config.key, config.value)], 64, torch.float16)
    pools = [surround(cache) for cache in caches]
    for number, tokens in enumerate((40, 94)):
        key, value = (outliers(2, 1, tokens, 64, seed=number + i) for i in (0, 5))
        for cache in caches:
            cache.append(key.to(cache.lengths.device), value.to(cache.lengths.device), when="after")
    assert caches[0].page_tokens.tolist() == [128, 128]
    assert_same_state(caches, pools)


def test_float32_tokens_are_stored_in_the_dtype_of_the_tail_first():
    config = replace(presets()["turbo4"].cache, sink_tokens=1)
    caches = caches_of(config, [(config.key, config.value)], 64, torch.float16)
    pools = [surround(cache) for cache in caches]
    key, value = torch.randn(2, 1, 130, 64), torch.randn(2, 1, 130, 64)
    angles = torch.randn(2, 130, 64), torch.randn(2, 130, 64)
    for cache in caches:
        device = cache.lengths.device
        cache.append(key.to(device), value.to(device), when="after", rope=(angles[0].to(device), angles[1].to(device)))
    assert_same_state(caches, pools)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_faults_of_rows():
    """NaN in a row, a value beyond the tail's dtype, a table that ends; other rows and other pages stay right."""
    config = presets()["turbo4"].cache
    for change, bits in (("nan", 1), ("beyond", 1), ("long", 4), ("foreign", 4)):
        caches = caches_of(config, [(config.key, config.value)], 64, torch.float16, max_tokens=128)
        pools = [surround(cache) for cache in caches]
        key, value = torch.randn(2, 1, 192, 64), torch.randn(2, 1, 192, 64)
        counts = torch.tensor([128, 192 if change == "long" else 128], dtype=torch.int32)
        key[1, 0, 3, 7] = {"nan": torch.nan, "beyond": 7e4}.get(change, 0.0)
        for cache in caches:
            if change == "foreign":
                cache.groups[0].table[1, 0, 1] = 1_000_000
            device = cache.lengths.device
            cache.append(key.to(device), value.to(device), when="after", counts=counts.to(device))
        assert [cache.fault.tolist() for cache in caches] == [[0, bits], [0, bits]]
        places = caches[0].groups[0].table[0].flatten().tolist()
        for one, other in zip(*pools, strict=True):
            assert torch.equal(one[1:-1][places], other[1:-1][places].cpu())
            assert bool((other[[0, -1]] == 0xA5).all())
        with pytest.raises(InvalidInputError, match=r"row 1: expected finite values and room"):
            caches[1].check()


# --- compilation ---


def test_compiles_for_every_gpu():
    """Without a GPU: no spills in the hottest loop, and no fused multiply-add outside of divisions' own code."""
    from compile_kernels import TARGETS, rows_of

    rows = rows_of(Path(__file__).with_name("append_variants.py"))
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        assert row["loop_spills"] == 0, row
        # The least that any of these GPUs has: AMD's 64 KiB, 99 KiB of sm_86.
        assert row["shared"] <= (99 if row["target"].startswith("sm_") else 64) * 1024, row


# --- on a GPU alone ---


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_definition_has_the_same_bytes_on_a_gpu(name: str):
    layout = layout_of(name, 128)
    key, value, power = outliers(2, 4, 256, 128), outliers(2, 4, 256, 128, seed=1), torch.rand(2, 4, 128)
    one = reference.compress_pages(layout, key, value, query_power=power)
    other = reference.compress_pages(layout, key.cuda(), value.cuda(), query_power=power.cuda())
    assert torch.equal(one, other.cpu())


@pytest.mark.gpu
def test_captured_graph_follows_the_lengths():
    """One graph of a decode step, replayed over two page borders, ends as the definition does."""
    config = replace(presets()["turbo4"].cache, recent_window=3)
    caches = caches_of(config, [(config.key, config.value)] * 2, 128, torch.float16)
    key, value = (outliers(150, 2, 2, 1, 128, seed=i) for i in (0, 1))
    static = key[0].cuda(), value[0].cuda()
    caches[1].append(*static)  # compiles
    caches[1].free([0, 1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        caches[1].append(*static)
    caches[1].free([0, 1])
    for t in range(150):
        caches[0].append(key[t], value[t])
        static[0].copy_(key[t])
        static[1].copy_(value[t])
        graph.replay()
    assert caches[0].page_tokens.tolist() == [128, 128]
    for name in ("lengths", "page_tokens", "fault", "tail_key", "tail_value", "sink_key", "sink_value"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name).cpu()), name
    for one, other in zip(caches[0].groups, caches[1].groups, strict=True):
        assert torch.equal(one.pool, other.pool.cpu())
