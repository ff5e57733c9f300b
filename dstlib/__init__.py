"""dstlib: dynamic sparse training for any PyTorch model.

    sparsifier = dstlib.sparsify(model, sparsity=0.9)

The training loop stays as it is. See :func:`sparsify`, :mod:`dstlib.methods`, :func:`profile` and :func:`accelerate`.
"""

from typing import TYPE_CHECKING, Any

from dstlib.cost import TrainingCost
from dstlib.errors import DataError, DstlibError, ScoreError, SelectionError, SettingError, StateError
from dstlib.history import History
from dstlib.masking import NM, Block, Channel, Element, FanIn, Kernel, Site, er, erk, uniform
from dstlib.methods import DSFF, GMP, METHODS, RIGL, SET, STATIC
from dstlib.methods.method import Method
from dstlib.profile import Profile, profile
from dstlib.sparsifier import Sparsifier
from dstlib.sparsifier.api import sparsify

if TYPE_CHECKING:
    from dstlib.engine.accelerate import accelerate

__version__ = "0.1.0"

__all__ = [
    "DSFF",
    "GMP",
    "METHODS",
    "NM",
    "RIGL",
    "SET",
    "STATIC",
    "Block",
    "Channel",
    "DataError",
    "DstlibError",
    "Element",
    "FanIn",
    "History",
    "Kernel",
    "Method",
    "Profile",
    "ScoreError",
    "SelectionError",
    "SettingError",
    "Site",
    "Sparsifier",
    "StateError",
    "TrainingCost",
    "accelerate",
    "er",
    "erk",
    "profile",
    "sparsify",
    "uniform",
]


def __getattr__(name: str) -> Any:
    """Loads the engine when it is asked for: its operators take as long to define as all the rest."""
    if name == "accelerate":
        from dstlib.engine.accelerate import accelerate

        return accelerate
    raise AttributeError(f"module 'dstlib' has no attribute {name!r}")
