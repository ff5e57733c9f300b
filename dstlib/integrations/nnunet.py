"""Trainers for nnU-Net v2, chosen by name alone: ``nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDST_90``.

=============================  ==================================================================
nnUNetTrainerDST               the planned U-Net, trained sparse: DSFF at sparsity 0.8
nnUNetTrainerE2ENet            an E2ENet under the same plans, dense
nnUNetTrainerE2ENetDST         an E2ENet whose fusion is trained sparse, as in the paper
=============================  ==================================================================

Settings follow as parts of the name, in any order: ``_90`` or ``_975`` is the sparsity (0.90, 0.975), ``_rigl``
a method of dstlib, ``_250epochs`` the length. nnU-Net names its folders of results by the trainer, so runs
of other settings never meet, and a checkpoint is found again by ``nnUNetv2_predict`` with the settings it had.
For other settings, subclass one (docs/nnunet.md).

Nothing of nnU-Net is imported before a trainer is asked for.
"""

import re
from functools import cache
from typing import Any

from dstlib.errors import similar
from dstlib.integrations.nnunet_network import E2ENetTraining, SparseE2ENetTraining
from dstlib.integrations.nnunet_training import SparseTraining
from dstlib.methods import METHODS

_TRAININGS = {
    "nnUNetTrainerDST": SparseTraining,
    "nnUNetTrainerE2ENet": E2ENetTraining,
    "nnUNetTrainerE2ENetDST": SparseE2ENetTraining,
}
TRAINERS = tuple(_TRAININGS)


def name_settings(name: str) -> tuple[str, dict[str, Any]]:
    """Reads a name: the trainer that it begins with, and the settings that its other parts ask for.

    Raises:
        AttributeError: The name is not of this grammar; so nnU-Net goes on searching elsewhere.

    >>> name_settings("nnUNetTrainerDST_rigl_90_250epochs")
    ('nnUNetTrainerDST', {'method': 'rigl', 'sparsity': 0.9, 'epochs': 250})
    >>> name_settings("nnUNetTrainerDST_gmp_global_80")
    ('nnUNetTrainerDST', {'method': 'gmp_global', 'sparsity': 0.8})
    >>> name_settings("nnUNetTrainerE2ENet")
    ('nnUNetTrainerE2ENet', {})
    """
    trainer, separator, rest = name.partition("_")
    if trainer not in TRAINERS:
        raise AttributeError(f"no trainer of dstlib is called {name!r}; similar: {similar(trainer, TRAINERS)}")
    settings: dict[str, Any] = {}
    for part in _parts(rest) if separator else ():
        setting, value = _setting(part, name)
        if setting in settings:
            raise AttributeError(f"{name!r} gives the {setting} twice")
        settings[setting] = value
    if trainer == "nnUNetTrainerE2ENet" and settings.keys() - {"epochs"}:
        raise AttributeError(f"{name!r}: nnUNetTrainerE2ENet is dense; nnUNetTrainerE2ENetDST is the sparse one")
    return trainer, settings


def _parts(rest: str) -> list[str]:
    """Splits at underscores, of which the names of methods have some themselves."""
    methods = "|".join(sorted(METHODS, key=len, reverse=True))
    parts = re.findall(rf"(?:{methods})(?=_|$)|[^_]+", rest)
    return parts if parts and "_".join(parts) == rest else rest.split("_")


def _setting(part: str, name: str) -> tuple[str, Any]:
    if part in METHODS:
        return "method", part
    if re.fullmatch(r"\d{2,3}", part):
        return "sparsity", float(f"0.{part}")
    if match := re.fullmatch(r"([1-9]\d*)epochs?", part):
        return "epochs", int(match[1])
    raise AttributeError(
        f"{part!r} in {name!r} is none of: a sparsity (90, 975), a method ({', '.join(METHODS)}), a length (250epochs)"
    )


@cache
def trainer_named(name: str) -> type:
    """Returns the trainer of a name: always the same class.

    Raises:
        AttributeError: The name is none of dstlib's.
        ImportError: nnU-Net is not installed.
    """
    trainer, settings = name_settings(name)
    try:
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    except ModuleNotFoundError as error:
        raise ImportError(f"the trainers need nnU-Net v2 ({error}): pip install 'dstlib[nnunet]'") from error
    bases = (_TRAININGS[name], nnUNetTrainer) if name == trainer else (trainer_named(trainer),)
    members = {"__module__": __name__, "__doc__": f"{name}: see dstlib.integrations.nnunet.", **settings}
    return type(name, bases, members)


def __getattr__(name: str) -> type:
    """Returns a trainer: ``from dstlib.integrations.nnunet import nnUNetTrainerDST_90``, to subclass it."""
    return trainer_named(name)
