"""The documentation's Python runs, block after block, and prints what it says it prints."""

import contextlib
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
from pages import run_page

import dstlib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ROOMS = ("dstlib", "tests", "benchmarks", "examples", "docs")


@pytest.mark.parametrize(
    ("page", "least"),
    [("README.md", 5), ("docs/methods.md", 1), ("docs/networks.md", 2), ("docs/optimizers.md", 1)],
)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    """Files by their paths or names, and modules, classes and functions of dstlib."""
    text = page.read_text()
    names = {path.name for room in ROOMS for path in (ROOT / room).rglob("*")}
    for name in re.findall(r"`([\w/]+\.(?:py|cu|cuh|inc|def|h|cpp))`", text):
        assert Path(name).name in names, name
    for name in re.findall(rf"`((?:{'|'.join(ROOMS)})(?:/[\w.]+)+/?)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`dstlib(?!\.h`)((?:\.\w+)+)(?:\(.*?\))?`", text):  # the header is among the files
        found = dstlib
        for part in name[1:].split("."):
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{found.__name__}.{part}") if isinstance(found, ModuleType) else None
            found = getattr(found, part)
