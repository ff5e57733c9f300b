"""Every method at work on a small network, in numbers that float32 holds exactly.

Inputs and errors are whole numbers, activations quarters, weights multiples of 1 / 32 of at most 1: sums over channels,
positions and samples then stay below 2²⁴ units, and come out alike in any order. The laws were checked in float64.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import dstlib
from dstlib.masking import NM
from golden.files import HERE, checksum, write

STEPS, EVERY, INTERVAL = 50, 10, 3
SAVED_AT = 20  # between two updates, so that what is gathered in between counts
SAVED = ("rigl", "snfs", "topkast")  # nothing beside the masks, a trace, hidden weights
GRID = 32


class Network(nn.Module):
    """Two convolutions, three projections in one layer, and a linear layer: (B, 4, 5, 5) → (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = _in_quarters(self.second(_in_quarters(self.first(x)))).flatten(1)
        q, k, v = self.qkv(x).chunk(3, dim=1)
        y: Tensor = self.head(_in_quarters(q + k - v))
        return y


def _in_quarters(x: Tensor) -> Tensor:
    """From 0 to 4 in steps of a quarter; the gradient is that without the steps."""
    bounded = x.clamp(0, 4)
    return bounded + ((4 * bounded).round() / 4 - bounded).detach()


class Training:
    """A method at work, with an interval of a few steps."""

    def __init__(self, name: str) -> None:
        method = dstlib.METHODS[name]
        interval = method.interval and min(method.interval, INTERVAL)
        self.network = Network()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.network.parameters():
                p.copy_(torch.randint(-GRID // 2, GRID // 2 + 1, p.shape, generator=generator) / GRID)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=2**-6, momentum=0.5, weight_decay=2**-7)
        self.sparsifier = dstlib.sparsify(
            self.network,
            self.optimizer,
            sparsity=0.5 if isinstance(method.granularity, NM) else 0.75,
            method=replace(method, interval=interval),
            total_steps=STEPS,
        )

    @property
    def parts(self) -> dict[str, Any]:
        """All that has a state."""
        return {"model": self.network, "optimizer": self.optimizer, "sparsifier": self.sparsifier}

    def train(self, start: int = 0, stop: int = STEPS) -> dict[str, list[str]]:
        """Takes the steps from one to another; checksums of what is there each 10 steps."""
        found: dict[str, list[str]] = {"losses": [], "masks": [], "weights": [], "momenta": []}
        for first in range(start, stop, EVERY):
            losses = [self._step(number) for number in range(first, first + EVERY)]
            momenta = [self.optimizer.state[p]["momentum_buffer"] for p in self.network.parameters()]
            # what pulls hidden weights is no power of two: processors that fuse it differ in the last bit
            seen = (
                losses,
                self.sparsifier.masks.values(),
                self.network.parameters(),
                [(2**16 * m).round() for m in momenta],
            )
            for checksums, tensors in zip(found.values(), seen, strict=True):
                checksums.append(checksum(tensors))
        return found

    def _step(self, number: int) -> Tensor:
        """The loss of a step, after which the weights are on the grid again."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randint(-1, 2, (4, 4, 5, 5), generator=generator).float()
        target = torch.randint(-2, 3, (4, 4), generator=generator).float()
        self.optimizer.zero_grad()
        error = self.network(x) - target
        loss = (error * error.detach().round().clamp(-2, 2)).sum()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for p in self.network.parameters():
                p.copy_((GRID * p).round().clamp(-GRID, GRID) / GRID)
        return loss.detach()


def write_runs() -> None:
    """runs.json."""
    write("runs.json", {name: Training(name).train() for name in dstlib.METHODS})


def write_states() -> None:
    """state_v2.pt."""
    saved = {}
    for name in SAVED:
        training = Training(name)
        training.train(stop=SAVED_AT)
        saved[name] = {part: holder.state_dict() for part, holder in training.parts.items()}
    torch.save(saved, HERE / "state_v2.pt")
