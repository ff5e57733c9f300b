"""What dstlib adds to a checkpoint of nnU-Net, and how it is taken out again. Needs no nnU-Net.

nnU-Net's checkpoint is a dictionary; dstlib puts all that it needs under one more key, which the stock trainer
and ``nnUNetv2_predict`` ignore. The weights of the network hold the zeros themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dstlib.errors import StateError
from dstlib.files import make_folder
from dstlib.masking.update import count_outside
from dstlib.sparsifier.saved import masks_of
from dstlib.torch_files import read_torch, write_torch

KEY = "dstlib"
STOCK = "nnUNetTrainer"
VERSION = 1
_NUMPY: list[Any] = [
    np.float64(0).__reduce__()[0],
    np.dtype,
    *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8")),
]


class Exported(NamedTuple):
    """What an exported checkpoint holds: counts over the sparse weights."""

    num_weights: int
    num_active: int
    num_total: int


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of nnU-Net: tensors on the CPU, numbers and plain containers, and nothing that runs code.

    Raises:
        StateError: There is no such file, it is damaged, or it is not a checkpoint of nnU-Net.
    """
    where, allowed = f"folder {path.parent}", "a checkpoint that nnU-Net has written"
    remedy = "Pass fold_0/checkpoint_final.pth, say."
    checkpoint = read_torch(path, where=where, allowed=allowed, remedy=remedy, safe_globals=_NUMPY)
    if not isinstance(checkpoint, dict) or not {"network_weights", "trainer_name"} <= checkpoint.keys():
        given = f"a {type(checkpoint).__name__} of something else"
        raise StateError.of(path.name, where, allowed=allowed, given=given, remedy=remedy)
    return checkpoint


def sparse_part(checkpoint: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns what dstlib has put into a checkpoint: ``settings`` and the state of the ``sparsifier``.

    Raises:
        StateError: Nothing, or something of another version.
    """
    part = checkpoint.get(KEY)
    version = part.get("version") if isinstance(part, dict) else None
    if not isinstance(part, dict) or version != VERSION or not {"settings", "sparsifier"} <= part.keys():
        allowed = f"the masks of a sparse training, version {VERSION}"
        given = "none" if part is None else f"version {version}"
        remedy = f"{checkpoint.get('trainer_name')} wrote it; only sparse trainers write and need masks."
        raise StateError.of(f"key {KEY!r}", where, allowed=allowed, given=given, remedy=remedy)
    return part


def export_checkpoint(source: Path, target: Path) -> Exported:
    """Writes a sparse checkpoint anew as one of the stock trainer, reads it back and compares every weight.

    Raises:
        StateError: The source cannot be read, has no masks or weights outside them, or holds an E2ENet, which the
            stock trainer cannot build; the target exists; what was written is not what was read.
    """
    checkpoint = read_checkpoint(source)
    weights = checkpoint["network_weights"]
    if any(name.startswith("fusion.") for name in weights):
        allowed = f"one that {STOCK} builds from the plans"
        remedy = f"Predict with the trainer that it was trained with, {checkpoint['trainer_name']}."
        raise StateError.of("network", source.name, allowed=allowed, given="an E2ENet", remedy=remedy)
    if target.exists():
        remedy = "Choose another name, or remove it first."
        raise StateError.of("target", str(target), allowed="a new file", given="an existing one", remedy=remedy)
    masks = masks_of(sparse_part(checkpoint, source.name)["sparsifier"])
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            remedy = "Its parts are of different trainings; export the checkpoint that a training wrote."
            raise StateError.of(name, source.name, allowed="a weight of the mask's shape", given="none", remedy=remedy)
        if outside := count_outside(weights[name], mask):
            remedy = "It was changed after the training; export the checkpoint that the training wrote."
            raise StateError.of(name, source.name, allowed="zeros outside the mask", given=outside, remedy=remedy)
    make_folder(target.parent)
    stock = {key: value for key, value in checkpoint.items() if key != KEY} | {"trainer_name": STOCK}
    write_torch(target, stock)
    written = read_checkpoint(target)
    copies = written["network_weights"]
    are_equal = copies.keys() == weights.keys() and all(torch.equal(copies[name], weights[name]) for name in weights)
    if KEY in written or written["trainer_name"] != STOCK or not are_equal:
        remedy = "Look at the disk, and repeat the command."
        raise StateError.of("weights", str(target), allowed="those read", given="others", remedy=remedy)
    num_active = sum(int(mask.sum()) for mask in masks.values())
    return Exported(len(masks), num_active, sum(mask.numel() for mask in masks.values()))
