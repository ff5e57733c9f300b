"""Saved states: what a resumption needs beside model and optimizer, and the laws by which a state is taken back.

The container that a state travels in may have checked nothing: so its parts are held against the plan (shapes, whole
units, budgets, steps), and all of it against a checksum of its own.

Shapes: G groups, U units per group.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dstlib.errors import StateError
from dstlib.masking import Granularity, NeuronAblation, PackedMask, folded_shape, num_units, unit_mask
from dstlib.masking.update import count_outside, is_mask
from dstlib.schedules import Never
from dstlib.sparsifier.frozen import last_update
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.state import MaskedWeight, SavedWeight, groups_of
from dstlib.sparsifier.update import with_densities
from dstlib.targets import MatrixView, Weight
from dstlib.torch_files import check_seal, checksum

VERSION = 2
# the fields of SavedWeight, by their key in a saved state
_SAVED = {
    **{name: name for name in ("mask", "step", "updated_at", "trace", "traced_at", "hidden", "reach", "young")},
    **{"settled": "settled", "starts": "starts", "ranked": "densities", "scales": "scales"},
}
# those that earlier builds did not save, as what they had was this
_LATER: Mapping[str, Any] = {"young": None, "settled": (), "starts": (), "scales": ()}
MOST_STEPS = 2**53  # that no training takes, and that a history and any float still count
_BEGUN = {"step": 0, "updated_at": 0, "traced_at": 0, "trace": None, "young": None, "settled": ()}
_WHOLE = "the saved state"
_FROM_MASKS = (
    " An earlier build's preset may have had other numbers: then load the weights and go on from its masks alone, "
    "sparsify(model, sparsity=..., masks=state)."
)
_RUN = ("method", "total_steps")


def save(masked: Sequence[MaskedWeight], plan: Plan, *, frozen: bool, memory: float) -> dict[str, Any]:
    """Returns all that a resumption needs beside the model and the optimizer: plain values and copies of tensors."""
    weights = {}
    for m in masked:
        fields = {key: getattr(m, field) for key, field in _SAVED.items()}
        weights[m.weight.name] = {key: _copied(value) for key, value in fields.items()}
    num_planned = _num_planned(masked, plan)
    outputs = {} if plan.outputs is not None else _outputs(masked)
    whole = {"version": VERSION, "frozen": frozen, "memory": memory, "num_planned": num_planned, "outputs": outputs}
    run = {"method": plan.method.name, "total_steps": plan.total_steps}
    return _sealed({**whole, **run, "weights": weights})


def _copied(value: Any) -> Any:
    if isinstance(value, PackedMask):
        return value.dense()
    return value.clone() if isinstance(value, Tensor) else value


def _outputs(masked: Iterable[MaskedWeight]) -> dict[str, bool | None]:
    """Returns whether outputs come from weights, where that is known; None: not yet, and they are to be filled then."""
    known = {m: None if m.is_to_fill else m.is_output for m in masked}  # what is still to be filled is looked for again
    return {m.weight.name: is_output for m, is_output in known.items() if is_output is not None or m.is_to_fill}


def at_step_0(state: Any, *, frozen: bool | None = None) -> dict[str, Any]:
    """Returns a state with its masks, but with the clock of a training that begins; ``frozen`` if it says so.

    Raises:
        StateError: The state is damaged.
    """
    weights = {name: {**weight, **_BEGUN} for name, weight in _weights_of(state).items()}
    begun = {key: value for key, value in state.items() if key not in _RUN} | {"weights": weights}
    return _sealed(begun if frozen is None else {**begun, "frozen": frozen})


def of_length(state: Any, total_steps: int | None) -> dict[str, Any]:
    """Returns a state for a run of another length, which goes on from it by its own schedule.

    Raises:
        StateError: The state is damaged.
    """
    _weights_of(state)
    return _sealed({**state, "total_steps": total_steps})


def is_state(state: Mapping[str, Any]) -> bool:
    """Whether this is what ``state_dict`` of a sparsifier returned, whole or damaged."""
    return isinstance(state.get("weights"), Mapping) and {"version", "num_planned"} <= state.keys()


def masks_of(state: Any) -> dict[str, Tensor]:
    """Returns the masks of a state by the names of their weights.

    Raises:
        StateError: The state is damaged.
    """
    return {name: weight["mask"] for name, weight in _weights_of(state).items()}


def check_saved(state: Any, masked: Sequence[MaskedWeight], plan: Plan) -> list[SavedWeight]:
    """Returns the saved weights, if every one fits its mask at hand.

    Raises:
        StateError: The state is damaged or of another version, or its masks have other names, shapes or granularity,
            or other numbers of active units than the settings ask for.
    """
    _check_contents(state)
    _check_numbers(state, plan)
    weights, names = state["weights"], [m.weight.name for m in masked]
    if set(weights) != set(names):
        missing, extra = sorted(set(names) - set(weights)), sorted(map(str, set(weights) - set(names)))
        given = f"{len(missing)} missing ({', '.join(missing[:3])}), {len(extra)} extra ({', '.join(extra[:3])})"
        raise _misfit("names of the weights", _WHOLE, f"the {len(names)} at hand", given)
    _check_run(state, plan)
    planned = _num_planned(masked, plan)
    # a look at another batch may leave units idle, or use them, that do not divide into groups; masks round in each
    least = {"settings": None, "look": 1, "masks": 0}[plan.densities_from]
    numbers = [num_groups for num_groups, _ in groups_of(masked, plan.method.granularity).values()]
    slack = 0 if least is None else sum(num_groups - least for num_groups in numbers)
    if abs(planned - state["num_planned"]) > slack and not plan.sparsity_from_masks:
        raise _misfit("sparsity", _WHOLE, f"{planned} active units at the end", state["num_planned"])
    all_saved = [_check_weight(weights[m.weight.name], m, plan) for m in masked]
    if plan.densities_from == "masks":
        plan = with_densities(plan, all_saved)
        if (planned := _num_planned(masked, plan)) != state["num_planned"]:
            raise _misfit("num_planned", _WHOLE, f"{planned}, as its densities have it", state["num_planned"])
    _check_outputs(state, all_saved, plan)
    latest = 1 + max((saved.step for saved in all_saved), default=0)  # of a step that has begun
    end = last_update(plan) if state["frozen"] else 0  # of a plan that finish() has brought to its end
    for saved in all_saved:
        if saved.updated_at > latest and saved.updated_at != end:
            raise _misfit("updated_at", saved.weight.name, f"a step up to {latest}", saved.updated_at)
    if plan.method.allocate is not None and plan.densities_from != "look":
        _check_shared_total(all_saved, plan)
    check_seal(state, _without_seal(state), where=_WHOLE)
    return all_saved


def _check_outputs(state: Mapping[str, Any], all_saved: Sequence[SavedWeight], plan: Plan) -> None:
    """Takes over which weights are known to be outputs, or not; states that are older than this say nothing of it."""
    outputs = state.get("outputs", {})
    names = {saved.weight.name for saved in all_saved}
    if (
        not isinstance(outputs, Mapping)
        or not set(outputs) <= names
        or not all(type(value) is bool or value is None for value in outputs.values())
    ):
        raise _misfit("outputs", _WHOLE, "weights that are outputs, or are not", outputs)
    for saved in all_saved:
        name = saved.weight.name
        saved.is_output = outputs.get(name) if plan.outputs is None else name in plan.outputs
        saved.is_to_fill = name in outputs and outputs[name] is None


def _sealed(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state with a checksum of its other parts."""
    return {**state, "checksum": checksum(_without_seal(state))}


