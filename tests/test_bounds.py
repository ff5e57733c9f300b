"""How much memory is left, and what is refused for want of it."""

import os
import resource
import sys
from pathlib import Path

import pytest

from dstlib import bounds
from dstlib.bounds import available_memory, require_memory
from dstlib.errors import DataError


def test_what_is_left_is_some_of_what_the_machine_has():
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 2**40  # and swap


def test_a_limit_of_the_process_counts():
    pid = os.fork()
    if pid == 0:
        before = available_memory()
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
        os._exit(not 0 <= available_memory() < min(before + 1, 2**34))
    assert os.waitpid(pid, 0)[1] == 0


GROUP = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "12345"}, 12345),
        ({"memory.max": "max", "memory.current": "9"}, sys.maxsize),
        ({"memory.max": "0"}, 0),
        ({"memory.max": "900", "memory.current": "500"}, 900),  # without the other number none is known
        ({"memory.max": "900", "memory.current": "500", "memory.stat": "anon 1\ninactive_file 100\n"}, 500),
        ({"memory.max": "900", "memory.current": "950", "memory.stat": "anon 950\n"}, 0),
    ],
)
def test_what_a_group_above_has_left_counts(files, left, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    kinds = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    monkeypatch.setattr(bounds, "_GROUPS", dict.fromkeys(kinds, (tmp_path, *GROUP)))
    monkeypatch.setattr(bounds, "_of_machine", lambda: iter(()))
    assert available_memory() == left


@pytest.mark.parametrize("num_bytes", [10**15, 10**400])
def test_more_than_is_left_is_refused(num_bytes):
    require_memory(0, "voxels", "file x", remedy="Copy it again.")
    with pytest.raises(DataError, match=r"voxels of file x: expected no more than the .* GB of memory.* Copy it again"):
        require_memory(num_bytes, "voxels", "file x", remedy="Copy it again.", error=DataError)
