"""Files of every format that is read, changed in all ways: refused in words, read as they were, or made anew."""

import os
import signal
from dataclasses import replace

import file_formats
import pytest
from file_formats import FORMATS, Format
from mutate_files import faults, mutate, table, told

from dstlib.errors import StateError

NUM = 2  # mutations of each format; tests/mutate_files.py makes thousands


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    file_formats.prepare(folder)
    return folder


@pytest.mark.parametrize("of", FORMATS, ids=lambda of: of.name)
def test_no_changed_file_is_used_crashes_or_writes_outside(of, prepared):
    if of.name.startswith("transformers"):
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    if of.name == "cifar10 npz":
        pytest.importorskip("PIL")
    found = faults(mutate(range(NUM), of=of, seed=1, prepared=prepared))
    assert not found, "\n".join(map(told, found))


def make(scene, prepared):
    (scene / "file").write_bytes(bytes(range(200)) + b"\xbc")


def read(scene):
    """Reads a file whose last byte is the sum of the others, and says it otherwise where it is damaged."""
    content = (scene / "file").read_bytes()
    if not content or sum(content[:-1]) % 256 != content[-1]:
        raise StateError("the file is damaged")
    return content.hex()


SOUND = Format(
    name="sums", file="file", make=make, read=read, damage=(lambda rng, content: (content[:-1] + b"\1", "other sum"),)
)
CRAFTED = (lambda rng, content: (b"\7\7", "another sound file"),)


def write(name):
    def read_and_write(scene):
        (scene / name).write_text("x")
        return ""

    return read_and_write


def crash(scene):
    os.kill(os.getpid(), signal.SIGKILL)


def remember(scene):
    return len(bytearray(200 << 20).replace(b"\0", b"\1")) * 0


def show(scene):
    print("\x1b[2J")


def remake(scene):
    (scene / "file").write_bytes(b"new")
    return ""


SEEN = {
    "refused": {},
    "equal": {"read": lambda scene: "always"},
    "remade": {"read": remake, "may_write": ("file",)},
    "another": {"damage": (), "craft": CRAFTED},
    "silent, of a damaged file": {"damage": CRAFTED},
    "silent, of a crafted file": {"damage": (), "craft": CRAFTED, "law": lambda value, sound: "another length"},
    "raw": {"read": lambda scene: 1 // 0},
    "raw, by a signal": {"read": crash},
    "raw, by memory": {"read": remember},
    "raw, by control characters": {"read": show},
    "outside": {"read": write("../victim")},
    "outside, in the scene": {"read": write("other"), "may_write": ("cache/*",)},
}


@pytest.mark.parametrize("verdict", SEEN)
def test_the_harness_sees(tmp_path, verdict):
    changes = SEEN[verdict]
    if verdict.startswith(("raw", "outside", "remade")):
        wanted = changes["read"]
        changes = {**changes, "read": lambda scene: wanted(scene) if read_damaged(scene) else ""}
    (result,) = mutate([0], of=replace(SOUND, **changes), seed=0, prepared=tmp_path)
    assert result.verdict == verdict.partition(",")[0], result
    assert (result in faults([result])) == (result.verdict in ("silent", "raw", "outside"))
    assert "sums" in table([result])


def read_damaged(scene):
    return (scene / "file").read_bytes()[-1] != 0xBC


def test_a_mutation_is_a_function_of_format_seed_and_number(prepared):
    of = next(of for of in FORMATS if of.name == "decisions.json")
    first, again, other = (mutate(range(3), of=of, seed=seed, prepared=prepared) for seed in (0, 0, 1))
    assert first == again
    assert [result.mutation for result in first] != [result.mutation for result in other]
