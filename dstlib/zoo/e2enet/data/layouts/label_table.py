"""nnU-Net's table of labels: names of values, or of regions of values, and of what is ignored."""

import re
from collections.abc import Mapping
from typing import Any

from dstlib.errors import few, shown
from dstlib.zoo.e2enet.data.layouts.labels import MAX_VALUE, Labels

IGNORE = "ignore"  # the name that nnU-Net reserves
_EXAMPLE = '{"background": 0, "liver": 1}'
_REGIONS = '{"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3]} with "regions_class_order": [1, 2]'


_VALUES = {str(value) for value in range(MAX_VALUE + 1)}


def read_table(table: object, order: object) -> tuple[tuple[str, ...], Labels] | str:
    """Reads 'labels' and 'regions_class_order' of a dataset.json, or says what is wrong with them.

    Where a name has several values, every name is one of a region, in the order of the table; else classes are ordered
    by their values.

    Reference: nnU-Net 2.8.1, ``LabelManager``, but that values may have gaps, and any other one be ignored.

    >>> read_table({"background": 0, "core": 2, "edema": 1}, None)
    (('edema', 'core'), Labels(values=(1, 2), regions=None, written=(), ignored=None))
    >>> read_table({"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    (('all', 'core'), Labels(values=(1, 2), regions=((1, 2), (2,)), written=(1, 2), ignored=3))
    """
    entries: dict[str, object] = table if isinstance(table, dict) else {}
    sets = {name: _values(value) for name, value in entries.items()}
    if not sets or not all(values and values <= {*range(MAX_VALUE + 1)} for values in sets.values()):
        return f"'labels' is {shown(table)} but gives each name a value from 0 to {MAX_VALUE}, as in {_EXAMPLE}"
    ignored = sets.pop(IGNORE, frozenset())
    foreground = {name: values for name, values in sets.items() if values != {0}}
    known = frozenset[int]().union(*foreground.values())
    if not foreground or len(foreground) == len(sets):
        return f"'labels' is {shown(table)} but names the background, which is 0, and more, as in {_EXAMPLE}"
    if 0 in known:
        return f"'labels' puts the background, 0, into {few([n for n, values in foreground.items() if 0 in values])}"
    if len(ignored) > 1 or ignored & {0, *known}:
        told = ", ".join(map(str, sorted({0, *known})))
        return f"'labels' ignores {shown(entries[IGNORE])} but one value that is none of {told}"
    values, unlabelled = tuple(sorted(known)), next(iter(ignored), None)
    if max(map(len, foreground.values())) > 1:
        return _regions(foreground, order, values, unlabelled)
    if len(values) < len(foreground):
        return f"'labels' is {shown(table)} but gives each value one name: several, where they are regions, are lists"
    names = {value: name for name, (value,) in foreground.items()}
    return tuple(names[value] for value in values), Labels(values=values, ignored=unlabelled)


def _regions(
    regions: Mapping[str, frozenset[int]], order: object, values: tuple[int, ...], ignored: int | None
) -> tuple[tuple[str, ...], Labels] | str:
    written = [_values(value) for value in order] if isinstance(order, list) else []
    if len(written) != len(regions) or not all(len(value) == 1 for value in written):
        told = f"'regions_class_order' is {shown(order)} but the value that each of the {len(regions)} regions"
        return f"{told} ({few([*regions])}) is written as, in that order, later ones on top, as in {_REGIONS}"
    pairs = zip(regions.items(), written, strict=True)
    if strange := [f"{name} as {min(value)}" for (name, region), value in pairs if not value <= region]:
        return f"'regions_class_order' is {shown(order)}, so it writes {few(strange)}, which is none of its values"
    members = tuple(tuple(sorted(region)) for region in regions.values())
    labels = Labels(values=values, regions=members, written=tuple(min(value) for value in written), ignored=ignored)
    return tuple(regions), labels


def _values(given: object) -> frozenset[int]:
    """Returns the values that an entry gives, of which nnU-Net takes text too; none where it is something else."""
    values = given if isinstance(given, list) else [given]
    are_numbers = all(type(v) is int or (isinstance(v, str) and re.fullmatch("[0-9]{1,3}", v)) for v in values)
    return frozenset(map(int, values)) if are_numbers else frozenset()


def table_notes(classes: tuple[str, ...], labels: Labels) -> list[str]:
    """Says what of a set's labels nnU-Net would not take, or no prediction can say.

    >>> table_notes(("liver",), Labels(values=(1,), ignored=255))
    ['value 255 is ignored, where nnU-Net demands 2, one above the highest class, and stops']
    """
    notes, num = [], len(labels.values)
    if labels.values != tuple(range(1, num + 1)):
        given = ", ".join(map(str, labels.values))
        notes.append(f"label files hold {given}, where nnU-Net demands 1 to {num} without gaps, and stops")
    if labels.ignored not in (None, top := max(labels.values) + 1):
        told = f"value {labels.ignored} is ignored, where nnU-Net demands {top}, one above the highest class"
        notes.append(f"{told}, and stops")
    for value, wanted, said in labels.unsaid():
        of, instead = (" and ".join(classes[k] for k in each) for each in (wanted, said))
        notes.append(
            f"no prediction says {of} at once, as value {value} does: by 'regions_class_order' it says {instead}"
        )
    return notes


def valued(table: object) -> dict[int, str] | None:
    """Returns the foreground classes by their values, ascending; None of a table without the background's 0 or theirs.

    >>> valued({"0": "background", "4": "enhancing tumour", "1": "necrotic core"})
    {1: 'necrotic core', 4: 'enhancing tumour'}
    """
    if not isinstance(table, dict) or "0" not in table or len(table) > MAX_VALUE + 1:
        return None
    holds = all(key in _VALUES and isinstance(name, str) for key, name in table.items())
    return {int(key): table[key] for key in sorted(table, key=int) if key != "0"} if holds and len(table) > 1 else None


def told_labels(content: Mapping[str, Any]) -> tuple[tuple[str, ...], Labels] | str | None:
    """Reads the labels of a dataset.json that lists no files, numbered as the Decathlon's or named as nnU-Net's.

    None where it has none, and text where something is wrong with them.
    """
    table = content.get("labels")
    if table is None:
        return None
    if (classes := valued(table)) is not None:
        return tuple(classes.values()), Labels(values=tuple(classes))
    return read_table(table, content.get("regions_class_order"))
