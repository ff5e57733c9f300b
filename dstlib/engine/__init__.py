"""Sparse networks that really run faster, and take less room: kernels, the layers on them, files, exports.

:func:`accelerate` is all that most need; :func:`info` says what this machine computes with.
"""

from dstlib.engine.accelerate import accelerate
from dstlib.engine.decisions import Decision, Decisions
from dstlib.engine.layers.linear import SparseLinear
from dstlib.engine.runtime.library import Info, info
from dstlib.engine.runtime.memory import release_memory
from dstlib.export import load_compact, remove_dead_channels, save_compact, to_semi_structured

__all__ = [
    "Decision",
    "Decisions",
    "Info",
    "SparseLinear",
    "accelerate",
    "info",
    "load_compact",
    "release_memory",
    "remove_dead_channels",
    "save_compact",
    "to_semi_structured",
]
