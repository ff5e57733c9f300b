"""The order of a plan's steps: one in which few large maps wait for their readers at a time."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
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
    life = _Life.of(network, extents)
    least_added, as_it_was = (life.order(cost) for cost in (life.added, lambda step, taken: 0))
    order = min(least_added, as_it_was, key=life.most_alive)
    places = {0: 0} | {step + 1: place for place, step in enumerate(order, 1)}
    moved = [
        replace(each, views=tuple(replace(view, map=places[view.map]) for view in each.views)) for each in network.steps
    ]
    outputs = tuple(replace(view, map=places[view.map]) for view in network.outputs)
    return Steps(network.channels, tuple(moved[step] for step in order), outputs)


Cost = Callable[[int, Collection[int]], int]


@dataclass(frozen=True)
class _Life:
    """Which maps are alive once some steps are taken.

    Steps and maps are known by their numbers: map 0 is the image, map i + 1 what step i makes. ``read`` has the maps
    that each step reads, ``readers`` the steps that read each map, after all of them whoever called; ``flows`` are the
    transposed convolutions that go with the convolution that reads them.
    """

    sizes: Sequence[int]
    read: Sequence[Sequence[int]]
    readers: Sequence[Sequence[int]]
    flows: frozenset[int]

    @staticmethod
    def of(network: Steps, extents: Sequence[int]) -> "_Life":
        steps, num = network.steps, len(network.steps)
        read = [[view.map for view in step.views] for step in steps]
        readers: list[list[int]] = [[] for _ in range(num + 1)]
        for step, maps in enumerate(read):
            for each in maps:
                readers[each].append(step)
        for view in network.outputs:
            readers[view.map].append(num)
        alone = {step: readers[step + 1][0] for step in range(num) if len(readers[step + 1]) == 1}
        flows = frozenset(
            step
            for step, reader in alone.items()
            if steps[step].kind == "conv_transpose" and reader < num and steps[reader].kind == "conv"
        )
        return _Life(_sizes(network, extents), read, readers, flows)

    def order(self, cost: Cost) -> list[int]:
        """Takes of the steps that could be next that of least cost, the first of equals, until all are taken."""
        found: list[int] = []
        taken: set[int] = set()
        while len(found) < len(self.read):
            could = (step for step in range(len(self.read)) if self._is_ready(step, taken))
            step = min(could, key=lambda step: cost(step, taken))
            now = self._together(step)
            taken.update(now)
            found += now
        return found

    def most_alive(self, order: Sequence[int]) -> int:
        """Counts the numbers in the maps that are there at the worst moment of an order."""
        alive = most = self.sizes[0]
        taken: set[int] = set()
        for step in order:
            if step not in self.flows:
                is_over = self.sizes[step + 1] in self._freed(step, taken)
                most = max(most, alive + (0 if is_over else self.sizes[step + 1]))
                alive += self.added(step, taken)
                taken.update(self._together(step))
        return most

    def added(self, step: int, taken: Collection[int]) -> int:
        """Counts the numbers that are alive after a step, less those before."""
        return self.sizes[step + 1] - sum(self._freed(step, taken))

    def _freed(self, step: int, taken: Collection[int]) -> list[int]:
        """Returns the sizes of the maps that nobody reads after a step."""
        now = self._together(step)
        maps = {each for part in now for each in self.read[part] if each - 1 not in now}
        return [
            self.sizes[each] for each in maps if all(reader in taken or reader in now for reader in self.readers[each])
        ]

    def _is_ready(self, step: int, taken: Collection[int]) -> bool:
        now = self._together(step)
        maps = [each for part in now for each in self.read[part] if each - 1 not in now]
        return step not in taken and step not in self.flows and all(each == 0 or each - 1 in taken for each in maps)

    def _together(self, step: int) -> list[int]:
        """Returns a step behind the flows that go with it."""
        flows = dict.fromkeys(each - 1 for each in self.read[step] if each - 1 in self.flows)
        return [*flows, step]


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
