"""From shares to whole numbers: hand-worked splits, an oracle in fractions, and the counts of shrinking rounds."""

import math
import time
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import exact

from dstlib.masking import falling, round_down
from dstlib.masking.counts import apportion, round_up

Shares = Mapping[str, float]
Caps = Mapping[str, int]
Problem = tuple[int, Shares, Caps, Caps]
plain_shares = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, 0.1, 1e-9, 1e9])
any_shares = plain_shares | st.floats(0, allow_infinity=False) | st.sampled_from([5e-324, 1e308])


@st.composite
def problems(draw: st.DrawFn, share: st.SearchStrategy[float] = any_shares) -> Problem:
    """A number to split, between the least and the most that the names can take; floors are all alike or not."""
    size = st.integers(0, 20) | st.sampled_from([0, 1, 1000, 10**8])
    room = {f"n{i}": num for i, num in enumerate(draw(st.lists(size, min_size=1, max_size=8)))}
    alike = draw(st.sampled_from([0, 0, 1, 3, None]))
    floors = {name: draw(st.integers(0, 9)) if alike is None else alike for name in room}
    caps = {name: floors[name] + num for name, num in room.items()}
    idle = draw(st.sampled_from([False, False, True]))
    shares = {name: 0.0 if idle else draw(share) for name in caps}
    lowest, highest = sum(floors.values()), sum(caps.values())
    return draw(st.integers(lowest, highest) | st.sampled_from([lowest, highest])), shares, caps, floors


def split(num: int, shares: Shares, caps: Caps, floors: Caps | None = None) -> dict[str, int]:
    """x = min(max(λ·share, floor), cap), with the λ at which all add up to ``num``, found between breakpoints.

    Then the largest remainders. If even an infinite λ does not suffice, the names of share zero get the rest, by
    their caps.
    """
    floors = dict.fromkeys(caps, 0) if floors is None else floors
    share = {name: Fraction(max(shares[name], 0)) for name in caps}
    if not any(share.values()):
        share = {name: Fraction(cap) for name, cap in caps.items()}
    full = {name: caps[name] for name in caps if share[name]}
    idle = {name: caps[name] for name in caps if not share[name]}
    if idle and sum(full.values()) + sum(floors[name] for name in idle) < num:
        return {**full, **split(num - sum(full.values()), idle, idle, floors)}

    def at(scale: Fraction) -> dict[str, Fraction]:
        return {name: min(max(scale * share[name], Fraction(floors[name])), Fraction(caps[name])) for name in caps}

    breaks = sorted({Fraction(0), *(Fraction(b) / share[n] for n in full for b in (floors[n], caps[n]))})
    below = max((b for b in breaks if sum(at(b).values()) <= num), default=Fraction(0))
    slope = sum(share[n] for n in full if floors[n] <= below * share[n] < caps[n])
    ideal = at(below + (num - sum(at(below).values())) / slope if slope else below)
    whole = {name: math.floor(x) for name, x in ideal.items()}
    by_remainder = sorted(caps, key=lambda name: whole[name] - ideal[name])
    return {name: whole[name] + (name in by_remainder[: num - sum(whole.values())]) for name in caps}


# Tables


