"""A random Llama of two layers with two KV heads, and two texts of random words."""

import random
from pathlib import Path

import pytest
from tiny import CONTEXT, character_tokenizer, tiny_llama

from turboattention.integrations.models import LoadedModel


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_llama(heads=4, kv_heads=2, spread=0.15), character_tokenizer(), "tiny", CONTEXT)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    generator = random.Random(7)
    words = ["quick", "brown", "fox", "lazy", "dog", "jumps", "over", "the", "and", "then", "it", "does"]
    paths = []
    for name in ("first.txt", "second.txt"):
        paths.append(tmp_path / name)
        paths[-1].write_text(" ".join(generator.choice(words) for _ in range(900)), encoding="utf-8")
    return paths
