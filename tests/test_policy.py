"""Policies: files written and read back, everything that can be wrong with one, and what overrides mean."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import turboattention as ta
from turboattention.config import AttentionConfig, presets
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.policy import ModelShape, Override, Policy

SHAPE = ModelShape("llama", 4, 2, 64)
FULL = replace(
    Policy.from_preset("turbo3"),
    name="llama-small",
    overrides=(Override(8, layer=0), Override(2, layer=3, head=1, tensor="value"), Override(16, head=0, tensor="key")),
    model=SHAPE,
    provenance={"texts": ["a", "b"], "kl": 0.01, "tokens": 2048},
)


@pytest.mark.parametrize("name", list(presets()))
def test_round_trip_of_presets(name: str, tmp_path: Path):
    policy = Policy.from_preset(name)
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    assert [x.name for x in tmp_path.iterdir()] == ["policy.json"]


def test_round_trip_of_everything(tmp_path: Path):
    FULL.save(tmp_path / "policy.json")
    assert Policy.load(str(tmp_path / "policy.json")) == FULL
    data = json.loads((tmp_path / "policy.json").read_text())
    assert data["turboattention_policy"] == 1
    assert data["overrides"][0] == {"bits": 8, "layer": 0, "head": None, "tensor": "both"}
    assert data["model"] == {"model_type": "llama", "layers": 4, "kv_heads": 2, "head_dim": 64}


def test_overrides_of_other_fields_of_a_format(tmp_path: Path):
    refined = Override(2, layer=1, tensor="key", search=True, refined_share=0.25, refined_bits=2)
    policy = replace(FULL, overrides=(Override(16), refined, Override(4, layer=1, tensor="value", search=False)))
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    key, value = policy.head_formats(1, 2)[0]
    assert key == replace(policy.cache.key, bits=2, search=True, refined_share=0.25, refined_bits=2)
    assert value == replace(policy.cache.value, bits=4, search=False)
    assert [fmt.bits for fmt in policy.head_formats(0, 2)[0]] == [16, 16]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search": 1}, "override search: expected a value as in a format, or null to leave it, received 1"),
        ({"refined_share": "a"}, "override refined_share: expected a value as in a format"),
        ({"refined_bits": True}, "override refined_bits: expected a value as in a format"),
        ({"refined_bits": 2}, "override tensor: expected 'key' with refined channels, received 'both'"),
    ],
)
def test_overrides_with_wrong_fields(fields: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError, match=message):
        Override(2, **fields)


def test_round_trip_of_chunk_bits(tmp_path: Path):
    policy = replace(FULL, attention=AttentionConfig(chunk_bits=8))
    policy.save(tmp_path / "policy.json")
    assert json.loads((tmp_path / "policy.json").read_text())["attention"]["chunk_bits"] == 8
    assert Policy.load(tmp_path / "policy.json") == policy
    path = edited(tmp_path, lambda d: d["attention"].pop("chunk_bits"))
    assert Policy.load(path).attention.chunk_bits == 16


def test_chunk_bits_need_a_head_dim_that_a_kernel_has():
    policy = replace(Policy.from_preset("fp16"), attention=AttentionConfig(chunk_bits=8))
    policy.validate_for(SHAPE)
    with pytest.raises(UnsupportedError, match=r"^policy 'fp16': chunk_bits 8 needs a head_dim of 64, .* not 32; use"):
        policy.validate_for(replace(SHAPE, head_dim=32))


def test_save_replaces_a_file_whole(tmp_path: Path):
    path = tmp_path / "policy.json"
    path.write_text("x" * 100_000)
    FULL.save(path)
    assert Policy.load(path) == FULL


def test_missing_optional_fields_take_their_defaults(tmp_path: Path):
    path = edited(tmp_path, lambda d: [d.pop(k) for k in ("attention", "overrides", "model", "provenance")])
    assert Policy.load(path) == Policy.from_preset("turbo3").__class__("llama-small", FULL.cache)


# --- files that can't be read ---


def edited(folder: Path, change: Callable[[dict[str, Any]], Any], policy: Policy = FULL) -> Path:
    policy.save(folder / "good.json")
    data = json.loads((folder / "good.json").read_text())
    change(data)
    (folder / "edited.json").write_text(json.dumps(data))
    return folder / "edited.json"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, share: float):
    FULL.save(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    (tmp_path / "cut.json").write_text(text[: int(share * len(text))])
    with pytest.raises(
        InvalidInputError, match=r"^policy file: expected JSON, received .*cut.json: .*the file may be truncated$"
    ):
        Policy.load(tmp_path / "cut.json")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 10], ids=["not-utf8", "zeros"])
def test_binary_file(tmp_path: Path, content: bytes):
    (tmp_path / "binary.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"^policy file: expected JSON"):
        Policy.load(tmp_path / "binary.json")


def test_absent_file_and_folder(tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"^policy file: expected a readable file, received .*No such file"):
        Policy.load(tmp_path / "nowhere.json")
    with pytest.raises(InvalidInputError, match=r"^policy file: expected a readable file, received .*Is a directory"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"turbo4"', "{}"])
def test_json_that_is_no_policy(tmp_path: Path, text: str):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InvalidInputError, match=r'^policy file: expected "turboattention_policy": 1'):
        Policy.load(tmp_path / "other.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_wrong_version(tmp_path: Path, version: object):
    path = edited(tmp_path, lambda d: d.update(turboattention_policy=version))
    with pytest.raises(
        InvalidInputError, match=r'^policy file: expected "turboattention_policy": 1, received .*edited'
    ):
        Policy.load(path)


def cache_key(d: dict[str, Any]) -> dict[str, Any]:
    return d["cache"]["key"]


WRONG = {
    "unknown-key": (lambda d: d.update(bits=4), "policy: expected the keys name, cache, .* received 'bits'"),
    "unknown-cache-key": (lambda d: d["cache"].update(pagesize=4), "cache: expected the keys .* received 'pagesize'"),
    "unknown-format-key": (lambda d: cache_key(d).update(bit=4), "cache.key: expected the keys .* received 'bit'"),
    "unknown-attention-key": (lambda d: d["attention"].update(x=1), "attention: expected the keys .* received 'x'"),
    "unknown-override-key": (
        lambda d: d["overrides"][1].update(heads=1),
        r"overrides\[1\]: expected the keys .* received 'heads'",
    ),
    "unknown-model-key": (lambda d: d["model"].update(x=1), "model: expected the keys .* received 'x'"),
    "no-cache": (lambda d: d.pop("cache"), "cache: expected an object, received NoneType"),
    "no-key-format": (lambda d: d["cache"].pop("key"), "cache.key: expected an object, received NoneType"),
    "no-bits": (lambda d: cache_key(d).pop("bits"), "bits"),
    "no-name": (lambda d: d.pop("name"), "name"),
    "cache-is-a-list": (lambda d: d.update(cache=[]), "cache: expected an object, received list"),
    "bits-as-text": (lambda d: cache_key(d).update(bits="4"), "cache.key.bits: expected a value of type int"),
    "bits-as-bool": (lambda d: cache_key(d).update(bits=True), "cache.key.bits: expected a value of type int"),
    "bits-as-float": (lambda d: cache_key(d).update(bits=4.0), "cache.key.bits: expected a value of type int"),
    "bits-of-5": (lambda d: cache_key(d).update(bits=5), "bits: expected one of 2, 3, 4, 8, 16, received 5"),
    "rotate-as-int": (lambda d: cache_key(d).update(rotate=1), "cache.key.rotate: expected a value of type bool"),
    "name-as-int": (lambda d: d.update(name=4), "policy.name: expected a value of type str, received 4"),
    "page-size": (lambda d: d["cache"].update(page_size=48), "page_size: expected 32, 64 or 128 tokens, received 48"),
    "metadata": (
        lambda d: cache_key(d).update(metadata="int4"),
        "cache.key.metadata: expected one of two_level, float16, flashq, received 'int4'",
    ),
    "metadata-without-granularity": (
        lambda d: (cache_key(d).pop("granularity"), cache_key(d).update(metadata="int4")),
        "metadata: expected one of two_level, float16, flashq, received 'int4'",
    ),
    "open-page": (lambda d: d["cache"].update(open_page="x"), "cache.open_page: expected one of exact, int8_clamped"),
    "low-bits": (lambda d: d["cache"].update(low_bits=5), "low_bits: expected"),
    "softmax": (lambda d: d["attention"].update(softmax="x"), "attention.softmax: expected one of exact, base2, sas"),
    "query-bits": (lambda d: d["attention"].update(query_bits=4), "attention.query_bits: expected one of 8, 16"),
    "chunk-bits": (lambda d: d["attention"].update(chunk_bits=4), "attention.chunk_bits: expected one of 8, 16"),
    "chunk-bits-with-sas": (
        lambda d: d["attention"].update(chunk_bits=8, softmax="sas"),
        "chunk_bits 8: expected softmax 'exact' and 16 bits of Q and P, received softmax sas",
    ),
    "granularity-kind": (
        lambda d: cache_key(d).update(granularity={"kind": "per_head"}),
        "cache.key.granularity.kind: expected one of per_token, per_channel, per_group, per_block, received 'per_head'",
    ),
    "granularity-as-text": (lambda d: cache_key(d).update(granularity="per_token"), "cache.key.granularity"),
    "granularity-kind-as-list": (
        lambda d: cache_key(d).update(granularity={"kind": [1]}),
        "cache.key.granularity|fields",
    ),
    "group-size-missing": (lambda d: d["cache"]["value"].update(granularity={"kind": "per_group"}), "size"),
    "group-size-of-0": (
        lambda d: d["cache"]["value"].update(granularity={"kind": "per_group", "size": 0}),
        "size: expected",
    ),
    "attention-as-list": (lambda d: d.update(attention=[1]), "attention|fields that Policy.save writes"),
    "attention-as-null": (lambda d: d.update(attention=None), "attention|fields that Policy.save writes"),
    "overrides-as-int": (lambda d: d.update(overrides=3), "overrides|fields that Policy.save writes"),
    "override-bits": (lambda d: d["overrides"][0].update(bits=7), "override bits: expected one of 2, 3, 4, 8, 16"),
    "override-tensor": (lambda d: d["overrides"][0].update(tensor="q"), "override tensor: expected 'key', 'value' or"),
    "override-negative": (lambda d: d["overrides"][0].update(layer=-1), "override layer: expected 0 or more"),
    "override-layer-as-float": (lambda d: d["overrides"][0].update(layer=1.5), "layer"),
    "override-layer-as-text": (lambda d: d["overrides"][0].update(layer="a"), "layer|fields that Policy.save writes"),
    "provenance-as-text": (lambda d: d.update(provenance="x"), "provenance"),
    "model-as-text": (lambda d: d.update(model="llama"), "model: expected an object, received str"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_content(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str):
    path = edited(tmp_path, change)
    with pytest.raises(InvalidInputError, match=rf"^policy file.*({message})") as error:
        Policy.load(path)
    assert "edited.json" in str(error.value)
    assert "\n" not in str(error.value)


# --- paths that can't be written ---


def test_unwritable_path(tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"^policy path: expected a writable file, received .*No such file"):
        FULL.save(tmp_path / "nowhere" / "policy.json")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match=r"^policy path: expected a writable file, received .*Not a directory"):
        FULL.save(tmp_path / "file" / "policy.json")
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_path_of_a_folder_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInputError, match=r"^policy path: expected a writable file, received .*Is a directory"):
        FULL.save(tmp_path / "folder")
    assert [x.name for x in tmp_path.iterdir()] == ["folder"]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    FULL.save(tmp_path / "policy.json")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InvalidInputError, match=r"^policy path: expected a writable file, received .*No space left"):
        Policy.from_preset("turbo4").save(tmp_path / "policy.json")
    monkeypatch.undo()
    assert [x.name for x in tmp_path.iterdir()] == ["policy.json"]
    assert Policy.load(tmp_path / "policy.json") == FULL


def test_provenance_that_is_no_json(tmp_path: Path):
    with pytest.raises(InvalidInputError, match="provenance"):
        replace(FULL, provenance={"when": object()}).save(tmp_path / "policy.json")
    assert list(tmp_path.iterdir()) == []


# --- policies for a model ---


def test_policy_fits_its_model():
    FULL.validate_for(SHAPE)
    Policy.from_preset("turbo4").validate_for(SHAPE)


@pytest.mark.parametrize(
    "change", [{"layers": 5}, {"kv_heads": 4}, {"head_dim": 128}, {"model_type": "qwen2"}], ids=str
)
def test_policy_for_another_model(change: dict[str, Any]):
    with pytest.raises(
        InvalidInputError, match=r"^policy: expected a model like .*; calibrate a policy for this model$"
    ):
        FULL.validate_for(replace(SHAPE, **change))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (Override(4, layer=4), "^override layer: expected below 4, received 4$"),
        (Override(4, layer=0, head=2), "^override head: expected below 2, received 2$"),
    ],
    ids=["layer", "head"],
)
def test_override_beyond_the_model(override: Override, message: str):
    with pytest.raises(InvalidInputError, match=message):
        replace(Policy.from_preset("turbo4"), overrides=(override,)).validate_for(SHAPE)


@pytest.mark.parametrize("head_dim", [32, 60, 112, 512])
def test_head_dim_that_no_page_holds(head_dim: int):
    shape = replace(SHAPE, head_dim=head_dim)
    with pytest.raises(
        InvalidInputError,
        match=f"^head_dim: expected one of 64, 80, 96, 128, 256, received {head_dim}; use preset 'fp16'",
    ):
        Policy.from_preset("turbo4").validate_for(shape)
    Policy.from_preset("fp16").validate_for(shape)


@pytest.mark.parametrize(("head_dim", "fits"), [(64, True), (80, False), (96, True), (128, True), (256, True)])
def test_groups_of_kivi_divide_head_dim(head_dim: int, fits: bool):
    policy, shape = Policy.from_preset("kivi4"), replace(SHAPE, head_dim=head_dim)
    if fits:
        policy.validate_for(shape)
        return
    with pytest.raises(UnsupportedError, match=r"^policy 'kivi4': groups of 32 channels .*head_dim 80$"):
        policy.validate_for(shape)


def test_overrides_apply_in_order_to_what_they_name():
    policy = replace(
        Policy.from_preset("turbo4"),
        overrides=(
            Override(8, layer=1),
            Override(2, layer=1, head=0, tensor="value"),
            Override(3, head=1, tensor="key"),
        ),
    )
    bits = [[(k.bits, v.bits) for k, v in policy.head_formats(layer, 3)] for layer in (0, 1)]
    assert bits == [[(4, 4), (3, 4), (4, 4)], [(8, 2), (3, 8), (8, 8)]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 6}, "override bits: expected one of 2, 3, 4, 8, 16, received 6"),
        ({"bits": 4, "tensor": "keys"}, "override tensor: expected 'key', 'value' or 'both', received 'keys'"),
        ({"bits": 4, "layer": -1}, "override layer: expected 0 or more, or null for all, received -1"),
        ({"bits": 4, "head": -2}, "override head: expected 0 or more, or null for all, received -2"),
    ],
    ids=["bits", "tensor", "layer", "head"],
)
def test_override_checks_its_fields(arguments: dict[str, Any], message: str):
    with pytest.raises(InvalidInputError, match=f"^{message}$"):
        Override(**arguments)


def test_resolve_takes_names_presets_and_policies():
    assert Policy.resolve("turbo4") == Policy.from_preset("turbo4") == Policy.from_preset(presets()["turbo4"])
    assert Policy.resolve(FULL) is FULL
    assert ta.Policy is Policy
    with pytest.raises(InvalidInputError, match=r"^preset: expected one of fp16"):
        Policy.from_preset("turbo")


def test_resolve_refuses_anything_else():
    with pytest.raises(InvalidInputError, match=r"^policy: expected"):
        Policy.resolve(4)
