"""Writes the requirements with hashes that `make` installs: from pyproject.toml, and the versions of constraints*.txt.

    pip install uv
    python tools/lock.py
    python tools/lock.py --cpu torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl

Each version gets the hashes of all its files on the index, so that every platform and Python finds its own.
``requirements.txt`` and ``requirements-nnunet.txt`` are complete but for the build tools of pyproject.toml, in
``requirements-build.txt``, and for what only torch's builds for CUDA need, in ``requirements-cuda.txt``; both sets take
the same torch. Its builds for CPUs alone, which lie on another index, are given as wheels, and go to
``requirements-cpu.txt``.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "requirements.txt": ("constraints.txt", ("medical", "itk", "viz", "timm", "trainers", "dev")),
    "requirements-nnunet.txt": ("constraints-nnunet.txt", ("nnunet",)),
}
FOR_TESTS = {"requirements-nnunet.txt": ("pytest", "hypothesis")}
CUDA = ("nvidia-", "cuda-", "triton")
HEAD = "# Written by tools/lock.py: do not edit.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", type=Path, nargs="+", metavar="WHEEL", help="torch's builds for CPUs alone")
    if wheels := parser.parse_args().cpu:
        write("requirements-cpu.txt", [f"{pinned(wheel)} \\\n    {hash_of(wheel)}" for wheel in wheels])
    build_tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    shared: dict[str, dict[str, str]] = {}
    for file, (constraints, extras) in EXTRAS.items():
        found = split(locked(constraints, extras, [*build_tools, *FOR_TESTS.get(file, ())]))
        parts = {
            "requirements-build.txt": {name: found[name] for name in found if name in names_of(build_tools)},
            "requirements-cuda.txt": {name: found[name] for name in found if name.startswith(CUDA)},
        }
        if shared and shared != parts:
            sys.exit(f"{constraints} wants another torch than the constraints before it: make them the same.")
        shared = parts
        others = set(found).difference(*parts.values())
        write(file, [text for name, text in found.items() if name in others])
    for file, part in shared.items():
        write(file, list(part.values()))


def names_of(requirements: list[str]) -> set[str]:
    """The names of pinned packages."""
    return {requirement.partition("==")[0] for requirement in requirements}


def locked(constraints: str, extras: tuple[str, ...], others: list[str]) -> str:
    """What uv finds for some extras and other requirements: every package with its version, markers and hashes."""
    asked = [word for extra in extras for word in ("--extra", extra)]
    options = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate"]
    command = ["uv", "pip", "compile", "--quiet", "pyproject.toml", "-", *asked, "-c", constraints, *options]
    return subprocess.run(
        command, cwd=ROOT, input="\n".join(others), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def split(text: str) -> dict[str, str]:
    """The entries of a file of requirements, by the names of their packages."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    starts = [i for i, line in enumerate(lines) if "==" in line]
    entries = ["\n".join(lines[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True)]
    return {entry.partition("==")[0]: entry for entry in entries}


def pinned(wheel: Path) -> str:
    """The requirement that a wheel for Linux meets, of its very build, and where: others have files of other hashes."""
    name, version, python, _, platform = wheel.stem.split("-")
    machine = re.sub(r"^manylinux_\d+_\d+_", "", platform)
    here = f"sys_platform == 'linux' and platform_machine == '{machine}'"
    return f"{name}=={version} ; python_version == '{python[2]}.{python[3:]}' and {here}"


def hash_of(wheel: Path) -> str:
    """The option that allows a file."""
    return f"--hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"


def write(file: str, entries: list[str]) -> None:
    (ROOT / file).write_text(HEAD + "".join(entry + "\n" for entry in entries))
    print(f"{file}: {len(entries)} packages", file=sys.stderr)


if __name__ == "__main__":
    main()
