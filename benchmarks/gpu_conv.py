"""Block-sparse convolutions on a GPU beside dense ones of cuDNN: the fusion layers of E2ENet, one by one.

    python benchmarks/gpu_conv.py                                  # 128³ patches in bfloat16; needs a GPU and Triton
    python benchmarks/gpu_conv.py --size 64 --dtype float16 --json conv.json --figure conv.png
    python benchmarks/gpu_conv.py --single                         # each call by itself, Python and launches included
    python benchmarks/gpu_conv.py --tune                           # tries other cuts of the work for every layer

Each layer is the first convolution (1, 3, 3) of a fusion node, at stage 1, of the paper's network. Dense is the faster
of conv3d and of conv2d over all depths, both on channels-last tensors with cudnn.benchmark; "shift + dense" moves the
channels before conv3d, as the network does. Ours shifts while it reads. Patterns, all of random connections:

    16x16    blocks of 16 outputs and 16 inputs, as trained by replace(DSFF, granularity=Block(16, 16))
    32x32    larger blocks, each input serving more outputs; ragged where channels are no multiple of 32
    16x1     each input connected to 16 outputs or none, Block(16, 1)
    kernel   single connections, as DSFF has them, through blocks of (1, 1): 15/16 of each matrix unit idle
    covered  the same connections inside the blocks of (16, 1) that cover them: at 80 % and 90 %, 97 % and 81 % of all

Rows give how many times faster than dense alone first, and than shift + dense; then milliseconds, and the products
that the pattern needs per second. Everything is recorded in CUDA graphs, so that the GPU's time is measured and not
Python's, ours and dense ones alike. Medians over rounds in which every row takes its turn. Before anything is timed,
outputs and gradients are compared with dense ones; "error" is the largest difference, as a share of the largest value.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from _e2enet import Layer, layers
from _measure import Action, bars, gpu, machine, medians, needs_gpu, progress, recorded, write
from torch import Tensor
from torch.nn.functional import conv2d, conv3d

from dstlib.command_line import make_parser
from dstlib.engine.gpu import Blocks, Launch, block_conv
from dstlib.layers import shift
from dstlib.report import align

PATTERNS = {  # what a random connection is, and the blocks that are computed
    "16x16": ((16, 16), (16, 16)),
    "32x32": ((32, 32), (32, 32)),
    "16x1": ((16, 1), (16, 1)),
    "kernel": ((1, 1), (1, 1)),
    "covered": ((1, 1), (16, 1)),
}
SHIFTS = (-1, 0, 1)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADER = ("level", "shape", "s", "pattern", "pass", "× dense", "× shift + dense", "ms", "dense ms", "TFLOP/s", "error")
CUTS = [Launch(*cut) for cut in product((64, 128, 256), (4, 8), (2, 3, 4))]


@dataclass(frozen=True)
class Row:
    """What was measured; times are in milliseconds."""

    layer: Layer
    sparsity: float
    pattern: str
    passes: str  # "forward", or "step": forward and all gradients
    time: float
    dense: float
    shift_dense: float
    tflops: float
    error: float
    launch: Launch | None


class Tensors:
    """Input, dense weight and output gradient of a layer, on the GPU, channels last."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            return x.contiguous(memory_format=torch.channels_last_3d)

        self.x = normal(1, layer.inputs, *layer.extent).requires_grad_()
        self.weight = (normal(layer.outputs, layer.inputs, 1, 3, 3) / (9 * layer.inputs) ** 0.5).requires_grad_()
        self.grad = normal(1, layer.outputs, *layer.extent)

    def dense(self, mask: Tensor | None = None, *, shifted: bool = False) -> Tensor:
        """The output of cuDNN, of the weights inside a mask."""
        weight = self.weight if mask is None else self.weight * mask[:, :, None, None, None]
        return conv3d(shift(self.x, SHIFTS, axis=2) if shifted else self.x, weight, padding=(0, 1, 1))

    def by_planes(self) -> Tensor:
        """The output of cuDNN's 2D convolution, which sees all depths as samples: a view, and often a faster kernel."""
        planes = conv2d(self.x.transpose(1, 2).flatten(0, 1), self.weight[:, :, 0], padding=1)
        return planes.unflatten(0, (len(self.x), -1)).transpose(1, 2)

    def blocks(self, blocks: Blocks, launch: Launch | None = None) -> Tensor:
        """The output by blocks."""
        return block_conv(self.x, self.weight, blocks, shifts=SHIFTS, launch=launch)

    def step(self, y: Tensor) -> tuple[Tensor, ...]:
        """The gradients of input and weight."""
        return torch.autograd.grad(y, (self.x, self.weight), self.grad)


