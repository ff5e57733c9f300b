"""Weights that something else wrote, with non-zeros outside their masks: a checkpoint, an average, another optimizer.

Where they are sparse themselves, and their non-zeros fit the plan, the masks move to where these are, and nothing
is lost; all else is for the user to hear of.

Shapes: G groups, U units per group.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dstlib.errors import few
from dstlib.masking import Granularity, select_top, unit_mask, unit_score
from dstlib.sparsifier.state import MaskedWeight

_STATE = "the state that was saved with these weights, sparsifier.load_state_dict(state)"
_GO_ON = 'masks="from-zeros" to sparsify(), without sparsity='


def take_places(
    m: MaskedWeight, granularity: Granularity, *, places: Tensor | None = None, may_cut: bool = False
) -> bool:
    """Moves a mask to where the weight's non-zeros are, if it has room for all of them; returns whether it has.

    ``places`` may say instead what it is to have. Each group keeps its number of active units. What room is left stays
    with units that were active before. If a mask without the room ``may_cut``, it moves to the largest units; else it
    stays as it is.
    """
    wanted = m.parameter.detach() != 0 if places is None else places
    old = m.mask
    views = [(view.of(m.parameter.detach()), view.of(old)) for view in m.weight.views]
    units = [
        (granularity.fold(view.of(wanted)).any(dim=-1), granularity.fold(view.of(old))[..., 0])
        for view in m.weight.views
    ]
    fits = all(bool((occupied_GU.sum(dim=1) <= active_GU.sum(dim=1)).all()) for occupied_GU, active_GU in units)
    if not (fits or may_cut):
        return False
    new = old.clone()
    for view, (weight, mask), (occupied_GU, active_GU) in zip(m.weight.views, views, units, strict=True):
        num_G = active_GU.sum(dim=1)
        size_GU = unit_score(weight.abs().nan_to_num(), mask.shape, granularity)
        kept_GU = select_top(size_GU, torch.minimum(num_G, occupied_GU.sum(dim=1)), among_GU=occupied_GU)
        filled_GU = select_top(active_GU.float(), num_G - kept_GU.sum(dim=1), among_GU=~occupied_GU)
        view.write(new, unit_mask(kept_GU | filled_GU, granularity, mask.shape))
    m.packed.write(new)
    return fits


def is_sparse_already(m: MaskedWeight) -> bool:
    """Whether at most half of a weight's entries are not zero, and some are not."""
    return 0 < 2 * int(m.parameter.count_nonzero()) <= m.packed.numel


def tell_of_zeros(taken: Sequence[MaskedWeight], step: int) -> None:
    """Warns that masks have followed loaded weights, whose zeros a step would else have moved."""
    warnings.warn(
        f"step {step}: sparse weights were loaded into {_named(taken)} without the masks that belong to them. Their "
        f"non-zeros fit the plan, so their places became the masks, and no weight was lost; but the clock is at step "
        f"{step - 1}. To resume a run as it was, load {_STATE}.",
        stacklevel=2,
    )


def tell_of_regrowth(masked: Iterable[MaskedWeight], method: str) -> None:
    """Warns of weights that are sparse, in a method that starts from dense; if there are any."""
    sparse = [m for m in masked if m.packed.is_full and is_sparse_already(m)]
    if not sparse:
        return
    warnings.warn(
        f"sparsify(): {_named(sparse)} already held zeros, at more than half of their entries, but by the plan of "
        f"method {method} dense weights come first there, so these zeros will train. To go on from a sparse model, "
        f"pass {_GO_ON}; to resume a run, load {_STATE}.",
        stacklevel=2,
    )


def tell_of_no_room(outside: Mapping[MaskedWeight, int]) -> None:
    """Warns of weights that were sparse already, and whose non-zeros do not fit the first masks."""
    warnings.warn(
        f"sparsify(): {_named(list(outside))} already held zeros, but more non-zeros than the plan has room for: "
        f"{sum(outside.values()):,} of them, the smallest, are zero now. To go on from them as they are, load them "
        f"again and pass {_GO_ON}; to resume a run, load {_STATE}.",
        stacklevel=2,
    )


def tell_of_other_masks(outside: Mapping[MaskedWeight, int], where: str) -> None:
    """Warns of weights that were sparse already, with non-zeros where the masks that were given have none."""
    warnings.warn(
        f"sparsify(): {_named(list(outside))} already held zeros, but not those of {where}: {sum(outside.values()):,} "
        "non-zeros outside them are zero now. If these masks belong to other weights, load the weights again and pass "
        f"{_GO_ON}.",
        stacklevel=2,
    )


def tell_of_loss(outside: Mapping[MaskedWeight, int], step: int) -> None:
    """Warns that a step sets these non-zeros outside the masks to zero."""
    warnings.warn(
        f"step {step}: {sum(outside.values()):,} non-zeros outside the masks of {_named(list(outside))}, which this "
        "step sets to zero. Something wrote to the weights since the step before: weights were loaded without the "
        "masks that belong to them, an average was swapped in, or an optimizer moves weights outside of its step(). "
        f'After loading, load {_STATE}; or load before sparsify(), and pass masks="from-zeros" where they are sparse; '
        "around an optimizer that moves weights at other times, call sparsifier.before_step() and after_step().",
        stacklevel=2,
    )


def tell_of_others(outside: Mapping[MaskedWeight, int]) -> None:
    """Warns that a state is saved beside weights that its masks do not belong to."""
    warnings.warn(
        f"state_dict(): {sum(outside.values()):,} non-zeros of the weights lie outside the masks of "
        f"{_named(list(outside))}: other weights were loaded or swapped in, to which this state does not belong. Save "
        "it beside the weights that were trained with these masks.",
        stacklevel=2,
    )


def tell_of_misfit(outside: Mapping[MaskedWeight, int]) -> None:
    """Warns that a state was loaded over weights that it does not belong to."""
    warnings.warn(
        f"load_state_dict(): {sum(outside.values()):,} non-zeros of weights that were loaded before lie outside the "
        f"masks of this state, in {_named(list(outside))}, and are zero now. Weights and state are of different steps: "
        "load both from one checkpoint.",
        stacklevel=2,
    )


def tell_of_unheard(m: MaskedWeight, num_outside: int, num_passes: int) -> None:
    """Warns of non-zeros outside a mask although no optimizer step was heard."""
    warnings.warn(
        f"{m.weight.name}: {num_outside:,} non-zeros outside its mask after {num_passes} backward passes in which no "
        "optimizer.step() was heard. Something moves the weights by itself: an optimizer that steps during backward "
        "(LOMO), one that steps in two halves (SAM), or one on copies of the weights (offloaded, master weights). "
        "Call sparsifier.before_step() before it moves the weights and sparsifier.after_step() after it.",
        stacklevel=2,
    )


def tell_of_unstepped(masked: Sequence[MaskedWeight], num_steps: int) -> None:
    """Warns of sparse weights on which no optimizer has stepped."""
    warnings.warn(
        f"{_named(masked)}: sparse, but on them no optimizer has stepped in the first {num_steps} steps of others. "
        "They keep their zeros, and neither train nor change their masks. Pass their parameters to an optimizer, or "
        "leave them out by sparsify(exclude=...).",
        stacklevel=2,
    )


def _named(masked: Sequence[MaskedWeight]) -> str:
    return few([m.weight.name for m in masked], most=3, noun="weights")
