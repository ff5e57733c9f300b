"""How much of a model's matrices is to be sparse, and what to say where it is less than half of their entries.

What the user left out or froze counts neither as sparse nor as dense: it stays dense on purpose.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import groupby

from dstlib.targets.eligibility import Weight
from dstlib.targets.selection import EXCLUDED, NOT_INCLUDED, WITHOUT_MASK, asks_for

_NUM_NAMED = 4
_LEAST = Fraction(1, 20)  # of the dense entries, that are named: not the tokens and scales beside an embedding


def coverage(weights: Iterable[Weight]) -> Fraction:
    """Returns the share of sparse weights, in entries, among those that nobody left out or froze; 1 of none."""
    counted = [weight for weight in weights if _counts(weight)]
    num_all = _num_entries(counted)
    return Fraction(_num_entries(w for w in counted if not w.reason), num_all) if num_all else Fraction(1)


def shortfall(
    weights: Sequence[Weight], include: Sequence[str], *, tells_axes: bool, fits: Callable[[Weight], bool]
) -> str:
    """Says which weights stay dense, why, and what makes them sparse; "" where at least half of all entries are.

    ``include`` is what the user asked for, which is said with what more there is to ask for. ``tells_axes``: the
    method tells outputs from inputs, so that they must be known. ``fits`` says whether it could take a weight.
    """
    share = coverage(weights)
    if share >= Fraction(1, 2):
        return ""
    kinds = sorted(_dense_kinds(weights), key=_num_entries, reverse=True)
    least = _LEAST * sum(map(_num_entries, kinds))
    named = [kind for kind in kinds[:_NUM_NAMED] if _num_entries(kind) >= least]
    asked = [weight for kind in named for weight in kind if weight.on_request and fits(weight)]
    unknown = [weight for weight in asked if _needs_axes(weight, tells_axes=tells_axes)]
    by_name = [weight for weight in asked if weight not in unknown or not weight.waits_for_axes]
    remedy = f"include={[*include, *_globs(by_name, weights)]} makes sparse what can be" if by_name else ""
    if unknown:
        remedy += f"{', with ' if by_name else 'What can be is made sparse by '}{_axes(unknown, weights)}"
    remedy += ". " if remedy else ""
    return (
        f"Only {float(share):.1%} of the entries of this model's matrices become sparse. The largest that stay dense:\n"
        + "".join(f"  {_line(kind)}\n" for kind in named)
        + f"{remedy}What is to stay dense, name in exclude=, and this is not said of it."
    )


def unknown_axes(weights: Sequence[Weight]) -> str:
    """Says which sparse weights of three axes or more are taken for one kernel, as nothing names their axes."""
    unknown = [weight for weight in weights if not weight.reason and _needs_axes(weight, tells_axes=False)]
    if not unknown:
        return ""
    first = unknown[0]
    several = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return (
        f"{first.name}, {tuple(first.parameter.shape)},{several}: nothing says which of its axes are the outputs and "
        "the inputs, and which count matrices, so all of it is taken for one kernel, outputs × inputs × taps, by what "
        f"shares out density and by criteria. Pass {_axes(unknown, weights)}."
    )


def _needs_axes(weight: Weight, *, tells_axes: bool) -> bool:
    """Whether the user has to name a weight's axes: of two, only if outputs and inputs are told apart."""
    return not weight.knows_axes and (tells_axes or weight.parameter.ndim > 2)


def example_axes(weight: Weight) -> str:
    """Returns a name for each axis of a weight.

    >>> import torch
    >>> from torch import nn
    >>> example_axes(Weight("up", "Experts", nn.Parameter(torch.zeros(3, 4, 5)), ()))
    'e o i'
    """
    num = weight.parameter.ndim - 2
    return " ".join([*(["e"] if num == 1 else [f"e{number}" for number in range(num)]), "o", "i"])


def _counts(weight: Weight) -> bool:
    return weight.reason not in (NOT_INCLUDED, EXCLUDED, WITHOUT_MASK) and weight.parameter.requires_grad


def _num_entries(weights: Iterable[Weight]) -> int:
    return sum(weight.parameter.numel() for weight in weights)


def _dense_kinds(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    """Yields weights that are dense for the same reason under names that differ in numbers alone."""

    def kind(weight: Weight) -> tuple[str, str]:
        return _glob(weight), weight.reason

    dense = [weight for weight in weights if weight.reason and _counts(weight)]
    return (list(group) for _, group in groupby(sorted(dense, key=kind), key=kind))


def _glob(weight: Weight) -> str:
    return re.sub(r"\d+", "*", weight.name)


def _globs(asked: Sequence[Weight], weights: Sequence[Weight]) -> list[str]:
    """Returns what to include so that these become sparse: globs, or the names where one matches others too."""
    names = {weight.name for weight in asked}
    globs: dict[str, None] = {}
    for weight in asked:
        owner, _, key = weight.name.rpartition(".")
        glob = re.sub(r"\d+", "*", owner) + f".{key}" if owner else key
        matched = {w.name for w in weights if w.matches(glob)}
        is_short = len(matched) > 1 and matched <= names and asks_for(glob, weights)
        globs[glob if is_short else weight.name] = None
    return list(globs)


def _axes(unknown: Sequence[Weight], weights: Sequence[Weight]) -> str:
    """Says how the axes of weights are named."""
    example = {glob: example_axes(next(w for w in unknown if w.matches(glob))) for glob in _globs(unknown, weights)}
    return (
        f"axes={example}, say: in their order, o for outputs, i for inputs, other names where an axis counts matrices"
    )


def _line(kind: Sequence[Weight]) -> str:
    name = _glob(kind[0]) if len(kind) > 1 else kind[0].name
    several = f"{len(kind)} weights, " if len(kind) > 1 else ""
    return f"{name} ({several}{_num_entries(kind):,} entries): {kind[0].reason}"
