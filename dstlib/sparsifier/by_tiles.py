"""Mask updates of a matrix that does not exist: a few rows at a time are made dense, scored and forgotten.

Scores of growth are kept of the active units and of the best others alone, as many as may grow; where units compete in
small groups, a tile holds whole groups. The mask is, unit for unit, that of an update that sees all at once.

Shapes: O out, I in, *K kernel taps, of which units have all; G groups, U units per group; A active units, B the best
others, C those that may come.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dstlib import masking
from dstlib.masking import Granularity, Site
from dstlib.masking.update import take_units
from dstlib.methods.method import Method
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.update import score_units

TILE = 2**18  # entries that are made dense together: few enough to stay in a cache, and to be memory used again
_OF_ENTRIES = (masking.magnitude, masking.magnitude_l2, masking.gradient, masking.saliency)  # by themselves alone
_ROW_BY_ROW = (
    masking.Element,
    masking.Kernel,
    masking.Channel,
    masking.Block,
    masking.FanIn,
    masking.SharedFanIn,
    masking.NM,
)


@dataclass(frozen=True)
class Matrix:
    """A matrix (O, I, *K), of which the active values (A, *K) exist, at rising ``places`` of (O, I).

    ``gradient`` computes that of some rows, active or not; None where there is none.
    """

    name: str
    size: torch.Size
    places: Tensor
    values: Tensor
    gradient: Callable[[int, int], Tensor] | None

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns the weight and the mask of some rows."""
        begin, end = stretch(self.places, first * self.size[1], last * self.size[1])
        at, size = (self.places[begin:end] - first * self.size[1]).long(), (last - first, *self.size[1:])
        flat = self.values.new_zeros((last - first) * self.size[1], *self.size[2:])
        weight = flat.index_copy_(0, at, self.values[begin:end])
        mask = torch.zeros_like(weight, dtype=torch.bool).index_fill_(0, at, True)
        return weight.view(size), mask.view(size)


def stretch(places: Tensor, first: int, last: int) -> tuple[int, int]:
    """Returns where, of rising places, those from ``first`` up to ``last`` begin and end.

    >>> stretch(torch.tensor([1, 4, 5, 9]), 2, 6)
    (1, 3)
    """
    # of one type: torch would convert all of the places to the other
    ends = torch.tensor([first, last], dtype=places.dtype, device=places.device)
    begin, end = torch.searchsorted(places, ends).tolist()
    return begin, end


def goes_by_tiles(method: Method) -> bool:
    """Tells whether an update by this method needs no more than a few rows of a weight at a time."""
    grows = (*_OF_ENTRIES, masking.random)  # numbers are drawn in the order of entries, and by one criterion alone
    return (
        method.drop in _OF_ENTRIES
        and method.grow in grows
        and is_row_by_row(method.granularity)
        and method.grown_init is masking.zeros
        and (method.allocate, method.prune, method.early_stop) == (None, None, None)
    )


def places_of(mask: Tensor) -> Tensor:
    """Returns where in the flattened (O, I) matrix the active kernels of a mask (O, I, *K) lie, in rising order."""
    return mask.reshape(-1, mask.shape[2:].numel())[:, 0].nonzero().flatten()


def has_whole_kernels(granularity: Granularity, shape: torch.Size) -> bool:
    """Tells whether each unit of a weight (O, I, *K) consists of kernels, with all taps of each."""
    return shape[2:].numel() == 1 or isinstance(granularity, masking.Kernel | masking.Channel | masking.Block)


def is_row_by_row(granularity: Granularity) -> bool:
    """Tells whether units, or groups of them, lie within a few rows, one after the other."""
    return isinstance(granularity, _ROW_BY_ROW)


def update_by_tiles(matrix: Matrix, plan: Plan, step: int) -> Tensor:
    """Returns the places of what is active after an update, in rising order.

    Raises:
        ScoreError: A criterion returned scores by which units cannot be ordered.
    """
    tiles = _Tiles(matrix, plan, step)
    num_groups, num_units, _ = masking.folded_shape(plan.method.granularity, matrix.size)
    if num_groups > 1:
        return torch.cat([_of_whole_groups(tiles, first, site) for first, site in tiles.sites(with_gradient=True)])
    return _places_of(tiles, _of_one_group(tiles, num_units))


