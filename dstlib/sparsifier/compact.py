"""Compact storage: weights of which the active values alone exist, their updates, and what optimizers keep of them.

Shapes: O out, I in, *K kernel taps, none of a matrix; A active entries of the (O, I) matrix, whole kernels.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib import masking
from dstlib.bounds import trim_heap
from dstlib.errors import SelectionError, SettingError, StateError
from dstlib.masking import AtInit, InTurn, PackedMask
from dstlib.methods.method import GrownState, Method
from dstlib.sparsifier.by_tiles import (
    Matrix,
    draw_by_tiles,
    goes_by_tiles,
    has_whole_kernels,
    is_row_by_row,
    places_of,
    stretch,
    update_by_tiles,
)
from dstlib.sparsifier.optimizer_state import Kept, momentum_of
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.start import start_masks
from dstlib.sparsifier.state import MaskedWeight, SavedWeight
from dstlib.sparsifier.update import Observer, fill_first_masks, update_masks
from dstlib.targets import MatrixView, Weight, unwrap

if TYPE_CHECKING:
    from dstlib.engine.layers.active_weight import ActiveWeight

Average = Callable[[Tensor], Tensor]  # the mean over the ranks, in place
State = tuple[Optimizer, Sequence[Kept]]  # what is kept for a weight


class CompactWeight(MaskedWeight):
    """A sparse weight in training whose parameter has no entry outside the mask.

    It has the counters of a masked weight; ``mask`` is made of its pattern each time that it is asked for.
    """

    def __init__(self, started: MaskedWeight, active: "ActiveWeight") -> None:
        state = dict(vars(started))
        del state["packed"]
        self.__dict__.update(state)
        self.active = active

    @property
    def mask(self) -> Tensor:
        """Which weights are active, (O, I, *K)."""
        return self.active.mask

    @property
    def packed(self) -> PackedMask:  # type: ignore[override]  # nobody writes to it
        """Which weights are active, in bits."""
        return PackedMask.of(self.active.mask)

    @property
    def held_mask(self) -> Callable[[], PackedMask]:
        """What makes the mask."""
        return self._packed_now

    def _packed_now(self) -> PackedMask:
        return self.packed

    @property
    def learns(self) -> None:
        """None: all that there is receives gradients, and there is nothing to be masked."""

    @property
    def fits(self) -> bool:
        """Whether the parameter has a value for each active weight."""
        return self.parameter.shape == (self.active.pattern.num_active, *self.shape[2:])

    @property
    def has_zeros(self) -> bool:
        """Whether the parameter has entries outside the mask: none."""
        return False

    @property
    def is_written(self) -> bool:
        """Whether something else may have written outside the mask, where nothing is."""
        return False

    def begin_step(self) -> None:
        """Counts a step as begun; the layer is where its parameter is."""
        self.begun = self.step + 1

    def num_outside(self) -> int:
        """Counts the non-zeros outside the mask: none."""
        return 0

    def restore(self, saved: SavedWeight) -> None:
        """Takes over what was saved; of another mask, values that are in both stay."""
        self.step = self.begun = saved.step
        self.updated_at, self.densities, self.starts = saved.updated_at, saved.densities, saved.starts
        self.settled, self.is_output, self.is_to_fill = saved.settled, saved.is_output, saved.is_to_fill
        if not torch.equal(saved.mask.to(self.parameter.device), self.mask):
            from dstlib.engine.ops.places import sources  # not before it is asked for: it loads the engine

            pattern = self.active.pattern_of(places_of(saved.mask))
            source = sources(self.active.pattern.rising(), pattern.rising())
            self.active.hold(pattern, _carried(self.parameter.detach(), source))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def check_method(method: Method) -> None:
    """Checks that a method changes masks by what compact storage has.

    Raises:
        SettingError: It reads or keeps more.
    """
    reasons = {
        "a trace of dense gradients": method.trace is not None,
        "values beneath the masks": method.storage is not None,
        "budgets shared between weights": method.allocate is not None,
        "a warm-up of what has grown": method.grown_warmup > 0,
        "first masks by a look at the dense model": isinstance(method.init, AtInit | InTurn),
        "a fresh start of the optimizer's state": method.reset_state,
    }
    if given := [reason for reason, holds in reasons.items() if holds]:
        raise SettingError.of(
            "storage",
            f"sparsify() with method {method.name}",
            allowed='"masked"',
            given=f'"compact", though the method has {", ".join(given)}',
            remedy='Leave storage= out, or choose a method without, such as "rigl", "set" or "static".',
        )


def compact_weights(
    plan: Plan, model: nn.Module, optimizers: Iterable[Optimizer]
) -> tuple[Plan, list[CompactWeight], dict[str, str]]:
    """Makes what can be of a model's sparse weights compact, one after the other; says of the others why not.

    Layers without data, of the meta device, are initialised just before, each by its own ``reset_parameters``. Returns
    the plan with the parameters that there are then.

    Raises:
        SelectionError: A module on the meta device cannot be initialised.
        StateError: An optimizer has taken steps with the weights as they were.
    """
    from dstlib.engine.layers.compact import make_compact  # not before it is asked for: it loads the engine

    model = unwrap(model)
    ancestors = _ancestors(model)
    num_owners = _num_owners(model)
    weights = {id(weight.parameter): weight for weight in plan.weights}
    made: dict[int, CompactWeight] = {}
    reasons: dict[str, str] = {}
    initialised = _Initialised({}, {})
    for module in list(model.modules()):
        own = {key: id(p) for key, p in module._parameters.items() if p is not None}
        before = {key: initialised.origins.get(identity, identity) for key, identity in own.items()}
        _initialise(module, initialised)
        for key, identity in before.items():
            parameter, weight = module._parameters[key], weights.get(identity)
            if parameter is None or weight is None or identity in made:
                continue
            weight = weights[identity] = replace(weight, parameter=parameter)
            if weight.reason or weight.name in reasons:
                continue
            if reason := _obstacle(module, key, weight, ancestors[id(module)], plan.method):
                reasons[weight.name] = reason
                continue
            if num_owners[identity] > 1:
                reasons[weight.name] = "it is shared by several modules"
                continue
            _check_unstepped(weight, optimizers)
            started, places = _drawn(weight, plan) or _started(weight, plan)
            started.weight = weights[identity] = replace(weight, compact_of=parameter.shape)
            made[identity] = CompactWeight(started, make_compact(module, places, key, ancestors[id(module)]))
            del started, places, parameter
            trim_heap()
    now = tuple(weights[id(weight.parameter)] for weight in plan.weights)
    return replace(plan, weights=now), [made[i] for i in weights if i in made], reasons


def _drawn(weight: Weight, plan: Plan) -> tuple[MaskedWeight, Tensor] | None:
    """Returns a fresh weight as it starts, and the places of a first mask by chance, without a mask of all of it.

    None where something else decides, or may: zeros that are there (one of 2²⁴ numbers is 0 by chance), masks that were
    given, a class without a weight.
    """
    method, parameter = plan.method, weight.parameter.detach()
    num_nonzero = int(parameter.count_nonzero())
    is_fresh = plan.given is None and plan.init_scale is None and 2 * num_nonzero > parameter.numel()
    if not is_fresh or method.init is not masking.random or not is_row_by_row(method.granularity):
        return None
    if plan.outputs is not None and weight.name in plan.outputs:
        return None
    outputs, inputs = size = _matrix_size(weight)
    spans = [view.rows or (0, outputs) for view in weight.views]
    drawn = [
        draw_by_tiles(view.name, torch.Size((last - first, inputs, *weight.shape[2:])), plan) + first * inputs
        for view, (first, last) in zip(weight.views, spans, strict=True)
    ]
    places = torch.cat(drawn).to(parameter.device)
    places = _turned(places, size) if weight.views[0].transposed else places
    if len(places) >= num_nonzero:  # there is room for all that is not zero, where it is
        return None
    started = MaskedWeight(weight, PackedMask.of(torch.empty(0, dtype=torch.bool)))
    started.is_output = None if plan.outputs is None else False
    started.is_to_fill = started.is_output is None and len(places) < outputs * inputs
    return started, places


def _started(weight: Weight, plan: Plan) -> tuple[MaskedWeight, Tensor]:
    """Returns a weight as masked storage starts it, and the places of its first mask."""
    started = MaskedWeight(weight, PackedMask.full(weight.parameter))
    started.is_output = None if plan.outputs is None else weight.name in plan.outputs
    start_masks([started], plan, lambda m: ())
    return started, places_of(started.mask)


def update_compact(
    m: CompactWeight,
    plan: Plan,
    *,
    step: int,
    scale: float | None,
    states: Sequence[State],
    observers: Sequence[Observer],
    average: Average,
) -> bool:
    """Changes which weights are active, and what is kept for them; returns whether that has changed.

    ``scale`` is the loss scale in the gradient of the active values, None of a weight without a gradient that counts,
    such as a frozen one; ``states`` are what each optimizer keeps.

    Raises:
        ScoreError: A criterion returned scores by which units cannot be ordered.
        StateError: Nothing is known of the gradients of what is not active.
        SettingError: An optimizer keeps what cannot be moved.
    """
    gradient = None if scale is None else _Gradient(m, scale, average)
    if goes_by_tiles(plan.method) and not observers:
        places = _updated_by_tiles(m, plan, step, gradient)
        if not m.is_output or _has_all_outputs(m, places):
            return _take_over(m, places, None, gradient, states, plan.method.grown_state)
    dense = _as_masked(m)
    whole = None if gradient is None else gradient.of_all()
    momentum = momentum_of([optimizer for optimizer, _ in states], m.parameter)
    momentum = None if momentum is None else m.active.spread(momentum)
    update_masks([(dense, whole, momentum)], [dense], plan, step=step, memory=0.0, observers=observers)
    m.settled = dense.settled
    return _take_over(m, places_of(dense.mask), dense.parameter, gradient, states, plan.method.grown_state)


def fill_compact(
    m: CompactWeight,
    plan: Plan,
    *,
    scale: float,
    states: Sequence[State],
    observers: Sequence[Observer],
    average: Average,
) -> bool:
    """Gives outputs that the first mask has left without a weight one each; returns whether there were any."""
    if not has_bare_outputs(m):
        return False
    dense, gradient = _as_masked(m), _Gradient(m, scale, average)
    fill_first_masks(dense, gradient.of_all(), plan, step=m.step + 1, observers=observers)
    return _take_over(m, places_of(dense.mask), dense.parameter, gradient, states, plan.method.grown_state)


def has_bare_outputs(m: CompactWeight) -> bool:
    """Whether an output has no weight now."""
    return not _has_all_outputs(m, m.active.pattern.places())


def _has_all_outputs(m: CompactWeight, places: Tensor) -> bool:
    """Whether each output has one of the weights at these places."""
    outputs, _ = _matrix_size(m.weight)
    is_turned = m.weight.views[0].transposed
    output = places % outputs if is_turned else places.div(m.shape[1], rounding_mode="floor")
    has_one = torch.zeros(outputs, dtype=torch.bool, device=places.device)
    return bool(has_one.index_fill_(0, output.long(), True).all())


def _tell_of_others(name: str) -> None:
    """Warns, once of each weight, that its gradient is of something else than what tells of growth."""
    warnings.warn(
        f"The gradient of {name} is not that of the passes of its layer, which tell what is to grow. So it is where an "
        "input was written to before the step, where gradients were computed that are not in this one "
        "(torch.autograd.grad()), where the loss reads the weight itself, and where gradients were clipped one by one: "
        "then call sparsifier.before_step(optimizer) before.",
        UserWarning,
        stacklevel=2,
    )


APART = 0.1  # of the gradient: what rounding in half precision does not explain
ROUNDING = 100  # times what one product may be off: of sums of many


class _Gradient:
    """The gradient of a weight (O, I, *K) that does not exist, in the units of that of its active values.

    Those may have been unscaled, clipped and averaged since the backward passes that are looked at. ``loss_scale`` is
    still in them.
    """

    def __init__(self, m: CompactWeight, loss_scale: float, average: Average) -> None:
        self._weight, self._active, self._average, self.loss_scale = m.weight, m.active, average, loss_scale
        grad = m.parameter.grad
        assert grad is not None
        if not m.active.has_noted:
            raise StateError.of(
                "gradients of what is not active",
                f"{m.weight.name} at step {m.step + 1}",
                allowed="a forward and a backward pass of its layer since the last step, which are looked at",
                given="a gradient that came otherwise",
                remedy="Call the model itself, as torch.func and gradients set by hand do not; or leave storage= out.",
            )
        self.of_old = grad
        found = average(m.active.gradient_of_active())
        size = float(found.square().sum())
        self._scale = 1.0 if torch.equal(found, grad) or not size else float((found * grad).sum()) / size
        apart, rounding = float((found * self._scale - grad).norm()), ROUNDING * torch.finfo(grad.dtype).eps
        if apart > max(APART * float(grad.norm()), rounding * m.active.most_of_passes()):
            _tell_of_others(m.weight.name)

    def of_rows(self, first: int, last: int) -> Tensor:
        """Returns that of some outputs, (rows, I, *K), without the loss scale."""
        grad = self._scaled(self._active.gradient_of_rows(first, last))
        return grad if self.loss_scale == 1.0 else grad / self.loss_scale

    def of_all(self) -> Tensor:
        """Returns that of the whole weight, of its shape."""
        grad = self.of_rows(0, _matrix_size(self._weight)[0])
        return grad.transpose(0, 1).contiguous() if self._weight.views[0].transposed else grad

    def of_active(self) -> Tensor:
        """Returns that of what is active now, (A, *K), as it is in the parameter."""
        return self._scaled(self._active.gradient_of_active())

    def _scaled(self, grad: Tensor) -> Tensor:
        grad = self._average(grad)
        return grad if self._scale == 1.0 else grad.mul_(self._scale)


def _updated_by_tiles(m: CompactWeight, plan: Plan, step: int, gradient: _Gradient | None) -> Tensor:
    """Returns the places of what is active after an update, in rising order."""
    from dstlib.engine.ops.places import turned  # as above

    outputs, inputs = size = _matrix_size(m.weight)
    is_turned = m.weight.views[0].transposed
    places, order = m.active.pattern.rising()
    places, order = turned(places, order, (inputs, outputs)) if is_turned else (places, order)
    values, found = m.parameter.detach().index_select(0, order), []
    del order  # of all that is as long as the weight, as little as can be at a time
    for view in m.weight.views:
        first, last = view.rows or (0, outputs)
        begin, end = stretch(places, first * inputs, last * inputs)
        part = None if gradient is None else _rows_from(gradient, first)
        part_size = torch.Size((last - first, inputs, *m.shape[2:]))
        own = places[begin:end] - first * inputs if first else places[begin:end]
        new = update_by_tiles(Matrix(view.name, part_size, own, values[begin:end], part), plan, step)
        found.append(new + first * inputs if first else new)
    now = found[0] if len(found) == 1 else torch.cat(found)
    return _turned(now, size) if is_turned else now


def _matrix_size(weight: Weight) -> tuple[int, int]:
    """Returns O and I of a weight, of which matrices may be stretches of rows."""
    outputs, inputs = weight.shape[:2]
    return (inputs, outputs) if weight.views[0].transposed else (outputs, inputs)


def _turned(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns rising places of a matrix (O, I) as those of the transposed one, rising."""
    from dstlib.engine.ops.places import turned  # as above

    return turned(places, places, size)[0]


