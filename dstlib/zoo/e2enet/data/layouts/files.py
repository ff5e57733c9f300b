"""What the readers of layouts share: names of cases, the NIfTI files of a folder, and dataset.json."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dstlib.errors import DataError

_ENDING = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_CHANNEL = re.compile(r"(.+)_(\d{4})$")


def case_name(file: str | Path) -> str:
    """Returns the name of a file without folder and NIfTI ending.

    >>> case_name("./imagesTr/amos_0001.nii.gz"), case_name("scan.v2.NII")
    ('amos_0001', 'scan.v2')
    """
    return _ENDING.sub("", Path(file).name)


def case_channel(file: str | Path) -> tuple[str, int] | None:
    """Returns the case and the channel that a file name of nnU-Net's form tells; None for another form.

    >>> case_channel("BRATS_001_0003.nii.gz"), case_channel("BRATS_001.nii.gz")
    (('BRATS_001', 3), None)
    """
    match = _CHANNEL.match(case_name(file))
    return (match[1], int(match[2])) if match else None


def nifti_files(folder: Path) -> tuple[Path, ...]:
    """Lists the .nii and .nii.gz files of a folder, sorted; none, if there is no such folder.

    Hidden files are left out: macOS puts a "._scan.nii.gz", which is no image, beside every "scan.nii.gz".
    """
    if not folder.is_dir():
        return ()
    files = (f for f in folder.iterdir() if _ENDING.search(f.name) and not f.name.startswith(".") and f.is_file())
    return tuple(sorted(files))


def by_case(folder: Path, *, prefix: str = "") -> dict[str, list[Path]]:
    """Lists the NIfTI files of a folder by their names, from which a prefix is taken.

    There are two of a name where a .nii lies beside a .nii.gz: two cases of one name, which are refused later.
    """
    found: dict[str, list[Path]] = {}
    for file in nifti_files(folder):
        found.setdefault(case_name(file).removeprefix(prefix), []).append(file)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Reads a dataset.json.

    Raises:
        DataError: It cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # an editor's byte order mark does no harm
    except (ValueError, OSError) as error:
        refuse_json(file, allowed="valid JSON", wrong=[str(error)])
    if not isinstance(content, dict):
        refuse_json(file, allowed="valid JSON", wrong=[f"a JSON {type(content).__name__} where an object belongs"])
    return content


def refuse_json(file: Path, *, allowed: str, wrong: Sequence[str]) -> NoReturn:
    """Refuses a dataset.json, with all that is wrong with it.

    Raises:
        DataError: Always.
    """
    remedy = "Restore the file from the data set's archive, or correct it by hand."
    raise DataError.of("content", str(file), allowed=allowed, given="; ".join(wrong), remedy=remedy)


def numbered(table: object) -> tuple[str, ...] | None:
    """Returns the names of a table that numbers them from 0, in that order; None if it does not.

    >>> numbered({"1": "T1w", "0": "FLAIR"})
    ('FLAIR', 'T1w')
    >>> numbered({"1": "T1w"})
    """
    if not isinstance(table, dict) or not table or set(table) != {str(i) for i in range(len(table))}:
        return None
    return tuple(str(table[str(i)]) for i in range(len(table)))
