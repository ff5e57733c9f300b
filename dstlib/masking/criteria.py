"""Criteria: from a site to one score per weight; high = keep, high = grow.

A criterion never knows the granularity: scores are averaged over each unit afterwards, so ``magnitude`` is
the L1 norm of a kernel and ``magnitude_l2`` orders kernels by their L2 norm.

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

from dstlib.errors import ScoreError, SettingError
from dstlib.masking.site import Site


def magnitude(site: Site) -> Tensor:
    """|w|: the L1 norm of a unit, up to its size."""
    return site.weight.abs()


def magnitude_l2(site: Site) -> Tensor:
    """w²: orders units by their L2 norm."""
    return site.weight.square()


def gradient(site: Site) -> Tensor:
    """|g|, of active and inactive weights alike.

    Errors: ScoreError where the site has no gradient, as at initialisation.

    Reference: Evci et al. 2020 (RigL), Algorithm 1.
    """
    return _present(site.grad, "gradient", site).abs()


def momentum(site: Site) -> Tensor:
    """|m|, the optimizer's first moment (SGD's buffer, Adam's exp_avg).

    The moment is masked like the weight, and so tells what to drop, not what to grow: a dense one is gathered
    by a method's trace and read by ``traced_magnitude``.

    Errors: ScoreError where the optimizer keeps no moment.

    Reference: Dettmers & Zettlemoyer 2019 (SNFS), where the moment is dense.
    """
    return _present(site.momentum, "momentum", site).abs()


def saliency(site: Site) -> Tensor:
    """|w·g|: how much the loss would change, to first order, without this weight.

    Errors: ScoreError where the site has no gradient.

    Reference: Lee et al. 2019 (SNIP), without its division by the sum, which changes no rank; Molchanov et al.
    2019, whose square of it ranks alike. Over the elements of a larger unit, deviates from the latter in that
    the mean of |w·g| is taken, where theirs is that of the sum of w·g.
    """
    return moved(site).abs()


@dataclass(frozen=True)
class WeightAndGradient:
    """|w| + ``factor``·|g|: keeps what is large, and what is about to be.

    Errors: SettingError for a negative or infinite factor; ScoreError where the site has no gradient.

    Reference: Yuan et al. 2021 (MEST), where the factor is λ.
    """

    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.factor < float("inf"):
            raise SettingError.of(
                "factor",
                "WeightAndGradient",
                allowed="a number, 0 or more",
                given=self.factor,
                remedy="0.01, say; 0 is magnitude.",
            )

    def __call__(self, site: Site) -> Tensor:
        return _wide(site.weight).abs() + self.factor * _wide(_present(site.grad, "gradient", site)).abs()


def relative_importance(site: Site) -> Tensor:
    """|w| over the sum of its row, plus |w| over the sum of its column: the share of its output and of its input.

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
    size_ON = (_wide(site.weight).abs() * site.mask).flatten(1)
    share_ON = size_ON / _nonzero(size_ON.sum(dim=1, keepdim=True)) + size_ON / _nonzero(size_ON.sum(dim=0))
    return share_ON.view(site.weight.shape)


def random(site: Site) -> Tensor:
    """Uniform in [0, 1): every unit is as likely as any other."""
    return site.rand()


@dataclass(frozen=True)
class Drawn:
    """Random scores of any distribution: ``draw(shape, generator)`` says which.

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


def sign_balanced(site: Site) -> Tensor:
    """Ranks |w| among the active weights of the same sign, so that both signs lose the same share.

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
        place = torch.arange(len(index), device=w.device, dtype=score.dtype)
        score[best_first] = 1 - place / max(len(index), 1)
    return score.view(site.weight.shape)


def plain_gradient(site: Site) -> Tensor:
    """g with its sign: what a trace adds up, for a mean over steps or a momentum. Not a copy.

    Errors: ScoreError where the site has no gradient.
    """
    return _present(site.grad, "gradient", site)


def moved(site: Site) -> Tensor:
    """-w·g: what a trace adds up to follow movement; positive where descent takes the weight away from zero.

    Errors: ScoreError where the site has no gradient.

    Reference: Sanh et al. 2020 (movement pruning): S = -Σ w·∂L/∂w, without the learning rate, which
    changes no rank while it is constant.
    """
    return -_wide(site.weight) * _wide(_present(site.grad, "gradient", site))


def traced(site: Site) -> Tensor:
    """What the method's trace has gathered, with its sign. Of ``moved``: keeps what moves away from zero.

    Errors: ScoreError where the method has no trace.

    Reference: Sanh et al. 2020 (movement pruning), with ``Trace(of=moved)``.
    """
    return _present(site.trace, "trace", site, _NO_TRACE)


def traced_magnitude(site: Site) -> Tensor:
    """|trace|: of the gradient, a mean over steps or a momentum that inactive weights have too.

    Errors: ScoreError where the method has no trace.

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
    """In single precision at least: products of half-precision numbers leave its range."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nonzero(x: Tensor) -> Tensor:
    return x.where(x != 0, torch.ones_like(x))
