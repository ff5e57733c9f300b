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
"""

import torch
from torch import Tensor

from dstlib.errors import ScoreError, explain
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

    The moment is masked like the weight, so it can tell what to drop, not what to grow.

    Errors: ScoreError where the optimizer keeps no moment.

    Reference: Dettmers & Zettlemoyer 2019 (SNFS).
    """
    return _present(site.momentum, "momentum", site).abs()


def random(site: Site) -> Tensor:
    """Uniform in [0, 1): every unit is as likely as any other."""
    return site.rand()


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


def _present(value: Tensor | None, what: str, site: Site) -> Tensor:
    if value is None:
        raise ScoreError(
            explain(
                what,
                f"{site.name} at step {site.step}",
                allowed="a tensor",
                given=None,
                remedy="Use a criterion that does without it, such as magnitude or random.",
            )
        )
    return value
