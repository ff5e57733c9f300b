"""What tests of the engine share."""

import ctypes
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dstlib.engine.gpu import cuda
from dstlib.engine.ops import operator as calls
from dstlib.engine.runtime import library


@pytest.fixture(params=[*library.INSTRUCTION_SETS, "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that uses it runs by each path that this machine has."""
    found = None
    if request.param != "torch":
        binary = library._library()
        found = binary and library._kernels(binary, request.param)
        if not found:
            pytest.skip(f"no kernels for {request.param} here")
    monkeypatch.setattr(calls, "kernels", lambda: found)
    return request.param


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, ctypes.CDLL]:
    """The kernels in CUDA, compiled for this CPU."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux, whose fibers stand for threads of a GPU")
    source, kernels = Path(__file__).with_name("cuda_emulation") / "kernels.cpp", Path(cuda.__file__).parent
    libraries = {}
    for dtype, macro in ((torch.bfloat16, "-DBFLOAT16"), (torch.float16, "-DFLOAT16")):
        library = tmp_path_factory.mktemp("emulated") / "kernels.so"
        options = ("-O2", "-std=c++17", "-shared", "-fPIC", "-w", macro, f"-I{kernels}")
        subprocess.run([compiler, *options, source, "-o", library], check=True)
        libraries[dtype] = ctypes.CDLL(str(library))
    return libraries


@pytest.fixture
def launched(emulated: dict[torch.dtype, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far, which run on this CPU."""
    names = []

    def bits(argument: Tensor | float | None) -> int:
        if isinstance(argument, Tensor):
            return argument.data_ptr()
        return int.from_bytes(struct.pack("d", argument), "little") if isinstance(argument, float) else argument or 0

    def launch(source: str, name: str, size: tuple[tuple[int, int], int], x: Tensor, arguments: Sequence[Any]) -> None:
        (wide, high), threads = size
        numbers = (ctypes.c_ulonglong * len(arguments))(*map(bits, arguments))
        emulated[x.dtype][f"emulate_{name}"](wide, high, threads, numbers)
        names.append(name)

    monkeypatch.setattr(cuda, "computes", lambda x: x.dtype in cuda.HALVES)
    monkeypatch.setattr(cuda, "launch", launch)
    return names
