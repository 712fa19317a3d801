"""Output files: refused early, written whole, never half."""

import os
import stat
from pathlib import Path

import pytest

from turboattention.errors import InvalidInputError
from turboattention.files import check_writable, write_atomic


@pytest.mark.parametrize("path", [".", "missing/out.json", "file/out.json"])
def test_impossible_paths_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("a file where a directory is needed")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInputError, match="output path: expected"):
        check_writable(tmp_path / path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_write_protected_places_are_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    kept.chmod(0o400)
    with pytest.raises(InvalidInputError, match="Permission denied"):
        check_writable(kept)
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInputError, match="Permission denied"):
        check_writable(tmp_path / "new.json")
    tmp_path.chmod(0o700)


def test_a_good_path_passes_and_nothing_is_left(tmp_path: Path) -> None:
    check_writable(tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"


def test_a_bare_name_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(Path("out.json"))
    write_atomic(Path("out.json"), "é")
    assert (tmp_path / "out.json").read_bytes() == "é".encode()


def test_an_existing_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    path.write_text("old")
    path.chmod(0o640)
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "out.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((InvalidInputError, KeyboardInterrupt)):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
