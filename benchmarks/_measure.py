"""What the benchmarks of the engine share: times of actions in turn, the machine, options, and files of results."""

import argparse
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.command_line import make_parser
from dstlib.engine import info
from dstlib.files import make_folder, write_json, write_whole
from dstlib.workers import share
from dstlib.zoo.e2enet import AMOS, E2ENet, E2ENetConfig

Action = Callable[[], object]
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last_3d}  # where the channels lie in memory
PLAIN = tuple(FORMATS)


@dataclass(frozen=True)
class Layer:
    """A fusion convolution."""

    level: int
    inputs: int
    outputs: int
    extent: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.inputs}→{self.outputs}, {'×'.join(map(str, self.extent))}"


def layers(size: int) -> list[Layer]:
    """The first convolution of each level's fusion node."""
    extent, found = (size, size, size), []
    for level, width in enumerate(AMOS.channels[:-1], 1):
        finer = AMOS.channels[level - 2] if level > 1 else 0
        found.append(Layer(level, 2 * width + finer, width, extent))
        depth, height, columns = (e // s for e, s in zip(extent, AMOS.strides[level - 1], strict=True))
        extent = (depth, height, columns)
    return found


def peak_memory(build: Callable[..., Action], *arguments: object) -> float:
    """The most memory, in MiB, that a process took which only built an action and ran it twice, torch included."""
    work = partial(_peak, build, threads=torch.get_num_threads())
    ((_, peak),) = share(work, [arguments], workers=1, where="peak_memory()", remedy="Measure something smaller.")
    return peak


def _peak(build: Callable[..., Action], arguments: Sequence[object], *, threads: int) -> float:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    action = build(*arguments)
    for _ in range(2):
        action()
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the peak of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10  # KiB
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on a Mac
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def medians(actions: Mapping[str, Action], repeats: int) -> dict[str, float]:
    """Milliseconds of each action, taking turns so that what else the machine does falls on all; the first warms up.

    >>> list(medians({"nothing": lambda: None}, repeats=1))
    ['nothing']
    """
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(times[1:]) for name, times in taken.items()}


def config(size: int) -> E2ENetConfig:
    """The paper's network for AMOS; at 32³ it halves no depth at first, lest the coarsest level be a single voxel."""
    first = (1, 2, 2) if size <= 32 else (2, 2, 2)
    return E2ENetConfig(strides=(first, *((2, 2, 2),) * 4))


def e2enet(size: int) -> E2ENet:
    """The same start each time."""
    torch.manual_seed(0)
    return E2ENet(config(size))


def in_format(model: nn.Module, x: Tensor, name: str) -> tuple[nn.Module, Tensor]:
    """A model, itself changed, and its input with the channels first or last in memory."""
    return model.to(memory_format=FORMATS[name]), x.to(memory_format=FORMATS[name])


def progress(text: str) -> None:
    """A line for who waits, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options that all of the benchmarks have."""
    lines = make_parser(description)
    default = " (default: %(default)s)"
    lines.add_argument("--repeats", type=int, default=7, help="rounds of which the medians are taken" + default)
    lines.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads" + default)
    lines.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results" + default)
    return lines


def begin(lines: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as given, after what is measured on has been printed."""
    options = lines.parse_args()
    make_folder(options.out)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{info()}\ntorch {torch.__version__}, float32, medians of {options.repeats}")
    return options


def write(options: argparse.Namespace, name: str, results: Sequence[Mapping[str, Any]]) -> None:
    """``name``.json in the folder of the results."""
    machine = {"engine": str(info()), "torch": torch.__version__, "repeats": options.repeats}
    write_json(options.out / f"{name}.json", {"machine": machine, "results": list(results)})
    print(f"written: {name}.json and {name}.png in {options.out}")


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], label: str) -> None:
    """A figure: a bar for each number, side by side in groups, and a line at 1."""
    from matplotlib.figure import Figure  # the benchmarks run without, up to here

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    drawn = Figure(figsize=(2 + 1.6 * len(groups), 3.4), layout="constrained")
    axes = drawn.subplots()
    for i, name in enumerate(names):
        heights = [(j, group[name]) for j, group in enumerate(groups.values()) if name in group]
        axes.bar([j - 0.4 + (i + 0.5) * width for j, _ in heights], [h for _, h in heights], width, label=name)
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set(ylabel=label, xticks=range(len(groups)), xticklabels=list(groups))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    drawn.savefig(image := BytesIO(), format="png", dpi=150)
    write_whole(path, image.getbuffer())
