"""Which kernels run: chosen by the machine or the environment, and explained."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dstlib.engine import info
from dstlib.engine.ops import operator as calls
from dstlib.engine.runtime import library
from dstlib.errors import SettingError

built = pytest.mark.skipif(library._library() is None, reason="the kernels were not built")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing chosen yet, and nothing remembered afterwards."""
    cached = (library._choice, library._library, library.kernels)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    for each in cached:
        each.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for each in cached:
        each.cache_clear()


def _run(code: str, asked: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, library.VARIABLE: asked}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


SHOW = (
    "from dstlib.engine import info; from dstlib.engine.runtime import library; "
    "print(info().path, info().reason, library.kernels() is None, sep='|')"
)


def test_the_environment_asks_for_torch():
    assert _run(SHOW, "torch").stdout == "torch|DSTLIB_ENGINE=torch|True\n"


@built
def test_the_environment_asks_for_an_instruction_set():
    assert _run(SHOW, "generic").stdout == "generic|DSTLIB_ENGINE=generic|False\n"


def test_an_unknown_instruction_set_is_refused():
    ran = _run(SHOW, "mmx")
    assert ran.returncode == 1
    expected = "DSTLIB_ENGINE of the environment: expected one of avx512, avx2, generic, torch, got mmx. Or unset it."
    assert ran.stderr.strip().endswith(expected)


@built
def test_an_instruction_set_of_another_processor_is_refused(anew: pytest.MonkeyPatch):
    real = library._kernels
    anew.setattr(library, "_kernels", lambda binary, name: None if name == "avx512" else real(binary, name))
    anew.setenv(library.VARIABLE, "avx512")
    with pytest.raises(SettingError, match="expected an instruction set of this processor, got avx512"):
        info()


@built
def test_the_best_is_chosen(anew: pytest.MonkeyPatch):
    binary = library._library()
    there = [name for name in library.INSTRUCTION_SETS if library._kernels(binary, name)]
    assert there[-1] == "generic"
    assert info().path == there[0]
    assert info().reason == "the best this processor has"
    assert library.kernels().name.decode() == there[0]


@built
@pytest.mark.parametrize(("name", "lanes"), [("generic", 4), ("avx2", 8), ("avx512", 16)])
def test_each_instruction_set_has_all_kernels(name: str, lanes: int):
    found = library._kernels(library._library(), name)
    if found is None:
        pytest.skip(f"no kernels for {name} here")
    assert (found.name.decode(), found.lanes) == (name, lanes)
    assert all(getattr(found, field) for field, _ in library.Kernels._fields_)


@built
@pytest.mark.parametrize("struct", [*library.STRUCTS, library.Kernels], ids=lambda struct: struct.__name__)
def test_structs_have_the_size_that_the_kernels_know(struct: type[ctypes.Structure]):
    assert library._library().engine_size(library.IN_C.get(struct.__name__, struct.__name__).encode()) == ctypes.sizeof(
        struct
    )


@built
def test_kernels_of_another_version_are_refused(anew: pytest.MonkeyPatch):
    class Source(ctypes.Structure):
        _fields_ = (("data", ctypes.c_void_p),)

    anew.setattr(library, "STRUCTS", (Source,))
    with pytest.raises(AssertionError, match=r"is of another version \(Source\): install dstlib again"):
        library._library()


def test_without_the_library_torch_does_it(anew: pytest.MonkeyPatch):
    anew.setattr(Path, "glob", lambda *_: [])
    assert library.kernels() is None
    assert calls.kernels_for(torch.zeros(1)) is None
    assert info().path == info().threads_from == "torch"
    assert info().reason == "the kernels were not built: install dstlib again where there is a C++ compiler"


def test_info_reads_as_a_line():
    found = info()
    assert str(found) == (
        f"dstlib engine: {found.path} ({found.reason}), {torch.get_num_threads()} threads ({found.threads_from}), "
        f"{found.machine}"
    )
    assert found.machine
    assert "\n" not in str(found)


def test_a_kernel_without_memory_is_named():
    library.check(0, "convolution")
    with pytest.raises(MemoryError, match="convolution: no memory for intermediate results"):
        library.check(1, "convolution")
