"""Methods against each other on CIFAR-10: a grid of methods × sparsities × seeds, with standard errors.

    python benchmarks/cifar10.py --data cifar10                        # 66 runs of some 2 minutes of one core
    python benchmarks/cifar10.py --data cifar10 --methods static rigl --sparsities 0.95 --seeds 0 1 2 3 4
    python benchmarks/cifar10.py --data cifar10 --optimizer adamw --results runs/cifar10-adamw
    python benchmarks/cifar10.py --table                               # what there is so far; trains nothing
    python benchmarks/cifar10.py --images 1000 --epochs 2 --results /tmp/grid    # procedural images, to see it work

Every cell is one run of examples/cifar10.py with its preset quick: the small network, 3 passes over the images, the
same schedule for all, tuned for the dense network and for no method. All methods share the density among the layers
by ERK, which for dsff is not the paper's choice, and update their masks at the same steps: each sixtieth of the run,
for three quarters of it (dsff to its end). Learning rate and weight decay go with the optimizer, the best of a few on
the dense network. Runs this short support orderings, not the accuracies of papers; granet
starts dense, so it trains with more weights than the others and only ends with as few.

Each finished cell is a file in --results and is not repeated, so the command may be stopped at any time and given
again. Cells are run seed by seed: a part of the grid is a whole comparison with fewer seeds.
"""

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cifar10_data import Images, open_images
from cifar10_settings import CHOICES, PRESETS, Settings, with_optimizer
from cifar10_table import Cell, Result, cells, figure, read_cell, table
from cifar10_training import train, write_result

from dstlib.command_line import make_parser, run_command
from dstlib.errors import DstlibError, SettingError, StateError
from dstlib.workers import share

WANTED = ("dense", "static", "set", "rigl", "granet", "srigl", "dsff")
SCALE = ("model", "epochs", "batch_size", "images", "distribution")  # settings of all cells that the command may change


@lru_cache(maxsize=1)
def _images(folder: Path | None) -> Images:
    return open_images(folder)  # decoded once by each worker, then used by all its cells


def run_cell(settings: Settings, path: Path, folder: Path | None) -> Result:
    """Trains one cell and writes it down, unless another process did in the meantime; in a worker."""
    done = read_cell(path, settings)
    if done is None:
        done = train(settings, _images(folder), show=False)
        write_result(path, done)
    return done


def run_grid(todo: Sequence[tuple[Settings, Path]], folder: Path | None, *, workers: int) -> int:
    """Runs cells in worker processes, with a line for each; returns how many failed.

    Raises:
        StateError: The system ended a worker.
        KeyboardInterrupt: It was asked to stop; what is finished is in its files.
    """
    started, failed = time.monotonic(), 0
    remedy = "Finished cells are kept; try again with fewer."
    cells_done = share(partial(_attempt, folder=folder), todo, workers=workers, where="the grid", remedy=remedy)
    for number, ((_, path), result) in enumerate(cells_done, 1):
        left = (time.monotonic() - started) / number * (len(todo) - number) / 60
        if isinstance(result, str):
            line, failed = f"failed: {result}", failed + 1
        else:
            seconds = f"{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of CPU"
            line = f"{result['accuracy']:.2%} in {seconds}"
        print(f"[{number}/{len(todo)}] {path.stem}: {line}; about {left:.0f} min left", flush=True)
    return failed


def _attempt(cell: tuple[Settings, Path], folder: Path | None) -> Result | str:
    """Runs a cell, or says why it cannot run: it does not stop the others."""
    try:
        return run_cell(*cell, folder)
    except DstlibError as error:
        return str(error)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = make_parser(__doc__)
    add, told = lines.add_argument, "(default: %(default)s)"
    names, quick = CHOICES["method"], PRESETS["quick"]
    add("--data", type=Path, metavar="DIR", help="CIFAR-10, npz or binary (default: procedural images)")
    add("--methods", nargs="+", choices=names, metavar="NAME", default=WANTED, help=f"dense, or of dstlib {told}")
    add("--sparsities", nargs="+", type=float, metavar="S", default=[0.8, 0.9, 0.95], help=told)
    add("--seeds", nargs="+", type=int, metavar="N", default=[0, 1, 2], help=f"of weights, batches, masks {told}")
    add("--model", choices=CHOICES["model"], default=quick.model, help=told)
    optimizer = "with its own learning rate and weight decay"
    add("--optimizer", choices=CHOICES["optimizer"], default=quick.optimizer, help=f"{optimizer} {told}")
    add("--epochs", type=int, metavar="N", default=quick.epochs, help=f"passes over the images {told}")
    add("--batch-size", type=int, metavar="N", default=quick.batch_size, help=told)
    add("--images", type=int, metavar="N", help="train on the first N only (default: all)")
    known = [name for name in CHOICES["distribution"] if name]
    add("--distribution", choices=known, default="erk", help=f"among layers, for all methods {told}")
    add("--workers", type=int, metavar="N", default=1, help=f"processes, one thread each {told}")
    add("--results", type=Path, metavar="DIR", default=Path("runs/cifar10-grid"), help=f"keeps the cells {told}")
    add("--figure", type=Path, metavar="FILE", help="(default: accuracy.png in --results, where matplotlib is)")
    add("--table", action="store_true", help="only read --results, and print the table")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing, then prints the table; the number of cells that failed."""
    options = parser().parse_args(arguments)
    if options.workers < 1:
        remedy = "Pass the number of cores to use."
        raise SettingError.of(
            "--workers", "the command line", allowed="1 or more", given=options.workers, remedy=remedy
        )
    quick = with_optimizer(PRESETS["quick"], options.optimizer)
    base = replace(quick, **{name: getattr(options, name) for name in SCALE})
    grid = {cell: cell.settings(base) for cell in cells(options.methods, options.sparsities, options.seeds)}
    paths = {cell: options.results / f"{cell.name}.json" for cell in grid}
    done = {cell: read_cell(paths[cell], settings) for cell, settings in grid.items()}
    todo = [(settings, paths[cell]) for cell, settings in grid.items() if done[cell] is None]
    print(f"{len(grid)} cells in {options.results}: {len(grid) - len(todo)} done, {len(todo)} to run", flush=True)
    failed = 0 if options.table or not todo else run_grid(todo, options.data, workers=options.workers)
    results = {cell: read_cell(paths[cell], settings) for cell, settings in grid.items()}
    report({cell: result for cell, result in results.items() if result is not None}, options)
    return failed


def report(results: dict[Cell, Result], options: argparse.Namespace) -> None:
    """Prints the table and draws the figure of what there is.

    Raises:
        StateError: There is nothing.
    """
    if not results:
        remedy = "Leave --table out to run them, or check --results."
        raise StateError.of("cells", f"folder {options.results}", allowed="finished ones", given="none", remedy=remedy)
    print(table(results, options.methods, options.sparsities))
    if options.figure or find_spec("matplotlib"):
        path = options.figure or options.results / "accuracy.png"
        figure(results, options.methods, options.sparsities, path)
        print(f"Figure in {path}")


def _stop(number: int, frame: FrameType | None) -> None:
    """Stops at once: an unfinished cell leaves nothing behind."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    raise KeyboardInterrupt


STOPPED = "Stopped; finished cells are kept. Give the same command again to go on."

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background does not hear Ctrl-C
        signal.signal(number, _stop)
    sys.exit(run_command(lambda: min(main(), 1), interrupted=STOPPED))  # 1: a cell failed
