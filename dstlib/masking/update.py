"""Drop then grow: from an old mask and two scores to a new mask with an exact number of active units.

This is the whole of dynamic sparse training; methods differ only in the data they pass.

Shapes: O out, I in, K kernel taps; G groups, U units per group, E elements per unit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.errors import ScoreError, SettingError, explain
from dstlib.masking.counts import NUDGE
from dstlib.masking.granularity import Granularity
from dstlib.masking.selection import select_top


@dataclass(frozen=True)
class MaskUpdate:
    """What an update changed; boolean tensors of the weight's shape (O, I, *K).

    ``mask`` is the new mask; ``dropped`` was active and no longer is; ``grown`` was not and now is.
    """

    mask: Tensor
    dropped: Tensor
    grown: Tensor

    def __repr__(self) -> str:
        active, dropped, grown = (int(x.sum()) for x in (self.mask, self.dropped, self.grown))
        return f"MaskUpdate({active} of {self.mask.numel()} active, {dropped} dropped, {grown} grown)"


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
    ties go to the lower index.

    Errors: ScoreError for scores of another shape or not finite; SettingError for a fraction outside [0, 1].

    >>> from dstlib.masking import Element
    >>> w = torch.tensor([[4.0, -1.0, 0.0, 0.0]]); g = torch.tensor([[0.0, 0.1, 3.0, 2.0]])
    >>> update = update_mask(w != 0, w.abs(), g, granularity=Element(), num_target=2, drop_fraction=0.5)
    >>> update.mask, update.dropped
    (tensor([[ True, False,  True, False]]), tensor([[False,  True, False, False]]))
    """
    if not 0 <= drop_fraction <= 1:
        raise SettingError(
            explain(
                "drop fraction",
                "a mask update",
                allowed="a number in [0, 1]",
                given=drop_fraction,
                remedy="Look at the method's drop_fraction curve.",
            )
        )
    active_GU = granularity.fold(mask)[..., 0]
    num_active_G = active_GU.sum(dim=1)
    num_target_G = torch.as_tensor(num_target, device=mask.device).expand_as(num_active_G)
    num_dropped_G = (num_active_G.double() * (drop_fraction * NUDGE)).floor().long()
    num_kept_G = torch.minimum(num_active_G - num_dropped_G, num_target_G)

    kept_GU = select_top(_unit_score(drop_score, mask, granularity), num_kept_G, among_GU=active_GU)
    grow_score_GU = _unit_score(grow_score, mask, granularity)
    grown_GU = select_top(grow_score_GU, num_target_G - num_kept_G, among_GU=~kept_GU)
    new = unit_mask(kept_GU | grown_GU, granularity, mask.shape)
    return MaskUpdate(mask=new, dropped=mask & ~new, grown=new & ~mask)


def unit_mask(active_GU: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """Spreads a decision per unit over the unit's elements: (G, U) → (O, I, *K).

    >>> from dstlib.masking import Channel
    >>> unit_mask(torch.tensor([[True, False]]), Channel(), torch.Size((2, 3)))
    tensor([[ True,  True,  True],
            [False, False, False]])
    """
    num_elements = shape.numel() // active_GU.numel()
    return granularity.unfold(active_GU[..., None].repeat(1, 1, num_elements), shape)


def _unit_score(score: Tensor, mask: Tensor, granularity: Granularity) -> Tensor:
    """(O, I, *K) → (G, U): the mean over each unit, in single precision at least."""
    if not isinstance(score, Tensor) or score.shape != mask.shape:
        raise ScoreError(
            explain(
                "scores",
                "a mask update",
                allowed=f"a tensor of shape {tuple(mask.shape)}",
                given=f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__,
                remedy="A criterion returns one score per weight; the granularity does the averaging.",
            )
        )
    if score.dtype not in (torch.float32, torch.float64):
        score = score.float()
    score_GUE = granularity.fold(score)
    unit_score = score_GUE[..., 0] if score_GUE.shape[-1] == 1 else score_GUE.mean(dim=-1)
    if not bool(unit_score.isfinite().all()):
        raise ScoreError(
            explain(
                "scores",
                "a mask update",
                allowed="finite numbers",
                given=f"{int((~unit_score.isfinite()).sum())} that are NaN or infinite",
                remedy="Look at the criterion, and at whether the loss has diverged.",
            )
        )
    return unit_score
