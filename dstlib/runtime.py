"""Networks as files, run without torch: numpy in, numpy out. This module loads numpy and the kernels, nothing heavier.

Files come from :func:`dstlib.export.save_plan`. C programs run them too, by ``dstlib/include/dstlib.h``.
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_int, c_int64, c_void_p
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dstlib.bounds import available_memory, require_memory
from dstlib.cores import usable_cores
from dstlib.errors import DstlibError, InputError, SettingError, StateError
from dstlib.files import read_whole

VARIABLE = "DSTLIB_ENGINE"  # the name of an instruction set, or "torch": what is used instead of the best there is
Array = np.ndarray[Any, np.dtype[np.float32]]
_COPY_AGAIN = "Copy the file again from where it was written, or write it anew."


class _Size(Structure):
    _fields_ = [(axis, c_int64) for axis in "ncdhw"]


class _Refusal(Structure):
    _fields_ = [("what", c_char * 64), ("allowed", c_char * 128), ("given", c_char * 128)]


class Plan:
    """A network that runs without torch, on images of any size that it takes; made by :func:`load_plan`.

    Threads may share it: they take turns. The memory between the layers is kept for the next image of the same size.
    """

    def __init__(self, handle: int, where: str) -> None:
        native = _native()
        self._handle, self._where = handle, where
        self._lock = threading.Lock()
        # the size whose memory is kept, and the shapes of its outputs
        self._last: tuple[tuple[int, ...], list[tuple[int, ...]]] = (), []
        self.num_channels: int = native.dstlib_num_channels(handle)  # of images
        self.num_outputs: int = native.dstlib_num_outputs(handle)
        weakref.finalize(self, native.dstlib_close, handle)

    def __call__(self, image: Array, *, threads: int | None = None) -> Array | tuple[Array, ...]:
        """Computes the outputs for images (N, C, D, H, W) of float32: an array, or a tuple where there are several.

        ``threads`` are as many as can run at once, by the cores and the quota of this process, unless said otherwise.

        Raises:
            InputError: The network takes no such image.
            SettingError: There are to be fewer threads than one.
            StateError: There is not enough memory for what is between the layers.
        """
        threads = usable_cores() if threads is None else threads
        if type(threads) is not int or threads < 1:
            raise SettingError.of("threads", "a plan", allowed="1 or more", given=threads, remedy="Pass 1.")
        if not isinstance(image, np.ndarray) or image.ndim != 5 or image.dtype != np.float32:
            is_array = isinstance(image, np.ndarray)
            given = f"{image.shape} of {image.dtype}" if is_array else f"a {type(image).__name__}"
            allowed = "(N, C, D, H, W) of float32"
            raise InputError.of("image", "a plan", allowed=allowed, given=given, remedy="Pass what the model takes.")
        size = _Size(*image.shape)
        with self._lock:
            shapes = self._checked(image.shape)
            outputs = [np.empty(each, np.float32) for each in shapes]
            image = np.ascontiguousarray(image)
            addresses = (c_void_p * len(outputs))(*(each.ctypes.data for each in outputs))
            refusal = _Refusal()
            self._last = (), []
            if _native().dstlib_run(
                self._handle, byref(size), image.ctypes.data, addresses, min(threads, 1024), byref(refusal)
            ):
                _refuse(refusal, "a plan", StateError, "Pass smaller images, or fewer at a time.")
            self._last = image.shape, shapes
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def measure(self, shape: Sequence[int]) -> tuple[list[tuple[int, ...]], int]:
        """Returns the shapes of the outputs for images (N, C, D, H, W), and how many bytes are kept between layers.

        Raises:
            InputError: The network takes no such image.
        """
        if len(shape) != 5 or not all(isinstance(n, int | np.integer) and abs(n) < 2**63 for n in shape):
            allowed, remedy = "(N, C, D, H, W)", "Pass what the model takes."
            raise InputError.of("shape", "a plan", allowed=allowed, given=tuple(shape), remedy=remedy)
        size, sizes, between, refusal = _Size(*shape), (_Size * self.num_outputs)(), c_int64(), _Refusal()
        if _native().dstlib_measure(self._handle, byref(size), sizes, byref(between), byref(refusal)):
            _refuse(refusal, "a plan", InputError, "Pass what the model takes.")
        return [tuple(getattr(each, axis) for axis in "ncdhw") for each in sizes], between.value

    def _checked(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Returns the shapes of the outputs, where there is memory for them, and for what is between the layers."""
        last, shapes = self._last
        if shape != last:
            shapes, between = self.measure(shape)
            num_bytes = 4 * sum(map(prod, shapes)) + between
            require_memory(num_bytes, "maps", self._where, remedy="Pass smaller images, or fewer at a time.")
        return shapes


