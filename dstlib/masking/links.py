"""Link prediction: which missing links of a layer the links that it has make likely.

A mask is a bipartite graph of O outputs and N = I·K inputs. Two nodes u and v of opposite sides, a missing link, are as
likely to be linked as the paths of three links u - a - b - v between them tell. No weight and no gradient has a say.
As growth criteria these see what an update has kept: links are removed first, then predicted from what is left.

Only missing links are scored; those that are there score 0, as do pairs without a path. Scores that are equal in theory
tie, on every device: sums are in double precision and rounded to single at the end. Ties are many, and by themselves go
to the lower index, all to the first outputs: ``TiesByChance`` and ``Sampled`` leave them to chance.

Shapes: O out, N in with kernel taps; S one side of the graph and T the other; R some nodes of S.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dstlib.masking.site import Site

_CHUNK = 2**20  # numbers in one transient matrix: 8 MiB, of which half a dozen live at once


def link_prediction(site: Site) -> Tensor:
    """Scores by Cannistraci-Hebb, CH2-L3n: Σ_z (1 + di_z) / (1 + de_z) over the nodes z between u and v.

    The local community of (u, v) are all a and b on paths u - a - b - v. Of a node z in it, di_z links stay
    within the community, and de_z lead neither there nor to u and v.

    Reference: Zhang et al. 2025 (CHTs, "Brain network science modelling of sparse neural networks enables
    Transformers and LLMs to perform as fully connected", arXiv:2501.19107), section 3.1 and appendices C and K;
    internal and external links as in Muscoloni et al. 2018 (bioRxiv 346916). With both increments of 1, as in the
    paper and in the authors' code for language models; their code for perceptrons lacks that of di. The kernel
    taps of a convolution count as inputs of their own, where the papers have linear layers only.

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])  # the chain of input 0, output 0, input 1, ...
    >>> link_prediction(Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...                      generator=site_generator(0, 1, "fc")))
    tensor([[0., 0., 4.],
            [4., 0., 0.]])
    """
    return _of_missing(site, lambda linked_ON: _communities(linked_ON) + _communities(linked_ON.T).T)


def link_prediction_by_paths(site: Site) -> Tensor:
    """Scores by Cannistraci-Hebb, CH3-L3p: Σ 1/√((1 + de_a)(1 + de_b)) over the paths u - a - b - v.

    de_z counts the links of z that lead neither to the local community of (u, v), all nodes on such paths, nor to u
    and v themselves. What it costs grows with the cube of the degree, per node: for layers of few links; for others
    ``link_prediction`` was made, by the same authors.

    Reference: Zhang et al. 2024 (CHT, "Epitopological learning and Cannistraci-Hebb network shape intelligence
    brain-inspired theory for ultra-sparse advantage in deep learning"); appendix C of Zhang et al. 2025 (CHTs).

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    >>> link_prediction_by_paths(Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...                               generator=site_generator(0, 1, "fc")))
    tensor([[0.0000, 0.0000, 0.7071, 0.7071],
            [1.0000, 0.0000, 0.0000, 0.0000]])
    """
    return _of_missing(site, _by_fewer(_externals))


def link_prediction_l3(site: Site) -> Tensor:
    """Scores by paths of three links, normalised by degree: Σ 1/√(k_a·k_b) over the paths u - a - b - v.

    Reference: Kovács et al. 2019, "Network-based prediction of protein interactions", equation 1. The same as
    RA-L3 in the terms of Muscoloni et al. 2018.

    >>> from dstlib.masking import site_generator
    >>> w = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> link_prediction_l3(Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=1,
    ...                         generator=site_generator(0, 1, "fc")))
    tensor([[0.0000, 0.0000, 0.5000],
            [0.5000, 0.0000, 0.0000]])
    """
    return _of_missing(site, _by_fewer(_paths))


_Scores = Callable[[Tensor], Tensor]  # of the missing links of a graph, (S, T) → (S, T); of the others anything finite


def _of_missing(site: Site, scores: _Scores) -> Tensor:
    linked_ON = site.mask.flatten(1)
    score_ON = scores(linked_ON.double()).masked_fill_(linked_ON, 0.0)
    return score_ON.float().view(site.mask.shape)


def _by_fewer(scores: _Scores) -> _Scores:
    """Has the smaller side come first, where the side does not matter to what is computed."""
    return lambda linked_ON: scores(linked_ON) if len(linked_ON) <= len(linked_ON.T) else scores(linked_ON.T).T


def _communities(linked_ST: Tensor) -> Tensor:
    """Sums over z on the side S: the neighbours of v, other than u, that have one in common with u.

    Of z, what it has in common with u is in the community, so di_z and de_z depend on u and z alone.
    """
    degree_S1 = linked_ST.sum(dim=1, keepdim=True)
    times_ST, times_TS = _factor(linked_ST), _factor(linked_ST.T)
    score_ST = torch.empty_like(linked_ST)
    for rows in _chunks(len(linked_ST)):
        common_SR = times_ST @ linked_ST[rows].T.contiguous()
        # di = common, de = k - common - 1, the 1 being z - v; k - common is 0 where u - v is a link, only
        external_SR = (degree_S1 - common_SR).clamp_(min=1)
        score_ST[rows] = (times_TS @ common_SR.add_(common_SR.sign()).div_(external_SR)).T
    return score_ST


def _externals(linked_ST: Tensor) -> Tensor:
    """Sums over b of the side S and a of the side T: de_a depends on a and v alone, de_b on b and u alone."""
    linked_TS = linked_ST.T.contiguous()
    degree_S, degree_T1 = linked_ST.sum(dim=1), linked_ST.sum(dim=0)[:, None]
    common_SS = _factor(linked_ST) @ linked_TS
    score_TS = torch.zeros_like(linked_TS)
    for b in range(len(linked_ST)):
        v = linked_ST[b].nonzero()[:, 0]  # and a, as both are neighbours of b
        linked_aS = linked_TS[v]
        rate_va = (degree_T1[v].T - linked_aS @ linked_aS.T).clamp_(min=1).rsqrt_()
        rate_S = (degree_S[b] - common_SS[b]).clamp_(min=1).rsqrt_()
        score_TS.index_add_(0, v, (rate_va @ linked_aS).mul_(rate_S))
    return score_TS.T


def _paths(linked_ST: Tensor) -> Tensor:
    """Sums over a of the side T and b of the side S; of the smaller one there are fewer pairs."""
    rate_S, rate_T = (linked_ST.sum(dim=axis).clamp(min=1) ** -0.5 for axis in (1, 0))
    times_ST, times_TS = _factor(linked_ST * rate_T), _factor((linked_ST * rate_S[:, None]).T)
    score_ST = torch.empty_like(linked_ST)
    for rows in _chunks(len(linked_ST)):
        score_ST[rows] = (times_TS @ (times_ST @ linked_ST[rows].T.contiguous())).T
    return score_ST


def _factor(x: Tensor) -> Tensor:
    """Returns a matrix of few entries to multiply by from the left; on a GPU as it is, where order must not vary."""
    return x.contiguous() if x.is_cuda else x.to_sparse()


def _chunks(num_rows: int) -> Iterator[slice]:
    """Yields the rows of a square matrix, in pieces of bounded size."""
    step = max(_CHUNK // max(num_rows, 1), 1)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