def _rows_from(gradient: _Gradient, start: int) -> Callable[[int, int], Tensor]:
    return lambda first, last: gradient.of_rows(start + first, start + last)


def _as_masked(m: CompactWeight) -> MaskedWeight:
    """Returns the weight as one with all its zeros, for as long as something looks at it whole."""
    parameter = nn.Parameter(m.active.spread(m.parameter.detach()), requires_grad=False)
    dense = MaskedWeight(replace(m.weight, parameter=parameter, compact_of=None), m.packed)
    dense.step, dense.begun, dense.updated_at = m.step, m.begun, m.updated_at
    dense.settled, dense.densities, dense.starts, dense.is_output = m.settled, m.densities, m.starts, m.is_output
    return dense


def _take_over(
    m: CompactWeight,
    places: Tensor,
    values: Tensor | None,
    gradient: _Gradient | None,
    states: Sequence[State],
    grown_state: GrownState,
) -> bool:
    """Lets the weights at these places be the active ones; what grows begins with zeros, or with ``values`` (O, I, *K).

    Returns whether others were active before.
    """
    from dstlib.engine.ops.places import sources  # as above

    trim_heap()  # what steps and scores have left in pieces would stand beside what comes
    active, pattern = m.active, m.active.pattern_of(places)
    source = sources(active.pattern.rising(), pattern.rising())
    old = m.parameter.detach()
    grown = _beside(source < 0, old).expand(len(source), *old.shape[1:])
    if not bool(grown.any()) and len(source) == len(old):
        return False
    new = _carried(old, source) if values is None else values.detach().flatten(0, 1)[pattern.places()]
    trim_heap()
    moves = [(optimizer, _moves(optimizer, m, kept, source)) for optimizer, kept in states]
    grad = None if gradient is None else _carried(gradient.of_old, source)
    active.hold(pattern, new)
    if grad is not None and gradient is not None:
        grad = torch.where(grown, gradient.of_active(), grad) if bool(grown.any()) else grad
        if m.parameter.grad is None or m.parameter.grad.shape != grad.shape:
            m.parameter.grad = grad
        else:
            m.parameter.grad.copy_(grad)
    for optimizer, moved in moves:
        for key, (kept, values_now) in moved.items():
            if kept is not None and grad is not None and gradient is not None:
                unscaled = grad if gradient.loss_scale == 1.0 else grad / gradient.loss_scale
                _start_grown(replace(kept, values=values_now), m, grown, unscaled, grown_state)
            held = optimizer.state[m.parameter][key]
            if held.shape == values_now.shape:
                held.copy_(values_now)
            else:
                optimizer.state[m.parameter][key] = values_now
    trim_heap()
    return True


