"""Whoever reads a message at a command line can do what it says: it names options that there are, and no functions."""

import argparse
import ast
import re
from pathlib import Path

import pytest

from dstlib.zoo import e2enet
from dstlib.zoo.e2enet.cli import _command_parser, _recipe_parser
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
}
OPTIONS = options_of(_command_parser()).union(*(options_of(_recipe_parser(each, None)) for each in RECIPES.values()))


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
