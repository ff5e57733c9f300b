"""Whoever reads a message at a command line can do what it says: it names options that there are, and no functions.

Nor is it longer than anyone reads.
"""

import argparse
import ast
import re
from pathlib import Path

import numpy as np
import pytest

from dstlib.errors import DataError
from dstlib.zoo import e2enet
from dstlib.zoo.e2enet.baselines import BASELINES
from dstlib.zoo.e2enet.cli import _command_parser, _recipe_parser
from dstlib.zoo.e2enet.data.layouts.files import refuse_json
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, refuse_copies
from dstlib.zoo.e2enet.data.scans.integrity import Defect, Findings
from dstlib.zoo.e2enet.evaluation.scores import Evaluation
from dstlib.zoo.e2enet.inference.predict import Outcome, outcome_table
from dstlib.zoo.e2enet.paper.command import _parser as _paper_parser
from dstlib.zoo.e2enet.recipes import RECIPES

FILES = sorted(Path(e2enet.__file__).parent.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}
CALLED = re.compile(r"\w\(\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def texts(tree: ast.Module) -> list[str]:
    """The texts of a file, and the parts of those that are put together, but for its docstrings."""
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in described]
    return [node.value for node in constants if isinstance(node.value, str)]


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser, and of its commands."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for command in action.choices.values() for option in options_of(command)}
    return found


FUNCTIONS = {  # a name of one word may be a word
    node.name
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and "_" in node.name.strip("_")
} - {*BASELINES}  # which are names to choose
PARSERS = (_command_parser(), _paper_parser(None), *(_recipe_parser(recipe, None) for recipe in RECIPES.values()))
OPTIONS = set().union(*map(options_of, PARSERS))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_messages_name_options_that_there_are_and_no_functions(file):
    for text in texts(TREES[file]):
        assert not CALLED.search(text), f"{text!r} names a function"
        if " " in text:  # other texts are keys and names, and not read
            assert not (FUNCTIONS & set(re.findall(r"\w+", text))), f"{text!r} names a function"
        assert set(OPTION.findall(text)) <= OPTIONS | {"--nproc-per-node"}, f"{text!r} names an option that is none"


def test_the_check_finds_what_it_looks_for():
    tree = ast.parse('"""By only_modality()."""\nmessage = f"choose {1} with only_modality(), or read_manifest --moda"')
    assert texts(tree) == ["choose ", " with only_modality(), or read_manifest --moda"]
    (_, text) = texts(tree)
    assert CALLED.search(text)
    assert "read_manifest" in FUNCTIONS
    assert not set(OPTION.findall(text)) <= OPTIONS
    assert {"--run-dir", "--output", "--all", "--layout", "--learning-rate"} <= OPTIONS


MANY = [f"case_{i}" for i in range(1000)]


def test_a_thousand_findings_of_a_kind_are_ten_lines_and_their_number():
    defects = tuple(Defect(name, f"imagesTr/{name}.nii.gz is missing") for name in MANY)
    findings = Findings(manifest_name="toy", num_cases=1000, defects=defects, warnings=())
    head, _, *lines = findings.table().splitlines()
    assert head == "toy: 1000 cases, 1000 defects in 1000 cases, 0 warnings"
    assert len(lines) == 11
    assert lines[-1] == "and 990 more of this kind (--all lists them)"
    assert len(findings.table(whole=True).splitlines()) == 1002


def test_a_thousand_failed_predictions_are_ten_lines_and_their_number():
    outcomes = [Outcome(name=name, file=None, error=f"{name}.nii.gz cannot be read") for name in MANY]
    *_, last, counts = outcome_table(outcomes).splitlines()
    assert last == "and 990 more of this kind (--all lists them)"
    assert counts.endswith("1000 failed")
    assert len(outcome_table(outcomes, whole=True).splitlines()) == 1003


def test_a_thousand_cases_without_a_score_are_ten_lines_and_their_number():
    left_out = {name: f"no prediction {name}.nii.gz" for name in MANY}
    scores = Evaluation(("a",), ("liver",), {"dice": np.ones((1, 1))}, np.ones((1, 1, 2)), (1.0,), left_out)
    lines = [line for line in scores.table().splitlines() if line.startswith("  ")]
    assert len(lines) == 11
    assert lines[-1].startswith("  and 990 more of this kind (scores.json of --output")
    assert len(scores.to_json()["not_scored"]) == 1000


def test_copies_and_faults_of_a_list_are_told_by_ten(tmp_path):
    cases = [CaseFiles(name=name, images=(tmp_path / name,)) for name in MANY for _ in range(2)]
    with pytest.raises(DataError, match=r"case_106 2 times and 990 more\. Rename"):
        refuse_copies(tmp_path, cases)
    with pytest.raises(DataError, match=r"got 1000 faults\.[^\n]*(\n  entry [^\n]*){10}\n  and 990 more of this kind$"):
        refuse_json(tmp_path, allowed="a list", wrong=[f"entry {i} of 'training' is 'x'" for i in range(1000)])
