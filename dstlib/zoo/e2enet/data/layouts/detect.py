"""Which files make a data set: recognising the layout of a folder, and reading it into a manifest.

No voxel is opened here: :mod:`dstlib.zoo.e2enet.data.scans.integrity` does that, for the whole set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from dstlib.errors import DataError, few, require, similar
from dstlib.zoo.e2enet.data.layouts.amos import amos_evidence, nearly_amos
from dstlib.zoo.e2enet.data.layouts.brats import brats_evidence, brats_images, read_brats
from dstlib.zoo.e2enet.data.layouts.btcv import btcv_evidence, read_btcv, training_folder
from dstlib.zoo.e2enet.data.layouts.case_folders import case_folders_evidence, images_in_folders, read_case_folders
from dstlib.zoo.e2enet.data.layouts.decathlon import decathlon_evidence, read_decathlon
from dstlib.zoo.e2enet.data.layouts.files import ENDINGS, case_channel, case_name, reading, scan_files
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest, refuse_copies
from dstlib.zoo.e2enet.data.layouts.monai import monai_evidence, read_monai
from dstlib.zoo.e2enet.data.layouts.nnunet import channel_cases, nnunet_evidence, read_nnunet
from dstlib.zoo.e2enet.data.layouts.nnunet_v1 import nnunet_v1_evidence, read_nnunet_v1
from dstlib.zoo.e2enet.data.layouts.source import LIST, Source, open_source


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the files of a data set lie: in words, by what it is recognised, and what reads it.

    ``evidence`` says by what a set has this layout, None if it has not. ``instead_of`` are more general layouts that
    fit too, wherever this one does.
    """

    looks: str
    evidence: Callable[[Source], str | None]
    read: Callable[[Source], Manifest]
    has_list: bool = True
    instead_of: tuple[str, ...] = ()


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "decathlon": Layout(
            looks="dataset.json with 'modality', 'labels' and 'training'; imagesTr/NAME.nii.gz, labelsTr/NAME.nii.gz",
            evidence=decathlon_evidence,
            read=partial(read_decathlon, layout="decathlon"),
        ),
        "amos": Layout(
            looks="as decathlon, with cases amos_NNNN and the 15 organs of AMOS22; imagesVa/amos_NNNN.nii.gz too",
            evidence=amos_evidence,
            read=partial(read_decathlon, layout="amos"),
            instead_of=("decathlon",),
        ),
        "btcv": Layout(
            looks="RawData/Training/img/img0001.nii.gz, RawData/Training/label/label0001.nii.gz; no dataset.json",
            evidence=btcv_evidence,
            read=read_btcv,
            has_list=False,
        ),
        "nnunet": Layout(
            looks="dataset.json with 'channel_names' and 'labels'; imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz",
            evidence=nnunet_evidence,
            read=read_nnunet,
        ),
        "nnunet-v1": Layout(
            looks="as decathlon, but for the files: imagesTr/NAME_0000.nii.gz, one per channel",
            evidence=nnunet_v1_evidence,
            read=read_nnunet_v1,
        ),
        "monai": Layout(
            looks="a JSON with 'training', whose entries may hold a list of images and a 'fold'",
            evidence=monai_evidence,
            read=read_monai,
        ),
        "brats": Layout(
            looks="NAME/NAME_flair.nii.gz, _t1, _t1ce, _t2 and _seg, or -t2f, -t1n, -t1c, -t2w and -seg",
            evidence=brats_evidence,
            read=read_brats,
            has_list=False,
        ),
        "case-folders": Layout(
            looks="NAME/ct.nii.gz, NAME/segmentations/ORGAN.nii.gz; or NAME/imaging.nii.gz, NAME/segmentation.nii.gz",
            evidence=case_folders_evidence,
            read=read_case_folders,
            has_list=False,
            instead_of=("nnunet", "decathlon"),
        ),
    }
)


def read_manifest(folder: str | Path, layout: str | None = None, *, allow_outside: bool = False) -> Manifest:
    """Reads which cases a data set on disk consists of, sorted by name: the same on every machine.

    ``layout`` is one of :data:`LAYOUTS`, or None to recognise it, by the evidence of what the folder holds. A file that
    a list names, or that a case needs, is in the manifest even if it does not exist: whoever reads the case says so.
    What dataset.json names lies below the folder, unless ``allow_outside``; a link there is the user's own, and leads
    where it leads.

    Raises:
        SettingError: There is no such layout.
        DataError: The folder has no layout that is known, or several fit; dataset.json cannot be used or leads out of
            the folder, a name cannot be that of a file, or two cases share one.

    >>> read_manifest("no/such/folder")
    Traceback (most recent call last):
    dstlib.errors.DataError: data set of no/such/folder: expected a folder with a dataset.json, ...
    """
    folder = Path(folder)
    alike, allowed = similar(str(layout), LAYOUTS), ", ".join(LAYOUTS)
    remedy = f"Did you mean {alike}? Without --layout it is recognised."
    require(layout in (None, *LAYOUTS), "layout", "a data set", allowed=allowed, given=repr(layout), remedy=remedy)
    with reading(folder):
        source = open_source(folder, allow_outside=allow_outside, other_lists=layout in (None, "monai"))
        if layout is None:
            chosen, evidence = _recognise(source)
        else:
            chosen, evidence = layout, ""
        if source.list_file is None and LAYOUTS[chosen].has_list:
            _refuse_folder(source)
        manifest = LAYOUTS[chosen].read(source)
        near = nearly_amos(source) if layout is None and chosen == "decathlon" else []
        return replace(manifest, recognised=evidence, notes=(*manifest.notes, *near))


