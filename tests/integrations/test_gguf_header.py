"""Headers of GGUF files: what a good one may hold, and that no count or size of a bad one is believed."""

import random
import re
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboattention.errors import InvalidInputError
from turboattention.integrations.gguf_header import check_gguf
from turboattention.integrations.models import load_model


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def number(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


def array(name: str, kind: int, count: int, items: bytes) -> bytes:
    return text(name) + struct.pack("<IIQ", 9, kind, count) + items


def tensor(name: str, *dims: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


KEYS = [
    text("general.architecture") + struct.pack("<I", 8) + text("llama"),
    number("llama.block_count", 2),
    array("tokenizer.ggml.tokens", 8, 2, text("a") + text("bc")),
    array("tokenizer.ggml.scores", 6, 2, bytes(8)),
    text("llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
]
TENSORS = [tensor("token_embd.weight", 8, 2), tensor("blk.0.attn_q.weight", 8, 8), tensor("blk.1.attn_q.weight", 8, 8)]


def gguf(
    keys: list[bytes] = KEYS, tensors: list[bytes] = TENSORS, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    tensors_, keys_ = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", version, tensors_, keys_) + b"".join(keys + tensors) + bytes(64)


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(InvalidInputError) as error:
        check_gguf(path)
    assert time.perf_counter() - start < 2
    return str(error.value)


def test_a_good_header(tmp_path: Path) -> None:
    for version in (2, 3):
        (tmp_path / "x.gguf").write_bytes(gguf(version=version))
        check_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "magic: expected 4 bytes"),
        (b"GGML" + bytes(60), "magic"),
        (gguf(version=1), "version"),
        (gguf(counts=(3, 2**60)), "number of keys"),
        (gguf(counts=(2**60, 5)), "number of tensors"),
        (gguf(counts=(3, 4)), "tensor|type|name|dimensions"),
        # gguf.GGUFReader does not come back from this one: it reads the array on past the end of the file.
        (gguf([*KEYS, array("x", 0, 2**60, b"")]), "arrays of at most"),
        (gguf([*KEYS, array("x", 4, 2**20, b"")]), "end of the file"),
        (gguf([*KEYS, array("x", 8, 2**20, b"")]), "end of the file|bytes"),
        (gguf([*KEYS, array("x", 9, 1, array("", 4, 1, bytes(4)))]), "without arrays in them"),
        (gguf([*KEYS, text("x") + struct.pack("<IQ", 8, 2**63)]), "end of the file"),
        (gguf([*KEYS, text("x") + struct.pack("<I", 99)]), "a type of GGUF"),
        (gguf([*KEYS, KEYS[1]]), "once"),
        (gguf([struct.pack("<Q", 2**62)]), "at most 65536 bytes"),
        (gguf([*KEYS, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)]), "UTF-8"),
        (gguf([KEYS[0], number("llama.block_count", 2**31)]), "the 2 layers that have weights"),
        (gguf([KEYS[0], number("llama.embedding_length", 2**32 - 1)]), "at most 2147483648"),
        (gguf(tensors=[tensor("x", 2**40, 2**40)]), "elements"),
        (gguf(tensors=[tensor("x", 1, 1, 1, 1, 1)]), "4 dimensions"),
        (gguf(tensors=[tensor("x", 4, offset=2**60)]), "behind its end"),
    ],
)  # fmt: skip
def test_a_bad_header_is_refused_at_its_place(tmp_path: Path, content: bytes, words: str) -> None:
    message = refused(tmp_path / "x.gguf", content)
    assert re.search(words, message), message
    with pytest.raises(InvalidInputError, match="GGUF file"):
        load_model(tmp_path / "x.gguf")


@given(st.binary(max_size=200) | st.integers(0, 2**32))
def test_random_and_damaged_headers(tmp_path_factory: pytest.TempPathFactory, content: bytes | int) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    if isinstance(content, int):
        chance, data = random.Random(content), bytearray(gguf())
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(4, len(data))] = chance.choice((0, 1, 8, 9, 0x7F, 0xFF, chance.randrange(256)))
        content = bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
    path.write_bytes(content)
    start = time.perf_counter()
    with suppress(InvalidInputError):
        check_gguf(path)
    assert time.perf_counter() - start < 2


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and go on."""
    gguf_package = pytest.importorskip("gguf")
    import numpy as np

    path = tmp_path / "half.gguf"
    writer = gguf_package.GGUFWriter(str(path), "llama")
    for name, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 32),
                        ("feed_forward_length", 64),
                        ("head_count", 2), ("head_count_kv", 2), ("vocab_size", 4)):  # fmt: skip
        writer.add_uint32(f"llama.{name}" if "head" not in name else f"llama.attention.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_token_scores([0.0] * 4)
    writer.add_token_types([2, 3, 3, 1])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidInputError, match=r"every tensor of the model, received .* absent"):
        load_model(path)
