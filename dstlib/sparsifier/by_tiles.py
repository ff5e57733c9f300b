"""Mask updates of a matrix that does not exist: a few rows at a time are made dense, scored and forgotten.

Scores of growth are kept of the active units and of the best others alone, as many as may grow; where units compete in
small groups, a tile holds whole groups. The mask is, unit for unit, that of an update that sees all at once.

Shapes: O out, I in, *K kernel taps, of which units have all; G groups, U units per group; A active units, B the best
others, C those that may come.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dstlib import masking
from dstlib.masking import Granularity, Site
from dstlib.masking.update import take_units
from dstlib.methods.method import Method
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.scores import score_units

if TYPE_CHECKING:
    from dstlib.engine.ops.places import Best

MOST = 2**31 - 1  # entries of a matrix, whose places are numbered in 32 bits
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

    def nothing(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns zeros of the shape of some rows, which take no memory."""
        size = (last - first, *self.size[1:])
        zero = self.values.new_zeros(1)
        return zero.expand(size), zero.bool().expand(size)


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
        and (method.allocate, method.prune, method.early_stop, method.storage) == (None,) * 4
    )


def places_of(mask: Tensor) -> Tensor:
    """Returns where in the flattened (O, I) matrix the active kernels of a mask (O, I, *K) lie, rising, in int32."""
    return mask.reshape(-1, mask.shape[2:].numel())[:, 0].nonzero().flatten().int()


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
        sites = tiles.sites(with_weight=True, with_gradient=True)
        return torch.cat([_of_whole_groups(tiles, first, site) for first, site in sites])
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
        best, unit = _best(num_target), 0
        for _, site in tiles.sites(with_weight=False, with_gradient=False):
            score_U = score_units(site, masking.random(site), plan)[0]
            best.see(score_U, unit)
            unit += len(score_U)
        return _places_of(tiles, best.take()[0])
    places = []
    for first, site in tiles.sites(with_weight=False, with_gradient=False):
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

    def sites(self, *, with_weight: bool, with_gradient: bool) -> Iterator[tuple[int, Site]]:
        """Yields each tile with its first row; masks are those before the update, at which no criterion here looks.

        Where nobody looks at the weight either, both are zeros.
        """
        progress = self.plan.clock.progress(self.step)
        generator = masking.site_generator(self.plan.seed, self.step, self.matrix.name)
        for first, last in self.spans:
            weight, mask = self.matrix.rows(first, last) if with_weight else self.matrix.nothing(first, last)
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

    def grow_scores(self) -> Iterator[Tensor]:
        """Yields what the units of each tile are grown by, (U), of a matrix whose units are of one group."""
        reads_weight = self.plan.method.grow not in (masking.gradient, masking.random)
        for _, site in self.sites(with_weight=reads_weight, with_gradient=True):
            yield self.grow_score(site)[0]

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
    from dstlib.engine.ops.places import choose_best, merged  # not before it is asked for: it loads the engine

    plan, (active_A, drop_A) = tiles.plan, _active_units(tiles)
    num_active_1 = torch.tensor([len(active_A)], device=active_A.device)
    budget = plan.budget(tiles.matrix.name, num_active_1, num_units, tiles.step)
    is_kept_A = choose_best(drop_A, int(budget.num_kept_G))
    kept_A, num_left = active_A[is_kept_A], int(budget.num_target_G - budget.num_kept_G)
    if not num_left:
        return kept_A
    best, unit, regrow = _best(num_left), 0, plan.method.regrow
    apart_A = kept_A if regrow else active_A  # what cannot come by what it is worth
    for grow_U in tiles.grow_scores():
        begin, end = stretch(apart_A, unit, unit + len(grow_U))
        here_A = (apart_A[begin:end] - unit).long()
        if not regrow:
            best.look(grow_U[here_A[~is_kept_A[begin:end]]])
        best.see(grow_U.index_fill(0, here_A, torch.nan), unit)
        unit += len(grow_U)
    best_B, score_B = best.take()
    least = float(score_B.min()) if len(best_B) == num_left else -torch.inf
    if least > best.lowest or (least == best.lowest and best.num_lowest == 1):  # all have a reason to grow
        return merged(kept_A, best_B)
    left_A = ~is_kept_A
    unit_C, is_old_C, grow_C = _contenders(tiles, active_A[left_A], (best_B, score_B))
    drop_C = drop_A.new_zeros(len(grow_C))
    drop_C[is_old_C] = drop_A[left_A]
    worth_C = (grow_C > best.lowest) | ((grow_C == best.lowest) & (best.num_lowest == 1))
    new_GU = take_units(
        torch.zeros_like(is_old_C)[None],
        active_GU=is_old_C[None],
        drop_GU=drop_C[None],
        grow_GU=grow_C[None],
        worth_GU=worth_C[None],
        num_left_G=budget.num_target_G - budget.num_kept_G,
        regrow=regrow,
    )
    return merged(kept_A, unit_C[new_GU[0]])


def _contenders(tiles: _Tiles, left_A: Tensor, best: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, in rising order, what was dropped and the best of the others, which are old, and what growth scores.

    No others may come: as many are among the best as there is room for.
    """
    grown, unit = [], 0
    for grow_U in tiles.grow_scores():
        begin, end = stretch(left_A, unit, unit + len(grow_U))
        grown.append(grow_U[(left_A[begin:end] - unit).long()])
        unit += len(grow_U)
    best_B, score_B = best
    is_other_B = ~torch.isin(best_B, left_A)
    unit_C, order = torch.cat([left_A, best_B[is_other_B]]).sort()
    return unit_C, order < len(left_A), torch.cat([*grown, score_B[is_other_B]])[order]


def _active_units(tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Returns the active units, in rising order, and what each is dropped by."""
    method, matrix = tiles.plan.method, tiles.matrix
    reads_gradient = method.drop in (masking.gradient, masking.saliency) and matrix.gradient is not None
    if isinstance(method.granularity, masking.Element) and not reads_gradient:  # nothing else has to be looked at
        alone = replace(next(tiles.sites(with_weight=False, with_gradient=False))[1], weight=matrix.values[:, None])
        alone = replace(alone, mask=torch.ones_like(alone.weight, dtype=torch.bool))
        return matrix.places, tiles.drop_score(alone)[0]
    units, scores, unit = [], [], 0
    for _, site in tiles.sites(with_weight=True, with_gradient=reads_gradient):
        active_U = tiles.active(site)[0]
        at = active_U.nonzero().flatten()
        units.append((at + unit).int())  # fewer than 2³¹, as the kernels number them
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


def _best(num: int) -> "Best":
    from dstlib.engine.ops.places import Best  # as above

    return Best(num)
