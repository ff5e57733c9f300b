"""When a method reads dense gradients, those of inactive weights: found by trying out its criteria, not declared."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dstlib.masking import Criterion, Site, site_generator
from dstlib.methods.method import Method


@dataclass(frozen=True)
class Reading:
    """When a method reads the gradients of inactive weights: at the last ``steps`` steps up to each update.

    0 is never, 1 at the update alone, None at every step for as long as updates are to come.
    """

    steps: int | None

    def share(self, interval: int | None) -> float:
        """Computes the share of such steps among those between two updates; None is a fixed topology.

        >>> Reading(1).share(100), Reading(None).share(100), Reading(8).share(4)
        (0.01, 1.0, 1.0)
        """
        if interval is None:
            return 0.0
        return 1.0 if self.steps is None else min(self.steps, interval) / interval

    def __str__(self) -> str:
        if self.steps is None:
            return "at every step"
        return {0: "never", 1: "at updates"}.get(self.steps, f"at the last {self.steps} steps up to each update")


def find_reading(method: Method, layers: Mapping[str, torch.Size] | None = None) -> Reading:
    """Finds when a method reads dense gradients, by trying out its criteria.

    Each is called twice on a small made-up site whose gradients differ in inactive weights alone: it needs them
    if what it says differs where it counts, for ``drop`` among the active weights only. So |w| + λ|g| to drop by
    needs none, |g| to grow by does. Mind that a criterion with a memory of its own will remember the calls.
    ``layers`` are names and shapes to try, (O, I, *K).

    >>> from dstlib.methods import METHODS
    >>> [str(find_reading(METHODS[name])) for name in ("set", "mest", "rigl", "snfs")]
    ['never', 'never', 'at updates', 'at every step']
    """
    if method.interval is None:
        return Reading(0)
    steps: set[int | None] = {0}
    for name, shape in (layers or {"layer": torch.Size((8, 6))}).items():
        of_all = any(_needs(criterion, method, name, shape) for criterion in (method.grow, method.grown_init))
        of_active = [method.drop] if method.prune is None else [method.drop, method.prune]
        if of_all or any(_needs(criterion, method, name, shape, among_active=True) for criterion in of_active):
            steps.add(1)
        if method.trace is not None and _needs(method.trace.of, method, name, shape):
            steps.add(method.trace.steps)
    return Reading(None if None in steps else max(n for n in steps if n is not None))


def examples(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Returns the smallest layer of each number of axes, cut to 64 outputs and inputs: criteria may cost their cube."""
    by_axes: dict[int, str] = {}
    for name, shape in shapes.items():
        if shape.numel() < shapes[by_axes.setdefault(len(shape), name)].numel():
            by_axes[len(shape)] = name
    return {n: torch.Size((*(min(extent, 64) for extent in shapes[n][:2]), *shapes[n][2:])) for n in by_axes.values()}


@torch.no_grad()
def _needs(criterion: Criterion, method: Method, name: str, shape: torch.Size, *, among_active: bool = False) -> bool:
    """Whether a criterion says something else when the gradients of inactive weights are others."""
    random_state = torch.get_rng_state()  # of a criterion that draws from elsewhere than its site
    try:
        for progress in (0.0, 0.5, 1.0):
            scores = []
            for site in _sites(method, name, shape, progress):
                torch.set_rng_state(random_state)
                score = criterion(site)
                scores.append(score[site.mask] if among_active else score.clone())
            if not torch.equal(*scores):
                return True
    finally:
        torch.set_rng_state(random_state)
    return False


def _sites(method: Method, name: str, shape: torch.Size, progress: float) -> Iterator[Site]:
    """Yields two sites that differ in the gradients outside the mask."""
    generator = torch.Generator("cpu").manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    mask = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    mask.view(-1)[0], mask.view(-1)[-1] = True, False  # some of both kinds, wherever there are two entries
    weight, grad, other, momentum, trace = (draw() for _ in range(5))
    site = Site(
        name=name,
        weight=weight if method.storage is not None else weight * mask,
        mask=mask,
        grad=grad,
        momentum=momentum * mask,
        step=1000,
        generator=site_generator(0, 1000, name),
        trace=None if method.trace is None else trace,
        progress=progress,
    )
    yield site
    yield replace(site, grad=torch.where(mask, grad, other), generator=site_generator(0, 1000, name))
