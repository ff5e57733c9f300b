"""Work shared between processes, and folders that one process has to itself."""

import fcntl
import os
import signal

import pytest

from dstlib.errors import StateError
from dstlib.files import locked, make_folder
from dstlib.workers import share

WORDS = {"where": "a test", "remedy": "Try again."}


def test_workers_are_on_one_thread_and_deaf_to_what_the_parent_decides_on():
    asked = ["__import__('torch').get_num_threads()", *(f"__import__('signal').getsignal({n})" for n in (1, 2))]
    answers = dict(share(eval, asked, workers=2, **WORDS))
    assert [answers[each] for each in asked] == [1, signal.SIG_IGN, signal.SIG_IGN]


def test_a_worker_that_dies_is_one_clear_error():
    with pytest.raises(StateError, match=r"workers of a test: expected processes that finish.*memory\. Try again\."):
        list(share(os._exit, [1, 2], workers=1, **WORDS))


def test_what_ends_its_worker_even_alone_is_lost_and_the_others_are_done():
    asked = ["1", "__import__('os')._exit(1)", "2", "3"]
    answers = dict(share(eval, asked, workers=2, lost=lambda item: f"lost: {item}", **WORDS))
    assert answers == {"1": 1, "2": 2, "3": 3, asked[1]: f"lost: {asked[1]}"}


def test_what_a_worker_raises_arrives():
    with pytest.raises(ZeroDivisionError):
        list(share(eval, ["1 / 0"], workers=1, **WORDS))


def test_without_workers_the_next_item_waits_until_it_is_asked_for():
    done = []
    shared = share(done.append, ["a", "b"], workers=0, **WORDS)
    assert next(shared) == ("a", None)
    assert done == ["a"]


def refuse(error):
    raise StateError(str(error))


def test_a_held_folder_is_refused_or_waited_for(tmp_path):
    def give_up():
        raise StateError("held")

    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="held"), locked(tmp_path, if_held=give_up, refuse=refuse):
            pytest.fail("two hold it")
        waited = lambda: fcntl.flock(other, fcntl.LOCK_UN)  # noqa: E731
        with locked(tmp_path, if_held=waited, refuse=refuse), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of at the end


def test_a_folder_that_cannot_be_is_refused_in_words(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"cache of folder .*file: expected a folder to write to, got File exists"):
        make_folder(tmp_path / "file", what="cache")
    with pytest.raises(StateError, match="No such file"), locked(tmp_path / "none", if_held=print, refuse=refuse):
        pytest.fail("there is no folder")
