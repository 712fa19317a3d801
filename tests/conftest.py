"""Fixtures for all tests: fixed seeds, NaN in uninitialised memory for operators and caches, skips of GPU tests."""

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# Before any test imports transformers: no test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests side by side (pytest-xdist): one thread each, or they and the programs that they start wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Without a GPU kernels run in Triton's interpreter, which must be chosen before any of them is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run; no deadline, because machines share their cores.
settings.register_profile("turboattention", derandomize=True, deadline=None)
settings.load_profile("turboattention")

TESTS = Path(__file__).parent
NAN_MEMORY = (TESTS / "ops", TESTS / "kvcache", TESTS / "cpu")


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: tests that collect garbage need not look through it each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU and torch sees none on this machine")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch and random for every test, so that a failure repeats when the test runs alone."""
    torch.manual_seed(0)
    random.seed(0)
    return 0


@pytest.fixture(autouse=True)
def nan_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised floats with NaN under tests/ops and tests/kvcache, so that a missed store fails at once."""
    if not any(folder in request.path.parents for folder in NAN_MEMORY):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))


def _filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        out = allocate(*args, **kwargs)
        if out.is_floating_point() and not out.is_meta:
            with torch.no_grad():
                out.fill_(torch.nan)
        return out

    return wrapper
