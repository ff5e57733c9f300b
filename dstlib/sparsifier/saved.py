"""What a sparsifier saves of each weight, and the checks before any of it is taken back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstlib.errors import StateError
from dstlib.masking import num_units, unit_mask
from dstlib.sparsifier.masked import Masked
from dstlib.sparsifier.plan import Plan
from dstlib.targets import Weight

VERSION = 2


class SavedWeight(NamedTuple):
    """The fields of :class:`Masked` that a run depends on."""

    mask: Tensor
    step: int
    updated_at: int
    trace: Tensor | None
    traced_at: int
    hidden: Tensor | None
    reach: Tensor | None
    ranked: tuple[float, ...]

    def restore(self, m: Masked) -> None:
        """Puts them back, on the weight's device."""
        device = m.parameter.device
        m.mask.copy_(self.mask)
        m.step, m.updated_at, m.traced_at, m.ranked = self.step, self.updated_at, self.traced_at, self.ranked
        m.trace, m.hidden, m.reach = (
            None if x is None else x.detach().clone().to(device) for x in (self.trace, self.hidden, self.reach)
        )
        m.is_stepping = m.is_open = False


def save(masked: Sequence[Masked], plan: Plan, *, frozen: bool, memory: float) -> dict[str, Any]:
    """All that a resumption needs beside the model and the optimizer; plain values and copies of tensors."""
    weights = {}
    for m in masked:
        fields = {name: getattr(m, name) for name in SavedWeight._fields}
        weights[m.weight.name] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in fields.items()}
    masks = {m.weight.name: m.mask for m in masked}
    return {
        "version": VERSION,
        "frozen": frozen,
        "memory": memory,
        "num_planned": _num_planned(masks, plan),
        "weights": weights,
    }


def check_saved(state: Any, masks: Mapping[str, Tensor], plan: Plan) -> dict[str, SavedWeight]:
    """The saved weights by name, if every one fits the masks at hand.

    Errors: StateError for a state that is damaged or of another version, and for masks of other names,
    shapes or granularity, or of another number of active units than the settings ask for.
    """
    fields = ("frozen", "memory", "num_planned")
    if not isinstance(state, Mapping) or not isinstance(state.get("weights"), Mapping):
        raise _misfit("contents", "the saved state", "those of Sparsifier.state_dict()", type(state).__name__)
    if state.get("version") != VERSION:
        raise _misfit("version", "the saved state", str(VERSION), state.get("version"))
    if missing := [name for name in fields if not isinstance(state.get(name), int | float)]:
        raise _misfit("contents", "the saved state", "those of Sparsifier.state_dict()", f"no {', '.join(missing)}")
    weights = state["weights"]
    if set(weights) != set(masks):
        missing, extra = sorted(set(masks) - set(weights)), sorted(set(weights) - set(masks))
        given = f"{len(missing)} missing ({', '.join(missing[:3])}), {len(extra)} extra ({', '.join(extra[:3])})"
        raise _misfit("names of the weights", "the saved state", f"the {len(masks)} at hand", given)
    planned = _num_planned(masks, plan)
    if abs(planned - state["num_planned"]) > (_slack(masks, plan) if plan.is_ranked else 0):
        raise _misfit("sparsity", "the saved state", f"{planned} active units at the end", state["num_planned"])
    by_name = {weight.name: weight for weight in plan.weights}
    return {name: _check_weight(by_name[name], weights[name], masks[name], plan) for name in masks}


def _num_planned(masks: Mapping[str, Tensor], plan: Plan) -> int:
    """Active units of all weights at the end of the run."""
    return sum(num_groups * num_units(size, plan.densities[name]) for name, num_groups, size in _groups(masks, plan))


def _slack(masks: Mapping[str, Tensor], plan: Plan) -> int:
    """How many units a look at another batch may leave idle, or use, as they do not divide into groups."""
    return sum(num_groups - 1 for _, num_groups, _ in _groups(masks, plan))


def _groups(masks: Mapping[str, Tensor], plan: Plan) -> Iterator[tuple[str, int, int]]:
    """The name of each view, its groups, and the units in each of them."""
    for weight in plan.weights:
        for view in weight.views if weight.name in masks else ():
            num_groups, size = plan.method.granularity.fold(view.of(masks[weight.name])).shape[:2]
            yield view.name, num_groups, size


def _check_weight(weight: Weight, saved: Any, current: Tensor, plan: Plan) -> SavedWeight:
    if not isinstance(saved, Mapping) or set(saved) != set(SavedWeight._fields):
        raise _misfit("fields", weight.name, ", ".join(SavedWeight._fields), _names(saved))
    if not all(isinstance(saved[name], int) for name in ("step", "updated_at", "traced_at")):
        raise _misfit("steps", weight.name, "whole numbers", (saved["step"], saved["updated_at"], saved["traced_at"]))
    ranked, num_ranked = saved["ranked"], len(weight.views) if plan.is_ranked else 0
    if (
        not isinstance(ranked, Sequence)
        or len(ranked) != num_ranked
        or not all(isinstance(d, float) and 0 < d <= 1 for d in ranked)
    ):
        raise _misfit("ranked densities", weight.name, f"{num_ranked} of them", ranked)
    _check_tensors(weight, saved, current, plan)
    grain, mask = plan.method.granularity, saved["mask"]
    for view in weight.views:
        theirs = view.of(mask)
        saved_GU = grain.fold(theirs)[..., 0]
        if not torch.equal(unit_mask(saved_GU, grain, theirs.shape), theirs):
            raise _misfit("mask", view.name, f"whole units of {grain}", "units that are partly active")
        moves = plan.is_ranked or plan.method.allocate is not None  # then the mask is where its number stands
        if moves and view.name not in plan.own:
            continue
        num_G, num_target = saved_GU.sum(dim=1), plan.num_target(view.name, saved_GU.shape[1], saved["updated_at"])
        if bool((num_G != num_target).any()):
            allowed = f"{num_target * len(num_G)} active units, as its sparsity asks for at step {saved['updated_at']}"
            raise _misfit("mask", view.name, allowed, int(num_G.sum()))
    return SavedWeight(**saved)


def _check_tensors(weight: Weight, saved: Mapping[str, Any], current: Tensor, plan: Plan) -> None:
    storage = plan.method.storage
    present = {
        "mask": True,
        "trace": None if plan.method.trace is not None else False,
        "hidden": storage is not None,
        "reach": storage is not None and storage.extra is not None,
    }
    for name, expected in present.items():
        tensor = saved[name]
        if tensor is None and expected is not True:
            continue
        kind = "bool" if name in ("mask", "reach") else "floating"
        fits = isinstance(tensor, Tensor) and expected is not False and tensor.shape == current.shape
        if not fits or (tensor.dtype != torch.bool if kind == "bool" else not tensor.is_floating_point()):
            given = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            allowed = "nothing" if expected is False else f"a {kind} tensor of shape {tuple(current.shape)}"
            raise _misfit(name, weight.name, allowed, given)


def _names(saved: Any) -> str:
    return ", ".join(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__


def _misfit(what: str, where: str, allowed: str, given: object) -> StateError:
    remedy = "Build the same model and call sparsify() with the settings it was saved under."
    return StateError.of(what, where, allowed=allowed, given=given, remedy=remedy)
