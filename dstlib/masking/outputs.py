"""Outputs of a model without a weight: each takes one unit back, or in, and the number of active units stays.

A class whose last weight is dropped would be a constant. Where units lie in groups, as with constant fan-in or N:M,
each output has some by itself.

Shapes: O out, I in, K kernel taps; G groups, U units per group.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dstlib.masking.budget import Account, Allocation, Budget
from dstlib.masking.counts import apportion
from dstlib.masking.granularity import Granularity, folded_shape
from dstlib.masking.update import MaskUpdate, unit_mask


def outputs_of_units(granularity: Granularity, shape: torch.Size) -> Tensor | None:
    """Returns the first output of each of U units, of one group, where those with the same first have all the same.

    None where a unit has outputs that it shares with other units only in part, or units lie in groups.

    >>> from dstlib.masking import Block, Element, FanIn
    >>> outputs_of_units(Element(), torch.Size((2, 3))), outputs_of_units(Block(2, 1), torch.Size((4, 2)))
    (tensor([0, 0, 0, 1, 1, 1]), tensor([0, 0, 2, 2]))
    >>> outputs_of_units(FanIn(), torch.Size((2, 3)))
    """
    output_OIK = torch.arange(shape[0]).view(-1, *(1,) * (len(shape) - 1)).expand(shape)
    output_GUE = granularity.fold(output_OIK)
    if len(output_GUE) > 1:
        return None
    first_GUE = output_GUE[..., :1].expand(output_GUE.shape)
    first_OX = granularity.unfold(first_GUE.contiguous(), shape).flatten(1)
    return first_GUE[0, :, 0] if bool((first_OX == first_OX[:, :1]).all()) else None


def num_outputs(granularity: Granularity, shape: torch.Size) -> int:
    """Counts the units that are needed for each output to have a weight; 0 where they have some by themselves.

    >>> from dstlib.masking import Block, FanIn
    >>> num_outputs(Block(2, 1), torch.Size((4, 2))), num_outputs(FanIn(), torch.Size((4, 2)))
    (2, 0)
    """
    num_groups, _, num_elements = folded_shape(granularity, shape)
    if num_groups > 1 or num_elements == 1:  # most often the shape tells
        return shape[0] if num_groups == 1 else 0
    output_U = outputs_of_units(granularity, shape)
    return 0 if output_U is None else len(output_U.unique())


def fill_outputs(
    change: MaskUpdate, drop_GU: Tensor, grow_GU: Tensor, *, granularity: Granularity, may_grow: bool = True
) -> MaskUpdate:
    """Returns an update that leaves no output without a weight, as far as there are units to go round.

    An output that would lose all its weights keeps the best of its units by the drop score; one that had none takes in
    its best by the growth score. For each, one unit leaves: the weakest of what was grown, then of what was kept, among
    outputs that have others. Where there are fewer active units than outputs, the strongest units enter. Unless units
    ``may_grow``, as in a frozen weight, an output that had none stays so.

    >>> from dstlib.masking import Element, update_mask
    >>> w = torch.tensor([[4.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    >>> update = update_mask(w != 0, w, 0 * w, granularity=Element(), num_target=2, drop_fraction=0.0)
    >>> update.mask, fill_outputs(update, w.view(1, -1), 0 * w.view(1, -1), granularity=Element()).mask
    (tensor([[ True,  True, False],
            [False, False, False]]), tensor([[ True, False, False],
            [ True, False, False]]))
    """
    shape = change.mask.shape
    if bool(change.mask.flatten(1).any(dim=1).all()):
        return change
    output_U = outputs_of_units(granularity, shape)
    if output_U is None:
        return change
    output_U = output_U.to(change.mask.device)
    old = (change.mask & ~change.grown) | change.dropped
    old_U, new_U = (granularity.fold(mask)[0, :, 0] for mask in (old, change.mask))
    num_O = torch.zeros(shape[0], dtype=torch.long, device=new_U.device).index_add_(0, output_U, new_U.long())
    candidates_U = torch.ones_like(old_U) if may_grow else old_U
    is_empty_O = torch.zeros_like(num_O, dtype=torch.bool).index_fill_(0, output_U[candidates_U], True) & (num_O == 0)
    num = min(int(is_empty_O.sum()), int((num_O - 1).clamp(min=0).sum()))
    if num == 0:
        return change
    enters_U = _best_of_outputs(
        _places(old_U, drop_GU[0], grow_GU[0]), output_U, is_empty_O[output_U] & candidates_U, num
    )
    place_U = _places(old_U & new_U, drop_GU[0], grow_GU[0])
    spare_U = new_U & ~_best_of_outputs(place_U, output_U, new_U, len(num_O))
    leaves_U = torch.zeros_like(new_U)
    leaves_U[place_U.masked_fill(~spare_U, -1).argsort(descending=True)[:num]] = True
    new = unit_mask(((new_U | enters_U) & ~leaves_U)[None], granularity, shape)
    return replace(change, mask=new, dropped=old & ~new, grown=new & ~old)


def leave_for_outputs(allocation: Allocation, accounts: Sequence[Account]) -> Allocation:
    """Gives output layers as many units as they have outputs, which the others give up in proportion to what they have.

    >>> active = torch.ones(1, 8, dtype=torch.bool)
    >>> accounts = [
    ...     Account(name=name, active_GU=active, drop_GU=active, grow_GU=active, num_planned=4, num_outputs=num)
    ...     for name, num in (("body", 0), ("head", 3))
    ... ]
    >>> given = Allocation(tuple(Budget(torch.tensor([n]), torch.tensor([n])) for n in (7, 1)))
    >>> [int(budget.num_target_G) for budget in leave_for_outputs(given, accounts).budgets]
    [5, 3]
    """
    if len(accounts) != len(allocation.budgets):
        return allocation  # for the caller to refuse
    pairs = [(a, b) for a, b in zip(accounts, allocation.budgets, strict=True) if len(a.active_GU) == 1]
    have = {a.name: int(b.num_target_G) for a, b in pairs}
    short = {a.name: max(a.num_outputs - have[a.name], 0) for a, _ in pairs}
    spare = {a.name: max(have[a.name] - max(a.num_outputs, 1), 0) for a, _ in pairs}
    num = min(sum(short.values()), sum(spare.values()))
    if num == 0:
        return allocation
    taken, given = apportion(num, have, spare), apportion(num, short, short)
    budgets = []
    for a, b in zip(accounts, allocation.budgets, strict=True):
        num_more = given.get(a.name, 0)
        num_target_G = b.num_target_G + (num_more - taken.get(a.name, 0))
        num_kept_G = torch.minimum(b.num_kept_G + num_more, a.active_GU.sum(dim=1))
        budgets.append(Budget(torch.minimum(num_kept_G, num_target_G), num_target_G))
    return replace(allocation, budgets=tuple(budgets))


def _places(first_U: Tensor, drop_U: Tensor, grow_U: Tensor) -> Tensor:
    """Numbers units from the strongest on: some by the drop score, then the others by the growth score."""
    order_U = torch.where(first_U, drop_U, grow_U).argsort(descending=True, stable=True)
    order_U = order_U[(~first_U[order_U]).long().argsort(stable=True)]
    return torch.empty_like(order_U).scatter_(0, order_U, torch.arange(len(order_U), device=order_U.device))


def _best_of_outputs(place_U: Tensor, output_U: Tensor, among_U: Tensor, num: int) -> Tensor:
    """Marks the strongest candidate of each output, of the ``num`` outputs that have the strongest."""
    last = len(place_U)
    best_O = torch.full((int(output_U.max()) + 1,), last, device=place_U.device)
    best_O.scatter_reduce_(0, output_U[among_U], place_U[among_U], "amin")
    highest = best_O.sort().values[:num].clamp(max=last - 1).amax()
    return among_U & (place_U == best_O[output_U]) & (place_U <= highest)
