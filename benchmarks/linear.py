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
from functools import partial
from itertools import product
from typing import Any

import torch
from _measure import Action, bars, begin, command_line, medians, own, wall, write
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from dstlib.engine.layers.linear import SparseLinear
from dstlib.engine.ops.linear import LINEAR, LINEAR_BACKWARD_INPUT, LINEAR_BACKWARD_WEIGHTS, LinearProblem
from dstlib.report import align

COLUMNS = ("infer", "forward", "input", "weight", "step")
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
    lines = command_line(__doc__, flag="--rounds", repeats=9, threads=2)
    default = " (default: %(default)s)"
    lines.add_argument("--sizes", type=size, nargs="+", default=[(1024, 1024), (3072, 768)], help="outputs x inputs")
    lines.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256], help="samples per call" + default)
    lines.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95], help="share of zeros" + default)
    lines.add_argument("--patterns", choices=PATTERNS, nargs="+", default=list(PATTERNS), help="all by default")
    lines.add_argument("--cold", action="store_true", help="empty the caches before each call")
    options = begin(lines)
    settings = product(options.sizes, options.batches, options.sparsities, options.patterns)
    results = [compare(*setting, options) for setting in tqdm(list(settings))]
    print("dense time ÷ sparse time")
    print("\n".join(align([("layer", "batch", "sparsity", "pattern", *COLUMNS), *map(cells, results)], left=(0, 3))))
    heights = (
        (f"{r['size']}, batch {r['batch']}", f"s = {r['sparsity']:g}", f"{r['pattern']}, {name}", r["speedup"][name])
        for r, name in product(results, ("infer", "step"))
    )
    bars(options.out / "linear.png", heights, "dense time ÷ sparse time")
    write(options.out / "linear.json", options, results)


def compare(size: tuple[int, int], batch: int, sparsity: float, pattern: str, options: argparse.Namespace) -> Result:
    """Microseconds of each column, dense and sparse, and their ratios."""
    outputs, inputs = size
    dense, mask = nn.Linear(inputs, outputs), PATTERNS[pattern](size, 1 - sparsity)
    x, grad = torch.randn(batch, inputs), torch.randn(batch, outputs)
    pairs = actions(dense, mask, x, grad)
    taken = {name: microseconds(pair, options) for name, pair in pairs.items()}
    speedup = {name: dense_us / sparse_us for name, (dense_us, sparse_us) in taken.items()}
    about = {"size": f"{outputs}x{inputs}", "batch": batch, "sparsity": sparsity, "pattern": pattern}
    return {**about, "microseconds": taken, "speedup": speedup}


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
        "input": (lambda: grad @ weight, lambda: LINEAR_BACKWARD_INPUT(back_to_input, [grad, values, *back])),
        "weight": (lambda: grad.t() @ x, lambda: LINEAR_BACKWARD_WEIGHTS(forward, [grad, x, *pattern])),
        "step": (lambda: step(dense), lambda: step(training)),
    }


@torch.no_grad()
def microseconds(pair: tuple[Action, Action], options: argparse.Namespace) -> list[float]:
    """Of both, in turn: of one call with --cold, else of the mean of calls for some milliseconds."""
    filler = torch.zeros(8 << 20 if options.cold else 0)  # 32 MiB

    def timed(action: Action, count: int) -> float:
        if not options.cold:
            action()  # what the other one has put out of the caches comes back
        filler.add_(1)
        return 1e3 * wall(lambda: [action() for _ in range(count)]) / count

    once = medians(dict(enumerate(pair)), 1).values()
    counts = [1 if options.cold else max(1, round(3 / taken)) for taken in once]
    calls = {i: partial(timed, action, count) for i, (action, count) in enumerate(zip(pair, counts, strict=True))}
    return list(medians(calls, options.repeats, clock=own, warm_up=0).values())


def cells(result: Result) -> list[str]:
    """A line of the table."""
    about = [str(result[key]) for key in ("size", "batch", "sparsity", "pattern")]
    return about + [f"{result['speedup'][name]:.1f}" for name in COLUMNS]


def size(text: str) -> tuple[int, int]:
    """Outputs × inputs, as in 3072x768."""
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


if __name__ == "__main__":
    main()
