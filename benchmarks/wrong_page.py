"""What damage to a page does to attention: relative RMS error of a decode step, and whether a checksum sees it.

    python benchmarks/wrong_page.py --preset turbo4 --tokens 4096

One bit (or a whole page) of one head of one sequence is changed in each of 200 random places; the error is that of the
head's output against the undamaged cache (the definition, float32), in median and worst. The first row is what the
codes of the preset cost against exact K and V, for comparison.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from turboattention.config import get_preset
from turboattention.errors import IntegrityError
from turboattention.kvcache.paged import PagedCache
from turboattention.ops.decode import paged_decode

HEADS, DIM, TRIALS = 2, 128, 200
REGIONS = (
    "key_codes", "value_codes", "key_page_scale", "key_scale", "key_page_zero", "key_zero", "value_page_scale",
    "value_scale", "key_refined_index", "key_refined_codes",
)  # fmt: skip


def relative(found: Tensor, good: Tensor) -> float:
    """NaN and infinity count as infinite errors."""
    error = float((found - good).double().square().mean().sqrt() / good.double().square().mean().sqrt())
    return error if error == error else float("inf")


def main() -> None:
    """Parse arguments, damage, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="turbo4")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    config = get_preset(arguments.preset).cache
    random = torch.Generator().manual_seed(0)
    cache = PagedCache(
        config, [(config.key, config.value)] * HEADS, rows=2, max_tokens=arguments.tokens, head_dim=DIM, shuffle=1,
        integrity="demand",
    )  # fmt: skip
    key, value = (torch.randn(2, HEADS, arguments.tokens, DIM, generator=random) for _ in range(2))
    key[..., 3] = 8 * key[..., 3] + 5
    cache.append(key, value, when="after")
    q = torch.randn(2, HEADS, 1, DIM, generator=random)

    def attention() -> Tensor:
        return paged_decode(q, cache.view(), implementation="reference").out[1, 0]

    exact = torch.nn.functional.scaled_dot_product_attention(q, key, value)[1, 0]
    good, group = attention(), cache.groups[0]
    pages = int(cache.page_tokens[1]) // config.page_size

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=random))

    def flipped(name: str) -> Callable[[], None]:
        def change() -> None:
            region = group.layout.regions[name]
            place = int(group.table[1, 0, number(pages)])
            where = (place, region.offset + number(region.nbytes))
            group.pool[where] ^= 1 << number(8)

        return change

    def pointed_elsewhere() -> None:
        where = (1, 0, number(pages))
        group.table[where] = group.table[0, 0, number(pages)]

    kinds = {f"one bit of {name}": flipped(name) for name in REGIONS if name in group.layout.regions}
    kinds["table entry: a page of another sequence"] = pointed_elsewhere
    print(f"{arguments.preset}, {arguments.tokens} tokens, head_dim {DIM}: error median, worst; found by checksums")
    print(f"no damage, against exact K and V: {relative(good, exact):.2e}")
    pool, table = group.pool.clone(), group.table.clone()
    for kind, change in kinds.items():
        errors, found, refused = [], 0, 0
        for _ in range(TRIALS):
            change()
            try:
                errors.append(relative(attention(), good))
            except RuntimeError:  # a refined channel beyond head_dim; kernels do not look
                refused += 1
            try:
                cache.verify()
            except IntegrityError:
                found += 1
            group.pool.copy_(pool)
            group.table.copy_(table)
        errors.sort()
        failed = f"; {refused} fail in the definition" if refused else ""
        print(f"{kind}: {errors[len(errors) // 2]:.1e}, {errors[-1]:.1e}; {found} of {TRIALS}{failed}")


if __name__ == "__main__":
    main()
