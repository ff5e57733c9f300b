"""Images for examples/cifar10.py: CIFAR-10 in two file layouts, a procedural stand-in, and the augmentation.

Shapes: N images, B images of a batch, C channels, H, W height and width.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dstlib.errors import DataError, SettingError

SIZE, NUM_CLASSES = 32, 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images
BINARY = "cifar-10-batches-bin"
RECORD = 1 + 3 * SIZE * SIZE  # a label, then the red, green and blue plane
MOST_PACKED = 64  # bytes of an npz that one of the file may stand for; whole numbers take a tenth of that
RESTORE = "Restore the file, or leave --data out for procedural images."


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images (N, C, H, W) in uint8 with their labels (N,), to train on and to test on, and what they are."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def to(self, device: str, *, first: int | None = None) -> "Images":
        """Moves the images to a device, with the first so many to train on (None: all)."""
        tensors = {
            "train": self.train[:first],
            "train_labels": self.train_labels[:first],
            "test": self.test,
            "test_labels": self.test_labels,
        }
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def open_images(folder: Path | None) -> Images:
    """Reads CIFAR-10 from a folder, or draws procedural images without one.

    The folder holds cifar10_train.npz and cifar10_test.npz, or the official binary files (*_batch*.bin), or the
    official folder of them.

    Raises:
        DataError: A file is missing, damaged, or not of its layout.
        SettingError: JPEG files want Pillow, which is not installed.
    """
    if folder is None:
        (train, train_labels), (test, test_labels) = drawn(10_000, seed=0), drawn(2_000, seed=1)
        name = "procedural stand-in, not CIFAR-10"
    elif any(folder.glob("cifar10_*.npz")):
        train, train_labels = read_npz(folder / "cifar10_train.npz")
        test, test_labels = read_npz(folder / "cifar10_test.npz")
        name = "CIFAR-10 from JPEG"
    else:
        official = folder / BINARY if (folder / BINARY).is_dir() else folder
        if not any(official.glob("*_batch*.bin")):
            given = "neither" if folder.is_dir() else "no such folder"
            allowed = f"cifar10_train.npz and cifar10_test.npz, or {BINARY} with data_batch_1.bin and so on"
            remedy = "Check the path, or leave --data out for procedural images."
            raise DataError.of("images", f"folder {folder}", allowed=allowed, given=given, remedy=remedy)
        parts = [read_binary(official / f"data_batch_{i}.bin") for i in range(1, 6)]
        train, train_labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        test, test_labels = read_binary(official / "test_batch.bin")
        name = "CIFAR-10"
    return Images(name=name, train=train, train_labels=train_labels, test=test, test_labels=test_labels)


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """Reads images and labels of an npz: ``jpeg`` (uint8, all files end to end), ``offsets`` (N + 1), ``labels``.

    Raises:
        DataError: The file is missing, damaged, or not of this layout.
        SettingError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        remedy = "pip install pillow, or use the official binary files."
        allowed = "Pillow, to decode JPEG"
        raise SettingError.of("--data", str(path), allowed=allowed, given=error, remedy=remedy) from error
    held = _arrays(path)
    jpeg, offsets, labels = held["jpeg"], held["offsets"], held["labels"]
    whole = offsets[0] == 0 and offsets[-1] == len(jpeg) and bool((np.diff(offsets) > 0).all())
    if not whole or len(offsets) != len(labels) + 1:
        given = f"{len(labels)} labels and {len(offsets)} offsets up to {offsets[-1]} in {len(jpeg)} bytes"
        _refuse(
            "offsets", path, allowed="rising ones, one more than labels, from 0 to the number of bytes", given=given
        )
    images = np.empty((len(labels), SIZE, SIZE, 3), np.uint8)
    for i in range(len(labels)):
        try:
            with Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()), formats=("JPEG",)) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            _refuse(f"image {i}", path, allowed="a JPEG file", given=error)
        if pixels.shape != images.shape[1:]:
            given = f"{pixels.shape[1]}×{pixels.shape[0]}"
            _refuse(f"image {i}", path, allowed=f"{SIZE}×{SIZE} pixels", given=given)
        images[i] = pixels
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), _labels(labels, path)


def read_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Reads images and labels of one file of the official binary layout.

    Raises:
        DataError: The file is missing, damaged, or not of this layout.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        _refuse("file", path, allowed="a file of the binary layout", given=error.strerror)
    if not len(data) or len(data) % RECORD:
        _refuse("length", path, allowed=f"a multiple of {RECORD} bytes", given=f"{len(data)}: it is cut short")
    records = data.reshape(-1, RECORD)
    planes = records[:, 1:].reshape(-1, 3, SIZE, SIZE)
    return torch.from_numpy(planes.copy()), _labels(records[:, 0], path)


