"""What every method keeps to, in a training: exact counts, zeros that hold, and runs that can be repeated.

Shapes: G groups, U units per group, E elements per unit.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from dstlib.masking import NM, AtInit, InTurn, num_units, random
from dstlib.methods.method import Method
from dstlib.testing.laws import Law, Rules, expect, hold, laws
from dstlib.testing.small import HALFWAY, OPTIMIZERS, Moment, Run, Setting, Trial

Trials = list[Trial]  # one for each optimizer


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
        init=random if isinstance(method.init, AtInit | InTurn) else method.init,
    )
    sparsity = _legal_sparsity(method) if sparsity is None else sparsity
    setting = Setting(method=scaled, sparsity=sparsity, width=width)
    return laws("method", method.name, LAWS, [Trial(replace(setting, optimizer=name)) for name in OPTIMIZERS])


def _legal_sparsity(method: Method) -> float:
    if isinstance(method.granularity, NM):
        return 1 - method.granularity.n / method.granularity.m
    start = method.start_density
    return 0.75 if callable(start) or start == 1 else max(0.75, 1 - start / 2)


def _whole_units(trials: Trials, moment: Moment) -> None:
    for name, mask_GUE in moment.folded():
        is_whole = torch.equal(mask_GUE.all(dim=-1), mask_GUE.any(dim=-1))
        expected = f"whole units of {moment.run.setting.method.granularity} in {name}"
        remedy = "Try check_granularity(method.granularity), which says more."
        expect(is_whole, expected, got="units that are partly active", remedy=remedy)


def _counts(trials: Trials, moment: Moment) -> None:
    remedy = "Curves and densities must give the same answer each time; check_curve and check_allocator say more."
    plan = moment.run.sparsifier.plan
    step = plan.clock.latest(moment.num_steps)
    num_active = num_wanted = slack = 0
    for name, mask_GUE in moment.folded():
        num_G, num_target = mask_GUE[..., 0].sum(dim=1), plan.num_target(name, mask_GUE.shape[1], step)
        is_met = plan.method.allocate is not None or bool((num_G == num_target).all())
        expect(is_met, f"{num_target} active units in each group of {name}", got=num_G.tolist(), remedy=remedy)
        num_active += int(num_G.sum())
        num_wanted += num_target * len(num_G)
        slack += len(num_G) - 1
    expected = f"{num_wanted} active units in all" + f", or up to {slack} fewer" * bool(slack)
    expect(num_wanted - slack <= num_active <= num_wanted, expected, got=num_active, remedy=remedy)


def _zeros_hold(trials: Trials, moment: Moment) -> None:
    remedy = "Only the optimizer and grown_init give weights values; no criterion may write to site.weight."
    for name, mask in moment.masks.items():
        state = moment.states[name] if moment.run.setting.method.storage is None else {}
        for what, tensor in {"weight": moment.weights[name], **state}.items():
            num_wrong = int((tensor[~mask] != 0).sum())
            expected = f"zeros outside the mask in the {what} of {name}"
            expect(not num_wrong, expected, got=f"{num_wrong} other entries", remedy=remedy)


def _finite(trials: Trials, moment: Moment) -> None:
    for name, weight in moment.weights.items():
        num_bad = int((~weight.isfinite()).sum())
        remedy = "Look at grown_init: it returns the values of weights that have just grown."
        got = f"{num_bad} that are NaN or infinite"
        expect(not num_bad, f"finite numbers in {name}", got=got, remedy=remedy)


def _target(trials: Trials, trial: Trial) -> None:
    method, sparsifier = trial.setting.method, trial.run.sparsifier
    views = [(view, weight.parameter) for weight in sparsifier.weights for view in weight.views]
    shapes = {view.name: tuple(view.of(parameter).shape) for view, parameter in views}
    densities = method.distribution(shapes, 1 - trial.setting.sparsity)
    wanted, found, slack = {}, {}, 0
    for name, mask_GUE in Moment.of(trial.run).folded():
        wanted[name] = num_units(mask_GUE.shape[1], densities[name]) * len(mask_GUE)
        found[name] = int(mask_GUE[..., 0].sum())
        slack += (len(mask_GUE) - 1) * (method.allocate is not None)
    if method.allocate is not None:
        wanted, found = {"all weights": sum(wanted.values())}, {"all weights": sum(found.values())}
    for name, num_wanted in wanted.items():
        is_met = num_wanted - slack <= found[name] <= num_wanted
        expected, on = f"{num_wanted} active units in {name}", f"{trial}, at its end"
        remedy = "A ramp ends at 1 and a surplus at 0, both at progress 1."
        expect(is_met, expected, got=found[name], remedy=remedy, on=on)


def _resumes(trials: Trials, trial: Trial) -> None:
    remedy = "Keep nothing between calls: masks, steps, traces and an allocator's memory are all that is saved."
    _check_equal(trial, trial.resumed, remedy, f", saved and loaded after step {HALFWAY}")


def _copies(trials: Trials, trial: Trial) -> None:
    _check_equal(trial, trial.copied[0], "Let parts of the method equal their copies.", _COPIED)


def _freezes(trials: Trials, trial: Trial) -> None:
    _, frozen, masks = trial.copied
    for name, mask in frozen.sparsifier.masks.items():
        expected, remedy = "masks that stay after freeze()", "No part of a method may write to site.mask."
        is_same = torch.equal(mask, masks[name])
        expect(is_same, expected, got=f"another mask of {name}", remedy=remedy, on=f"{trial}{_COPIED}")


def _repeatable(trials: Trials, trial: Trial) -> None:
    _check_equal(
        trial, trial.repeated, "Draw from site.generator alone: check_criterion, on drop, grow and init, says more."
    )


def _observers_look(trials: Trials, trial: Trial) -> None:
    _check_equal(trial, trial.watched[0], "A method must not ask who is looking.")


def _seeded(trials: Trials, trial: Trial) -> None:
    (watched, drew), (other, drew_too) = trial.watched, trial.reseeded
    drawing = drew | drew_too
    expected = f"another run for another seed, as {' and '.join(sorted(drawing))} of the method draw"
    remedy = "Use what you draw from site.generator; or draw nothing, as ties go to the lower index anyway."
    expect(not drawing or watched.difference(other), expected, got="the same", remedy=remedy)


_COPIED = f", copied after step {HALFWAY}"


def _check_equal(trial: Trial, run: Run, remedy: str, how: str = "") -> None:
    path = run.difference(trial.run)
    expected = "the run that never stopped and nobody watched, bit for bit"
    expect(not path, expected, got=f"another {path}", remedy=remedy, on=f"{trial}{how}")


def _moments(trials: Trials) -> Iterator[Moment]:
    return (moment for trial in trials for moment in trial.moments)


LAWS: Rules[Trials] = {
    **dict.fromkeys((_whole_units, _counts, _zeros_hold, _finite), _moments),
    **dict.fromkeys((_target, _resumes), iter),
    **dict.fromkeys((_copies, _freezes, _repeatable, _observers_look, _seeded), lambda trials: trials[:1]),
}
