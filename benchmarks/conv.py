"""Convolutions with sparse kernels beside the dense ones of oneDNN: the fusion layers of E2ENet, level by level.

    python benchmarks/conv.py                                      # a 64³ image, four sparsities: about two minutes
    python benchmarks/conv.py --size 32 --sparsities 0.9 --levels 1 2

Each layer is the first convolution (1, 3, 3) of a fusion node of the paper's network; a sparsity of 0.9 keeps a random
tenth of its kernels, 0 all of them. Columns:

    × dense    milliseconds of oneDNN's dense convolution, in whichever memory format is faster, over the engine's
    of limit   the share of 1 / (1 - sparsity), which is what the products left out would give alone; above 100 % the
               engine gains more than that, as Winograd's transform saves products of the remaining kernels too
    error      largest difference to float64, as a share of the largest value

The engine's time includes the shift along depth, oneDNN's does not. The weights are ready in the engine's form, as in a
network that is not in training. Medians over rounds in which every row takes its turn.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from _e2enet import FORMATS, Layer, layers
from _measure import Action, bars, begin, command_line, medians, progress, write
from torch import Tensor
from torch.nn.functional import conv3d

from dstlib.engine.ops.conv import Geometry, conv
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.patterns import Pattern, Weights
from dstlib.layers import shift
from dstlib.report import align

SHIFTS = (-1, 0, 1)
HEADER = ("level", "shape", "sparsity", "× dense", "of limit", "ms", "first, ms", "last, ms", "error")
MOST_DEPTHS = 8  # of the output that is compared with float64


Result = dict[str, Any]


def main() -> None:
    lines, default = command_line(__doc__), " (default: %(default)s)"
    lines.add_argument("--size", type=int, default=64, help="voxels of the image along each axis" + default)
    lines.add_argument("--sparsities", type=float, nargs="+", default=[0, 0.8, 0.9, 0.95], help=default.strip())
    lines.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="finest first" + default)
    options = begin(lines)
    found: list[tuple[Layer, Result]] = []
    for layer in layers(options.size):
        if layer.level in options.levels:
            progress(f"level {layer.level}: {layer}")
            found += ((layer, row) for row in measure(layer, options.sparsities, options.repeats))
    print("\n".join(align([HEADER, *(cells(layer, row) for layer, row in found)], left=(1,))))
    heights = (("", f"level {layer.level}", f"sparsity {row['sparsity']:g}", row["speedup"]) for layer, row in found)
    bars(options.out / "conv.png", heights, "× oneDNN dense")
    write(options.out / "conv.json", options, [{"layer": asdict(layer), **row} for layer, row in found])


@torch.no_grad()
def measure(layer: Layer, sparsities: list[float], repeats: int) -> list[Result]:
    """A row for each sparsity; times are in milliseconds."""
    x = torch.randn(1, layer.inputs, *layer.extent)
    weight = torch.randn(layer.outputs, layer.inputs, 1, 3, 3) / (9 * layer.inputs) ** 0.5
    bias = torch.randn(layer.outputs)
    dense = {
        name: partial(conv3d, x.to(memory_format=f), weight.to(memory_format=f), bias, padding=(0, 1, 1))
        for name, f in FORMATS.items()
    }
    masks = {s: layer.mask(s)[:, :, None, None, None] for s in sparsities}
    ours = {s: on_engine(x, weight, bias, mask) for s, mask in masks.items()}
    errors = {s: error(action(), x, weight * masks[s], bias) for s, action in ours.items()}
    times: dict[Any, float] = medians({**dense, **ours}, repeats)
    first, last = times["first"], times["last"]
    return [
        {"sparsity": s, "time": times[s], "dense_first": first, "dense_last": last, "error": errors[s]}
        | {"speedup": min(first, last) / times[s]}  # over the faster dense form
        for s in sparsities
    ]


def cells(layer: Layer, row: Result) -> tuple[str, ...]:
    """A line of the table."""
    times = (f"{row[name]:.2f}" for name in ("time", "dense_first", "dense_last"))
    ratios = (f"{row['speedup']:.2f}", f"{row['speedup'] * (1 - row['sparsity']):.0%}")
    return (str(layer.level), str(layer), f"{row['sparsity']:g}", *ratios, *times, f"{row['error']:.1e}")


def on_engine(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Action:
    """The convolution with the kernels under the mask (O, C, 1, 1, 1)."""
    active = Pattern.of(mask.flatten(1))
    weights = Weights(weight, bias, active, active)
    channels = torch.arange(x.shape[1], dtype=torch.int32)
    geometry = Geometry(channels // -(-len(channels) // len(SHIFTS)) - 1)  # the shift of each: SHIFTS, by thirds
    source = FeatureMap(to_depth_last(x))
    return torch.no_grad()(lambda: conv([source], weights, geometry).raw)


def error(got: object, x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Largest difference to float64 at some depths, as a share of the largest value there; depths do not mix."""
    assert isinstance(got, Tensor)
    step = max(1, x.shape[2] // MOST_DEPTHS)
    inputs = shift(x, SHIFTS, axis=2)[:, :, ::step].double()
    wanted = conv3d(inputs, weight.double(), bias.double(), padding=(0, 1, 1))
    return float((got[:, :, ::step] - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    main()
