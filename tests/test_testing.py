"""The conformance suite: all that dstlib ships keeps every law, and whatever breaks one is caught."""

import ast
import itertools
import math
import os
import pickle
import random as python_random
import re
import subprocess
import sys
import unittest
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

import dstlib
import dstlib.testing
from dstlib import METHODS, RIGL, SET, Site
from dstlib.at_init import snip
from dstlib.engine.ops.masked import fill_outside_each
from dstlib.masking import (
    NM,
    AdaptiveThreshold,
    Allocation,
    AmongSome,
    Block,
    Budget,
    Channel,
    Diagonal,
    Drawn,
    Element,
    FanIn,
    GlobalRank,
    Kernel,
    NeuronAblation,
    NormalFanIn,
    ReceptiveField,
    Sampled,
    SampledRemoval,
    SharedFanIn,
    SmallWorld,
    TiesByChance,
    Trace,
    Transposable,
    WeightAndGradient,
    er,
    erk,
    global_units,
    gradient,
    lamp,
    link_prediction,
    link_prediction_by_paths,
    link_prediction_l3,
    magnitude,
    magnitude_l2,
    momentum,
    momentum_share,
    moved,
    plain_gradient,
    random,
    relative_importance,
    saliency,
    sign_balanced,
    traced,
    traced_magnitude,
    uniform,
    uniform_dense_ends,
    uniform_dense_first,
    uniform_fan_in,
)
from dstlib.schedules import Alternating, Constant, Cosine, Cubic, Cycles, InversePower, Linear, Sigmoid, Stages
from dstlib.testing import (
    LawError,
    check_allocator,
    check_criterion,
    check_curve,
    check_distribution,
    check_granularity,
    check_method,
    criterion_laws,
    curve_laws,
    laws_of,
    method_laws,
    parametrize_with_laws,
)
from dstlib.testing.laws import global_state, world

NORMAL = Drawn(lambda shape, generator: torch.randn(shape, generator=generator, dtype=torch.float32))
CRITERIA = [
    *(magnitude, magnitude_l2, gradient, momentum, saliency, relative_importance, random, sign_balanced),
    *(plain_gradient, moved, traced, traced_magnitude, NORMAL),
    *(WeightAndGradient(0.01), Sampled(magnitude), Sampled(relative_importance, Linear(1.0, 3.0))),
    *(link_prediction, link_prediction_by_paths, link_prediction_l3),
    *(ReceptiveField(0.25), ReceptiveField(0.0, equal=False), SmallWorld(0.25)),
    *(SampledRemoval(magnitude), Sampled(link_prediction), TiesByChance(link_prediction_by_paths)),
    AmongSome(gradient),
    Transposable(magnitude, 1, 1),
]
GRANULARITIES = [
    *(Element(), Kernel(), Channel(), Block(1, 1), Block(4, 2), Block(5, 7)),
    *(FanIn(), SharedFanIn(1), SharedFanIn(2), Diagonal(), NM(2, 4), NM(1, 16)),
]
CURVES = [
    Constant(0.3),
    Linear(0.4, 0.1),
    Sigmoid(0.0, 1.0),
    Cosine(0.5, end=0.001),
    Cubic(0.0, 1.0),
    InversePower(0.4, 3.0),
    Stages((0.3, 0.1), at=(0.5,)),
    Alternating(),
    Cycles(),
]
ALLOCATORS = [
    *(global_units, lamp, GlobalRank(may_empty=True), momentum_share, AdaptiveThreshold()),
    *(NeuronAblation(0.3), NeuronAblation(0.95)),
]


# All that dstlib ships keeps the laws


def name(thing: object) -> str:
    """A function's name, or the value without addresses: processes of one run must collect the same tests."""
    return getattr(thing, "__name__", re.sub(r" at 0x[0-9a-f]+", "", repr(thing)))


@pytest.mark.parametrize("criterion", CRITERIA, ids=name)
def test_every_criterion_conforms(criterion):
    check_criterion(criterion)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_every_granularity_conforms(granularity):
    check_granularity(granularity)


