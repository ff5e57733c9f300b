"""Criteria: from a site to one score per weight; high = keep, high = grow.

A criterion never knows the granularity: scores are averaged over each unit afterwards, so ``magnitude`` is
the L1 norm of a kernel and ``magnitude_l2`` orders kernels by their L2 norm. Criteria of what weights are, of
the gradients that they get, and of chance; of the links that a layer has: ``links.py``.

Shapes: O out, N in with kernel taps.

>>> from dstlib.masking import site_generator
>>> weight, grad = torch.tensor([[3.0, -4.0, 1.0]]), torch.tensor([[0.0, -2.0, 5.0]])
>>> site = Site(name="fc", weight=weight, mask=weight != 0, grad=grad, momentum=None, step=100,
...             generator=site_generator(0, 100, "fc"))
>>> magnitude(site), magnitude_l2(site), gradient(site)
(tensor([[3., 4., 1.]]), tensor([[ 9., 16.,  1.]]), tensor([[0., 2., 5.]]))
>>> sign_balanced(site)
tensor([[1.0000, 1.0000, 0.5000]])
>>> saliency(site), WeightAndGradient(0.5)(site)
(tensor([[0., 8., 5.]]), tensor([[3.0000, 5.0000, 3.5000]]))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.errors import ScoreError, require
from dstlib.masking.counts import round_down
from dstlib.masking.selection import count, select_top
from dstlib.masking.site import Criterion, Site
from dstlib.schedules.curves import Curve


def magnitude(site: Site) -> Tensor:
    """Scores by |w|: the L1 norm of a unit, up to its size."""
    return site.weight.abs()


def magnitude_l2(site: Site) -> Tensor:
    """Scores by w², which orders units by their L2 norm."""
    return site.weight.square()


def gradient(site: Site) -> Tensor:
    """Scores by |g|, of active and inactive weights alike.

    Raises:
        ScoreError: The site has no gradient, as at initialisation.

    Reference: Evci et al. 2020 (RigL), Algorithm 1.
    """
    return _present(site.grad, "gradient", site).abs()


def momentum(site: Site) -> Tensor:
    """Scores by |m|, the optimizer's first moment (SGD's buffer, Adam's exp_avg).

    The moment is masked like the weight, and so tells what to drop, not what to grow: a dense one is gathered
    by a method's trace and read by ``traced_magnitude``.

    Raises:
        ScoreError: The optimizer keeps no moment.

    Reference: Dettmers & Zettlemoyer 2019 (SNFS), where the moment is dense.
    """
    return _present(site.momentum, "momentum", site).abs()


def saliency(site: Site) -> Tensor:
    """Scores by |w·g|: how much the loss would change, to first order, without this weight.

    Raises:
        ScoreError: The site has no gradient.

    Reference: Lee et al. 2019 (SNIP), without its division by the sum, which changes no order; Molchanov et al.
    2019, whose square of it orders alike. Over the elements of a larger unit, deviates from the latter in that
    the mean of |w·g| is taken, where theirs is that of the sum of w·g.
    """
    return moved(site).abs()


@dataclass(frozen=True)
class WeightAndGradient:
    """Scores by |w| + ``factor``·|g|: keeps what is large, and what is about to be.

    Raises:
        SettingError: The factor is negative or infinite.
        ScoreError: The site has no gradient.

    Reference: Yuan et al. 2021 (MEST), where the factor is λ.
    """

    factor: float

    def __post_init__(self) -> None:
        require(
            0 <= self.factor < float("inf"),
            "factor",
            "WeightAndGradient",
            allowed="a number, 0 or more",
            given=self.factor,
            remedy="0.01, say; 0 is magnitude.",
        )

    def __call__(self, site: Site) -> Tensor:
        return _wide(site.weight).abs() + self.factor * _wide(_present(site.grad, "gradient", site)).abs()


def relative_importance(site: Site) -> Tensor:
    """Scores by |w| over the sum of its row plus |w| over that of its column: its share of its output and its input.

    Rows and columns are those of the (O, I·K) matrix of the active weights; inactive weights score 0, and so
    does a row or column of zeros.

    Reference: Zhang et al. 2024 (RIA, "Plug-and-play: an efficient post-training pruning method for large
    language models"), without the factor of activations; as in CHTs (Zhang et al. 2025), equation 1.

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([[8.0, 0.0], [2.0, -2.0]])
    >>> relative_importance(Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...                          generator=site_generator(0, 1, "fc")))
    tensor([[1.8000, 0.0000],
            [0.7000, 1.5000]])
    """
    return relative_shares((_wide(site.weight).abs() * site.mask).flatten(1)).view(site.weight.shape)


def relative_shares(size: Tensor) -> Tensor:
    """Returns each entry's share of its row plus that of its column, of the last two axes of sizes; 0 of nothing.

    >>> relative_shares(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([[1.7500, 0.0000],
            [1.2500, 0.0000]])
    """
    return size / _nonzero(size.sum(dim=-1, keepdim=True)) + size / _nonzero(size.sum(dim=-2, keepdim=True))


def random(site: Site) -> Tensor:
    """Scores by chance, uniformly in [0, 1): every unit is as likely as any other."""
    return site.rand()


@dataclass(frozen=True)
class Drawn:
    """Scores by chance, from any distribution: ``draw(shape, generator)`` says which.

    Called on the CPU, whatever the default device is, and taken in single precision: name the dtype of the draw, as
    torch draws other numbers in another default. Only the numbers that come from the generator are the same on every
    rank and in a resumed run.

    >>> from dstlib.masking import site_generator
    >>> normal = Drawn(lambda shape, generator: torch.randn(shape, generator=generator, dtype=torch.float32))
    >>> site = Site(name="fc", weight=torch.ones(2, 3), mask=torch.ones(2, 3) > 0, grad=None, momentum=None, step=1,
    ...             generator=site_generator(0, 1, "fc"))
    >>> normal(site).shape
    torch.Size([2, 3])
    """

    draw: Callable[[torch.Size, torch.Generator], Tensor]

    def __call__(self, site: Site) -> Tensor:
        with torch.device("cpu"):  # the generator is the CPU's
            scores = self.draw(site.weight.shape, site.generator)
        return scores.to(site.weight.device, torch.float32)


@dataclass(frozen=True)
class AmongSome:
    """Scores a random part of the inactive weights by a criterion, and the others like the lowest of all: not to grow.

    The part is as large as the active weights are many, times ``per_active``, or all that are inactive: both as they
    were before the update dropped anything. Active weights are scored too.

    Raises:
        SettingError: ``per_active`` is no number above 0.

    Reference: Heddes et al. 2024 (GSE), whose subset is drawn uniformly, or by the activations and gradients of outputs
    and inputs; its size is that times the number of active weights, 1 in the published commands.

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    >>> site = Site(name="fc", weight=w, mask=w != 0, grad=torch.arange(6.0)[None], momentum=None, step=1,
    ...             generator=site_generator(0, 1, "fc"))
    >>> AmongSome(gradient)(site)  # two of four
    tensor([[0., 1., 0., 3., 0., 5.]])
    """

    criterion: Criterion
    per_active: float = 1.0

    def __post_init__(self) -> None:
        remedy = "1 looks at as many as are active."
        fits = 0 < self.per_active < float("inf")
        require(fits, "per_active", "AmongSome", allowed="a number above 0", given=self.per_active, remedy=remedy)

    def __call__(self, site: Site) -> Tensor:
        active = site.mask if site.mask_before is None else site.mask_before  # what goes now takes no place in the part
        score, inactive_1N = self.criterion(site), ~active.flatten()[None]
        num_1 = torch.clamp(count(inactive_1N), max=round_down(self.per_active * int(active.sum())))
        some = select_top(site.rand().flatten()[None], num_1, among_GU=inactive_1N).view(active.shape)
        return score.where(some | active, score.min())


def sign_balanced(site: Site) -> Tensor:
    """Scores by the position of |w| among the active weights of the same sign, so that both lose the same share.

    The highest of n positive weights scores 1, the lowest 1/n, and likewise the negative ones; zeros score
    0 and go first.

    Reference: Mocanu et al. 2018 (SET): the smallest positive and the largest negative weights are removed.
    Deviates in that the shares are of one common count, floor(ζ·A), and so may differ by one weight.
    """
    w = site.weight.flatten()
    score = torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
    for of_sign in ((w > 0), (w < 0)):
        index = (of_sign & site.mask.flatten()).nonzero()[:, 0]
        best_first = index[w[index].abs().argsort(descending=True, stable=True)]
        position = torch.arange(len(index), device=w.device, dtype=score.dtype)
        score[best_first] = 1 - position / max(len(index), 1)
    return score.view(site.weight.shape)


def plain_gradient(site: Site) -> Tensor:
    """Returns g with its sign: what a trace adds up, for a mean over steps or a momentum. Not a copy.

    Raises:
        ScoreError: The site has no gradient.
    """
    return _present(site.grad, "gradient", site)


def moved(site: Site) -> Tensor:
    """Returns -w·g, which a trace adds up to follow movement: positive where descent leads away from zero.

    Raises:
        ScoreError: The site has no gradient.

    Reference: Sanh et al. 2020 (movement pruning): S = -Σ w·∂L/∂w, without the learning rate, which
    changes no order while it is constant.
    """
    return -_wide(site.weight) * _wide(_present(site.grad, "gradient", site))


def traced(site: Site) -> Tensor:
    """Scores by what the method's trace has gathered, with its sign. Of ``moved``: keeps what moves away from zero.

    Raises:
        ScoreError: The method has no trace.

    Reference: Sanh et al. 2020 (movement pruning), with ``Trace(of=moved)``.
    """
    return _present(site.trace, "trace", site, _NO_TRACE)


def traced_magnitude(site: Site) -> Tensor:
    """Scores by |trace|: of the gradient, a mean over steps or a momentum that inactive weights have too.

    Raises:
        ScoreError: The method has no trace.

    Reference: Dettmers & Zettlemoyer 2019 (SNFS), whose momentum is dense; Evci et al. 2020 (RigL), with a
    gradient averaged over steps.
    """
    return traced(site).abs()


_NO_GRADIENT = "Use a criterion that does without it, such as magnitude or random."
_NO_TRACE = "Give the method a trace, replace(method, trace=Trace(steps=8)), say; the first masks know none."


def _present(value: Tensor | None, what: str, site: Site, remedy: str = _NO_GRADIENT) -> Tensor:
    if value is None:
        where = f"{site.name} at step {site.step}"
        raise ScoreError.of(what, where, allowed="a tensor", given=None, remedy=remedy)
    return value


def _wide(x: Tensor) -> Tensor:
    """Converts to single precision at least: products of half-precision numbers leave its range."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nonzero(x: Tensor) -> Tensor:
    return x.where(x != 0, torch.ones_like(x))


@dataclass(frozen=True)
class TiesByChance:
    """Scores by a criterion, and at random among the weights that it scores alike, in single precision.

    Otherwise ties go to the lower index. For criteria of few values, of which links are the example: thousands of
    pairs have the same paths, or none, and all growth would be the first outputs'.

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([1.0, 2.0, 2.0, 2.0]).repeat(900, 1)
    >>> site = Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...             generator=site_generator(0, 1, "fc"))
    >>> TiesByChance(magnitude)(site).argmax(dim=1).bincount()  # about 300 each of the last three
    tensor([  0, 293, 295, 312])
    """

    criterion: Criterion

    def __call__(self, site: Site) -> Tensor:
        score = self.criterion(site).float().double()
        size = score.abs()
        least = size.masked_fill(size == 0, torch.inf).min().clamp(max=1.0)
        chance = torch.rand(score.shape, generator=site.generator, dtype=torch.float64, device="cpu").to(score.device)
        # neighbours in single precision lie at least 2^-24 of the larger one apart
        return score + 2.0**-25 * size.where(size > 0, least) * chance


# Selection by chance: keys whose highest are drawn, or whose lowest are removed, with odds of your choice. A race
# decides. Each unit is given an exponential waiting time of a rate of its own; the order of arrival is the order of
# draws without replacement, each draw with probability proportional to the rate among what is left (the minimum of
# exponentials, and their lack of memory, say so). The logarithms of the times serve as keys.
#
#  - ``Sampled`` draws what stays or grows: rate score^exponent, the highest key for the first to arrive.
#  - ``SampledRemoval`` draws what goes: rate score^-exponent, the lowest key for the first to arrive.
#
# The two differ. To keep by draws protects the high scores, to remove by draws exposes the low ones. Either holds
# within any set of candidates, such as the active weights of an update, and for any number drawn. Units of one weight
# are drawn exactly. Over the elements of larger units, keys are averaged as all scores are: chance still, but the
# probabilities are not the ones above.
#
# Each call draws from the site's generator, after the criterion has: a drop and a grow criterion of one update see the
# same site and draw different numbers, in that order; the same seed, step and name draw the same again.

_MOST = 1e6  # of an exponent; keys stay exact to 1e-7


@dataclass(frozen=True)
class Sampled:
    """Scores such that the k highest are k draws without replacement, with probability ∝ criterion^``exponent``.

    ``exponent`` is a number or a curve of the site's progress: 0 draws uniformly, and the higher, the closer to
    the criterion's own order. Scores of 0 come after all others, among themselves by chance; but 0^0 is 1.

    Raises:
        ScoreError: The criterion's scores are negative or not finite.
        SettingError: The exponent lies outside [0, 1e6].

    Reference: Efraimidis & Spirakis 2006, algorithm A; Kool et al. 2019 (Gumbel top-k). Zhang et al. 2025
    (CHTs), section 3.1: links are kept by draws with probability ∝ score^T, and grown ∝ score. Deviates in that
    links without a score are grown, by chance, only once no others are left: in the authors' code, where there are
    too few others, all scores rise by 1e-5.

    >>> from dstlib.masking import magnitude, site_generator
    >>> w = torch.tensor([5.0, 0.0, 1.0, 3.0]).repeat(900, 1)  # a draw in each row
    >>> site = Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...             generator=site_generator(0, 1, "fc"))
    >>> Sampled(magnitude)(site).argmax(dim=1).bincount()  # about 500, 0, 100, 300
    tensor([474,   0, 103, 323])
    """

    criterion: Criterion
    exponent: Curve | float = 1.0

    def __call__(self, site: Site) -> Tensor:
        return _keys(site, self.criterion, self.exponent, sign=-1)


@dataclass(frozen=True)
class SampledRemoval:
    """Scores such that the k lowest are k removals without replacement, with probability ∝ criterion^-``exponent``.

    ``exponent`` is a number or a curve of the site's progress: 0 removes uniformly, and the higher, the closer
    to the criterion's own order. Scores of 0 go before all others, among themselves by chance; but 0^0 is 1.

    Raises:
        ScoreError: The criterion's scores are negative or not finite.
        SettingError: The exponent lies outside [0, 1e6].

    Reference: as :class:`Sampled`, turned round. Not what CHTs does, which draws what it keeps.
    """

    criterion: Criterion
    exponent: Curve | float = 1.0

    def __call__(self, site: Site) -> Tensor:
        return _keys(site, self.criterion, self.exponent, sign=1)


def _keys(site: Site, criterion: Criterion, exponent: Curve | float, *, sign: int) -> Tensor:
    """Returns log score^exponent + ``sign`` · log waiting time, and below all of them, by chance, scores of 0.

    In double precision: ten million keys tie too often in single.
    """
    score, where = criterion(site).double(), f"{site.name} at step {site.step}"
    if num_unfit := int((~(score >= 0) | ~score.isfinite()).sum()):
        raise ScoreError.of(
            "scores to draw by",
            where,
            allowed="finite numbers, 0 or more",
            given=f"{num_unfit} that are not",
            remedy="Draw by a criterion that is never negative, such as magnitude.",
        )
    power = exponent(site.progress) if callable(exponent) else exponent
    remedy = "Beyond, chance has no say: use the criterion itself."
    fits = 0 <= power <= _MOST
    require(fits, "exponent", where, allowed=f"a number in [0, {_MOST:g}]", given=power, remedy=remedy)
    is_zero = (score == 0) & (power > 0)
    uniform = torch.rand(site.weight.shape, generator=site.generator, dtype=torch.float64, device="cpu")
    # logarithms of exponential waiting times of rate 1, in [-37, 3.7]
    log_time = uniform.clamp_(min=2.0**-54).log_().neg_().log_().to(site.weight.device)
    key = power * score.where(score > 0, torch.ones_like(score)).log() + sign * log_time
    lowest = key.masked_fill(is_zero, 0.0).min()
    return torch.where(is_zero, lowest - 4 + log_time, key)