def draw_by_tiles(name: str, size: torch.Size, plan: Plan) -> Tensor:
    """Returns the places of a first mask that chance alone chooses, in rising order.

    Those of a mask that is drawn at once: the numbers come in the same order, and the highest are taken.
    """
    nothing = torch.empty(0, *size[2:])
    tiles = _Tiles(Matrix(name, size, torch.empty(0, dtype=torch.long), nothing, None), plan, 0)
    num_groups, num_units, _ = masking.folded_shape(plan.method.granularity, size)
    num_target, columns = plan.num_target(name, num_units, 0), size[1]
    if num_groups == 1:
        best, unit = _Best(num_target), 0
        for _, site in tiles.sites(with_gradient=False):
            score_U = score_units(site, masking.random(site), plan)[0]
            best.see(score_U, unit)
            unit += len(score_U)
        return _places_of(tiles, best.take()[0])
    places = []
    for first, site in tiles.sites(with_gradient=False):
        mask = masking.best_units(masking.random(site), plan.method.granularity, num_target)
        places.append(places_of(mask) + first * columns)
    return torch.cat(places)


@dataclass(frozen=True)
class _Tiles:
    matrix: Matrix
    plan: Plan
    step: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The rows of each tile, whole units."""
        rows, columns = self.matrix.size[0], self.matrix.size[1:].numel()
        least: int = getattr(self.plan.method.granularity, "out", 1)
        height = max(TILE // columns // least, 1) * least
        return [(first, min(first + height, rows)) for first in range(0, rows, height)]

    def sites(self, *, with_gradient: bool) -> Iterator[tuple[int, Site]]:
        """Yields each tile with its first row; masks are those before the update, at which no criterion here looks."""
        progress = self.plan.clock.progress(self.step)
        generator = masking.site_generator(self.plan.seed, self.step, self.matrix.name)
        for first, last in self.spans:
            weight, mask = self.matrix.rows(first, last)
            grad = self.matrix.gradient(first, last) if with_gradient and self.matrix.gradient else None
            yield (
                first,
                Site(
                    name=self.matrix.name,
                    weight=weight,
                    mask=mask,
                    grad=grad,
                    momentum=None,
                    step=self.step,
                    generator=generator,
                    progress=progress,
                ),
            )

    def active(self, site: Site) -> Tensor:
        """Returns which units of a tile are active, (G, U)."""
        return self.plan.method.granularity.fold(site.mask)[..., 0]

    def drop_score(self, site: Site) -> Tensor:
        """Returns what units of a tile are dropped by, (G, U); without a gradient, magnitude."""
        drop = masking.magnitude if self.matrix.gradient is None else self.plan.method.drop
        return score_units(site, drop(site), self.plan)

    def grow_score(self, site: Site) -> Tensor:
        """Returns what units of a tile are grown by, (G, U); without a gradient, no reason at all."""
        score = torch.zeros_like(site.weight) if self.matrix.gradient is None else self.plan.method.grow(site)
        return score_units(site, score, self.plan)


def _of_whole_groups(tiles: _Tiles, first: int, site: Site) -> Tensor:
    """Returns the places of what is active in a tile that holds whole groups, each of which exchanges for itself."""
    method = tiles.plan.method
    active_GU, drop_GU = tiles.active(site), tiles.drop_score(site)
    budget = tiles.plan.budget(site.name, active_GU.sum(dim=1), active_GU.shape[1], tiles.step)
    new = masking.exchange(
        site.mask,
        drop_GU,
        tiles.grow_score(site),
        granularity=method.granularity,
        budget=budget,
        regrow=method.regrow,
    ).mask
    return places_of(new) + first * tiles.matrix.size[1]


def _of_one_group(tiles: _Tiles, num_units: int) -> Tensor:
    """Returns the units that are active after the update, in rising order, of a matrix whose units all compete."""
    plan, (active_A, drop_A) = tiles.plan, _active_units(tiles)
    num_active_1 = torch.tensor([len(active_A)], device=active_A.device)
    budget = plan.budget(tiles.matrix.name, num_active_1, num_units, tiles.step)
    kept_A = masking.keep(torch.ones_like(drop_A, dtype=torch.bool)[None], drop_A[None], budget)[0]
    num_left_1 = budget.num_target_G - budget.num_kept_G
    if not int(num_left_1):
        return active_A[kept_A]
    best = _Best(int(num_left_1))
    lowest = _Lowest()
    grow_A, unit = torch.empty_like(drop_A), 0
    for _, site in tiles.sites(with_gradient=True):
        grow_U = tiles.grow_score(site)[0]
        begin, end = stretch(active_A, unit, unit + len(grow_U))
        here_A, stays_A = (active_A[begin:end] - unit).long(), kept_A[begin:end]
        grow_A[begin:end] = grow_U[here_A]
        lowest.see(grow_U.index_fill(0, here_A[stays_A], torch.inf))
        best.see(grow_U.index_fill(0, here_A, -torch.inf), unit)
        unit += len(grow_U)
    # only what was dropped and the best of the others may come
    (best_B, score_B), left_A = best.take(), ~kept_A
    unit_C, order = torch.cat([active_A[left_A], best_B]).sort()
    is_old_C = order < int(left_A.sum())
    drop_C = torch.cat([drop_A[left_A], torch.zeros_like(score_B)])[order]
    grow_C = torch.cat([grow_A[left_A], score_B])[order]
    worth_C = (grow_C > lowest.score) | ((grow_C == lowest.score) & (lowest.num == 1))
    new_GU = take_units(
        torch.zeros_like(is_old_C)[None],
        active_GU=is_old_C[None],
        drop_GU=drop_C[None],
        grow_GU=grow_C[None],
        worth_GU=worth_C[None],
        num_left_G=num_left_1,
        regrow=plan.method.regrow,
    )
    return torch.cat([active_A[kept_A], unit_C[new_GU[0]]]).sort().values


def _active_units(tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Returns the active units, in rising order, and what each is dropped by."""
    method, matrix = tiles.plan.method, tiles.matrix
    reads_gradient = method.drop is masking.saliency and matrix.gradient is not None
    if isinstance(method.granularity, masking.Element) and not reads_gradient:  # nothing else has to be looked at
        alone = replace(next(tiles.sites(with_gradient=False))[1], weight=matrix.values[:, None])
        alone = replace(alone, mask=torch.ones_like(alone.weight, dtype=torch.bool))
        return matrix.places, tiles.drop_score(alone)[0]
    units, scores, unit = [], [], 0
    for _, site in tiles.sites(with_gradient=reads_gradient):
        active_U = tiles.active(site)[0]
        at = active_U.nonzero().flatten()
        units.append(at + unit)
        scores.append(tiles.drop_score(site)[0][at])
        unit += len(active_U)
    return torch.cat(units), torch.cat(scores)