def checked_error(tensors: Tensors, blocks: Blocks) -> float:
    """Of output and gradients. Their graphs end here: steps cannot be recorded while one of this stream lives."""
    got, wanted = tensors.blocks(blocks), tensors.dense(blocks.cover, shifted=True)
    return largest_error((got, *tensors.step(got)), (wanted, *tensors.step(wanted)))


def largest_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """As a share of the largest value."""
    return max(float((g - w).detach().abs().max() / w.detach().abs().max()) for g, w in zip(got, wanted, strict=True))


def measure(layer: Layer, sparsity: float, options: argparse.Namespace) -> list[Row]:
    """All patterns of one layer at one sparsity, in both passes."""
    tensors = Tensors(layer, DTYPES[options.dtype], options.device)
    actions: dict[Any, Action] = {}
    errors, cuts = {}, {}
    forms = {"conv3d": tensors.dense, "conv2d": tensors.by_planes, "shift": partial(tensors.dense, shifted=True)}
    for name, form in forms.items():
        actions[name, "forward"] = torch.no_grad()(form)
        actions[name, "step"] = lambda form=form: tensors.step(form())
    for pattern, (unit, size) in PATTERNS.items():
        mask = layer.mask(sparsity, unit=unit).to(options.device)
        blocks = Blocks.of(mask, size)
        errors[pattern] = checked_error(tensors, blocks)
        cut = cuts[pattern] = tuned(tensors, blocks, options.rounds) if options.tune else None
        run = lambda blocks=blocks, cut=cut: tensors.blocks(blocks, cut)  # noqa: E731
        actions[pattern, "forward"] = torch.no_grad()(run)
        actions[pattern, "step"] = lambda run=run: tensors.step(run())
    if not options.single:
        actions = {name: recorded(action) for name, action in actions.items()}
    times = medians(actions, options.rounds, clock=gpu, warm_up=3)
    needed = 2 * 9 * layer.inputs * layer.outputs * prod(layer.extent) * (1 - sparsity)
    rows = []
    for pattern, passes in product(PATTERNS, ("forward", "step")):
        taken = times[pattern, passes]
        rate = needed * (1 if passes == "forward" else 3) / taken / 1e9
        beside = (min(times["conv3d", passes], times["conv2d", passes]), times["shift", passes])
        rows.append(Row(layer, sparsity, pattern, passes, taken, *beside, rate, errors[pattern], cuts[pattern]))
    return rows


def tuned(tensors: Tensors, blocks: Blocks, rounds: int) -> Launch:
    """The fastest cut of a whole step."""
    steps = {c: lambda c=c: tensors.step(tensors.blocks(blocks, c)) for c in CUTS}
    times = medians(steps, rounds, clock=gpu, warm_up=3)
    return min(times, key=times.__getitem__)


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    about = (str(row.layer.level), str(row.layer), f"{row.sparsity:g}", row.pattern, row.passes)
    ratios = (f"{row.dense / row.time:.2f}", f"{row.shift_dense / row.time:.2f}")
    error = f"{row.error:.1e}" + (f"  {tuple(row.launch)}" if row.launch else "")
    return (*about, *ratios, f"{row.time:.3f}", f"{row.dense:.3f}", f"{row.tflops:.1f}", error)


def main() -> None:
    """Measures, and prints the table as it grows."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=128, help="voxels of the patch along each axis (default 128)")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: all five)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--single", action="store_true", help="no CUDA graphs")
    parser.add_argument("--tune", action="store_true", help="time 18 cuts of the work for each pattern first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    needs_gpu()
    options.device = "cuda"
    rows: list[Row] = []
    chosen = [layer for layer in layers(options.size) if layer.level in options.levels]
    for layer, sparsity in product(chosen, options.sparsity):
        rows += measure(layer, sparsity, options)
        progress(f"level {layer.level}, {sparsity:.0%} done")
    print("\n".join(align([HEADER, *map(cells, rows)], left=(1, 3, 4))))
    print(f"{machine(on_gpu=True)}, {options.dtype}, medians of {options.rounds}")
    if options.json:
        write(options.json, options, [asdict(row) for row in rows], on_gpu=True)
    if options.figure:
        titles = (f"{r.passes}, {r.sparsity:.0%} sparse: products / {1 / (1 - r.sparsity):.3g}" for r in rows)
        heights = ((f"level {r.layer.level}", r.pattern, r.dense / r.time) for r in rows)
        bars(options.figure, ((title, *height) for title, height in zip(titles, heights, strict=True)), "× dense")


if __name__ == "__main__":
    main()
