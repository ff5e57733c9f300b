"""E2ENet on a GPU, accelerated and as it is: forward passes and training steps in half precision.

    python benchmarks/gpu_e2enet.py                                # 128³ and 64³ in bfloat16; needs a GPU
    python benchmarks/gpu_e2enet.py --sizes 96 --dtype float16 --sparsities 0.8 --out runs/gpu

The networks are the paper's for AMOS, of random weights, under autocast; forward is with the finest head alone and
without gradients, a step is forward with all heads, a sum of mean squares for a loss, backward, and SGD. "plain" has no
masks and runs in torch, with channels first and last in memory, as does nnU-Net (its PlainConvUNet, if the extra
"medical" is there); what counts is the faster layout. The others went through accelerate():

    dense       without masks: fewer passes over memory alone
    kernels     first masks of DSFF, single connections, which a GPU computes densely
    blocks      the same by blocks of 16 × 16 channels, replace(DSFF, granularity=Block(16, 16))

Columns: how many times faster than plain E2ENet forward, forward as a CUDA graph (both), in a step and in a step as a
CUDA graph; the same beside nnU-Net; then milliseconds, and the most memory of a step in GiB. Medians over rounds.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from _e2enet import FORMATS, e2enet, in_format, nnunet, supervise
from _measure import Action, bars, begin, command_line, gpu, medians, progress, recorded, write
from torch import Tensor, nn

import dstlib
from dstlib.report import align
from dstlib.zoo.e2enet import E2ENet

PASSES = ("forward", "forward graph", "step", "step graph")
HEADER = ("image", "network", *(f"{what}: × plain" for what in PASSES), *(f"{what}: × nnU-Net" for what in PASSES))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Result = dict[str, Any]


def main() -> None:
    lines, default = command_line(__doc__), " (default: %(default)s)"
    lines.add_argument("--sizes", type=int, nargs="+", default=[128, 64], help="voxels along each axis" + default)
    lines.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9], help=default.strip())
    lines.add_argument("--dtype", choices=DTYPES, default="bfloat16", help=default.strip())
    lines.add_argument("--without-nnunet", action="store_true", help="leave nnU-Net out, and what it needs")
    options = begin(lines, on_gpu=True)
    warnings.simplefilter("ignore")  # DSFF would know for how long it trains: not at all
    results = [row for size in options.sizes for row in measure(size, options)]
    print("\n".join(align([(*HEADER, *PASSES, "GiB"), *map(cells, results)], left=(0, 1))))
    title, shown = f"{options.sizes[0]}³, {options.dtype}", [r for r in results if r["size"] == options.sizes[0]]
    heights = [(title, what, r["network"], r["over_plain"][what]) for what in PASSES for r in shown]
    bars(options.out / "gpu_e2enet.png", heights, "× plain E2ENet")
    write(options.out / "gpu_e2enet.json", options, results, on_gpu=True)


def measure(size: int, options: Any) -> list[Result]:
    """A row for each network."""
    x, dtype = torch.randn(1, 1, size, size, size, device="cuda"), DTYPES[options.dtype]
    times: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    for name, model, image in networks(size, x, dtype, options):
        progress(f"{size}³: {name}")
        forward, step = passes(model, image, dtype)
        times[name] = medians({"forward": forward, "step": step}, options.repeats, clock=gpu, warm_up=3)
        graphs = {"forward graph": recorded(forward), "step graph": recorded(step)}
        times[name] |= medians(graphs, options.repeats, clock=gpu, warm_up=3)
        torch.cuda.reset_peak_memory_stats()
        step()
        memory[name] = torch.cuda.max_memory_allocated() / 2**30
    return [
        {
            "size": size,
            "network": name,
            "ms": taken,
            "over_plain": ratios(times, "plain", taken),
            "over_nnunet": ratios(times, "nnU-Net", taken),
            "peak_gib": memory[name],
        }
        for name, taken in times.items()
    ]


def networks(size: int, x: Tensor, dtype: torch.dtype, options: Any) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Each network with the image in its layout, one after the other: together they would not fit."""
    for layout in FORMATS:
        yield f"plain, channels {layout}", *in_format(e2enet(size).cuda(), x, layout)
        if not options.without_nnunet:
            yield f"nnU-Net, channels {layout}", *in_format(nnunet(size).cuda(), x, layout)
    with torch.autocast("cuda", dtype):  # left before each yield: what it caches must not outlive a pass
        fast = dstlib.accelerate(e2enet(size).cuda(), x)
    yield "accelerated, dense", fast, x
    blocks = replace(dstlib.DSFF, granularity=dstlib.Block(16, 16))
    for sparsity in options.sparsities:
        for kind, method in (("kernels", dstlib.DSFF), ("blocks", blocks)):
            model = e2enet(size).cuda()
            sparsifier = dstlib.sparsify(
                model, sparsity=sparsity, method=method, include=E2ENet.FUSION, total_steps=10_000
            )
            with torch.autocast("cuda", dtype):
                fast = sparsifier.accelerate(model, x)
            yield f"accelerated, {kind}, s = {sparsity:g}", fast, x


def passes(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Action, Action]:
    """A forward pass, and a step of training; the rate is so small that nothing changes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

    def outputs(*, supervised: bool) -> Any:
        supervise(model, supervised)
        with torch.autocast("cuda", dtype):
            return model(x)

    def forward() -> None:
        with torch.no_grad():
            outputs(supervised=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(y.float().square().mean() for y in outputs(supervised=True)).backward()
        optimizer.step()

    return forward, step


def ratios(times: dict[str, dict[str, float]], beside: str, taken: dict[str, float]) -> dict[str, float | None]:
    """How many times faster than the faster layout of another network."""
    others = [each for name, each in times.items() if name.startswith(beside)]
    return {what: min(each[what] for each in others) / taken[what] if others else None for what in PASSES}


def cells(row: Result) -> tuple[str, ...]:
    """A line of the table."""
    found = [*row["over_plain"].values(), *row["over_nnunet"].values()]
    taken = [f"{row['ms'][what]:.2f}" for what in PASSES]
    shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in found]
    return (f"{row['size']}³", row["network"], *shown, *taken, f"{row['peak_gib']:.2f}")


if __name__ == "__main__":
    main()
