"""Checksums of pages: each kind of damage is injected, and found; and what it would do to attention."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from turboattention.config import get_preset
from turboattention.errors import IntegrityError, InvalidInputError
from turboattention.kvcache import LayerCache
from turboattention.kvcache.integrity import Integrity, checksum
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.decode import paged_decode

ROWS, HEADS, DIM, TOKENS = 2, 2, 64, 200
CONFIG = get_preset("turbo4").cache
FORMATS = [(CONFIG.key, CONFIG.value)] * HEADS


def paged(integrity: Integrity = "demand") -> PagedCache:
    """Two rows of three pages and 8 exact tokens."""
    cache = PagedCache(CONFIG, FORMATS, rows=ROWS, max_tokens=256, head_dim=DIM, shuffle=1, integrity=integrity)
    random = torch.Generator().manual_seed(0)
    key, value = (torch.randn(ROWS, HEADS, TOKENS, DIM, generator=random) for _ in range(2))
    cache.append(key, value, when="after")
    return cache


def place_of(cache: PagedCache, row: int, head: int, page: int) -> int:
    return int(cache.groups[0].table[row, head, page])


def flip(cache: PagedCache, region: str, bit: int = 0, byte: int = 0) -> None:
    """One bit of the second page of row 1, head 0."""
    group = cache.groups[0]
    group.pool[place_of(cache, 1, 0, 1), group.layout.regions[region].offset + byte] ^= 1 << bit


def swap(cache: PagedCache) -> None:
    cache.groups[0].table[1, 0, 1] = place_of(cache, 0, 0, 1)


def outside(cache: PagedCache) -> None:
    cache.groups[0].table[1, 0, 1] = 2**30


def copied_page(cache: PagedCache) -> None:
    cache.groups[0].pool[place_of(cache, 1, 0, 1)] = cache.groups[0].pool[place_of(cache, 0, 0, 1)]


def use_after_free(cache: PagedCache) -> None:
    length, pages = int(cache.lengths[1]), int(cache.page_tokens[1])
    cache.free([1])
    cache.lengths[1], cache.page_tokens[1] = length, pages


def write_after_free(cache: PagedCache) -> None:
    cache.free([1])
    flip(cache, "value_codes", 3)


def longer(cache: PagedCache) -> None:
    cache.page_tokens[1] += 64


def shorter(cache: PagedCache) -> None:
    cache.page_tokens[1] -= 64


DAMAGE: dict[str, tuple[Callable[[PagedCache], None], str]] = {
    **{
        region: (lambda cache, region=region: flip(cache, region), r"row 1, head 0, page 1 \(place \d+\): other bytes")
        for region in ("key_codes", "value_codes", "key_page_scale", "key_scale", "key_zero", "value_page_scale",
                       "value_scale", "refined")
    },
    "another-page": (copied_page, r"row 1, head 0, page 1 \(place \d+\): other bytes"),
    "table-entry-of-another": (swap, r"row 1, head 0, page 1: in place \d+ of the pool, written to \d+"),
    "table-entry-outside": (outside, "row 1, head 0, page 1: in place 1073741824 of the pool"),
    "used-after-free": (use_after_free, "row 1, head 0, page 0: read, but never written or freed"),
    "written-after-free": (write_after_free, r"a page of nobody \(place \d+\): other bytes"),
    "length-too-long": (longer, "row 1, head 0, page 3: read, but never written or freed"),
    "length-too-short": (shorter, "row 1, head 0, page 2: written, but the length ends before it"),
}  # fmt: skip


def damage(cache: PagedCache, name: str) -> str:
    """Do it; returns what the message must hold."""
    change, message = DAMAGE[name]
    if name == "refined":
        flip(cache, "key_refined_index")
    else:
        change(cache)
    return message


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str):
    cache = paged()
    cache.verify()
    message = damage(cache, name)
    with pytest.raises(IntegrityError, match=message):
        cache.verify()


@pytest.mark.parametrize("name", ["value_scale", "table-entry-of-another", "used-after-free"])
def test_found_at_each_read_or_on_demand_or_not_at_all(name: str):
    for integrity in ("off", "demand"):
        cache = paged(integrity)
        damage(cache, name)
        cache.view()
    cache = paged("read")
    damage(cache, name)
    with pytest.raises(IntegrityError):
        cache.view()
    with pytest.raises(IntegrityError):  # before it adds to what is damaged
        cache.append(*torch.zeros(2, ROWS, HEADS, 1, DIM))


def test_every_bit_of_a_page():
    cache = paged()
    pool = cache.groups[0].pool
    place = place_of(cache, 0, 1, 2)
    good = checksum(pool[place])
    flipped = pool[place].repeat(8 * pool.shape[1], 1)
    for bit in range(8):
        flipped[bit::8] ^= torch.eye(pool.shape[1], dtype=torch.uint8) << bit
    assert not (checksum(flipped) == good).any()
    words = pool[place].view(torch.int32)
    exchanged = words.clone()
    exchanged[[3, 7]] = words[[7, 3]]
    assert checksum(exchanged.view(torch.uint8)) != good


def test_life_of_a_cache_is_no_damage():
    """Steps of both kinds, rows freed and used again, a row past its table: which is a fault, not damage."""
    cache = paged("read")
    random = torch.Generator().manual_seed(1)
    for step in range(90):
        key, value = (torch.randn(ROWS, HEADS, 1, DIM, generator=random) for _ in range(2))
        cache.append(key, value)
        if step == 20:
            cache.free([0])
    cache.append(*torch.randn(2, ROWS, HEADS, 150, DIM, generator=random), when="after")
    assert cache.fault.tolist() == [0, 4]  # no room
    cache.view()


def test_contiguous_cache():
    cache = LayerCache(CONFIG, FORMATS, integrity="read")
    cache.append(*torch.randn(2, ROWS, HEADS, TOKENS, DIM))
    cache.commit()
    other = LayerCache(CONFIG, FORMATS, integrity="read")
    other.load_state(cache.state())
    cache.map_batch(lambda x: x.flip(0))
    cache.crop(128)
    assert cache.view().page_tokens == 128
    cache.groups[0].pages[1, 0, 1, 5] ^= 4
    with pytest.raises(
        IntegrityError, match=r"pages: expected what was written, received row 1, head 0, page 1: other"
    ):
        cache.view()
    saved = other.state()
    saved["groups"][0]["pages"][0, 1, 2, 9] ^= 1  # a bit of a file
    other.load_state(saved)
    with pytest.raises(IntegrityError, match="row 0, head 1, page 2"):
        other.verify()


def test_state_of_a_cache_without_checksums():
    plain = LayerCache(CONFIG, FORMATS)
    plain.append(*torch.randn(2, ROWS, HEADS, TOKENS, DIM))
    plain.commit()
    assert not plain.checksums
    checked = LayerCache(CONFIG, FORMATS, integrity="demand")
    checked.load_state(plain.state())
    checked.verify()
    checked.groups[0].pages[0, 0, 0, 0] ^= 1
    with pytest.raises(IntegrityError):
        checked.verify()


@pytest.mark.parametrize("make", [lambda x: LayerCache(CONFIG, FORMATS, integrity=x), paged])
def test_unknown_mode_is_refused(make: Callable[[str], object]):
    with pytest.raises(InvalidInputError, match="integrity: expected one of off, demand, read, received 'always'"):
        make("always")


def error_of(change: Callable[[PagedCache], None]) -> float:
    """Relative RMS difference that the damage makes to one head's attention over 200 tokens."""
    q = torch.randn(ROWS, HEADS, 1, DIM, generator=torch.Generator().manual_seed(5))
    cache = paged()

    def attention() -> Tensor:
        return paged_decode(q, cache.view(), implementation="reference").out[1, 0].double()

    good = attention()
    change(cache)
    return float((attention() - good).square().mean().sqrt() / good.square().mean().sqrt())


def test_what_a_wrong_page_does():
    """Nothing fails by itself: a code's lowest bit is lost in the noise of 4 bits, the exponent of a scale is not."""
    bit_of_code = error_of(lambda cache: flip(cache, "key_codes"))
    exponent = error_of(lambda cache: flip(cache, "value_page_scale", bit=6, byte=1))
    wrong_page = error_of(swap)
    assert 0 < bit_of_code < 0.02
    assert wrong_page > 0.2
    assert exponent > 1
