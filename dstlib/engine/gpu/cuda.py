"""Calls of kernels in CUDA: compiled at the first call by cuda-core, NVIDIA's library (``pip install dstlib[gpu]``)."""

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]
Argument = Tensor | int | float | None
HALVES = (torch.float16, torch.bfloat16)
_FOLDER = Path(__file__).parent
_INSTALLED = find_spec("cuda") is not None and find_spec("cuda.core") is not None


def computes(x: Tensor) -> bool:
    """Returns whether there are kernels for the type and the device of x, and what compiles them."""
    return x.is_cuda and x.dtype in HALVES and _INSTALLED and _capability(x.device) >= (8, 0)


def launch(source: str, name: str, size: tuple[Grid, int], x: Tensor, arguments: Sequence[Argument]) -> None:
    """Runs a kernel of the file ``source`` in ``size`` = (grid, threads), for the type and on the device of x.

    It takes 64-bit integers, doubles and pointers, of which None is null.
    """
    core = _core()
    core.Device(x.device.index).set_current()  # of this thread, in which torch may not have computed yet
    stream = _stream(torch.cuda.current_stream(x.device).cuda_stream)
    numbers = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
    core.launch(stream, _config(size), _kernel(source, name, x.dtype, x.device), *numbers)


@cache
def _core() -> Any:
    """Loads cuda-core when the first kernel runs: it is an extra."""
    import cuda.core

    return cuda.core


@cache
def _stream(handle: int) -> Any:
    return _core().Stream.from_handle(handle)


@lru_cache(maxsize=1024)
def _config(size: tuple[Grid, int]) -> Any:
    grid, threads = size
    return _core().LaunchConfig(grid=grid, block=threads)


@cache
def _kernel(source: str, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    return _compiled(source, dtype, device).get_kernel(name)


@cache
def _compiled(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Compiles the kernels of a file for a type and a device: a second or two, once in a process."""
    core = _core()
    macros = ["BFLOAT16"] if dtype == torch.bfloat16 else None
    major, minor = _capability(device)
    options = core.ProgramOptions(
        std="c++17", arch=f"sm_{major}{minor}", define_macro=macros, include_path=str(_FOLDER), name=source
    )
    text = (_FOLDER / source).read_text(encoding="utf-8")
    return core.Program(text, code_type="c++", options=options).compile("cubin")


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
