"""A training step of E2ENet on the engine beside the same in torch: forward, loss, backward, and the step of SGD.

    python benchmarks/training_step.py                             # a 64³ image, two sparsities: about five minutes
    python benchmarks/training_step.py --size 32 --repeats 3 --memory
    python benchmarks/training_step.py --recompute --compact --memory    # rows of less memory for each sparsity, too
    python benchmarks/training_step.py --size 32 --losses 20       # the losses of both, from the same start

The network is the paper's for AMOS with all its heads; the loss is a stand-in, a sum of mean squares. "dense" has no
masks and runs in torch, with channels first and last in memory; what counts is the faster. The others train under DSFF
in their fusion nodes, masks applied after each step, on the engine. No mask changes during what is timed.

"recomputed" is the engine with E2ENet.recompute on, "compact" with storage="compact" as well. The memory is the most
of a process that makes two steps of one network and nothing else; "above import" leaves out what such a process takes
that builds none.

With --losses nothing is timed: a masked network trains in torch and its twin on the engine, by the same steps, and the
largest difference of their losses is printed. Medians over rounds in which every row takes its turn.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from _e2enet import FORMATS, e2enet, in_format
from _measure import Action, bars, begin, command_line, own, peak_memory, progress, times, write
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import dstlib
from dstlib.engine import Decisions
from dstlib.report import align
from dstlib.zoo.e2enet import E2ENet

PARTS = ("forward", "backward", "optimizer")


@dataclass
class Training:
    """A network that trains on one image."""

    network: nn.Module
    optimizer: Optimizer
    x: Tensor
    sparsifier: dstlib.Sparsifier | None = None  # kept, as its masks are those of a model that nothing else may hold

    def step(self) -> tuple[float, ...]:
        """One step; returns its loss, and the milliseconds of each part."""
        self.optimizer.zero_grad(set_to_none=True)
        moments = [time.perf_counter()]
        loss = loss_of(self.network(self.x))
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        self.optimizer.step()
        moments.append(time.perf_counter())
        return loss.item(), *(1e3 * (end - start) for start, end in pairwise(moments))


def main() -> None:
    lines, default = command_line(__doc__), " (default: %(default)s)"
    lines.add_argument("--size", type=int, default=64, help="voxels of the image along each axis" + default)
    lines.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9], help=default.strip())
    lines.add_argument("--memory", action="store_true", help="run each network alone too, for its peak memory")
    lines.add_argument("--recompute", action="store_true", help="measure rows that keep less for gradients, too")
    lines.add_argument(
        "--compact", action="store_true", help="measure rows that recompute and hold active weights alone"
    )
    lines.add_argument("--losses", type=int, metavar="N", help="compare the losses of N steps instead")
    options = begin(lines)
    warnings.simplefilter("ignore")  # of memory formats in backward passes
    x = torch.randn(1, 1, options.size, options.size, options.size)
    if options.losses:
        for sparsity in options.sparsities:
            compare_losses(x, sparsity, options.losses)
    else:
        compare_times(x, options)


def compare_times(x: Tensor, options: argparse.Namespace) -> None:
    """Prints and writes how long the steps take."""
    rows: dict[str, Training] = {f"dense, channels {name}": in_torch(x, name) for name in FORMATS}
    for sparsity in options.sparsities:
        progress(f"deciding on the layers at sparsity {sparsity:g}")
        rows[f"engine, sparsity {sparsity:g}"] = found = sparse(x, sparsity, "engine")
        decisions: Any = found.network.decisions
        for way, is_asked in (("recomputed", options.recompute), ("compact", options.compact)):
            if is_asked:
                rows[f"{way}, sparsity {sparsity:g}"] = sparse(x, sparsity, way, decisions)
    progress("measuring")
    steps = times({name: row.step for name, row in rows.items()}, options.repeats, clock=own)
    taken = {name: by_part([parts for _, *parts in each]) for name, each in steps.items()}
    best = min((taken[f"dense, channels {name}"] for name in FORMATS), key=lambda row: row["step"])
    results: list[dict[str, Any]] = [
        {"network": name, "ms": row, "ratios": {part: best[part] / ms for part, ms in row.items()}}
        for name, row in taken.items()
    ]
    if options.memory:
        progress("measuring the memory")
        imports = peak_memory(nothing)
        for row in results:
            name = row["network"]
            row["peak_mib"] = peak_memory(alone, name, options.size, getattr(rows[name].network, "decisions", None))
            row["above_import_mib"] = row["peak_mib"] - imports
    header = ("network", "× dense", *(f"× {p}" for p in PARTS), "step, ms", *PARTS, "peak MiB", "above import")
    print("\n".join(align([header, *map(cells, results)], left=(0,))))
    heights = (("", row["network"], part, ratio) for row in results for part, ratio in row["ratios"].items())
    bars(options.out / "training_step.png", heights, "× dense")
    write(options.out / "training_step.json", options, results)


def compare_losses(x: Tensor, sparsity: float, steps: int) -> None:
    """Prints by how much the losses differ, at most, as a share of those in torch."""
    twins = [sparse(x, sparsity, way) for way in ("torch", "engine")]
    losses = [[twin.step()[0] for twin in twins] for _ in range(steps)]
    worst = max(abs(fast - plain) / abs(plain) for plain, fast in losses)
    first, last = losses[0][0], losses[-1][0]
    print(
        f"sparsity {sparsity:g}: {steps} steps, loss {first:.4f} → {last:.4f}, largest relative difference {worst:.1e}"
    )


def alone(name: str, size: int, decisions: Decisions | None) -> Action:
    """The step of one network."""
    x, word = torch.randn(1, 1, size, size, size), name.split()[-1]
    if decisions is None:
        return in_torch(x, word).step
    return sparse(x, float(word), name.partition(",")[0], decisions).step


def nothing() -> Action:
    """The step of no network."""
    return lambda: None


def in_torch(x: Tensor, name: str) -> Training:
    """A dense network, channels first or last."""
    model, placed = in_format(e2enet(x.shape[-1]), x, name)
    return Training(model, optimizer_of(model), placed)


def sparse(x: Tensor, sparsity: float, way: str, decisions: Decisions | None = None) -> Training:
    """A network under DSFF, in torch, on the engine, recomputed or compact; the same start and masks each time."""
    model = e2enet(x.shape[-1])
    model.recompute = way in ("recomputed", "compact")
    sparsifier = dstlib.sparsify(
        model,
        sparsity=sparsity,
        method="dsff",
        include=E2ENet.FUSION,
        total_steps=100_000,
        storage="compact" if way == "compact" else "masked",
    )
    network = model if way == "torch" else sparsifier.accelerate(model, x, decisions=decisions)
    return Training(network, optimizer_of(model), x, sparsifier)


def optimizer_of(model: nn.Module) -> Optimizer:
    """The paper's, with a small step, as the loss has no meaning."""
    return SGD(model.parameters(), lr=1e-3, momentum=0.99, nesterov=True)


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """Half the weight for each coarser head."""
    return torch.stack([y.square().mean() / 2**i for i, y in enumerate(outputs)]).sum()


def by_part(steps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Medians of whole steps and of each part."""
    parts = zip(PARTS, zip(*steps, strict=True), strict=True)
    return {"step": median(map(sum, steps)), **{part: median(each) for part, each in parts}}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    ratios = (f"{row['ratios'][part]:.2f}" for part in ("step", *PARTS))
    memory = (f"{row[key]:.0f}" if key in row else "-" for key in ("peak_mib", "above_import_mib"))
    return (row["network"], *ratios, *(f"{row['ms'][part]:.0f}" for part in ("step", *PARTS)), *memory)


if __name__ == "__main__":
    main()
