"""The laws of a saved training: what a checkpoint may hold beside masks, which have laws of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.errors import StateError, shown
from dstlib.torch_files import check_weights, is_same
from dstlib.zoo.e2enet.training.settings import TrainSettings

PARTS = ("model", "optimizer", "scaler", "sparsifier", "iteration", "loss_sum", "metrics", "updates")
WHERE = "the saved training"
RESUME = "Resume with the configuration that the run was started with, from the checkpoint that it wrote."

_ROW = {"epoch", "iteration", "learning_rate", "loss"}
_UPDATE = {"iteration", "active", "grown"}
# what each optimizer keeps for a parameter: what must be there, and whether it is of the parameter's shape
_ADAM = {"step": False, "exp_avg": True, "exp_avg_sq": True}
_KEPT = {"SGD": {"momentum_buffer": True}, "AdamW": _ADAM, "Adam": _ADAM}


def check_saved(
    state: Any, settings: TrainSettings, model: nn.Module, optimizer: Optimizer, search: Optimizer | None = None
) -> None:
    """Checks weights, counters, metrics and what the optimizers keep against the settings of the training.

    ``search`` is the optimizer of an architecture that is searched beside.

    Raises:
        StateError: A part is missing, or nothing that a training by these settings would have saved.
    """
    parts = PARTS if search is None else (*PARTS, "search")
    missing = [name for name in parts if name not in state] if isinstance(state, Mapping) else list(parts)
    if missing:
        raise _misfit("parts", ", ".join(parts), f"no {', '.join(missing)}")
    check_weights(model, state["model"], what="model", where=WHERE, remedy=RESUME)
    iteration, per_epoch = state["iteration"], settings.iterations
    if not _is_count(iteration, settings.num_iterations):
        raise _misfit("iteration", f"a whole number from 0 to {settings.num_iterations}", iteration)
    loss_sum = state["loss_sum"]
    if not _is_number(loss_sum) or (iteration % per_epoch == 0 and loss_sum != 0):
        raise _misfit("loss_sum", "a finite number, and 0 at the end of an epoch", loss_sum)
    _check_metrics(state["metrics"], iteration // per_epoch, settings)
    _check_updates(state["updates"], iteration)
    _check_flows(state.get("flows", []), iteration // per_epoch)
    _check_scaler(state["scaler"])
    _check_optimizer(state["optimizer"], optimizer, iteration)
    if search is not None:
        _check_optimizer(state["search"], search, iteration)


def _check_metrics(rows: Any, num_epochs: int, settings: TrainSettings) -> None:
    if not isinstance(rows, list) or len(rows) != num_epochs:
        given = len(rows) if isinstance(rows, list) else type(rows).__name__
        raise _misfit("metrics", f"a row for each of {num_epochs} epochs", given)
    for epoch, row in enumerate(rows, start=1):
        fits = isinstance(row, Mapping) and _ROW <= row.keys() <= {*_ROW, "val_dice", "memory"}
        fits = fits and (row["epoch"], row["iteration"]) == (epoch, epoch * settings.iterations)
        fits = fits and type(row["epoch"]) is type(row["iteration"]) is int
        fits = fits and all(_is_number(row[name]) for name in ("learning_rate", "loss", "memory") if name in row)
        # another processor may round the power otherwise in the last bit
        fits = fits and math.isclose(row["learning_rate"], settings.learning_rate_at(epoch - 1), rel_tol=1e-9)
        dice = row.get("val_dice", math.nan) if fits else None
        if not fits or type(dice) is not float or not (math.isnan(dice) or 0 <= dice <= 1):
            raise _misfit("metrics", f"the row of epoch {epoch}, with finite numbers", row)


def _check_updates(rows: Any, iteration: int) -> None:
    for row in rows if isinstance(rows, list) else [rows]:
        fits = isinstance(row, Mapping) and row.keys() == _UPDATE and all(_is_count(row[name]) for name in _UPDATE)
        if not fits or not 1 <= row["iteration"] <= iteration or row["grown"] > row["active"]:
            raise _misfit("updates", f"rows of mask updates up to iteration {iteration}", row)


def _check_flows(rows: Any, num_epochs: int) -> None:
    """Checks that each row has the counts of an epoch after that of the row before."""
    names, before = None, -1
    for row in rows if isinstance(rows, list) else [rows]:
        fits = isinstance(row, Mapping) and all(isinstance(name, str) and _is_count(row[name]) for name in row)
        fits = fits and before < row.get("epoch", -1) <= num_epochs and row.keys() == (names or row.keys())
        if not fits:
            raise _misfit("flows", f"rows of counts of one epoch after the other, {num_epochs} at most", row)
        names, before = row.keys(), row["epoch"]


def _check_scaler(state: Any) -> None:
    """Checks what the loss is scaled by; nothing, where it is not."""
    laws: dict[str, Callable[[Any], bool]] = {
        "scale": lambda x: _is_number(x) and x > 0,
        "growth_factor": lambda x: _is_number(x) and x > 1,
        "backoff_factor": lambda x: _is_number(x) and 0 < x < 1,
        "growth_interval": lambda x: _is_count(x) and x > 0,
        "_growth_tracker": _is_count,
    }
    if not isinstance(state, Mapping) or (state and state.keys() != laws.keys()):
        raise _misfit("scaler", f"nothing, or {', '.join(laws)}", state)
    for name, value in state.items():
        if not laws[name](value):
            raise _misfit(f"scaler.{name}", "the number of a scaler that works", value)


def _check_optimizer(state: Any, optimizer: Optimizer, iteration: int) -> None:
    own = optimizer.state_dict()["param_groups"]
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, list) or len(groups) != len(own) or not isinstance(state.get("state"), Mapping):
        raise _misfit("optimizer", f"the state and the {len(own)} group of {type(optimizer).__name__}", state)
    for group, ours in zip(groups, own, strict=True):
        if not isinstance(group, Mapping) or not is_same(ours["params"], group.get("params")):
            raise _misfit("optimizer", f"a group of {len(ours['params'])} parameters", group)
        # releases of torch add settings; what both know is the same, but for what changes with the epoch
        differing = [
            name for name in ours.keys() & group.keys() if name != "lr" and not is_same(ours[name], group[name])
        ]
        if differing or not _is_number(group.get("lr")) or group["lr"] < 0:
            name = differing[0] if differing else "lr"
            raise _misfit(f"optimizer's {name}", f"{ours[name]}, as set", group.get(name))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, kept in state["state"].items():
        if not _is_count(index, len(parameters) - 1):
            raise _misfit("optimizer", f"the state of parameters 0 to {len(parameters) - 1}", index)
        _check_kept(kept, parameters[index], _KEPT[type(optimizer).__name__], iteration)


def _check_kept(kept: Any, parameter: Tensor, expected: Mapping[str, bool], iteration: int) -> None:
    """Checks what the optimizer keeps for one parameter."""
    if not isinstance(kept, Mapping) or kept.keys() != expected.keys():
        raise _misfit("optimizer", f"{', '.join(expected)} for each parameter", kept)
    for name, is_shaped in expected.items():
        value = kept[name]
        if value is None and name == "momentum_buffer":
            continue  # of a parameter that had no gradient yet
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            raise _misfit(f"optimizer's {name}", "a tensor of floating numbers", value)
        shape = parameter.shape if is_shaped else torch.Size()
        # values that share memory, which torch would refuse to change, are like no others when they are copied
        shares = torch.empty_like(value, device="meta").stride() != value.stride()
        if value.shape != shape or shares or not bool(value.isfinite().all()):
            raise _misfit(f"optimizer's {name}", f"finite numbers of shape {tuple(shape)}, each in its place", value)
        most = iteration if name == "step" else math.inf
        if name in ("step", "exp_avg_sq") and not bool(((value >= 0) & (value <= most)).all()):
            raise _misfit(f"optimizer's {name}", f"from 0 to {most}", value)


def _is_count(value: Any, most: float = math.inf) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _misfit(what: str, allowed: str, given: Any) -> StateError:
    if isinstance(given, Tensor):
        given = f"{given.dtype} {tuple(given.shape)}"
    elif isinstance(given, Mapping | Sequence):
        given = shown(given)
    return StateError.of(what, WHERE, allowed=allowed, given=given, remedy=RESUME)
