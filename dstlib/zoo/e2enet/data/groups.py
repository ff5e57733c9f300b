"""Which scans belong together, as those of one patient do: read from a file, or from the names of the cases."""

import csv
import io
import re
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path

from dstlib.errors import DataError, SettingError, few
from dstlib.files import read_whole
from dstlib.typed_json import MAX_BYTES, read_json

_ENDINGS = (".json", ".csv", ".tsv")


def read_groups(text: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the group of each name, by what ``--groups`` was given: a file, if there is one, or else a pattern.

    A file is JSON, ``{"case": "patient"}``, or a table whose first two columns are case and patient, parted by commas,
    semicolons or tabs, with a heading or without. A pattern is a regular expression with one group, which is looked for
    anywhere in each name. A file may hold other cases too.

    Raises:
        SettingError: The pattern is none, or has another number of groups.
        DataError: The file cannot be used, or a name has no group.

    >>> read_groups(r"(P\\d+)", ["P01_before", "P01_after", "P02_before"])
    {'P01_before': 'P01', 'P01_after': 'P01', 'P02_before': 'P02'}
    """
    file = Path(text)
    if file.suffix.lower() not in _ENDINGS and not isfile(text):  # of a long pattern Path would raise an error
        return _by_pattern(text, names)
    where, remedy = f"groups {file}", 'It is JSON, {"case": "patient"}, or a CSV with the columns case and patient.'
    if file.suffix.lower() == ".json":
        read = read_json(file, dict[str, str | int], where=where, remedy=remedy, foreign=True, error=DataError)
        table = {name: str(group) for name, group in read.items()}
    else:
        table = _by_table(file, where, remedy)
    if lacking := [name for name in names if name not in table]:
        remedy = "Give each case a patient, by the name of its file without channel and ending."
        given = f"none for {few(lacking)}, among {len(table)} entries"
        raise DataError.of("patients", where, allowed="one for each case", given=given, remedy=remedy)
    return {name: table[name] for name in names}


def _by_pattern(text: str, names: Sequence[str]) -> dict[str, str]:
    where = "the command line"
    remedy = r"Pass a file of JSON or CSV, or a regular expression such as 'BraTS-GLI-(\d+)-'."
    try:
        pattern = re.compile(text)
    except re.error as error:
        given = f"{text!r}: {error}"
        raise SettingError.of("--groups", where, allowed="a file or a pattern", given=given, remedy=remedy) from error
    if pattern.groups != 1:
        given = f"{text!r} with {pattern.groups}" + ", and no such file" * (pattern.groups == 0)
        raise SettingError.of("--groups", where, allowed="one (group) in the pattern", given=given, remedy=remedy)
    found = {name: pattern.search(name) for name in names}
    if lacking := [name for name, match in found.items() if match is None or not match[1]]:
        given, allowed = f"none in {few(lacking)}", f"a patient in each name by {text!r}"
        raise DataError.of("--groups", where, allowed=allowed, given=given, remedy=remedy)
    return {name: match[1] for name, match in found.items() if match}


def _by_table(file: Path, where: str, remedy: str) -> dict[str, str]:
    try:
        content = read_whole(file, max_bytes=MAX_BYTES).decode("utf-8-sig")
        delimiter = next((sign for sign in "\t;," if sign in content.partition("\n")[0]), ",")
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(content), delimiter=delimiter)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        given = getattr(error, "strerror", None) or str(error)
        raise DataError.of("content", where, allowed="a table in UTF-8", given=given, remedy=remedy) from error
    rows = [row for row in rows if any(row)]
    if odd := next((row for row in rows if len(row) < 2 or not (row[0] and row[1])), None):
        given = f"the row {delimiter.join(odd)!r}"
        raise DataError.of("content", where, allowed="a case and a patient in each row", given=given, remedy=remedy)
    table: dict[str, str] = {}
    for name, group in (row[:2] for row in rows):
        if table.setdefault(name, group) != group:
            given = f"{table[name]!r} and {group!r} for {name!r}"
            raise DataError.of("content", where, allowed="one patient for each case", given=given, remedy=remedy)
    return table
