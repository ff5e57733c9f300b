"""Small labelled sets in every layout that is read: blobs in noise, five cases or more."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np

from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS

AFFINE = np.array([[-1.0, 0, 0, 10], [0, -1.0, 0, 20], [0, 0, 1.5, -30], [0, 0, 0, 1]])
NUM_CASES = 5  # as many as there are folds
SEQUENCES = {"_": ("flair", "t1", "t1ce", "t2"), "-": ("t2f", "t1n", "t1c", "t2w")}


def volumes(seed: int, *, num_channels: int = 1, values: Sequence[int] = (1, 2)) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws the channels and the label (x, y, z) of one case, with each of the values.

    Sizes, also of the foreground, and intensities differ from case to case.
    """
    shape, rng = (18 + seed % 3, 20, 16 + 2 * (seed % 2)), np.random.default_rng(seed)
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    label = np.zeros(shape, np.uint8)
    for i, value in enumerate(values):
        centre = [n * (0.25 + 0.5 * ((i + 1) / (len(values) + 1))) for n in shape]
        label[sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < 3 + 4 * (seed % 3)] = value
    level = 100 + 30 * (seed % 3)
    return [(rng.normal(level, 20, shape) + 60 * label).astype(np.int16) for _ in range(num_channels)], label


def save(file: Path, voxels: np.ndarray) -> None:
    """Writes voxels (x, y, z) as NIfTI, where all cases lie."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), file)


def numbered(names: Sequence[str]) -> dict[str, str]:
    """Returns a table that numbers names from 0, as the Decathlon does."""
    return {str(i): name for i, name in enumerate(names)}


def write_json(file: Path, content: object) -> None:
    """Writes a list."""
    file.write_text(json.dumps(content))


def decathlon(folder: Path, names: Sequence[str] = (), **changes: object) -> Path:
    """Writes a set of the Decathlon's layout."""
    names = names or [f"scan_{i}" for i in range(NUM_CASES)]
    for i, name in enumerate(names):
        (image,), label = volumes(i)
        save(folder / f"imagesTr/{name}.nii.gz", image)
        save(folder / f"labelsTr/{name}.nii.gz", label)
    content = {
        "name": "Toy",
        "modality": {"0": "MRI"},
        "labels": numbered(["background", "front", "back"]),
        "numTraining": len(names),
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
    }
    write_json(folder / "dataset.json", content | changes)
    return folder


def amos(folder: Path) -> Path:
    """Writes CT and MRI in the layout of AMOS22, with its own list of validation cases."""
    parts = {"training": ("Tr", [*range(1, 6), 507]), "validation": ("Va", [8, 600])}
    lists: dict[str, list[dict[str, str]]] = {}
    for part, (ending, ids) in parts.items():
        for number in ids:
            files = {key: f"./{key}s{ending}/amos_{number:04d}.nii.gz" for key in ("image", "label")}
            (image,), label = volumes(number)
            save(folder / files["image"], image)
            save(folder / files["label"], label)
            lists.setdefault(part, []).append(files)
    labels = numbered(["background", *AMOS_ORGANS])
    content = {"name": "AMOS", "modality": {"0": "CT"}, "labels": labels, "test": []}
    write_json(folder / "dataset.json", content | lists)
    return folder


def btcv(folder: Path) -> Path:
    """Writes the folders of BTCV."""
    for i in range(1, NUM_CASES + 1):
        (image,), label = volumes(i)
        save(folder / f"RawData/Training/img/img{i:04d}.nii.gz", image)
        save(folder / f"RawData/Training/label/label{i:04d}.nii.gz", label)
    return folder


