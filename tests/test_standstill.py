"""Runs whose masks would never move are refused, or warned of with a length at which they do."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import dstlib
from dstlib import METHODS, RIGL, STATIC, Method, SettingError
from dstlib.masking import NM, FanIn, NeuronAblation, momentum_share
from dstlib.schedules import Constant, Cosine, Linear

INTERVAL = 3
MOVING = [method for method in METHODS.values() if method is not STATIC]
_EXAMPLE = r"(?:such as (?:total_steps=)?|of the way, )(\d+)"


def standstills(caught: list[warnings.WarningMessage]) -> list[str]:
    words = ("no mask will ever change", "none of them has dropped or grown a unit")
    return [str(w.message) for w in caught if any(each in str(w.message) for each in words)]


class Trial:
    """A run of two layers with gradients at random: what was said of it, and whether a unit was dropped or grown."""

    def __init__(self, method: Method, total_steps: int | None, num_steps: int | None = None, size: int = 24) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size // 2, bias=False))
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9)
        sparsity = 0.5 if isinstance(method.granularity, NM) else 0.75
        self.moved, self.said, self.said_at_end = False, "", ""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                # no outputs are sought, whose empty ones take a weight in the second step, which is no update
                options = {"sparsity": sparsity, "method": method, "total_steps": total_steps, "keep_neurons": ()}
                sparsifier = dstlib.sparsify(model, self.optimizer, **options)
        except SettingError as error:
            self.said = str(error)
            return
        self.said = "".join(standstills(caught))
        sparsifier.observers.append(self.look)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.train(num_steps or total_steps or 0)
        self.said_at_end = "".join(standstills(caught))
        sparsifier.detach()

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for p in self.parameters:
                p.grad = torch.randn_like(p)
            self.optimizer.step()

    def look(self, _: object, change: dstlib.masking.MaskUpdate) -> None:
        self.moved = self.moved or bool(change.dropped.any() or change.grown.any())

    @property
    def enough(self) -> int:
        """The number of steps that was named."""
        found = re.search(_EXAMPLE, self.said)
        assert found, self.said
        return int(found[1])


@pytest.mark.parametrize("method", MOVING, ids=lambda method: method.name)
def test_every_preset_moves_or_says_that_it_does_not_at_every_length(method: Method) -> None:
    short = replace(method, interval=min(method.interval or 1, INTERVAL))
    for total_steps in range(1, 4 * INTERVAL + 1):
        trial = Trial(short, total_steps)
        assert trial.moved == (not trial.said and not trial.said_at_end), total_steps
        # what is under a threshold of its own, DSR alone knows
        assert not trial.said_at_end or method.name == "dsr", total_steps
        if trial.said:
            longer = Trial(short, trial.enough)
            assert longer.moved or longer.said_at_end, (total_steps, trial.said)


@pytest.mark.parametrize(
    ("total_steps", "says"),
    [(133, "total_steps of sparsify"), (134, "no mask will ever change"), (200, ""), (266, ""), (267, "")],
)
def test_a_run_with_a_lone_update_exchanges_something_if_it_is_not_at_the_very_end(total_steps: int, says: str) -> None:
    trial = Trial(RIGL, total_steps)
    assert says in trial.said
    assert bool(trial.said) == bool(says)
    assert trial.moved == (not says)
    if says:
        assert trial.enough == 267


def test_counts_that_round_to_no_unit_are_warned_of() -> None:
    """A quarter of 4 · 4 and of 4 · 2 entries are 4 and 2; 0.15 of them is none."""
    trial = Trial(replace(RIGL, drop_fraction=Constant(0.15)), 400, size=4)
    assert not trial.moved
    assert re.search(r"rigl in 400 steps, .*0\.15 at most .*is not one unit.*round_up=True", trial.said)
    helped = Trial(replace(RIGL, drop_fraction=Constant(0.15), round_up=True), 400, size=4)
    assert helped.moved
    assert not helped.said


@pytest.mark.parametrize(
    "method",
    [
        replace(RIGL, drop_fraction=Constant(0.0)),
        replace(RIGL, allocate=momentum_share, drop_fraction=Linear(0.3), interval=300),  # the update is at the end
        replace(RIGL, granularity=FanIn(), allocate=NeuronAblation(), drop_fraction=Cosine(1e-4)),
    ],
)
def test_nothing_to_exchange_is_warned_of_whoever_shares_it_out(method: Method) -> None:
    trial = Trial(method, 400)
    assert trial.said
    assert not trial.moved


def test_without_an_end_the_first_update_tells() -> None:
    assert Trial(replace(RIGL, stop=1.0, drop_fraction=Constant(0.0), interval=2), None, num_steps=10).said
    moving = Trial(replace(RIGL, stop=1.0, drop_fraction=Constant(0.3), interval=2), None, num_steps=10)
    assert moving.moved
    assert not moving.said


def test_a_dense_model_has_nothing_to_exchange_and_is_not_warned_of() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dstlib.sparsify(nn.Linear(8, 8), sparsity=0.0, method="rigl", total_steps=400)
        dstlib.sparsify(nn.Linear(8, 8), sparsity=0.5, method="static", total_steps=400)
    assert not standstills(caught)


def test_a_share_of_a_run_needs_its_length() -> None:
    method = replace(RIGL, interval=0.05)
    with pytest.raises(SettingError, match=r"interval of method rigl: .* got 0\.05 of a run of unknown length"):
        dstlib.sparsify(nn.Linear(8, 8), sparsity=0.5, method=method)
    for wrong in (0, 0.0, 1.0, 1.5, True):
        with pytest.raises(SettingError, match="interval of method rigl"):
            replace(RIGL, interval=wrong)
