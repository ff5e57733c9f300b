"""From DiNTS's probabilities to the most probable architecture that is feasible.

Shapes: N blocks, P paths of a block, O operations; a child is a set of paths of one block, of which there are
2^P - 1.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from dstlib.zoo.e2enet.baselines.architecture import Architecture, nodes

_LEAST, _EACH = 1e-5, 0.001  # MONAI's: what a probability is added to, and what a block costs beside its logarithm


def decode(log_alpha_a: NDArray[np.floating], log_alpha_c: NDArray[np.floating]) -> Architecture:
    """Finds the most probable children of all blocks that lead from one to the next, and the likeliest operations.

    Shapes: log_alpha_a (N, P), the logits of paths; log_alpha_c (N, P, O), those of operations.

    Reference: He et al., *DiNTS* (CVPR 2021), section 3.3: a shortest path through the blocks. MONAI's ``decode`` lays
    it out as a graph of all children, a matrix of 1.2 GB for 12 blocks; a block knows of those before it the nodes
    that are in use alone, so 15 sums per block do (Viterbi's algorithm).

    >>> found = decode(np.array([[9.0, -9, -9, 9], [9, -9, 9, -9]]), np.zeros((2, 4, 5)))
    >>> found.arch_code_a  # the second block must go on from both nodes
    ((1, 0, 0, 0), (1, 0, 1, 0))
    """
    num_paths = log_alpha_a.shape[1]
    depths = (num_paths + 2) // 3
    children = list(itertools.product((0, 1), repeat=num_paths))[1:]
    starts, ends = np.array([[_number(used) for used in nodes(child, depths)] for child in children]).T
    costs = -np.log(probabilities(log_alpha_a, np.array(children)) + _LEAST) + _EACH
    total, came_by = costs[0], []
    for cost in costs[1:]:
        cheapest = np.zeros(2**depths, np.int64)  # the child by which a set of nodes is reached
        for used in range(1, 2**depths):
            leading = np.flatnonzero(ends == used)
            cheapest[used] = leading[total[leading].argmin()]
        came_by.append(cheapest[starts])
        total = total[cheapest[starts]] + cost
    chosen = [int(total.argmin())]
    for before in reversed(came_by):
        chosen.append(int(before[chosen[-1]]))
    return Architecture.of([children[child] for child in reversed(chosen)], log_alpha_c.argmax(-1))


def probabilities(log_alpha_a: NDArray[np.floating], children: NDArray[np.integer]) -> NDArray[np.float64]:
    """Computes the probability of each child in each block (N, 2^P - 1): paths are independent, but one there must be.

    >>> probabilities(np.zeros((1, 2)), np.array([[0, 1], [1, 0], [1, 1]])).round(3).tolist()
    [[0.333, 0.333, 0.333]]
    """
    path = 1 / (1 + np.exp(-log_alpha_a.astype(np.float64)))[:, None]
    none = (1 - path).prod(-1)
    result: NDArray[np.float64] = np.where(children == 1, path, 1 - path).prod(-1) / (1 - none)
    return result


def _number(used: tuple[int, ...]) -> int:
    """Returns a set of nodes as the number that has these binary digits."""
    return sum(code << depth for depth, code in enumerate(used))
