"""Mask updates, drop then grow: from an old mask and two scores to a new mask with an exact number of active units.

This is the whole of dynamic sparse training; methods differ only in the data they pass.

Shapes: O out, I in, K kernel taps; G groups, U units per group, E elements per unit.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.errors import ScoreError
from dstlib.masking.budget import Budget, spend
from dstlib.masking.granularity import Granularity
from dstlib.masking.selection import count, select_top

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class MaskUpdate:
    """What an update changed; boolean tensors of the weight's shape (O, I, *K).

    ``mask`` is the new mask; ``dropped`` was active and no longer is; ``grown`` was not and now is. ``idle_G``, (G,),
    marks the groups in which units were to be exchanged and none was, as all growth scores were equal.
    """

    mask: Tensor
    dropped: Tensor
    grown: Tensor
    idle_G: Tensor

    @property
    def num_idle(self) -> int:
        """The groups that stood still for want of a reason to grow."""
        return int(self.idle_G.sum())

    def __repr__(self) -> str:
        active, dropped, grown = (int(x.sum()) for x in (self.mask, self.dropped, self.grown))
        num_idle = self.num_idle
        idle = f", {num_idle} group{'s' * (num_idle > 1)} without a reason to grow" if num_idle else ""
        return f"MaskUpdate({active} of {self.mask.numel()} active, {dropped} dropped, {grown} grown{idle})"


def update_mask(
    mask: Tensor,
    drop_score: Tensor,
    grow_score: Tensor,
    *,
    granularity: Granularity,
    num_target: int | Tensor,
    drop_fraction: float,
) -> MaskUpdate:
    """Drops the lowest of the active units and grows the highest of all that were not kept.

    Of A active units per group, min(A - floor(f·A), target) are kept and the rest up to ``num_target`` (an
    integer, or one per group) is grown. A unit that was dropped may grow back at once, and then counts as
    neither dropped nor grown. Scores have the mask's shape; a unit's score is the mean over its elements;
    ties go to the lower index, but none of those that tie for the lowest growth score comes for an active unit.

    Raises:
        ScoreError: Scores have another shape, or are not finite.
        SettingError: The fraction lies outside [0, 1].

    >>> from dstlib.masking import Element
    >>> w = torch.tensor([[4.0, -1.0, 0.0, 0.0]]); g = torch.tensor([[0.0, 0.1, 3.0, 2.0]])
    >>> update = update_mask(w != 0, w.abs(), g, granularity=Element(), num_target=2, drop_fraction=0.5)
    >>> update.mask, update.dropped
    (tensor([[ True, False,  True, False]]), tensor([[False,  True, False, False]]))
    """
    num_active_G = granularity.fold(mask)[..., 0].sum(dim=1)
    budget = spend(num_active_G, num_target=num_target, drop_fraction=drop_fraction)
    drop_GU, grow_GU = (unit_score(score, mask.shape, granularity) for score in (drop_score, grow_score))
    return exchange(mask, drop_GU, grow_GU, granularity=granularity, budget=budget)


def keep(active_GU: Tensor, drop_GU: Tensor, budget: Budget) -> Tensor:
    """Marks what an update keeps, the best active units of each group as many as the budget says, (G, U).

    >>> budget = Budget(torch.tensor([1]), torch.tensor([2]))
    >>> keep(torch.tensor([[True, True, False]]), torch.tensor([[1.0, 3.0, 5.0]]), budget)
    tensor([[False,  True, False]])
    """
    return select_top(drop_GU, budget.num_kept_G, among_GU=active_GU)


def exchange(
    mask: Tensor,
    drop_GU: Tensor,
    grow_GU: Tensor,
    *,
    granularity: Granularity,
    budget: Budget,
    regrow: bool = True,
    kept_GU: Tensor | None = None,
) -> MaskUpdate:
    """Keeps the best active units by one score and grows others by another, as many as the budget says.

    A unit has a reason to grow if it scores above the lowest of all that were not kept, or is the lowest by itself.
    Those grow, the best first. Where they are too few, as in a weight without a gradient, the best of what was
    dropped stays instead, by the drop score. Only a target that is then still not met is filled up by units
    without a reason, the lower index first.

    Without ``regrow``, units that are dropped now come after all others that have a reason. ``kept_GU`` is what
    :func:`keep` has found, where it was asked before: growth may be scored by what is left.

    >>> from dstlib.masking import Element
    >>> mask, score = torch.tensor([[True, True, False, False]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> budget = Budget(torch.tensor([1]), torch.tensor([2]))
    >>> exchange(mask, score, score, granularity=Element(), budget=budget).mask
    tensor([[ True,  True, False, False]])
    >>> exchange(mask, score, score, granularity=Element(), budget=budget, regrow=False).mask
    tensor([[ True, False,  True, False]])
    >>> exchange(mask, score, 0 * score, granularity=Element(), budget=budget)
    MaskUpdate(2 of 4 active, 0 dropped, 0 grown, 1 group without a reason to grow)
    """
    active_GU = granularity.fold(mask)[..., 0]
    num_active_G, num_units = count(active_GU), active_GU.shape[1]
    new_GU = keep(active_GU, drop_GU, budget) if kept_GU is None else kept_GU
    num_left_G = budget.num_target_G - budget.num_kept_G
    if regrow and len(new_GU) == 1 and (all_GU := _grow_with_reason(new_GU, grow_GU, num_left_G)) is not None:
        new = unit_mask(all_GU, granularity, mask.shape)
        return MaskUpdate(new, mask & ~new, new & ~mask, torch.zeros_like(num_left_G, dtype=torch.bool))
    worth_GU = _worth_growing(grow_GU, ~new_GU)
    is_asked_G = (budget.num_kept_G < num_active_G) & (num_left_G > 0) & (budget.num_target_G < num_units)
    new_GU = take_units(
        new_GU,
        active_GU=active_GU,
        drop_GU=drop_GU,
        grow_GU=grow_GU,
        worth_GU=worth_GU,
        num_left_G=num_left_G,
        regrow=regrow,
    )
    new = unit_mask(new_GU, granularity, mask.shape)
    return MaskUpdate(mask=new, dropped=mask & ~new, grown=new & ~mask, idle_G=is_asked_G & ~worth_GU.any(dim=1))


def take_units(
    kept_GU: Tensor,
    *,
    active_GU: Tensor,
    drop_GU: Tensor,
    grow_GU: Tensor,
    worth_GU: Tensor,
    num_left_G: Tensor,
    regrow: bool = True,
) -> Tensor:
    """Returns what is active, (G, U), once ``num_left_G`` units have come to those that are kept.

    Those come that are ``worth`` growing; where they are too few, what was dropped stays, and then any others; see
    :func:`exchange`.
    """
    ranks = (
        (grow_GU, worth_GU if regrow else worth_GU & ~active_GU),
        (grow_GU, worth_GU),
        (drop_GU, active_GU),
        (grow_GU, torch.ones_like(active_GU)),
    )
    new_GU = kept_GU
    for score_GU, candidates_GU in ranks:
        among_GU = candidates_GU & ~new_GU
        num_G = torch.minimum(num_left_G, count(among_GU))
        if bool(num_G.any()):
            new_GU = new_GU | select_top(score_GU, num_G, among_GU=among_GU)
            num_left_G = num_left_G - num_G
        if not bool(num_left_G.any()):
            return new_GU
    raise AssertionError("more units asked for than there are")


def _grow_with_reason(kept_GU: Tensor, grow_GU: Tensor, num_left_G: Tensor) -> Tensor | None:
    """Adds to the kept units of one group the best of the others, if even the last of them scores above some that stay.

    Then all have a reason to grow, and none of the other ranks is asked; else returns None.
    """
    if not bool(num_left_G):
        return kept_GU
    free_GU = ~kept_GU
    grown_GU = select_top(grow_GU, num_left_G, among_GU=free_GU)
    least = grow_GU[grown_GU].amin()
    for stride in (64, 1):  # most often some of a few are below it
        if bool((free_GU[:, ::stride] & (grow_GU[:, ::stride] < least)).any()):
            return kept_GU | grown_GU
    return None


def _worth_growing(grow_GU: Tensor, among_GU: Tensor) -> Tensor:
    """Marks the candidates that have a reason to grow: all but those that tie for the lowest score."""
    lowest_G1 = torch.where(among_GU, grow_GU, torch.inf).amin(dim=1, keepdim=True)
    above_GU = among_GU & (grow_GU > lowest_G1)
    is_alone_G1 = (count(among_GU) - count(above_GU) == 1)[:, None]
    return above_GU | (among_GU & is_alone_G1)


def unit_mask(active_GU: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """Spreads a decision per unit over the unit's elements, (G, U) → (O, I, *K).

    >>> from dstlib.masking import Channel
    >>> unit_mask(torch.tensor([[True, False]]), Channel(), torch.Size((2, 3)))
    tensor([[ True,  True,  True],
            [False, False, False]])
    """
    num_elements = shape.numel() // active_GU.numel()
    return granularity.unfold(active_GU[..., None].repeat(1, 1, num_elements), shape)


def unit_score(score: Tensor, shape: torch.Size, granularity: Granularity) -> Tensor:
    """Averages scores over each unit, (O, I, *K) → (G, U), in single precision at least.

    Raises:
        ScoreError: Scores have another shape than ``shape``, or are not finite.
    """
    if not isinstance(score, Tensor) or score.shape != shape:
        raise ScoreError.of(
            "scores",
            "a mask update",
            allowed=f"a tensor of shape {tuple(shape)}",
            given=f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__,
            remedy="A criterion returns one score per weight; the granularity does the averaging.",
        )
    if score.dtype not in (torch.float32, torch.float64):
        score = score.float()
    score_GUE = granularity.fold(score)
    score_GU = score_GUE[..., 0] if score_GUE.shape[-1] == 1 else score_GUE.mean(dim=-1)
    low, high = score_GU.aminmax()  # NaN where any is
    if not bool(low.isfinite() & high.isfinite()):
        raise ScoreError.of(
            "scores",
            "a mask update",
            allowed="finite numbers",
            given=f"{int((~score_GU.isfinite()).sum())} that are NaN or infinite",
            remedy="Look at the criterion, and at whether the loss has diverged.",
        )
    return score_GU


def zero_outside_(x: Tensor, mask: Tensor) -> Tensor:
    """Sets ``x`` to +0.0 where ``mask`` is False, in place; the rest keeps its bits.

    Multiplies the *bit patterns* by 0 or 1, as integers: inf and NaN outside become 0 too (as floats, inf·0
    is NaN), and on a CPU it takes a quarter of the time of ``masked_fill_(~mask, 0)`` and no extra memory.

    >>> zero_outside_(torch.tensor([1.5, -2.0, float("inf")]), torch.tensor([True, False, False]))
    tensor([1.5000, 0.0000, 0.0000])
    """
    zero_outside_each_([(x, mask)])
    return x


def bit_patterns(x: Tensor) -> Tensor:
    """Returns the bit patterns of a tensor as integers of its width, in its memory."""
    return x.view(_BITS[x.element_size()])


def zero_outside_each_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Does as ``zero_outside_`` for many tensors, each with its mask, in one call; tensors may be integers."""
    bits: list[Tensor] = []
    factors: list[Tensor] = []
    with torch.no_grad():
        for x, mask in pairs:
            bits.append(bit_patterns(x) if x.is_floating_point() else x)
            there = mask if mask.device == x.device else mask.to(x.device)
            factors.append(there.view(torch.int8))
        if bits:
            torch._foreach_mul_(bits, factors)


def count_outside(x: Tensor, mask: Tensor) -> int:
    """Counts the entries of ``x`` that are not zero where ``mask`` is False; NaN and inf are not, -0.0 is.

    One temporary of a byte per entry; on a CPU it takes about as long as one reading of ``x``.

    >>> count_outside(torch.tensor([1.5, -2.0, float("nan"), 0.0]), torch.tensor([True, False, False, False]))
    2
    """
    return int((x.detach() != 0).gt_(mask.to(x.device)).count_nonzero())


def is_mask(x: object) -> bool:
    """Whether something is a dense tensor of truth values, whose bytes are 0 and 1.

    Damaged files and foreign memory may hold others: torch takes them for True, and counts and multiplies otherwise.
    What shows few bytes many times, as ``expand`` does, is read once: it may claim more values than fit into memory.

    >>> is_mask(torch.tensor([True])), is_mask(torch.tensor([2], dtype=torch.uint8).view(torch.bool)), is_mask([True])
    (True, False, False)
    >>> is_mask(torch.tensor([True]).expand(2**20, 2**20)), is_mask(torch.ones(0, 2, dtype=torch.bool))
    (True, True)
    """
    if not isinstance(x, Tensor) or x.dtype != torch.bool or x.layout != torch.strided or x.is_meta:
        return False
    span = 1 + sum(step * max(0, extent - 1) for step, extent in zip(x.stride(), x.shape, strict=True))
    seen = x.as_strided((span,), (1,)) if x.numel() > span else x
    return not bool((seen.view(torch.uint8) > 1).any())
