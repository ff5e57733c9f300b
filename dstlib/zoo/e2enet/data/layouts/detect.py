"""Which files make a data set: recognising the layout of a folder, and reading it into a manifest.

No voxel is opened here: :mod:`dstlib.zoo.e2enet.data.scans.integrity` does that, for the whole set.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from dstlib.errors import DataError, require, similar
from dstlib.zoo.e2enet.data.layouts.btcv import read_btcv, training_folder
from dstlib.zoo.e2enet.data.layouts.decathlon import read_decathlon
from dstlib.zoo.e2enet.data.layouts.files import ENDINGS, case_channel, case_name, read_json, reading, scan_files
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest, refuse_copies
from dstlib.zoo.e2enet.data.layouts.nnunet import channel_cases, read_nnunet


@dataclass(frozen=True)
class Layout:
    """How the files of a data set lie: in words, and what reads the folder and its dataset.json, if it has one.

    ``read`` is told, last, whether dataset.json may name files outside of the folder.
    """

    looks: str
    read: Callable[[Path, dict[str, Any], bool], Manifest]
    has_list: bool = True


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "decathlon": Layout(
            "dataset.json with 'modality', 'labels' and 'training'; imagesTr/NAME.nii.gz, labelsTr/NAME.nii.gz",
            partial(read_decathlon, layout="decathlon"),
        ),
        "amos": Layout(
            "as decathlon, with 'validation' and imagesVa/NAME.nii.gz, labelsVa/NAME.nii.gz",
            partial(read_decathlon, layout="amos"),
        ),
        "btcv": Layout(
            "RawData/Training/img/img0001.nii.gz, RawData/Training/label/label0001.nii.gz; no dataset.json",
            lambda folder, *_: read_btcv(folder),
            has_list=False,
        ),
        "nnunet": Layout(
            "dataset.json with 'channel_names' and 'labels'; imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz",
            read_nnunet,
        ),
    }
)


def read_manifest(folder: str | Path, layout: str | None = None, *, allow_outside: bool = False) -> Manifest:
    """Reads which cases a data set on disk consists of, sorted by name: the same on every machine.

    ``layout`` is one of :data:`LAYOUTS`, or None to recognise it. A file that a list names, or that a case
    needs, is in the manifest even if it does not exist: whoever reads the case says so. What dataset.json names lies
    below the folder, unless ``allow_outside``; a link there is the user's own, and leads where it leads.

    Raises:
        SettingError: There is no such layout.
        DataError: The folder has no layout that is known, dataset.json cannot be used or leads out of the folder, a
            name cannot be that of a file, or two cases share one.

    >>> read_manifest("no/such/folder")
    Traceback (most recent call last):
    dstlib.errors.DataError: data set of no/such/folder: expected a folder with a dataset.json, ...
    """
    folder = Path(folder)
    allowed, remedy = ", ".join(LAYOUTS), f"Did you mean {similar(str(layout), LAYOUTS)}? None recognises it."
    require(layout in (None, *LAYOUTS), "layout", "read_manifest()", allowed=allowed, given=repr(layout), remedy=remedy)
    with reading(folder):
        content = read_json(folder / "dataset.json") if (folder / "dataset.json").is_file() else None
        chosen = LAYOUTS[layout or _recognise(folder, content)]
        if content is None and chosen.has_list:
            _refuse_folder(folder)
        return chosen.read(folder, content or {}, allow_outside)


def folder_cases(folder: Path, *, num_channels: int) -> tuple[CaseFiles, ...]:
    """Lists the images of a bare folder, for prediction, sorted by name.

    Either one file per case, NAME.nii.gz with all channels, or nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ...:
    the latter if every name ends so, with numbers below ``num_channels``, and at least one in _0000. So
    amos_0001.nii.gz, amos_0004.nii.gz are two cases.

    Raises:
        DataError: There is no scan, or two files make the same case or channel.
    """
    with reading(folder):
        files, is_there = scan_files(folder), folder.is_dir()
    if not files:
        allowed = f"files that end in {', '.join(ENDINGS)}, or folders of DICOM slices"
        given = "none in it" if is_there else "no such folder"
        remedy = "Pass the folder that holds the images themselves."
        raise DataError.of("images", str(folder), allowed=allowed, given=given, remedy=remedy)
    named = [case_channel(file) for file in files]
    numbers = {name[1] if name else num_channels for name in named}
    if 0 in numbers and max(numbers) < num_channels:
        cases = channel_cases(files, num_channels=num_channels)
        refuse_copies(folder, cases)
        return cases
    stems = Counter(name[0] for name in named if name)
    if 0 in numbers and (several := [stem for stem, count in stems.items() if count > 1]):
        allowed = f"one file per case, or {num_channels} numbered from _0000 for all"
        given = f"{', '.join(several[:3])} in several numbered files"
        remedy = "Predict with a network of as many channels, or rename the files."
        raise DataError.of("images", str(folder), allowed=allowed, given=given, remedy=remedy)
    cases = tuple(CaseFiles(name=case_name(file), images=(file,)) for file in files)
    refuse_copies(folder, cases)
    return cases


def _recognise(folder: Path, content: dict[str, Any] | None) -> str:
    if content is None:
        return "btcv" if training_folder(folder) else _refuse_folder(folder)
    if "channel_names" in content or "file_ending" in content:
        return "nnunet"
    if not {"modality", "labels", "training"} & set(content):
        _refuse_folder(folder, "a dataset.json with " + (", ".join(map(repr, content)) or "nothing in it"))
    return "amos" if "validation" in content or (folder / "imagesVa").is_dir() else "decathlon"


def _refuse_folder(folder: Path, given: str = "") -> NoReturn:
    remedy = "\n".join(["The layouts look so:", *(f"  {name:10} {each.looks}" for name, each in LAYOUTS.items())])
    if folder.is_dir():
        inside = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir() if file.name[0] != ".")
        given = given or "no dataset.json in it, but " + (", ".join(inside[:8]) or "nothing")
        if better := [f for f in sorted(folder.iterdir()) if (f / "dataset.json").is_file() or training_folder(f)]:
            remedy = f"Did you mean {better[0]}? {remedy}"
    else:
        given = "a file" if folder.exists() else "no such folder"
    allowed = "a folder with a dataset.json, or BTCV's"
    raise DataError.of("data set", str(folder), allowed=allowed, given=given, remedy=remedy)
