"""The order of a plan's steps: one in which few large maps wait for their readers at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

from dstlib.export.steps import Steps


def in_little_memory(network: Steps, extents: Sequence[int]) -> Steps:
    """Puts the steps into an order in which their maps take little memory, for an image of these extents (D, H, W).

    Of the steps that could be next it takes the one after which least is alive, the first of equals, or keeps the order
    where that takes more at its worst. Counted is as the native library lays maps out: what a transposed convolution
    gives the one convolution that reads it is never there as a whole, and an output takes the place of an input of its
    size that nobody reads after it.

    >>> from dstlib.export.steps import Step, View
    >>> one, half = (1, 1, 1), (2, 2, 2)
    >>> make, pool = Step("conv", (View(0),), 8, one), Step("max_pool", (View(1),), 8, half)
    >>> small, large = Step("conv", (View(3),), 32, one), Step("conv", (View(1),), 8, one)
    >>> found = in_little_memory(Steps(1, (make, large, pool, small), (View(2), View(4))), (8, 8, 8))
    >>> [(step.kind, step.outputs, step.views[0].map) for step in found.steps]  # large ones overwrite
    [('conv', 8, 0), ('max_pool', 8, 1), ('conv', 8, 1), ('conv', 32, 2)]
    """
    life = _Life(network, extents)
    _, order = min((life.lived(life.growth), life.lived(lambda step: 0)), key=lambda found: found[0])
    places = {0: 0} | {step + 1: place for place, step in enumerate(order, 1)}
    moved = [
        replace(each, views=tuple(replace(view, map=places[view.map]) for view in each.views)) for each in network.steps
    ]
    outputs = tuple(replace(view, map=places[view.map]) for view in network.outputs)
    return Steps(network.channels, tuple(moved[step] for step in order), outputs)


class _Life:
    """Which maps are alive as steps are taken, by the numbers of steps and of what they read."""

    def __init__(self, network: Steps, extents: Sequence[int]) -> None:
        self.steps = network.steps
        self.read = [[view.map for view in step.views] for step in network.steps]
        readers: list[list[int]] = [[] for _ in range(len(network.steps) + 1)]
        for step, maps in enumerate(self.read):
            for each in maps:
                readers[each].append(step)
        for view in network.outputs:
            readers[view.map].append(len(network.steps))
        self.readers = readers
        self.flows = {
            step
            for step, each in enumerate(network.steps)
            if each.kind == "conv_transpose" and len(readers[step + 1]) == 1 and self._is_conv(readers[step + 1][0])
        }
        self.sizes = _sizes(network, extents)
        self.taken: set[int] = set()

    def lived(self, cost: Callable[[int], int]) -> tuple[int, list[int]]:
        """Takes of the steps that could be next that of least cost, and returns the most alive, and the order."""
        self.taken, order = set(), list[int]()
        alive = most = self.sizes[0]
        while len(order) < len(self.steps):
            step = min(filter(self._is_ready, range(len(self.steps))), key=lambda step: (cost(step), step))
            freed = self._freed(step)
            is_over = self.sizes[step + 1] in freed
            most = max(most, alive + (0 if is_over else self.sizes[step + 1]))
            alive += self.growth(step)
            now = [*self._flows_of(step), step]
            self.taken.update(now)
            order += now
        return most, order

    def growth(self, step: int) -> int:
        """How much more is alive after a step."""
        return self.sizes[step + 1] - sum(self._freed(step))

    def _freed(self, step: int) -> list[int]:
        """Returns the sizes of maps that nobody reads after a step."""
        now = {step, *self._flows_of(step)}
        maps = {each for part in now for each in self.read[part] if each - 1 not in now}
        return [self.sizes[each] for each in maps if set(self.readers[each]) <= self.taken | now]

    def _is_ready(self, step: int) -> bool:
        flows = self._flows_of(step)
        maps = {each for part in (step, *flows) for each in self.read[part]} - {flow + 1 for flow in flows}
        return step not in self.taken | self.flows and all(each == 0 or each - 1 in self.taken for each in maps)

    def _flows_of(self, step: int) -> list[int]:
        return [each - 1 for each in self.read[step] if each - 1 in self.flows]

    def _is_conv(self, step: int) -> bool:
        return step < len(self.steps) and self.steps[step].kind == "conv"


def _sizes(network: Steps, extents: Sequence[int]) -> list[int]:
    """Returns the numbers in each map, the image's first."""
    found, channels = [tuple(extents)], [network.channels]
    for step in network.steps:
        along = zip(found[step.views[0].map], step.stride, strict=True)
        if step.kind == "conv_transpose":
            found.append(tuple(n * by for n, by in along))
        else:
            found.append(tuple(n // by if step.kind == "max_pool" else -(-n // by) for n, by in along))
        channels.append(step.outputs)
    return [c * prod(size) for c, size in zip(channels, found, strict=True)]
