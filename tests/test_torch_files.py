"""Files of torch.save: what is read is what was saved, or there is one error."""

import io
import os
import struct
import sys
import warnings
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_same

from dstlib import StateError
from dstlib.torch_files import read_torch, write_torch

WORDS = {"where": "a run", "allowed": "its weights", "remedy": "Train it anew."}
CONTENT = {
    "weight": torch.arange(6.0).view(2, 3),
    "mask": torch.tensor([True, False, True]),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.zeros(0),
    "step": 7,
    "names": ["a", ("b", None, 0.5)],
}
CONTENT["part"] = CONTENT["weight"][1]  # of the same storage


def saved(content=CONTENT):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


FILE = saved()


def read(content, folder):
    (folder / "file.pt").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what it meets in a damaged pickle
        return read_torch(folder / "file.pt", **WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("torch")


def test_what_was_saved_is_read(folder):
    found = read(FILE, folder)
    assert_same(found, CONTENT)
    assert found["part"].untyped_storage().data_ptr() == found["weight"].untyped_storage().data_ptr()


def test_what_was_read_is_written_as_the_same_bytes(tmp_path):
    """A resumed run writes what was loaded, and is to end as one that never stopped, byte for byte."""
    state = {"state": [{"step": torch.ones(())}, {"step": torch.zeros(())}], "names": ("step", 1)}
    write_torch(tmp_path / "first.pt", state)
    found = read_torch(tmp_path / "first.pt", **WORDS)
    assert_same(found, state)
    found["names"] = ("".join(["st", "ep"]), 1)  # a text of its own
    write_torch(tmp_path / "second.pt", found)
    assert (tmp_path / "second.pt").read_bytes() == (tmp_path / "first.pt").read_bytes()


def flipped(content, at, bit):
    at %= len(content)
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def cut(content, at, bit):
    return content[: at % len(content)]


def filled(content, at, bit):
    at %= len(content)
    return content[:at] + b"\0" * 32 + content[at + 32 :]


def grown(content, at, bit):
    at %= len(content)
    return content[:at] + content[: 1 << bit] + content[at:]


@given(change=st.sampled_from([flipped, cut, filled, grown]), at=st.integers(0, 2**31), bit=st.integers(0, 7))
def test_a_changed_file_reads_the_same_or_is_refused(folder, change, at, bit):
    try:
        found = read(change(FILE, at, bit), folder)
    except StateError:
        return
    assert_same(found, CONTENT)


def rewritten(change, **options):
    """The archive with other members, their checksums right."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILE)) as old, zipfile.ZipFile(target, "w", **options) as new:
        for member in old.infolist():
            folder, _, name = member.filename.partition("/")
            for other, content in change(name, old.read(member)):
                new.writestr(f"{folder}/{other}" if other is not None else name, content)
    return target.getvalue()


def is_first(name):
    return name == "data/0"


def overlapping():
    """The archive whose directory says that the second storage lies where the first one does."""
    content = bytearray(FILE)
    with zipfile.ZipFile(io.BytesIO(FILE)) as archive:
        at = {member.filename.partition("/")[2]: member.header_offset for member in archive.infolist()}
    name = b"data/1"
    entry = content.rindex(name, 0, len(content)) - len("archive/") - 46  # of the directory, before the name
    assert content[entry : entry + 4] == b"PK\1\2"
    struct.pack_into("<I", content, entry + 42, at["data/0"])
    return bytes(content)


FORGED = {
    "less than promised": (
        lambda: rewritten(lambda name, x: [(name, x[:8] if is_first(name) else x)]),
        r"RuntimeError|other sizes",
    ),
    "more than promised": (
        lambda: rewritten(lambda name, x: [(name, x + x if is_first(name) else x)]),
        r"RuntimeError|other sizes",
    ),
    "one storage more": (
        lambda: rewritten(lambda name, x: [(name, x), *([("data/9", x)] if is_first(name) else [])]),
        "other sizes",
    ),
    "one storage less": (
        lambda: rewritten(lambda name, x: [] if is_first(name) else [(name, x)]),
        "RuntimeError",
    ),
    "compressed": (
        lambda: rewritten(lambda name, x: [(name, x)], compression=zipfile.ZIP_DEFLATED),
        "data.pkl is compressed",
    ),
    "in another byte order": (
        lambda: rewritten(lambda name, x: [(name, b"big" if name == "byteorder" and sys.byteorder == "little" else x)]),
        "byte order of another machine",
    ),
    "without a folder": (lambda: rewritten(lambda name, x: [(None, x)]), "several folders"),
    "overlapping": (overlapping, r"data/\d"),
    "no archive": (lambda: b"weights", "BadZipFile"),
    "empty": (lambda: b"", "BadZipFile"),
    "an archive of nothing": (lambda: rewritten(lambda name, x: []), "does not begin with a member"),
    "an archive behind something": (lambda: b"weights" + FILE, "does not begin with a member"),
    "code": (lambda: saved(torch.nn.Linear(1, 1)), "UnpicklingError"),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_torch_does_not_write_is_refused(folder, case):
    make, told = FORGED[case]
    with pytest.raises(StateError, match=rf"file\.pt of a run: expected its weights, got a damaged.*({told}).*Train"):
        read(make(), folder)


def test_two_members_of_one_name_are_refused(folder):
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = rewritten(lambda name, x: [(name, x)] * (1 + is_first(name)))
    with pytest.raises(StateError, match="two members of one name"):
        read(content, folder)


def test_no_file_and_a_folder_are_one_error_too(tmp_path):
    with pytest.raises(StateError, match="got no such file"):
        read_torch(tmp_path / "file.pt", **WORDS)
    with pytest.raises(StateError, match="got Is a directory"):
        read_torch(tmp_path, **WORDS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateError, match="got a pipe or a device, not a file"):
        read_torch(tmp_path / "pipe", **WORDS)


def test_text_of_another_class_is_written_as_it_is(tmp_path):
    """Such as a version of torch, which its own reader takes for text."""
    write_torch(tmp_path / "file.pt", {"version": torch.__version__})
    assert read_torch(tmp_path / "file.pt", **WORDS, safe_globals=[type(torch.__version__)]) == {
        "version": torch.__version__
    }
