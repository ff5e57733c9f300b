"""Masks in training: a sparse weight with its mask and its counters, what is saved of it, and what is taken back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.errors import StateError
from dstlib.masking import Granularity, num_units, unit_mask
from dstlib.masking.update import count_outside, factor, zero_outside_, zero_outside_each_
from dstlib.sparsifier.optimizer_state import Kept
from dstlib.sparsifier.plan import Plan
from dstlib.targets import Weight

VERSION = 2
# the fields of MaskedWeight that a run depends on, by their key in a saved state
_SAVED = {
    **{name: name for name in ("mask", "step", "updated_at", "trace", "traced_at", "hidden", "reach")},
    "ranked": "densities",
}


@dataclass(eq=False)
class MaskedWeight:
    """A sparse weight in training: its mask, and what has happened to it.

    ``step`` counts the steps that its optimizer has taken, ``begun`` those that have begun; ``updated_at`` is the
    step of the last mask update. ``trace`` is what the method's trace has gathered, ``traced_at`` the step it has
    come to. ``hidden`` are the values under the mask, zero inside it, and ``reach`` marks what receives gradients:
    both under dense storage only. While ``is_revealed``, the parameter itself holds the hidden values.
    ``densities`` are those of the matrix views that came of a look at the model, where the method's ``init`` takes
    one. ``version`` is the parameter's when it was last seen to be zero outside the mask, ``lost_at`` the last step
    that found something else's non-zeros there.
    """

    weight: Weight
    mask: Tensor
    step: int = 0
    begun: int = 0
    updated_at: int = 0
    trace: Tensor | None = None
    traced_at: int = 0
    hidden: Tensor | None = None
    reach: Tensor | None = None
    is_revealed: bool = False
    densities: tuple[float, ...] = ()
    version: int = -1
    lost_at: int = -1
    _factor: tuple[Tensor, int, Tensor] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_factor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes masks as copies: tensors that were sent to another process share their memory with the sender."""
        self.__dict__.update(state)
        for name in ("mask", "trace", "hidden", "reach"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.clone())

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as it was when it was made sparse."""
        return self.weight.parameter

    @property
    def learns(self) -> Tensor | None:
        """What receives gradients: the mask, or what dense storage lets learn; None: everything."""
        return self.mask if self.hidden is None else self.reach

    @property
    def factor(self) -> Tensor:
        """What ``learns`` as integers, 0 and 1, made anew where the mask has changed; there must be a mask."""
        learns = self.learns
        assert learns is not None
        if self._factor is None or self._factor[0] is not learns or self._factor[1] != learns._version:
            self._factor = learns, learns._version, factor(learns, self.parameter)
        return self._factor[2]

    @property
    def fits(self) -> bool:
        """Whether mask and parameter have one shape; ``p.data`` may be set to another, which the next step refuses."""
        return self.parameter.shape == self.mask.shape

    @property
    def is_stepping(self) -> bool:
        """Whether a step has begun that is not yet done."""
        return self.begun > self.step

    @property
    def is_written(self) -> bool:
        """Whether something else may have written to the parameter since it was seen to be zero outside the mask.

        Versions do not tell of all; so the first step looks in any case.
        """
        return not self.is_revealed and (self.begun == 0 or self.version != _version(self.parameter))

    def begin_step(self) -> None:
        """Counts a step as begun, and moves all that belongs to the weight to where it is now."""
        self.begun = self.step + 1
        if self.mask.device == (device := self.parameter.device):
            return
        self.mask = self.mask.to(device)
        for name in ("trace", "hidden", "reach"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))

    def clear(self, kept: Iterable[Kept]) -> None:
        """Writes zeros outside the mask, and makes what optimizers keep for the weight there as it is at birth."""
        clear_all([(self, kept)])

    def start_grown(self, kept: Iterable[Kept], old: Tensor, grad: Tensor) -> None:
        """Starts what optimizers make of the weight, or of its first gradient, where it has grown since an old mask."""
        if self.hidden is None:
            for k in kept:
                k.start(self.mask & ~old, self.parameter.detach(), grad)

    def num_outside(self) -> int:
        """Counts the non-zeros outside the mask; there are none unless revealed, or something else wrote them."""
        return count_outside(self.parameter, self.mask) if self.fits else int(self.parameter.count_nonzero())

    def num_hidden_outside(self) -> int:
        """Counts the non-zeros outside the mask that are what is hidden there, so that nothing is lost of them."""
        if self.hidden is None:
            return 0
        return int(((self.parameter == self.hidden) & (self.hidden != 0) & ~self.mask).count_nonzero())

    def reveal(self) -> bool:
        """Puts the hidden values back into the parameter; returns False if they are there already."""
        if self.is_revealed:
            return False
        assert self.hidden is not None
        self.parameter.copy_(torch.where(self.mask, self.parameter, self.hidden))
        self.is_revealed = True
        return True

    def undo_out_of_reach(self) -> None:
        """Takes back what weight decay did to revealed values that were not to learn."""
        if self.reach is not None:
            assert self.hidden is not None
            self.parameter.copy_(torch.where(self.reach, self.parameter, self.hidden))

    def hide(self) -> None:
        """Puts aside what the mask covers, if it was revealed; the parameter is the caller's to clear."""
        if self.is_revealed:
            self.hidden = zero_outside_(self.parameter.detach().clone(), ~self.mask)
            self.is_revealed = False

    def restore(self, saved: "MaskedWeight") -> None:
        """Takes over what was saved, on the weight's device."""
        device = self.parameter.device
        self.mask.copy_(saved.mask)
        self.step = self.begun = saved.step
        self.updated_at, self.traced_at, self.densities = saved.updated_at, saved.traced_at, saved.densities
        self.trace, self.hidden, self.reach = (
            None if x is None else x.detach().clone().to(device) for x in (saved.trace, saved.hidden, saved.reach)
        )
        self.is_revealed = False


