"""A method of your own in under 30 lines: a criterion, a granularity and a schedule, checked and trained in seconds.

    python examples/own_method.py
    python examples/own_method.py --steps 1000 --seed 1

The task: 64 numbers come in, and 8 of them decide the answer. Which ones, nobody says. The first layer may read
8 inputs at a time; the method below lets go of those that do not help and tries others. A network with a fixed
random choice of inputs, and one that reads all of them, are trained beside it.
"""

import math
import sys
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

import dstlib
from dstlib.command_line import make_parser, run_command
from dstlib.masking import gradient
from dstlib.testing import check_criterion, check_curve, check_granularity, check_method

# --- Your part begins: everything a new method needs.


# What to drop: a criterion scores every weight, and the lowest go. Early on, what the loss pulls at counts; later,
# what has grown large. It is one score per weight: the granularity averages.
def pull_then_size(site: dstlib.Site) -> Tensor:
    pull, size = (x.abs() / x.abs().mean().clamp_min(1e-30) for x in (site.grad, site.weight))
    return (1 - site.progress) * pull + site.progress * size


# What is dropped as one: a granularity folds a weight (O, I, *K) into groups × units × elements, and back. Here a
# unit is all that reads one input.
@dataclass(frozen=True)
class Input:
    def fold(self, x: Tensor) -> Tensor:
        return rearrange(x, "o i ... -> 1 i (o ...)")

    def unfold(self, x: Tensor, shape: torch.Size) -> Tensor:
        return rearrange(x, "1 i (o k) -> o i k", o=shape[0]).reshape(shape)


# How many: a curve over the progress of the run, 0 to 1. Half of the inputs go at first, ever fewer later, in cycles.
@dataclass(frozen=True)
class Restarts:
    start: float
    cycles: int = 3

    def __call__(self, progress: float) -> float:
        p = min(max(progress, 0.0), 1.0)
        return self.start * (1 - p) * (1 + math.cos(math.pi * (self.cycles * p % 1))) / 2


# A method is a value, made of parts; a variant of another one would be replace(dstlib.RIGL, ...).
FIND_INPUTS = dstlib.Method(
    name="find_inputs",
    reference="examples/own_method.py",
    drop=pull_then_size,
    grow=gradient,
    granularity=Input(),
    drop_fraction=Restarts(0.5),
    interval=10,
)
# --- Your part ends.

NUM_INPUTS, NUM_USEFUL = 64, 8


def check() -> None:
    """Checks that all of it is sound: a broken law raises a LawError, which says on which input, and what to do."""
    check_criterion(pull_then_size)
    check_granularity(Input())
    check_curve(Restarts(0.5), low=0.0, high=1.0)
    check_method(FIND_INPUTS)
    print("checked: criterion, granularity, curve and method keep their laws\n")


class Task:
    """Endless random data; the answer depends on a few of the inputs."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.useful = torch.randperm(NUM_INPUTS, generator=self.generator)[:NUM_USEFUL]
        self.weights = torch.randn(NUM_USEFUL, generator=self.generator).sign()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, NUM_INPUTS, generator=self.generator)
        z = x[:, self.useful] * self.weights
        return x, (z.sum(dim=1) + z[:, 0] * z[:, 1] > 0).long()


def train(task: Task, method: dstlib.Method | None, *, steps: int, seed: int) -> dstlib.Sparsifier | None:
    """Trains in a loop like any other; prints the accuracy on new data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = None
    if method is not None:
        sparsity = 1 - NUM_USEFUL / NUM_INPUTS
        sparsifier = dstlib.sparsify(
            model, optimizer, sparsity=sparsity, method=method, include="0", total_steps=steps, seed=seed
        )
    for _ in range(steps):
        x, y = task.batch(64)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = task.batch(4096)
    with torch.no_grad():
        accuracy = (model(x).argmax(dim=1) == y).float().mean().item()
    name = "all inputs" if method is None else method.name
    print(f"{name:<12} loss {loss.item():.3f}  accuracy {accuracy:.3f}{inputs_found(task, sparsifier)}")
    return sparsifier


def inputs_found(task: Task, sparsifier: dstlib.Sparsifier | None) -> str:
    if sparsifier is None:
        return ""
    is_read = sparsifier.masks["0.weight"].any(dim=0)
    return f"  reads {int(is_read[task.useful].sum())} of the {NUM_USEFUL} inputs that matter"


def main() -> None:
    lines = make_parser(__doc__)
    defaults = "(default: %(default)s)"
    lines.add_argument("--steps", type=int, default=600, help=f"optimizer steps of each network {defaults}")
    lines.add_argument("--seed", type=int, default=0, help=f"of the task, the weights and the masks {defaults}")
    options = lines.parse_args()
    if options.steps < 20:
        lines.error(f"--steps: expected 20 or more, for updates each {FIND_INPUTS.interval}, got {options.steps}")
    torch.set_num_threads(1)  # layers this small only wait for their threads
    check()
    fixed = replace(dstlib.STATIC, granularity=Input())
    sparsifiers = {}
    for method in (None, fixed, FIND_INPUTS):
        sparsifiers[method] = train(Task(options.seed), method, steps=options.steps, seed=options.seed)
    print()
    print(sparsifiers[FIND_INPUTS].summary())


if __name__ == "__main__":
    sys.exit(run_command(main))
