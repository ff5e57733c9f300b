"""The kernels touch only memory that is theirs, and do nothing that C++ leaves undefined: g++'s sanitizers watch them.

The package is copied, its kernels are built to be watched, and its maps and scratch memory are blocks of their own,
so that whatever reaches past one of them is seen. Masked vectors of AVX2 and AVX-512 are not watched; the generic
kernels, which share their loops, read lane by lane.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = ("avx512", "avx2", "generic")  # where the processor has one of the first two, it is tried too
OPTIONS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
OPTIONS += ["-std=gnu++17", "-fno-math-errno", "-fvisibility=hidden", "-shared", "-fPIC"]  # as in setup.py

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Watched:
    """A copy of the project, and the compiler that built its kernels."""

    folder: Path
    compiler: str

    def run(self, command: Sequence[str], **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
        """Runs Python in the copy; returns how it ended, and what the sanitizers reported."""
        reports = self.folder / "reports"
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir()
        runtimes = [self._runtime(name) for name in ("libasan.so", "libstdc++.so")]  # before all others
        log = f"log_path={reports}/report"
        variables = (
            os.environ
            | environment
            | {
                "PYTHONPATH": str(self.folder),
                "LD_PRELOAD": " ".join(runtimes),
                "ASAN_OPTIONS": f"detect_leaks=0:{log}",  # Python keeps much until its end
                "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
            }
        )
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=variables, capture_output=True, text=True
        )
        return done, "".join(path.read_text()[:4000] for path in sorted(reports.iterdir()))

    def _runtime(self, name: str) -> str:
        asked = [self.compiler, f"-print-file-name={name}"]
        found = subprocess.check_output(asked, text=True).strip()
        if not Path(found).is_absolute():
            pytest.skip(f"this g++ has no {name}")
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.mktemp("watched")
    for name in ("dstlib", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    memory = folder / "dstlib" / "engine" / "runtime" / "memory.py"
    text = memory.read_text()
    assert "\nSMALLEST = 1 << 20 " in text
    memory.write_text(text.replace("\nSMALLEST = 1 << 20 ", "\nSMALLEST = 1 << 62 "))  # all maps by the allocator
    engine = folder / "dstlib" / "engine"
    sources = sorted(engine.glob("csrc/*/*.cpp"))
    command = [compiler, *OPTIONS, *sources, "-lpthread", "-ldl", "-o", engine / "_kernels.so"]
    subprocess.run(command, check=True)
    return Watched(folder, compiler)


def test_a_map_that_is_too_short_is_seen(watched: Watched):
    """The watch is awake."""
    code = (
        "import torch\n"
        "from dstlib.engine.ops.layouts import _reorder\n"
        "from dstlib.engine.runtime.library import kernels\n"
        "x, short = torch.randn(1, 3, 2, 5, 7), torch.empty(209)\n"
        "problem = _reorder(x, x)\n"
        "problem.out, problem.out_strides = short.data_ptr(), (210, 70, 1, 14, 2)\n"
        "kernels().reorder_to_depth_last(problem, 1)\n"
    )
    done, reports = watched.run(["-c", code], DSTLIB_ENGINE="generic")
    assert done.returncode, done.stderr
    assert "heap-buffer-overflow" in reports


@pytest.mark.parametrize(
    "name",
    [
        "engine/test_convolution",
        "engine/test_linear",
        "engine/test_compact_linear",
        "engine/test_places",
        "engine/test_slabs",
        "engine/test_spatial",
        "test_packed",
    ],
)
def test_kernels_keep_to_their_memory(watched: Watched, name: str):
    """In the tests of the operators, by each instruction set that this processor has."""
    # guarded memory is the sanitizers' own work, and a fork under their allocator, whose locks it takes along, may wait
    # for ever
    apart = ["-k", "not beyond_the_ends"]
    done, reports = watched.run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{name}.py", *apart])
    assert not reports, reports
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_plans_keep_to_their_memory(watched: Watched):
    """Those of networks and those that were made up; a program in C would have to be built to be watched as well."""
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/export/test_plan.py", "-k", "not from_c"]
    done, reports = watched.run(command, DSTLIB_ENGINE="generic")
    assert not reports, reports
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("path", PATHS)
def test_random_networks_keep_to_their_memory(watched: Watched, path: str):
    """In the fuzzer's first networks and lives; whether their numbers are right is tested elsewhere."""
    command = ["tests/fuzz_engine.py", "--networks", "150", "--lives", "50"]
    done, reports = watched.run(command, DSTLIB_ENGINE=path)
    if "SettingError" in done.stderr:
        pytest.skip(f"no kernels for {path} here")
    assert not reports, reports
    assert "50 lives" in done.stdout, done.stderr[-2000:]
    assert "layers on the engine" in done.stdout
