"""Weights that are not zero outside their masks: they came from elsewhere, without the masks that belong to them."""

from collections.abc import Mapping

from torch import Tensor, nn

from dstlib.errors import SelectionError, StateError, few, similar
from dstlib.masking.update import count_outside, is_mask
from dstlib.targets.wrappers import plain_name, unwrap

BELONGING = (
    "The state that was saved with these weights belongs to them: sparsifier.load_state_dict(state). Without it, "
    'detach() and sparsify(model, masks="from-zeros") go on from their own zeros. From an average over moving masks, '
    "and from nothing else, sparsifier.mask_model(average) takes what it gathered outside the present ones."
)


def find_masked(model: nn.Module, masks: Mapping[str, Tensor], where: str) -> dict[str, nn.Parameter]:
    """Returns the parameters that masks belong to, by the names of the masks; any name of a tied one will do.

    Raises:
        SelectionError: A mask belongs to no parameter, is not of its shape, or no tensor of truth values.
    """
    named = {plain_name(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}
    for name, mask in masks.items():
        if name not in named:
            allowed = "the name of a parameter"
            remedy = f"Pass the model that the masks were made for. Similar: {similar(name, named)}."
            raise SelectionError.of("mask", where, allowed=allowed, given=repr(name), remedy=remedy)
        if mask.shape != named[name].shape:
            allowed, remedy = f"shape {tuple(named[name].shape)}", "A mask has the shape of its parameter."
            raise SelectionError.of(f"mask {name}", where, allowed=allowed, given=tuple(mask.shape), remedy=remedy)
        if not is_mask(mask):
            allowed, remedy = "a dense tensor of truth values, of bytes 0 and 1", "Pass mask != 0 for one of numbers."
            raise SelectionError.of(f"mask {name}", where, allowed=allowed, given=f"{mask.dtype}", remedy=remedy)
    return {name: named[name] for name in masks}


def find_outside(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Counts what is not zero outside the mask of each weight, by the names of those that have any.

    Of weights on the meta device, which have no values, nothing is.
    """
    counts = {name: count_outside(x, masks[name]) for name, x in weights.items() if not x.is_meta}
    return {name: count for name, count in counts.items() if count}


def refuse_outside(found: Mapping[str, int], where: str, otherwise: str) -> None:
    """Refuses weights that are not zero outside their masks, and says which state belongs to them.

    ``otherwise`` is how to go on without it.

    Raises:
        StateError: There are any.

    >>> refuse_outside({"0.weight": 1200, "2.weight": 34}, "save()", "Without masks, all of them are saved.")
    Traceback (most recent call last):
    dstlib.errors.StateError: weights of save(): expected zeros outside their masks, got 1,234 that are not zero, in \
0.weight, 2.weight. The state that was saved with these weights belongs to them: sparsifier.load_state_dict(state). \
Without it, detach() and sparsify(model, masks="from-zeros") go on from their own zeros. From an average over moving \
masks, and from nothing else, sparsifier.mask_model(average) takes what it gathered outside the present ones. Without \
masks, all of them are saved.
    """
    if found:
        remedy = f"{BELONGING} {otherwise}"
        raise StateError.of(
            "weights", where, allowed="zeros outside their masks", given=describe_outside(found), remedy=remedy
        )


def describe_outside(found: Mapping[str, int]) -> str:
    """Says how much is not zero outside the masks, and where."""
    return f"{sum(found.values()):,} that are not zero, in {few(list(found), most=5)}"