def _arrays(path: Path) -> Mapping[str, NDArray[np.generic]]:
    """Reads the arrays of an npz that are looked for; any damage is one error."""
    if not path.is_file():
        _refuse("file", path, allowed="a file", given="none")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        most = MOST_PACKED * path.stat().st_size + 2**20
        if unpacked > most:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        with np.load(path, allow_pickle=False) as npz:
            held = {name: npz[name] for name in ("jpeg", "offsets", "labels")}
    except Exception as error:  # of zip, zlib and numpy alike: each damage has an exception of its own
        _refuse(
            "contents", path, allowed="an npz with jpeg, offsets and labels", given=f"{error} (damaged or cut short)"
        )
    for name, array in held.items():
        if (
            not isinstance(array, np.ndarray)  # bytes, of what is no npy
            or array.ndim != 1
            or array.dtype.kind not in "iu"
            or not len(array)
            or (name == "jpeg") > (array.itemsize == 1)
        ):
            allowed = "one row of uint8" if name == "jpeg" else "one row of whole numbers"
            given = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "something else"
            _refuse(name, path, allowed=allowed, given=given)
    return held


def _labels(labels: NDArray[np.generic], path: Path) -> Tensor:
    wrong = (labels < 0) | (labels >= NUM_CLASSES)
    if wrong.any():
        first = int(wrong.argmax())
        _refuse(f"label {first}", path, allowed=f"0 to {NUM_CLASSES - 1}", given=int(labels[first]))
    return torch.from_numpy(labels.astype(np.int64))


def _refuse(what: str, path: Path, *, allowed: str, given: object) -> NoReturn:
    raise DataError.of(what, f"file {path}", allowed=allowed, given=given, remedy=RESTORE)


def drawn(num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draws images: one of five shapes with one of two textures, in any colour, place and size, over noise."""
    generator = generator_of(seed, 0, "shapes")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=generator)

    labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    axis = torch.arange(SIZE, dtype=torch.float32)
    y = axis[None, :, None] - uniform(10, 22, 1, 1)
    x = axis[None, None, :] - uniform(10, 22, 1, 1)
    radius, turn = uniform(6, 10, 1, 1), uniform(-0.4, 0.4, 1, 1)
    u, v = (turn.cos() * x + turn.sin() * y) / radius, (turn.cos() * y - turn.sin() * x) / radius
    distance, square = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
    shapes = (
        distance < 1,
        square < 0.9,
        (v > -0.8) & (v < 0.9) & (u.abs() < (v + 0.8) * 0.6),  # a triangle
        (distance < 1) & (distance > 0.55),  # a ring
        (square < 1) & (torch.minimum(u.abs(), v.abs()) < 0.3),  # a cross
    )
    inside = torch.stack(shapes)[labels % 5, torch.arange(num)]
    striped = ((u * radius * 1.6).sin() > 0) & (labels >= 5)[:, None, None]
    colours, ground = uniform(0, 1, 2, 3), uniform(0.2, 0.8, 1, 1, 3)
    ink = torch.where(striped[..., None], colours[:, None, None, 0], colours[:, None, None, 1])
    image = torch.where(inside[..., None], ink, ground) + 0.15 * torch.randn(num, SIZE, SIZE, 3, generator=generator)
    return (image.clamp(0, 1) * 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous(), labels


def generator_of(seed: int, step: int, name: str) -> torch.Generator:
    """Makes a CPU generator that is a function of (seed, step, name) alone."""
    digest = hashlib.blake2b(f"{seed}:{step}:{name}".encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


def batch_indices(num: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Chooses the images (B,) of a step: each pass over them has an order of its own, and none is left out.

    >>> torch.cat([batch_indices(6, 4, seed=0, step=s) for s in range(3)]).sort().values.tolist()
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    """
    at = torch.arange(step * batch_size, (step + 1) * batch_size)
    first, last = int(at[0]) // num, int(at[-1]) // num
    orders = torch.cat([_order(num, seed, number) for number in range(first, last + 1)])
    return orders[at - first * num]


@lru_cache(maxsize=4)
def _order(num: int, seed: int, number: int) -> Tensor:
    return torch.randperm(num, generator=generator_of(seed, number, "order"))


def augmented(images: Tensor, *, crop: int, seed: int, step: int) -> Tensor:
    """Flips and crops a batch (B, C, H, W) at random, padded by ``crop`` before: a pure function of seed and step."""
    generator, num = generator_of(seed, step, "augment"), len(images)
    top, left = torch.randint(2 * crop + 1, (2, num, 1), generator=generator)
    flip = torch.rand(num, 1, generator=generator) < 0.5
    axis = torch.arange(SIZE)
    rows, columns = top + axis, left + torch.where(flip, axis.flip(0), axis)
    at = (rows[:, :, None] * (SIZE + 2 * crop) + columns[:, None]).view(num, 1, -1).to(images.device)
    padded = functional.pad(images, (crop,) * 4).flatten(2)
    return padded.gather(2, at.expand(-1, 3, -1)).view(images.shape)


def normalized(images: Tensor) -> Tensor:
    """Makes float images (B, C, H, W) of uint8 ones, channels-last in memory."""
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) * 255 for value in (MEAN, STD))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