def _places_of(tiles: _Tiles, units: Tensor) -> Tensor:
    """Returns the places of the entries of units."""
    grain, (_, columns, *taps) = tiles.plan.method.granularity, tiles.matrix.size
    if isinstance(grain, masking.Element):
        return units
    places, unit = [], 0
    for first, last in tiles.spans:
        shape = torch.Size((last - first, columns, *taps))
        _, num_units, _ = masking.folded_shape(grain, shape)
        begin, end = stretch(units, unit, unit + num_units)
        is_active = torch.zeros(1, num_units, dtype=torch.bool, device=units.device)
        is_active[0, units[begin:end] - unit] = True
        mask = masking.unit_mask(is_active, grain, shape)
        places.append(places_of(mask) + first * columns)
        unit += num_units
    return torch.cat(places)


class _Lowest:
    """The lowest of all scores that it has seen, and how many there are of it."""

    def __init__(self) -> None:
        self.score, self.num = float("inf"), 0

    def see(self, score_U: Tensor) -> None:
        """Takes notice of scores; infinite ones are none."""
        lowest = float(score_U.min())
        if lowest > self.score or lowest == float("inf"):
            return
        num = int((score_U == lowest).sum())
        self.score, self.num = lowest, num + (self.num if lowest == self.score else 0)


class _Best:
    """The ``num`` best of the units that it has seen, in the order of their numbers; ties go to the lower one."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._units: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._num_held, self._least = 0, -float("inf")

    def see(self, score_U: Tensor, first: int) -> None:
        """Takes notice of units from number ``first`` on; what scores -inf is none."""
        at = (score_U > self._least).nonzero().flatten()
        self._units.append((at + first).int())  # fewer than 2³¹, as the kernels number them
        self._scores.append(score_U[at])
        self._num_held += len(at)
        if self._num_held > self._num + self._num // 2:
            self.take()

    def take(self) -> tuple[Tensor, Tensor]:
        """Returns the best so far, and their scores."""
        units, scores = torch.cat(self._units), torch.cat(self._scores)
        self._units, self._scores = [], []  # by now they would be held twice
        if len(units) > self._num:
            every = torch.ones(1, len(units), dtype=torch.bool, device=units.device)
            chosen = masking.select_top(scores[None], torch.tensor([self._num], device=units.device), among_GU=every)[0]
            units, scores = units[chosen], scores[chosen]
            self._least = float(scores.min())
        self._units, self._scores, self._num_held = [units], [scores], len(units)
        return units, scores