def folder_cases(folder: Path, *, num_channels: int) -> tuple[CaseFiles, ...]:
    """Lists the images of a bare folder, for prediction, sorted by name.

    Either one file per case, NAME.nii.gz with all channels, or nnU-Net's NAME_0000.nii.gz, NAME_0001.nii.gz, ...: a
    file is a channel of NAME if its number is below ``num_channels`` and NAME_0000 is there, and else a case of its
    own. So amos_0001.nii.gz and amos_0004.nii.gz are two cases, and what a case is called does not depend on others.

    Where there is none, but folders of cases as BraTS, KiTS and TotalSegmentator have them, it is these.

    Raises:
        DataError: There is no scan, two files make the same case or channel, or there are more files of a NAME_0000
            than channels, so that the numbers may be those of cases.
    """
    with reading(folder):
        files, is_there = scan_files(folder), folder.is_dir()
    if not files and (inside := brats_images(folder) or images_in_folders(folder)):
        refuse_copies(folder, inside)
        return inside
    if not files:
        allowed = f"files that end in {', '.join(ENDINGS)}, or folders of DICOM slices"
        given = "none in it" if is_there else "no such folder"
        remedy = "Pass the folder that holds the images themselves."
        raise DataError.of("images", str(folder), allowed=allowed, given=given, remedy=remedy)
    named = {file: case_channel(file) for file in files}
    firsts = {name[0] for name in named.values() if name and name[1] == 0}
    numbered = [(file, *name) for file, name in named.items() if name and name[0] in firsts]
    if several := sorted({name for _, name, number in numbered if number >= num_channels}):
        allowed = f"one file per case, or {num_channels} numbered from _0000 for all"
        given = f"{', '.join(several[:3])} in more numbered files"
        remedy = "Predict with a network of as many channels; or rename the files, if these are the numbers of cases."
        raise DataError.of("images", str(folder), allowed=allowed, given=given, remedy=remedy)
    channels = [file for file, _, _ in numbered]
    whole = [CaseFiles(name=case_name(file), images=(file,)) for file in files if file not in {*channels}]
    cases = [*channel_cases(tuple(channels), num_channels=num_channels), *whole]
    refuse_copies(folder, cases)
    return tuple(sorted(cases, key=lambda case: case.name))


def _recognise(source: Source) -> tuple[str, str]:
    """Returns the one layout that fits, and its evidence.

    Raises:
        DataError: None does, or several.
    """
    fits = {name: evidence for name, each in LAYOUTS.items() if (evidence := each.evidence(source)) is not None}
    general = {name for found in fits for name in LAYOUTS[found].instead_of}
    fits = {name: evidence for name, evidence in fits.items() if name not in general}
    if not fits:
        _refuse_folder(source)
    if len(fits) > 1:
        given = ", and ".join(f"{name}, by {evidence}" for name, evidence in fits.items())
        remedy = f"Say which it is: {' or '.join(f'--layout {name}' for name in fits)}."
        raise DataError.of("layout", str(source.folder), allowed="one that fits", given=given, remedy=remedy)
    return next(iter(fits.items()))


def _refuse_folder(source: Source) -> NoReturn:
    folder, keys = source.folder, few([*map(repr, source.content)])
    width = max(map(len, LAYOUTS)) + 1
    layouts = [f"  {name:{width}} {each.looks}" for name, each in LAYOUTS.items()]
    remedy = "\n".join(["The layouts, as --layout names them, look so:", *layouts])
    if folder.is_dir():
        inside = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir() if file.name[0] != ".")
        given = "no dataset.json in it, but " + (few(inside) or "nothing")
        given = given if source.list_file is None else f"a {source.list_name} with {keys or 'nothing in it'}"
        if better := [f for f in sorted(folder.iterdir()) if (f / LIST).is_file() or training_folder(f)]:
            remedy = f"Did you mean {better[0]}? {remedy}"
    else:
        given = "a file" if folder.exists() else "no such folder"
    allowed = "a folder with a dataset.json, or of another layout"
    raise DataError.of("data set", str(folder), allowed=allowed, given=given, remedy=remedy)
