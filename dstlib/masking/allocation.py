"""Allocation: how the active units are shared out among weights, or among the neurons of one.

An allocator is a function (accounts, terms) → allocation; without one, each weight keeps its own number. Those
here are frozen values. Every one of them meets ``terms.num_total`` exactly where weights have a single group
(elements, kernels, blocks, channels). With several groups of equal quotas (constant fan-in), what does not
divide stays unspent: fewer units than there are groups.

Shapes: G groups, U units per group.

>>> scores = {"strong": torch.tensor([[4.0, 3.0, 2.0]]), "weak": torch.tensor([[1.0, 0.5, 0.2]])}
>>> accounts = [
...     Account(name=name, active_GU=score > 0, drop_GU=score, grow_GU=score, num_planned=2)
...     for name, score in scores.items()
... ]
>>> allocation = global_units(accounts, Terms(num_total=4, drop_fraction=0.0))
>>> [int(budget.num_target_G) for budget in allocation.budgets]
[3, 1]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dstlib.errors import require
from dstlib.masking.budget import Account, Allocation, Allocator, Budget, Terms
from dstlib.masking.counts import apportion, round_down
from dstlib.masking.outputs import leave_for_outputs
from dstlib.masking.selection import select_top

Rescale = Callable[[Tensor, Tensor], Tensor]


def as_they_are(score_GU: Tensor, active_GU: Tensor) -> Tensor:
    """Returns scores as they are: those of different weights compare directly."""
    return score_GU


def lamp_scores(score_GU: Tensor, active_GU: Tensor) -> Tensor:
    """Divides s² by the sum of s² over the active units that score no less: the best of each weight has 1.

    For scores that are magnitudes.

    Reference: Lee et al. 2021, Layer-adaptive sparsity for the magnitude-based pruning, ICLR, equation 3.

    >>> lamp_scores(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, True, True]]))
    tensor([[0.0714, 1.0000, 0.3077]], dtype=torch.float64)
    """
    square = score_GU.double().square().masked_fill(~active_GU, 0).flatten()
    best_first, order = square.sort(descending=True, stable=True)
    lamp = torch.empty_like(square)
    lamp[order] = best_first / best_first.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return lamp.view(score_GU.shape)


@dataclass(frozen=True)
class GlobalRank:
    """Prunes the lowest active units of all weights together, by their scores after ``rescale``.

    A drop fraction then exchanges that share of what each weight has left. Where the total grows, units are
    grown by their scores over all weights. At least one unit per group stays, unless ``may_empty``.

    Reference: Liu et al. 2021 (GraNet), Algorithm 1: pruning over all layers, regeneration within each.
    """

    rescale: Rescale = as_they_are
    may_empty: bool = False

    def __call__(self, accounts: Sequence[Account], terms: Terms) -> Allocation:
        active = [a.active_GU for a in accounts]
        scores = [self.rescale(a.drop_GU, a.active_GU) for a in accounts]
        if not self.may_empty:
            scores = [_first_of_group_first(s, a) for s, a in zip(scores, active, strict=True)]
        num_active = sum(int(x.sum()) for x in active)
        counts = [int(x.sum()) for x in _best_of_all(scores, active, min(terms.num_total, num_active))]
        if terms.num_total > num_active:
            inactive = [~x for x in active]
            grown = _best_of_all([a.grow_GU for a in accounts], inactive, terms.num_total - num_active)
            counts = [n + int(x.sum()) for n, x in zip(counts, grown, strict=True)]
        budgets = []
        for account, num_target in zip(accounts, _even(accounts, counts), strict=True):
            stays_G = torch.minimum(account.active_GU.sum(dim=1), num_target)
            budgets.append(Budget(stays_G - terms.num_dropped(stays_G), num_target))
        return Allocation(tuple(budgets))


global_units = GlobalRank()
lamp = GlobalRank(lamp_scores)


def momentum_share(accounts: Sequence[Account], terms: Terms) -> Allocation:
    """Lets each weight drop its fraction, and grows it where the mean growth score of active units is large.

    With growth by the magnitude of momentum, this is the redistribution of SNFS. A weight that is full leaves
    the rest to the others, by their shares. One that is nearly full, to more than 0.8, and has more than the mean
    share, drops no larger a part than is inactive in it.

    Reference: Dettmers & Zettlemoyer 2019 (SNFS), Algorithm 1; the bound of nearly full weights is that of the authors'
    program. Deviates: shares are whole numbers that add up exactly, where that lets rounding move the density, and what
    a full weight leaves goes by shares, where that hands it out evenly.
    """
    shares = {a.name: float(a.grow_GU[a.active_GU].double().mean()) if a.active_GU.any() else 0.0 for a in accounts}
    mean = sum(shares.values()) / len(accounts)
    kept = {}
    for a in accounts:
        active_G = a.active_GU.sum(dim=1)
        inactive = (a.num_units - int(active_G.sum())) / a.num_units
        is_bound = inactive < 0.2 and shares[a.name] > mean
        own = replace(terms, drop_fraction=min(inactive, terms.drop_fraction)) if is_bound else terms
        kept[a.name] = active_G - own.num_dropped(active_G)
    return _regrow(accounts, terms, kept, shares)


@dataclass(frozen=True)
class AdaptiveThreshold:
    """Drops all that scores below one threshold; regrows in proportion to what survives in each weight.

    The threshold starts at ``initial`` and moves by ``factor`` whenever the number dropped misses the drop
    fraction of all active units by more than ``tolerance``, a share of it. It rises no further than beyond the
    highest score.

    Raises:
        SettingError: A setting is out of range.

    Reference: Mostafa & Wang 2019 (DSR), Algorithm 1. Deviates: at least one unit per group survives.
    """

    initial: float = 1e-3
    tolerance: float = 0.1
    factor: float = 2.0

    def __post_init__(self) -> None:
        require(
            self.initial > 0 and self.tolerance >= 0 and self.factor > 1,
            "settings",
            "AdaptiveThreshold",
            allowed="initial > 0, tolerance ≥ 0, factor > 1",
            given=(self.initial, self.tolerance, self.factor),
            remedy="The paper doubles and halves.",
        )

    def __call__(self, accounts: Sequence[Account], terms: Terms) -> Allocation:
        threshold = terms.memory or self.initial
        active = {a.name: a.active_GU.sum(dim=1) for a in accounts}
        above = {a.name: (a.active_GU & (a.drop_GU >= threshold)).sum(dim=1) for a in accounts}
        kept = {name: torch.minimum(num_G.clamp(min=1), active[name]) for name, num_G in above.items()}
        num_active, num_kept = (sum(int(x.sum()) for x in num.values()) for num in (active, kept))
        wanted = terms.drop_fraction * num_active
        if num_active - num_kept < (1 - self.tolerance) * wanted:
            threshold *= self.factor if any(bool(num_G.any()) for num_G in above.values()) else 1.0
        elif num_active - num_kept > (1 + self.tolerance) * wanted:
            threshold /= self.factor
        survivors = {name: float(num_G.sum()) for name, num_G in kept.items()}
        return Allocation(_regrow(accounts, terms, kept, survivors).budgets, threshold)


@dataclass(frozen=True)
class NeuronAblation:
    """Constant fan-in over the neurons that are worth it; the others lose all their inputs.

    Salient are the n - K largest of the n active weights of a layer, K being floor(f·n), and the K inactive ones that
    would grow first, wherever they sit. A neuron with fewer of them than floor(``min_share`` · k), or with none, is
    ablated; k is the fan-in that all neurons would have. The K weights that are dropped are those of ablated neurons
    and the smallest of the others, whose fan-in rises as far as the layer's number of weights allows. All neurons
    are looked at anew each time, so that one may come back. More stay than are needed to hold the weights, with all
    that are salient alike, whatever ``min_share``; of an output layer, all. Where that is more neurons than weights,
    those with the most salient ones have a weight each. Groups are neurons: for the granularity ``FanIn``.

    With ``ranks_active_gradients``, the K of the gradient are sought among all weights, as in the authors' program.
    One that is active and would stay anyway counts once, so that fewer are salient than in the paper.

    Raises:
        SettingError: ``min_share`` is none.

    Reference: Lasby et al. 2024 (SRigL), section 3: min_share γ = 0.3 for convolutional networks, 0.95 for
    vision transformers.

    >>> weights = torch.tensor([[9.0, 8, 0, 0, 0, 0], [7, 6, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0]])
    >>> gradients = torch.tensor([[0.0, 0, 3, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
    >>> account = Account(name="fc", active_GU=weights > 0, drop_GU=weights, grow_GU=gradients, num_planned=6)
    >>> NeuronAblation(1.0)([account], Terms(num_total=6, drop_fraction=0.34)).budgets[0]
    Budget(num_kept_G=tensor([2, 2, 0]), num_target_G=tensor([3, 3, 0]))
    """

    min_share: float = 0.3
    ranks_active_gradients: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.min_share <= 1,
            "min_share",
            "NeuronAblation",
            allowed="a share in [0, 1]",
            given=self.min_share,
            remedy="0.3 suits convolutional networks, 0.95 transformers.",
        )

    def __call__(self, accounts: Sequence[Account], terms: Terms) -> Allocation:
        return Allocation(tuple(self._budget(account, terms) for account in accounts))

    def _budget(self, account: Account, terms: Terms) -> Budget:
        active_GU, num_active = account.active_GU, account.active_GU.sum()
        num_moved = int(terms.num_dropped(num_active))
        num_kept = int(num_active) - num_moved
        alive_G = self._alive(account, num_kept, num_moved)
        left_GU = active_GU & alive_G[:, None]
        kept_GU = _layer_top(account.drop_GU, left_GU, min(num_kept, int(left_GU.sum())))
        num_target_G = alive_G * (account.num_planned // int(alive_G.sum()))
        return Budget(torch.minimum(kept_GU.sum(dim=1), num_target_G), num_target_G)

    def _alive(self, account: Account, num_kept: int, num_moved: int) -> Tensor:
        """Marks the neurons that stay, not more than there are weights to go round."""
        active_GU, (num_neurons, num_inputs) = account.active_GU, account.active_GU.shape
        candidates_GU = torch.ones_like(active_GU) if self.ranks_active_gradients else ~active_GU
        would_grow_GU = _layer_top(account.grow_GU, candidates_GU, min(num_moved, int(candidates_GU.sum())))
        salient_G = (_layer_top(account.drop_GU, active_GU, num_kept) | would_grow_GU).sum(dim=1)
        num_needed = -(-account.num_planned // num_inputs)  # no neuron takes more than all inputs
        most_first_G = salient_G.sort(descending=True).values
        least = max(1, round_down(self.min_share * (account.num_planned // num_neurons)))
        threshold = 0 if account.is_output else min(least, int(most_first_G[min(num_needed, num_neurons - 1)]))
        worthy_G = salient_G >= threshold
        return _layer_top(salient_G, worthy_G, min(int(worthy_G.sum()), max(account.num_planned, 1)))


def share_out(allocate: Allocator, accounts: Sequence[Account], terms: Terms) -> Allocation:
    """Lets an allocator share out the units of all weights but the idle ones, which keep theirs.

    A weight whose growth scores are all equal, such as an expert that no token has reached, has no say in what its
    units are worth, and would lose them to others for good. It exchanges none and keeps its number; as its own plan
    falls it gives up the same share, and takes more only where the others have no room for a total that rises.
    Output layers get a unit for each output, if there are so many.

    >>> scores = {"reached": torch.tensor([[4.0, 3.0, 0.0]]), "idle": torch.tensor([[2.0, 1.0, 0.0]])}
    >>> accounts = [
    ...     Account(name=name, active_GU=score > 0, drop_GU=score, grow_GU=score * (name == "reached"), num_planned=2)
    ...     for name, score in scores.items()
    ... ]
    >>> terms = Terms(num_total=4, drop_fraction=0.5)
    >>> [int(budget.num_target_G) for budget in momentum_share(accounts, terms).budgets]
    [3, 1]
    >>> [int(budget.num_target_G) for budget in share_out(momentum_share, accounts, terms).budgets]
    [2, 2]
    """
    idle = [account for account in accounts if account.is_idle]
    if not idle:
        return leave_for_outputs(allocate(accounts, terms), accounts)
    awake = [account for account in accounts if not account.is_idle]
    standing = [_standing(a, num) for a, num in zip(idle, _numbers_of_idle(idle, awake, terms), strict=True)]
    if not awake:
        return Allocation(tuple(standing), terms.memory)
    num_left = terms.num_total - sum(int(budget.num_target_G.sum()) for budget in standing)
    num_total = min(num_left, sum(account.num_units for account in awake))  # what does not divide finds no room
    found = leave_for_outputs(allocate(awake, replace(terms, num_total=num_total)), awake)
    budgets = (*standing, *found.budgets)
    if len(found.budgets) == len(awake):  # else it is for the caller to refuse
        place = {account.name: i for i, account in enumerate((*idle, *awake))}
        budgets = tuple(budgets[place[account.name]] for account in accounts)
    return Allocation(budgets, found.memory)


def _numbers_of_idle(idle: Sequence[Account], awake: Sequence[Account], terms: Terms) -> list[int]:
    """Returns how many units each idle weight has, such that the others can meet the rest of the total."""
    wanted = {a.name: _as_planned(a) for a in idle}
    most = terms.num_total - sum(len(a.active_GU) for a in awake)  # one unit per group is left to the others at least
    least = terms.num_total - sum(a.num_units for a in awake)
    num_all = min(max(sum(wanted.values()), least), most)
    floors = {a.name: min(len(a.active_GU), wanted[a.name]) for a in idle}
    return list(apportion(num_all, wanted, {a.name: a.num_units for a in idle}, floors=floors).values())


def _as_planned(account: Account) -> int:
    """Counts the units of a weight that has changed by the same factor as its plan, rounded to the nearest."""
    num_active = int(account.active_GU.sum())
    before = account.num_planned if account.num_planned_before is None else account.num_planned_before
    return min((2 * num_active * account.num_planned + before) // (2 * before), account.num_units)


def _standing(account: Account, num: int) -> Budget:
    """Returns the budget of a weight that exchanges nothing; what does not divide into its live groups is left."""
    num_active_G = account.active_GU.sum(dim=1)
    num_target_G = num_active_G
    if num != int(num_active_G.sum()):
        is_live_G = num_active_G > 0 if num_active_G.any() else num_active_G == 0
        num_target_G = is_live_G * min(num // int(is_live_G.sum()), account.active_GU.shape[1])
    return Budget(torch.minimum(num_active_G, num_target_G), num_target_G)


def _regrow(accounts: Sequence[Account], terms: Terms, kept: dict[str, Tensor], shares: dict[str, float]) -> Allocation:
    """Grows what is missing to the total by these shares, up to all units of a weight.

    Where more is kept than the total allows, each weight gives up in proportion to what it keeps. Each has one unit per
    group at least.
    """
    least = {a.name: len(a.active_GU) for a in accounts}
    stays = {name: int(num_G.sum()) for name, num_G in kept.items()}
    sure = {name: max(num, least[name]) for name, num in stays.items()}
    if sum(sure.values()) > terms.num_total:  # it falls by more than is dropped
        counts = list(apportion(terms.num_total, stays, sure, floors=least).values())
    else:
        caps = {a.name: a.num_units - stays[a.name] for a in accounts}
        floors = {name: num - stays[name] for name, num in sure.items()}
        grown = apportion(terms.num_total - sum(stays.values()), shares, caps, floors=floors)
        counts = [num + grown[name] for name, num in stays.items()]
    return Allocation(
        tuple(
            Budget(torch.minimum(kept[account.name], num_target_G), num_target_G)
            for account, num_target_G in zip(accounts, _even(accounts, counts), strict=True)
        )
    )


def _even(accounts: Sequence[Account], counts: Sequence[int]) -> list[Tensor]:
    """Turns numbers of units per weight into equal quotas of its groups.

    What does not divide goes to weights that can still take one more per group, the largest remainder first.
    """
    groups = [a.active_GU.shape[0] for a in accounts]
    quotas = [n // g for n, g in zip(counts, groups, strict=True)]
    spare = sum(counts) - sum(q * g for q, g in zip(quotas, groups, strict=True))
    by_remainder = sorted(range(len(accounts)), key=lambda i: -(counts[i] % groups[i]) / groups[i])
    for i in by_remainder:
        if counts[i] % groups[i] and quotas[i] < accounts[i].active_GU.shape[1] and groups[i] <= spare:
            quotas[i] += 1
            spare -= groups[i]
    return [torch.full((g,), q, device=a.active_GU.device) for a, g, q in zip(accounts, groups, quotas, strict=True)]


def _best_of_all(scores: Sequence[Tensor], among: Sequence[Tensor], num: int) -> list[Tensor]:
    """Marks the ``num`` highest of all weights together; ties go to the earlier weight, then the lower index."""
    device = among[0].device  # a model may lie on several
    flat, candidates = (torch.cat([x.flatten().to(device) for x in parts])[None] for parts in (scores, among))
    chosen = select_top(flat, torch.tensor([num], device=device), among_GU=candidates)[0]
    parts = chosen.split([x.numel() for x in among])
    return [part.view(x.shape).to(x.device) for part, x in zip(parts, among, strict=True)]


def _layer_top(score_GU: Tensor, among_GU: Tensor, num: int) -> Tensor:
    return _best_of_all([score_GU], [among_GU], num)[0]


def _first_of_group_first(score_GU: Tensor, among_GU: Tensor) -> Tensor:
    """Puts the best candidate of each group ahead of all others, so that no group is left empty."""
    best_G1 = score_GU.masked_fill(~among_GU, -torch.inf).argmax(dim=1, keepdim=True)
    return score_GU.scatter(1, best_G1, torch.inf)


ModelScores = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class AtInit:
    """First masks from scores of all sparse weights together, as a method's ``init``: they say how many each keeps.

    ``scores`` maps the parameters, with zeros where units are gone already, to a score for each entry; None for
    a parameter that it has nothing to say of, which is an error. Over ``rounds`` the density falls
    geometrically to the target, and scores are taken anew each time. What ``allocate`` gives each weight is its
    number from then on. :mod:`dstlib.at_init` makes these from a model.
    """

    name: str
    scores: ModelScores
    rounds: int = 1
    allocate: Allocator = global_units


def falling(num_all: int, num_last: int, rounds: int) -> list[int]:
    """Returns the units left after each round, a geometric sequence that ends exactly at ``num_last``.

    >>> falling(1000, 10, 2)
    [100, 10]
    """
    ratio = num_last / num_all
    return [max(round(num_all * ratio ** (k / rounds)), num_last) for k in range(1, rounds)] + [num_last]
