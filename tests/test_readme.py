"""The documentation's Python runs, block after block, and prints what it says it prints."""

import re
from pathlib import Path

import pytest
from pages import run_page

import dstlib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("page", "least"), [("README.md", 5), ("docs/methods.md", 1)])
def test_python_blocks_run_and_print_what_they_show(page, least):
    run_page(ROOT / page, {}, least=least)


def test_every_method_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "methods.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(dstlib.METHODS)


def test_every_command_of_the_makefile_that_is_named_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    assert named == {"demo", "test"}
    assert named <= targets


def test_files_that_are_linked_or_run_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)|python (examples/\w+\.py)", README):
        assert (ROOT / (path[0] or path[1])).is_file(), path
