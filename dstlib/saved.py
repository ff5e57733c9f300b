"""What a sparsifier saves of each weight, and the checks before any of it is taken back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstlib.errors import StateError, explain
from dstlib.masking import unit_mask
from dstlib.plan import Plan
from dstlib.targets import Weight

VERSION = 1


class SavedWeight(NamedTuple):
    """``step`` counts its optimizer's steps, ``updated_at`` is the step of its last mask update."""

    mask: Tensor
    step: int
    updated_at: int


def check_saved(state: Any, masks: Mapping[str, Tensor], plan: Plan) -> dict[str, SavedWeight]:
    """The saved weights by name, if every one fits the masks at hand.

    Errors: StateError for a state that is damaged or of another version, and for masks of other names,
    shapes or granularity, or of another number of active units where that never changes.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("weights"), Mapping) or "frozen" not in state:
        raise _misfit("contents", "the saved state", "those of Sparsifier.state_dict()", type(state).__name__)
    if state.get("version") != VERSION:
        raise _misfit("version", "the saved state", str(VERSION), state.get("version"))
    weights = state["weights"]
    if set(weights) != set(masks):
        missing, extra = sorted(set(masks) - set(weights)), sorted(set(weights) - set(masks))
        given = f"{len(missing)} missing ({', '.join(missing[:3])}), {len(extra)} extra ({', '.join(extra[:3])})"
        raise _misfit("names of the weights", "the saved state", f"the {len(masks)} at hand", given)
    by_name = {weight.name: weight for weight in plan.weights}
    return {name: _check_weight(by_name[name], weights[name], masks[name], plan) for name in masks}


def _check_weight(weight: Weight, saved: Any, current: Tensor, plan: Plan) -> SavedWeight:
    if not isinstance(saved, Mapping) or set(saved) != set(SavedWeight._fields):
        raise _misfit("fields", weight.name, ", ".join(SavedWeight._fields), saved)
    if not (isinstance(saved["step"], int) and isinstance(saved["updated_at"], int)):
        raise _misfit("steps", weight.name, "whole numbers", (saved["step"], saved["updated_at"]))
    mask = saved["mask"]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != current.shape:
        given = (tuple(mask.shape), mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise _misfit("mask", weight.name, f"a bool tensor of shape {tuple(current.shape)}", given)
    grain = plan.method.granularity
    for slot in weight.slots:
        theirs = slot.view(mask)
        saved_GU = grain.fold(theirs)[..., 0]
        if not torch.equal(unit_mask(saved_GU, grain, theirs.shape), theirs):
            raise _misfit("mask", slot.name, f"whole units of {grain}", "units that are partly active")
        num_G, num_target = saved_GU.sum(dim=1), plan.num_target(slot.name, saved_GU.shape[1], saved["updated_at"])
        if bool((num_G != num_target).any()):
            allowed = f"{num_target * len(num_G)} active units, as its sparsity asks for at step {saved['updated_at']}"
            raise _misfit("mask", slot.name, allowed, int(num_G.sum()))
    return SavedWeight(mask, saved["step"], saved["updated_at"])


def _misfit(what: str, where: str, allowed: str, given: object) -> StateError:
    remedy = "Build the same model and call sparsify() with the settings it was saved under."
    return StateError(explain(what, where, allowed=allowed, given=given, remedy=remedy))