@pytest.mark.parametrize("curve", CURVES, ids=repr)
def test_every_curve_conforms(curve):
    check_curve(curve, low=0.0, high=1.0)


@pytest.mark.parametrize(
    ("distribution", "keeps"),
    [(uniform, True), (er, True), (erk, True), (uniform_dense_first, False), (uniform_dense_ends, True)],
)
def test_every_distribution_conforms(distribution, keeps):
    check_distribution(distribution, keeps_total=keeps)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=name)
def test_every_allocator_conforms(allocator):
    check_allocator(allocator)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_preset_conforms(method):
    check_method(method)


def test_the_lists_above_are_complete():
    """Whatever the library exports of each kind is in one of them, or is no such part."""
    no_criteria = {"AtInit", "Trace", "DenseStorage", "OverDensity"}
    other = {
        "NormalFanIn",
        "Times",
        "in_proportion",
        "folded_shape",
        "relative_shares",
        "falling",
        "share_out",
        "stored",
        "uniform_fan_in",
        "uniform_fan_out",
        "zeros",
        "site_generator",
    }
    kinds = {type(x).__name__ for x in (*CRITERIA, *GRANULARITIES, *ALLOCATORS)}
    names = {name(x) for x in (*CRITERIA, *ALLOCATORS)}
    names |= {"er", "erk", "uniform", "uniform_dense_ends", "uniform_dense_first"}
    sources = ("criteria", "granularity", "distribution", "allocation")
    masking = Path(dstlib.__file__).parent / "masking"
    defined = {
        node.name
        for source in sources
        for node in ast.parse((masking / f"{source}.py").read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    exported = {x for x in dstlib.masking.__all__ if x in defined} - no_criteria - other - {"Granularity"}
    assert exported <= kinds | names
    assert {type(curve).__name__ for curve in CURVES} == {
        x for x in dstlib.schedules.__all__ if x not in ("Clock", "Curve", "Every", "Never")
    }


VARIANTS = {
    "kernels": replace(RIGL, granularity=Kernel(), distribution=uniform),
    "channels": replace(SET, granularity=Channel(), distribution=uniform),
    "blocks": replace(RIGL, granularity=Block(4, 4)),
    "fan-in": replace(SET, granularity=FanIn()),
    "shared fan-in": replace(SET, granularity=SharedFanIn(4)),
    "diagonals": replace(RIGL, granularity=Diagonal()),
    "n:m": replace(RIGL, granularity=NM(1, 4), distribution=uniform),
    "transposable n:m": replace(
        METHODS["srste"], init=Transposable(magnitude, 2, 4), grow=Transposable(magnitude, 2, 4)
    ),
    "blocks that move": replace(METHODS["granet"], granularity=Block(2, 4)),
    "trace of steps": replace(RIGL, grow=traced_magnitude, trace=Trace(steps=3), interval=7),
    "movement": replace(RIGL, drop=traced, trace=Trace(of=moved, decay=0.9)),
    "momentum": replace(RIGL, drop=momentum),
    "no regrowth": replace(RIGL, regrow=False),
    "skipped steps": replace(RIGL, skip_step=True),
    "lamp": replace(METHODS["gmp"], allocate=lamp),
    "from below": replace(RIGL, start_density=0.1, ramp=Constant(1.0)),
    "grown anew": replace(SET, grown_init=NormalFanIn(), reset_state=True),
    "grown by fan-in": replace(RIGL, grown_init=uniform_fan_in),
    "never empty": replace(METHODS["granet"], allocate=GlobalRank(may_empty=True)),
}


@pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)
def test_variants_conform(method):
    check_method(method)


def test_masks_at_initialisation_are_replaced():
    model = torch.nn.Linear(4, 4)
    init = snip(model, lambda: model(torch.ones(1, 4)).sum())
    check_method(replace(RIGL, init=init))


@pytest.mark.parametrize(("sparsity", "width"), [(0.9, 24), (0.5, 8)])
def test_a_method_is_checked_at_a_sparsity_and_width_of_your_own(sparsity, width):
    check_method(replace(RIGL, granularity=Block(8, 8)), sparsity=sparsity, width=width)


def test_what_sparsify_refuses_is_said_by_sparsify():
    with pytest.raises(dstlib.SettingError, match=r"output channels for Block\(out=3, into=3\).*multiple of 3, got 16"):
        check_method(replace(RIGL, granularity=Block(3, 3)))


# Every law bites


class CountingCurve:
    """Remembers how often it was asked; its copies begin where it is."""

    def __init__(self, values):
        self.values, self.calls = values, 0

    def __call__(self, progress):
        self.calls += 1
        return self.values[self.calls % len(self.values)]

    def __eq__(self, other):
        return isinstance(other, CountingCurve)

    __hash__ = None


def growing_calls():
    calls = []

    def criterion(site: Site) -> Tensor:
        calls.append(site)
        return site.weight.abs() * len(calls)

    return criterion


def writes(site: Site) -> Tensor:
    return site.weight.abs_()


def seeded_by_name(site: Site) -> Tensor:
    """Global randomness that hides: the generator moves, the scores do not depend on it."""
    torch.rand(3)
    return site.weight.abs()


def by_view(site: Site) -> Tensor:
    return site.weight.view(len(site.weight), -1).abs().view(site.weight.shape)


def by_memory(site: Site) -> Tensor:
    """Positions in memory, which of a view are other ones."""
    return torch.as_strided(site.weight, (site.weight.numel(),), (1,)).view(site.weight.shape).abs()


CRITERION_LAWS = [
    ("runs", lambda site: site.weight[:, :, 0].abs()),  # on a matrix there are no taps
    ("runs", lambda site: site.momentum.shape.missing),
    ("shape", lambda site: site.weight.abs().flatten(1).mean(dim=1)),
    ("shape", lambda site: None),
    ("shape", lambda site: site.weight.abs().tolist()),
    ("shape", lambda site: torch.complex(site.weight.float(), site.weight.float())),
    ("finite", lambda site: site.grad.abs() / site.grad.abs().mean()),
    ("finite", lambda site: site.weight.abs().log()),
    ("changes nothing", writes),
    ("changes nothing", lambda site: site.trace.mul_(2).abs()),
    ("changes nothing", lambda site: site.mask.logical_not_() * site.weight.abs()),
    ("repeatable", growing_calls()),
    (
        "repeatable",
        lambda site: torch.rand(site.weight.shape, generator=torch.Generator().manual_seed(id(site) + fresh())),
    ),
    ("no global randomness", lambda site: torch.rand_like(site.weight)),
    ("no global randomness", lambda site: torch.from_numpy(np.random.rand(*site.weight.shape))),
    ("no global randomness", lambda site: site.weight.abs() + python_random.random()),
    ("no global randomness", seeded_by_name),
    ("no defaults", lambda site: torch.rand(site.weight.shape, generator=site.generator, device="cpu")),
    (
        "no defaults",
        lambda site: site.weight.abs() + torch.arange(site.weight.shape[1]).view(1, -1, *[1] * (site.weight.ndim - 2)),
    ),
    ("memory layout", by_view),
    ("memory layout", by_memory),
    ("autograd", lambda site: site.weight.clone().requires_grad_() * 2),
    ("autograd", lambda site: site.weight.abs() * (2 if torch.is_grad_enabled() else 1)),
]


COUNTER = itertools.count()


def fresh() -> int:
    """Another number each time."""
    return next(COUNTER)


@dataclass(frozen=True)
class Broken:
    """A granularity of one element per unit, but for what is passed."""

    on_fold: Callable[[Tensor], Tensor] = lambda x: x.reshape(1, -1, 1)
    on_unfold: Callable[[Tensor, torch.Size], Tensor] = lambda x, shape: x.reshape(shape)

    def fold(self, x: Tensor) -> Tensor:
        return self.on_fold(x)

    def unfold(self, x: Tensor, shape: torch.Size) -> Tensor:
        return self.on_unfold(x, shape)


class NoValue(Element):
    """Every instance differs from every other."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Unhashable(Element):
    """Equal to its copies, and not hashable."""

    __hash__ = None


def sorted_by_size(x: Tensor) -> Tensor:
    return x.flatten().sort(descending=True).values.view(1, -1, 1)


def refuses(x: Tensor) -> Tensor:
    raise dstlib.SettingError("no")


def taps_first(x: Tensor) -> Tensor:
    return rearrange(x, "o i ... -> 1 (o i) (...)")


GRANULARITY_LAWS = [
    ("a value", Element),
    ("a value", 4),
    ("a value", NoValue()),
    ("a value", Unhashable()),
    ("divides or refuses", Broken(lambda x: rearrange(x, "(o p) i ... -> 1 o (p i ...)", p=5))),  # of einops
    ("divides or refuses", Broken(refuses)),
    ("three axes", Broken(lambda x: x.reshape(1, -1))),
    ("three axes", Broken(lambda x: x.reshape(1, -1, 1).float())),
    ("each entry once", Broken(lambda x: x[:-1].reshape(1, -1, 1))),
    ("each entry once", Broken(lambda x: x.flatten(1).float().mean(dim=1).to(x.dtype).view(1, -1, 1))),
    ("each entry once", Broken(lambda x: torch.cat([x.flatten(), x.flatten()]).view(1, -1, 1))),
    ("each entry once", Broken(sorted_by_size)),
    ("unfold undoes fold", Broken(taps_first, lambda x, shape: x.transpose(1, 2).reshape(shape))),
    ("unfold undoes fold", Broken(on_unfold=lambda x, shape: x.reshape(shape).float())),
    ("unfold undoes fold", Broken(on_unfold=lambda x, shape: x.reshape(shape[0], -1))),
    ("unfold undoes fold", Broken(on_unfold=lambda x, shape: rearrange(x, "1 (a b) 1 -> a b", a=7))),
    ("memory layout", Broken(lambda x: x.view(1, -1, 1))),
    ("memory layout", Broken(taps_first, lambda x, shape: torch.as_strided(x, (x.numel(),), (1,)).view(shape))),
]


class Shy:
    """A constant that differs from its copies."""

    def __call__(self, progress):
        return 0.3


CURVE_LAWS = [
    ("finite", lambda progress: torch.tensor(progress)),
    ("finite", lambda progress: 1 / progress),
    ("finite", lambda progress: float("nan")),
    ("finite", lambda progress: None),
    ("finite", lambda progress: progress > 0.5),
    ("in range", Linear(1.2, 0.0)),
    ("in range", Linear(0.4, -0.1)),
    ("clamped", lambda progress: 0.3 * (1 - progress) if progress > -1 else 0.0),
    ("repeatable", CountingCurve([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])),
    ("repeatable", lambda progress: 0.3 + 0.1 * python_random.random() * (0 < progress < 1)),
    ("a value", lambda progress: 0.3),  # does not pickle
    ("a value", Shy()),
]


def unbounded(shapes, density):
    """ERK without what it does where a weight would exceed density 1."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    shares = {name: size * sum(shapes[name]) / size for name, size in sizes.items()}
    num_active = density * sum(sizes.values())
    return {name: num_active * share / sum(shares.values()) / sizes[name] for name, share in shares.items()}


def pops(shapes, density):
    found = dict.fromkeys(shapes, density)
    shapes.clear()
    return found


def odd_ones_out(shapes, density):
    """Half of it for the first weight, but at middling densities only."""
    found = dict.fromkeys(shapes, density)
    if 0.3 < density < 0.6 and len(shapes) > 1:
        found[next(iter(shapes))] /= 2
    return found


DISTRIBUTION_LAWS = [
    ("every name", lambda shapes, density: {next(iter(shapes)): density}),
    ("every name", lambda shapes, density: dict.fromkeys([*shapes, "bias"], density)),
    ("every name", lambda shapes, density: density),
    ("every name", lambda shapes, density: {name: density / shape[4] for name, shape in shapes.items()}),
    ("in range", unbounded),
    ("in range", lambda shapes, density: dict.fromkeys(shapes, torch.tensor(density))),
    ("in range", lambda shapes, density: dict.fromkeys(shapes, density - 0.1)),
    ("total", lambda shapes, density: dict.fromkeys(shapes, density**2)),
    ("total", uniform_dense_first),
    ("repeatable", lambda shapes, density: dict.fromkeys(shapes, density * (1 + 1e-9 * fresh()) / 2)),
    ("repeatable", lambda shapes, density: dict.fromkeys(shapes, density * np.random.rand())),
    ("repeatable", pops),
]
LOOSE_DISTRIBUTION_LAWS = [
    ("dense is dense", lambda shapes, density: dict.fromkeys(shapes, density / 2)),
    ("monotone", odd_ones_out),
]


def changed(**parts):
    """global_units, with its budgets passed through functions of (kept, target, account)."""

    def allocator(accounts, terms):
        budgets = []
        for a, b in zip(accounts, global_units(accounts, terms).budgets, strict=True):
            kept, target = b.num_kept_G, b.num_target_G
            kept, target = (
                f(kept, target, a) if (f := parts.get(p)) else x for p, x in (("kept", kept), ("target", target))
            )
            budgets.append(Budget(kept, target))
        return Allocation(tuple(budgets))

    return allocator


def in_place(accounts, terms):
    found = global_units(accounts, terms)
    accounts[0].drop_GU.zero_()
    return found


def moody(accounts, terms):
    """Draws what it keeps."""
    found = global_units(accounts, terms).budgets
    share = float(torch.rand(()))
    return Allocation(tuple(Budget((b.num_kept_G * share).long(), b.num_target_G) for b in found))


def remembers(accounts, terms):
    return Allocation(global_units(accounts, terms).budgets, memory=float(fresh()))


def draws_in_vain(accounts, terms):
    torch.rand(())
    return global_units(accounts, terms)


ALLOCATOR_LAWS = [
    ("an allocation", lambda accounts, terms: None),
    ("an allocation", lambda accounts, terms: Allocation(global_units(accounts, terms).budgets[:-1])),
    ("an allocation", lambda accounts, terms: Allocation(global_units(accounts, terms).budgets, memory=float("inf"))),
    ("an allocation", changed(target=lambda kept, target, a: target.double())),
    ("an allocation", changed(kept=lambda kept, target, a: kept.sum())),
    ("an allocation", lambda accounts, terms: accounts[3]),
    ("feasible", changed(kept=lambda kept, target, a: target)),
    ("feasible", changed(kept=lambda kept, target, a: kept - 1 - target)),
    ("feasible", changed(kept=lambda kept, target, a: a.active_GU.sum(dim=1))),
    ("feasible", changed(target=lambda kept, target, a: target + a.num_units)),
    ("total", changed(target=lambda kept, target, a: target + (target < a.active_GU.shape[1]).long())),
    ("total", changed(kept=lambda kept, target, a: kept * 0, target=lambda kept, target, a: target * 0)),
    ("changes nothing", in_place),
    ("repeatable", moody),
    ("repeatable", remembers),
    ("repeatable", draws_in_vain),
]


def law_of(check, *args, **kwargs) -> str:
    with pytest.raises(LawError) as caught:
        check(*args, **kwargs)
    error = caught.value
    # which law, of what, on which input, expected, got; and a remedy that is a sentence
    assert re.match(
        rf"law '{error.law}' of \w+ .+, on .+: expected .+, got .+\. [A-Z0-9(].+\.$", str(error), re.DOTALL
    ), error
    return error.law


@pytest.mark.parametrize(("law", "criterion"), CRITERION_LAWS)
def test_laws_of_criteria_bite(law, criterion):
    assert law_of(check_criterion, criterion) == law


@pytest.mark.parametrize(("law", "granularity"), GRANULARITY_LAWS)
def test_laws_of_granularities_bite(law, granularity):
    assert law_of(check_granularity, granularity) == law


@pytest.mark.parametrize(("law", "curve"), CURVE_LAWS)
def test_laws_of_curves_bite(law, curve):
    assert law_of(check_curve, curve, low=0.0, high=1.0) == law


@pytest.mark.parametrize(("law", "distribution"), DISTRIBUTION_LAWS)
def test_laws_of_distributions_bite(law, distribution):
    assert law_of(check_distribution, distribution) == law


@pytest.mark.parametrize(("law", "distribution"), LOOSE_DISTRIBUTION_LAWS)
def test_laws_of_distributions_bite_without_a_total(law, distribution):
    assert law_of(check_distribution, distribution, keeps_total=False) == law


@pytest.mark.parametrize(("law", "allocator"), ALLOCATOR_LAWS)
def test_laws_of_allocators_bite(law, allocator):
    assert law_of(check_allocator, allocator) == law


@dataclass
class Remembering:
    """Scores that turn round with each call: a new process would begin anew."""

    calls: list[int] = field(default_factory=list)

    def __call__(self, site: Site) -> Tensor:
        self.calls.append(site.step)
        return site.grad.abs() * (-1) ** (len(self.calls) % 3)


def wasted(site: Site) -> Tensor:
    site.rand()
    return site.grad.abs()


def scaled_down(site: Site) -> Tensor:
    return torch.full_like(site.weight, torch.nan)


ALIKE = Broken(taps_first, lambda x, shape: x.transpose(1, 2).reshape(shape))

METHOD_LAWS = [
    ("whole units", replace(RIGL, granularity=ALIKE)),
    ("counts", replace(RIGL, ramp=CountingCurve([1.0, 0.9, 0.7]), start_density=0.9)),
    ("finite", replace(RIGL, grown_init=scaled_down)),
    ("target", replace(METHODS["gmp"], ramp=Cubic(0.0, 0.8))),
    ("target", replace(METHODS["gmp_global"], ramp=Cubic(0.0, 0.8))),
    ("target", replace(METHODS["mest_soft"], surplus=Constant(0.2))),
    ("repeatable", replace(RIGL, grow=lambda site: torch.rand_like(site.weight))),
    ("repeatable", replace(RIGL, init=lambda site: torch.rand_like(site.weight))),
    ("seeded", replace(RIGL, init=magnitude, grow=wasted)),
    ("resumes", replace(RIGL, grow=Remembering())),
]


@pytest.mark.parametrize(("law", "method"), METHOD_LAWS)
def test_laws_of_methods_bite(law, method):
    assert law_of(check_method, method) == law


def test_the_law_of_zeros_bites(monkeypatch):
    monkeypatch.setattr("dstlib.engine.ops.masked.fill_outside_each", list)
    assert law_of(check_method, RIGL) == "zeros hold"


def test_the_law_of_zeros_bites_in_the_optimizer(monkeypatch):
    def spare_states(triples):
        fill_outside_each(each for each in triples if isinstance(each[0], torch.nn.Parameter))

    monkeypatch.setattr("dstlib.engine.ops.masked.fill_outside_each", spare_states)
    assert law_of(check_method, SET) == "zeros hold"


def test_the_law_of_observers_bites(monkeypatch):
    from dstlib.sparsifier import update as updating

    update_masks = updating.update_masks

    def disturbed(due, *arguments, observers, **settings):
        memory = update_masks(due, *arguments, observers=observers, **settings)
        for m, _, _ in due if observers else ():
            m.parameter.mul_(1.5)
        return memory

    monkeypatch.setattr(updating, "update_masks", disturbed)
    assert law_of(check_method, RIGL) == "observers look"


def test_the_law_of_seeds_bites(monkeypatch):
    from dstlib.masking import site_generator

    monkeypatch.setattr("dstlib.masking.site_generator", lambda seed, step, name: site_generator(0, step, name))
    assert law_of(check_method, SET) == "seeded"


def test_the_law_of_resumption_bites(monkeypatch):
    """The trace is left out of what is restored."""
    from dstlib.sparsifier.state import MaskedWeight

    restore = MaskedWeight.restore
    monkeypatch.setattr(MaskedWeight, "restore", lambda self, saved: restore(self, replace(saved, trace=None)))
    assert law_of(check_method, METHODS["snfs"]) == "resumes"


def test_the_law_of_copies_bites(monkeypatch):
    """A copy that does not listen to its optimizer."""
    monkeypatch.setattr(
        "dstlib.sparsifier.sparsifier.listen",
        lambda sparsifier: None if "_LOST" in vars(sparsifier) else LISTEN(sparsifier),
    )
    set_state = dstlib.Sparsifier.__setstate__
    monkeypatch.setattr(dstlib.Sparsifier, "__setstate__", lambda self, state: set_state(self, state | {"_LOST": True}))
    assert law_of(check_method, RIGL) == "copies"


LISTEN = dstlib.sparsifier.sparsifier.listen


def test_the_law_of_freezing_bites(monkeypatch):
    monkeypatch.setattr(dstlib.Sparsifier, "_is_due", lambda self, m: self.plan.clock.latest(m.step + 1) > m.updated_at)
    assert law_of(check_method, RIGL) == "freezes"


def test_every_law_has_something_that_breaks_it():
    """Every law that a check can raise is tried here, and is in the words of its check."""
    cases = {
        check_criterion: CRITERION_LAWS,
        check_granularity: GRANULARITY_LAWS,
        check_curve: CURVE_LAWS,
        check_distribution: DISTRIBUTION_LAWS + LOOSE_DISTRIBUTION_LAWS,
        check_allocator: ALLOCATOR_LAWS,
        check_method: METHOD_LAWS,
    }
    patched = {check_method: {"zeros hold", "observers look", "copies", "freezes"}}  # by the tests above
    for check, laws in cases.items():
        listed = re.findall(r"^\s*- \*(.+?)\*:", check.__doc__, flags=re.MULTILINE)
        assert max(Counter(listed).values()) == 1
        assert set(listed) == {law for law, _ in laws} | patched.get(check, set())


# The suite itself


def test_a_missing_gradient_is_not_held_against_three_lines():
    """site.grad is None at initialisation and for library criteria a ScoreError; a user's own may read on."""
    check_criterion(lambda site: site.grad.abs() + site.momentum.abs() + site.trace.abs())


@pytest.mark.parametrize(
    ("check", "part"),
    [
        (check_criterion, random),
        (check_granularity, NM(2, 4)),
        (check_curve, Cosine(0.3)),
        (check_distribution, erk),
        (check_allocator, momentum_share),
        (check_method, SET),
    ],
)
def test_checks_leave_no_trace(check, part):
    """Global generators, defaults, and the listeners of optimizers."""
    from dstlib.sparsifier.hooks import listeners

    before = global_state(), torch.get_default_dtype(), len(listeners()), torch.is_grad_enabled()
    check(part)
    assert (global_state(), torch.get_default_dtype(), len(listeners()), torch.is_grad_enabled()) == before


@pytest.mark.parametrize(
    "check", [check_criterion, check_granularity, check_distribution, check_allocator, check_method]
)
def test_checks_do_not_depend_on_the_defaults(check):
    part = {check_criterion: random, check_granularity: Kernel(), check_distribution: erk, check_allocator: lamp}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            check(part.get(check, SET))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_world_is_left_as_it_was_found():
    before = global_state()
    with world(5):
        first = torch.rand(1), np.random.rand(), python_random.random()
    assert global_state() == before
    with world(5):
        assert (torch.rand(1), np.random.rand(), python_random.random()) == first


def test_errors_travel_between_processes():
    """As pytest-xdist and multiprocessing send them."""
    with pytest.raises(LawError) as caught:
        check_curve(Linear(2.0), high=1.0)
    found = pickle.loads(pickle.dumps(caught.value))
    assert (found.law, str(found)) == ("in range", str(caught.value))


def test_the_suite_needs_neither_pytest_nor_hypothesis():
    """It is imported, and checks, where neither can be; only parametrize_with_laws asks for pytest, when called."""
    code = """if True:
        import sys
        for name in ("pytest", "_pytest", "hypothesis"):
            sys.modules[name] = None  # an import of it raises
        from dstlib.testing import check_curve, laws_of, parametrize_with_laws
        from dstlib.schedules import Cosine
        check_curve(Cosine(0.3))
        assert len(laws_of(Cosine(0.3))) == 5
        try:
            parametrize_with_laws([Cosine(0.3)])
        except ImportError as error:
            print(error)
        """
    assert "pytest" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# Laws one by one


def broken_laws(laws) -> dict[str, str]:
    """Name → message of those that are broken, of laws that are all called."""
    found = {}
    for law in laws:
        try:
            law()
        except LawError as error:
            found[law.name] = str(error)
    return found


def careless(site: Site) -> Tensor:
    """NaN where all is zero, writes to the site, and depends on the default dtype and the global generator."""
    share = site.weight.abs_() / site.weight.sum()
    return share + torch.rand(site.weight.shape)


def test_every_broken_law_is_seen_by_its_name():
    found = broken_laws(laws_of(careless))
    assert list(found) == ["finite", "changes nothing", "no global randomness", "no defaults"]
    assert all(message.startswith(f"law '{name}' of criterion careless, on ") for name, message in found.items())


def test_a_check_says_what_the_first_broken_law_says():
    with pytest.raises(LawError) as caught:
        check_criterion(careless)
    assert str(caught.value) == next(iter(broken_laws(criterion_laws(careless)).values()))


@pytest.mark.parametrize(
    ("value", "check"),
    [
        (magnitude, check_criterion),
        (WeightAndGradient(0.01), check_criterion),
        (NM(2, 4), check_granularity),
        (Cosine(0.3), check_curve),
        (erk, check_distribution),
        (lamp, check_allocator),
        (RIGL, check_method),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_the_kind_of_a_value_is_told(value, check):
    laws = laws_of(value)
    assert [law.name for law in laws] == re.findall(r"^\s*- \*(.+?)\*:", check.__doc__, flags=re.MULTILINE)
    assert len({str(law) for law in laws}) == len(laws)


@pytest.mark.parametrize("value", [lambda x: x, 3, len, lambda: 0])
def test_what_is_of_no_kind_is_said(value):
    with pytest.raises(
        dstlib.SettingError, match=r"first argument is site, progress, shapes, accounts, got .+criterion_laws"
    ):
        laws_of(value)


def test_a_law_that_cannot_be_judged_is_skipped():
    laws = {law.name: law for law in criterion_laws(lambda site: None)}
    laws["runs"]()
    with pytest.raises(LawError):
        laws["shape"]()
    with pytest.raises(unittest.SkipTest, match="cannot be judged while law 'shape' is broken"):
        laws["finite"]()


def test_what_ends_a_training_is_raised_when_no_law_says_more():
    laws = {law.name: law for law in method_laws(replace(RIGL, grown_init=scaled_down))}
    assert set(broken_laws([laws["finite"]])) == {"finite"}
    laws["counts"]()  # as far as it went
    with pytest.raises(dstlib.ScoreError):
        laws["target"]()


def test_laws_of_a_method_train_each_run_once(monkeypatch):
    """As many steps as check_method: the laws share their runs."""
    steps = []
    train = torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: (steps.append(1), train(self)))
    assert not broken_laws(laws_of(SET))
    one_by_one = len(steps)
    check_method(SET)
    assert len(steps) == 2 * one_by_one


@parametrize_with_laws([magnitude, *curve_laws(Linear(0.3), low=0.0, high=1.0), Kernel(), erk, lamp])
def test_laws_as_test_cases(law):
    law()


def test_cases_are_named_after_value_and_law(tmp_path):
    """As a user runs them: all that is broken fails, and nothing else."""
    (tmp_path / "test_mine.py").write_text(
        "from dstlib.testing import parametrize_with_laws\n"
        "def log(site): return site.weight.abs().log()\n"
        "def mean(site): return site.weight.abs().mean()\n"
        "@parametrize_with_laws([log, mean])\n"
        "def test_laws(law): law()\n"
    )
    call = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "test_mine.py"]
    added = {"PYTHONPATH": str(Path(dstlib.__file__).parents[1]), "COLUMNS": "200"}
    done = subprocess.run(call, cwd=tmp_path, env=os.environ | added, capture_output=True, text=True)
    failed = re.findall(
        r"^FAILED test_mine.py::test_laws\[(.+?)\] - dstlib.testing.laws.LawError", done.stdout, re.MULTILINE
    )
    assert failed == ["criterion log: finite", "criterion mean: shape"]
    assert re.search(r"2 failed, \d+ passed, 6 skipped", done.stdout)
