"""What presets do in the course of a run, by the settings of their authors' programs."""

import itertools
import math
import warnings
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dstlib
from dstlib import METHODS, Method, Sparsifier
from dstlib.masking import MaskUpdate, Site, uniform_dense_ends
from dstlib.schedules import Alternating, Every

ROUNDING_UP = ["set_itop", "rigl_itop", "snfs", "granet", "granet_sparse"]  # their cosines have a floor, too


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((6, 20), (20, 20), (20, 20), (20, 4))))


class Run:
    """A training on gradients at random, with what each of its updates dropped and grew, and the density after it."""

    def __init__(self, method: Method, total_steps: int, sparsity: float = 0.75, net: nn.Module | None = None) -> None:
        self.net = net or model()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.sparsifier: Sparsifier = dstlib.sparsify(
                self.net, optimizer, sparsity=sparsity, method=method, total_steps=total_steps
            )
        self.told = [str(w.message) for w in caught if f"method {method.name}" in str(w.message)]
        self.first_density = self.sparsifier.density
        self.dropped: dict[int, int] = {}
        self.grown: dict[int, int] = {}
        self.density: dict[int, float] = {}
        self.sparsifier.observers.append(self.note)
        for step in range(1, total_steps + 1):
            for p in self.net.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            if self.sparsifier.plan.clock.due(step):
                self.density[step] = self.sparsifier.density
        self.sparsifier.detach()

    def note(self, site: Site, change: MaskUpdate) -> None:
        self.dropped[site.step] = self.dropped.get(site.step, 0) + int(change.dropped.sum())
        self.grown[site.step] = self.grown.get(site.step, 0) + int(change.grown.sum())


@pytest.mark.parametrize("name", ["granet", "granet_sparse"])
def test_granet_exchanges_on_at_the_final_density(name: str) -> None:
    run = Run(replace(METHODS[name], interval=5), 200)
    steps = sorted(run.density)
    assert steps == [*range(5, 201, 5)]
    assert all(
        run.density[a] > run.density[b] for a, b in itertools.pairwise(steps[:15])
    )  # later by less than a weight
    # done at half of the way to the last update; 0.25 of 1,000 weights, of each of which one at least is exchanged
    assert {run.density[step] for step in steps[19:]} == {run.sparsifier.density}
    assert run.sparsifier.density == pytest.approx(0.25, rel=0, abs=4 / 1000)  # each of four weights rounds
    assert all(run.grown[step] == run.dropped[step] > 0 for step in steps[20:-1])


@pytest.mark.parametrize("total_steps", [20, 21, 39, 40, 57, 100, 333])
def test_acdc_has_seven_sparse_phases_and_a_longer_last_dense_one(total_steps: int) -> None:
    run = Run(METHODS["acdc"], total_steps)
    assert not run.told
    turns = [(run.first_density == 1.0, 0)]
    turns += [(run.density[step] == 1.0, step) for step in sorted(run.density)]
    begins = [(is_dense, step) for (before, _), (is_dense, step) in itertools.pairwise(turns) if before != is_dense]
    assert [is_dense for is_dense, _ in begins] == [False, True] * 7 + [False]
    last_dense, last_sparse = begins[-2][1] / total_steps, begins[-1][1] / total_steps
    between = run.sparsifier.plan.clock.interval / total_steps  # type: ignore[union-attr]
    assert 0.75 * total_steps - total_steps / 20 <= begins[-2][1] <= (0.75 + between) * total_steps
    assert last_sparse - last_dense >= 0.1 - between


@pytest.mark.parametrize("total_steps", [1, 12, 19])
def test_too_short_a_run_for_twenty_phases_is_refused(total_steps: int) -> None:
    """Of 19 updates, all but the last would fall into dense phases."""
    message = (
        rf"total_steps of sparsify\(\) with method acdc: expected enough for 20 updates.* 20 or more, got {total_steps}"
    )
    with pytest.raises(dstlib.SettingError, match=message):
        Run(METHODS["acdc"], total_steps)


@pytest.mark.parametrize("interval", [1, 2, 3, 10, 100, 0.5])
def test_no_interval_skips_a_phase(interval: float) -> None:
    """Where it is longer than a phase, updates come once a phase."""
    run = Run(replace(METHODS["acdc"], interval=interval), 63)
    densities = [1.0, *(run.density[step] for step in sorted(run.density))]
    assert sum(before == 1.0 > after for before, after in itertools.pairwise(densities)) == 8
    assert run.sparsifier.plan.clock.interval == min(interval, 3) if interval >= 1 else 3  # type: ignore[union-attr]


@given(st.floats(0.01, 1.0), st.integers(1, 5000), st.integers(1, 200))
def test_each_phase_of_a_ramp_has_an_update(phase: float, total_steps: int, interval: int) -> None:
    ramp = Alternating(warmup=0.0, phase=phase, settle=1.0)
    clock = replace(METHODS["acdc"], ramp=ramp, interval=interval).clock(total_steps)
    assert isinstance(clock, Every)
    assert clock.last is not None
    if clock.interval > 1 or total_steps >= ramp.num_phases:
        assert clock.interval <= interval
        assert clock.interval / clock.last <= phase + 1e-9


