"""What a change costs: the same work by two checkouts of dstlib in turns, and the ratio of the times of each turn.

    git worktree add ../before HEAD~20
    (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/before_after.py --before ../before              # this checkout against that one
    python benchmarks/before_after.py --before . --cases e2enet32     # against itself: what the noise is

Each checkout has a process of its own, which waits while the other one works. Both run the layers on the engine that
the first one measured to be faster there. In each round each case is timed once before and once after, for at least
--seconds each, in an order that changes from round to round. What is printed is the median of the rounds' ratios, after
over before, with its quartiles: by the CPU time of the process, which programs beside it lengthen less, and by the wall
clock. Cases: E2ENet for AMOS at sparsity 0.8, inference at 32³ and 64³ and a training step at 64³; ResNet-50 at
sparsity 0.9, inference of one image of 224².
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from _measure import Action, begin, command_line, progress, write
from e2enet_inference import run
from e2enet_inference import sparse as sparse_e2enet
from overhead import resnet50
from training_step import sparse as sparse_training

import dstlib
from dstlib.engine import Decisions, accelerate
from dstlib.report import align

Build = Callable[[Decisions | None], tuple[Action, Decisions]]


def inference(size: int) -> Build:
    """A forward pass of E2ENet."""

    def build(decisions: Decisions | None) -> tuple[Action, Decisions]:
        x = torch.randn(1, 1, size, size, size)
        fast = accelerate(sparse_e2enet(size, 0.8), x, decisions=decisions)
        return run(fast, x), fast.decisions  # type: ignore[return-value]

    return build


def training(decisions: Decisions | None) -> tuple[Action, Decisions]:
    """A training step of E2ENet."""
    step = sparse_training(torch.randn(1, 1, 64, 64, 64), 0.8, "engine", decisions)
    return step.step, step.network.decisions  # type: ignore[return-value]


def resnet(decisions: Decisions | None) -> tuple[Action, Decisions]:
    """A forward pass of ResNet-50."""
    torch.manual_seed(0)
    model, x = resnet50().eval(), torch.randn(1, 3, 224, 224)
    dstlib.sparsify(model, sparsity=0.9, method="static")
    fast = accelerate(model, x, decisions=decisions)
    return run(fast, x), fast.decisions  # type: ignore[return-value]


CASES: dict[str, Build] = {
    "e2enet32": inference(32),
    "e2enet64": inference(64),
    "training64": training,
    "resnet50": resnet,
}


class Worker:
    """A process that works with one checkout."""

    def __init__(self, checkout: Path, options: argparse.Namespace, folder: Path) -> None:
        asked = ["--threads", str(options.threads), "--seconds", str(options.seconds), "--cases", *options.cases]
        command = [sys.executable, __file__, *asked, "--worker", str(folder), "--before", str(checkout)]
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.machine = self._answer()

    def times(self, case: str) -> dict[str, float]:
        """Milliseconds of one run of a case."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case}\n")
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("A worker has ended; what it said stands above.")
        return json.loads(line)


def work(options: argparse.Namespace) -> None:
    """Builds the cases, then runs those that are asked for on stdin."""
    here = Path(dstlib.__file__).parents[1]
    assert here == options.before.resolve(), f"dstlib is that of {here}"
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    actions: dict[str, Action] = {}
    for case in options.cases:
        file = options.worker / f"{case}.json"
        actions[case], decisions = CASES[case](Decisions.load(file) if file.exists() else None)
        decisions.save(file)
        actions[case]()
    print(json.dumps(str(dstlib.engine.info())), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(actions[line.strip()], options.seconds)), flush=True)


def timed(action: Action, seconds: float) -> dict[str, float]:
    """Milliseconds of an action, by the CPU time of this process and by the wall clock: means over some time."""
    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    start, count = {name: clock() for name, clock in clocks.items()}, 0
    while not count or time.perf_counter() - start["wall"] < seconds:
        action()
        count += 1
    return {name: 1e3 * (clock() - start[name]) / count for name, clock in clocks.items()}


def main() -> None:
    options = options_of()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        progress("building the cases")
        workers = {name: Worker(getattr(options, name), options, Path(folder)) for name in ("before", "after")}
        rounds: list[dict[str, Any]] = []
        for number in range(options.rounds):
            for case in options.cases:
                order = list(workers)[:: -1 if number % 2 else 1]
                rounds.append({"case": case, **{name: workers[name].times(case) for name in order}})
            progress(f"round {number + 1} of {options.rounds}")
    print("\n".join(align([HEADER, *(cells(case, rounds) for case in options.cases)], left=(0,))))
    write(options.out / "before_after.json", options, rounds)


HEADER = ("case", "before, ms CPU", "after", "after / before, CPU", "quartiles", "by the wall clock", "quartiles")


def cells(case: str, rounds: list[dict[str, Any]]) -> tuple[str, ...]:
    """A line of the table."""
    rows = [row for row in rounds if row["case"] == case]
    taken = (f"{median(row[name]['cpu'] for row in rows):.1f}" for name in ("before", "after"))
    return (case, *taken, *ratio(rows, "cpu"), *ratio(rows, "wall"))


def ratio(rows: list[Mapping[str, Any]], clock: str) -> tuple[str, str]:
    """The median of the rounds' ratios, and its quartiles."""
    ratios = [row["after"][clock] / row["before"][clock] for row in rows]
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


def options_of() -> argparse.Namespace:
    """The options as given."""
    lines, default = command_line(__doc__, flag=None, threads=1), " (default: %(default)s)"
    lines.add_argument(
        "--before", type=Path, required=True, metavar="FOLDER", help="a checkout, with its kernels built"
    )
    here = Path(__file__).parents[1]
    lines.add_argument("--after", type=Path, default=here, metavar="FOLDER", help="another (default: this one)")
    lines.add_argument("--rounds", type=int, default=100, help="turns of each case" + default)
    lines.add_argument("--seconds", type=float, default=0.1, help="that a turn takes, at least" + default)
    lines.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help=default.strip())
    lines.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the folder of decisions, in a worker
    return lines.parse_args() if "--worker" in sys.argv else begin(lines)


if __name__ == "__main__":
    main()
