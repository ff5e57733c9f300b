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
        (SET, 1001, Every(interval=100, stop=750.75)),
        (replace(SET, interval=0.05), 1010, Every(interval=50, stop=757.5)),
        (replace(SET, interval=0.29), 100, Every(interval=29, stop=75)),
        (replace(SET, interval=0.05), 19, Every(interval=1, stop=14.25)),
        (DSFF, 250_000, Every(interval=1200, stop=250_000)),
        (RIGL, None, Every(interval=100)),
        # 0.57 · 100 is 56.99999999999999 in floating point, and 0.29 · 100 is 28.999999999999996
        (replace(RIGL, stop=0.57, interval=57), 100, Every(interval=57, stop=57)),
        (replace(RIGL, stop=0.29, interval=29), 100, Every(interval=29, stop=29)),
    ],
)
def test_clock_of_a_run(method: Method, total_steps: int | None, clock: Every) -> None:
    assert method.clock(total_steps) == clock


@given(st.integers(1, 100), st.integers(1, 10**6))
def test_the_stop_is_the_share_of_the_run(percent: int, total_steps: int) -> None:
    clock = replace(RIGL, stop=percent / 100, interval=1).clock(total_steps)
    assert isinstance(clock, Every)
    assert clock.stop == pytest.approx(percent * total_steps / 100, rel=1e-15, abs=0)  # a rounding of a float
    assert clock.last == percent * total_steps // 100  # a whole number is not missed by a hair


@pytest.mark.parametrize(
    ("total_steps", "fractions"),
    [
        (200, {100: 0.075}),
        (260, {100: 0.1440}),
        (999, {100: 0.2870, 200: 0.2503, 600: 0.0284, 700: 0.0032}),
    ],
)
def test_the_drop_fraction_of_rigl_is_measured_against_the_end_of_its_time(
    total_steps: int, fractions: dict[int, float]
) -> None:
    """The paper's α/2·(1 + cos(πt/T_end)), T_end = 0.75 of the run; four digits are written."""
    clock = RIGL.clock(total_steps)
    found = {step: RIGL.drop_fraction(clock.progress(step)) for step in range(1, total_steps + 1) if clock.due(step)}
    assert list(found) == [*range(100, 3 * total_steps // 4 + 1, 100)]
    assert {step: found[step] for step in fractions} == pytest.approx(fractions, rel=0, abs=5e-5)


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


@pytest.mark.parametrize("name", ["drop_fraction", "ramp", "surplus"])
def test_a_number_for_a_schedule_is_sent_to_the_constant_one(name):
    with pytest.raises(SettingError, match=rf"{name} of method rigl: .*dstlib\.schedules\.Constant\(0\.3\)"):
        replace(RIGL, **{name: 0.3})
