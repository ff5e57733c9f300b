"""What every criterion keeps to: a function of its site, of any shape, precision and layout, and of nothing else."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dstlib.masking import Criterion, Site, site_generator
from dstlib.testing.laws import BreachError, Law, attempt, global_state, hold, laws, world


@dataclass(frozen=True, kw_only=True)
class Case:
    """A site to be scored. ``active``: half of the entries, all, or one; ``kind``: how weights lie and look."""

    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    active: str = "half"
    kind: str = "plain"

    def __str__(self) -> str:
        return f"{self.what}: {str(self.dtype).removeprefix('torch.')}, shape {self.shape}, {self.active} active"

    def site(self, step: int = 7) -> Site:
        """The same site each time, with a fresh generator."""
        weight, grad, momentum, trace = (self._tensor(i) for i in range(4))
        mask = self._tensor(4) > 0 if self.active == "half" else torch.ones_like(weight, dtype=torch.bool)
        if self.active == "one":
            mask[...] = False
            mask[-1, 0] = torch.arange(mask[-1, 0].numel()).view(mask[-1, 0].shape) == 0
        if self.kind != "hidden":
            weight.masked_fill_(~mask, 0.0)
        name, generator = "layer", site_generator(0, step, "layer")
        return Site(
            name=name,
            weight=weight,
            mask=mask,
            grad=grad,
            momentum=momentum,
            step=step,
            generator=generator,
            trace=trace,
            progress=0.25,
        )

    def _tensor(self, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64, device="cpu").to(self.dtype)
        if self.kind == "zero":
            values.zero_()
        return values.transpose(0, 1).contiguous().transpose(0, 1) if self.kind == "turned" else values


PLAIN = Case(what="a matrix", shape=(6, 5))
TURNED = Case(what="a transposed convolution, which is a view", shape=(4, 6, 3, 2), kind="turned")
CASES = (
    PLAIN,
    Case(what="a convolution in one dimension", shape=(4, 3, 5)),
    Case(what="a convolution in three dimensions", shape=(4, 3, 2, 3, 2)),
    Case(what="half precision", shape=(6, 5), dtype=torch.bfloat16),
    Case(what="double precision", shape=(6, 5), dtype=torch.float64),
    Case(what="a single weight", shape=(1, 1), active="all"),
    Case(what="a dense convolution", shape=(4, 3, 2, 2), active="all"),
    Case(what="a weight that is almost gone", shape=(4, 3, 2, 2), active="one"),
    Case(what="values under the mask, as dense storage has them", shape=(6, 5), kind="hidden"),
    Case(what="weights and gradients that are all zero", shape=(6, 5), kind="zero"),
)


def check_criterion(criterion: Criterion) -> None:
    """Holds a criterion to its laws, on sites that have a gradient, a momentum and a trace.

    - *runs*: on weights of 2 to 5 axes, in bfloat16, single and double precision, with a single entry, with all
      or one of them active, with values under the mask, and where all is zero.
    - *shape*: a real tensor of the weight's shape, on its device.
    - *finite*: no NaN, no infinity.
    - *changes nothing*: weight, mask, gradient, momentum and trace stay as they were, bit for bit.
    - *repeatable*: equal (seed, step, name) give equal scores, whatever was scored in between.
    - *no global randomness*: the global generators of torch, NumPy and Python are neither read nor moved.
    - *no defaults*: torch's default dtype and device do not matter.
    - *memory layout*: a transposed view scores like its contiguous copy, up to rounding.
    - *autograd*: scores carry no graph, and are the same with and without gradient mode.

    A criterion may read ``site.grad`` without asking whether there is one. One that others will use raises a
    ScoreError where it is None.

    Raises:
        LawError: The first law that is broken.

    >>> from dstlib.masking import magnitude
    >>> check_criterion(magnitude)
    >>> check_criterion(lambda site: site.weight.abs() / site.weight.abs().sum())
    Traceback (most recent call last):
    dstlib.testing.laws.LawError: law 'finite' of criterion <lambda>, on weights and gradients that are all zero: \
