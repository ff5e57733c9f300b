"""What every method keeps to, in a training: exact counts, zeros that hold, and runs that can be repeated.

Shapes: G groups, U units per group, E elements per unit.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dstlib.masking import NM, AtInit, Criterion, Site, num_units, random
from dstlib.method import Method
from dstlib.sparsifier import Sparsifier
from dstlib.testing.laws import broken, named, world
from dstlib.testing.small import NUM_STEPS, OPTIMIZERS, Run, Setting

_HALFWAY = NUM_STEPS // 2 + 1  # odd, so between two updates


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
    - *repeatable*: a second run equals the first bit for bit, under any global seed.
    - *observers look*: a run with an observer equals one without.
    - *seeded*: where drop, grow or init draw from the site's generator, another seed gives another run.
    - *resumes*: a run through saved states (torch.load with weights_only=True) equals one that never stopped.
    - *copies*: so does one of deep copies.
    - *freezes*: freeze() fixes the masks.

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
        if name == setting.optimizer:
            _check_repeats(run, subject)
            _check_seed(run, subject)
        _check_interruptions(run, subject)


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
                remedy = "Only the optimizer and grown_init give weights values; no part of a method may write to site.weight."
                raise broken("zeros hold", subject, on=on, expected=expected, got=got, remedy=remedy)
        if num_bad := int((~parameters[name].isfinite()).sum()):
            expected, got = f"finite numbers in {name}", f"{num_bad} that are NaN or infinite"
            remedy = "Look at grown_init: it returns the values of weights that have just grown."
            raise broken("finite", subject, on=on, expected=expected, got=got, remedy=remedy)


def _unit_counts(sparsifier: Sparsifier) -> Iterator[tuple[str, Tensor, int]]:
    """(slot, whether each unit is active (G, U, E), U) of each slot."""
    masks = sparsifier.masks
    for weight in sparsifier.weights:
        for slot in weight.slots:
            mask_GUE = sparsifier.plan.method.granularity.fold(slot.view(masks[weight.name]))
            yield slot.name, mask_GUE, mask_GUE.shape[1]


def _check_counts(run: Run, subject: str, on: str) -> None:
    plan = run.sparsifier.plan
    step = plan.clock.latest(run.num_steps)
    num_active = num_wanted = slack = 0
    for name, mask_GUE, num_all in _unit_counts(run.sparsifier):
        if not torch.equal(mask_GUE.all(dim=-1), mask_GUE.any(dim=-1)):
            expected, got = f"whole units of {plan.method.granularity} in {name}", "units that are partly active"
            remedy = "check_granularity(method.granularity) says more."
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
        slot.name: tuple(slot.view(weight.parameter).shape) for weight in sparsifier.weights for slot in weight.slots
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


def _check_repeats(first: Run, subject: str) -> None:
    """The same again, under another global seed; then with an observer, where nothing else is different."""
    remedies = {
        "repeatable": "Draw from site.generator alone and keep nothing between calls: check_criterion, on drop, grow and init.",
        "observers look": "A method must not ask who is looking.",
    }
    for law, seed in (("repeatable", 1), ("observers look", 0)):
        with world(seed):
            run = Run(first.setting)
            if law == "observers look":
                run.sparsifier.observers.append(lambda site, update: None)
            run.train().end()
        if path := run.difference(first):
            expected, got = "the same run bit for bit", f"another {path}"
            raise broken(law, subject, on=str(first.setting), expected=expected, got=got, remedy=remedies[law])


def _check_seed(first: Run, subject: str) -> None:
    """Two seeds differ, if anything that decided was drawn."""
    drawing: list[str] = []
    m = first.setting.method
    assert not isinstance(m.init, AtInit)
    spied = replace(
        m, **{part: _Spy(part, getattr(m, part), drawing) for part in ("drop", "grow", "init")}  # type: ignore[arg-type]
    )
    num_grown: list[int] = []
    masks, runs = [], []
    for seed in (0, 1):
        with world(0):
            run = Run(replace(first.setting, method=spied, seed=seed))
            run.sparsifier.observers.append(lambda site, update: num_grown.append(int(update.grown.sum())))
            masks.append(run.masks())
            run.train().end()
            runs.append(run)
    chose_first = any(not bool(mask.all()) for mask in masks[0].values())
    decisive = {part for part in drawing if (chose_first if part == "init" else any(num_grown))}
    if decisive and not runs[0].difference(runs[1]):
        parts = " and ".join(sorted(decisive))
        expected, got = f"another run for another seed, as {parts} of the method draw", "the same"
        remedy = "Use what you draw from site.generator; or draw nothing, as ties go to the lower index anyway."
        raise broken("seeded", subject, on=str(first.setting), expected=expected, got=got, remedy=remedy)


class _Spy:
    """A criterion that notes whether it drew from the site's generator."""

    def __init__(self, part: str, criterion: Criterion, drawing: list[str]) -> None:
        self.part, self.criterion, self.drawing = part, criterion, drawing

    def __call__(self, site: Site) -> Tensor:
        """The scores, unchanged."""
        before = site.generator.get_state()
        scores = self.criterion(site)
        if not torch.equal(before, site.generator.get_state()):
            self.drawing.append(self.part)
        return scores


def _check_interruptions(first: Run, subject: str) -> None:
    """Halfway, a run is saved, copied and frozen."""
    on = f"{first.setting}, stopped after step {_HALFWAY}"
    with world(0):
        half = Run(first.setting).train(_HALFWAY)
        resumed, copied, frozen = half.saved_and_loaded(), half.copied(), half.copied()
        half.end()
        remedies = {
            "resumes": "Keep nothing between calls: masks, steps, traces and an allocator's memory are all that is saved.",
            "copies": "Parts of a method are copied with it: let them equal their copies.",
        }
        for law, run in (("resumes", resumed), ("copies", copied)):
            run.train().end()
            if path := run.difference(first):
                expected, got = "the run that never stopped, bit for bit", f"another {path}"
                raise broken(law, subject, on=on, expected=expected, got=got, remedy=remedies[law])
        frozen.sparsifier.freeze()
        masks = frozen.masks()
        frozen.train().end()
        moved = [name for name, mask in frozen.sparsifier.masks.items() if not torch.equal(mask, masks[name])]
        if moved:
            expected, got = "masks that stay after freeze()", f"another mask of {moved[0]}"
            remedy = "No part of a method may write to site.mask."
            raise broken("freezes", subject, on=on, expected=expected, got=got, remedy=remedy)
