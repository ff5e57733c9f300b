"""The thread beside a prediction, and the bar over all of it."""

import threading
import time
import weakref

import pytest

from dstlib.zoo.e2enet.inference.line import Helper, Progress

LONG = 60  # seconds, which no sound program waits here


def test_work_is_done_in_order_and_errors_come_with_the_result():
    done = []

    def refuse():
        raise ValueError("no")

    with Helper() as helper:
        futures = [helper.start(lambda i=i: done.append(i)) for i in range(5)]
        failed = helper.start(refuse)
        assert helper.start(lambda: "after it").result(LONG) == "after it"
        assert done == [0, 1, 2, 3, 4]
        assert all(future.done() for future in futures)
        with pytest.raises(ValueError, match="no"):
            failed.result()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_at_the_end_what_is_owed_is_finished_and_nothing_else_begun(error):
    done, begun, go_on = [], threading.Event(), threading.Event()

    def first():
        begun.set()
        go_on.wait(LONG)
        done.append("first")

    def leave():
        with Helper() as helper:
            helper.start(first)
            helper.start(lambda: done.append("second"))
            helper.start(lambda: done.append("owed"), is_owed=True)
            assert begun.wait(LONG)
            threading.Timer(0.05, go_on.set).start()
            if error is not None:
                raise error

    if error is None:
        leave()
    else:
        with pytest.raises(error):
            leave()
    assert done == ["first", "owed"]


def test_nobody_waits_for_what_is_not_owed():
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def read():
        begun.set()
        go_on.wait(LONG)
        ended.set()

    with Helper() as helper:
        helper.start(lambda: None, is_owed=True).result(LONG)
        helper.start(read)
        assert begun.wait(LONG)
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(LONG)
    deadline = time.monotonic() + LONG
    while helper._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not helper._thread.is_alive(), "its thread is no more"


def test_what_was_done_is_not_kept():
    class Gigabytes:
        pass

    kept, freed = Gigabytes(), threading.Event()
    with Helper() as helper:
        weakref.finalize(kept, freed.set)
        future = helper.start(lambda kept=kept: None)
        del kept
        future.result(LONG)
        del future
        assert freed.wait(LONG)


# Three cases, of which the second cannot be read and the third stops half way; before they are read, as many passes
# are expected of them as of those that were.
def test_the_bar_counts_passes_that_will_be_made_by_hand():
    bar = Progress(3, hidden=True)
    assert bar.total == 0
    bar.begin("a", 10)
    assert bar.total == 30
    bar.step(4)
    bar.step(6)
    bar.end()
    bar.leave_out()
    assert bar.total == 20
    bar.begin("c", 16)
    assert bar.total == 26
    bar.step(5)
    bar.end()
    assert bar.total == 15
    bar.close()


def test_the_bar_tells_the_case_and_the_time_that_is_left(capsys):
    bar = Progress(2, hidden=False)
    bar.begin("scan", 8)
    bar.step(2)
    bar.end()
    bar.begin("other", 6)
    bar.step(2)
    bar.close()
    told = capsys.readouterr().err
    assert "0/16 " in told
    assert "scan, case 1 of 2" in told
    assert "4/8 " in told, "two were done of eight, and two of six"
    assert "other, case 2 of 2" in told