@pytest.mark.parametrize("name", ROUNDING_UP)
def test_a_few_units_still_move_where_the_program_rounds_up(name: str) -> None:
    """Of three active weights, a thousandth at the end of a cosine is one; rounded down, it would be none."""
    assert METHODS[name].round_up
    method = replace(METHODS[name], interval=1, granularity=dstlib.Element(), ramp=dstlib.RIGL.ramp, start_density=1.0)
    run = Run(method, 40, 0.5, nn.Sequential(nn.Linear(3, 2, bias=False)))
    assert int(run.sparsifier.masks["0.weight"].sum()) == 3
    kept_down = Run(replace(method, round_up=False), 40, 0.5, nn.Sequential(nn.Linear(3, 2, bias=False)))
    late = [step for step in run.dropped if step >= max(run.dropped) - 8]
    assert len(late) == 9
    assert sum(run.dropped[step] for step in late) > 0
    assert sum(kept_down.dropped[step] for step in late) == 0


@pytest.mark.parametrize("name", ROUNDING_UP)
def test_the_cosine_of_the_authors_ends_at_its_floor(name: str) -> None:
    """CosineAnnealingLR with eta_min 0.005, from 0.5, over the whole run."""
    method = METHODS[name]
    clock = method.clock(160_000)
    assert isinstance(clock, Every)
    if name == "snfs":
        assert clock.stop == 120_000
    else:
        assert clock.stop == 160_000
    for share in (0.0, 0.3, 0.5, 1.0):
        expected = 0.005 + 0.495 * (1 + math.cos(math.pi * share)) / 2
        assert method.drop_fraction(share) == pytest.approx(expected, rel=0, abs=1e-15)  # a few roundings


def test_mest_exchanges_a_fifth_then_a_tenth_then_nothing() -> None:
    """Of 160 epochs, a fifth of the active weights until epoch 90 and a tenth until 120."""
    method = replace(METHODS["mest"], interval=1)
    plan = dstlib.sparsify(model(), sparsity=0.75, method=method, total_steps=160).plan
    fractions = {step: plan.drop_fraction(step) for step in (1, 89, 90, 119, 120)}
    assert fractions == {1: 0.2, 89: 0.2, 90: 0.1, 119: 0.1, 120: 0.0}
    assert isinstance(plan.clock, Every)
    assert plan.clock.last == 120


def test_mest_soft_holds_half_more_then_a_quarter_more_then_the_target() -> None:
    run = Run(replace(METHODS["mest_soft"], interval=1), 160)
    target = run.sparsifier.plan.densities["1.weight"]
    assert run.sparsifier.density == pytest.approx(0.25, rel=0, abs=2 / 1000)
    shares = {
        step: run.sparsifier.plan.num_target("1.weight", 400, step) / (400 * target) for step in (1, 89, 90, 119, 120)
    }
    for step, share in {1: 1.5, 89: 1.5, 90: 1.25, 119: 1.25, 120: 1.0}.items():
        assert shares[step] == pytest.approx(share, rel=0, abs=1 / (400 * target))  # whole weights


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), st.integers(1, 100))
def test_dense_ends_are_made_up_for(shapes: list[tuple[int, int]], percent: int) -> None:
    sizes = [a * b for a, b in shapes]
    named = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    found = list(uniform_dense_ends(named, percent / 100).values())
    total = sum(size * density for size, density in zip(sizes, found, strict=True))
    assert total == pytest.approx(percent / 100 * sum(sizes), rel=1e-12, abs=0)  # some roundings
    assert all(0 < density <= 1 for density in found)
    ends = sizes[0] + sizes[-1] if len(sizes) > 1 else sizes[0]
    if Fraction(ends) <= Fraction(percent, 100) * sum(sizes) / 2 and len(sizes) > 2:
        assert found[0] == found[-1] == 1.0
        assert len(set(found[1:-1])) == 1
    if Fraction(ends) > Fraction(percent, 100) * sum(sizes) / 2:
        assert len(set(found)) == 1


def test_snfs_spares_a_nearly_full_layer_that_grows() -> None:
    """Nine of ten are active, and its momentum is above the mean: a tenth is dropped, not half."""
    scores = {"full": torch.arange(1.0, 11.0)[None], "other": torch.arange(1.0, 11.0)[None] / 100}
    num_active = {"full": 9, "other": 5}
    accounts = [
        dstlib.masking.Account(
            name=name, active_GU=torch.arange(10)[None] < num_active[name], drop_GU=score, grow_GU=score, num_planned=7
        )
        for name, score in scores.items()
    ]
    terms = dstlib.masking.Terms(num_total=14, drop_fraction=0.5, round_up=True)
    kept = [int(budget.num_kept_G) for budget in dstlib.masking.momentum_share(accounts, terms).budgets]
    assert kept == [9 - 1, 5 - 3]  # ceil(0.1 · 9) and ceil(0.5 · 5)
    weak = [replace(account, grow_GU=1 / account.grow_GU) for account in accounts]  # now it has less than the mean
    assert [int(b.num_kept_G) for b in dstlib.masking.momentum_share(weak, terms).budgets] == [9 - 5, 5 - 3]
