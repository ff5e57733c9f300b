"""A kernel added by the recipe of CONTRIBUTING.md, "A kernel, step by step": three places, and it runs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dstlib.engine.runtime import library, structs

STRUCT = """
typedef struct {
    const float* input;
    float* out;
    int64_t num;
    float factor;
} Scale;
"""

FILE = """// Each number times a factor.
int scale_forward(const Scale* problem, int num_threads) {
    const Scale& s = *problem;
    auto work = [&](int64_t task) {
        const int64_t first = task * LANES, count = smaller(LANES, s.num - first);
        store_some(s.out + first, count, load_some(s.input + first, count) * s.factor);
    };
    parallel(divide_up(s.num, LANES), num_threads, work);
    return 0;
}
"""


def _replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_kernel_takes_three_places(tmp_path: Path):
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    csrc = Path(shutil.copytree(structs.INCLUDE.parent, tmp_path / "csrc"))

    # 1. its file, and the struct of its problem
    (csrc / "kernels" / "scale_forward.inc").write_text(FILE)
    with (csrc / "include" / "problems.h").open("a") as header:
        header.write(STRUCT)
    # 2. two lines in kernels.def
    _replaced(
        csrc / "kernels.def",
        "#else\n",
        'KERNEL(scale_forward, Scale, any_depth)\n#else\n#include "kernels/scale_forward.inc"\n',
    )

    sources = [csrc / "isa" / "generic.cpp", *(csrc / "runtime" / f"{name}.cpp" for name in ("runtime", "threads"))]
    options = ["-O0", "-std=gnu++17", "-fvisibility=hidden", "-shared", "-fPIC", "-DENGINE_GENERIC_ONLY"]
    subprocess.run([compiler, *options, *sources, "-lpthread", "-ldl", "-o", tmp_path / "kernels.so"], check=True)

    # 3. its operator
    problems = structs.read_headers(csrc / "include")
    found = library._kernels(library.load(tmp_path / "kernels.so"), None, problems)
    assert found is not None
    assert found.name == "generic"
    x = torch.arange(37.0)
    out = torch.empty_like(x)
    problem = problems["Scale"](input=x.data_ptr(), out=out.data_ptr(), num=x.numel(), factor=3)
    assert found.scale_forward(problem, 2) == 0
    assert torch.equal(out, 3 * x)
