"""E2ENet on the engine beside E2ENet as it is and nnU-Net: one image through the whole network, without gradients.

    python benchmarks/e2enet_inference.py                          # 32³ and 64³: about five minutes
    python benchmarks/e2enet_inference.py --sizes 96 --repeats 2 --sparsities 0.9
    python benchmarks/e2enet_inference.py --sizes 64 --memory      # the peak memory of each network too
    python benchmarks/e2enet_inference.py --threads 1 --deepsparse deepsparse/bin/python

The networks are the paper's for AMOS, of random weights, with only the finest head. The sparse ones have the first
masks of DSFF in their fusion nodes, encoder and heads stay dense; each runs by `accelerate`, and as the plan that
`save_plan` writes, which knows no Python between the layers. Dense E2ENet and nnU-Net (its PlainConvUNet, of the
extra "medical") run in torch, with channels first and last in memory, and where they are installed (extra "bench") in
OpenVINO and ONNX Runtime, in float32; what counts is the fastest of all. DeepSparse 1.8.0, the runtime of the paper,
needs older packages than this project: `pip install deepsparse==1.8.0` into an environment of its own, whose Python
``--deepsparse`` names. Columns:

    × dense     milliseconds of the fastest dense E2ENet over those of the row
    × nnU-Net   milliseconds of the fastest nnU-Net over those of the row

Then what each kind of layer takes in the accelerated network, in milliseconds of either form, as measured when it was
decided which layers run on the engine; the plain form there pays for changing the order of its maps in memory, too. At
32³ the first stride is (1, 2, 2), for both: E2ENet refuses a coarsest level of one voxel. Medians over rounds in which
every row takes its turn.
"""

import tempfile
import time
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _e2enet import FORMATS, e2enet, in_format, nnunet, supervise
from _measure import Action, bars, begin, command_line, medians, peak_memory, progress, wall, write
from _runtimes import RUNTIMES, in_deepsparse, installed, load
from torch import Tensor, nn

import dstlib
from dstlib.engine import Decisions, accelerate
from dstlib.export import save_plan
from dstlib.report import align
from dstlib.runtime import load_plan
from dstlib.zoo.e2enet import E2ENet

NETWORKS = {"E2ENet": e2enet, "nnU-Net": nnunet}
HEADER = ("image", "network", "× dense", "× nnU-Net", "ms", "peak memory, MiB")
Result = dict[str, Any]


def main() -> None:
    lines, default = command_line(__doc__), " (default: %(default)s)"
    lines.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="voxels along each axis" + default)
    lines.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.8, 0.9, 0.95], help=default.strip())
    lines.add_argument("--memory", action="store_true", help="run each network alone too, for its peak memory")
    lines.add_argument("--deepsparse", type=Path, metavar="PYTHON", help="a Python that has DeepSparse 1.8.0")
    options = begin(lines)
    warnings.simplefilter("ignore")  # DSFF would know for how long it trains: not at all
    missing = RUNTIMES.keys() - set(installed())
    if missing:
        progress(f"not installed, so not measured: {', '.join(sorted(missing))} (pip install dstlib[bench])")
    results = [row for size in options.sizes for row in measure(size, options)]
    print("\n".join(align([HEADER, *map(cells, results)], left=(0, 1))))
    print("\n".join(align(kinds(results), left=(0, 1, 2))))
    heights = [("", f"{row['size']}³", row["network"], row["over_dense"]) for row in results]
    bars(options.out / "e2enet_inference.png", heights, "× dense E2ENet")
    write(options.out / "e2enet_inference.json", options, results)


@torch.no_grad()
def measure(size: int, options: Namespace) -> list[Result]:
    """A row for each network."""
    x = torch.randn(1, 1, size, size, size)
    actions = dense(size, x, options.deepsparse)
    best_of = {kind: [name for name in actions if name.startswith(kind)] for kind in NETWORKS}
    decisions: dict[str, Decisions] = {}
    for sparsity in options.sparsities:
        name = f"E2ENet, engine, sparsity {sparsity:g}"
        progress(f"{size}³: deciding on the layers at sparsity {sparsity:g}")
        model = sparse(size, sparsity)
        fast = accelerate(model, x)
        decisions[name] = fast.decisions
        actions[name] = run(fast, x)
        actions[f"E2ENet, plan, sparsity {sparsity:g}"] = run_plan(model, x)
    progress(f"{size}³: measuring")
    taken = medians(actions, options.repeats, clock=rested)
    best = {kind: min(taken[name] for name in names) for kind, names in best_of.items()}
    return [
        {
            "size": size,
            "network": name,
            "ms": ms,
            "over_dense": best["E2ENet"] / ms,
            "over_nnunet": best["nnU-Net"] / ms,
            # DeepSparse's process is another one
            "peak_mib": peak_memory(alone, name, size, decisions.get(name))
            if options.memory and "DeepSparse" not in name
            else None,
            "kinds": by_kind(decisions[name]) if name in decisions else {},
        }
        for name, ms in taken.items()
    ]


