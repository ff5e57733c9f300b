"""The ablations of the E2ENet paper as one grid, at any scale, printed in the layout of its tables.

    python examples/e2enet_ablation.py                                            # phantoms, all tables: an hour or two
    python examples/e2enet_ablation.py --tables components --epochs 10            # one table, shorter
    python examples/e2enet_ablation.py --data amos22 --preset paper --tables shifts --seeds 0 1 2

- components (Table 3): DSFF and shift, each on and off, and 3×3×3 kernels in their place.
- shifts (Table 4): how far, and along which axis with which kernel.
- capacity (Table 8): E2ENet wider, and nnU-Net narrower.
- frequency: the interval between mask updates, halved and one and a half times as long.

Each cell is a run of its own in --runs; a finished one is not repeated and a stopped one is continued, so the command
may be stopped at any time and given again. The table is printed after each cell.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from dstlib.command_line import make_parser, run_command
from dstlib.errors import StateError
from dstlib.files import make_folder, write_json
from dstlib.report import align
from dstlib.typed_json import read_json
from dstlib.zoo.e2enet.cli import read_config
from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from dstlib.zoo.e2enet.evaluation.pt_score import Row


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of a table: what it is called there, the network's changes, and further options of the recipe."""

    name: str
    network: Mapping[str, object]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """What the cells of a folder have in common: the recipe, and the options that it was given."""

    recipe: str
    options: tuple[str, ...]


DENSE, NNUNET = ("--sparsity", "0"), ("--model", "nnunet")
FULL = {"kernel_size": (3, 3, 3), "shift": None}


def tables(base: E2ENetConfig, interval: int) -> dict[str, tuple[Cell, ...]]:
    """Returns every table of the grid, around a network."""
    wider = tuple(round(width * 58 / 48) for width in base.channels)  # the paper's wider network starts at 58
    return {
        "components": (
            Cell(name="no DSFF, no shift", network={"shift": None}, options=DENSE),
            Cell(name="no DSFF, shift", network={}, options=DENSE),
            Cell(name="DSFF, no shift", network={"shift": None}),
            Cell(name="DSFF, shift", network={}),
            Cell(name="DSFF, 3×3×3 in encoder and last diagonal", network={"outer_kernel_size": (3, 3, 3)}),
            Cell(name="DSFF, 3×3×3 everywhere", network=FULL),
        ),
        "shifts": (
            *(Cell(name=f"depth ({-n}, 0, {n}), 1×3×3", network={"shift": (-n, 0, n)}) for n in (1, 2, 3, 7)),
            Cell(name="height (-1, 0, 1), 3×1×3", network={"shift_axis": "height", "kernel_size": (3, 1, 3)}),
            Cell(name="width (-1, 0, 1), 3×3×1", network={"shift_axis": "width", "kernel_size": (3, 3, 1)}),
        ),
        "capacity": (
            Cell(name="nnU-Net", network={}, options=NNUNET),
            Cell(name="nnU-Net(-), three quarters as wide", network={}, options=(*NNUNET, "--width", "0.75")),
            Cell(name="E2ENet", network={}),
            Cell(name="E2ENet(+), wider by 58/48", network={"channels": wider}),
        ),
        "frequency": tuple(
            Cell(name=f"every {n} iterations", network={}, options=("--interval", str(n)))
            for n in (max(1, interval // 2), interval, max(interval + 1, interval * 3 // 2))
        ),
    }


def main() -> None:
    options, rest = command_line().parse_known_args()
    recipe = RECIPES[f"e2enet_{options.recipe}"]
    preset = read_config(recipe, rest).preset  # refuses what the recipe does not know, before anything runs
    from dstlib.zoo.e2enet.compare import row_of

    grid = tables(preset.network, preset.training.interval)
    refuse_other_grid(options.runs, Grid(options.recipe, tuple(rest)))
    for title in options.tables:
        rows: dict[str, list[Row]] = {}
        for cell in grid[title]:
            for seed in options.seeds:
                path = options.runs / title / slug(cell.name) / f"seed{seed}"
                if not (path / "result.json").exists():
                    run_cell(recipe, cell, path, [*rest, "--seed", str(seed)])
                rows.setdefault(cell.name, []).append(row_of(path))
            print(f"\n{table(title, rows)}\n")


def command_line() -> argparse.ArgumentParser:
    epilog = "Any other option goes to the recipe: see `python examples/e2enet_amos.py --help`."
    lines = make_parser(__doc__, epilog=epilog)
    names = tuple(tables(E2ENetConfig(), 1200))
    lines.add_argument("--recipe", choices=[name.removeprefix("e2enet_") for name in RECIPES], default="amos")
    lines.add_argument("--tables", nargs="+", choices=names, default=names, help="(default: all)")
    lines.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run of each cell per seed (default: 0)")
    lines.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="(default: %(default)s)")
    return lines


def refuse_other_grid(folder: Path, asked: Grid) -> None:
    """Checks that the cells of a folder are of one grid: other settings want another folder."""
    record = folder / "grid.json"
    if not record.exists():
        make_folder(folder)
        write_json(record, asdict(asked))
    elif (
        held := read_json(record, Grid, remedy="Remove it where the runs are those asked for, or give another --runs.")
    ) != asked:
        remedy = "Give the same options to continue it, or another --runs."
        raise StateError.of("grid", f"folder {folder}", allowed=asdict(held), given=asdict(asked), remedy=remedy)


def run_cell(recipe: Recipe, cell: Cell, path: Path, arguments: list[str]) -> None:
    """Trains and evaluates one cell, or continues it where it was stopped."""
    from dstlib.zoo.e2enet.run import run_recipe

    resume = ["--resume"] if (path / "config.json").exists() else []
    print(f"\n{cell.name}: {path}", flush=True)
    config = read_config(recipe, [*arguments, *cell.options, "--run-dir", str(path), *resume])
    network = replace(config.preset.network, **cell.network)
    try:
        run_recipe(replace(config, preset=replace(config.preset, network=network)))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped; give the same command again to continue.") from None


def table(title: str, rows: Mapping[str, list["Row"]]) -> str:
    """Returns the means over the seeds, with their standard errors where there are several."""
    cells = [(title, "mDice", "mNSD", "params, M", "FLOPs, G", "seeds")]
    for name, runs in rows.items():
        quality = (spread([run.dice for run in runs]), spread([run.scores.get("mNSD") for run in runs]))
        cells.append((name, *quality, f"{runs[0].params:.3f}", f"{runs[0].flops:.3f}", str(len(runs))))
    note = "Scores in per cent of the held-out cases; FLOPs of one patch by the paper's convention."
    return "\n".join([*align(cells, left=(0,)), note])


def spread(scores: Sequence[float | None]) -> str:
    """Returns the mean and its standard error, over the runs that have a score: those whose cases show any class."""
    values = [score for score in scores if score is not None]
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{error}" if values else "-"


def slug(name: str) -> str:
    """Returns the name as a folder's.

    >>> slug("depth (-1, 0, 1), 1×3×3")
    'depth-m1-0-1-1x3x3'
    """
    text = name.lower().replace("×", "x").replace("(+)", "plus").replace("-", "m" if "(-" in name else "-")
    return "-".join("".join(c if c.isalnum() or c == "-" else " " for c in text).split())


if __name__ == "__main__":
    sys.exit(run_command(main))
