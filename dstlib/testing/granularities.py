"""What every granularity keeps to: two exact inverses that move entries about and know nothing of their values.

Shapes: O out, I in, K kernel taps; G groups, U units per group, E elements per unit.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dstlib.errors import SettingError
from dstlib.masking import Granularity
from dstlib.testing.laws import BreachError, Law, Rules, attempt, expect, hold, laws

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

    Raises:
        LawError: The first law that is broken.

    >>> from dstlib.masking import Block
    >>> check_granularity(Block(4, 2))
    >>> check_granularity(Block(11, 1), shapes=[(22, 3), (22, 3, 5)])
    """
    hold(granularity_laws(granularity, shapes=shapes))


def granularity_laws(granularity: Granularity, *, shapes: Iterable[tuple[int, ...]] = SHAPES) -> tuple[Law, ...]:
    """Returns the laws of :func:`check_granularity`, one by one."""
    trial = _Trial(granularity, tuple(torch.Size(shape) for shape in shapes))
    return laws("granularity", granularity, LAWS, trial, on=_on)


@dataclass(frozen=True)
class _Trial:
    """A granularity, and the shapes to try it on."""

    granularity: Granularity
    shapes: tuple[torch.Size, ...]

    def folding(self) -> Iterator[torch.Size]:
        """The shapes that it folds, once it is known to be a value that refuses all others."""
        _a_value(self, "itself")
        law, num_folding = "divides or refuses", 0
        for shape in self.shapes:
            expected = "a fold, or a SettingError where the shape does not divide"
            remedy = 'Raise dstlib.SettingError("..."): sparsify() then names the weight.'
            if attempt(partial(self._folds, shape), expected, remedy=remedy, law=law, on=_on(shape)):
                num_folding += 1
                yield shape
        got, remedy = f"a SettingError for each of {len(self.shapes)}", "Pass shapes= that it divides."
        expect(num_folding, "at least one shape that folds", got=got, remedy=remedy, law=law, on="all shapes")

    def folded(self, x: Tensor) -> Tensor:
        """What fold makes of a tensor, once it is known to have three axes."""
        call, expected = partial(self.granularity.fold, x), f"each of {x.numel()} entries once"
        folded = attempt(call, expected, remedy=_REARRANGE, law="each entry once")
        if not isinstance(folded, Tensor) or folded.ndim != 3 or folded.dtype != x.dtype:
            got = f"{folded.ndim} axes of {folded.dtype}" if isinstance(folded, Tensor) else repr(folded)
            remedy = "Groups, units, elements: a single one is an axis of 1."
            raise BreachError(f"(G, U, E) of {x.dtype}", got=got, remedy=remedy, law="three axes")
        return folded

    def _folds(self, shape: torch.Size) -> bool:
        try:
            self.granularity.fold(torch.zeros(shape))
        except SettingError:
            return False
        return True


def _a_value(trial: _Trial, on: str) -> None:
    granularity, law = trial.granularity, "a value"
    remedy = "Make it a @dataclass(frozen=True) with fold and unfold, and pass an instance."
    is_instance = isinstance(granularity, Granularity) and not isinstance(granularity, type)
    expect(is_instance, "an instance with fold and unfold", got=repr(granularity), remedy=remedy, law=law, on=on)
    try:
        same = granularity == copy.deepcopy(granularity) and hash(granularity) == hash(copy.deepcopy(granularity))
    except TypeError:
        same = False
    expect(same, "equal to its copy, with an equal hash", got="a copy that differs", remedy=remedy, law=law, on=on)


def _divides_or_refuses(trial: _Trial, shape: torch.Size) -> None:
    """Looks at nothing more: to try the shapes is to find those that fold."""


def _three_axes(trial: _Trial, shape: torch.Size) -> None:
    trial.folded(_index(shape))


def _each_entry_once(trial: _Trial, shape: torch.Size) -> None:
    index, noise = _index(shape), _noise(shape)
    folded = trial.folded(index)
    if not torch.equal(folded.flatten().sort().values, index.flatten()):
        got = f"{folded.numel()} places with {len(folded.flatten().unique())} of them"
        raise BreachError(f"each of {shape.numel()} entries once", got=got, remedy=_REARRANGE)
    is_same = torch.equal(trial.folded(noise), noise.flatten()[folded])
    expect(is_same, "places that depend on the shape alone", got="places that depend on values", remedy=_REARRANGE)


def _unfold_undoes_fold(trial: _Trial, shape: torch.Size) -> None:
    noise = _noise(shape)
    for x in (noise, noise.double(), noise > 0, _index(shape)):
        on, expected = f"{_on(shape)}, {x.dtype}", "unfold(fold(x), shape) equal to x"
        remedy = "Turn the pattern of fold round; (G, U, E) → (O, I, *K)."
        call = partial(trial.granularity.unfold, trial.folded(x).contiguous(), shape)
        back = attempt(call, expected, remedy=remedy, on=on)
        got = f"shape {tuple(back.shape)} of {back.dtype}" if back.shape != shape else "other entries"
        expect(_same(back, x), expected, got=got, remedy=remedy, on=on)


def _memory_layout(trial: _Trial, shape: torch.Size) -> None:
    fold, unfold = trial.granularity.fold, trial.granularity.unfold
    expected, remedy = "of a view what its copy gives", "Use reshape() or einops.rearrange, not view()."
    x = _noise(shape)
    y = trial.folded(x).contiguous()
    turned_x = x.transpose(0, 1).contiguous().transpose(0, 1)
    turned_y = y.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for call, plain in ((partial(fold, turned_x), y), (partial(unfold, turned_y, shape), x)):
        expect(_same(attempt(call, expected, remedy=remedy), plain), expected, got="something else", remedy=remedy)


LAWS: Rules[_Trial] = {
    _a_value: lambda _: ("itself",),
    **dict.fromkeys(
        (_divides_or_refuses, _three_axes, _each_entry_once, _unfold_undoes_fold, _memory_layout), _Trial.folding
    ),
}
_REARRANGE = "Rearrange only, as einops.rearrange does: no sum, no sort, no padding."


def _index(shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel()).view(shape)


def _noise(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0))


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _on(shape: torch.Size) -> str:
    return f"a weight of shape {tuple(shape)}"
