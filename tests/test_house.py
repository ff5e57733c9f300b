"""The house keeps its shape: imports only go down, functions take few arguments, names are documented."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import dstlib
from dstlib.names import METHOD_NAMES

ROOT = Path(dstlib.__file__).parents[1]
FILES = sorted((ROOT / "dstlib").rglob("*.py"))

THIRD_PARTY = {"torch", "numpy", "einops"}  # all that `import dstlib` may load; the zoo may load more
# what is loaded when it is used: see test_import_loads_only_what_it_may
LAZILY = {
    "safetensors_files": {"safetensors"},
    "plot": {"matplotlib"},
    "export": {"safetensors"},
    "engine.gpu": {"triton", "cuda"},
    "testing": {"pytest"},
}
MODELS = ("torch.nn", "torch.optim", "torch.distributed")  # what the mathematics does not know


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT / "dstlib").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(file: Path) -> set[str]:
    """Modules named by the import statements of a file, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_only_go_down(capsys):
    """The contracts of pyproject.toml, which `lint-imports` shows too."""
    broken = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert not broken, capsys.readouterr().out


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_of_other_packages(file):
    here = module_of(file)
    if not here.startswith(("zoo", "integrations")):
        lazily = {name for room, names in LAZILY.items() if here.startswith(room) for name in names}
        allowed = THIRD_PARTY | lazily | {"dstlib"} | set(sys.stdlib_module_names)
        assert {name.partition(".")[0] for name in imports(file)} <= allowed
    if here.startswith("masking"):
        assert not {name for name in imports(file) if name.startswith(MODELS)}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_functions_take_few_arguments(file):
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            names = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)} - {"self", "cls"}
            # the one door takes every setting of a run, and attention what torch's takes
            limit = {"sparsify": 16, "forward": 8}.get(function.name, 7)
            assert len(names) <= limit, f"{function.name} takes {len(names)} arguments"
            rest = function.args.kwarg  # a host's event may send what is not taken; to pass it on is another matter
            used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            assert rest is None or rest.arg not in used, f"{function.name} passes **kwargs through"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_public_names_are_documented(file):
    """With a first line that reads alone, and what is raised in the form that tools read."""
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        assert text or node not in tree.body, f"{node.name} has no docstring"
        assert not text or text.partition("\n")[0].endswith("."), f"{node.name}: its first line is no sentence"
        assert "Errors:" not in text, f"{node.name}: what it raises stands under Raises:"


def test_the_door_is_small_and_documented():
    assert len(dstlib.__all__) <= 30
    for name in dstlib.__all__:
        thing = getattr(dstlib, name)
        assert thing.__doc__ or isinstance(thing, Mapping), name


def test_import_loads_only_what_it_may():
    code = (
        "import sys; import torch, numpy, einops; before = set(sys.modules); import dstlib;"
        "[getattr(dstlib, name) for name in dir(dstlib) if name != 'accelerate'];"  # torch then loads more of its own
        "print({m.split('.')[0] for m in set(sys.modules) - before})"
    )
    loaded = ast.literal_eval(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert loaded <= THIRD_PARTY | {"dstlib"} | set(sys.stdlib_module_names)


def test_the_door_opens_to_what_type_checkers_see_behind_it():
    """Names are loaded when they are asked for, so what a type checker reads is written beside them."""
    (block,) = [node for node in ast.parse((ROOT / "dstlib/__init__.py").read_text()).body if isinstance(node, ast.If)]
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert {name: f"dstlib.{home}" for home, names in dstlib._FROM.items() for name in names} == seen
    assert sorted(seen) == sorted(dstlib.__all__)
    assert set(dir(dstlib)) >= {*dstlib.__all__, *dstlib._ROOMS, "__version__"}
    for name, home in seen.items():
        assert getattr(dstlib, name) in (getattr(sys.modules[home], name), sys.modules[home])
    for name in dstlib._ROOMS:
        assert getattr(dstlib, name) is sys.modules[f"dstlib.{name}"]
    with pytest.raises(AttributeError, match="'dstlib' has no attribute 'sparsfy'"):
        _ = dstlib.sparsfy


def test_methods_are_known_by_name_before_they_are_loaded():
    assert tuple(dstlib.METHODS) == METHOD_NAMES


def test_a_module_that_is_called_like_a_name_of_the_door_is_callable_like_it():
    """As the module takes the name's place at the door once something imports it by its path."""
    assert {module_of(file) for file in FILES} & {*dstlib.__all__} == {"profile"}
    code = "import dstlib.profile; from torch import nn; print(dstlib.profile(nn.Linear(3, 2), (1, 3)).params)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "8\n"
