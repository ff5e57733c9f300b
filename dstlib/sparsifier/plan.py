"""The plan of a sparse training: which weights are sparse, and how dense each is to become. Changes nothing."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from numbers import Real
from typing import Literal

from torch import Tensor, nn

from dstlib.errors import SelectionError, SettingError, require
from dstlib.masking import NM, AtInit, Budget, Element, InitScale, InTurn, folded_shape, momentum, num_units, spend
from dstlib.methods.method import Method
from dstlib.schedules import Clock, Constant, Every
from dstlib.sparsifier.asked import unmet
from dstlib.sparsifier.given import GivenMasks, agrees, check_room, count, following
from dstlib.targets import (
    Weight,
    check_matches,
    check_matches_sparse,
    example_axes,
    select,
    shortfall,
    unknown_axes,
    unwrap,
)

Storage = Literal["masked", "compact"]
Take = Callable[[nn.Module, Sequence[Weight]], tuple[GivenMasks, tuple[Weight, ...]]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of a sparse training, as ``sparsify`` takes it, but for the model and the method.

    Globs are tuples here. ``masks`` finds the masks to start from, given the model and its weights; they may stand for
    the sparsity.
    """

    sparsity: float | None
    masks: Take | None = None
    total_steps: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    split: Mapping[str, int] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    keep_neurons: tuple[str, ...] | None = None
    init_scale: InitScale | None = None
    storage: Storage = "masked"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a sparsifier needs to know beforehand.

    ``total_steps`` are those of the run, None if unknown. ``weights`` are all parameters with two axes or more, sparse
    or dense, ``num_dense`` counts the entries of all others; ``densities`` are the final ones, by matrix view,
    ``starts`` those that a ramp leads from, and ``own`` names the views whose sparsity was overridden, which no
    allocator moves. ``densities_from``: they came of the settings alone, of a look at the model, or of masks. ``given``
    are masks to start from, until they are taken; ``sparsity_from_masks``: they alone say how sparse weights become.
    ``init_scale`` is that of the first weights.
    ``outputs`` names the weights whose neurons are to be kept; None: those that the model's outputs come from, which
    are found.
    ``masked_as`` says of weights that were to be compact why they are masked instead.
    """

    method: Method
    clock: Clock
    weights: tuple[Weight, ...]
    densities: Mapping[str, float]
    starts: Mapping[str, float]
    num_dense: int
    seed: int
    total_steps: int | None = None
    own: frozenset[str] = frozenset()
    densities_from: Literal["settings", "look", "masks"] = "settings"
    given: GivenMasks | None = None
    sparsity_from_masks: bool = False
    init_scale: InitScale | None = None
    outputs: frozenset[str] | None = None
    masked_as: Mapping[str, str] = field(default_factory=dict)

    def num_target(self, name: str, num_total: int, step: int) -> int:
        """Counts the active units, of ``num_total`` in each group, of a matrix view after an update at ``step``."""
        density = self.density(name, step)
        return num_units(num_total, self.method.with_surplus(density, self.clock.approach(step)))

    def budget(self, name: str, num_active_G: Tensor, num_total: int, step: int) -> Budget:
        """Returns what a matrix view, of ``num_total`` units in each group, keeps and grows by itself at an update."""
        return spend(
            num_active_G,
            num_target=self.num_target(name, num_total, step),
            drop_fraction=self.drop_fraction(step),
            num_kept=num_units(num_total, self.density(name, step)),
            round_up=self.method.round_up,
        )

    def drop_fraction(self, step: int) -> float:
        """Returns the share of the active units to exchange at ``step``."""
        return self.method.drop_fraction(self.clock.progress(step))

    def density(self, name: str, step: int) -> float:
        """Returns the density of a matrix view after an update at ``step``, before any surplus."""
        return self.method.density(self.densities[name], self.clock.approach(step), self.starts[name])


def make_plan(model: nn.Module, method: Method, settings: Settings) -> Plan:
    """Checks every setting and resolves it against the model.

    Raises:
        SettingError: A number is out of range, or settings contradict each other.
        SelectionError: A glob matches nothing, or a weight has no data.
    """
    allowed = "another criterion"
    remedy = "The optimizer's state is masked like the weight, so it cannot tell what to grow; use gradient."
    require(
        method.grow is not momentum, "grow", f"method {method.name}", allowed=allowed, given="momentum", remedy=remedy
    )
    model, s = unwrap(model), settings
    weights = select(model, include=s.include, exclude=s.exclude, split=s.split, axes=s.axes)
    # compact storage initialises one layer at a time
    sparse = [weight for weight in weights if not weight.reason and s.storage == "masked"]
    meta = [weight.name for weight in sparse if weight.parameter.is_meta]
    require(
        not meta,
        "weights",
        "the model",
        allowed="ones with data",
        given=f"{next(iter(meta), None)} on meta",
        remedy='Call model.to_empty(device=...) and initialise it first; storage="compact" does so layer by layer.',
        error=SelectionError,
    )
    for pattern in s.keep_neurons or ():
        check_matches(pattern, weights, "the model, as a layer whose neurons are kept")
    sparsity, overrides, given = s.sparsity, s.overrides, None
    if s.masks is not None:
        _check_starts(method)
        given, weights = s.masks(model, weights)
    asked = {} if given is not None and sparsity is None else {"sparsify()": sparsity}
    for where, value in {**asked, **{f"override {k!r}": v for k, v in overrides.items()}}.items():
        check_sparsity(value, where)
    density = None if sparsity is None else 1 - sparsity
    if given is not None:
        densities, starts, own = _spread_by_masks(given, weights, method, density, overrides)
    else:
        assert density is not None, "it was checked"
        densities, starts, own = _spread(weights, method, density, overrides)
    tells_axes = not isinstance(method.granularity, Element)
    rounded = "" if given is not None or density is None else unmet(weights, densities, method.granularity, 1 - density)
    full = _no_zeros(given, densities) if given is not None and density is None else ""
    left_out = shortfall(weights, s.include, tells_axes=tells_axes, fits=lambda weight: _fits(weight, method))
    for message in filter(None, (rounded, full, left_out, unknown_axes(weights))):
        warnings.warn(message, stacklevel=3)
    plan = Plan(
        method=method,
        clock=_make_clock(method, s.total_steps),
        weights=weights,
        densities=densities,
        starts=starts,
        own=own,
        outputs=_matching(weights, s.keep_neurons),
        num_dense=sum(p.numel() for p in model.parameters() if p.ndim < 2),
        seed=s.seed,
        total_steps=s.total_steps,
        densities_from="settings" if given is None else "masks",
        given=given,
        sparsity_from_masks=sparsity is None,
        init_scale=s.init_scale,
    )
    if given is not None:
        check_room(given, plan.weights, method, partial(plan.num_target, step=0), apart=plan.own)
    return plan


def _spread(
    weights: Sequence[Weight], method: Method, density: float, overrides: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float], frozenset[str]]:
    """Returns the densities by matrix view, those that a ramp leads from, and which were overridden."""
    densities, own = _densities(weights, method, density, overrides)
    starts = dict.fromkeys(densities, 1.0)
    if (start := method.starting_density(density)) < 1:
        require(
            density <= start,
            "start_density",
            f"method {method.name}",
            allowed=f"at least the density at the end, {density:g}",
            given=f"{start:g}",
            remedy="Raise it by replace(method, start_density=...), or the sparsity.",
        )
        starts = _densities(weights, method, start, overrides)[0]
        starts |= {name: max(method.starting_density(densities[name]), densities[name]) for name in own}
    return densities, starts, own


def _spread_by_masks(
    given: GivenMasks, weights: Sequence[Weight], method: Method, density: float | None, overrides: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float], frozenset[str]]:
    """Returns the same where training starts from masks: theirs, or what a ramp leads to from there."""
    for weight in weights:
        if not weight.reason:
            _check_folds(weight, method)
    apart = {view.name for w in weights for view in w.views if any(map(w.matches, overrides))}
    counts = count(given, weights, method, may_fill=density is not None, apart=apart)
    by_masks = replace(method, distribution=following(counts, given, method, is_asked=density is not None))
    densities, own = _densities(weights, by_masks, density or 0.0, overrides)
    for name in own:
        if agrees(densities[name], [counts[name]], given, method, f"an override, {name}"):
            densities[name] = counts[name].density
    # where the settings ask for more than is not zero, the rest of it is active from the start
    return densities, {name: max(c.density, densities[name]) for name, c in counts.items()}, own


def _no_zeros(given: GivenMasks, densities: Mapping[str, float]) -> str:
    """Returns what to say where masks leave nothing sparse, as those of a dense phase; empty where they do."""
    if any(density < 1 for density in densities.values()):
        return ""
    return (
        f"sparsify(): {given.where} have no zeros, so all weights stay dense. Pass the masks of a sparse phase, or "
        'sparsity= as well and a method that prunes, such as "gmp".'
    )


def _check_starts(method: Method) -> None:
    """Checks that a method can start from masks."""
    way = [method.ramp(step / 1000) for step in range(1001)]
    allowed = "one that begins at the masks given, and never becomes denser again"
    for holds, given in (
        (not isinstance(method.init, AtInit | InTurn), "first masks by a look at the dense model"),
        (all(a <= b for a, b in pairwise(way)), "a ramp with denser phases"),
    ):
        remedy = 'Choose another method, such as "rigl".'  # without masks, weights that were loaded may be cut
        require(holds, "method", f"sparsify(masks=) with {method.name}", allowed=allowed, given=given, remedy=remedy)


def _matching(weights: Sequence[Weight], patterns: Sequence[str] | None) -> frozenset[str] | None:
    if patterns is None:
        return None
    return frozenset(weight.name for weight in weights if any(weight.matches(pattern) for pattern in patterns))


def check_sparsity(value: float | None, where: str) -> None:
    """Checks that a sparsity is a share of the weights.

    Raises:
        SettingError: It is none.
    """
    require(
        value is not None and isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < 1,
        "sparsity",
        where,
        allowed="a number in [0, 1)",
        given=repr(value),
        remedy="0.9 leaves a tenth of the weights active; 0 leaves all of them.",
    )


def _densities(
    weights: Sequence[Weight], method: Method, density: float, overrides: Mapping[str, float]
) -> tuple[dict[str, float], frozenset[str]]:
    """Returns densities by matrix view, overridden or spread by the distribution, and which were overridden."""
    sparse = [weight for weight in weights if not weight.reason]
    for weight in sparse:
        _check_folds(weight, method)
    for pattern in overrides:
        check_matches_sparse(pattern, weights, "the sparse weights, as an override")
    own: dict[str, float] = {}
    shared: dict[str, tuple[int, ...]] = {}
    for weight in sparse:
        matching = [value for pattern, value in overrides.items() if weight.matches(pattern)]
        for view in weight.views:
            if matching:
                own[view.name] = 1 - matching[-1]
            else:
                shared[view.name] = tuple(view.of(weight.parameter).shape)
    spread = method.distribution(shared, density) if shared else {}
    densities = {s.name: {**spread, **own}.get(s.name) for w in sparse for s in w.views}
    return {name: _checked_density(name, d, method) for name, d in densities.items()}, frozenset(own)


def _check_folds(weight: Weight, method: Method) -> None:
    """Checks that the granularity divides a weight, and that its axes are known if it tells them apart."""
    for view in weight.views:
        matrix = view.of(weight.parameter)
        try:
            shape = folded_shape(method.granularity, matrix.shape)
        except SettingError as error:
            joined = f' Or keep its {len(weight.views)} parts together: split={{"{weight.name}": 1}}.'
            hint = joined if weight.can_split and len(weight.views) > 1 else ""
            raise SettingError(f"{view.name}, {tuple(matrix.shape)} as outputs, inputs, taps: {error}{hint}") from error
        if not weight.knows_axes and shape != (1, matrix.numel(), 1):
            raise SettingError.of(
                f"granularity {method.granularity}",
                f"{view.name}, {tuple(matrix.shape)}",
                allowed="Element(), as nothing says which of its axes counts the outputs",
                given="one that tells outputs from inputs",
                remedy=f'State the axes, by axes={{"{weight.name}": "{example_axes(weight)}"}}, say, or exclude it.',
            )


def _fits(weight: Weight, method: Method) -> bool:
    """Whether the granularity divides a weight, as far as its axes are known."""
    try:
        _check_folds(replace(weight, knows_axes=True), method)
    except SettingError:
        return not weight.knows_axes
    return True


def _checked_density(name: str, density: float | None, method: Method) -> float:
    if density is None or not 0 <= density <= 1:
        raise SettingError.of(
            "density",
            f"{name}, by the distribution of method {method.name}",
            allowed="a number in [0, 1]",
            given=density,
            remedy="A distribution returns a density for every name it is given.",
        )
    if isinstance(grain := method.granularity, NM):
        require(
            # 1e-9: the sparsity was subtracted from 1, which moves the density by 1e-16 at most
            density == 1 or abs(density - grain.n / grain.m) <= 1e-9,
            "sparsity",
            name,
            allowed=f"{1 - grain.n / grain.m:g}, as {grain.n} of every {grain.m} stay active",
            given=f"{1 - density:g} from the distribution of method {method.name}",
            remedy="Pass that sparsity, and replace(method, distribution=dstlib.uniform).",
        )
    return density


def _make_clock(method: Method, total_steps: int | None) -> Clock:
    require(
        total_steps is None or type(total_steps) is int,
        "total_steps",
        "sparsify()",
        allowed="a whole number or None",
        given=repr(total_steps),
        remedy="Count the optimizer steps of the whole run.",
    )
    clock = method.clock(total_steps)
    if not isinstance(clock, Every):
        return clock
    if clock.stop is None:
        _check_without_end(method)
    return clock


def _check_without_end(method: Method) -> None:
    """Checks that a method can do without the number of steps; warns where its paper does not."""
    require(
        isinstance(method.ramp, Constant) and isinstance(method.surplus, Constant),
        "total_steps",
        f"sparsify() with method {method.name}",
        allowed="the number of optimizer steps of the run, which its density follows",
        given=None,
        remedy="Pass total_steps=.",
    )
    if isinstance(method.drop_fraction, Constant) and method.stop == 1:
        return  # it is the same with and without an end
    warnings.warn(
        f"Without total_steps, {method.name} changes masks each {method.interval} steps for ever, at a constant "
        f"drop fraction of {method.drop_fraction(0.0):g}; its paper ends at {method.stop:.0%} of the run. "
        "Pass total_steps= for the full method.",
        stacklevel=5,
    )