float32, shape (6, 5), half active: expected finite scores, got 30 that are NaN or infinite. Guard a division: \
x / total.clamp_min(1e-30).
    """
    hold(criterion_laws(criterion))


def criterion_laws(criterion: Criterion) -> tuple[Law, ...]:
    """Returns the laws of :func:`check_criterion`, one by one."""
    return laws("criterion", criterion, LAWS, criterion)


def _runs(criterion: Criterion) -> None:
    for case in CASES:
        _called(criterion, case)


def _shape(criterion: Criterion) -> None:
    for case in CASES:
        _scored(criterion, case)


def _finite(criterion: Criterion) -> None:
    for case in CASES:
        if num_bad := int((~_scored(criterion, case).isfinite()).sum()):
            got, remedy = f"{num_bad} that are NaN or infinite", "Guard a division: x / total.clamp_min(1e-30)."
            raise BreachError(on=case, expected="finite scores", got=got, remedy=remedy)


def _changes_nothing(criterion: Criterion) -> None:
    for case in CASES:
        site = _called(criterion, case)[1]
        with world(0):
            untouched = case.site()
        for name in ("weight", "mask", "grad", "momentum", "trace"):
            if not torch.equal(getattr(site, name), getattr(untouched, name)):
                remedy = "A criterion only looks. Copy before you write: site.grad.clone(), or abs() for abs_()."
                raise BreachError(on=case, expected=f"site.{name} as it was", got="other values", remedy=remedy)


def _repeatable(criterion: Criterion) -> None:
    first = _scored(criterion, PLAIN)
    _scored(criterion, CASES[2])
    if not _same(first, _scored(criterion, PLAIN)):
        remedy = (
            "Keep nothing between calls: a resumed run starts without it, and scores of other weights would count. "
            "Method.trace gathers over steps. Draw from site.generator, by site.rand() say."
        )
        expected, got = "the same scores for the same site", "others the second time"
        raise BreachError(on=PLAIN, expected=expected, got=got, remedy=remedy)


def _no_global_randomness(criterion: Criterion) -> None:
    remedy = "Draw from site.generator, which knows seed, step and name: site.rand(), say."
    if not _same(*(_scored(criterion, PLAIN, seed) for seed in (0, 1))):
        raise BreachError(on=PLAIN, expected="the same scores under any global seed", got="others", remedy=remedy)
    with world(0), torch.no_grad():
        before = global_state()
        criterion(PLAIN.site())
        if global_state() != before:
            expected, got = "the global generators where they stood", "draws from one of them"
            raise BreachError(on=PLAIN, expected=expected, got=got, remedy=remedy)


def _no_defaults(criterion: Criterion) -> None:
    remedy = "Make tensors like another one, torch.zeros_like(site.weight), or name dtype= and device=."
    first, default = _scored(criterion, PLAIN), torch.get_default_dtype()
    other = torch.float64 if default != torch.float64 else torch.float32

    def in_another_dtype() -> Tensor:
        try:
            torch.set_default_dtype(other)
            with world(0), torch.no_grad():
                return criterion(PLAIN.site())
        finally:
            torch.set_default_dtype(default)

    def on_another_device() -> Tensor:
        with world(0), torch.no_grad():
            site = PLAIN.site()
            with torch.device("meta"):
                return criterion(site)

    for what, call in ((f"default dtype {other}", in_another_dtype), ("default device meta", on_another_device)):
        on, expected = f"{PLAIN}, {what}", "the same scores whatever the defaults are"
        found = attempt(call, on=on, expected=expected, remedy=remedy)
        if found.device != first.device or not _same(first, found):
            got = f"scores on {found.device}" if found.device != first.device else "others"
            raise BreachError(on=on, expected=expected, got=got, remedy=remedy)


def _memory_layout(criterion: Criterion) -> None:
    straight = _scored(criterion, Case(what="its copy", shape=TURNED.shape))
    expected = "scores of a view as of its contiguous copy"
    remedy = "Weights of transposed convolutions are views: use reshape() and flatten(), not view()."
    with world(0), torch.no_grad():
        site = TURNED.site()
        found = attempt(lambda: criterion(site), on=TURNED, expected=expected, remedy=remedy)
    if found.shape != straight.shape or not _same(found.double(), straight.double(), rtol=1e-4, atol=1e-6):
        got = "other scores" if found.shape == straight.shape else f"shape {tuple(found.shape)}"
        raise BreachError(on=TURNED, expected=expected, got=got, remedy=remedy)


def _autograd(criterion: Criterion) -> None:
    straight, expected = _scored(criterion, PLAIN), "the same scores in gradient mode as under no_grad, without a graph"
    remedy = "It is called under torch.no_grad(). Where you need gradients, detach() the scores."
    with world(0), torch.enable_grad():
        found = attempt(lambda: criterion(PLAIN.site()), on=PLAIN, expected=expected, remedy=remedy)
    if found.requires_grad or not _same(found, straight):
        got = "scores that require a gradient" if found.requires_grad else "others"
        raise BreachError(on=PLAIN, expected=expected, got=got, remedy=remedy)


LAWS = (
    *(_runs, _shape, _finite, _changes_nothing, _repeatable),
    *(_no_global_randomness, _no_defaults, _memory_layout, _autograd),
)


def _called(criterion: Criterion, case: Case, seed: int = 0) -> tuple[Any, Site]:
    """What a criterion returns for a fresh site, and the site after it."""
    remedy = "It is called with any weight of a model; see the cause above."
    with world(seed), torch.no_grad():
        site = case.site()
        found = attempt(lambda: criterion(site), on=case, expected="scores without an error", remedy=remedy, law="runs")
    return found, site


def _scored(criterion: Criterion, case: Case, seed: int = 0) -> Tensor:
    """What a criterion returns, once it is known to be scores."""
    score, site = _called(criterion, case, seed)
    fits = isinstance(score, Tensor) and score.shape == site.weight.shape and not score.is_complex()
    if not fits or score.device != site.weight.device:
        got = f"{score.dtype}, shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        expected = f"a real tensor of shape {case.shape} on {site.weight.device}"
        remedy = "Return one score per weight; the granularity averages them. keepdim=True keeps the axes."
        raise BreachError(on=case, expected=expected, got=got, remedy=remedy, law="shape")
    return score


def _same(first: Tensor, second: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> bool:
    return first.dtype == second.dtype and torch.allclose(first, second, rtol=rtol, atol=atol, equal_nan=True)