@pytest.mark.parametrize(
    ("num", "shares", "caps", "least", "expected"),
    [
        (0, [1, 2], [5, 5], 0, [0, 0]),
        (6, [1, 2], [5, 5], 0, [2, 4]),
        (10, [1, 2], [5, 5], 0, [5, 5]),
        # remainders: 2⅓ each, and the one left over goes to the earliest; 1.25, 2.5, 1.25: to the largest
        (7, [1, 1, 1], [9, 9, 9], 0, [3, 2, 2]),
        (8, [1, 1, 1], [9, 9, 9], 0, [3, 3, 2]),
        (5, [1, 2, 1], [9, 9, 9], 0, [1, 3, 1]),
        # caps: of 10 by 3 : 1 : 1 the first takes 4 of its 6; the others halve the rest
        (10, [3, 1, 1], [4, 100, 100], 0, [4, 3, 3]),
        # of 20 by 8 : 4 : 1 the first two would take 12.3 and 6.15; once the first stops at 2, the second would
        # take 14.4 of 18 and stops at 7, and the third has 11
        (20, [8, 4, 1], [2, 7, 90], 0, [2, 7, 11]),
        (3, [5, 1], [0, 4], 0, [0, 3]),
        (0, [5, 1], [0, 0], 0, [0, 0]),
        # shares of zero get nothing, unless the others are full, and then by their caps
        (3, [1, 0], [5, 5], 0, [3, 0]),
        (5, [1, 0, 0], [2, 6, 3], 0, [2, 2, 1]),
        (3, [0, 0, 0], [0, 6, 3], 0, [0, 2, 1]),
        (4, [0, 0], [3, 9], 0, [1, 3]),
        (3, [-7, 1, -1], [9, 9, 9], 0, [0, 3, 0]),
        (3, [-7, -1], [4, 2], 0, [2, 1]),
        # at least 2: they are taken from the others in proportion, so 100 : 300 stays 1 : 3
        (10, [98, 1, 1], [99, 99, 99], 2, [6, 2, 2]),
        (46, [0, 0, 0, 100, 300], [9, 9, 9, 99, 99], 2, [2, 2, 2, 10, 30]),
        # both: the first stops at 5; of the other 5 by 5 : 1 the third would have less than one, and has 2
        (10, [90, 5, 1], [5, 9, 9], 2, [5, 3, 2]),
        # extremes: sums beyond the largest double, and the smallest there is
        (10, [1e308, 1e308, 1], [9, 9, 9], 0, [5, 5, 0]),
        (9, [5e-324, 1e-323], [99, 99], 0, [3, 6]),
        (10, [1e308, 5e-324, 0], [4, 5, 9], 0, [4, 5, 1]),
    ],
)
def test_splits_by_hand(num: int, shares: list[float], caps: list[int], least: int, expected: list[int]) -> None:
    names = "abcde"[: len(caps)]
    given_shares, given_caps = dict(zip(names, shares, strict=True)), dict(zip(names, caps, strict=True))
    floors = dict.fromkeys(names, least)
    assert list(apportion(num, given_shares, given_caps, floors=floors).values()) == expected
    assert list(split(num, given_shares, given_caps, floors).values()) == expected  # so the oracle is right, too


@pytest.mark.parametrize(
    ("num", "shares", "caps", "floors", "expected"),
    [
        (10, [8, 2], [9, 9], [0, 1], [8, 2]),  # a floor is part of a share, not on top of it
        (3, [0.94, 2.06], [9, 9], [1, 0], [1, 2]),
        # the first has 3 instead of 1; the other 7 go by 1 : 8, which is 0.8 and 6.2
        (10, [1, 1, 8], [9, 9, 9], [3, 0, 0], [3, 1, 6]),
        (10, [6, 3, 1], [4, 9, 9], [0, 0, 3], [4, 3, 3]),  # what the first leaves is what the third lacks
        (6, [5, 0], [9, 9], [0, 2], [4, 2]),
        (9, [0, 0], [9, 3], [1, 3], [6, 3]),
    ],
)
def test_floors_by_hand(num: int, shares: list[float], caps: list[int], floors: list[int], expected: list[int]) -> None:
    by_name = [dict(zip("abc", values, strict=False)) for values in (shares, caps, floors)]
    assert list(apportion(num, *by_name[:2], floors=by_name[2]).values()) == expected
    assert list(split(num, *by_name).values()) == expected


@pytest.mark.parametrize(("num", "caps", "least"), [(3, [1, 1], 0), (1, [9, 9], 1), (3, [0, 9], 1), (-1, [9, 9], 0)])
def test_what_cannot_be_split_is_our_own_bug(num: int, caps: list[int], least: int) -> None:
    names = dict(zip("ab", caps, strict=True))
    with pytest.raises(AssertionError, match="no way to split"):
        apportion(num, dict.fromkeys(names, 1.0), names, floors=dict.fromkeys(names, least))


@pytest.mark.parametrize("share", [math.nan, math.inf])
def test_a_share_that_is_no_number_never_gives_a_count(share: float) -> None:
    with pytest.raises((ValueError, OverflowError)):
        apportion(3, {"a": share, "b": 1.0}, {"a": 9, "b": 9})


# Laws


@given(problems())
def test_equals_the_oracle(problem: Problem) -> None:
    num, shares, caps, floors = problem
    assert apportion(num, shares, caps, floors=floors) == split(num, shares, caps, floors)


@given(problems(any_shares | st.floats(-10, 10)))
def test_adds_up_within_bounds(problem: Problem) -> None:
    num, shares, caps, floors = problem
    found = apportion(num, shares, caps, floors=floors)
    assert list(found) == list(caps)
    assert sum(found.values()) == num
    assert all(type(n) is int and floors[name] <= n <= caps[name] for name, n in found.items())


@given(problems())
def test_among_those_within_bounds_it_is_proportional(problem: Problem) -> None:
    """Counts are within one of a common multiple of the shares: (x - 1) / s of one is below (y + 1) / t of another."""
    num, shares, caps, floors = problem
    found = apportion(num, shares, caps, floors=floors)
    free = [name for name in caps if shares[name] > 0 and floors[name] < found[name] < caps[name]]
    for a in free:
        for b in free:
            assert (found[a] - 1) * Fraction(shares[b]) < (found[b] + 1) * Fraction(shares[a])