def _moves(
    optimizer: Optimizer, m: CompactWeight, kept: Sequence[Kept], source: Tensor
) -> dict[str, tuple[Kept | None, Tensor]]:
    """Returns what an optimizer keeps for each active weight, for the new ones: its meaning, where known, and values.

    Raises:
        SettingError: It keeps some in codes, or in containers.
    """
    state: Mapping[str, Any] = optimizer.state.get(m.parameter, {})
    moved: dict[str, tuple[Kept | None, Tensor]] = {}
    for key, value in state.items():
        known = next((k for k in kept if k.key == key), None)
        if not isinstance(value, Tensor) or value.shape != m.parameter.shape:
            continue
        if known is not None or value.numel() != 1:  # a single number that nobody knows may be of the whole parameter
            moved[key] = known, _carried(value.detach(), source, 0.0 if known is None else known.birth)
    if left := [k.key for k in kept if k.key not in moved or k.values.dtype != state[k.key].dtype]:
        raise SettingError.of(
            "optimizer",
            f'sparsify(storage="compact"), {m.weight.name}',
            allowed="one that keeps plain tensors for each weight",
            given=f"{type(optimizer).__name__}, with {', '.join(left)}",
            remedy="Use torch's SGD or Adam, say, or leave storage= out.",
        )
    return moved


