"""What every method keeps to, in a training: exact counts, zeros that hold, and runs that can be repeated.

Shapes: G groups, U units per group, E elements per unit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from dstlib.masking import NM, AtInit, num_units, random
from dstlib.methods.method import Method
from dstlib.testing.laws import BreachError, Law, hold, laws, world
from dstlib.testing.small import HALFWAY, OPTIMIZERS, Moment, Run, Setting, Trial

Trials = Mapping[str, Trial]  # by the name of the optimizer


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

    Raises:
        LawError: The first law that is broken.
        DstlibError: What sparsify() or a step raises is not caught.

    >>> from dstlib.methods import RIGL
    >>> check_method(RIGL)
    """
    hold(method_laws(method, sparsity=sparsity, width=width))


def method_laws(method: Method, *, sparsity: float | None = None, width: int = 16) -> tuple[Law, ...]:
    """Returns the laws of :func:`check_method`, one by one; they share their trainings."""
    scaled = replace(
        method,
        interval=method.interval and min(method.interval, 2),
        init=random if isinstance(method.init, AtInit) else method.init,
    )
    sparsity = _legal_sparsity(method) if sparsity is None else sparsity
    setting = Setting(method=scaled, sparsity=sparsity, width=width)
    return laws("method", method.name, LAWS, {name: Trial(replace(setting, optimizer=name)) for name in OPTIMIZERS})


def _legal_sparsity(method: Method) -> float:
    if isinstance(method.granularity, NM):
        return 1 - method.granularity.n / method.granularity.m
    return max(0.75, 1 - method.start_density / 2) if method.start_density < 1 else 0.75


def _whole_units(trials: Trials) -> None:
    for moment in _moments(trials):
        for name, mask_GUE in moment.folded():
            if not torch.equal(mask_GUE.all(dim=-1), mask_GUE.any(dim=-1)):
                expected = f"whole units of {moment.run.setting.method.granularity} in {name}"
                remedy = "Try check_granularity(method.granularity), which says more."
                raise BreachError(on=moment, expected=expected, got="units that are partly active", remedy=remedy)


def _counts(trials: Trials) -> None:
    remedy = "Curves and densities must give the same answer each time; check_curve and check_allocator say more."
    for moment in _moments(trials):
        plan = moment.run.sparsifier.plan
        step = plan.clock.latest(moment.num_steps)
        num_active = num_wanted = slack = 0
        for name, mask_GUE in moment.folded():
            num_G, num_target = mask_GUE[..., 0].sum(dim=1), plan.num_target(name, mask_GUE.shape[1], step)
            if plan.method.allocate is None and bool((num_G != num_target).any()):
                expected = f"{num_target} active units in each group of {name}"
                raise BreachError(on=moment, expected=expected, got=num_G.tolist(), remedy=remedy)
            num_active += int(num_G.sum())
            num_wanted += num_target * len(num_G)
            slack += len(num_G) - 1
        if not num_wanted - slack <= num_active <= num_wanted:
            expected = f"{num_wanted} active units in all" + f", or up to {slack} fewer" * bool(slack)
            raise BreachError(on=moment, expected=expected, got=num_active, remedy=remedy)


def _zeros_hold(trials: Trials) -> None:
    remedy = "Only the optimizer and grown_init give weights values; no criterion may write to site.weight."
    for moment in _moments(trials):
        for name, mask in moment.masks.items():
            state = moment.states[name] if moment.run.setting.method.storage is None else {}
            for what, tensor in {"weight": moment.weights[name], **state}.items():
                if num_wrong := int((tensor[~mask] != 0).sum()):
                    expected, got = f"zeros outside the mask in the {what} of {name}", f"{num_wrong} other entries"
                    raise BreachError(on=moment, expected=expected, got=got, remedy=remedy)


def _finite(trials: Trials) -> None:
    for moment in _moments(trials):
        for name, weight in moment.weights.items():
            if num_bad := int((~weight.isfinite()).sum()):
                expected, got = f"finite numbers in {name}", f"{num_bad} that are NaN or infinite"
                remedy = "Look at grown_init: it returns the values of weights that have just grown."
                raise BreachError(on=moment, expected=expected, got=got, remedy=remedy)


