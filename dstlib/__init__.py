"""dstlib: dynamic sparse training for any PyTorch model.

    sparsifier = dstlib.sparsify(model, sparsity=0.9)

The training loop stays as it is. See :func:`sparsify`, :mod:`dstlib.methods`, :func:`profile` and :func:`accelerate`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstlib.cost import TrainingCost
    from dstlib.engine.accelerate import accelerate
    from dstlib.errors import DataError, DstlibError, ScoreError, SelectionError, SettingError, StateError
    from dstlib.history import History
    from dstlib.masking import NM, Block, Channel, Element, FanIn, Kernel, Site, er, erk, uniform
    from dstlib.methods import DSFF, GMP, METHODS, RIGL, SET, STATIC, Method
    from dstlib.profile import Profile, profile
    from dstlib.sparsifier import Sparsifier
    from dstlib.sparsifier.api import sparsify

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

_FROM = {  # where what the door offers comes from
    "cost": ("TrainingCost",),
    "engine.accelerate": ("accelerate",),
    "errors": ("DataError", "DstlibError", "ScoreError", "SelectionError", "SettingError", "StateError"),
    "history": ("History",),
    "masking": ("NM", "Block", "Channel", "Element", "FanIn", "Kernel", "Site", "er", "erk", "uniform"),
    "methods": ("DSFF", "GMP", "METHODS", "RIGL", "SET", "STATIC", "Method"),
    "profile": ("Profile", "profile"),
    "sparsifier": ("Sparsifier",),
    "sparsifier.api": ("sparsify",),
}
_ROOMS = ("cost", "errors", "history", "masking", "methods", "schedules", "sparsifier", "targets")


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is asked for: torch takes a second, and no ``--help`` needs it."""
    if name in _ROOMS:
        return import_module(f"dstlib.{name}")
    home = next((home for home, names in _FROM.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'dstlib' has no attribute {name!r}")
    value = getattr(import_module(f"dstlib.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists what can be asked for, whether it is loaded or not."""
    return sorted({*globals(), *__all__, *_ROOMS})