def _start_grown(kept: Kept, m: CompactWeight, grown: Tensor, grad: Tensor, how: GrownState) -> None:
    """Starts what is kept for what has grown, if not as at birth; in each matrix of the weight for itself."""
    kept.start(grown, m.parameter.detach(), grad)
    if how == "birth" or kept.meaning.power is None:
        return
    whole = MatrixView(m.weight.name)
    if len(m.weight.views) == 1:
        kept.start_beside(whole, grown, ~grown, grad if how == "gradient" else None)
        return
    row = m.active.pattern.places().div(m.shape[1], rounding_mode="floor")
    for view in m.weight.views:
        first, last = view.rows or (0, m.shape[0])
        at = ((row >= first) & (row < last)).nonzero().flatten()
        part = replace(kept, values=kept.values[at])
        part.start_beside(whole, grown[at], ~grown[at], grad[at] if how == "gradient" else None)
        kept.values[at] = part.values


def _carried(x: Tensor, source: Tensor, birth: float = 0.0) -> Tensor:
    """Returns what was kept of each value, for those that are there now; ``birth`` for those that have come.

    >>> _carried(torch.tensor([1.0, 2.0]), torch.tensor([1, -1]))
    tensor([2., 0.])
    """
    if not x.numel():
        return x.new_full((len(source), *x.shape[1:]), birth)
    return x.index_select(0, source.clamp(min=0)).masked_fill_(_beside(source < 0, x), birth)


