"""What may be a data set, opened: a folder, and the JSON in it that says which files make the set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstlib.zoo.e2enet.data.layouts.files import read_json

LIST = "dataset.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder, and what its dataset.json says; ``content`` is empty where there is none, and ``list_file`` None.

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


def open_source(folder: Path, *, allow_outside: bool = False) -> Source:
    """Opens a folder, and reads its dataset.json, if it has one.

    Raises:
        DataError: It cannot be read, or is no JSON object.
    """
    file = folder / LIST
    if not file.is_file():
        return Source(folder=folder, allow_outside=allow_outside)
    return Source(folder=folder, list_file=file, content=read_json(file), allow_outside=allow_outside)
