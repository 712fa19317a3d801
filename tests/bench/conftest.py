"""Decode by the definition instead of a kernel, for tests of the benchmark itself."""

import pytest
from exact_decode import exact_decode

from turboattention.bench import adapters


@pytest.fixture
def decode_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "decode", exact_decode)
