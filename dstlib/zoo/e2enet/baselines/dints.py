"""DiNTS: the network of an architecture that a search has found, and the network that is searched, both MONAI's.

MONAI is imported on demand: whoever only reads the table of baselines does not need it.
"""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

BLOCKS, DEPTHS = 12, 4  # of the published search
WIDTH, SEARCH_WIDTH = 32, 16  # features of the finest node's stem: a found network is twice as wide as the searched one


class Supernet(Segmenter):
    """The network that holds all of DiNTS's space at once: every path and operation, weighed by probabilities.

    Its two arrays of logits, ``log_alpha_a`` of paths and ``log_alpha_c`` of operations, are no weights: a search
    trains them by steps of their own, and they take no gradient in any other.
    """

    def __init__(self, request: Request, *, num_blocks: int, num_depths: int) -> None:
        from monai.networks.nets import TopologySearch

        multiplier = request.channels(SEARCH_WIDTH) / WIDTH
        with redirect_stdout(StringIO()):  # it prints which sizes it takes
            space = TopologySearch(channel_mul=multiplier, num_blocks=num_blocks, num_depths=num_depths)
        for parameter in (space.log_alpha_a, space.log_alpha_c):
            parameter.requires_grad_(False)
        host = _host(space, request, np.ones((num_blocks + 1, num_depths), np.int64))
        super().__init__(host, in_channels=request.in_channels, multiple=(2**num_depths,) * 3)

    @property
    def space(self) -> Any:
        """MONAI's ``TopologySearch``."""
        return self.host.dints_space


def dints(request: Request) -> Segmenter:
    """Builds the network of the architecture that is asked for.

    Reference: He et al., *DiNTS* (CVPR 2021). Stem, cells and the last convolution are MONAI's; channels are those
    of its published training, 32 in the stem and 64 to 512 in the nodes.
    """
    from monai.networks.nets import TopologyInstance

    found = request.architecture
    assert found is not None  # build_model() has asked for one
    codes = [np.array(found.arch_code_a), np.array(found.arch_code_c)]
    with redirect_stdout(StringIO()):  # it prints which sizes it takes
        space = TopologyInstance(
            arch_code=codes,
            channel_mul=request.channels(WIDTH) / WIDTH,
            num_blocks=found.num_blocks,
            num_depths=found.num_depths,
        )
    host = _host(space, request, np.array(found.node_a))
    # 32 is what MONAI recommends for 4 depths; 16 is what its strides divide
    return Segmenter(host, in_channels=request.in_channels, multiple=(2**found.num_depths,) * 3)


def dints_search(request: Request) -> Supernet:
    """Builds the space of the published search: 12 blocks, 4 depths, half the channels of a found network."""
    return Supernet(request, num_blocks=BLOCKS, num_depths=DEPTHS)


def _host(space: Any, request: Request, node_a: NDArray[np.int64]) -> Any:
    from monai.networks.nets import DiNTS

    # Its forward reads from this which paths there are. A copy without storage, as profile() makes one, would take a
    # tensor's values away.
    space.arch_code_a = list(space.arch_code_a)
    return DiNTS(space, in_channels=request.in_channels, num_classes=request.num_classes, node_a=node_a)
