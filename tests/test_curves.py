"""Curves: the published values, exact ends, nothing outside them."""

import math
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstlib.errors import SettingError
from dstlib.schedules import Alternating, Constant, Cosine, Cubic, Curve, InversePower, Linear, Sigmoid, Stages

values = st.floats(0.0, 1.0)
progress = st.floats(0.0, 1.0)
between = (
    st.builds(Linear, values, values)
    | st.builds(Cosine, values, values)
    | st.builds(Cubic, values, values, st.floats(0.01, 1.0))
    | st.builds(Sigmoid, values, values, st.floats(1e-3, 1e3))
)
powers = st.builds(InversePower, values, st.floats(0.5, 5.0))
# values lie in [0, 1] and each curve takes at most four roundings, of 1.1e-16 each
ROUNDING = 5e-16
S_SHAPE = [(1 / (1 + math.exp(-y)) - 1 / (1 + math.exp(4))) / (1 - 2 / (1 + math.exp(4))) for y in (-2, 0, 2)]


@pytest.mark.parametrize(
    ("curve", "at", "value"),
    [
        (Constant(0.3), (0.0, 0.5, 1.0), (0.3, 0.3, 0.3)),
        (Linear(0.4), (0.0, 0.25, 0.75, 1.0), (0.4, 0.3, 0.1, 0.0)),
        (Linear(0.2, 1.0), (0.0, 0.5, 1.0), (0.2, 0.6, 1.0)),
        # RigL, eq. 1 with α = 0.3: cos 60° = 1/2, cos 90° = 0, cos 120° = -1/2
        (Cosine(0.3), (0.0, 1 / 3, 0.5, 2 / 3, 1.0), (0.3, 0.225, 0.15, 0.075, 0.0)),
        # E2ENet's floor: halfway lies (0.5 + 0.001) / 2
        (Cosine(0.5, end=0.001), (0.0, 0.5, 1.0), (0.5, 0.2505, 0.001)),
        # Zhu & Gupta, eq. 1, from 0 to 0.8 in 4 steps: 0.8 · (1 - (1 - k/4)³)
        (Cubic(0.0, 0.8), (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.4625, 0.7, 0.7875, 0.8)),
        # and from s_i = 0.5: s_f + (s_i - s_f) / 8
        (Cubic(0.5, 0.9), (0.0, 0.5, 1.0), (0.5, 0.85, 0.9)),
        # CHTss, 1/(1 + e^-y) with y = k(2p - 1), here at -2, 0 and 2, less its value at -4, over the whole of its way
        (Sigmoid(0.0, 1.0, 4.0), (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, *S_SHAPE, 1.0)),
        (Sigmoid(0.5, 0.9), (0.0, 0.5, 1.0), (0.5, 0.7, 0.9)),
        # the same, done at 0.4 of the way
        (Cubic(0.0, 0.8, until=0.4), (0.0, 0.1, 0.2, 0.3, 0.4, 0.9), (0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8)),
        # MEST on CIFAR-10: a fifth, from epoch 90 of 160 on a tenth, from epoch 120 on nothing
        (
            Stages((0.2, 0.1, 0.0), at=(90 / 120, 1.0)),
            (0.0, 89 / 120, 90 / 120, 119 / 120, 1.0),
            (0.2, 0.2, 0.1, 0.1, 0),
        ),
        (Stages((0.4,), at=()), (0.0, 1.0), (0.4, 0.4)),
        (InversePower(0.4), (0.0, 0.5, 1.0), (0.4, 0.2, 0.0)),
        (InversePower(0.4, power=3), (0.0, 0.5, 1.0), (0.4, 0.05, 0.0)),
    ],
    ids=repr,
)
def test_published_values(curve: Curve, at: tuple[float, ...], value: tuple[float, ...]) -> None:
    assert [curve(p) for p in at] == pytest.approx(value, rel=0, abs=ROUNDING)


@given(between)
def test_ends_are_exact(curve: Linear | Cosine | Cubic) -> None:
    assert curve(0.0) == curve.start
    assert curve(1.0) == curve.end


@given(powers)
def test_the_inverse_power_falls_from_its_start_to_exactly_zero(curve: InversePower) -> None:
    assert curve(0.0) == curve.start
    assert curve(1.0) == 0.0


@given(between | powers, progress, progress)
def test_monotone(curve: Linear | Cosine | Cubic | InversePower, p: float, q: float) -> None:
    early, late = min(p, q), max(p, q)
    direction = math.copysign(1.0, curve(1.0) - curve(0.0))
    assert direction * (curve(late) - curve(early)) >= -ROUNDING


@given(between | powers, progress)
def test_values_lie_between_the_ends(curve: Linear | Cosine | Cubic | InversePower, p: float) -> None:
    low, high = sorted((curve(0.0), curve(1.0)))
    assert low - ROUNDING <= curve(p) <= high + ROUNDING


