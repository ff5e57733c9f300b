"""How much faster a sparse linear layer is than the dense one, on this processor.

    python benchmarks/linear.py                                    # two shapes, three batches, three sparsities
    python benchmarks/linear.py --sizes 4096x4096 --sparsities 0.9 --batches 32

Each number is dense time over sparse time: above 1 the sparse layer wins. Patterns: "scattered" weights anywhere, a
constant "fan-in" per output, "blocks" of 16 × 16. Columns:

    infer    the layer in evaluation mode without gradients, against nn.Linear
    forward  the same while training: the active weights are gathered from the dense parameter in every call
    input    the gradient of the input, against grad @ weight
    weight   the gradient of the weight, written out dense with zeros, against grad.t() @ input
    step     forward and backward through the module, against nn.Linear

Each round runs dense and sparse once each, so that whatever else the machine does falls on both; medians over the
rounds. With --cold the caches hold other things before each call, as after an optimizer's step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from dstlib.command_line import make_parser
from dstlib.engine import info
from dstlib.engine.layers.linear import SparseLinear
from dstlib.engine.ops.linear import LINEAR, LINEAR_BACKWARD_INPUT, LINEAR_BACKWARD_WEIGHTS, LinearProblem
from dstlib.files import make_folder, write_json, write_whole
from dstlib.report import align

COLUMNS = ("infer", "forward", "input", "weight", "step")
Action = Callable[[], object]
Result = dict[str, Any]


def scattered(size: tuple[int, int], density: float) -> Tensor:
    """Each weight on or off by itself."""
    return torch.rand(size) < density


def fan_in(size: tuple[int, int], density: float) -> Tensor:
    """The same number of weights in each row."""
    scores = torch.rand(size)
    return scores >= scores.topk(max(1, round(density * size[1])), dim=1).values[:, -1:]


def blocks(size: tuple[int, int], density: float) -> Tensor:
    """Blocks of 16 × 16."""
    return scattered((size[0] // 16, size[1] // 16), density).repeat_interleave(16, 0).repeat_interleave(16, 1)


PATTERNS = {"scattered": scattered, "fan-in": fan_in, "blocks": blocks}


def main() -> None:
    options = command_line().parse_args()
    make_folder(options.out)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{info()}\ntorch {torch.__version__}, medians of {options.rounds}: dense time ÷ sparse time")
    settings = product(options.sizes, options.batches, options.sparsities, options.patterns)
    results = [compare(*setting, options) for setting in tqdm(list(settings))]
    print("\n".join(align([("layer", "batch", "sparsity", "pattern", *COLUMNS), *map(cells, results)], left=(0, 3))))
    machine = {"engine": str(info()), "torch": torch.__version__, "rounds": options.rounds, "cold": options.cold}
    write_json(options.out / "linear.json", {"machine": machine, "results": results})
    figure(results, options.out / "linear.png")
    print(f"written: linear.json and linear.png in {options.out}")


def compare(size: tuple[int, int], batch: int, sparsity: float, pattern: str, options: argparse.Namespace) -> Result:
    """Microseconds of each column, dense and sparse, and their ratios."""
    outputs, inputs = size
    dense, mask = nn.Linear(inputs, outputs), PATTERNS[pattern](size, 1 - sparsity)
    x, grad = torch.randn(batch, inputs), torch.randn(batch, outputs)
    pairs = actions(dense, mask, x, grad)
    times = {name: [1e6 * taken for taken in medians(pair, options)] for name, pair in pairs.items()}
    speedup = {name: dense_us / sparse_us for name, (dense_us, sparse_us) in times.items()}
    about = {"size": f"{outputs}x{inputs}", "batch": batch, "sparsity": sparsity, "pattern": pattern}
    return {**about, "microseconds": times, "speedup": speedup}


def actions(dense: nn.Linear, mask: Tensor, x: Tensor, grad: Tensor) -> dict[str, tuple[Action, Action]]:
    """Column → what to run, dense and sparse."""
    weight, bias = dense.weight.detach(), dense.bias.detach()
    training, frozen = SparseLinear(dense, mask), SparseLinear(dense, mask).eval()
    outputs, inputs = mask.shape
    pattern, back = training.pattern.tensors, training.pattern.transposed.tensors
    forward, back_to_input = LinearProblem(outputs, has_bias=True), LinearProblem(inputs)
    _, values = LINEAR.compute(forward, [x, weight, bias, *pattern])
    leaf = x.clone().requires_grad_()

    def step(layer: nn.Linear) -> None:
        dense.weight.grad = dense.bias.grad = leaf.grad = None
        with torch.enable_grad():
            y = layer(leaf)
        y.backward(grad)

    return {
        "infer": (lambda: dense(x), lambda: frozen(x)),
        "forward": (lambda: F.linear(x, weight, bias), lambda: LINEAR.compute(forward, [x, weight, bias, *pattern])),
        "input": (
            lambda: grad @ weight,
            lambda: LINEAR_BACKWARD_INPUT(back_to_input, [grad, values, *back]),
        ),
        "weight": (lambda: grad.t() @ x, lambda: LINEAR_BACKWARD_WEIGHTS(forward, [grad, x, *pattern])),
        "step": (lambda: step(dense), lambda: step(training)),
    }


@torch.no_grad()
def medians(pair: tuple[Action, Action], options: argparse.Namespace) -> list[float]:
    """Seconds of both, interleaved: a call with --cold, else the mean of calls for some milliseconds."""
    filler = torch.zeros(8 << 20 if options.cold else 0)  # 32 MiB
    once = [seconds(action, 1) for action in pair for _ in range(2)][1::2]  # the first call warms up
    repeats = [1 if options.cold else max(1, round(3e-3 / taken)) for taken in once]
    times: list[list[float]] = [[], []]
    for _ in range(options.rounds):
        for action, count, taken in zip(pair, repeats, times, strict=True):
            if not options.cold:
                action()  # what the other one has put out of the caches comes back
            filler.add_(1)
            taken.append(seconds(action, count))
    return [statistics.median(taken) for taken in times]


def seconds(action: Action, count: int) -> float:
    """Of one call, as the mean of ``count``."""
    start = time.perf_counter()
    for _ in range(count):
        action()
    return (time.perf_counter() - start) / count


def cells(result: Result) -> list[str]:
    """A line of the table."""
    about = [str(result[key]) for key in ("size", "batch", "sparsity", "pattern")]
    return about + [f"{result['speedup'][name]:.1f}" for name in COLUMNS]


def figure(results: list[Result], path: Path) -> None:
    """A panel per size and batch: speed-ups by sparsity, a line per pattern, solid for inference, dashed for a step."""
    from matplotlib.figure import Figure  # the benchmark runs without, up to here

    panels = list(dict.fromkeys((r["size"], r["batch"]) for r in results))
    drawn = Figure(figsize=(3.2 * len(panels), 3), layout="constrained")
    for axes, (size, batch) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, pattern in enumerate(PATTERNS):
            of = [r for r in results if (r["size"], r["batch"], r["pattern"]) == (size, batch, pattern)]
            for column, style in (("infer", "-"), ("step", "--")):
                speedups = [r["speedup"][column] for r in of]
                axes.plot([r["sparsity"] for r in of], speedups, style, marker=".", color=f"C{i}")
            axes.plot([], [], color=f"C{i}", label=pattern)
        axes.axhline(1, color="#555555", linewidth=0.8)
        axes.set(title=f"{size}, batch {batch}", xlabel="sparsity", ylabel="dense time ÷ sparse time", ylim=(0, None))
        axes.legend(frameon=False, title="solid: infer, dashed: step", title_fontsize=7, fontsize=7)
    image = BytesIO()
    drawn.savefig(image, format="png", dpi=150)
    write_whole(path, image.getbuffer())


def size(text: str) -> tuple[int, int]:
    """Outputs × inputs, as in 3072x768."""
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


def command_line() -> argparse.ArgumentParser:
    lines = make_parser(__doc__)
    default = " (default: %(default)s)"
    lines.add_argument("--sizes", type=size, nargs="+", default=[(1024, 1024), (3072, 768)], help="outputs x inputs")
    lines.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256], help="samples per call" + default)
    lines.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95], help="share of zeros" + default)
    lines.add_argument("--patterns", choices=PATTERNS, nargs="+", default=list(PATTERNS), help="all by default")
    lines.add_argument("--rounds", type=int, default=9, help="of which the median is taken" + default)
    lines.add_argument("--threads", type=int, default=2, help="CPU threads of torch" + default)
    lines.add_argument("--cold", action="store_true", help="empty the caches before each call")
    lines.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results" + default)
    return lines


if __name__ == "__main__":
    main()
