"""Bad input: one line on stderr, exit status 2, no traceback, no partial files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from turboattention.cli.main import main
from turboattention.policy import ModelShape, Policy


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error line of a command that has to fail."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--preset", "turbo5"], "preset: expected one of fp16, int8, turbo4"),
        (["generate", "--prompt", "x", "--preset", "turbo5"], "preset: expected one of"),
        (["compare", "--preset", "turbo4", "--preset", "turbo4"], "each name once, received turbo4"),
        (["compare", "--tokens", "many"], "--tokens"),
        (["compare", "--tokens", "0"], "--tokens: expected at least"),
        (["compare", "--tokens", "-5"], "--tokens: expected at least"),
        (["compare", "--seed", "-1"], "--seed"),
        (["compare", "--dtype", "int4"], "--dtype"),
        (["compare", "--device", "tpu"], "--device"),
        (["compare", "--text", "no-such-file.txt"], "text: expected"),
        (["compare", "--policy", "no-such-file.json"], "policy file: expected a readable file"),
        (["compare", "--model", "no-such-model"], "model: expected one of smollm2-135m"),
        (["compare", "--colour", "red"], "No such option"),
        (["measure"], "No such command 'measure'"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", " "], "--prompt: expected text"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "--prompt", "x", "--preset", "turbo4", "--policy", "p.json"], "expected --preset or --policy"),
        (["doctor", "--html", "x"], "No such option"),
    ],
)
def test_mistakes_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("turboattention.integrations.models.load_model", load)
    nowhere = tmp_path / "missing" / "out"
    fails(capsys, "compare", "--preset", "turbo5")
    fails(capsys, "compare", "--tokens", "1")
    fails(capsys, "compare", "--text", tmp_path)
    for verb in (["compare"], ["generate", "--prompt", "x"], ["doctor"]):
        assert "output path: expected" in fails(capsys, *verb, "--json", nowhere)
    assert "output path: expected" in fails(capsys, "compare", "--html", tmp_path)
    assert "different files" in fails(capsys, "compare", "--json", tmp_path / "a", "--html", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    line = fails(capsys, "compare", "--model", tiny_model, "--text", text, "--html", tmp_path / "out.html")
    assert "tokens" in line
    assert list(tmp_path.iterdir()) == [text]


def test_a_text_that_is_not_utf8(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9")
    assert "expected a UTF-8 text file" in fails(capsys, "compare", "--text", text)


def test_tokens_beyond_the_context(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    line = fails(capsys, "compare", "--model", tiny_model, "--tokens", "512", "--json", tmp_path / "out.json")
    assert "tokens: expected at most 511" in line
    line = fails(capsys, "generate", "--model", tiny_model, "--prompt", "x" * 500, "--max-new-tokens", "13")
    assert "at most 512 tokens together" in line
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_policy_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    Policy.from_preset("turbo4").save(path)
    text = path.read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:length])
        assert "policy file" in fails(capsys, "compare", "--policy", path)
    data = json.loads(text)
    del data["cache"]
    path.write_text(json.dumps(data))
    assert "policy file" in fails(capsys, "compare", "--policy", path)


def test_a_policy_for_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "policy.json"
    preset = Policy.from_preset("turbo4")
    Policy("mine", preset.cache, model=ModelShape("llama", 30, 3, 64)).save(path)
    rest = ["--model", tiny_model, "--policy", path]
    line = fails(capsys, "compare", *rest, "--tokens", "128", "--json", tmp_path / "out.json")
    assert "policy: expected a model like" in line
    assert "policy: expected a model like" in fails(capsys, "generate", *rest, "--prompt", "x")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "model: expected" in fails(capsys, "compare", "--model", tmp_path)


def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    assert "--chat: expected" in fails(capsys, "generate", "--model", tiny_model, "--prompt", "x", "--chat")


@pytest.mark.parametrize("package", ["typer", "rich", "jinja2", "matplotlib", "transformers"])
def test_a_missing_package_is_named_with_its_command(package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from turboattention.cli.main import main; "
        f"sys.exit(main(['compare', '--html', {str(tmp_path / 'out.html')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: packages: expected {package}, received none; install with: pip install 'turboattention[demo]'\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["compare", "--preset", "turbo5"], ["compare", "--tokens", "x"], ["nothing"]])
def test_the_real_process_shows_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "turboattention", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("turboattention.evaluation.compare.compare", interrupt)
    arguments = ["compare", "--model", str(tiny_model), "--tokens", "128", "--json", str(tmp_path / "out.json")]
    assert main(arguments) == 130
    assert list(tmp_path.iterdir()) == []
