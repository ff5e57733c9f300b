"""The search of an architecture beside the training of its weights: what DiNTS adds to the loop.

Shapes: B batch, C channels, D, H, W depth, height, width in voxels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstlib.errors import DataError, require
from dstlib.zoo.e2enet.baselines.architecture import Architecture
from dstlib.zoo.e2enet.baselines.dints import Supernet
from dstlib.zoo.e2enet.baselines.dints_decoding import decode
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.training.ranks import Ranks
from dstlib.zoo.e2enet.training.settings import TrainSettings

MEMORY_BUDGET = 0.8  # the published search's for the pancreas; its paper has 0.2 and 0.5 too
LEARNING_RATE, BETAS = 0.001, (0.5, 0.999)
TOPOLOGY = 0.001  # what the topology loss counts beside the others
_LEAST = 1e-5  # below no logarithm


@dataclass(frozen=True)
class Search:
    """A search under way: the space, the optimizer of its logits, and the share of its memory that is allowed.

    Weights train alone in the first half of the epochs. From then on each step of theirs is followed by one of the
    logits, on cases that the weights never meet. Beside the loss of the segmentation they are charged for being
    undecided (the entropy of children and operations), for topologies that do not go on from one block to the next
    (the topology loss), and for another share of the memory than the budget. These charges grow from nothing in
    proportion to the steps.

    Reference: He et al., *DiNTS* (CVPR 2021), and the search of MONAI's model zoo, which has this sum where it trains
    in half precision; in float32 it charges memory and topology in full from the first step on. The weights have the
    optimizer and the learning rate of the ordinary training.
    """

    space: Any
    optimizer: torch.optim.Adam
    memory_budget: float

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.space.log_alpha_a, self.space.log_alpha_c

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Lets the logits have gradients within the block."""
        for logits in self.logits:
            logits.requires_grad_(True)
        try:
            yield
        finally:
            for logits in self.logits:
                logits.requires_grad_(False)

    def charge(self, shape: Sequence[int], progress: float) -> Tensor:
        """Computes what is added to the loss on images (B, C, D, H, W), ``progress`` of the way from 0 to 1."""
        log_c = self.space.log_alpha_c.log_softmax(-1)
        self.space.device = log_c.device  # MONAI's own is where it was built
        probs, _ = self.space.get_prob_a(child=True)
        undecided = -(probs * (probs + _LEAST).log()).mean() - (log_c.exp() * log_c).mean()
        excess = (self.memory_budget - self._memory(shape)).abs()
        total: Tensor = progress * (undecided + excess + TOPOLOGY * self.space.get_topology_entropy(probs))
        return total

    @torch.no_grad()
    def memory_share(self, shape: Sequence[int]) -> float:
        """Estimates the share of the memory of all paths that the probable ones take."""
        return float(self._memory(shape))

    def _memory(self, shape: Sequence[int]) -> Tensor:
        self.space.device = self.space.log_alpha_a.device
        used, full = (self.space.get_ram_cost_usage(shape, full=full) for full in (False, True))
        share: Tensor = used / full
        return share

    def step(self, loss: Tensor, scaler: torch.amp.GradScaler, ranks: Ranks) -> None:
        """Moves the logits against the gradient of the mean loss of all ranks; not where it overflows."""
        scaled = torch.autograd.grad(scaler.scale(loss), self.logits)
        gradients = [ranks.average(gradient) / scaler.get_scale() for gradient in scaled]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return
        for logits, gradient in zip(self.logits, gradients, strict=True):
            logits.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def found(self) -> Architecture:
        """Returns the most probable feasible architecture of this moment."""
        a, c = (logits.detach().cpu().numpy() for logits in self.logits)
        return decode(a, c)


def start_search(model: Supernet, memory_budget: float) -> Search:
    """Begins a search through a supernet's space.

    Raises:
        SettingError: The budget is no share.
    """
    check_budget(memory_budget)
    space = model.space
    return Search(
        space, torch.optim.Adam([space.log_alpha_a, space.log_alpha_c], lr=LEARNING_RATE, betas=BETAS), memory_budget
    )


def check_budget(memory_budget: float) -> None:
    """Refuses a budget that is no share of the memory.

    Raises:
        SettingError: It is none.
    """
    allowed, remedy = "a number in (0, 1]", "The paper's are 0.2, 0.5 and 0.8."
    is_share = 0 < memory_budget <= 1
    require(is_share, "memory_budget", "the search", allowed=allowed, given=memory_budget, remedy=remedy)


def first_iteration(settings: TrainSettings) -> int:
    """Returns the iteration after which the logits are trained too: half of the epochs go before.

    >>> first_iteration(TrainSettings(epochs=5, iterations=10))
    20
    """
    return settings.epochs // 2 * settings.iterations


def halves(cases: Sequence[Case], seed: int) -> tuple[list[Case], list[Case]]:
    """Divides cases at random into those that weights are trained on, and those that the architecture is.

    Raises:
        DataError: There is one case alone.
    """
    if len(cases) < 2:
        remedy = "Weights and architecture are trained on cases of their own: add scans."
        raise DataError.of("cases", "the search", allowed="at least 2 to train on", given=len(cases), remedy=remedy)
    order = np.random.default_rng(seed).permutation(len(cases)).tolist()
    middle = len(cases) // 2
    return [cases[i] for i in order[:middle]], [cases[i] for i in order[middle:]]
