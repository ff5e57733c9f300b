"""Every optimizer of every package that is installed: what comes of it is the table of docs/optimizers.md."""

from pathlib import Path

import pytest
from optimizers import PACKAGES, table, verdicts

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"


@pytest.mark.long
@pytest.mark.parametrize("package", PACKAGES)
def test_what_comes_of_each_optimizer_is_what_the_page_says(package):
    pytest.importorskip(PACKAGES[package], exc_type=ImportError)
    judged = verdicts(package)
    assert {v.name: v.faults for v in judged if v.faults} == {}
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {package} ")]
    assert table(package, judged) == rows


def test_the_page_lists_a_hundred_exact_optimizers():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if " | exact | " in line]
    assert sum(len(row[2].split(", ")) for row in rows) >= 100
