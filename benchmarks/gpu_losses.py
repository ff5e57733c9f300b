"""Losses of a small block-sparse E2ENet in half precision on a GPU: accelerated, and in torch, beside float32.

    python benchmarks/gpu_losses.py                                # 200 steps of 64³, nine mask updates; needs a GPU
    python benchmarks/gpu_losses.py --steps 44 --size 16 --device cpu

All runs start from the same weights and masks (s = 0.8, DSFF by blocks of 16 × 16 channels), see the same images and
learn to find bright places in smoothed noise. Rows: how far a loss was from that of torch in float32 at the same step,
as a share of it, at most and on average; and the mean of the last 20 losses. Rounding moves masks, and so losses too.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from _measure import progress
from torch import Tensor
from torch.nn.functional import avg_pool3d, cross_entropy, interpolate

import dstlib
from dstlib.command_line import make_parser
from dstlib.report import align
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

CONFIG = E2ENetConfig(channels=(32, 48, 64, 96), strides=((2, 2, 2),) * 3, heads=3, num_classes=3)
METHOD = replace(dstlib.DSFF, granularity=dstlib.Block(16, 16), interval=20)
RUNS = {  # type of autocast, layout of the image, and whether on the engine
    "torch, float32": (None, torch.contiguous_format, False),
    "torch, channels first": (torch.bfloat16, torch.contiguous_format, False),
    "torch, channels last": (torch.bfloat16, torch.channels_last_3d, False),
    "accelerated": (torch.bfloat16, torch.contiguous_format, True),
}
HEADER = ("run", "largest distance", "mean distance", "last losses")


def samples(options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (1, 1, D, H, W) and their classes (1, 1, D, H, W)."""
    generator = torch.Generator(options.device).manual_seed(1)
    for _ in range(options.steps):
        x = torch.randn(1, 1, *(options.size,) * 3, generator=generator, device=options.device)
        smooth = avg_pool3d(x, 5, stride=1, padding=2)
        yield x, (smooth > 0.06).long() + (smooth > -0.03).long()


def loss_of(outputs: list[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy of all heads, the coarser ones by half."""
    loss = outputs[0].new_zeros((), dtype=torch.float32)
    for number, logits in enumerate(outputs):
        small = interpolate(target.float(), logits.shape[2:], mode="nearest").long()[:, 0]
        loss = loss + (1.0 if number == 0 else 0.5) * cross_entropy(logits.float(), small)
    return loss


def losses(run: str, options: argparse.Namespace) -> Tensor:
    """One number a step."""
    dtype, layout, on_engine = RUNS[run]
    torch.manual_seed(0)
    model: torch.nn.Module = E2ENet(CONFIG).to(options.device)
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method=METHOD, total_steps=options.steps, include=E2ENet.FUSION)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    model.to(memory_format=layout)
    found = []
    for x, target in samples(options):
        with torch.autocast(options.device, dtype, enabled=dtype is not None):
            if on_engine and not found:
                model = sparsifier.accelerate(model, x)
            outputs = model(x.contiguous(memory_format=layout))
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(outputs, target)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).cpu()


def main() -> None:
    """Runs all, and prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="voxels along each axis (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU: --device cpu says what the arithmetic does there.")
    warnings.simplefilter("ignore")  # so short a run is no training
    found = {}
    for run in RUNS:
        found[run] = losses(run, options)
        progress(run)
    wanted = found["torch, float32"]
    rows = []
    for run, got in found.items():
        distance = (got - wanted).abs() / wanted
        rows.append((run, f"{distance.max():.2%}", f"{distance.mean():.2%}", f"{got[-20:].mean():.4f}"))
    print("\n".join(align([HEADER, *rows], left=(0,))))


if __name__ == "__main__":
    main()
