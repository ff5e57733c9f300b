"""What a grid of benchmarks/cifar10.py came to: cells, means with standard errors, a table and a figure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cifar10_settings import Settings

from dstlib.errors import StateError
from dstlib.plot import drawn
from dstlib.report import align

INTERVAL_95 = {2: 12.7, 3: 4.3, 4: 3.2, 5: 2.8, 6: 2.6, 7: 2.4, 8: 2.4, 9: 2.3, 10: 2.3}  # Student's t by seeds
COLOURS = {
    "dense": "#222222",
    "static": "#999999",
    "set": "#edae49",
    "rigl": "#d1495b",
    "rigl-cold": "#f0a5ad",
    "rigl-warm": "#7d1128",
    "granet": "#0b4f6c",
    "srigl": "#66a182",
    "dsff": "#8d6a9f",
}
Result = Mapping[str, Any]
Spread = tuple[float, float | None]  # a mean and its standard error; None where there is one value


@dataclass(frozen=True)
class Cell:
    """One run of the grid; its sparsity is 0 where the method is dense."""

    method: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """As a file's."""
        return f"{self.method}-{self.sparsity:g}-seed{self.seed}"

    def settings(self, base: Settings) -> Settings:
        """The run's settings."""
        return replace(base, method=self.method, sparsity=self.sparsity, seed=self.seed)


def cells(methods: Iterable[str], sparsities: Iterable[float], seeds: Iterable[int]) -> list[Cell]:
    """All cells, seed by seed.

    >>> [cell.name for cell in cells(["dense", "set"], [0.8, 0.9], [0, 1])][:4]
    ['dense-0-seed0', 'set-0.8-seed0', 'set-0.9-seed0', 'dense-0-seed1']
    """
    methods, sparsities = list(methods), list(sparsities)
    grid = (Cell(m, 0.0 if m == "dense" else s, seed) for seed in seeds for m in methods for s in sparsities)
    return list(dict.fromkeys(grid))


def read_cell(path: Path, settings: Settings) -> Result | None:
    """The result of a cell, or None where it has not been run.

    Raises:
        StateError: The file is damaged, or of a run with other settings.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        held, accuracy = result["settings"], float(result["accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        given, remedy = f"{type(error).__name__}: {error}", "Delete it: the cell is run again."
        raise StateError.of("cell", f"file {path}", allowed="a result", given=given, remedy=remedy) from error
    asked = asdict(settings)
    if held != asked or not 0 <= accuracy <= 1:
        other = {name: held.get(name) for name in asked if held.get(name) != asked[name]}
        allowed = ", ".join(f"{name} {asked[name]}" for name in other)
        remedy = "Give the options it was run with, or another --results."
        raise StateError.of("settings", f"file {path}", allowed=allowed, given=other, remedy=remedy)
    return result


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard error of the mean.

    >>> [round(number, 4) for number in spread([0.70, 0.72, 0.74])]
    [0.72, 0.0115]
    """
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def in_percent(value: Spread, *, signed: bool = False) -> str:
    """As text.

    >>> in_percent((0.7234, 0.0012)), in_percent((-0.0123, None), signed=True)
    ('72.34 ± 0.12', '-1.23')
    """
    error = "" if value[1] is None else f" ± {100 * value[1]:.2f}"
    return f"{100 * value[0]:{'+' if signed else ''}.2f}{error}"


def differences(method: Mapping[int, Result], baseline: Mapping[int, Result]) -> list[float]:
    """Accuracy of a method minus that of the baseline, for each seed that both have."""
    return [method[seed]["accuracy"] - baseline[seed]["accuracy"] for seed in method.keys() & baseline.keys()]


def by_seed(results: Mapping[Cell, Result], method: str, sparsity: float) -> dict[int, Result]:
    """The runs of a method at a sparsity; the dense ones at any."""
    held = 0.0 if method == "dense" else sparsity
    return {cell.seed: r for cell, r in results.items() if (cell.method, cell.sparsity) == (method, held)}


def table(results: Mapping[Cell, Result], methods: Sequence[str], sparsities: Sequence[float]) -> str:
    """A row per sparsity and method that has been run; the dense runs stand beside each sparsity."""
    rows = [("sparsity", "method", "accuracy, %", "minus static", "seeds", "weights", "FLOPs", "CPU s")]
    for sparsity in sparsities:
        baseline = by_seed(results, "static", sparsity)
        for method in methods:
            runs = by_seed(results, method, sparsity)
            if not runs:
                continue
            pairs = [] if method == "static" else differences(runs, baseline)
            minus = in_percent(spread(pairs), signed=True) if pairs else "-"
            accuracy = in_percent(spread([run["accuracy"] for run in runs.values()]))
            costs = [mean(run[name] for run in runs.values()) for name in ("density", "flops_share", "cpu_seconds")]
            shown = (f"{costs[0]:.2%}", f"{costs[1]:.1%}", f"{costs[2]:.0f}")
            rows.append((f"{sparsity:.0%}", method, accuracy, minus, str(len(runs)), *shown))
    return "\n".join([*align(rows, left=(0, 1)), *notes(results)])


def notes(results: Mapping[Cell, Result]) -> list[str]:
    """What the numbers of a table are, and are not."""
    any_run = next(iter(results.values()))
    network, passes = any_run["settings"]["model"], any_run["settings"]["epochs"]
    num = min(len({cell.seed for cell in results}), max(INTERVAL_95))
    factor = INTERVAL_95.get(num)
    wide = "none without a second one" if factor is None else f"for {num} seeds a 95 % interval is ± {factor} of them"
    return [
        f"± is the standard error over the seeds ({wide}); minus static is paired by seed.",
        f"{network} network, {passes} pass{'es' * (passes > 1)} over {any_run['num_train']:,} images of "
        f"{any_run['data']}. Test accuracy on {any_run['num_test']:,} after the last step.",
        "Weights: active of those made sparse; FLOPs: of one image, the final network over the dense one, as counted.",
    ]


def figure(results: Mapping[Cell, Result], methods: Sequence[str], sparsities: Sequence[float], path: Path) -> None:
    """Accuracy against sparsity, a line per method with its standard errors; the format is that of the name.

    Raises:
        SettingError: matplotlib is not installed, or does not know the format.
    """
    with drawn(path, size=(6.4, 4.2)) as drawing:
        _draw(drawing.subplots(), results, methods, sparsities)


def _draw(axes: Any, results: Mapping[Cell, Result], methods: Sequence[str], sparsities: Sequence[float]) -> None:
    for number, method in enumerate(methods):
        held = [(s, by_seed(results, method, s)) for s in sparsities]
        points = [(i, spread([r["accuracy"] for r in runs.values()])) for i, (_, runs) in enumerate(held) if runs]
        if points:
            at = [i + (number - len(methods) / 2) * 0.02 for i, _ in points]  # side by side, so that bars are seen
            means, errors = ([100 * (p[part] or 0) for _, p in points] for part in (0, 1))
            style = {"linestyle": "--" if method == "dense" else "-", "color": COLOURS.get(method)}
            axes.errorbar(at, means, errors, marker="o", markersize=4, capsize=3, label=method, **style)
    axes.set_xticks(range(len(sparsities)), [f"{s:.0%}" for s in sparsities])
    axes.set(xlabel="sparsity", ylabel="test accuracy, %")
    axes.set_title("Mean and standard error over seeds", loc="left")
    axes.legend()
