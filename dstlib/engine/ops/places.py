"""Rising places of a flattened matrix, and scores of which the best are wanted: what mask updates are made of.

By the kernels for int32 and float32 on the CPU, else by torch; both give the same.

Shapes: A places, U units, N scores.
"""

import torch
from torch import Tensor

from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check, kernels
from dstlib.masking import select_top


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Returns two rising lists without an entry in common as one.

    >>> merged(torch.tensor([1, 5]), torch.tensor([0, 2, 9]))
    tensor([0, 1, 2, 5, 9])
    """
    found = _kernels_for(a, b)
    if found is None:
        return torch.cat([a, b]).sort().values
    out = a.new_empty(len(a) + len(b))
    problem = structs.Merged(a.data_ptr(), b.data_ptr(), out.data_ptr(), len(a), len(b))
    check(found.places_merge(problem, torch.get_num_threads()), "a mask update")
    return out


def turned(places: Tensor, numbers: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns rising places (A) of a matrix (O, I) as those of the transposed one, rising, and with them their numbers.

    >>> turned(torch.tensor([0, 1, 2]), torch.tensor([7, 8, 9]), (2, 2))
    (tensor([0, 1, 2]), tensor([7, 9, 8]))
    """
    rows, columns = size
    found = _kernels_for(places, numbers)
    if found is None:
        at, order = (places % columns * rows + places // columns).sort()
        return at, numbers[order]
    at, values = torch.empty_like(places), torch.empty_like(numbers)
    pointers = (x.data_ptr() for x in (places, numbers, at, values))
    problem = structs.Turned(*pointers, rows, columns, len(places))
    check(found.places_turn(problem, torch.get_num_threads()), "a mask update")
    return at, values


def sources(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> Tensor:
    """Returns for each of the values now (A) where it was among those before, -1 if it was not.

    Both are rising places, and where the value of each lies.

    >>> sources((torch.tensor([3, 8]), torch.tensor([1, 0])), (torch.tensor([2, 8]), torch.tensor([0, 1])))
    tensor([-1,  0])
    """
    (places, order), (wanted, positions) = before, now
    found = _kernels_for(places, order, wanted, positions)
    source = torch.full_like(wanted, -1)
    if found is not None:
        pointers = (x.data_ptr() for x in (places, order, wanted, positions, source))
        problem = structs.Sources(*pointers, len(places), len(wanted))
        check(found.places_source(problem, torch.get_num_threads()), "a mask update")
    elif len(places):
        at = torch.searchsorted(places, wanted).clamp_(max=len(places) - 1)
        source[positions.long()] = torch.where(places[at] == wanted, order[at], -1).to(source.dtype)
    return source


def choose_best(score_N: Tensor, num: int) -> Tensor:
    """Marks the ``num`` highest scores, (N); ties go to the first.

    >>> choose_best(torch.tensor([1.0, 3.0, 1.0]), 2)
    tensor([ True,  True, False])
    """
    chosen = torch.ones_like(score_N, dtype=torch.bool)
    found = _kernels_for(scores=score_N)
    if found is None:
        return select_top(score_N[None], torch.tensor([num]), among_GU=chosen[None])[0]
    problem = structs.Best(scores=score_N.data_ptr(), chosen=chosen.data_ptr(), num=len(score_N), num_best=num)
    check(found.scores_best(problem, torch.get_num_threads()), "a mask update")
    return chosen


class Best:
    """The ``num`` best of the units that it has seen, in the order of their numbers; ties go to the lower one.

    ``lowest`` is the lowest of all scores that it has seen, and ``num_lowest`` how many there are of it.

    >>> best = Best(2)
    >>> best.see(torch.tensor([5.0, 1.0, 7.0]), 0)
    >>> best.see(torch.tensor([6.0, float("nan"), 1.0]), 3)
    >>> best.take(), best.lowest, best.num_lowest
    ((tensor([2, 3], dtype=torch.int32), tensor([7., 6.])), 1.0, 2)
    """

    def __init__(self, num: int) -> None:
        self.lowest, self.num_lowest = float("inf"), 0
        self._num, self._num_held, self._least = num, 0, -float("inf")
        self._units, self._scores = torch.empty(0, dtype=torch.int32), torch.empty(0)

    def see(self, score_U: Tensor, first: int) -> None:
        """Takes notice of units from number ``first`` on, of which NaN says that one is none."""
        if len(self._units) < self._num_held + len(score_U):
            self._make_room(score_U)
        room = slice(self._num_held, self._num_held + len(score_U))
        units, scores = self._units[room], self._scores[room]
        found = _kernels_for(scores=score_U)
        if found is None:
            at = (score_U > self._least).nonzero().flatten()
            units[: len(at)], scores[: len(at)] = at + first, score_U[at]
            self._num_held += len(at)
            self.look(score_U[~score_U.isnan()])
            return
        problem = structs.Offer(
            *(x.data_ptr() for x in (score_U, units, scores)),
            num=len(score_U),
            first=first,
            least=self._least,
            lowest=self.lowest,
            num_lowest=self.num_lowest,
        )
        check(found.scores_offer(problem, torch.get_num_threads()), "a mask update")
        self.lowest, self.num_lowest = problem.lowest, problem.num_lowest
        self._num_held += problem.num_found

    def look(self, score_U: Tensor) -> None:
        """Takes notice of scores of units that are not to be among the best."""
        lowest = float(score_U.min()) if len(score_U) else float("inf")
        if lowest <= self.lowest and len(score_U):
            num = int((score_U == lowest).sum())
            self.num_lowest = num + (self.num_lowest if lowest == self.lowest else 0)
            self.lowest = lowest

    def take(self) -> tuple[Tensor, Tensor]:
        """Returns the best so far, and their scores."""
        self._reduce()
        return self._units[: self._num_held], self._scores[: self._num_held]

    def _make_room(self, score_U: Tensor) -> None:
        """Forgets all but the best; makes room for twice them where there is none, and for those to come."""
        units, scores = self.take()
        if len(self._units) < len(units) + len(score_U):
            num = 2 * self._num + len(score_U)
            self._units, self._scores = score_U.new_empty(num, dtype=torch.int32), score_U.new_empty(num)
            self._units[: len(units)], self._scores[: len(units)] = units, scores

    def _reduce(self) -> None:
        if self._num_held <= self._num:
            return
        units, scores = self._units[: self._num_held], self._scores[: self._num_held]
        found = _kernels_for(units, scores=scores)
        if found is None:
            chosen = choose_best(scores, self._num)
            units[: self._num], scores[: self._num] = units[chosen], scores[chosen]
            self._least = float(scores[: self._num].min()) if self._num else float("inf")
        else:
            problem = structs.Best(scores.data_ptr(), units.data_ptr(), num=len(units), num_best=self._num)
            check(found.scores_best(problem, torch.get_num_threads()), "a mask update")
            self._least = problem.least
        self._num_held = self._num


def _kernels_for(*places: Tensor, scores: Tensor | None = None) -> Kernels | None:
    """Returns the kernels where they can read these: places in int32, scores in float32, one after the other."""
    all_of = [*((x, torch.int32) for x in places), *([] if scores is None else [(scores, torch.float32)])]
    fits = all(x.is_cpu and x.dtype == dtype and x.is_contiguous() for x, dtype in all_of)
    return kernels() if fits else None
