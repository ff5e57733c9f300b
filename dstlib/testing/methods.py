"""What every method keeps to, in a training: exact counts, zeros that hold, and runs that can be repeated.

Shapes: G groups, U units per group, E elements per unit.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dstlib.masking import NM, AtInit, Criterion, MaskUpdate, Site, num_units, random
from dstlib.methods.method import Method
from dstlib.sparsifier import Sparsifier
from dstlib.testing.laws import broken, named, world
from dstlib.testing.small import HALFWAY, OPTIMIZERS, Run, Setting


def check_method(method: Method, *, sparsity: float | None = None, width: int = 16) -> None:
    """Holds a method to its laws, in short trainings of a small model by SGD with momentum and by AdamW.

    The model has a convolution, a transposed one, an attention and a linear layer, all ``width`` channels wide: a
    number that the granularity must divide. ``sparsity`` is 0.75, or what the granularity or ``start_density``
    asks for. The interval is shortened to 2 steps; masks at initialisation that look at another model are replaced
    by random ones.

    - *whole units*: a unit of the granularity is active as a whole, or not at all.
    - *counts*: after every step the active units are those that density, ramp and surplus plan: of each group, or
      in sum where the method has an allocator.
    - *zeros hold*: weights, and without dense storage the optimizer's state, are zero outside the masks.
    - *finite*: no weight becomes NaN or infinite.
    - *target*: the last masks have the density that the distribution gives for the sparsity asked for.
    - *resumes*: a run through saved states (torch.load with weights_only=True) equals one that never stopped.
    - *copies*: so does a deep copy of model, optimizer and sparsifier.
    - *freezes*: freeze() fixes the masks.
    - *repeatable*: a second run equals the first bit for bit, under any global seed.
    - *observers look*: a run with an observer equals one without.
    - *seeded*: where drop, grow or init draw from the site's generator, another seed gives another run.

    Check the parts first, by ``check_criterion`` and its kin, which say more.

    Errors: LawError for the first law that is broken; what sparsify() or a step raises is not caught.

    >>> from dstlib.methods import RIGL
    >>> check_method(RIGL)
    """
    subject = named("method", method.name)
    scaled = replace(
        method,
        interval=method.interval and min(method.interval, 2),
        init=random if isinstance(method.init, AtInit) else method.init,
    )
    setting = Setting(method=scaled, sparsity=_legal_sparsity(method) if sparsity is None else sparsity, width=width)
    for name in OPTIMIZERS:
        other = replace(setting, optimizer=name)
        with world(0):
            run = Run(other)
            _check_state(run, subject)
            for _ in run.steps():
                _check_state(run, subject)
            run.end()
        _check_target(run, subject)
        _check_resumption(run, subject)
        if name == setting.optimizer:
            _check_copies(run, subject)
            _check_repeats(run, subject)


def _legal_sparsity(method: Method) -> float:
    if isinstance(method.granularity, NM):
        return 1 - method.granularity.n / method.granularity.m
    return max(0.75, 1 - method.start_density / 2) if method.start_density < 1 else 0.75


def _check_state(run: Run, subject: str) -> None:
    """What holds after every step."""
    on = f"{run.setting}, after step {run.num_steps}"
    _check_counts(run, subject, on)
    parameters = dict(run.model.named_parameters())
    for name, mask in run.sparsifier.masks.items():
        tensors = {"weight": parameters[name].detach()}
        if run.setting.method.storage is None:
            state = run.optimizer.state[parameters[name]]
            tensors |= {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == mask.shape}
        for what, tensor in tensors.items():
            if num_wrong := int((tensor[~mask] != 0).sum()):
                expected, got = f"zeros outside the mask in the {what} of {name}", f"{num_wrong} other entries"
                remedy = "Only the optimizer and grown_init give weights values; no criterion may write to site.weight."
                raise broken("zeros hold", subject, on=on, expected=expected, got=got, remedy=remedy)
        if num_bad := int((~parameters[name].isfinite()).sum()):
            expected, got = f"finite numbers in {name}", f"{num_bad} that are NaN or infinite"
            remedy = "Look at grown_init: it returns the values of weights that have just grown."
            raise broken("finite", subject, on=on, expected=expected, got=got, remedy=remedy)


def _unit_counts(sparsifier: Sparsifier) -> Iterator[tuple[str, Tensor, int]]:
    """(view, whether each unit is active (G, U, E), U) of each view."""
    masks = sparsifier.masks
    for weight in sparsifier.weights:
        for view in weight.views:
            mask_GUE = sparsifier.plan.method.granularity.fold(view.of(masks[weight.name]))
            yield view.name, mask_GUE, mask_GUE.shape[1]


def _check_counts(run: Run, subject: str, on: str) -> None:
    plan = run.sparsifier.plan
    step = plan.clock.latest(run.num_steps)
    num_active = num_wanted = slack = 0
    for name, mask_GUE, num_all in _unit_counts(run.sparsifier):
        if not torch.equal(mask_GUE.all(dim=-1), mask_GUE.any(dim=-1)):
            expected, got = f"whole units of {plan.method.granularity} in {name}", "units that are partly active"
            remedy = "Try check_granularity(method.granularity), which says more."
            raise broken("whole units", subject, on=on, expected=expected, got=got, remedy=remedy)
        num_G, num_target = mask_GUE[..., 0].sum(dim=1), plan.num_target(name, num_all, step)
        if plan.method.allocate is None and bool((num_G != num_target).any()):
            _raise_counts(subject, on, f"{num_target} active units in each group of {name}", str(num_G.tolist()))
        num_active += int(num_G.sum())
        num_wanted += num_target * len(num_G)
        slack += len(num_G) - 1
    if not num_wanted - slack <= num_active <= num_wanted:
        or_less = f", or up to {slack} fewer" * bool(slack)
        _raise_counts(subject, on, f"{num_wanted} active units in all{or_less}", str(num_active))


def _raise_counts(subject: str, on: str, expected: str, got: str) -> None:
    remedy = "Curves and densities must give the same answer each time; check_curve and check_allocator say more."
    raise broken("counts", subject, on=on, expected=expected, got=got, remedy=remedy)


def _check_target(run: Run, subject: str) -> None:
    """At the end, against the distribution itself."""
    method, sparsifier, on = run.setting.method, run.sparsifier, f"{run.setting}, at its end"
    shapes = {
        view.name: tuple(view.of(weight.parameter).shape) for weight in sparsifier.weights for view in weight.views
    }
    with world(0):
        densities = method.distribution(shapes, 1 - run.setting.sparsity)
    wanted, found, slack = {}, {}, 0
    for name, mask_GUE, num_all in _unit_counts(sparsifier):
        wanted[name] = num_units(num_all, densities[name]) * len(mask_GUE)
        found[name] = int(mask_GUE[..., 0].sum())
        slack += (len(mask_GUE) - 1) * (method.allocate is not None)
    if method.allocate is not None:
        wanted, found = {"all weights": sum(wanted.values())}, {"all weights": sum(found.values())}
    for name, num_wanted in wanted.items():
        if not num_wanted - slack <= found[name] <= num_wanted:
            expected, got = f"{num_wanted} active units in {name}", found[name]
            remedy = "A ramp ends at 1 and a surplus at 0, both at progress 1."
            raise broken("target", subject, on=on, expected=expected, got=got, remedy=remedy)


def _check_resumption(first: Run, subject: str) -> None:
    with world(0):
        half = Run(first.setting).train(HALFWAY)
        resumed = half.saved_and_loaded()
        half.end()
        resumed.train().end()
    remedy = "Keep nothing between calls: masks, steps, traces and an allocator's memory are all that is saved."
    _check_equal("resumes", subject, resumed, first, remedy, f", saved and loaded after step {HALFWAY}")


def _check_copies(first: Run, subject: str) -> None:
    """Halfway, a run is copied, and a copy frozen."""
    on = f", copied after step {HALFWAY}"
    with world(0):
        half = Run(first.setting).train(HALFWAY)
        copied, frozen = half.copied(), half.copied()
        half.end()
        copied.train().end()
        _check_equal("copies", subject, copied, first, "Let parts of the method equal their copies.", on)
        frozen.sparsifier.freeze()
        masks = frozen.masks()
        frozen.train().end()
    for name, mask in frozen.sparsifier.masks.items():
        if not torch.equal(mask, masks[name]):
            expected, got = "masks that stay after freeze()", f"another mask of {name}"
            remedy = "No part of a method may write to site.mask."
            raise broken("freezes", subject, on=f"{first.setting}{on}", expected=expected, got=got, remedy=remedy)


def _check_repeats(first: Run, subject: str) -> None:
    """The same again under another global seed; then watched; then by another seed, if anything that decides draws."""
    with world(1):
        again = Run(first.setting).train()
        again.end()
    remedy = "Draw from site.generator alone: check_criterion, on drop, grow and init, says more."
    _check_equal("repeatable", subject, again, first, remedy)
    drawing: set[str] = set()
    watched, other = (_watched(first.setting, seed, drawing) for seed in (first.setting.seed, first.setting.seed + 1))
    _check_equal("observers look", subject, watched, first, "A method must not ask who is looking.")
    if drawing and not watched.difference(other):
        expected = f"another run for another seed, as {' and '.join(sorted(drawing))} of the method draw"
        remedy = "Use what you draw from site.generator; or draw nothing, as ties go to the lower index anyway."
        raise broken("seeded", subject, on=str(first.setting), expected=expected, got="the same", remedy=remedy)


def _check_equal(law: str, subject: str, run: Run, first: Run, remedy: str, on: str = "") -> None:
    if path := run.difference(first):
        expected, got = "the run that never stopped and nobody watched, bit for bit", f"another {path}"
        raise broken(law, subject, on=f"{first.setting}{on}", expected=expected, got=got, remedy=remedy)


def _watched(setting: Setting, seed: int, drawing: set[str]) -> Run:
    """A run with an observer; adds to ``drawing`` the criteria that drew where it mattered."""
    drew: set[str] = set()
    m = setting.method
    assert not isinstance(m.init, AtInit)
    drop, grow, init = _Spy("drop", m.drop, drew), _Spy("grow", m.grow, drew), _Spy("init", m.init, drew)
    spied = replace(m, drop=drop, grow=grow, init=init)
    num_changed: dict[str, int] = {"drop": 0, "grow": 0, "init": 0}

    def observe(site: Site, update: MaskUpdate) -> None:
        num_changed["drop"] += int(update.dropped.sum())
        num_changed["grow"] += int(update.grown.sum())

    with world(0):
        run = Run(replace(setting, method=spied, seed=seed))
        num_changed["init"] = sum(int((~mask).sum()) for mask in run.sparsifier.masks.values())
        run.sparsifier.observers.append(observe)
        run.train().end()
    drawing |= {part for part in drew if num_changed[part]}
    return run


class _Spy:
    """A criterion that notes whether it drew from the site's generator; its copies note it in the same place."""

    def __init__(self, part: str, criterion: Criterion, drew: set[str]) -> None:
        self.part, self.criterion, self.drew = part, criterion, drew

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Spy":
        return _Spy(self.part, copy.deepcopy(self.criterion, memo), self.drew)

    def __call__(self, site: Site) -> Tensor:
        """The scores, unchanged."""
        before = site.generator.get_state()
        scores = self.criterion(site)
        if not torch.equal(before, site.generator.get_state()):
            self.drew.add(self.part)
        return scores
