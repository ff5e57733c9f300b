"""What the benchmarks on a GPU share: its own clock, and CUDA graphs."""

import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from _measure import Action


def needs_gpu() -> None:
    """Ends the program where there is none."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU, and torch sees none.")
    torch.backends.cudnn.benchmark = True


def milliseconds(action: Action) -> float:
    """Of one run, by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def medians(actions: Mapping[Any, Action], rounds: int) -> dict[Any, float]:
    """Milliseconds of each action, taking turns, after three rounds to warm up."""
    times = [{name: milliseconds(action) for name, action in actions.items()} for _ in range(rounds + 3)][3:]
    return {name: median(taken[name] for taken in times) for name in actions}


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