def _target(trials: Trials) -> None:
    for trial in trials.values():
        method, sparsifier = trial.setting.method, trial.run.sparsifier
        shapes = {
            view.name: tuple(view.of(weight.parameter).shape) for weight in sparsifier.weights for view in weight.views
        }
        with world(0):
            densities = method.distribution(shapes, 1 - trial.setting.sparsity)
        wanted, found, slack = {}, {}, 0
        for name, mask_GUE in Moment.of(trial.run).folded():
            wanted[name] = num_units(mask_GUE.shape[1], densities[name]) * len(mask_GUE)
            found[name] = int(mask_GUE[..., 0].sum())
            slack += (len(mask_GUE) - 1) * (method.allocate is not None)
        if method.allocate is not None:
            wanted, found = {"all weights": sum(wanted.values())}, {"all weights": sum(found.values())}
        for name, num_wanted in wanted.items():
            if not num_wanted - slack <= found[name] <= num_wanted:
                on, expected = f"{trial.setting}, at its end", f"{num_wanted} active units in {name}"
                remedy = "A ramp ends at 1 and a surplus at 0, both at progress 1."
                raise BreachError(on=on, expected=expected, got=found[name], remedy=remedy)


def _resumes(trials: Trials) -> None:
    for trial in trials.values():
        remedy = "Keep nothing between calls: masks, steps, traces and an allocator's memory are all that is saved."
        _check_equal(trial, trial.resumed, remedy, f", saved and loaded after step {HALFWAY}")


def _copies(trials: Trials) -> None:
    trial = trials[FIRST]
    _check_equal(trial, trial.copied[0], "Let parts of the method equal their copies.", _COPIED)


def _freezes(trials: Trials) -> None:
    trial = trials[FIRST]
    _, frozen, masks = trial.copied
    for name, mask in frozen.sparsifier.masks.items():
        if not torch.equal(mask, masks[name]):
            expected, got = "masks that stay after freeze()", f"another mask of {name}"
            remedy = "No part of a method may write to site.mask."
            raise BreachError(on=f"{trial.setting}{_COPIED}", expected=expected, got=got, remedy=remedy)


def _repeatable(trials: Trials) -> None:
    remedy = "Draw from site.generator alone: check_criterion, on drop, grow and init, says more."
    _check_equal(trials[FIRST], trials[FIRST].repeated, remedy)


def _observers_look(trials: Trials) -> None:
    _check_equal(trials[FIRST], trials[FIRST].watched[0], "A method must not ask who is looking.")


def _seeded(trials: Trials) -> None:
    trial = trials[FIRST]
    (watched, drew), (other, drew_too) = trial.watched, trial.reseeded
    if (drawing := drew | drew_too) and not watched.difference(other):
        expected = f"another run for another seed, as {' and '.join(sorted(drawing))} of the method draw"
        remedy = "Use what you draw from site.generator; or draw nothing, as ties go to the lower index anyway."
        raise BreachError(on=trial.setting, expected=expected, got="the same", remedy=remedy)


LAWS = (
    *(_whole_units, _counts, _zeros_hold, _finite, _target, _resumes),
    *(_copies, _freezes, _repeatable, _observers_look, _seeded),
)
FIRST = next(iter(OPTIMIZERS))  # the optimizer of the laws that look at one alone
_COPIED = f", copied after step {HALFWAY}"


def _moments(trials: Trials) -> Iterator[Moment]:
    return (moment for trial in trials.values() for moment in trial.moments)


def _check_equal(trial: Trial, run: Run, remedy: str, on: str = "") -> None:
    if path := run.difference(trial.run):
        expected, got = "the run that never stopped and nobody watched, bit for bit", f"another {path}"
        raise BreachError(on=f"{trial.setting}{on}", expected=expected, got=got, remedy=remedy)
