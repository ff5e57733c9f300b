"""What is installed is pinned by hashes, and nothing that is read can run as code."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

import dstlib

ROOT = Path(dstlib.__file__).parents[1]
FOLDERS = ("dstlib", "examples", "benchmarks", "findings", "tests", "tools")
LOCKS = {"requirements.txt": "constraints.txt", "requirements-nnunet.txt": "constraints-nnunet.txt"}

# by these, what is read could run
UNSAFE = re.compile(
    r"eval|exec|os\.(system|popen)|(marshal|shelve|dill|cloudpickle)\.\w+|joblib\.load"
    r"|c?[pP]ickle\.(loads?|Unpickler)|yaml\.(unsafe_|full_)?load(_all)?|torch\.hub\.load"
)
PAGES = "tests/pages.py"  # runs the programs of this project's own documentation
WHOLE = {"tests/engine/test_stand_in.py", "tests/fuzz/events.py"}  # read whole modules that they have just written


def name_of(node: ast.expr) -> str:
    """The dotted name of what is called; of a method of anything else, its own name after a dot."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def calls() -> list[tuple[str, int, str, ast.Call]]:
    """Every call in the project's Python files: file, line, dotted name, and the call."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    nodes = [
        (path.relative_to(ROOT).as_posix(), node) for path in files for node in ast.walk(ast.parse(path.read_text()))
    ]
    return [(file, node.lineno, name_of(node.func), node) for file, node in nodes if isinstance(node, ast.Call)]


def given(call: ast.Call, name: str) -> object:
    """The constant that a call gives to a keyword; None where it gives none."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_what_torch_loads_is_data_alone():
    """Stated in each call: a variable of the environment changes torch's default."""
    loads = [(file, line, given(call, "weights_only")) for file, line, name, call in calls() if name == "torch.load"]
    assert loads
    assert {file for file, _, weights_only in loads if weights_only is not True} == WHOLE


def is_round_trip(call: ast.Call) -> bool:
    """Whether a call reads what another one in its argument has just pickled."""
    inner = [node for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Call)]
    return any(name_of(each.func) in ("pickle.dumps", "ForkingPickler.dumps") for each in inner)


def test_nothing_that_is_read_runs():
    found = [
        (file, line, name) for file, line, name, call in calls() if UNSAFE.fullmatch(name) and not is_round_trip(call)
    ]
    assert [(file, name) for file, _, name in found if file == PAGES] == [(PAGES, "exec")]
    assert [place for place in found if place[0] != PAGES] == []


def test_arrays_are_read_without_pickles():
    readers = [(file, line, call) for file, line, name, call in calls() if name in ("np.load", "numpy.load")]
    assert readers
    assert [(file, line) for file, line, call in readers if given(call, "allow_pickle") not in (None, False)] == []


def test_no_shell_reads_a_command():
    assert [(file, line) for file, line, _, call in calls() if given(call, "shell")] == []


def entries(file: str) -> dict[str, tuple[str, set[str]]]:
    """The packages of a file of requirements, by name: their versions and hashes."""
    text = "".join(line for line in (ROOT / file).read_text().splitlines(True) if not line.startswith("#"))
    found = {}
    for entry in text.replace("\\\n", " ").splitlines():
        name, version = re.match(r"([\w.-]+)==([\w.+-]+)", entry).groups()
        found[normal(name)] = version, set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry))
    return found


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_every_package_has_hashes(file):
    packages = entries(file)
    assert packages
    assert [name for name, (_, hashes) in packages.items() if not hashes] == []


@pytest.mark.parametrize("file", sorted(LOCKS))
def test_what_is_locked_is_what_is_stated(file):
    """The versions are those of the constraints; else `python tools/lock.py` is due."""
    locked = {name: version for name, (version, _) in entries(file).items()}
    stated = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / LOCKS[file]).read_text(), re.MULTILINE))
    assert {normal(name): version for name, version in stated.items()}.items() <= locked.items()


def test_builds_of_torch_are_of_one_version():
    wanted = entries("requirements.txt")["torch"][0]
    assert entries("requirements-nnunet.txt")["torch"][0] == wanted
    assert entries("requirements-cpu.txt")["torch"][0].partition("+")[0] == wanted
    assert "nvidia-cublas" in entries("requirements-cuda.txt")


def test_what_builds_dstlib_is_pinned_by_hashes():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert required == [f"{name}=={version}" for name, (version, _) in entries("requirements-build.txt").items()]


def test_make_installs_nothing_without_hashes():
    """But the project itself, which is edited in place, by build tools that are there already."""
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if not line.startswith("#")]
    installs = [line for line in lines if re.search(r"\$\((INSTALL|HASHED)\)|pip install|pip3", line)]
    own = [line for line in installs if not line.startswith("INSTALL :=") and "HASHED" not in line]
    assert own == ["\t$(INSTALL) --no-build-isolation -e ."]
    assert "HASHED := $(INSTALL) --require-hashes" in lines
    assert any(line.startswith("INSTALL :=") and line.endswith("--no-deps") for line in lines)
