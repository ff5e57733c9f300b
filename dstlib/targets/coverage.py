"""How much of a model's matrices is to be sparse, and what to say where it is less than half of their entries.

What the user left out or froze counts neither as sparse nor as dense: it stays dense on purpose.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import groupby

from dstlib.targets.eligibility import Weight
from dstlib.targets.selection import EXCLUDED, NOT_INCLUDED, asks_for

_NUM_NAMED = 4
_LEAST = Fraction(1, 20)  # of the dense entries, that are named: not the tokens and scales beside an embedding


def coverage(weights: Iterable[Weight]) -> Fraction:
    """Returns the share of sparse weights, in entries, among those that nobody left out or froze; 1 of none."""
    counted = [weight for weight in weights if _counts(weight)]
    num_all = _num_entries(counted)
    return Fraction(_num_entries(w for w in counted if not w.reason), num_all) if num_all else Fraction(1)


def shortfall(weights: Sequence[Weight], include: Sequence[str]) -> str:
    """Says which weights stay dense, why, and what makes them sparse; "" where at least half of all entries are.

    ``include`` is what the user asked for, which is said with what more there is to ask for.
    """
    share = coverage(weights)
    if share >= Fraction(1, 2):
        return ""
    kinds = sorted(_dense_kinds(weights), key=_num_entries, reverse=True)
    least = _LEAST * sum(map(_num_entries, kinds))
    named = [kind for kind in kinds[:_NUM_NAMED] if _num_entries(kind) >= least]
    globs = [glob for kind in named if kind[0].on_request for glob in _globs(kind, weights)]
    remedy = f"include={[*include, *globs]} makes sparse what can be. " if globs else ""
    return (
        f"Only {float(share):.1%} of the entries of this model's matrices become sparse. The largest that stay dense:\n"
        + "".join(f"  {_line(kind)}\n" for kind in named)
        + f"{remedy}What is to stay dense, name in exclude=, and this is not said of it."
    )


def _counts(weight: Weight) -> bool:
    return weight.reason not in (NOT_INCLUDED, EXCLUDED) and weight.parameter.requires_grad


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


def _globs(kind: Sequence[Weight], weights: Sequence[Weight]) -> list[str]:
    """Returns what to include so that a kind becomes sparse: one glob, or the names where it matches others too."""
    glob = _glob(kind[0])
    return [glob] if len(kind) > 1 and asks_for(glob, weights) else [weight.name for weight in kind]


def _line(kind: Sequence[Weight]) -> str:
    name = _glob(kind[0]) if len(kind) > 1 else kind[0].name
    several = f"{len(kind)} weights, " if len(kind) > 1 else ""
    return f"{name} ({several}{_num_entries(kind):,} entries): {kind[0].reason}"
