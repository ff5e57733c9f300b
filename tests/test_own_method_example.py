"""The tutorial of your own parts: the example as a user runs it, and the page that explains it, block by block."""

import re
import runpy
import sys
import types
from pathlib import Path

import pytest
from pages import run_page

import dstlib

ROOT = Path(__file__).parents[1]
SCRIPT, PAGE = ROOT / "examples" / "own_method.py", ROOT / "docs" / "your_own.md"


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs the script in this process: its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_users_part_is_short():
    part = re.search(
        r"^# --- Your part begins.*?$(.*?)^# --- Your part ends", SCRIPT.read_text(), re.DOTALL | re.MULTILINE
    )
    lines = [line for line in part[1].splitlines() if line.strip() and not line.startswith("#")]
    assert 10 < len(lines) < 30
    assert {"def pull_then_size", "class Input", "class Restarts"} <= {re.split(r"[(:]", line)[0] for line in lines}


def test_it_checks_trains_and_finds_the_inputs_that_matter(example):
    code, output, errors = example("--steps", "400")
    assert code == 0, errors
    assert output.startswith("checked: ")
    losses = dict(re.findall(r"^([\w ]+?) +loss ([\d.]+) ", output, flags=re.MULTILINE))
    accuracy = {
        name: float(x) for name, x in re.findall(r"^([\w ]+?) +loss .* accuracy ([\d.]+)", output, re.MULTILINE)
    }
    found = {name: int(n) for name, n in re.findall(r"^(\w+) .* reads (\d) of the 8", output, flags=re.MULTILINE)}
    assert list(losses) == list(accuracy) == ["all inputs", "static", "find_inputs"]
    # by chance one of eight: a random eighth of 64 inputs
    assert found["find_inputs"] >= 6 > 3 >= found["static"]
    assert accuracy["find_inputs"] > accuracy["static"] + 0.1
    assert "1 sparse weight: 512 of 4,096 entries active (density 0.1250, sparsity 0.8750)" in output


def test_it_is_the_same_each_time(example):
    first, second = (example("--steps", "40", "--seed", "3")[1] for _ in range(2))
    assert first == second


def test_help_and_what_cannot_be_used(example):
    code, output, _ = example("--help")
    assert code == 0
    assert "A method of your own" in output
    assert output.count("(default:") == 2
    code, _, errors = example("--steps", "5")
    assert code == 2
    assert "--steps: expected 20 or more, for updates each 10, got 5" in errors


def test_the_pages_blocks_run_and_print_what_they_show(monkeypatch):
    """In a module that can be imported, as what a reader pastes into a file can: curves are pickled."""
    module = types.ModuleType("your_own")
    monkeypatch.setitem(sys.modules, "your_own", module)
    run_page(PAGE, module.__dict__, least=6)


def test_the_page_names_every_law():
    """What the check functions test, in the words of their messages."""
    for name in dstlib.testing.__all__:
        if name.startswith("check_"):
            laws = re.findall(r"^\s*- \*(.+?)\*:", getattr(dstlib.testing, name).__doc__, flags=re.MULTILINE)
            row = re.search(rf"^\| `{name}` \| (.*) \|$", PAGE.read_text(), flags=re.MULTILINE)
            assert row, name
            assert re.findall(r"\*(.+?)\*", row[1]) == laws
