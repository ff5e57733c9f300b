"""Training that sparsity makes faster by the wall clock: an MLP, dense and at 90 % by RigL, on this processor.

    python benchmarks/linear_training.py                          # four layers of 1024, batches of 256
    python benchmarks/linear_training.py --width 2048 --sparsity 0.95

Three networks with the same first weights learn the classes that a fixed random network gives to random points: dense;
sparse, computed by torch's dense operations ("masked"); sparse, computed by ``sparsifier.accelerate``. A step is
everything a training loop does: forward, loss, backward, the optimizer, and for the sparse ones masks, their updates
every --interval steps, and following them. Each block of steps runs all three in turn, so that whatever else the
machine does falls on all; the first block warms up. Seconds are sums over the others; losses are on points not seen.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from _measure import begin, command_line, times, write
from torch import Tensor, nn

import dstlib
from dstlib.report import align

NUM_FEATURES, NUM_CLASSES = 256, 10


def mlp(width: int, depth: int) -> nn.Sequential:
    """``depth`` hidden layers of ``width``."""
    sizes = [NUM_FEATURES, *[width] * depth]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))


def main() -> None:
    lines, default = command_line(__doc__, flag=None, threads=2), "(default: %(default)s)"
    lines.add_argument("--width", type=int, default=1024, help=f"outputs of each hidden layer {default}")
    lines.add_argument("--depth", type=int, default=4, help=f"hidden layers {default}")
    lines.add_argument("--batch", type=int, default=256, help=f"samples per step {default}")
    lines.add_argument("--sparsity", type=float, default=0.9, help=f"share of zeros in the hidden layers {default}")
    lines.add_argument("--interval", type=int, default=100, help=f"steps between mask updates {default}")
    lines.add_argument("--block", type=int, default=50, help=f"steps in turn {default}")
    lines.add_argument("--blocks", type=int, default=9, help=f"of which the first is not timed {default}")
    options = begin(lines)
    teacher = mlp(256, 1)
    draw = batches(teacher, options.batch)
    total = options.block * options.blocks
    plain = mlp(options.width, options.depth)
    steps = {
        name: trainer(copy.deepcopy(plain), total, options, sparse=name != "dense", fast=name == "accelerated")
        for name in ("dense", "masked", "accelerated")
    }
    blocks = [[draw() for _ in range(options.block)] for _ in range(options.blocks)]
    actions = {name: by_blocks(step, blocks) for name, (step, _) in steps.items()}
    seconds = {name: sum(taken) / 1e3 for name, taken in times(actions, options.blocks - 1).items()}
    test = [draw() for _ in range(8)]
    losses = {name: evaluate(network, test) for name, (_, network) in steps.items()}
    count = options.block * (options.blocks - 1)
    rows = [("network", "s", "ms per step", "speed-up", "test loss")]
    for name in steps:
        taken, speedup = seconds[name], seconds["dense"] / seconds[name]
        rows.append((name, f"{taken:.1f}", f"{1e3 * taken / count:.2f}", f"{speedup:.2f}", losses[name]))
    print("\n".join(align(rows, left=(0,))))
    print(f"{count} steps timed")
    write(options.out / "linear_training.json", options, [seconds])


def trainer(
    network: nn.Module, total_steps: int, options: argparse.Namespace, *, sparse: bool, fast: bool
) -> tuple[Callable[[Tensor, Tensor], None], nn.Module]:
    """A function that makes one training step, and the network it trains."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    running = network
    if sparse:
        method = replace(dstlib.RIGL, interval=options.interval)
        exclude = [f"{len(network) - 1}.weight"]  # the head, as usual
        sparsifier = dstlib.sparsify(
            network, optimizer, sparsity=options.sparsity, method=method, total_steps=total_steps, exclude=exclude
        )
        if fast:
            running = sparsifier.accelerate(network, torch.randn(options.batch, NUM_FEATURES))
            print(running.decisions)

    def step(x: Tensor, label: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(running(x), label).backward()
        optimizer.step()

    return step, running


def by_blocks(step: Callable[[Tensor, Tensor], None], blocks: list[list[tuple[Tensor, Tensor]]]) -> Callable[[], None]:
    """An action that trains on the next block each time."""
    remaining = iter(blocks)

    def action() -> None:
        for x, label in next(remaining):
            step(x, label)

    return action


def batches(teacher: nn.Module, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws random points and the teacher's classes of them."""

    @torch.no_grad()
    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(size, NUM_FEATURES)
        return x, teacher(x).argmax(1)

    return draw


@torch.no_grad()
def evaluate(network: nn.Module, data: list[tuple[Tensor, Tensor]]) -> str:
    """The mean loss."""
    losses = [nn.functional.cross_entropy(network(x), label).item() for x, label in data]
    return f"{sum(losses) / len(losses):.3f}"


if __name__ == "__main__":
    main()
