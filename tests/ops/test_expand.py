"""Pages, tail, sinks and chunks written out in 16 bits, against the definition; memory that is not meant is NaN."""

from dataclasses import replace
from pathlib import Path

import caches
import pytest
import torch
from caches import normal, policy_of
from compile_kernels import rows_of
from torch import Tensor

pytest.importorskip("triton", reason="the kernel is written in Triton")

from turboattention.config import CacheConfig, TensorFormat
from turboattention.errors import InvalidInputError
from turboattention.ops.common.paged_kv import PagedKV
from turboattention.ops.prefill.expand import expand_with_chunk
from turboattention.policy import Override, Policy
from turboattention.quant.granularity import PerToken

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PREFIXES = (0, 1, 63, 64, 65, 300, 129)
CHUNKS = (3, 70, 1, 64, 0, 5, 130)


def paged(policy: Policy, prefixes: tuple[int, ...] = PREFIXES, head_dim: int = 64, kv_heads: int = 2) -> PagedKV:
    """Made on the CPU, whose append knows every format."""
    kv = caches.paged(policy, prefixes, head_dim=head_dim, kv_heads=kv_heads).view()
    groups = tuple(replace(g, pool=g.pool.to(DEVICE), table=g.table.to(DEVICE)) for g in kv.groups)
    tensors = (kv.lengths, kv.page_tokens, kv.tail_key, kv.tail_value, kv.sink_key, kv.sink_value)
    return PagedKV(groups, *(None if x is None else x.to(DEVICE) for x in tensors))


def written(kv: PagedKV, implementation: str, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim = kv.tail_key.shape[1], kv.tail_key.shape[3]
    packed = normal(2, sum(CHUNKS), heads, 2 * dim, seed=5).to(DEVICE, dtype)
    key, value = packed[..., :dim]  # as a model's slices of one product
    cu = torch.tensor((0, *CHUNKS)).cumsum(0).int().to(DEVICE)
    keys, values, cu_k = expand_with_chunk(
        kv, key, value, cu, total=sum(PREFIXES) + sum(CHUNKS) + 9, longest=310, implementation=implementation
    )
    end = int(cu_k[-1])
    assert end == sum(PREFIXES) + sum(CHUNKS)
    return keys[:end], values[:end], cu_k


def assert_like_the_definition(kv: PagedKV, dtype: torch.dtype = torch.float16) -> None:
    want_key, want_value, want_cu = written(kv, "reference", dtype)
    got_key, got_value, got_cu = written(kv, "triton", dtype)
    assert torch.equal(got_cu, want_cu)
    # Two ways to round one product and one sum in float32, then once to 16 bits.
    step = torch.finfo(dtype).eps
    for got, want in ((got_key, want_key), (got_value, want_value)):
        assert got.isfinite().all()
        assert ((got.float() - want.float()).abs() <= step * want.float().abs() + 1e-4).all()


@pytest.mark.parametrize("preset", ["int8", "turbo4", "turbo3", "turbo2"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_presets(preset: str, head_dim: int):
    assert_like_the_definition(paged(policy_of(preset, sinks=2), head_dim=head_dim))


def test_head_dim_256_and_bfloat16():
    assert_like_the_definition(paged(policy_of("turbo4"), head_dim=256), torch.bfloat16)


def test_asymmetric_rotated_values_symmetric_keys_and_no_sinks():
    value = TensorFormat(2, PerToken(), rotate=True)
    stored = CacheConfig(key=TensorFormat(4, symmetric=True), value=value, sink_tokens=0)
    assert_like_the_definition(paged(replace(Policy.resolve("turbo4"), cache=stored)))


def test_values_that_are_not_rotated():
    stored = CacheConfig(key=TensorFormat(2), value=TensorFormat(3, PerToken()), sink_tokens=1)
    assert_like_the_definition(paged(replace(Policy.resolve("turbo4"), cache=stored)))


def test_heads_with_different_bits():
    overrides = (Override(2, head=0), Override(8, head=1))
    assert_like_the_definition(paged(policy_of("turbo4", overrides=overrides), kv_heads=3))


def test_rows_of_an_engine():
    kv = paged(policy_of("turbo4"))
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(1))[: len(PREFIXES)].to(DEVICE)

    def spread(x: Tensor) -> Tensor:
        wide = torch.full((9, *x.shape[1:]), torch.nan, dtype=x.dtype, device=DEVICE)
        wide[rows] = x
        return wide

    assert kv.sink_key is not None
    assert kv.sink_value is not None
    other = PagedKV(
        kv.groups, kv.lengths, kv.page_tokens, spread(kv.tail_key), spread(kv.tail_value), spread(kv.sink_key),
        spread(kv.sink_value), rows.int(), rows.int(),
    )  # fmt: skip
    for got, want in zip(written(other, "triton"), written(kv, "triton"), strict=True):
        assert torch.equal(got, want)
    assert_like_the_definition(other)


def test_bad_shapes_are_named():
    kv = paged(policy_of("turbo4"), (64, 3))
    key = torch.zeros(4, 2, 64, device=DEVICE)
    with pytest.raises(InvalidInputError, match="key, value"):
        expand_with_chunk(kv, key, key[:3], torch.zeros(3, dtype=torch.int32), total=9, longest=9)
    with pytest.raises(InvalidInputError, match="cu_q"):
        expand_with_chunk(kv, key, key, torch.zeros(4, dtype=torch.int32), total=9, longest=9)


def test_compiles_for_gpus():
    rows = rows_of(Path(__file__).with_name("expand_variants.py"))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    assert [row["name"] for row in rows if row["spills"]] == []
