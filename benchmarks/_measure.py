"""What the benchmarks share: clocks, actions that take turns, peak memory, options, results and a figure of bars."""

import argparse
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from dstlib.command_line import make_parser
from dstlib.engine import info
from dstlib.files import make_folder, write_json
from dstlib.plot import drawn
from dstlib.workers import share

Action = Callable[[], Any]
Name = TypeVar("Name")


def wall(action: Action) -> float:
    """Milliseconds until all that the action started is done, on a GPU too."""
    _synchronize()
    start = time.perf_counter()
    action()
    _synchronize()
    return 1e3 * (time.perf_counter() - start)


def cpu(action: Action) -> float:
    """Milliseconds of this process on the CPU, which programs beside it lengthen less."""
    start = time.process_time()
    action()
    return 1e3 * (time.process_time() - start)


def gpu(action: Action) -> float:
    """Milliseconds by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def own(action: Action) -> Any:
    """What the action returns: it times itself."""
    return action()


def times(
    actions: Mapping[Name, Action], rounds: int, *, clock: Callable[[Action], Any] = wall, warm_up: int = 1
) -> dict[Name, list[Any]]:
    """What each action took in each round, taking turns so that what else the machine does falls on all alike.

    >>> {name: len(taken) for name, taken in times({"nothing": lambda: None}, 3).items()}
    {'nothing': 3}
    """
    taken = [{name: clock(action) for name, action in actions.items()} for _ in range(warm_up + rounds)]
    return {name: [each[name] for each in taken[warm_up:]] for name in actions}


def medians(
    actions: Mapping[Name, Action], rounds: int, *, clock: Callable[[Action], float] = wall, warm_up: int = 1
) -> dict[Name, float]:
    """The median of what each action took, as :func:`times` has it."""
    return {name: median(each) for name, each in times(actions, rounds, clock=clock, warm_up=warm_up).items()}


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def recorded(action: Action) -> Action:
    """The same work as one CUDA graph, which costs no Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


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


def progress(text: str) -> None:
    """A line for who waits, apart from the results."""
    print(f"... {text}", file=sys.stderr, flush=True)


def needs_gpu() -> None:
    """Ends the program where there is none."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU, and torch sees none.")
    torch.backends.cudnn.benchmark = True


def command_line(
    description: str | None, *, repeats: int = 7, flag: str | None = "--repeats", threads: int | None = None
) -> argparse.ArgumentParser:
    """The options of a benchmark that writes its results."""
    lines, default = make_parser(description), " (default: %(default)s)"
    if flag:
        told = "rounds of which the medians are taken" + default
        lines.add_argument(flag, dest="repeats", type=int, metavar="N", default=repeats, help=told)
    threads = threads or torch.get_num_threads()
    lines.add_argument("--threads", type=int, default=threads, help="CPU threads" + default)
    lines.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results" + default)
    return lines


def begin(lines: argparse.ArgumentParser, *, on_gpu: bool = False) -> argparse.Namespace:
    """The options as given, after what is measured on has been printed."""
    options = lines.parse_args()
    if on_gpu:
        needs_gpu()
    make_folder(options.out)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(machine(on_gpu=on_gpu) + (f", medians of {options.repeats}" if "repeats" in options else ""))
    return options


def machine(*, on_gpu: bool = False) -> str:
    """What is measured on, as a line or two of text."""
    return f"{torch.cuda.get_device_name() if on_gpu else info()}\ntorch {torch.__version__}"


def write(
    path: Path, options: argparse.Namespace, results: Sequence[Mapping[str, Any]], *, on_gpu: bool = False
) -> None:
    """A file of results: the machine, the options and the rows."""
    settings = {name: str(value) for name, value in vars(options).items()}
    write_json(path, {"machine": machine(on_gpu=on_gpu), "settings": settings, "results": list(results)})
    print(f"written: {path}")


def bars(path: Path, heights: Iterable[tuple[str, str, str, float]], label: str) -> None:
    """A figure of bars, each a title of a panel, a group in it, a name and a height, with a line at 1."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for title, group, name, height in heights:
        panels.setdefault(title, {}).setdefault(group, {})[name] = height
    most = max(len(groups) for groups in panels.values())
    with drawn(path, size=((2 + 1.6 * most) * len(panels), 3.4)) as figure:
        for axes, (title, groups) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            names = list(dict.fromkeys(name for group in groups.values() for name in group))
            width = 0.8 / len(names)
            for i, name in enumerate(names):
                found = {j - 0.4 + (i + 0.5) * width: x[name] for j, x in enumerate(groups.values()) if name in x}
                axes.bar(list(found), list(found.values()), width, label=name)
            axes.axhline(1, color="#555555", linewidth=0.8)
            axes.set(title=title, ylabel=label, xticks=range(len(groups)), xticklabels=list(groups))
        axes.legend(fontsize=7)
    print(f"written: {path}")
