"""The command line of vLLM's server that ``turboattention serve`` runs; needs no vLLM."""

import json
import os
from pathlib import Path

import pytest

from turboattention.cli.main import main
from turboattention.config import get_preset
from turboattention.errors import InvalidInputError, UnsupportedError
from turboattention.integrations.vllm.serving import serve_arguments
from turboattention.policy import Override, Policy


def test_default():
    found = serve_arguments("m", None, None, ["--port", "8001"])
    assert found == [
        "serve", "m", "--attention-backend", "TURBO_ATTENTION", "--kv-cache-dtype", "turbo_int4", "--block-size", "64",
        "--port", "8001",
    ]  # fmt: skip


@pytest.mark.parametrize(("preset", "dtype"), [("turbo4", "turbo_int4"), ("turbo2", "turbo_int2")])
def test_presets_with_a_dtype_of_their_own(preset: str, dtype: str):
    assert dtype in serve_arguments("m", preset, None, [])


def test_other_presets_and_files_join_the_additional_configuration(tmp_path: Path):
    file = tmp_path / "policy.json"
    Policy("mine", get_preset("turbo2").cache).save(file)
    found = serve_arguments("m", None, file, ['--additional-config={"a": 1}'])
    assert json.loads(found[-1]) == {"a": 1, "turboattention": {"policy": str(file)}}
    assert json.loads(serve_arguments("m", "int8", None, [])[-1]) == {"turboattention": {"policy": "int8"}}


def test_layers_at_16_bits_become_the_skip_list(tmp_path: Path):
    file = tmp_path / "policy.json"
    Policy("mine", get_preset("turbo4").cache, overrides=(Override(16, layer=3), Override(16, layer=0))).save(file)
    found = serve_arguments("m", None, file, ["--port", "1"])
    first = found.index("--kv-cache-dtype-skip-layers")
    assert found[first + 1 : first + 3] == ["0", "3"]
    assert found[-2:] == ["--port", "1"]
    with pytest.raises(InvalidInputError, match="kv-cache-dtype-skip-layers"):
        serve_arguments("m", None, file, ["--kv-cache-dtype-skip-layers", "1"])


def test_a_dtype_of_ours_is_passed_on():
    found = serve_arguments("m", None, None, ["--kv-cache-dtype", "turbo_k4v2", "--port", "1"])
    assert found[found.index("--kv-cache-dtype") + 1] == "turbo_k4v2"
    assert found[-2:] == ["--port", "1"]


@pytest.mark.parametrize(
    "options",
    [["--attention-backend", "X"], ["--block-size=16"], ["--kv-cache-dtype", "fp8"], ["--kv-cache-dtype"],
     ["--additional-config", "{"], ["--additional-config", '{"turboattention": {}}']],
)  # fmt: skip
def test_options_that_do_not_fit(options: list[str]):
    with pytest.raises(InvalidInputError, match=options[0].split("=")[0]):
        serve_arguments("m", None, None, options)


def test_preset_or_policy():
    with pytest.raises(InvalidInputError, match="both"):
        serve_arguments("m", "turbo4", Path("x"), [])


def test_presets_that_engines_cannot_hold():
    with pytest.raises(UnsupportedError, match="paper4"):
        serve_arguments("m", "paper4", None, [])


def test_command_line_shows_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "m", "--preset", "turbo2", "--show", "--max-num-seqs", "7"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["vllm", "serve", "m"]


def test_the_server_and_its_workers_share_a_folder_of_metrics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turboattention.cli.serve.find_spec", lambda name: object())
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, arguments: started.append(arguments))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert main(["serve", "m", "--port", "1"]) == 0
    folder = Path(os.environ.pop("PROMETHEUS_MULTIPROC_DIR"))
    assert not list(folder.iterdir())
    folder.rmdir()
    assert started[0][1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "m"]
