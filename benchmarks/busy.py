"""E2ENet on the engine beside other programs: how much slower than alone, and which layers `accelerate` then chooses.

    python benchmarks/busy.py                    # 32³ and 64³, and 20 choices: about five minutes
    python benchmarks/busy.py --sizes 32 --repeats 5 --tries 5
    python benchmarks/busy.py --sizes --whole --tries 20

It starts the other programs itself, one per core unless --programs says otherwise: each a loop of Python that never
rests. First every network runs alone, in rounds in which each takes its turn, then beside them. The networks are those
of `e2enet_inference.py`: E2ENet at sparsity 0.9 by `accelerate`, whose decisions are taken alone, and as a plan;
nnU-Net in torch and, where they are installed (extra "bench"), in OpenVINO and ONNX Runtime, by as many threads.
Columns:

    alone, busy     milliseconds, medians
    slowdown        busy over alone
    of OpenVINO's   the slowdown over that of nnU-Net in OpenVINO

Then `accelerate` measures some layers, among them those of which little is to be gained, once alone and --tries times
beside the other programs: how often it chose the engine for each, by what it gains alone. With --whole it does so with
E2ENet at 32³, too, which takes some ten seconds a try. "Alone" is as quiet as the machine is: the first line says how
often the system stopped this process in each second that it ran, where more than 60 count as busy.
"""

import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from _e2enet import nnunet
from _measure import Action, bars, begin, command_line, progress, times, write
from _runtimes import installed, load
from e2enet_inference import plain, rested, run, run_plan, sparse
from torch import Tensor, nn

import dstlib
from dstlib.cores import usable_cores
from dstlib.engine import Decision, accelerate
from dstlib.report import align

OPENVINO = "nnU-Net, OpenVINO"
Result = dict[str, Any]


def main() -> None:
    lines, default = command_line(__doc__, repeats=9), " (default: %(default)s)"
    lines.add_argument("--sizes", type=int, nargs="*", default=[32, 64], help="voxels along each axis" + default)
    lines.add_argument("--programs", type=int, default=usable_cores(), help="programs beside this one" + default)
    lines.add_argument("--tries", type=int, default=20, help="choices of layers beside them" + default)
    lines.add_argument("--whole", action="store_true", help="choose the layers of E2ENet at 32³, too")
    options = begin(lines)
    warnings.simplefilter("ignore")  # DSFF would know for how long it trains: not at all
    passes = [row for size in options.sizes for row in measure(size, options.repeats, options.programs)]
    if passes:
        header = ("image", "network", "alone", "busy", "slowdown", "of OpenVINO's")
        print("\n".join(align([header, *map(cells, passes)], left=(0, 1))))
        bars(options.out / "busy.png", [("", f"{r['size']}³", r["network"], r["slowdown"]) for r in passes], "slowdown")
    models = {"layers": some_layers} | ({"E2ENet at 32³": whole} if options.whole else {})
    choices = [row for name, build in models.items() for row in choose(name, build, options.tries, options.programs)]
    chosen = [(r["model"], r["layer"], f"{r['gain']:.2f}", f"{r['chosen']} of {r['tries']}") for r in choices]
    print("\n".join(align([("model", "layer", "× alone", "engine chosen"), *chosen], left=(0, 1))))
    missed = [row for row in choices if row["gain"] > 1.5 and row["chosen"] < row["tries"]]
    print(f"layers that gain over 1.5 × alone, and were left plain in a try: {len(missed)}")
    write(options.out / "busy.json", options, [*passes, *choices])


@torch.no_grad()
def measure(size: int, repeats: int, programs: int) -> list[Result]:
    """A row for each network."""
    x = torch.randn(1, 1, size, size, size)
    progress(f"{size}³: deciding on the layers")
    model, dense = sparse(size, 0.9), plain(nnunet, size)
    actions: dict[str, Action] = {
        "E2ENet, accelerate": run(accelerate(model, x), x),
        "E2ENet, plan": run_plan(model, x),
        **{f"nnU-Net, {runtime}": load(runtime, dense, x) for runtime in installed()},
        "nnU-Net, torch": run(dense, x),
    }
    progress(f"{size}³: alone")
    stops, ran = stopped(), time.process_time()
    alone = times(actions, repeats, clock=rested)
    print(f"{size}³ alone: stopped {(stopped() - stops) / (time.process_time() - ran):.0f} times a second")
    progress(f"{size}³: beside {programs} programs")
    with busy(programs):
        beside = times(actions, repeats, clock=rested)
    slowdown = {name: median(beside[name]) / median(alone[name]) for name in actions}
    return [
        {
            "size": size,
            "network": name,
            "alone_ms": median(alone[name]),
            "busy_ms": median(beside[name]),
            "slowdown": slowdown[name],
            "of_openvino": slowdown[name] / slowdown[OPENVINO] if OPENVINO in slowdown else None,
        }
        for name in actions
    ]


def stopped() -> int:
    """How often the system has stopped threads of this process that would have run on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """Inside, so many programs run beside this one, which never rest."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        time.sleep(0.5)  # until they have begun
        yield
    finally:
        for program in started:
            program.kill()
            program.wait()


def some_layers() -> tuple[nn.Module, Tensor]:
    """Layers of many sizes, at sparsity 0.9 but for a dense convolution and a linear layer at 0.98."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 32, 1),
        nn.Flatten(),
        nn.Linear(2048, 4096),
        nn.GELU(),
        nn.Linear(4096, 4096),
        nn.GELU(),
        nn.Linear(4096, 64),
    ).eval()
    dstlib.sparsify(model, sparsity=0.9, method="static", overrides={"0": 0.0, "10": 0.98})
    return model, torch.randn(16, 32, 16, 16)


def whole() -> tuple[nn.Module, Tensor]:
    """E2ENet with its finest head."""
    return sparse(32, 0.9), torch.randn(1, 1, 32, 32, 32)


def choose(name: str, build: Callable[[], tuple[nn.Module, Tensor]], tries: int, programs: int) -> list[Result]:
    """A row for each layer that the example reaches."""
    model, x = build()
    progress(f"{name}: choosing alone")
    alone = {layer: row for layer, row in accelerate(model, x).decisions.items() if row.plain_ms is not None}
    progress(f"{name}: choosing beside {programs} programs")
    with busy(programs):
        beside = [accelerate(model, x).decisions for _ in range(tries)]
    return [
        {
            "model": name,
            "layer": f"{layer} ({row.kind})",
            "gain": gain(row),
            "gains_busy": [gain(each[layer]) for each in beside],
            "chosen": sum(each[layer].is_fast for each in beside),
            "tries": tries,
        }
        for layer, row in alone.items()
    ]


def gain(row: Decision) -> float:
    """How many times as fast a layer is on the engine."""
    return (row.plain_ms or 0) / (row.fast_ms or 1)


def cells(row: Result) -> tuple[str, ...]:
    """A line of the table."""
    share = "-" if row["of_openvino"] is None else f"{row['of_openvino']:.2f}"
    taken = (f"{row['alone_ms']:.1f}", f"{row['busy_ms']:.1f}", f"{row['slowdown']:.2f}", share)
    return (f"{row['size']}³", row["network"], *taken)


if __name__ == "__main__":
    main()
