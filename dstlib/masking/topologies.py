"""First masks from network science: outputs that are linked to inputs near them, with as much chance as is asked for.

Both sides of a layer lie on a ring, output o of O above input o·N/O of N; distances are counted along the inputs. A
method's ``init`` takes these for any number of links; from the same seed, step and name they draw the same.

Shapes: O out, N in with kernel taps.

>>> from dstlib.masking import site_generator
>>> site = Site(name="fc", weight=torch.ones(4, 8), mask=torch.ones(4, 8) > 0, grad=None, momentum=None, step=0,
...             generator=site_generator(0, 0, "fc"), num_target=12)
>>> score = ReceptiveField(0.0)(site)  # the 12 highest: three each, around inputs 0, 2, 4 and 6
>>> (score >= score.flatten().topk(12).values[-1]).int()
tensor([[1, 1, 0, 0, 0, 0, 0, 1],
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.errors import require
from dstlib.masking.site import Site


@dataclass(frozen=True)
class ReceptiveField:
    """Links each output to inputs drawn with probability ∝ (1 + distance)^-((1 - r) / r), without replacement.

    ``r`` = 0 takes the nearest, ``r`` = 1 any. All outputs have the same number of links, but for one where it does not
    divide; without ``equal``, each has one, and the others fall to outputs by chance.

    Raises:
        SettingError: ``r`` lies outside [0, 1].

    Reference: Zhang et al. 2025 (CHTs, arXiv:2501.19107), section 3.2 and appendix D: the bipartite receptive field
    with fixed and with uniform sampling of degrees; the distance as in the authors' code for language models, whose
    degrees are those of the smaller side, where the paper has those of the outputs. The kernel taps of a convolution
    count as inputs of their own, where the paper has linear layers only.
    """

    r: float
    equal: bool = True

    def __post_init__(self) -> None:
        _check_share("r", self.r, "ReceptiveField", "0.25 did best for perceptrons in the paper.")

    def __call__(self, site: Site) -> Tensor:
        near_ON = _nearness(site)
        if self.r > 0:  # draws come in the order of arrival of waiting times with these rates
            near_ON = (1 - self.r) / self.r * ((near_ON + 1) // 2).log1p() + _waiting(site).log()
        late_ON = _places(near_ON)
        if self.equal:
            late_ON += _uniform(site)[:, :1]  # of outputs with as many links, some get one more
        else:  # a first link each, then they arrive at all outputs at the same rate
            first_ON, times_ON = _uniform(site) - 1, _waiting(site)
            times_ON[:, 0] = 0.0
            times_ON = times_ON.cumsum(dim=1)
            times_ON[:, 0] = first_ON[:, 0]
            late_ON = times_ON.gather(1, late_ON.long())
        return -late_ON.view(site.weight.shape).to(site.weight.device)


@dataclass(frozen=True)
class SmallWorld:
    """Links each output to the nearest inputs; then each link goes, with probability ``beta``, to any missing pair.

    All outputs have the same number of links at first, but for one where it does not divide. ``beta`` = 1 is chance
    alone, an Erdős-Rényi graph.

    Raises:
        SettingError: ``beta`` lies outside [0, 1].

    Reference: Watts & Strogatz 1998, for two sides: the bipartite small world of Zhang et al. 2024 (CHT) and 2025
    (CHTs, arXiv:2501.19107), appendix D. Deviates: windows of the outputs' degree alone, where the authors' code for
    CHT takes half of the links from either side.
    """

    beta: float

    def __post_init__(self) -> None:
        _check_share("beta", self.beta, "SmallWorld", "0.25 is what the paper takes for perceptrons.")

    def __call__(self, site: Site) -> Tensor:
        num_links = int(site.mask.sum()) if site.num_target is None else site.num_target
        late_ON = _places(_nearness(site)) + _uniform(site)[:, :1]
        is_near_ON = torch.zeros(late_ON.shape, dtype=torch.bool, device="cpu")
        is_near_ON.view(-1)[late_ON.flatten().argsort()[:num_links]] = True
        stays_ON = is_near_ON & (_uniform(site) >= self.beta)
        return (stays_ON + _uniform(site)).view(site.weight.shape).to(site.weight.device)


def _check_share(name: str, value: float, where: str, remedy: str) -> None:
    require(0 <= value <= 1, name, where, allowed="a number in [0, 1]", given=value, remedy=remedy)


def _nearness(site: Site) -> Tensor:
    """Returns twice the distance of each input from each output's place on the ring, less 1 to the left: no ties."""
    num_out, num_in = site.weight.shape[0], site.weight[0].numel()
    place_O1 = torch.arange(num_out, device="cpu")[:, None] * num_in // num_out
    right_ON = (torch.arange(num_in, device="cpu") - place_O1) % num_in
    left_ON = num_in - right_ON
    return torch.where(right_ON < left_ON, 2 * right_ON, 2 * left_ON - 1).double()


def _places(key_ON: Tensor) -> Tensor:
    """Returns the place of each key in its row, from 0 for the lowest."""
    return key_ON.argsort(dim=1).argsort(dim=1).double()


def _uniform(site: Site) -> Tensor:
    shape = (site.weight.shape[0], site.weight[0].numel())
    return torch.rand(shape, generator=site.generator, dtype=torch.float64, device="cpu")


def _waiting(site: Site) -> Tensor:
    """Draws exponential waiting times of rate 1."""
    return _uniform(site).clamp_(min=2.0**-54).log_().neg_()