def _beside(x_A: Tensor, values: Tensor) -> Tensor:
    """Returns what there is of each active entry with the axes of its values (A, *K)."""
    return x_A.view(-1, *(1 for _ in values.shape[1:]))


def _obstacle(
    module: nn.Module, key: str, weight: Weight, ancestors: Sequence[nn.Module], method: Method
) -> str | None:
    """Tells why a weight cannot be compact; None where it can."""
    from dstlib.engine.layers.compact import UPWARD, obstacle_around, obstacle_to_compact  # as above

    if reason := obstacle_to_compact(module, key) or obstacle_around(ancestors):
        return reason
    if "forward" in vars(module):
        return "its layer has a forward of its own"
    is_upward = isinstance(module, UPWARD)
    if any(v.transposed != is_upward or v.at or v.columns or v.every for v in weight.views):
        return "its matrices are no stretches of rows"
    if not has_whole_kernels(method.granularity, weight.shape):
        return f"units of {type(method.granularity).__name__} are no whole kernels"
    return None if weight.parameter.is_floating_point() else f"it is of {weight.parameter.dtype}"


def _ancestors(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Returns the modules around each module of a model, by its identity, nearest first; of a shared one, all."""
    around: dict[int, list[nn.Module]] = {}

    def visit(module: nn.Module, above: tuple[nn.Module, ...]) -> None:
        around.setdefault(id(module), []).extend(above)
        for child in module.children():
            visit(child, (module, *above))

    visit(model, ())
    return around


def _num_owners(model: nn.Module) -> dict[int, int]:
    """Counts under how many names of how many modules each parameter is held, by its identity."""
    num: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                num[id(parameter)] = num.get(id(parameter), 0) + 1
    return num


class _Initialised(NamedTuple):
    """Parameters that have come for others without data, by the identity of those, and the way back."""

    parameters: dict[int, nn.Parameter]
    origins: dict[int, int]


def _initialise(module: nn.Module, known: _Initialised) -> None:
    """Gives a module that is on the meta device values of its own, as when it was made; shared ones stay shared."""
    old = {key: p for key, p in module._parameters.items() if p is not None and p.is_meta}
    buffers = [b for b in module._buffers.values() if b is not None and b.is_meta]
    if not old and not buffers:
        return
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if not callable(reset):
        raise SelectionError.of(
            "weights",
            f"a {type(module).__name__} of the model",
            allowed="ones with data, or on meta in a module with reset_parameters()",
            given=f"{', '.join([*old]) or 'a buffer'} on meta",
            remedy="Call to_empty(device=..., recurse=False) on this module and initialise it first.",
        )
    if not hasattr(module, "reset_parameters"):  # _reset_parameters may write to the layers within, last
        for child in module.children():
            _initialise(child, known)
    module.to_empty(device="cpu", recurse=False)
    with torch.no_grad():
        reset()
    for key, parameter in old.items():
        now = module._parameters[key]
        assert now is not None
        module._parameters[key] = now = known.parameters.setdefault(id(parameter), now)
        known.origins[id(now)] = id(parameter)


def _check_unstepped(weight: Weight, optimizers: Iterable[Optimizer]) -> None:
    """Checks that no optimizer keeps anything yet for a weight that becomes compact."""
    if any(optimizer.state.get(weight.parameter) for optimizer in optimizers):
        raise StateError.of(
            "optimizer",
            'sparsify(storage="compact")',
            allowed="one that has taken no step yet",
            given=f"one with a state for all of {weight.name}",
            remedy="Make the optimizer after sparsify().",
        )