def _without_seal(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "checksum"}


def _weights_of(state: Any) -> Mapping[str, Mapping[str, Any]]:
    """Returns the weights of a state with all their fields, as they were saved."""
    _check_contents(state)
    for name, weight in state["weights"].items():
        _check_fields(weight, str(name))
        if not is_mask(weight["mask"]):
            raise _misfit("mask", str(name), "a bool tensor", type(weight["mask"]).__name__)
    check_seal(state, _without_seal(state), where=_WHOLE)
    weights: Mapping[str, Mapping[str, Any]] = state["weights"]
    return weights


def _check_contents(state: Any) -> None:
    if not isinstance(state, Mapping) or not isinstance(state.get("weights"), Mapping):
        keys = ", ".join(map(str, list(state)[:4])) if isinstance(state, Mapping) else ""
        raise StateError.of(
            "contents",
            _WHOLE,
            allowed="those of Sparsifier.state_dict()",
            given=f"{type(state).__name__}{f' with the keys {keys}' if keys else ''}",
            remedy="Pass what state_dict() of a sparsifier returned, not that of a model, nor a whole checkpoint.",
        )
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise _misfit("version", _WHOLE, str(VERSION), version)


def _check_run(state: Mapping[str, Any], plan: Plan) -> None:
    """Checks that a state is of the same method, by name, in a run as long; those of earlier builds do not say."""
    for what, here in (("method", plan.method.name), ("total_steps", plan.total_steps)):
        there = state.get(what, here)
        if type(there) is not type(here) or there != here:
            raise _misfit(what, _WHOLE, repr(here), repr(there))


