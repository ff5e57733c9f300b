"""Selection by chance: keys whose highest are drawn, or whose lowest are removed, by weights of your choice.

A race decides. Each unit is given an exponential waiting time of a rate of its own; the order of arrival is the
order of draws without replacement, each draw with probability proportional to the rate among what is left
(the minimum of exponentials, and their lack of memory, say so). The logarithms of the times serve as keys.

 - ``Sampled`` draws what stays or grows: rate score^exponent, the highest key for the first to arrive.
 - ``SampledRemoval`` draws what goes: rate score^-exponent, the lowest key for the first to arrive.

The two differ. To keep by draws protects the high scores, to remove by draws exposes the low ones. Either holds
within any set of candidates, such as the active weights of an update, and for any number drawn.

Units of one weight are drawn exactly. Over the elements of larger units, keys are averaged as all scores are:
chance still, but the probabilities are not the ones above.

Each call draws from the site's generator, after the criterion has: a drop and a grow criterion of one update see
the same site and draw different numbers, in that order; the same seed, step and name draw the same again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.errors import ScoreError, SettingError
from dstlib.masking.site import Criterion, Site
from dstlib.schedules.curves import Curve

_MOST = 1e6  # of an exponent; keys stay exact to 1e-7


@dataclass(frozen=True)
class Sampled:
    """The k highest keys are k draws without replacement, with probability ∝ criterion^``exponent``.

    ``exponent`` is a number or a curve of the site's progress: 0 draws uniformly, and the higher, the closer to
    the criterion's own order. Scores of 0 come after all others, among themselves by chance; but 0^0 is 1.

    Errors: ScoreError for scores that are negative or not finite; SettingError for an exponent outside [0, 1e6].

    Reference: Efraimidis & Spirakis 2006, algorithm A; Kool et al. 2019 (Gumbel top-k). Zhang et al. 2025
    (CHTs), section 3.1: links are kept by draws with probability ∝ score^(δ/(1 - δ)), δ growing from 0.5 to
    0.75, hence ``Sampled(magnitude, Linear(1, 3))``, and grown ∝ score. Deviates in that links without a score
    are grown by chance only once no others are left.

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
    """The k lowest keys are k removals without replacement, with probability ∝ criterion^-``exponent``.

    ``exponent`` is a number or a curve of the site's progress: 0 removes uniformly, and the higher, the closer
    to the criterion's own order. Scores of 0 go before all others, among themselves by chance; but 0^0 is 1.

    Errors: ScoreError for scores that are negative or not finite; SettingError for an exponent outside [0, 1e6].

    Reference: as :class:`Sampled`, turned round. Not what CHTs does, which draws what it keeps.
    """

    criterion: Criterion
    exponent: Curve | float = 1.0

    def __call__(self, site: Site) -> Tensor:
        return _keys(site, self.criterion, self.exponent, sign=1)


def _keys(site: Site, criterion: Criterion, exponent: Curve | float, *, sign: int) -> Tensor:
    """log score^exponent + ``sign`` · log waiting time, and below all of them, by chance, scores of 0.

    In double precision: ten million keys tie too often in single.
    """
    score = _scores(site, criterion)
    power = _power(site, exponent)
    is_zero = (score == 0) & (power > 0)
    log_time = _log_time(site)
    key = power * score.where(score > 0, torch.ones_like(score)).log() + sign * log_time
    lowest = key.masked_fill(is_zero, 0.0).min()
    return torch.where(is_zero, lowest - 4 + log_time, key)  # log_time is below 4


def _scores(site: Site, criterion: Criterion) -> Tensor:
    score = criterion(site).double()
    is_fit = (score >= 0) & score.isfinite()
    if not bool(is_fit.all()):
        raise ScoreError.of(
            "scores to draw by",
            f"{site.name} at step {site.step}",
            allowed="finite numbers, 0 or more",
            given=f"{int((~is_fit).sum())} that are not",
            remedy="Draw by a criterion that is never negative, such as magnitude.",
        )
    return score


def _power(site: Site, exponent: Curve | float) -> float:
    power = exponent(site.progress) if callable(exponent) else exponent
    if not 0 <= power <= _MOST:
        raise SettingError.of(
            "exponent",
            f"{site.name} at step {site.step}",
            allowed=f"a number in [0, {_MOST:g}]",
            given=power,
            remedy="Beyond, chance has no say: use the criterion itself.",
        )
    return power


def _log_time(site: Site) -> Tensor:
    """Logarithms of exponential waiting times of rate 1: in [-37, 3.7]."""
    uniform = torch.rand(site.weight.shape, generator=site.generator, dtype=torch.float64, device="cpu")
    return uniform.clamp_(min=2.0**-54).log_().neg_().log_().to(site.weight.device)
