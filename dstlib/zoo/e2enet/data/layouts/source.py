"""What may be a data set, opened: a folder, and the JSON in it that says which files make the set."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstlib.errors import DataError
from dstlib.zoo.e2enet.data.layouts.files import read_json

LIST = "dataset.json"
MAX_LISTS = 20  # JSONs of a folder that are looked into


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder, and what the list in it says; ``content`` is empty where there is none, and ``list_file`` None.

    ``allow_outside`` says whether a list may name files outside of the folder.
    """

    folder: Path
    list_file: Path | None = None
    content: Mapping[str, Any] = field(default_factory=dict)
    allow_outside: bool = False

    @property
    def list_name(self) -> str:
        """The name of the JSON, for messages."""
        return LIST if self.list_file is None else self.list_file.name


def open_source(path: Path, *, allow_outside: bool = False, other_lists: bool = True) -> Source:
    """Opens a folder, and reads its dataset.json, if it has one; else the one JSON in it that lists 'training'.

    The path of such a list itself stands for the folder that it lies in. ``other_lists`` says whether another JSON than
    dataset.json may be the list.

    Raises:
        DataError: The list cannot be read, or is no JSON object, or there are several.
    """
    if path.suffix.lower() == ".json" and path.is_file():
        return Source(folder=path.parent, list_file=path, content=read_json(path), allow_outside=allow_outside)
    found = {path / LIST: read_json(path / LIST)} if (path / LIST).is_file() else {}
    if not found and other_lists:
        found = _data_lists(path)
    if len(found) > 1:
        allowed, given = f"a {LIST}, or one list", ", ".join(file.name for file in found)
        remedy = f"Pass the one that is meant in the place of the folder: {next(iter(found))}."
        raise DataError.of("lists", str(path), allowed=allowed, given=given, remedy=remedy)
    for file, content in found.items():
        return Source(folder=path, list_file=file, content=content, allow_outside=allow_outside)
    return Source(folder=path, allow_outside=allow_outside)


def _data_lists(folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the JSON files of a folder that list 'training'; none where there are many, as a scan each has."""
    if not folder.is_dir():
        return {}
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".json" and file.name[0] != ".")
    found = {}
    for file in files if len(files) <= MAX_LISTS else ():
        with suppress(DataError):  # a JSON that is no list of cases
            content = read_json(file)
            if isinstance(content.get("training"), list):
                found[file] = content
    return found
