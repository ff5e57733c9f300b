"""Killed at any of its writes, or at any moment, a run that goes on leaves what one leaves that was never killed."""

import random

import kill_points
import pytest
from kill_points import contents, differences, in_a_process, killing

# What is written, and when a dozen of the kills come: before, half-way, before and after the renaming, and so on.
STAGES = ("before opening", "half of", "after syncing", "before os.rename", "after renaming to", "after syncing")
DOZEN = {
    "run/config.json": ("half of", "before os.rename"),
    "run/checkpoint.pt": STAGES,
    "run/metrics.csv": ("half of", "after renaming to"),
    "run/result.json": ("half of", "before os.rename"),
}


def stage(points, file, name, *, of_the_end):
    """The number of the point at which a file is written, in its first writing or the last one."""
    renamed = [number for number, point in enumerate(points) if point == f"after renaming to {file}"]
    first = (renamed[-1] if of_the_end else renamed[0]) - STAGES.index("after renaming to")
    return next(number for number in range(first, first + len(STAGES)) if points[number].startswith(name))


def test_killed_in_a_dozen_of_its_writes_it_ends_as_if_it_had_not_been(monkeypatch):
    monkeypatch.setattr("dstlib.zoo.e2enet.report._draw", lambda *_: None)  # figures take most of the time
    with killing("run") as run:
        for file, names in DOZEN.items():
            for turn, name in enumerate(names):
                number = stage(run.points, file, name, of_the_end=turn % 2 == 0)
                assert run.at(number) == [], run.points[number]
        logged = next(number for number, point in enumerate(run.points) if point.startswith("half a line of"))
        assert run.at(logged + 1) == []


@pytest.mark.long
@pytest.mark.parametrize("name", kill_points.WORKS)
def test_killed_at_any_write_it_ends_as_if_it_had_not_been(name):
    with killing(name) as work:
        wrong = {work.points[number]: found for number in range(len(work.points)) if (found := work.at(number))}
    assert not wrong


@pytest.mark.long
def test_killed_thirty_times_at_random_moments_it_ends_as_if_it_had_not_been():
    kills, rng = 0, random.Random(0)
    with killing("run") as run:
        while kills < 30:
            number, wrong = run.at_random(rng)
            assert not wrong
            kills += number


def test_leftovers_and_differences_are_seen(tmp_path):
    """Else the tests above would hold of everything."""

    def work(folder):
        (folder / "file").write_bytes(b"content")
        kept = folder / "kept"
        kept.write_bytes(kept.read_bytes() + b"x" if kept.exists() else b"")

    (tmp_path / "whole").mkdir()
    points = in_a_process(work, tmp_path / "whole")
    assert points == ["before opening file", "before opening kept"]
    (tmp_path / "killed").mkdir()
    assert in_a_process(work, tmp_path / "killed", at=1) is None
    assert contents(tmp_path / "killed") == {"file": b"content"}
    in_a_process(work, tmp_path / "killed")
    in_a_process(work, tmp_path / "killed")
    (tmp_path / "killed" / "left.tmp").touch()
    found = differences(contents(tmp_path / "killed"), contents(tmp_path / "whole"))
    assert found == ["left.tmp is left over", "kept differs"]


def test_every_way_of_writing_is_a_point(tmp_path):
    def work(folder):
        from dstlib.files import write_whole

        write_whole(folder / "whole", bytes(10))
        with open(folder / "lines", "a") as file:
            file.write("a line\n")
        (folder / "sub").mkdir()
        (folder / "lines").rename(folder / "sub" / "lines")
        (folder / "whole").unlink()

    (tmp_path / "work").mkdir()
    points = in_a_process(work, tmp_path / "work")
    assert [point for point in points if "/" not in point or "sub" in point][:6] == [
        "before opening a temporary file",
        "half of a temporary file",
        "after syncing a temporary file",
        "before os.rename whole",
        "after renaming to whole",
        "after syncing .",
    ]
    assert points[6:] == [
        "before opening lines",
        "half a line of lines",
        "before os.mkdir sub",
        "before os.rename sub/lines",
        "before os.remove whole",
    ]
    (tmp_path / "killed").mkdir()
    assert in_a_process(work, tmp_path / "killed", at=1) is None
    (left,) = (tmp_path / "killed").iterdir()
    assert left.stat().st_size == 5
    (tmp_path / "log").mkdir()
    assert in_a_process(work, tmp_path / "log", at=7) is None
    assert (tmp_path / "log" / "lines").read_text() == "a l"
