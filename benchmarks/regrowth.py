"""What a mask update does to the loss: grown weights with the optimizer's state at birth, beside others, and warmed up.

    python benchmarks/regrowth.py                                      # AdamW, RigL at f = 0.3, five seeds, minutes
    python benchmarks/regrowth.py --method set --optimizer SGD --learning-rate 0.1
    python benchmarks/regrowth.py --seeds 1 --figure regrowth.png

A network of three layers learns to name the largest output of a random one, at 90 % sparsity, by an update at each
100 steps that exchanges three tenths of the active weights, to the end. The spike of an update is the mean training
loss of the 25 steps after it minus that of the 25 before, averaged over the updates from the third on. Without any
update the loss falls in the meantime: "above static" is the spike less that of static masks of the same seeds. Loss
and accuracy are those on test samples at the last step, 95 steps after the last update; ± is the standard error.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dstlib
from dstlib.command_line import make_parser, run_command
from dstlib.methods import find_method
from dstlib.plot import drawn
from dstlib.report import align
from dstlib.schedules import Constant

INTERVAL, UPDATES, AROUND, FIRST = 100, 17, 25, 3
STEPS = INTERVAL * UPDATES + 95
NUM_TRAIN, NUM_TEST, WIDTH, NUM_IN, NUM_CLASSES = 18_000, 2_000, 192, 64, 20
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
STARTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "birth": {"grown_state": "birth"},
        "mean": {"grown_state": "mean"},
        "gradient (default)": {"grown_state": "gradient"},
        "gradient, warm-up 10": {"grown_state": "gradient", "grown_warmup": 10},
        "birth, warm-up 10": {"grown_state": "birth", "grown_warmup": 10},
    }
)


@dataclass(frozen=True)
class Outcome:
    """One training: ``losses`` of its steps, (steps,), and the loss and accuracy on test samples at its end."""

    losses: Tensor
    loss: float
    accuracy: float

    @property
    def around(self) -> Tensor:
        """The mean loss from 25 steps before an update to 75 after it, (100,)."""
        updates = range(FIRST * INTERVAL, STEPS - INTERVAL, INTERVAL)
        return torch.stack([self.losses[at - AROUND : at - AROUND + INTERVAL] for at in updates]).mean(dim=0)

    @property
    def spike(self) -> float:
        """What the loss is more in the 25 steps after an update than in those before."""
        return float(self.around[AROUND : 2 * AROUND].mean() - self.around[:AROUND].mean())


def task() -> tuple[Tensor, Tensor]:
    """Returns samples and their classes, the same each time."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(i, o, generator=generator) * i**-0.5 for i, o in ((NUM_IN, 128), (128, NUM_CLASSES))]
    x = torch.randn(NUM_TRAIN + NUM_TEST, NUM_IN, generator=generator)
    z = (x @ weights[0]).tanh() @ weights[1]
    return x, (z - z.mean(dim=0)).argmax(dim=1)


def train(method: dstlib.Method, make: Any, seed: int, data: tuple[Tensor, Tensor]) -> Outcome:
    """Trains one network."""
    torch.manual_seed(seed)
    x, y = data
    hidden = (nn.Linear(WIDTH, WIDTH), nn.ReLU())
    model = nn.Sequential(nn.Linear(NUM_IN, WIDTH), nn.ReLU(), *hidden, nn.Linear(WIDTH, NUM_CLASSES))
    optimizer = make(model.parameters())
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.9, method=method, total_steps=STEPS, seed=seed)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        chosen = torch.randint(0, NUM_TRAIN, (128,), generator=generator)
        loss = functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    sparsifier.detach()
    with torch.no_grad():
        z, wanted = model(x[NUM_TRAIN:]), y[NUM_TRAIN:]
        accuracy = float((z.argmax(dim=1) == wanted).float().mean())
        return Outcome(torch.tensor(losses), float(functional.cross_entropy(z, wanted)), accuracy)


def variants(method: dstlib.Method, fraction: float) -> dict[str, dstlib.Method]:
    """Returns static masks, and the method with each start of what it grows."""
    moving = replace(method, interval=INTERVAL, stop=1.0, drop_fraction=Constant(fraction))
    return {"static": dstlib.STATIC, **{name: replace(moving, **start) for name, start in STARTS.items()}}


def table(outcomes: Mapping[str, list[Outcome]]) -> str:
    """A row per variant, with means over seeds."""
    rows = [("start of grown weights", "spike", "above static", "of birth's", "test loss", "test accuracy, %")]
    still = [run.spike for run in outcomes["static"]]
    above = {name: [run.spike - base for run, base in zip(runs, still, strict=True)] for name, runs in outcomes.items()}
    for name, runs in outcomes.items():
        spike, loss = _spread([run.spike for run in runs]), _spread([run.loss for run in runs], 3)
        accuracy = _spread([100 * run.accuracy for run in runs], 2)
        share = "" if name == "static" else f"{mean(above[name]) / mean(above['birth']):.0%}"
        rows.append((name, spike, "" if name == "static" else _spread(above[name]), share, loss, accuracy))
    return "\n".join(align(rows, left=(0,)))


def _spread(values: list[float], digits: int = 4) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def figure(outcomes: Mapping[str, list[Outcome]], path: Path) -> None:
    """Draws the loss around an update, a line per variant; the format is that of the name."""
    with drawn(path, size=(6.4, 4.2)) as drawing:
        axes = drawing.subplots()
        steps = range(-AROUND, INTERVAL - AROUND)
        for name, runs in outcomes.items():
            line = torch.stack([run.around for run in runs]).mean(dim=0)
            axes.plot(steps, line, label=name, linestyle="--" if name == "static" else "-")
        axes.axvline(0, color="#999999", linewidth=0.8)
        axes.set(xlabel="steps after a mask update", ylabel="training loss")
        axes.set_title("Mean over updates and seeds", loc="left")
        axes.legend()


def main() -> None:
    """Prints the table, and draws the figure where one is asked for."""
    lines = make_parser(__doc__)
    told = "(default: %(default)s)"
    lines.add_argument("--method", default="rigl", choices=("rigl", "set"), help=told)
    lines.add_argument("--fraction", type=float, default=0.3, metavar="F", help=f"of the active weights {told}")
    lines.add_argument("--optimizer", default="AdamW", choices=OPTIMIZERS, help=f"of torch.optim {told}")
    lines.add_argument("--learning-rate", type=float, default=3e-3, metavar="R", help=told)
    lines.add_argument("--seeds", type=int, default=5, metavar="N", help=told)
    lines.add_argument("--figure", type=Path, metavar="FILE", help="draw the loss around updates, too")
    options = lines.parse_args()
    torch.set_num_threads(1)
    run(options)


def run(options: argparse.Namespace) -> None:
    """Trains all variants with all seeds."""
    data, kind = task(), getattr(torch.optim, options.optimizer)
    methods = variants(find_method(options.method), options.fraction)

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(parameters, lr=options.learning_rate)
        return optimizer

    outcomes = {name: [train(m, make, seed, data) for seed in range(options.seeds)] for name, m in methods.items()}
    print(table(outcomes))
    if options.figure:
        figure(outcomes, options.figure)
        print(f"Figure in {options.figure}")


if __name__ == "__main__":
    sys.exit(run_command(main))