def nnunet(folder: Path) -> Path:
    """Writes a raw set of nnU-Net v2, with two channels."""
    for i in range(NUM_CASES):
        images, label = volumes(i, num_channels=2)
        for channel, image in enumerate(images):
            save(folder / f"imagesTr/scan_{i}_{channel:04d}.nii.gz", image)
        save(folder / f"labelsTr/scan_{i}.nii.gz", label)
    labels = {"background": 0, "front": 1, "back": 2}
    content = {"channel_names": numbered(["T1", "T2"]), "labels": labels, "numTraining": NUM_CASES}
    write_json(folder / "dataset.json", content | {"file_ending": ".nii.gz"})
    return folder


def nnunet_v1(folder: Path) -> Path:
    """Writes a raw set of nnU-Net v1: the Decathlon's list, and files with numbered channels."""
    decathlon(folder)
    for file in sorted((folder / "imagesTr").iterdir()):
        file.rename(file.with_name(file.name.replace(".nii.gz", "_0000.nii.gz")))
    return folder


def monai(folder: Path) -> Path:
    """Writes BraTS 2021 as MONAI's tutorial lists it: four images per case, and the fold of each; no more."""
    brats(folder / "TrainingData")
    training = []
    for i, case in enumerate(sorted((folder / "TrainingData").iterdir())):
        begin = f"TrainingData/{case.name}/{case.name}"
        images = [f"{begin}_{sequence}.nii.gz" for sequence in SEQUENCES["_"]]
        training.append({"fold": i % 2, "image": images, "label": f"{begin}_seg.nii.gz"})
    write_json(folder / "folds.json", {"training": training})
    return folder


def brats(folder: Path, *, separator: str = "_", enhancing: int = 4, name: str = "BraTS2021_{:05d}") -> Path:
    """Writes the folders of BraTS 2021, or of another year."""
    for i in range(NUM_CASES):
        case = name.format(i)
        images, label = volumes(i, num_channels=4, values=(1, 2, enhancing))
        for sequence, image in zip((*SEQUENCES[separator], "seg"), (*images, label), strict=True):
            save(folder / case / f"{case}{separator}{sequence}.nii.gz", image)
    return folder


def brats_2023(folder: Path) -> Path:
    """Writes the folders of BraTS 2023."""
    return brats(folder, separator="-", enhancing=3, name="BraTS-GLI-{:05d}-000")


def kits(folder: Path) -> Path:
    """Writes the folders of KiTS: an image and a label file in each, called alike; the last has no label."""
    for i in range(NUM_CASES + 1):
        (image,), label = volumes(i)
        save(folder / f"case_{i:05d}/imaging.nii.gz", image)
        if i < NUM_CASES:
            save(folder / f"case_{i:05d}/segmentation.nii.gz", label)
    return folder


def totalsegmentator(folder: Path) -> Path:
    """Writes the folders of TotalSegmentator: an image and a mask per organ in each, and meta.csv with its division."""
    rows = ["image_id;age;split"]
    for i in range(NUM_CASES + 1):
        (image,), label = volumes(i)
        save(folder / f"s{i:04d}/ct.nii.gz", image)
        for value, organ in enumerate(("liver", "spleen"), start=1):
            save(folder / f"s{i:04d}/segmentations/{organ}.nii.gz", (label == value).astype(np.uint8))
        rows.append(f"s{i:04d};;{'train' if i < NUM_CASES else 'test'}")
    (folder / "meta.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    return folder


def abdomen_atlas(folder: Path) -> Path:
    """Writes the folders of AbdomenAtlas, with one label file in each."""
    for i in range(NUM_CASES):
        (image,), label = volumes(i)
        save(folder / f"BDMAP_{i:08d}/ct.nii.gz", image)
        save(folder / f"BDMAP_{i:08d}/combined_labels.nii.gz", label)
    return folder


SETS: dict[str, Callable[[Path], Path]] = {
    "decathlon": decathlon,
    "amos": amos,
    "btcv": btcv,
    "nnunet": nnunet,
    "nnunet-v1": nnunet_v1,
    "monai": monai,
    "brats": brats,
    "brats-2023": brats_2023,
    "kits": kits,
    "totalsegmentator": totalsegmentator,
    "abdomen-atlas": abdomen_atlas,
}