@given(st.builds(Constant, values) | between | powers, st.floats(-1e9, 0.0), st.floats(1.0, 1e9))
def test_progress_is_clamped(curve: Curve, before: float, after: float) -> None:
    assert curve(before) == curve(0.0)
    assert curve(after) == curve(1.0)


@given(values, progress)
def test_the_plain_inverse_power_is_the_line_to_zero(start: float, p: float) -> None:
    assert InversePower(start)(p) == pytest.approx(Linear(start)(p), rel=0, abs=ROUNDING)


@given(values, progress)
def test_cosine_and_its_mirror_image_add_up(start: float, p: float) -> None:
    assert Cosine(start)(p) + Cosine(start)(1 - p) == pytest.approx(start, rel=0, abs=ROUNDING)


@pytest.mark.parametrize(
    "curve", [Constant(0.3), Linear(0.4), Cosine(0.3), Cubic(0.0, 1.0), Sigmoid(0.0, 1.0), InversePower(0.4)]
)
def test_a_curve_is_a_value(curve: Constant | Linear | Cosine | Cubic | InversePower) -> None:
    copy = pickle.loads(pickle.dumps(curve))
    assert copy == curve
    assert hash(copy) == hash(curve)
    field = "value" if isinstance(curve, Constant) else "start"
    assert replace(curve, **{field: 0.7}) != curve
    with pytest.raises(FrozenInstanceError):
        setattr(curve, field, 0.7)


@pytest.mark.parametrize(
    ("values", "at"),
    [((0.2, 0.1), ()), ((), ()), ((0.2,), (0.5,)), ((0.3, 0.2, 0.1), (0.6, 0.5)), ((0.2, 0.1), (1.5,))],
)
def test_stages_that_do_not_follow_each_other_are_refused(values: tuple[float, ...], at: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match="values, at of Stages: expected for each value but the first"):
        Stages(values, at)


@pytest.mark.parametrize("until", [0.0, -0.5, 1.5, math.nan])
def test_a_cubic_ends_on_its_way(until: float) -> None:
    with pytest.raises(SettingError, match=r"until of Cubic: expected a share of the way in \(0, 1\]"):
        Cubic(0.0, 1.0, until=until)


# Alternating phases (AC/DC)


@pytest.mark.parametrize(
    ("curve", "sparse"),
    [
        # tenths of the run: dense first, then in turn, and sparse from three quarters on
        (Alternating(), "0101010111"),
        (Alternating(warmup=0.0), "1010101111"),
        (Alternating(warmup=0.2, phase=0.2, settle=0.9), "0011001101"),
        (Alternating(warmup=0.5, phase=1.0, settle=0.5), "0000011111"),
    ],
)
def test_phases_by_hand(curve: Alternating, sparse: str) -> None:
    """In the middle of each tenth."""
    assert "".join(str(int(curve((k + 0.5) / 10))) for k in range(10)) == sparse


def test_the_last_dense_phase_takes_what_it_is_given() -> None:
    """AC/DC on ImageNet, of 100 epochs: pruned at 10, 20, ..., 70 and 85, dense again five later, and at 75."""
    pruned, restored = [*range(10, 71, 10), 85], [*range(15, 66, 10), 75]
    curve = Alternating(warmup=0.1, phase=0.05, settle=0.85, last_dense=0.1)
    values = [curve(epoch / 100) for epoch in range(101)]
    assert [epoch for epoch in range(1, 101) if values[epoch] > values[epoch - 1]] == pruned
    assert [epoch for epoch in range(1, 101) if values[epoch] < values[epoch - 1]] == restored


@given(st.floats(0, 1), st.floats(0.001, 1), st.floats(0, 1), progress)
def test_phases_end_sparse(a: float, phase: float, b: float, p: float) -> None:
    warmup, settle = sorted((a, b))
    curve = Alternating(warmup, phase, settle)
    assert curve(p) in (0.0, 1.0)
    assert curve(1.0) == 1.0
    assert curve(p) == (1.0 if p >= settle else 0.0 if p < warmup else curve(p))


@pytest.mark.parametrize(
    "given",
    [(0.5, 0.1, 0.4), (-0.1, 0.1, 0.5), (0.1, 0.0, 0.5), (0.1, 0.1, 1.1), (0.5, 0.1, 0.6, 0.2), (0.1, 0.1, 0.6, -0.1)],
)
def test_phases_that_contradict_each_other_are_refused(given: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match="of Alternating: expected 0 ≤ warmup"):
        Alternating(*given)


@pytest.mark.parametrize("steepness", [0.0, -1.0, math.inf, math.nan])
def test_a_sigmoid_rises(steepness: float) -> None:
    with pytest.raises(SettingError, match=r"^steepness of Sigmoid: expected a number above 0"):
        Sigmoid(0.0, 1.0, steepness)