def clear_all(weights: Iterable[tuple[MaskedWeight, Iterable[Kept]]]) -> None:
    """Does as ``MaskedWeight.clear`` for weights with what optimizers keep for each, zeros in one call for all."""
    zeros: list[tuple[Tensor, Tensor]] = []
    cleared: list[MaskedWeight] = []
    for m, kept in weights:
        if not m.is_revealed:
            zeros.append((m.parameter, m.factor if m.hidden is None else m.mask))
            cleared.append(m)
        if (learns := m.learns) is None:
            continue
        for k in kept:
            if m.hidden is not None and k.meaning.kind == "weights":
                continue  # copies of hidden weights live with them
            if k.is_zero_at_birth:
                zeros.append((k.bits, m.factor))
            else:
                k.write_outside(learns)
    zero_outside_each_(zeros)
    for m in cleared:
        m.version = _version(m.parameter)


def _version(parameter: Tensor) -> int:
    """Returns what torch counts writes by, and nothing else does; inference tensors have none, and take no step."""
    return 0 if parameter.is_inference() else parameter._version


def groups_of(masked: Iterable[MaskedWeight], granularity: Granularity) -> dict[str, torch.Size]:
    """Returns the number of groups, and of units in each, of every matrix view by name."""
    return {view.name: granularity.fold(view.of(m.mask)).shape[:2] for m in masked for view in m.weight.views}


def save(masked: Sequence[MaskedWeight], plan: Plan, *, frozen: bool, memory: float) -> dict[str, Any]:
    """Returns all that a resumption needs beside the model and the optimizer: plain values and copies of tensors."""
    weights = {}
    for m in masked:
        fields = {key: getattr(m, field) for key, field in _SAVED.items()}
        weights[m.weight.name] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in fields.items()}
    num_planned = _num_planned(masked, plan)
    return {"version": VERSION, "frozen": frozen, "memory": memory, "num_planned": num_planned, "weights": weights}