@given(problems())
def test_a_larger_share_that_comes_first_gets_no_less(problem: Problem) -> None:
    num, shares, caps, floors = problem
    found = apportion(num, shares, caps, floors=floors)
    names = list(caps)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if shares[a] >= shares[b] > 0 and caps[a] >= caps[b] and floors[a] >= floors[b]:
                assert found[a] >= found[b]


@given(problems(), st.integers(0, 100))
def test_more_is_more_for_all(problem: Problem, extra: int) -> None:
    """To within the one that remainders may move."""
    num, shares, caps, floors = problem
    more = min(num + extra, sum(caps.values()))
    before, after = (apportion(n, shares, caps, floors=floors) for n in (num, more))
    assert all(before[name] <= after[name] + 1 for name in caps)


@given(problems(plain_shares), st.integers(-900, 900))
def test_only_ratios_of_shares_matter(problem: Problem, exponent: int) -> None:
    """Powers of two, as these scale without rounding: 1e-9 · 2^-900 is 1e-280, still a normal number."""
    num, shares, caps, floors = problem
    scaled = {name: share * 2.0**exponent for name, share in shares.items()}
    assert apportion(num, scaled, caps, floors=floors) == apportion(num, shares, caps, floors=floors)


@given(problems(), st.randoms(use_true_random=False))
def test_order_decides_nothing_but_ties(problem: Problem, rng: object) -> None:
    num, shares, caps, floors = problem
    names = list(caps)
    rng.shuffle(names)  # type: ignore[attr-defined]
    found = apportion(num, shares, caps, floors=floors)
    other = apportion(num, shares, {name: caps[name] for name in names}, floors=floors)
    assert all(abs(found[name] - other[name]) <= 1 for name in caps)


@pytest.mark.parametrize(
    "shares",
    [
        [float(i + 1) for i in range(60)],
        [0.0] * 60,
        [1e308] * 60,
        [5e-324] * 60,
        [-1.0] * 60,
        [10.0 ** (i - 30) for i in range(60)],  # fills up one after the other
    ],
)
@pytest.mark.parametrize("least", [0, 1, 10**5])
def test_ten_million_among_sixty_take_no_time(shares: list[float], least: int) -> None:
    """The time must not grow with the number: half a second is a hundred times what it takes."""
    caps = {f"n{i}": 200_000 + 10_000 * i for i in range(60)}
    begin = time.process_time()
    found = apportion(10**7, dict(zip(caps, shares, strict=True)), caps, floors=dict.fromkeys(caps, least))
    assert time.process_time() - begin < 0.5
    assert sum(found.values()) == 10**7


# Rounding of products with decimals


@given(st.integers(0, 10**8), st.integers(0, 1000))
def test_decimals_round_as_their_digits_say(num: int, thousandths: int) -> None:
    product = Fraction(thousandths, 1000) * num
    assert round_down(thousandths / 1000 * num) == math.floor(product)
    assert round_up(thousandths / 1000 * num) == math.ceil(product)


@pytest.mark.parametrize(("share", "num"), [(0.55, 100), (0.07, 100), (0.14, 50), (0.28, 25), (0.57, 100)])
def test_plain_rounding_would_be_wrong(share: float, num: int) -> None:
    """The product is a whole number, and floating point puts it a hair above or below."""
    assert exact(share) * num == round_down(share * num) == round_up(share * num)
    assert {math.floor(share * num), math.ceil(share * num)} != {round_down(share * num)}


# Rounds


@pytest.mark.parametrize(
    ("num_all", "num_last", "rounds", "left"),
    [
        (1000, 10, 1, [10]),
        (1000, 10, 2, [100, 10]),
        (1000, 1, 3, [100, 10, 1]),
        (8, 8, 3, [8, 8, 8]),
        (3, 2, 4, [3, 2, 2, 2]),  # 3·(2/3)^(k/4) = 2.71, 2.45, 2.21
        (1, 1, 2, [1, 1]),
    ],
)
def test_rounds_by_hand(num_all: int, num_last: int, rounds: int, left: list[int]) -> None:
    assert falling(num_all, num_last, rounds) == left


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 150))
def test_rounds_fall_to_the_end_and_no_further(a: int, b: int, rounds: int) -> None:
    num_last, num_all = sorted((a, b))
    left = falling(num_all, num_last, rounds)
    assert len(left) == rounds
    assert left[-1] == num_last
    assert all(num_all >= x >= y for x, y in zip([num_all, *left], left, strict=False))
    for k, num in enumerate(left, start=1):
        # geometric: the nearest whole number, and powers of doubles are off by a few 1e-16 of themselves
        assert abs(num - num_all * (num_last / num_all) ** (k / rounds)) <= 0.5 + 1e-14 * num_all