def load_plan(path: str | Path) -> Plan:
    """Reads a network that :func:`dstlib.export.save_plan` has written.

    All that is in the file is checked before it is used. ``DSTLIB_ENGINE`` names another instruction set than the best
    of this machine, as it does for the engine.

    Raises:
        SettingError: ``DSTLIB_ENGINE`` names an instruction set that this machine has not.
        StateError: The file is missing, cut off, damaged, made up or of another format, or no kernels were built.

    >>> import tempfile
    >>> import torch
    >>> from dstlib.export import save_plan
    >>> model = torch.nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_plan(model, torch.rand(1, 1, 4, 8, 8), f"{folder}/model.plan")
    ...     plan = load_plan(f"{folder}/model.plan")
    >>> plan(np.zeros((1, 1, 4, 6, 6), np.float32), threads=1).shape
    (1, 2, 4, 6, 6)
    """
    where = str(path)
    asked = os.environ.get(VARIABLE)
    isa = None if asked in (None, "torch") else str(asked).encode()
    native = _native()
    try:
        content = read_whole(Path(path), max_bytes=available_memory() // 2)  # half, as its content is copied
    except OSError as error:
        given = error.strerror or str(error)
        raise StateError.of("file", where, allowed="a plan", given=given, remedy=_COPY_AGAIN) from error
    refusal = _Refusal()
    handle = native.dstlib_open(content, len(content), isa, byref(refusal))
    if handle is None and refusal.what == b"instruction set":
        _refuse(refusal, VARIABLE, SettingError, "Unset it for the best there is.")
    if handle is None:
        _refuse(refusal, where, StateError, _COPY_AGAIN)
    return Plan(handle, where)


def library_file() -> Path | None:
    """Returns the file of the compiled kernels, which C programs link with; None where none were built."""
    folder = Path(__file__).with_name("engine")
    return next((path for kind in ("so", "pyd") for path in sorted(folder.glob(f"_kernels*.{kind}"))), None)


@cache
def _native() -> ctypes.CDLL:
    """Returns the functions of ``dstlib.h``.

    Raises:
        StateError: No kernels were built.
    """
    file = library_file()
    if file is None:
        allowed, remedy = "to be built", "Install dstlib again where there is a C++ compiler."
        raise StateError.of("kernels", "dstlib", allowed=allowed, given="none", remedy=remedy)
    native = ctypes.CDLL(str(file))
    size, refusal = POINTER(_Size), POINTER(_Refusal)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "dstlib_open": (c_void_p, [c_char_p, c_int64, c_char_p, refusal]),
        "dstlib_close": (None, [c_void_p]),
        "dstlib_num_channels": (c_int64, [c_void_p]),
        "dstlib_num_outputs": (c_int64, [c_void_p]),
        "dstlib_measure": (c_int, [c_void_p, size, size, POINTER(c_int64), refusal]),
        "dstlib_run": (c_int, [c_void_p, size, c_void_p, POINTER(c_void_p), c_int, refusal]),
    }
    for name, (returned, taken) in signatures.items():
        function = getattr(native, name)
        function.restype, function.argtypes = returned, taken
    return native


def _refuse(refusal: _Refusal, where: str, error: type[DstlibError], remedy: str) -> NoReturn:
    what, allowed, given = (getattr(refusal, name).decode() for name in ("what", "allowed", "given"))
    raise error.of(what, where, allowed=allowed, given=given, remedy=remedy)