def check_saved(state: Any, masked: Sequence[MaskedWeight], plan: Plan) -> list[MaskedWeight]:
    """Returns the saved weights, if every one fits its mask at hand.

    Raises:
        StateError: The state is damaged or of another version, or its masks have other names, shapes or granularity,
            or another number of active units than the settings ask for.
    """
    contents = "contents", "the saved state", "those of Sparsifier.state_dict()"
    if not isinstance(state, Mapping) or not isinstance(state.get("weights"), Mapping):
        keys = ", ".join(map(str, list(state)[:4])) if isinstance(state, Mapping) else ""
        raise StateError.of(
            "contents",
            "the saved state",
            allowed=contents[2],
            given=f"{type(state).__name__}{f' with the keys {keys}' if keys else ''}",
            remedy="Pass what state_dict() of a sparsifier returned, not that of a model, nor a whole checkpoint.",
        )
    if state.get("version") != VERSION:
        raise _misfit("version", "the saved state", str(VERSION), state.get("version"))
    numbers = ("frozen", "memory", "num_planned")
    if missing := [name for name in numbers if not isinstance(state.get(name), int | float)]:
        raise _misfit(*contents, f"no {', '.join(missing)}")
    weights, names = state["weights"], [m.weight.name for m in masked]
    if set(weights) != set(names):
        missing, extra = sorted(set(names) - set(weights)), sorted(set(weights) - set(names))
        given = f"{len(missing)} missing ({', '.join(missing[:3])}), {len(extra)} extra ({', '.join(extra[:3])})"
        raise _misfit("names of the weights", "the saved state", f"the {len(names)} at hand", given)
    planned = _num_planned(masked, plan)
    # a look at another batch may leave units idle, or use them, that do not divide into groups
    idle = sum(num_groups - 1 for num_groups, _ in groups_of(masked, plan.method.granularity).values())
    if abs(planned - state["num_planned"]) > (idle if plan.densities_from_model else 0):
        raise _misfit("sparsity", "the saved state", f"{planned} active units at the end", state["num_planned"])
    return [_check_weight(weights[m.weight.name], m, plan) for m in masked]


def _num_planned(masked: Iterable[MaskedWeight], plan: Plan) -> int:
    """Counts the active units of all weights at the end of the run."""
    groups = groups_of(masked, plan.method.granularity)
    return sum(num_groups * num_units(size, plan.densities[name]) for name, (num_groups, size) in groups.items())


def _check_weight(saved: Any, current: MaskedWeight, plan: Plan) -> MaskedWeight:
    weight = current.weight
    if not isinstance(saved, Mapping) or set(saved) != set(_SAVED):
        given = ", ".join(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise _misfit("fields", weight.name, ", ".join(_SAVED), given)
    theirs = MaskedWeight(weight, **{field: saved[key] for key, field in _SAVED.items()})
    steps = theirs.step, theirs.updated_at, theirs.traced_at
    if not all(isinstance(step, int) for step in steps):
        raise _misfit("steps", weight.name, "whole numbers", steps)
    densities, num_densities = theirs.densities, len(weight.views) if plan.densities_from_model else 0
    if (
        not isinstance(densities, Sequence)
        or len(densities) != num_densities
        or not all(isinstance(d, float) and 0 < d <= 1 for d in densities)
    ):
        raise _misfit("ranked densities", weight.name, f"{num_densities} of them", densities)
    _check_tensors(theirs, current.mask.shape, plan)
    grain = plan.method.granularity
    for view in weight.views:
        mask = view.of(theirs.mask)
        active_GU = grain.fold(mask)[..., 0]
        if not torch.equal(unit_mask(active_GU, grain, mask.shape), mask):
            raise _misfit("mask", view.name, f"whole units of {grain}", "units that are partly active")
        # where budgets were shared out, the mask is all that says how many units the view has
        if (plan.densities_from_model or plan.method.allocate is not None) and view.name not in plan.own:
            continue
        num_G, num_target = active_GU.sum(dim=1), plan.num_target(view.name, active_GU.shape[1], theirs.updated_at)
        if bool((num_G != num_target).any()):
            allowed = f"{num_target * len(num_G)} active units, as its sparsity asks for at step {theirs.updated_at}"
            raise _misfit("mask", view.name, allowed, int(num_G.sum()))
    return theirs


def _check_tensors(saved: MaskedWeight, shape: torch.Size, plan: Plan) -> None:
    storage = plan.method.storage
    present = {
        "mask": True,
        "trace": None if plan.method.trace is not None else False,
        "hidden": storage is not None,
        "reach": storage is not None and storage.extra is not None,
    }
    for name, expected in present.items():
        tensor = getattr(saved, name)
        if tensor is None and expected is not True:
            continue
        kind = "bool" if name in ("mask", "reach") else "floating"
        fits = isinstance(tensor, Tensor) and expected is not False and tensor.shape == shape
        if not fits or (tensor.dtype != torch.bool if kind == "bool" else not tensor.is_floating_point()):
            given = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            allowed = "nothing" if expected is False else f"a {kind} tensor of shape {tuple(shape)}"
            raise _misfit(name, saved.weight.name, allowed, given)


def _misfit(what: str, where: str, allowed: str, given: object) -> StateError:
    remedy = "Build the same model and call sparsify() with the settings it was saved under."
    return StateError.of(what, where, allowed=allowed, given=given, remedy=remedy)
