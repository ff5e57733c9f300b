"""The tolerance of surface Dice, as a command line says it: one for all classes, or a file with one for each."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dstlib.errors import DataError, SettingError, few
from dstlib.typed_json import read_json


def read_tolerance(text: str, classes: Sequence[str]) -> float | tuple[float, ...]:
    """Returns millimetres for all classes, or the ones of each in the JSON of a file, ``{"liver": 5, "aorta": 2}``.

    A file may name other classes too.

    Raises:
        SettingError: The text is neither a number of millimetres nor the name of a file of JSON.
        DataError: The file cannot be used, or a class is missing in it.

    >>> read_tolerance("2.5", ["liver"])
    2.5
    """
    try:
        millimetres = float(text)
    except ValueError:
        return _of_file(Path(text), classes)
    if not 0 <= millimetres < math.inf:
        _refuse(text)
    return millimetres


def _of_file(file: Path, classes: Sequence[str]) -> tuple[float, ...]:
    if file.suffix.lower() != ".json":
        _refuse(str(file))
    where, remedy = f"tolerances {file}", 'It is JSON with millimetres for each class: {"liver": 5, "aorta": 2}.'
    table = read_json(file, dict[str, float], where=where, remedy=remedy, foreign=True, error=DataError)
    if lacking := [name for name in classes if name not in table]:
        given = f"none for {few(lacking)}, among {len(table)} entries"
        raise DataError.of("classes", where, allowed="a tolerance for each class", given=given, remedy=remedy)
    odd = [f"{table[name]} for {name}" for name in classes if not 0 <= table[name] < math.inf]
    if odd:
        allowed = "millimetres from 0 up"
        raise DataError.of("tolerances", where, allowed=allowed, given=few(odd), remedy=remedy)
    return tuple(table[name] for name in classes)


def _refuse(given: str) -> NoReturn:
    allowed, remedy = "millimetres from 0 up, or a file of JSON", "Pass 1, or a file with millimetres for each class."
    raise SettingError.of("--tolerance", "the command line", allowed=allowed, given=repr(given), remedy=remedy)
