"""Training costs: the published fractions, and exact sums along runs whose densities move."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import small, train
from torch import nn

import dstlib
from dstlib import NM, History, TrainingCost
from dstlib.cost import training_flops
from dstlib.masking import Trace, gradient, magnitude
from dstlib.methods.dense_gradients import Reading, examples, find_reading

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


def test_trying_criteria_out_leaves_the_random_state_alone():
    drawn = replace(dstlib.SET, grow=lambda site: torch.rand(site.weight.shape))
    before = torch.get_rng_state()
    assert find_reading(drawn) == Reading(0), "what is drawn elsewhere is no gradient"
    assert torch.equal(before, torch.get_rng_state())


def test_moving_weights_need_no_dense_gradient():
    """-w·g is zero wherever w is, so a trace of it reads what sparse training has."""
    method = replace(dstlib.SET, drop=dstlib.masking.traced, trace=Trace(of=dstlib.masking.moved))
    assert find_reading(method) == Reading(0)


@pytest.mark.parametrize(("steps", "num_dense"), [(1, 4), (3, 12), (50, 16)])
def test_a_trace_reads_the_last_steps_up_to_each_update(steps, num_dense):
    """Updates at 4, 8, 12 and 16 of 20 steps."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = replace(dstlib.RIGL, trace=Trace(steps=steps), grow=dstlib.masking.traced_magnitude, interval=4, stop=0.8)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.6, method=method, total_steps=20)
    cost = TrainingCost(History(sparsifier), model, INPUT)
    train(model, optimizer, 20)
    sparse, dense = (dstlib.profile(model, INPUT, sparsifier=s).flops for s in (sparsifier, None))
    assert cost.so_far == 20 * 3 * sparse + num_dense * (dense - sparse)


def test_a_momentum_of_dense_gradients_ends_with_the_updates():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = replace(dstlib.METHODS["snfs"], interval=4, allocate=None)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.6, method=method, total_steps=20)
    cost = TrainingCost(History(sparsifier), model, INPUT)
    sparse, dense = (dstlib.profile(model, INPUT, sparsifier=s).flops for s in (sparsifier, None))
    train(model, optimizer, 6)
    assert cost.so_far == 6 * (2 * sparse + dense)
    train(model, optimizer, 14, start=6)
    assert cost.so_far == 20 * 2 * sparse + 12 * dense + 8 * sparse


def test_topkast_learns_a_little_more_than_it_uses():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.6, method="topkast", total_steps=8)
    cost = TrainingCost(History(sparsifier), model, INPUT)
    train(model, optimizer, 4)
    learning = {name: torch.zeros_like(mask) for name, mask in sparsifier.masks.items()}
    for name, mask in learning.items():
        num_active, num_extra = int(sparsifier.masks[name].sum()), int(0.1 * mask.numel() + 0.5)
        mask.view(-1)[: num_active + num_extra] = True
    reach = SimpleNamespace(masks=learning)
    bare = copy.deepcopy(model).to("meta")  # of which the masks alone count
    sparse, learned = (dstlib.profile(bare, INPUT, sparsifier=s).flops for s in (sparsifier, reach))
    assert cost.so_far == 4 * (2 * sparse + learned)


class Reader(nn.Module):
    """Token ids by name; the head is called twice, and shares the weight of the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.EmbeddingBag(9, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.head.weight = self.body.weight

    def forward(self, ids, *, weights=None):
        return self.head(self.head(self.body(self.table(ids, per_sample_weights=weights))))


def test_the_cost_of_a_model_of_token_ids_and_shared_weights():
    torch.manual_seed(0)
    model, inputs = Reader(), {"ids": torch.zeros(5, 3, dtype=torch.long), "weights": None}
    sparsifier = dstlib.sparsify(model, sparsity=0.75, method="static")
    cost = TrainingCost(History(sparsifier), model, inputs)
    assert cost.dense == 5 * (3 * 2 * 64 + 2 * 8)
    assert cost.forward_share == 5 * (3 * 2 * 16 + 2 * 8) / cost.dense
    assert cost.forward_share == dstlib.profile(model, inputs, sparsifier=sparsifier).flops / cost.dense


def test_a_model_of_which_no_layer_is_counted_has_no_share():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x * self.weight

    model = Raw()
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static", include="weight")
    cost = TrainingCost(History(sparsifier), model, (4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 4)).sum().backward()
    optimizer.step()
    assert cost.dense == cost.so_far == 0
    assert math.isnan(cost.forward_share)
    assert math.isnan(cost.average_share)
    assert str(cost).endswith("not counted: Raw")


def test_the_cost_goes_on_after_a_resumption_and_begins_with_the_history():
    def built():
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = replace(dstlib.METHODS["granet"], interval=2)
        return model, optimizer, dstlib.sparsify(model, optimizer, sparsity=0.6, method=method, total_steps=16)

    whole, resumed = built(), built()
    history = History(whole[2])
    cost = TrainingCost(history, whole[0], INPUT)
    train(*whole[:2], 8)
    after = TrainingCost(resumed_history := History(resumed[2]), resumed[0], INPUT)
    for part, source in zip((*resumed, resumed_history), (*whole, history), strict=True):
        part.load_state_dict(source.state_dict())
    late = TrainingCost(History(whole[2]), whole[0], INPUT)
    so_far = cost.so_far
    for run in (whole, resumed):
        train(*run[:2], 8, start=8)
    assert after.so_far == cost.so_far
    assert late.steps == 8
    assert late.so_far == cost.so_far - so_far
