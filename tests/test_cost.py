"""Training costs: the published fractions, and exact sums along runs whose densities move."""

from dataclasses import replace

import pytest
import torch
from models import small, train

import dstlib
from dstlib import NM, History, TrainingCost
from dstlib.cost import training_flops
from dstlib.masking import Trace, gradient, magnitude
from dstlib.reading import Reading, examples, find_reading

INPUT = (4, 2, 6, 6)


@pytest.mark.parametrize(("inference", "published"), [(0.4153, 0.4172), (0.2431, 0.2456)])
def test_rigl_as_published(inference, published):
    """Evci et al. 2020: (3·f_S·ΔT + 2·f_S + f_D) / (ΔT + 1) over 3·f_D, ResNet-50 with ERK, ΔT = 100."""
    cost = training_flops(inference, 1.0, share=1 / 101) / 3
    assert cost == pytest.approx((3 * inference * 100 + 2 * inference + 1) / 101 / 3, rel=1e-12)  # float rounding
    assert round(cost, 4) == published


@pytest.mark.parametrize(("inference", "share"), [(0.4153, 0.6102), (0.2431, 0.4954)])
def test_snfs_reads_the_dense_gradient_at_every_step(inference, share):
    """2·f_S + f_D over 3·f_D."""
    assert round(training_flops(inference, 1.0, share=1.0) / 3, 4) == share


def test_static_and_set_cost_three_forward_passes():
    assert training_flops(0.25, 1.0) == 0.75


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("static", 0), ("set", 0), ("set_itop", 0), ("dsff", 0), ("dsr", 0), ("gmp", 0), ("gmp_global", 0), ("cht", 0),
        ("mest", 0), ("mest_soft", 0), ("rigl", 1), ("granet", 1), ("srigl", 1), ("snfs", None),
    ],
)  # fmt: skip
def test_when_each_method_reads_dense_gradients(name, steps):
    method = dstlib.METHODS[name]
    reading = find_reading(method, examples({"fc": torch.Size((8, 6)), "conv": torch.Size((4, 4, 3, 3))}))
    assert reading == Reading(steps)


def test_criteria_of_ones_own_are_tried_out():
    shapes = examples({"fc": torch.Size((8, 6))})
    mine = replace(dstlib.SET, grow=lambda site: site.grad.square() + 1)
    assert find_reading(mine, shapes) == Reading(1)
    inside = replace(dstlib.SET, drop=lambda site: (site.grad * site.mask).abs())
    assert find_reading(inside, shapes) == Reading(0)
    assert find_reading(replace(dstlib.RIGL, trace=Trace(steps=8), grow=dstlib.masking.traced), shapes) == Reading(8)


def reference(method, model, optimizer, sparsifier, steps):
    """Runs and adds up step by step: 2·f_S + f_S, or f_D where an update reads the gradient, all from profiles."""
    dense = dstlib.profile(model, INPUT).flops
    total = 0
    for step in range(steps):
        sparse = dstlib.profile(model, INPUT, sparsifier=sparsifier).flops
        due = sparsifier.plan.clock.due(step + 1)
        reads = method.grow in (gradient,) and due
        total += 2 * sparse + (dense if reads else sparse)
        train(model, optimizer, 1, start=step)
    return total, dense


@pytest.mark.parametrize("name", ["static", "set", "rigl", "gmp", "granet", "gmp_global", "acdc", "srigl", "dsff"])
def test_the_sum_is_that_of_the_steps(name):
    method = dstlib.METHODS[name]
    if method.interval is not None:
        method = replace(method, interval=3)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.6, method=method, total_steps=20)
    cost = TrainingCost(History(sparsifier), model, INPUT)
    total, dense = reference(method, model, optimizer, sparsifier, 20)
    assert cost.steps == 20
    assert cost.so_far == total
    assert cost.average_share == total / (3 * dense * 20)
    assert cost.forward_share == dstlib.profile(model, INPUT, sparsifier=sparsifier).flops / dense


def test_snfs_and_dense_storage_cost_more():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = replace(dstlib.METHODS["snfs"], interval=4, stop=1.0)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.6, method=method, total_steps=20)
    cost = TrainingCost(History(sparsifier), model, INPUT)
    dense = dstlib.profile(model, INPUT).flops
    forward = []
    for step in range(20):
        forward.append(dstlib.profile(model, INPUT, sparsifier=sparsifier).flops)
        train(model, optimizer, 1, start=step)
    assert cost.so_far == sum(2 * f + dense for f in forward)


def test_straight_through_learns_densely():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method="srste", total_steps=8, include="up")
    assert isinstance(sparsifier.plan.method.granularity, NM)
    cost = TrainingCost(History(sparsifier), model, INPUT)
    train(model, optimizer, 4)
    sparse, dense = (dstlib.profile(model, INPUT, sparsifier=s).flops for s in (sparsifier, None))
    assert cost.so_far == 4 * (2 * sparse + dense)


def test_magnitude_reads_nothing():
    assert find_reading(replace(dstlib.RIGL, grow=magnitude), examples({"fc": torch.Size((8, 6))})) == Reading(0)
