"""The clock: which steps update, and how far along they are."""

import itertools
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstlib import SettingError
from dstlib.schedules import Every, Never

RUN = range(0, 1001)
intervals = st.integers(1, 300)
starts = st.integers(0, 300)
clocks = st.builds(Every, interval=intervals, start=starts, stop=st.integers(0, 900))


@pytest.mark.parametrize(
    ("clock", "due", "last"),
    [
        (Every(interval=100, stop=300), [100, 200, 300], 300),
        (Every(interval=100, stop=299), [100, 200], 200),
        (Every(interval=100, stop=250), [100, 200], 200),
        (Every(interval=100, start=50, stop=250), [150, 250], 250),
        (Every(interval=100, start=200, stop=450), [300, 400], 400),  # no update at the start itself
        (Every(interval=100, stop=99), [], 0),
        (Every(interval=100, start=500, stop=300), [], 500),
        (Every(interval=400), [400, 800], None),
        (Every(interval=1, stop=3), [1, 2, 3], 3),
    ],
)
def test_due_and_last(clock: Every, due: list[int], last: int | None) -> None:
    assert [step for step in RUN if clock.due(step)] == due
    assert clock.last == last


@pytest.mark.parametrize(
    ("clock", "shares"),  # of the way to the stop, and to the last update
    [
        (
            Every(interval=100, stop=250),
            {0: (0.0, 0.0), 1: (0.004, 0.005), 100: (0.4, 0.5), 200: (0.8, 1.0), 250: (1.0, 1.0), 9999: (1.0, 1.0)},
        ),
        (
            Every(interval=100, start=100, stop=340),
            {0: (0.0, 0.0), 100: (0.0, 0.0), 160: (0.25, 0.3), 300: (200 / 240, 1.0), 340: (1.0, 1.0)},
        ),
        (Every(interval=100, stop=160.5), {100: (100 / 160.5, 1.0)}),  # T_end need be no whole number
        (Every(interval=100), {0: (0.0, 0.0), 10**9: (0.0, 0.0)}),  # without an end there is no way to measure
        (Every(interval=100, start=10, stop=50), {0: (0.0, 0.0), 10: (0.0, 0.0), 11: (1 / 40, 1.0)}),  # no update
        (Every(interval=100, start=10, stop=5), {10: (0.0, 0.0), 11: (1.0, 1.0)}),
    ],
)
def test_progress_and_approach(clock: Every, shares: dict[int, tuple[float, float]]) -> None:
    assert {step: (clock.progress(step), clock.approach(step)) for step in shares} == shares


@given(clocks)
def test_the_last_update_ends_the_way_of_what_has_to_arrive(clock: Every) -> None:
    due = [step for step in range(1, 1001) if clock.due(step)]
    assert clock.last == (due[-1] if due else clock.start)
    assert all(b - a == clock.interval for a, b in itertools.pairwise(due))
    assert [clock.approach(step) == 1.0 for step in due] == [step == clock.last for step in due]


@given(clocks)
def test_what_fades_is_gone_at_the_stop_alone(clock: Every) -> None:
    due = [step for step in range(1, 1001) if clock.due(step)]
    assert [clock.progress(step) == 1.0 for step in due] == [step == clock.stop for step in due]


@given(clocks, st.integers(0, 1000), st.integers(0, 1000))
def test_no_way_turns_back_nor_leaves_the_unit_interval(clock: Every, a: int, b: int) -> None:
    for way in (clock.progress, clock.approach):
        assert 0.0 <= way(min(a, b)) <= way(max(a, b)) <= 1.0
    assert clock.progress(a) <= clock.approach(a)  # the last update comes before the stop, or at it


@given(intervals, starts)
def test_without_an_end_the_updates_go_on(interval: int, start: int) -> None:
    clock = Every(interval=interval, start=start)
    assert clock.last is None
    assert clock.due(start + 10**9 * interval)


@given(st.integers(0, 10**12))
def test_never(step: int) -> None:
    assert not Never().due(step)
    assert Never().progress(step) == Never().approach(step) == 1.0


@pytest.mark.parametrize("interval", [0, -100])
def test_an_interval_below_one_step_is_refused(interval: int) -> None:
    with pytest.raises(SettingError, match=f"interval .* at least 1, got {interval}"):
        Every(interval=interval)


def test_a_clock_is_a_value() -> None:
    clock = Every(interval=100, stop=1000)
    assert pickle.loads(pickle.dumps(clock)) == clock
    assert pickle.loads(pickle.dumps(Never())) == Never()
    assert replace(clock, interval=200).last == 1000
    with pytest.raises(FrozenInstanceError):
        clock.interval = 1  # type: ignore[misc]
    with pytest.raises(SettingError):
        replace(clock, interval=0)