def _check_numbers(state: Mapping[str, Any], plan: Plan) -> None:
    missing = [name for name in ("frozen", "memory", "num_planned") if name not in state]
    if missing:
        raise _misfit("contents", _WHOLE, "those of Sparsifier.state_dict()", f"no {', '.join(missing)}")
    frozen, memory, num_planned = state["frozen"], state["memory"], state["num_planned"]
    if type(frozen) is not bool:
        raise _misfit("frozen", _WHOLE, "True or False", frozen)
    if type(num_planned) is not int:
        raise _misfit("num_planned", _WHOLE, "a whole number", num_planned)
    is_number = type(memory) in (int, float) and math.isfinite(memory)
    if not is_number or (plan.method.allocate is None and memory != 0):
        allowed = "a finite number" if plan.method.allocate else "0, as the method has no allocator"
        raise _misfit("memory", _WHOLE, allowed, memory)


def _num_planned(masked: Iterable[MaskedWeight], plan: Plan) -> int:
    """Counts the active units of all weights at the end of the run."""
    groups = groups_of(masked, plan.method.granularity)
    return sum(num_groups * num_units(size, plan.densities[name]) for name, (num_groups, size) in groups.items())


def _check_fields(saved: Any, name: str) -> None:
    if not isinstance(saved, Mapping) or {*saved, *_LATER} != set(_SAVED):
        given = ", ".join(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise _misfit("fields", name, ", ".join(_SAVED), given)


def _check_weight(saved: Any, current: MaskedWeight, plan: Plan) -> SavedWeight:
    weight = current.weight
    _check_fields(saved, weight.name)
    theirs = SavedWeight(weight, **{field: {**_LATER, **saved}[key] for key, field in _SAVED.items()})
    _check_steps(theirs, plan)
    theirs.settled = _check_settled(theirs, plan)
    num_views, has_look, has_masks = (
        len(weight.views),
        plan.densities_from != "settings",
        plan.densities_from == "masks",
    )
    for what, densities, num in (
        ("ranked densities", theirs.densities, num_views if has_look else 0),
        ("starting densities", theirs.starts, num_views if has_masks else 0),
    ):
        is_sequence = isinstance(densities, Sequence) and len(densities) == num
        if not is_sequence or not all(isinstance(d, float) and 0 < d <= 1 for d in densities):
            raise _misfit(what, weight.name, f"{num} of them", densities)
    theirs.densities, theirs.starts = tuple(theirs.densities), tuple(theirs.starts)
    _check_tensors(theirs, current.shape, plan)
    if has_look:
        plan = with_densities(plan, [theirs])
    for view in weight.views:
        _check_view(theirs, view, plan)
    return theirs


def _check_steps(saved: SavedWeight, plan: Plan) -> None:
    """Checks the counters of one weight; an update waits for a gradient, and may follow that of others."""
    name, step, updated_at, traced_at = saved.weight.name, saved.step, saved.updated_at, saved.traced_at
    for what, value in (("step", step), ("updated_at", updated_at), ("traced_at", traced_at)):
        if type(value) is not int or not 0 <= value < MOST_STEPS:
            raise _misfit(what, name, f"a whole number from 0 up to {MOST_STEPS:,}", value)
    if updated_at and not isinstance(plan.clock, Never) and plan.clock.latest(updated_at) == 0:
        first = plan.clock.start + plan.clock.interval
        raise _misfit("updated_at", name, f"0, or {first} and later, as the first update is at {first}", updated_at)
    gathers = plan.method.trace is not None
    if not (traced_at <= step + 1 if gathers else traced_at == 0):
        raise _misfit("traced_at", name, f"a step up to {step + 1}" if gathers else "0: no trace", traced_at)


def _check_settled(saved: SavedWeight, plan: Plan) -> tuple[bool, ...]:
    """Returns of which views the updates have ended, if the method ends any and there was one."""
    settled, can_end = saved.settled, plan.method.early_stop is not None and saved.updated_at > 0
    num_views = len(saved.weight.views) if can_end else 0
    is_right = isinstance(settled, Sequence) and all(type(ends) is bool for ends in settled)
    if not is_right or len(settled) not in (0, num_views):
        raise _misfit("settled", saved.weight.name, f"nothing, or {num_views} truth values", settled)
    return tuple(settled)


def _check_tensors(saved: SavedWeight, shape: torch.Size, plan: Plan) -> None:
    name, storage, traces = saved.weight.name, plan.method.storage, plan.method.trace is not None
    _check_tensor("mask", saved.mask, name, shape, is_bool=True)
    for what, tensor, is_there in (
        ("trace", saved.trace, traces and (saved.trace is not None or None)),
        ("young", saved.young, plan.method.grown_warmup > 0 and (saved.young is not None or None)),
        ("hidden", saved.hidden, storage is not None),
        ("reach", saved.reach, storage is not None and storage.extra is not None),
    ):
        if is_there:
            _check_tensor(what, tensor, name, shape, is_bool=what in ("reach", "young"))
        elif tensor is not None:
            raise _misfit(what, name, "nothing", _described(tensor))
    if saved.trace is not None and saved.traced_at == 0:
        raise _misfit("trace", name, "nothing, as traced_at is 0", _described(saved.trace))
    is_soft = storage is not None and storage.soft
    num_scales = len(saved.weight.views) if is_soft else 0
    scales = saved.scales if isinstance(saved.scales, Sequence) else None
    if (
        scales is None
        or len(scales) != num_scales
        or not all(isinstance(x, float) and 0 < x < math.inf for x in scales)
    ):
        raise _misfit("scales", name, f"{num_scales} of them", saved.scales)
    saved.scales = tuple(scales)
    if not is_soft and saved.hidden is not None and (num := count_outside(saved.hidden, ~saved.mask)):
        raise _misfit("hidden", name, "zeros inside the mask", f"{num} others")
    if saved.young is not None and bool((saved.young & ~saved.mask).any()):
        raise _misfit("young", name, "a part of the mask", "more")
    if saved.reach is not None and bool((saved.mask & ~saved.reach).any()):
        raise _misfit("reach", name, "all that the mask has, and more", "less")


def _check_tensor(what: str, tensor: Any, name: str, shape: torch.Size, *, is_bool: bool) -> None:
    fits = is_mask(tensor) if is_bool else isinstance(tensor, Tensor) and tensor.is_floating_point()
    if not fits or tensor.shape != shape or tensor.layout != torch.strided or tensor.is_meta:
        kind = "bool" if is_bool else "floating"
        raise _misfit(what, name, f"a {kind} tensor of shape {tuple(shape)}", _described(tensor))
    if not is_bool and not bool(tensor.isfinite().all()):
        raise _misfit(what, name, "finite numbers", f"{int((~tensor.isfinite()).sum())} that are NaN or infinite")


def _check_view(saved: SavedWeight, view: MatrixView, plan: Plan) -> None:
    """Checks that the mask of one matrix view consists of whole units, as many as it is to have."""
    grain, method = plan.method.granularity, plan.method
    for what, tensor in (("mask", saved.mask), ("reach", saved.reach)):
        if tensor is not None and not _is_of_units(view.of(tensor), grain):
            raise _misfit(what, view.name, f"whole units of {grain}", "units that are partly active")
    num_G = _active_units(saved, view, grain)
    num_groups, num_all = len(num_G), folded_shape(grain, view.of(saved.mask).shape)[1]
    shares = view.name not in plan.own
    if method.allocate is not None and shares:  # where budgets are shared out, only all together have a number
        if isinstance(method.allocate, NeuronAblation) and len(num_G[num_G > 0].unique()) > 1:
            given = f"from {int(num_G[num_G > 0].min())} to {int(num_G.max())}"
            raise _misfit("mask", view.name, "one number of inputs for all neurons that have any", given)
        return
    if plan.densities_from == "look" and shares and saved.updated_at == 0 and num_groups > 1:
        return  # a look at the model may share out its first masks as it likes
    num_target = plan.num_target(view.name, num_all, saved.updated_at)
    if bool((num_G != num_target).any()):
        allowed = f"{num_target * num_groups} active units, as its sparsity asks for at step {saved.updated_at}"
        allowed += f", {num_target} in each of its {num_groups} groups" if num_groups > 1 else ""
        raise _misfit("mask", view.name, allowed, int(num_G.sum()), _of_joint_parts(saved.weight) + _FROM_MASKS)


def _is_of_units(mask: Tensor, grain: Granularity) -> bool:
    return torch.equal(unit_mask(grain.fold(mask)[..., 0], grain, mask.shape), mask)


def _active_units(saved: SavedWeight, view: MatrixView, grain: Granularity) -> Tensor:
    return grain.fold(view.of(saved.mask))[..., 0].sum(dim=1)


def _check_shared_total(all_saved: Sequence[SavedWeight], plan: Plan) -> None:
    """Checks that weights that share a budget have together what they were planned to have.

    What does not divide into groups may lie idle. Where weights wait for a gradient with more than their plan, the
    others cannot have less than a unit per group, nor more than all: only then is the total another.
    """
    num_active = num_planned = num_idle = 0
    may_exceed = may_lack = False
    for saved in all_saved:
        for view in saved.weight.views:
            if view.name in plan.own:
                continue
            grain = plan.method.granularity
            num_groups, num_all = folded_shape(grain, view.of(saved.mask).shape)[:2]
            num_here = int(_active_units(saved, view, grain).sum())
            num_active += num_here
            num_planned += num_groups * plan.num_target(view.name, num_all, saved.updated_at)
            num_idle += num_groups - 1
            may_exceed = may_exceed or num_here <= num_groups
            may_lack = may_lack or num_here == num_groups * num_all
    num_more = num_active - num_planned
    if (num_more > num_idle and not may_exceed) or (-num_more > num_idle and not may_lack):
        allowed = f"{num_planned} active units in all weights that share them"
        raise _misfit("masks", _WHOLE, allowed + (f", or {num_idle} less" if num_idle else ""), num_active, _FROM_MASKS)


def _described(value: object) -> object:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _of_joint_parts(weight: Weight) -> str:
    """Says how to load what was saved while the parts of a weight were one matrix, as by builds that knew no parts."""
    is_split = weight.can_split and len(weight.views) > 1
    return f' If its parts were one matrix then, with split={{"{weight.name}": 1}}.' if is_split else ""


def _misfit(what: str, where: str, allowed: str, given: object, more: str = "") -> StateError:
    remedy = "Build the same model, call sparsify() with the settings it was saved under, and load weights after that."
    return StateError.of(what, where, allowed=allowed, given=given, remedy=remedy + more)
