"""Long lists of lines are told by their kinds, and every line that is left out is counted."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstlib.errors import few
from dstlib.report import MOST_KINDS, MOST_OF_A_KIND, abridge

WORDS = st.sampled_from(["is missing", "has no label", "cannot be read", "lies elsewhere"])


@given(st.lists(WORDS, max_size=80))
def test_every_line_is_told_or_counted(texts):
    names = [f"case_{i}" for i in range(len(texts))]
    lines = [f"{name}: imagesTr/{name}.nii.gz {text}" for name, text in zip(names, texts, strict=True)]
    told = abridge(lines, names)
    kept = [line for i, line in enumerate(lines) if texts[:i].count(texts[i]) < MOST_OF_A_KIND]
    assert [line for line in told if line in lines] == kept, "the first of each kind, in their order"
    counts = [re.match(r"and (\d+) more of this kind$", line)[1] for line in told if line not in lines]
    assert len(kept) + sum(map(int, counts)) == len(lines)


@pytest.mark.parametrize(
    "text",
    [
        "scan {i} lies {i}.5 mm away from its image",
        "has shape ({i}, 4, 5), but its image has (3, 4)",
        "data/a{i}/b.nii is missing",
        "names 'x {i} y' twice",
        "{name} has no label",
        "imagesTr/{name}.nii.gz is missing",
    ],
)
def test_lines_that_differ_in_numbers_names_paths_and_quotations_are_of_one_kind(text):
    names = ["anna", "b. c", "a", *(f"case_{i}" for i in range(997))]
    lines = [text.format(i=i, name=name) for i, name in enumerate(names)]
    told = abridge(lines, names, whole="--all lists them")
    assert told == [*lines[:MOST_OF_A_KIND], "and 990 more of this kind (--all lists them)"]


def test_a_thousand_kinds_are_told_by_a_few_and_counted():
    letters = "abcdefghij"
    lines = [f"{a}{b}{c} is wrong" for a in letters for b in letters for c in letters]
    assert abridge(lines) == [*lines[:MOST_KINDS], f"and {1000 - MOST_KINDS} more of {1000 - MOST_KINDS} other kinds"]


def test_names_are_told_by_ten():
    assert few([]) == ""
    assert few([*"abcdefghij"]) == "a, b, c, d, e, f, g, h, i, j"
    assert few([*"abcdefghijk"]) == "a, b, c, d, e, f, g, h, i, j and 1 more"
