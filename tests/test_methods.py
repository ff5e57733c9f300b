"""Methods: the published settings of every preset, and methods as values."""

import pickle
import re
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import densities

from dstlib import DSFF, GMP, METHODS, RIGL, SET, STATIC, Method, SettingError
from dstlib.masking import (
    Element,
    Kernel,
    erk,
    gradient,
    magnitude,
    num_units,
    random,
    sign_balanced,
    uniform,
    zeros,
)
from dstlib.methods import find_method
from dstlib.schedules import Constant, Cosine, Cubic, Every, Never

PRESETS = list(METHODS.values())
presets = pytest.mark.parametrize("method", PRESETS, ids=lambda method: method.name)


@pytest.mark.parametrize(
    ("method", "drop", "grow", "fraction", "interval", "stop"),
    [
        (SET, sign_balanced, random, Constant(0.3), 100, 0.75),
        (RIGL, magnitude, gradient, Cosine(0.3), 100, 0.75),
        (DSFF, magnitude, random, Cosine(0.5, end=0.001), 1200, 1.0),
    ],
)
def test_published_settings(method, drop, grow, fraction, interval, stop) -> None:  # type: ignore[no-untyped-def]
    assert (method.drop, method.grow, method.drop_fraction) == (drop, grow, fraction)
    assert (method.interval, method.stop) == (interval, stop)
    assert method.ramp == Constant(1.0)


@pytest.mark.parametrize(
    ("method", "granularity", "distribution", "grown_init"),
    [
        (STATIC, Element(), erk, zeros),
        (SET, Element(), erk, zeros),
        (RIGL, Element(), erk, zeros),
        (GMP, Element(), uniform, zeros),
        (DSFF, Kernel(), uniform, zeros),
    ],
)
def test_published_structure(method, granularity, distribution, grown_init) -> None:  # type: ignore[no-untyped-def]
    assert method.granularity == granularity
    assert (method.distribution, method.grown_init) == (distribution, grown_init)
    assert method.init is random


def test_pruning_drops_by_magnitude_along_the_cubic_and_nothing_else() -> None:
    assert (GMP.drop, GMP.ramp, GMP.drop_fraction) == (magnitude, Cubic(0.0, 1.0), Constant(0.0))


def test_static_never_changes() -> None:
    assert STATIC.clock(1000) == STATIC.clock(None) == Never()


@pytest.mark.parametrize(
    ("method", "total_steps", "clock"),
    [
        (RIGL, 100_000, Every(interval=100, stop=75_000)),
        (SET, 1001, Every(interval=100, stop=750)),
        (DSFF, 250_000, Every(interval=1200, stop=250_000)),
        (RIGL, None, Every(interval=100)),
        # 0.57 · 100 is 56.99999999999999 in floating point, and 0.29 · 100 is 28.999999999999996
        (replace(RIGL, stop=0.57, interval=57), 100, Every(interval=57, stop=57)),
        (replace(RIGL, stop=0.29, interval=29), 100, Every(interval=29, stop=29)),
    ],
)
def test_clock_of_a_run(method: Method, total_steps: int | None, clock: Every) -> None:
    assert method.clock(total_steps) == clock


@given(st.integers(1, 100), st.integers(1, 10**4), st.integers(0, 99))
def test_the_stop_is_the_floor_of_the_share(percent: int, hundreds: int, more: int) -> None:
    for total_steps in (100 * hundreds, 100 * hundreds + more):
        clock = replace(RIGL, stop=percent / 100).clock(total_steps)
        assert isinstance(clock, Every)
        assert clock.stop == percent * total_steps // 100


def test_the_drop_fraction_of_rigl_ends_at_the_last_update() -> None:
    clock = RIGL.clock(1000)  # stops at 750: the last update is at 700
    fractions = {step: RIGL.drop_fraction(clock.progress(step)) for step in range(1, 1001) if clock.due(step)}
    assert list(fractions) == [100, 200, 300, 400, 500, 600, 700]
    assert fractions[700] == 0.0
    assert sorted(fractions.values(), reverse=True) == list(fractions.values())
    # cos(π/7) = 0.9009689; seven digits are written
    assert fractions[100] == pytest.approx(0.15 * (1 + 0.9009689), rel=0, abs=1e-8)


# Density on its way


@given(densities)
def test_pruning_goes_from_dense_to_the_target_exactly(target: float) -> None:
    assert GMP.density(target, 0.0) == 1.0
    assert GMP.density(target, 1.0) == target


@given(densities, st.floats(0, 1))
def test_a_method_without_a_ramp_is_at_the_target_throughout(target: float, progress: float) -> None:
    assert RIGL.density(target, progress) == target


@given(st.integers(1, 10**7), st.integers(1, 10**7), st.floats(0, 1), st.floats(0, 1))
def test_pruning_only_ever_prunes(a: int, b: int, p: float, q: float) -> None:
    """In units, as rounding must not make a mask grow back."""
    num, num_total = sorted((a, b))
    early, late = (num_units(num_total, GMP.density(num / num_total, x)) for x in sorted((p, q)))
    assert num <= late <= early <= num_total
    assert num_units(num_total, GMP.density(num / num_total, 1.0)) == num


def test_the_cubic_of_zhu_and_gupta() -> None:
    """To sparsity 0.8: s = 0.8 · (1 - (1 - k/4)³)."""
    sparsity = [1 - GMP.density(0.2, k / 4) for k in range(5)]
    assert sparsity == pytest.approx([0.0, 0.4625, 0.7, 0.7875, 0.8], rel=0, abs=5e-16)  # a few roundings of 1e-16


# Methods are values


@presets
def test_every_preset_names_its_source(method: Method) -> None:
    assert METHODS[method.name] is method
    assert len(method.reference) > 40
    assert method is STATIC or re.search(r"20(1[7-9]|2[0-5])", method.reference)


def test_the_presets_cannot_be_changed() -> None:
    assert METHODS["rigl"] is RIGL
    with pytest.raises(TypeError):
        METHODS["mine"] = RIGL  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        RIGL.interval = 1  # type: ignore[misc]


@presets
def test_a_method_pickles_and_varies(method: Method) -> None:
    assert pickle.loads(pickle.dumps(method)) == method
    variant = replace(method, interval=500, name="mine")
    assert variant.interval == 500
    assert variant != method
    assert replace(variant, interval=method.interval, name=method.name) == method


@presets
def test_methods_are_found_by_name_and_by_themselves(method: Method) -> None:
    assert find_method(method.name) is method
    variant = replace(method, interval=7)
    assert find_method(variant) is variant


@pytest.mark.parametrize(("wrong", "meant"), [("rigle", "rigl"), ("dsf", "dsff"), ("statik", "static"), ("gpm", "gmp")])
def test_a_wrong_name_is_answered_with_the_right_one(wrong: str, meant: str) -> None:
    with pytest.raises(SettingError, match=f"one of static, set, .*, dsff.*'{wrong}'.*Similar: '{meant}'"):
        find_method(wrong)


@pytest.mark.parametrize("stop", [0.0, -0.5, 1.01, 75.0, float("nan")])
def test_a_stop_that_is_no_share_is_refused(stop: float) -> None:
    with pytest.raises(SettingError, match=rf"stop of method rigl: expected a share .*, got {stop}"):
        replace(RIGL, stop=stop)


def test_settings_go_by_name_only() -> None:
    with pytest.raises(TypeError):
        Method("mine", "my own")  # type: ignore[misc]
