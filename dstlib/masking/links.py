"""Link prediction: which missing links of a layer the links that it has make likely.

A mask is a bipartite graph of O outputs and N = I·K inputs. Two nodes u and v of opposite sides, a missing link,
are as likely to be linked as the paths of three links u - a - b - v between them tell. No weight and no gradient
has a say.

A link that is there is scored as if it alone were not, so that one that an update drops competes with the others
on equal terms to grow back. The other dropped links still count: a criterion sees the mask before the update.
Sums are in double precision and rounded to single at the end, so that scores that are equal in theory tie, on
every device. Pairs without a path score 0, and ties go to the lower index; ``Sampled`` leaves them to chance.

Shapes: O out, N in with kernel taps; S one side of the graph and T the other; R some rows of S.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dstlib.masking.site import Site

_CHUNK = 2**20  # numbers in one transient matrix: 8 MiB, of which half a dozen live at once


def link_prediction(site: Site) -> Tensor:
    """Cannistraci-Hebb, CH2-L3n: Σ_z (1 + di_z) / (1 + de_z) over the nodes z between u and v.

    The local community of (u, v) are all a and b on paths u - a - b - v. Of a node z in it, di_z links stay
    within the community, and de_z lead neither there nor to u and v.

    Reference: Zhang et al. 2025 (CHTs, "Brain network science modelling of sparse neural networks enables
    Transformers and LLMs to perform as fully connected", arXiv:2501.19107), section 3.1 and appendix C;
    internal and external links as in Muscoloni et al. 2018 (bioRxiv 346916). With both increments of 1, as in the
    paper and in the authors' code for language models; their code for perceptrons lacks that of di. CHT (Zhang
    et al. 2024) has the path-based CH3-L3p instead, whose cost grows with the cube of the degree. The kernel
    taps of a convolution count as inputs of their own, where the papers have linear layers only.

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])  # the chain of input 0, output 0, input 1, ...
    >>> link_prediction(Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...                      generator=site_generator(0, 1, "fc")))
    tensor([[0., 0., 4.],
            [4., 0., 0.]])
    """
    linked_ON = site.mask.flatten(1).double()
    score_ON = _communities(linked_ON) + _communities(linked_ON.T).T
    return score_ON.float().view(site.mask.shape)


def link_prediction_l3(site: Site) -> Tensor:
    """Paths of three links, normalised by degree: Σ 1/√(k_a·k_b) over the paths u - a - b - v.

    Reference: Kovács et al. 2019, "Network-based prediction of protein interactions", equation 1. The same as
    RA-L3 in the terms of Muscoloni et al. 2018.

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> link_prediction_l3(Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...                         generator=site_generator(0, 1, "fc")))
    tensor([[0.0000, 0.0000, 0.5000],
            [0.5000, 0.0000, 0.0000]])
    """
    linked_ON = site.mask.flatten(1).double()
    num_out, num_in = linked_ON.shape
    # the middle of a path is a pair of the same side: of the smaller one, as there are fewer
    score_ON = _paths(linked_ON) if num_out <= num_in else _paths(linked_ON.T).T
    return score_ON.float().view(site.mask.shape)


def _communities(linked_ST: Tensor) -> Tensor:
    """The part of the sum for z on the side S: the neighbours of v, other than u, that have one in common with u.

    Of z, what it has in common with u is in the community, so di_z and de_z depend on u and z alone.
    """
    degree_S = linked_ST.sum(dim=1)
    score_ST = torch.empty_like(linked_ST)
    for rows in _chunks(len(linked_ST)):
        linked_RT = linked_ST[rows]
        common_RS = linked_RT @ linked_ST.T
        common_RS.diagonal(rows.start).zero_()  # z is not u itself
        # no link u - v: di = common, de = k - common - 1, the 1 being z - v; 0 would mean that u - v is a link
        missing_RS = ((1 + common_RS) / (degree_S - common_RS).clamp(min=1)) * (common_RS > 0)
        # a link u - v, taken away: v was in common, so di = common - 1 and de = k - common
        present_RS = common_RS / (1 + degree_S - common_RS) * (common_RS > 1)
        score_ST[rows] = torch.where(linked_RT > 0, present_RS @ linked_ST, missing_RS @ linked_ST)
    return score_ST


def _paths(linked_ST: Tensor) -> Tensor:
    """Σ over a of the side T and b of the side S."""
    rate_S, rate_T = (linked_ST.sum(dim=axis).clamp(min=1) ** -0.5 for axis in (1, 0))
    by_S_ST = linked_ST * rate_S[:, None]
    # where u - v is a link, v - b is one for each neighbour b of v, and u - v - b - v is no path
    back_ST = linked_ST * rate_T * (by_S_ST.sum(dim=0) - by_S_ST)
    score_ST = torch.empty_like(linked_ST)
    for rows in _chunks(len(linked_ST)):
        common_RS = (linked_ST[rows] * rate_T) @ linked_ST.T
        common_RS.diagonal(rows.start).zero_()  # b is not u itself
        score_ST[rows] = common_RS @ by_S_ST
    # rounding leaves 1e-12 of what cancels; the rarest path, 1/√(S·T), is far more than 1e-9 of all of them
    left_ST = score_ST - back_ST
    return left_ST.where(left_ST > 1e-9 * score_ST, torch.zeros_like(left_ST))


def _chunks(num_rows: int) -> Iterator[slice]:
    """Rows of a square matrix, in pieces of bounded size."""
    step = max(_CHUNK // max(num_rows, 1), 1)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
