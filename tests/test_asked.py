"""A sparsity that whole units cannot have is told of, with what will be reached and by which weights."""

import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dstlib
from dstlib.masking import Block, Channel, Element, FanIn, Kernel

STATIC = dstlib.METHODS["static"]


def net(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def told(model: nn.Module, **settings: object) -> tuple[str, float]:
    """Returns what is said of a sparsity that is not met, or "", and the one that is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsifier = dstlib.sparsify(model, **settings)  # type: ignore[arg-type]
    found = [str(w.message) for w in caught if "will be reached" in str(w.message)]
    sparsifier.detach()
    assert len(found) <= 1
    return next(iter(found), ""), 1 - sparsifier.density


@pytest.mark.parametrize(
    ("grain", "sparsity", "reached", "who"),
    [
        (FanIn(), 0.9999, 0.9375, "1 of 16 units in each of 16 groups, for a density of 0.0001"),
        (FanIn(), 0.9, 0.875, "2 of 16 units in each of 16 groups, for a density of 0.1"),
        (Channel(), 0.97, 0.9375, "1 of 16 units, for a density of 0.03"),
        (Block(8, 8), 0.9, 0.75, "1 of 4 units, for a density of 0.1"),
        (Block(8, 8), 0.6, 0.5, "2 of 4 units, for a density of 0.4"),
    ],
)
def test_what_will_be_reached_is_said(grain, sparsity: float, reached: float, who: str) -> None:  # type: ignore[no-untyped-def]
    method = replace(STATIC, granularity=grain, distribution=dstlib.uniform)
    message, found = told(net(16, 16, 16), sparsity=sparsity, method=method)
    assert found == pytest.approx(reached)
    assert message.startswith(f"A sparsity of {sparsity:g} was asked for, {reached:g} will be reached: {grain!r} keeps")
    assert f"0.weight: {who}" in message
    assert f"1.weight: {who}" in message


def test_of_the_weights_those_are_named_that_miss_it_and_overrides_count() -> None:
    method = replace(STATIC, granularity=FanIn(), distribution=dstlib.uniform)
    message, _ = told(net(100, 16, 100), sparsity=0.9, overrides={"1": 0.99}, method=method)
    assert "1.weight" in message
    assert "0.weight" not in message
    assert told(net(100, 100, 100), sparsity=0.9, method=method)[0] == ""


def test_one_weight_in_each_layer_at_least_is_told_of_too() -> None:
    message, found = told(net(4, 4, 4, 4), sparsity=0.99, method="static")
    assert "0.weight: 1 of 16 units" in message
    assert found == pytest.approx(45 / 48)
    assert told(net(4, 4, 4, 4), sparsity=0.9, method="static")[0] == ""


@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=4),
    st.sampled_from([0.3, 0.5, 0.8, 0.9, 0.97, 0.999]),
    st.sampled_from([Element(), FanIn(), Kernel(), Channel(), Block(1, 1)]),
    st.sampled_from([dstlib.uniform, dstlib.erk]),
)
def test_nothing_is_silently_less_than_asked(widths, sparsity: float, grain, distribution) -> None:  # type: ignore[no-untyped-def]
    method = replace(STATIC, granularity=grain, distribution=distribution)
    message, reached = told(net(*widths), sparsity=sparsity, method=method)
    num = sum(a * b for a, b in pairwise(widths))
    # a distribution counts in whole weights, and of each layer has one
    exact = 1 - reached <= 1.05 * (1 - sparsity) + (len(widths) / num if distribution is dstlib.erk else 0)
    assert message or exact
