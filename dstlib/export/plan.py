"""Sparse networks as one file, network and active weights, that the native library runs without torch.

The file, little-endian: a header with a checksum of what follows, the steps of the forward pass, the outputs, then
words of 4 bytes, int32 or float32, that steps point into. ``dstlib/engine/csrc/runtime/plan.cpp`` reads it.

Shapes: O outputs, C inputs of a step, A active kernels.
"""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dstlib.export.order import in_little_memory
from dstlib.export.steps import MOST_MAPS, Step, View, steps_of
from dstlib.files import write_whole

_MAGIC = b"dstplan1"
_HEADER = struct.Struct("<8sqII")  # what it is, bytes in all, checksum of what follows, 0
_COUNTS = struct.Struct("<4q")  # channels of images, steps, outputs, words
_VIEW = struct.Struct("<qqd")
_STEP = struct.Struct(f"<2q{'qqd' * 3}14qd")
_KINDS = ("conv", "conv_transpose", "max_pool")


def save_plan(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Writes a network with its active weights into one file, which runs without torch and without Python.

    :func:`dstlib.runtime.load_plan` runs it with numpy alone, and ``dstlib/include/dstlib.h`` from C, on the engine's
    kernels: images of any size that the network takes, with its outputs up to rounding. What is zero in a weight by
    whole kernels takes no room and no time.

    The example (N, C, D, H, W) of float32 is what the forward pass is followed with. It may be made of convolutions
    with kernels of 1 × 1 × 1 or 1 × 3 × 3 padded by half their size, dstlib's shift along depth before and instance
    norm behind them, (leaky) ReLUs, transposed convolutions whose kernel is their stride, poolings by the maximum over
    windows side by side, and concatenations: E2ENet is. The file appears whole or not at all.

    Raises:
        SettingError: Something else is in it; the first such layer is named, with the reason.

    >>> import tempfile
    >>> import torch
    >>> layer = nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1))
    >>> with torch.no_grad():
    ...     layer.weight[:, 2:] = 0  # 32 of 256 kernels are left
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_plan(layer, torch.rand(1, 16, 2, 8, 8), f"{folder}/layer.plan")
    ...     Path(f"{folder}/layer.plan").stat().st_size, layer.weight.nbytes
    (1700, 9216)
    """
    network = in_little_memory(steps_of(model, example), example.shape[2:])
    words = _Words()
    steps = b"".join(_packed(step, words) for step in network.steps)
    outputs = b"".join(map(_packed_view, network.outputs))
    counts = _COUNTS.pack(network.channels, len(network.steps), len(network.outputs), words.count)
    content = b"".join([counts, steps, outputs, *words.parts])
    header = _HEADER.pack(_MAGIC, _HEADER.size + len(content), zlib.crc32(content), 0)
    write_whole(Path(path), header + content)


class _Words:
    """What steps point into, each thing once."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.count = 0
        self._patterns: dict[int, tuple[int, int, int, int]] = {}
        self._kept: list[Tensor] = []  # as long as it is alive, no other has the identity of a weight

    def add(self, values: "np.ndarray[Any, np.dtype[Any]] | None", kind: str = "<f4") -> int:
        """Returns where values are written; -1 of none."""
        if values is None:
            return -1
        at, content = self.count, np.ascontiguousarray(values, dtype=kind).tobytes()
        self.parts.append(content)
        self.count += len(content) // 4
        return at

    def add_kernels(self, weight: Tensor, *, transposed: bool) -> tuple[int, int, int, int]:
        """Returns A, and where row_ptr (O + 1), col_idx (A) and the taps of the active kernels are written."""
        if id(weight) not in self._patterns:
            kernels_OCT = weight.detach().flatten(2)
            kernels_OCT = kernels_OCT.transpose(0, 1) if transposed else kernels_OCT
            active_OC = kernels_OCT.any(dim=2)
            rows = np.concatenate([[0], active_OC.sum(dim=1).cumsum(0).numpy()])
            _, col_idx = active_OC.nonzero(as_tuple=True)
            patterns = self.add(rows, "<i4"), self.add(col_idx.numpy(), "<i4")
            self._patterns[id(weight)] = (len(col_idx), *patterns, self.add(kernels_OCT[active_OC].numpy()))
            self._kept.append(weight)
        return self._patterns[id(weight)]


def _packed(step: Step, words: _Words) -> bytes:
    views = [*step.views, *[View(0)] * (MOST_MAPS - len(step.views))]
    sizes = [step.outputs, *((1, 1) if step.weight is None else step.weight.shape[3:]), *step.stride]
    kernels = (0, -1, -1, -1)
    if step.weight is not None:
        kernels = words.add_kernels(step.weight, transposed=step.kind == "conv_transpose")
    bias = words.add(None if step.bias is None else step.bias.detach().numpy())
    shifts = words.add(np.array(step.shifts), "<i4") if step.shifts else -1
    gamma, beta, eps = step.norm or (None, None, 0.0)
    ones_zeros = [np.full(step.outputs, value) for value in (1.0, 0.0)]
    norm = [
        words.add((default if given is None else given.detach().numpy()) if step.norm else None)
        for given, default in zip((gamma, beta), ones_zeros, strict=True)
    ]
    of_views = [number for view in views for number in (view.map, view.is_normed, view.slope)]
    kind = _KINDS.index(step.kind)
    return _STEP.pack(kind, len(step.views), *of_views, *sizes, *kernels, bias, shifts, *norm, eps)


def _packed_view(view: View) -> bytes:
    return _VIEW.pack(view.map, view.is_normed, view.slope)
