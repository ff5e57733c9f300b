"""Which kernels run: chosen by the machine or the environment, and explained."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dstlib.engine import info
from dstlib.engine.ops import operator as calls
from dstlib.engine.runtime import library, structs
from dstlib.errors import SettingError

CSRC = structs.INCLUDE.parent
LISTED = re.findall(r"^KERNEL\((\w+), (\w+),", (CSRC / "kernels.def").read_text(), re.MULTILINE)

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


SHOW = (
    "from dstlib.engine import info; from dstlib.engine.runtime import library; "
    "print(info().path, info().reason, library.kernels() is None, sep='|')"
)


@built
def test_the_environment_asks_for_an_instruction_set():
    environment = {**os.environ, library.VARIABLE: "generic"}
    told = subprocess.check_output([sys.executable, "-c", SHOW], env=environment, text=True)
    assert told == "generic|DSTLIB_ENGINE=generic|False\n"


def test_the_environment_asks_for_torch(anew: pytest.MonkeyPatch):
    anew.setenv(library.VARIABLE, "torch")
    assert (info().path, info().reason, library.kernels()) == ("torch", "DSTLIB_ENGINE=torch", None)


def test_an_unknown_instruction_set_is_refused(anew: pytest.MonkeyPatch):
    anew.setenv(library.VARIABLE, "mmx")
    expected = "DSTLIB_ENGINE of the environment: expected one of avx512, avx2, generic, torch, got mmx. Or unset it."
    with pytest.raises(SettingError, match=f"^{re.escape(expected)}$"):
        info()


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
    assert library.kernels().name == there[0]


@built
@pytest.mark.parametrize(("name", "lanes"), [("generic", 4), ("avx2", 8), ("avx512", 16)])
def test_each_instruction_set_has_all_kernels(name: str, lanes: int):
    found = library._kernels(library._library(), name)
    if found is None:
        pytest.skip(f"no kernels for {name} here")
    assert (found.name, found.lanes) == (name, lanes)
    assert all(getattr(found, kernel) for kernel, _ in LISTED)


@built
@pytest.mark.parametrize(("kernel", "problem"), LISTED)
def test_problems_have_the_size_that_the_kernels_know(kernel: str, problem: str):
    isa = structs.InstructionSet.from_address(library._library().engine_instruction_set(b"generic"))
    rows = (structs.Kernel * isa.num_kernels).from_address(isa.kernels)
    sizes = {row.name.decode(): (row.problem.decode(), row.problem_size) for row in rows}
    assert sizes[kernel] == (problem, ctypes.sizeof(getattr(structs, problem)))
    assert len(sizes) == len(LISTED)


def test_sizes_of_problems_speak_for_all_structs():
    def parts(struct: type) -> set[str]:
        kinds = [getattr(kind, "_type_", kind) for _, kind in struct._fields_]
        return {struct.__name__}.union(*(parts(kind) for kind in kinds if hasattr(kind, "_fields_")))

    covered = set().union(*(parts(getattr(structs, problem)) for _, problem in LISTED))
    there = structs.read_header((structs.INCLUDE / "problems.h").read_text())
    by_address = {"Segment", "Masked"}
    assert covered | by_address == {name for name, kind in there.items() if isinstance(kind, type)}


@built
def test_kernels_of_another_version_are_refused(anew: pytest.MonkeyPatch):
    class Conv(ctypes.Structure):
        _fields_ = (("data", ctypes.c_void_p),)

    anew.setattr(structs, "Conv", Conv)
    with pytest.raises(AssertionError, match=r"is of another version \(Conv\): install dstlib again"):
        library.kernels()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("enum { A };\nstruct Old { int64_t n; };", "line 2 .*'struct Old { int64_t n; };'"),
        ("// one\ntypedef struct {\n    int64_t n;\n    unsigned int m;\n} New;", "line 4 .*'unsigned int m;'"),
        ("typedef struct {\n    Later later;\n} New;", "line 2 .*'Later later;'"),
        ("typedef struct {\n    float x[MOST];\n} New;", r"line 2 .*'float x\[MOST\];'"),
        ("typedef struct { const float *a, *b; } New;", "line 1 "),
        ("typedef struct { int64_t bits : 3; } New;", "line 1 "),
        ("enum { A = 1 << 3 };", "line 1 "),
    ],
)
def test_c_that_python_does_not_read_is_refused_by_its_line(text: str, line: str):
    with pytest.raises(AssertionError, match=line):
        structs.read_header(text)


def test_a_header_is_read_as_c_has_it():
    text = """
    enum { MOST = 3, NEXT, LAST };  // counts on
    typedef struct { int32_t n; double x; } Pair;
    typedef struct {
        Pair pairs[MOST], one;
        const char* name;
        int (*run)(const void* problem, int num_threads);
        float y[2];
    } All;
    """
    found = structs.read_header(text)
    assert (found["MOST"], found["NEXT"], found["LAST"]) == (3, 4, 5)
    assert {name: getattr(found["All"], name).offset for name, _ in found["All"]._fields_} == {
        "pairs": 0, "one": 48, "name": 64, "run": 72, "y": 80,
    }  # fmt: skip
    one = found["All"](pairs=((1, 2.0), (3, 4.0)), name=b"a", y=(5.0, 6.0))
    assert (one.pairs[1].x, one.pairs[2].n, one.name, list(one.y)) == (4, 0, b"a", [5, 6])


def test_headers_are_plain_c(tmp_path: Path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    for header in structs.INCLUDE.glob("*.h"):
        options = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only")
        subprocess.run([compiler, *options, "-include", header, "-xc", "/dev/null"], check=True)


def test_without_the_library_torch_does_it(anew: pytest.MonkeyPatch):
    anew.setattr(Path, "glob", lambda *_: [])
    assert library.kernels() is None
    assert calls.kernels_for(torch.zeros(1)) is None
    assert info().path == info().threads_from == "torch"
    assert info().reason == "the kernels were not built: install dstlib again where there is a C++ compiler"


def test_info_reads_as_a_line():
    found = info()
    assert found.machine
    assert "\n" not in str(found)
    some = replace(found, path="avx2", reason="asked", threads=2, threads_from="torch", machine="Zen", cores=2)
    assert str(some) == "dstlib engine: avx2 (asked), 2 threads (torch), Zen"
    threads = "2 threads (torch, of which 1 can run at once: see torch.set_num_threads())"
    assert str(replace(some, cores=1)) == f"dstlib engine: avx2 (asked), {threads}, Zen"


def test_a_kernel_without_memory_is_named():
    library.check(0, "convolution")
    with pytest.raises(MemoryError, match="convolution: no memory for intermediate results"):
        library.check(1, "convolution")
