"""The build of the CPU kernels: clean under sanitizers, and an installation without a compiler that says so."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turboattention.config import TensorFormat, get_preset
from turboattention.cpu import library
from turboattention.cpu.structs import PageFormat, page_format
from turboattention.quant.granularity import PerToken
from turboattention.quant.layout import PageLayout

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "src" / "turboattention" / "cpu" / "kernels"
DRIVER = Path(__file__).with_name("driver.cpp")
AVX512 = 2
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytest.importorskip("hatchling", reason="hatchling, the build backend, is not installed")
sys.path.insert(0, str(ROOT))
import hatch_build  # noqa: E402


def layouts() -> list[PageLayout]:
    found = [
        PageLayout(64, dim, cache.key, cache.value)
        for name, dim in (("turbo4", 64), ("turbo4", 128), ("turbo3", 80), ("turbo2", 96), ("int8", 256))
        for cache in (get_preset(name).cache,)
    ]
    odd = TensorFormat(2, PerToken(), rotate=True), TensorFormat(4, refined_share=0.5, refined_bits=4, search=True)
    return [*found, PageLayout(128, 128, odd[1], odd[0])]


@pytest.mark.slow
def test_sanitizers(tmp_path: Path):
    """AddressSanitizer and UndefinedBehaviorSanitizer over every kind of call, each buffer an allocation of its own.

    Where there is no AVX-512, with emulated tiles in the place of what this processor could not run.
    """
    real = library.loaded().isa >= AVX512
    sets, extra = (hatch_build.SETS, ()) if real else (hatch_build.EMULATED_SETS, (hatch_build.EMULATED,))
    if hatch_build.find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    program = tmp_path / "driver"
    reason = hatch_build.build(KERNELS, program, (*SANITIZERS, *extra), DRIVER, sets)
    if reason and "asan" in reason:
        pytest.skip(f"the compiler has no sanitizers: {reason}")
    assert reason is None
    names = [name for name, _ in PageFormat._fields_]
    lines = [" ".join(str(getattr(page_format(layout), name)) for name in names) for layout in layouts()]
    formats = tmp_path / "formats"
    formats.write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run([program, formats], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 6 * len(lines)


def test_no_compiler_is_a_reason_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    reason = hatch_build.build(KERNELS, tmp_path / "kernels.so")
    assert reason is not None
    assert "no C++ compiler" in reason
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "false")
    reason = hatch_build.build(KERNELS, tmp_path / "kernels.so")
    assert reason is not None
    assert list(tmp_path.iterdir()) == []


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "PATH", tmp_path / "missing.so")
    library.loaded.cache_clear()
    try:
        assert "were not built" in (library.without_library() or "")
        broken = tmp_path / "broken.so"
        broken.write_text("no library", encoding="utf-8")
        monkeypatch.setattr(library, "PATH", broken)
        library.loaded.cache_clear()
        assert "can't be loaded" in (library.without_library() or "")
    finally:
        library.loaded.cache_clear()


def test_the_library_needs_neither_python_nor_torch():
    if library.without_library():
        pytest.skip(str(library.without_library()))
    code = f"import ctypes; print(ctypes.CDLL({str(library.PATH)!r}).ta_abi_version())"
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert int(done.stdout) == library.ABI_VERSION


def test_structs_have_the_sizes_of_the_header(tmp_path: Path):
    compiler = hatch_build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    from turboattention.cpu import structs

    pairs = {
        "TaPageFormat": structs.PageFormat,
        "TaHeadPages": structs.HeadPages,
        "TaTensor": structs.TensorView,
        "TaAttention": structs.Attention,
        "TaCompress": structs.Compress,
        "TaAppend": structs.Append,
        "TaPrefill": structs.Prefill,
    }
    checks = [f'static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "size");' for name, kind in pairs.items()]
    for name, kind in pairs.items():
        for field, *_ in kind._fields_:
            offset = getattr(kind, field).offset
            checks.append(f'static_assert(offsetof({name}, {field}) == {offset}, "{field}");')
    source = tmp_path / "sizes.cpp"
    source.write_text("\n".join(["#include <stddef.h>", '#include "abi.h"', *checks]), encoding="utf-8")
    command = [*compiler, "-std=c++17", "-I", str(KERNELS), "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
