"""How many threads can run at once, and whether others take the cores."""

import os
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstlib import cores
from dstlib.cores import cpu_quota, is_crowded, usable_cores, watch_crowd


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the only control group that there is."""
    group = tmp_path / "group"
    group.mkdir()

    def only(roots: dict[str, Path]):
        return [(kind, group) for kind in roots]

    monkeypatch.setattr(cores, "control_groups", only)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    return group


@pytest.mark.parametrize(
    ("files", "quota", "usable"),
    [
        ({}, inf, 4),
        ({"cpu.max": "max 100000\n"}, inf, 4),
        ({"cpu.max": "150000 100000\n"}, 1.5, 2),
        ({"cpu.max": "20000 100000\n"}, 0.2, 1),
        ({"cpu.max": "800000 100000\n"}, 8, 4),
        ({"cpu.max": "nonsense"}, inf, 4),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, inf, 4),
        ({"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}, 2.5, 3),
        ({"cpu.cfs_quota_us": "250000\n"}, inf, 4),
    ],
)
def test_a_quota_limits_how_many_run_at_once(files: dict[str, str], quota: float, usable: int, group: Path):
    for name, content in files.items():
        (group / name).write_text(content)
    assert cpu_quota() == quota
    assert usable_cores() == usable


def test_a_process_may_use_some_cores_here():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@given(st.integers(0, 10**6), st.floats(0, 1e5))
def test_more_stops_tell_more_of_others_and_more_time_less(stopped: int, seconds: float):
    if is_crowded(stopped, seconds):
        assert is_crowded(stopped + 1, seconds)
        assert is_crowded(stopped, seconds / 2)
        assert stopped > 2


def test_stops_are_counted_from_when_it_was_asked_and_remembered(monkeypatch: pytest.MonkeyPatch):
    stops, seconds = [5], [1.0]
    monkeypatch.setattr(cores, "_stops", lambda: stops[0])
    monkeypatch.setattr(cores.time, "process_time", lambda: seconds[0])
    is_crowded_since = watch_crowd()
    assert not is_crowded_since()
    stops[0] = 8
    assert is_crowded_since()
    seconds[0] = 100.0  # few stops in so long, but whoever was told has left by then
    assert is_crowded_since()
    assert not watch_crowd()()
