"""What every criterion keeps to: a function of its site, of any shape, precision and layout, and of nothing else."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dstlib.masking import Criterion, Site, site_generator
from dstlib.testing.laws import Law, Rules, attempt, expect, global_state, hold, laws, world


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

    def site(self) -> Site:
        """The same site each time, with a fresh generator."""
        weight, grad, momentum, trace = (self._tensor(i) for i in range(4))
        mask = self._tensor(4) > 0 if self.active == "half" else torch.ones_like(weight, dtype=torch.bool)
        if self.active == "one":
            mask[...] = False
            mask[-1, 0] = torch.arange(mask[-1, 0].numel()).view(mask[-1, 0].shape) == 0
        if self.kind != "hidden":
            weight.masked_fill_(~mask, 0.0)
        return Site(
            name="layer",
            weight=weight,
            mask=mask,
            grad=grad,
            momentum=momentum,
            step=7,
            generator=site_generator(0, 7, "layer"),
            trace=trace,
            progress=0.25,
        )

    def _tensor(self, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64, device="cpu").to(self.dtype)
        if self.kind == "zero":
            values.zero_()
        return values.transpose(0, 1).contiguous().transpose(0, 1) if self.kind == "turned" else values


TURNED = Case(what="a transposed convolution, which is a view", shape=(4, 6, 3, 2), kind="turned")
CASES = (
    Case(what="a matrix", shape=(6, 5)),
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


def _runs(criterion: Criterion, case: Case) -> None:
    _called(criterion, case)


def _shape(criterion: Criterion, case: Case) -> None:
    _scored(criterion, case)


def _finite(criterion: Criterion, case: Case) -> None:
    num_bad = int((~_scored(criterion, case).isfinite()).sum())
    remedy = "Guard a division: x / total.clamp_min(1e-30)."
    expect(not num_bad, "finite scores", got=f"{num_bad} that are NaN or infinite", remedy=remedy)


def _changes_nothing(criterion: Criterion, case: Case) -> None:
    site = _called(criterion, case)[1]
    untouched = case.site()
    for name in ("weight", "mask", "grad", "momentum", "trace"):
        is_same = torch.equal(getattr(site, name), getattr(untouched, name))
        remedy = "A criterion only looks. Copy before you write: site.grad.clone(), or abs() for abs_()."
        expect(is_same, f"site.{name} as it was", got="other values", remedy=remedy)


def _repeatable(criterion: Criterion, case: Case) -> None:
    first = _scored(criterion, case)
    _scored(criterion, CASES[2])
    remedy = (
        "Keep nothing between calls: a resumed run starts without it, and scores of other weights would count. "
        "Method.trace gathers over steps. Draw from site.generator, by site.rand() say."
    )
    is_same = _same(first, _scored(criterion, case))
    expect(is_same, "the same scores for the same site", got="others the second time", remedy=remedy)


def _no_global_randomness(criterion: Criterion, case: Case) -> None:
    remedy = "Draw from site.generator, which knows seed, step and name: site.rand(), say."
    is_same = _same(*(_scored(criterion, case, seed) for seed in (0, 1)))
    expect(is_same, "the same scores under any global seed", got="others", remedy=remedy)
    with world(0), torch.no_grad():
        before = global_state()
        criterion(case.site())
        is_same = global_state() == before
    expect(is_same, "the global generators where they stood", got="draws from one of them", remedy=remedy)


def _no_defaults(criterion: Criterion, case: Case) -> None:
    remedy = "Make tensors like another one, torch.zeros_like(site.weight), or name dtype= and device=."
    first, default = _scored(criterion, case), torch.get_default_dtype()
    other = torch.float64 if default != torch.float64 else torch.float32

    def in_another_dtype() -> Tensor:
        try:
            torch.set_default_dtype(other)
            with world(0), torch.no_grad():
                return criterion(case.site())
        finally:
            torch.set_default_dtype(default)

    def on_another_device() -> Tensor:
        with world(0), torch.no_grad():
            site = case.site()
            with torch.device("meta"):
                return criterion(site)

    for what, call in ((f"default dtype {other}", in_another_dtype), ("default device meta", on_another_device)):
        on, expected = f"{case}, {what}", "the same scores whatever the defaults are"
        found = attempt(call, expected, remedy=remedy, on=on)
        is_there = found.device == first.device
        got = "others" if is_there else f"scores on {found.device}"
        expect(is_there and _same(first, found), expected, got=got, remedy=remedy, on=on)


def _memory_layout(criterion: Criterion, case: Case) -> None:
    straight = _scored(criterion, replace(case, kind="plain"))
    expected = "scores of a view as of its contiguous copy"
    remedy = "Weights of transposed convolutions are views: use reshape() and flatten(), not view()."
    with world(0), torch.no_grad():
        site = case.site()
        found = attempt(lambda: criterion(site), expected, remedy=remedy)
    fits = found.shape == straight.shape
    is_same = fits and _same(found.double(), straight.double(), rtol=1e-4, atol=1e-6)
    expect(is_same, expected, got="other scores" if fits else f"shape {tuple(found.shape)}", remedy=remedy)


def _autograd(criterion: Criterion, case: Case) -> None:
    straight, expected = _scored(criterion, case), "the same scores in gradient mode as under no_grad, without a graph"
    remedy = "It is called under torch.no_grad(). Where you need gradients, detach() the scores."
    with world(0), torch.enable_grad():
        found = attempt(lambda: criterion(case.site()), expected, remedy=remedy)
    got = "scores that require a gradient" if found.requires_grad else "others"
    expect(not found.requires_grad and _same(found, straight), expected, got=got, remedy=remedy)


LAWS: Rules[Criterion] = {
    **dict.fromkeys((_runs, _shape, _finite, _changes_nothing), lambda _: CASES),
    **dict.fromkeys((_repeatable, _no_global_randomness, _no_defaults), lambda _: CASES[:1]),
    _memory_layout: lambda _: (TURNED,),
    _autograd: lambda _: CASES[:1],
}


def _called(criterion: Criterion, case: Case, seed: int = 0) -> tuple[Any, Site]:
    """What a criterion returns for a fresh site, and the site after it."""
    remedy = "It is called with any weight of a model; see the cause above."
    with world(seed), torch.no_grad():
        site = case.site()
        return attempt(lambda: criterion(site), "scores without an error", remedy=remedy, law="runs"), site


def _scored(criterion: Criterion, case: Case, seed: int = 0) -> Tensor:
    """What a criterion returns, once it is known to be scores."""
    score, site = _called(criterion, case, seed)
    fits = isinstance(score, Tensor) and score.shape == site.weight.shape and not score.is_complex()
    got = f"{score.dtype}, shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
    expected = f"a real tensor of shape {case.shape} on {site.weight.device}"
    remedy = "Return one score per weight; the granularity averages them. keepdim=True keeps the axes."
    expect(fits and score.device == site.weight.device, expected, got=got, remedy=remedy, law="shape")
    return score


def _same(first: Tensor, second: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> bool:
    return first.dtype == second.dtype and torch.allclose(first, second, rtol=rtol, atol=atol, equal_nan=True)