def dense(size: int, x: Tensor, deepsparse: Path | None) -> dict[str, Action]:
    """Forward passes of the dense networks in torch and the other runtimes."""
    actions: dict[str, Action] = {}
    for kind, build in NETWORKS.items():
        for name in FORMATS:
            actions[f"{kind}, channels {name}"] = run(*in_format(plain(build, size), x, name))
        for runtime in installed():
            actions[f"{kind}, {runtime}"] = load(runtime, plain(build, size), x)
        if deepsparse:
            action = in_deepsparse(deepsparse, plain(build, size), x)
            if isinstance(action, str):
                progress(f"{size}³: {kind}, DeepSparse: {action}")
            else:
                actions[f"{kind}, DeepSparse"] = action
    return actions


def rested(action: Action) -> float:
    """Milliseconds of an action, a while after the one before, whose threads may wait for more on the cores."""
    time.sleep(0.05)
    return wall(action)


def run(model: nn.Module, x: Tensor) -> Action:
    """A forward pass without gradients."""
    return torch.no_grad()(lambda: model(x))


def run_plan(model: nn.Module, x: Tensor) -> Action:
    """A forward pass of the model as a plan, by as many threads as torch takes."""
    with tempfile.TemporaryDirectory() as folder:
        save_plan(model, x, Path(folder) / "model.plan")
        plan = load_plan(Path(folder) / "model.plan")
    return lambda: plan(x.numpy(), threads=torch.get_num_threads())


def plain(build: Callable[[int], nn.Module], size: int) -> nn.Module:
    """A network as it is, with the finest head alone."""
    return supervise(build(size).eval(), False)


def sparse(size: int, sparsity: float) -> nn.Module:
    """E2ENet with zeros outside the first masks of DSFF."""
    model = plain(e2enet, size)
    dstlib.sparsify(model, sparsity=sparsity, method="dsff", include=E2ENet.FUSION, total_steps=10_000)
    return model


def by_kind(decisions: Decisions) -> dict[str, Result]:
    """Milliseconds of all layers of a kind, plain and as they run here, and how many of them run on the engine."""
    found: dict[str, Result] = defaultdict(lambda: {"layers": 0, "on_engine": 0, "plain_ms": 0.0, "fast_ms": 0.0})
    for row in decisions.values():
        kind = found[f"{row.kind} ({'fusion' if row.name.startswith('fusion') else row.name.split('.')[0]})"]
        if row.plain_ms is None:
            continue  # the example did not reach it
        kind["layers"] += 1
        kind["on_engine"] += row.is_fast
        kind["plain_ms"] += row.plain_ms
        kind["fast_ms"] += row.fast_ms if row.is_fast and row.fast_ms is not None else row.plain_ms
    return dict(found)


def alone(name: str, size: int, decisions: Decisions | None) -> Action:
    """The forward pass of one network."""
    x, word = torch.randn(1, 1, size, size, size), name.split()[-1]
    if decisions is not None:
        return run(accelerate(sparse(size, float(word)), x, decisions=decisions), x)
    if name.startswith("E2ENet, plan"):
        return run_plan(sparse(size, float(word)), x)
    kind, form = name.split(", ")
    model = plain(NETWORKS[kind], size)
    return load(form, model, x) if form in RUNTIMES else run(*in_format(model, x, word))


def cells(row: Result) -> tuple[str, ...]:
    """A line of the table."""
    ratios = (f"{row['over_dense']:.2f}", f"{row['over_nnunet']:.2f}")
    memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    return (f"{row['size']}³", row["network"], *ratios, f"{row['ms']:.1f}", memory)


def kinds(results: list[Result]) -> list[tuple[str, ...]]:
    """The table of the kinds of layers."""
    lines = [("image", "network", "layers", "ratio", "on engine", "plain, ms", "as run, ms")]
    for row in results:
        for kind, sums in row["kinds"].items():
            ratio = sums["plain_ms"] / sums["fast_ms"] if sums["fast_ms"] else 0.0
            times = (f"{sums['plain_ms']:.1f}", f"{sums['fast_ms']:.1f}")
            share = f"{sums['on_engine']} of {sums['layers']}"
            lines.append((f"{row['size']}³", row["network"], kind, f"{ratio:.2f}", share, *times))
    return lines


if __name__ == "__main__":
    main()
