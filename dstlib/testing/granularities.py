"""What every granularity keeps to: two exact inverses that move entries about and know nothing of their values.

Shapes: O out, I in, K kernel taps; G groups, U units per group, E elements per unit.
"""

import copy
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from dstlib.errors import SettingError
from dstlib.masking import Granularity
from dstlib.testing.laws import attempt, broken, named, world

# outputs and inputs that multiples of most small numbers divide, with 0 to 3 axes of taps
SHAPES = tuple(
    (*channels, *taps)
    for channels in ((16, 32), (12, 24), (20, 40), (30, 42))
    for taps in ((), (3,), (2, 3), (1, 2, 3))
)


def check_granularity(granularity: Granularity, *, shapes: Iterable[tuple[int, ...]] = SHAPES) -> None:
    """Holds a granularity to its laws, on weights (O, I, *K) of these shapes.

    - *a value*: an instance with ``fold`` and ``unfold``, that is hashable and equals its copies.
    - *divides or refuses*: a SettingError, and no other error, for a shape that it cannot fold. One at least of
      the shapes must fold.
    - *three axes*: ``fold`` gives (G, U, E), in the same dtype.
    - *each entry once*: ``fold`` moves every entry to one place, by its position alone.
    - *unfold undoes fold*: exactly, for numbers and booleans; so a decision per unit is a mask of whole units.
    - *memory layout*: views fold and unfold like their contiguous copies.

    Errors: LawError for the first law that is broken.

    >>> from dstlib.masking import Block
    >>> check_granularity(Block(4, 2))
    >>> check_granularity(Block(11, 1), shapes=[(22, 3), (22, 3, 5)])
    """
    subject = named("granularity", granularity)
    _check_value(granularity, subject)
    tried = [torch.Size(shape) for shape in shapes]
    with world(0):
        folding = [shape for shape in tried if _folds(granularity, subject, shape)]
        for shape in folding:
            _check_fold(granularity, subject, shape)
            _check_inverses(granularity, subject, shape)
            _check_layout(granularity, subject, shape)
    if not folding:
        expected, remedy = "at least one shape that folds", "Pass shapes= that it divides."
        got = f"a SettingError for each of {len(tried)}"
        raise broken("divides or refuses", subject, on="all shapes", expected=expected, got=got, remedy=remedy)


def _check_value(granularity: Granularity, subject: str) -> None:
    law, remedy = "a value", "Make it a @dataclass(frozen=True) with fold and unfold, and pass an instance."
    is_one = isinstance(granularity, Granularity) and not isinstance(granularity, type)
    if not is_one:
        expected, got = "an instance with fold and unfold", repr(granularity)
        raise broken(law, subject, on="itself", expected=expected, got=got, remedy=remedy)
    try:
        same = granularity == copy.deepcopy(granularity) and hash(granularity) == hash(copy.deepcopy(granularity))
    except TypeError:
        same = False
    if not same:
        expected, got = "equal to its copy, with an equal hash", "a copy that differs"
        raise broken(law, subject, on="itself", expected=expected, got=got, remedy=remedy)


def _folds(granularity: Granularity, subject: str, shape: torch.Size) -> bool:
    remedy = 'Raise dstlib.SettingError("..."): sparsify() then names the weight.'
    expected = "a fold, or a SettingError where the shape does not divide"

    def fold() -> bool:
        try:
            granularity.fold(torch.zeros(shape))
        except SettingError:
            return False
        return True

    return attempt(fold, "divides or refuses", subject, on=_on(shape), expected=expected, remedy=remedy)


def _check_fold(granularity: Granularity, subject: str, shape: torch.Size) -> None:
    law, remedy = "each entry once", "Rearrange only, as einops.rearrange does: no sum, no sort, no padding."
    index, expected = torch.arange(shape.numel()).view(shape), f"each of {shape.numel()} entries once"
    folded = attempt(partial(granularity.fold, index), law, subject, on=_on(shape), expected=expected, remedy=remedy)
    if folded.ndim != 3 or folded.dtype != index.dtype:
        got = f"{folded.ndim} axes of {folded.dtype}"
        expected, remedy = f"(G, U, E) of {index.dtype}", "Groups, units, elements: a single one is an axis of 1."
        raise broken("three axes", subject, on=_on(shape), expected=expected, got=got, remedy=remedy)
    if not torch.equal(folded.flatten().sort().values, index.flatten()):
        num_found = len(folded.flatten().unique())
        got = f"{folded.numel()} places with {num_found} of them"
        raise broken(law, subject, on=_on(shape), expected=expected, got=got, remedy=remedy)
    noise = _noise(shape)
    if not torch.equal(granularity.fold(noise), noise.flatten()[folded]):
        expected, got = "places that depend on the shape alone", "places that depend on values"
        raise broken(law, subject, on=_on(shape), expected=expected, got=got, remedy=remedy)


def _check_inverses(granularity: Granularity, subject: str, shape: torch.Size) -> None:
    law, noise = "unfold undoes fold", _noise(shape)
    for x in (noise, noise.double(), noise > 0, torch.arange(shape.numel()).view(shape)):
        on, expected = f"{_on(shape)}, {x.dtype}", "unfold(fold(x), shape) equal to x"
        remedy = "Turn the pattern of fold round; (G, U, E) → (O, I, *K)."
        folded = granularity.fold(x).contiguous()
        call = partial(granularity.unfold, folded, shape)
        back = attempt(call, law, subject, on=on, expected=expected, remedy=remedy)
        if not _same(back, x):
            got = f"shape {tuple(back.shape)} of {back.dtype}" if back.shape != shape else "other entries"
            raise broken(law, subject, on=on, expected=expected, got=got, remedy=remedy)


def _check_layout(granularity: Granularity, subject: str, shape: torch.Size) -> None:
    expected, remedy = "of a view what its copy gives", "Use reshape() or einops.rearrange, not view()."
    x = _noise(shape)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    y = granularity.fold(x).contiguous()
    turned_y = y.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for call, plain in (
        (partial(granularity.fold, turned), y),
        (partial(granularity.unfold, turned_y, shape), x),
    ):
        found = attempt(call, "memory layout", subject, on=_on(shape), expected=expected, remedy=remedy)
        if not _same(found, plain):
            got = "something else"
            raise broken("memory layout", subject, on=_on(shape), expected=expected, got=got, remedy=remedy)


def _noise(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0))


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _on(shape: torch.Size) -> str:
    return f"a weight of shape {tuple(shape)}"
