"""Masks at the door: what the user gives, a file or a word, becomes a mask for each weight that is to be sparse."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.errors import SelectionError, few, similar
from dstlib.pruned import FoundMasks, Tool, find_masks
from dstlib.pruned.tools import TOOLS
from dstlib.sparsifier import saved
from dstlib.sparsifier.given import GivenMasks
from dstlib.targets import EXCLUDED, NOT_INCLUDED, WITHOUT_MASK, Weight, plain_name, unwrap
from dstlib.targets.compact_state import is_compact, masks_of

FROM_ZEROS = "from-zeros"
Masks = str | Path | Mapping[str, Any] | nn.Module

_OWN = Tool("dstlib", saved.is_state, lambda state, _: saved.masks_of(state))
_DDP = "module."
_COMPACT = Tool("compact storage", is_compact, lambda state, model: masks_of(_plainly_named(state), _shapes(model)))


def take(source: Masks, model: nn.Module, weights: Sequence[Weight]) -> tuple[GivenMasks, tuple[Weight, ...]]:
    """Returns the masks of the weights that are to be sparse, and all weights: of these, those without one stay dense.

    Warns of masks with zeros whose weights stay dense for another reason than that the user wants it so.

    Raises:
        StateError: A file is missing, damaged, or of another model.
        SelectionError: What was given holds no masks, or of other names or shapes; or no weight has one.
    """
    model, sparse = unwrap(model), [weight for weight in weights if not weight.reason]
    if source == FROM_ZEROS:
        zeros = {weight.name: weight.parameter.detach() != 0 for weight in sparse}
        found = FoundMasks(zeros, f'masks="{FROM_ZEROS}"', of_zeros=True)
    else:
        state = source.state_dict() if isinstance(source, nn.Module) else source
        found = find_masks(state, model, tools=(_OWN, _COMPACT, *TOOLS))
    masks = _by_parameter(found, model, sparse)
    if found.of_zeros:  # a weight without zeros was not pruned
        masks = {key: mask for key, mask in masks.items() if not bool(mask.all())}
    else:
        _tell_of_dense(masks, found.where, model, weights)
    chosen = {weight.name: masks[id(weight.parameter)] for weight in sparse if id(weight.parameter) in masks}
    if not chosen:
        remedy = "Load the sparse weights into the model first." if found.of_zeros else "Look at include= and exclude=."
        given = "none with zeros" if found.of_zeros else "none of their masks"
        allowed = "a mask for one of them at least"
        raise SelectionError.of("weights to be sparse", found.where, allowed=allowed, given=given, remedy=remedy)
    all_weights = (w if w.reason or w.name in chosen else replace(w, reason=WITHOUT_MASK) for w in weights)
    return GivenMasks(chosen, found.where, found.of_zeros), tuple(all_weights)


def _plainly_named(state: Mapping[str, Any]) -> dict[str, Any]:
    return {plain_name(name): value for name, value in state.items()}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of parameters by their names, also by those that they have in DistributedDataParallel."""
    shapes = {plain_name(name): p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    return shapes | {_DDP + name: shape for name, shape in shapes.items()}


def _by_parameter(found: FoundMasks, model: nn.Module, sparse: Sequence[Weight]) -> dict[int, Tensor]:
    """Returns masks by the identity of their parameters, each where its parameter is.

    Of a file of weights, only the masks of weights that are to be sparse, and all of these.
    """
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    masks = {plain_name(name): mask for name, mask in found.masks.items()}
    if not masks.keys() & named.keys():  # of a model within DistributedDataParallel
        masks = {name.removeprefix(_DDP): mask for name, mask in masks.items()}
    wanted = {id(weight.parameter) for weight in sparse}
    if found.of_zeros:
        masks = {name: mask for name, mask in masks.items() if name in named and id(named[name]) in wanted}
        known = {id(named[name]) for name in masks}
        if missing := [weight.name for weight in sparse if id(weight.parameter) not in known]:
            allowed, remedy = "all weights that are to be sparse", "Pass the file of this model, or leave them out."
            raise SelectionError.of("names", found.where, allowed=allowed, given=f"no {few(missing)}", remedy=remedy)
    by_parameter: dict[int, Tensor] = {}
    for name, mask in masks.items():
        if name not in named:
            raise _unknown(name, named, found.where)
        parameter = named[name]
        if mask.shape != parameter.shape:
            allowed, remedy = f"shape {tuple(parameter.shape)}", "A mask has the shape of its parameter."
            raise SelectionError.of(
                f"mask {name}", found.where, allowed=allowed, given=tuple(mask.shape), remedy=remedy
            )
        here = mask.to(parameter.device)
        if not torch.equal(by_parameter.setdefault(id(parameter), here), here):
            twins = few([n for n in masks if named.get(n) is parameter])
            allowed, remedy = f"one mask, as {twins} are one parameter", "Pass one of them."
            raise SelectionError.of(f"mask {name}", found.where, allowed=allowed, given="another", remedy=remedy)
    return by_parameter


def _unknown(name: str, named: Mapping[str, nn.Parameter], where: str) -> SelectionError:
    allowed, remedy = "the name of a parameter", f"Pass masks of this model. Similar: {similar(name, named)}."
    if f"{name}_orig" in named:  # torch.nn.utils.prune is at work in this very model
        allowed = f"one that is not computed anew at each forward, from {name}_orig"
        remedy = (
            "Take the masks first, masks = model.state_dict(); then make the layers plain again, with their zeros, by "
            'torch.nn.utils.prune.remove(layer, "weight"); then pass masks=masks.'
        )
    return SelectionError.of("mask", where, allowed=allowed, given=repr(name), remedy=remedy)


def _tell_of_dense(masks: Mapping[int, Tensor], where: str, model: nn.Module, weights: Sequence[Weight]) -> None:
    """Warns of zeros in masks that will train."""
    reasons = {id(weight.parameter): weight.reason for weight in weights}
    names = {id(p): plain_name(name) for name, p in model.named_parameters()}
    dense = {
        names[key]: reasons.get(key, "it has one axis")
        for key, mask in masks.items()
        if reasons.get(key, " ") not in ("", EXCLUDED, NOT_INCLUDED) and not bool(mask.all())
    }
    if dense:
        told = few([f"{name} ({reason})" for name, reason in dense.items()], most=3)
        warnings.warn(
            f"sparsify(): {where} have zeros in {told}, which stay dense, so these zeros will train. Weights that can "
            "be sparse if asked for by name, include= takes in.",
            stacklevel=4,
        )
