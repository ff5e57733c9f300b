"""What a model costs: its parameters and the FLOPs of one forward pass, dense or sparse.

Counted are the FLOPs of Linear, Conv1d to 3d and ConvTranspose1d to 3d by their calls, and of all other matrix products
and convolutions by torch's operators: of parameters that a module multiplies by itself, of attention, of recurrent
layers; and ``grid_sample``, as deformable attention does it. Not counted: normalisation, activation, pooling, resizing
and all else that is done entry by entry, such as the scan of a state-space model; Fourier transforms, decompositions,
operators of other libraries. :attr:`Profile.uncounted` names what of these has parameters or multiplies.
"""

import copy
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dstlib.errors import DataError, DstlibError, require
from dstlib.inputs import arguments, replace_parts, tensors_in
from dstlib.operators import Operators, Work
from dstlib.report import align
from dstlib.targets import (
    BELONGING,
    Masked,
    describe_outside,
    find_masked,
    find_outside,
    held_weights,
    plain_name,
    unwrap,
    without_data,
)

Convention = Literal["exact", "paper"]

_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Direct = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_WHERE = "profile()"
UNPARAMETRISED = ("products of activations", "sampling")
"""The types of rows of what modules do without parameters."""


class _Layer(NamedTuple):
    """What is read of a layer that counts by its calls, before the pass: in it, a parametrised weight is computed."""

    num_weights: int
    num_outputs: int
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One module that has parameters of its own; those tied to an earlier module's count there.

    ``weights`` and ``active`` are the elements of its weights, all and unmasked; ``params`` the unmasked
    elements of all its parameters. ``flops`` is None where none are counted. ``output_shape`` is that of the last of
    its ``calls``, of the first tensor where there are several, empty if there is none.

    What a module does without parameters has a row to itself, under the same name, of type "products of activations"
    (attention, say) or "sampling". Its ``calls`` are those of operators.
    """

    name: str
    type: str
    params: int
    weights: int
    active: int
    calls: int
    flops: int | None
    output_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Parameters and FLOPs, in total and per module; ``print`` shows the table.

    ``uncounted`` is what is in no number of FLOPs here: types of modules with parameters, parameters of modules that
    count otherwise, and operators. ``flops_per_entry`` is what each active entry of a parameter adds to the FLOPs, by
    its name; where its entries differ, their mean.
    """

    params: int
    flops: int
    layers: tuple[LayerProfile, ...]
    uncounted: tuple[str, ...]
    flops_per_entry: Mapping[str, float]
    convention: Convention

    def __str__(self) -> str:
        """Returns the table: a row per module, the totals, and what is not counted.

        What a module does without parameters stands below it, or in its place where it has none, under its name:
        "products of activations", of attention say, or "sampling".

        >>> print(profile(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)), (1, 4)))
        layer  type       output  params  density  FLOPs
        ------------------------------------------------
        0      Linear     1×2         10     1.00     18
        1      LayerNorm  1×2          4        -      -
        total                         14              18
        FLOPs by the exact convention, without those of: LayerNorm.
        """
        rows = [("layer", "type", "output", "params", "density", "FLOPs")]
        for layer in self.layers:
            density = f"{layer.active / layer.weights:.2f}" if layer.weights else "-"
            flops = "-" if layer.flops is None else f"{layer.flops:,}"
            output = "×".join(map(str, layer.output_shape))
            rows.append((layer.name or "(model)", layer.type, output, f"{layer.params:,}", density, flops))
        rows.append(("total", "", "", f"{self.params:,}", "", f"{self.flops:,}"))
        missing = f", without those of: {', '.join(self.uncounted)}" if self.uncounted else ""
        return "\n".join([*align(rows, left=(0, 1, 2)), f"FLOPs by the {self.convention} convention{missing}."])


def profile(
    model: nn.Module,
    input_shape: Any,
    *,
    sparsifier: Masked | None = None,
    convention: Convention = "exact",
) -> Profile:
    """Counts the parameters of a model and the FLOPs of one forward pass on an input of this shape.

    A copy of the model without storage runs once, in eval mode and without gradients; no activation is
    allocated, and the model itself is not touched (its own forward hooks do run, on the copy).
    ``input_shape`` includes the batch dimension, as in (1, 1, 128, 128, 128), and FLOPs grow with it. For other
    inputs than one floating tensor it is what the model is called with: a tuple of arguments, or a mapping of them
    by name, as in ``profile(model, {"input_ids": ids, "use_cache": False})``. In it a shape stands for a tensor of
    the type of the model's first floating parameter; all else is passed as it is, so give token ids as a tensor.
    A forward that reads values cannot run without storage. If all tensors are given, rather than shapes, the model
    then runs on them where it is.

    Params are the active weights and all parameters without a mask. A parameter under two names counts once;
    a module called twice costs FLOPs twice. With A active of the weights of a layer:

    - "exact": two FLOPs for each multiply-add that is done, 2·A per position, and one per output for a bias.
      The positions are those of the output, but for a transposed convolution those of the input, each of
      which scatters A products. Multiplying by padding, or into what is cropped, counts as done. Attention is
      its two products, 2·d FLOPs per head, query and key each, also where a mask hides the key; a grid sample is
      2 FLOPs per tap (4 in 2D, 8 in 3D, 16 if bicubic), point and channel.
    - "paper": the same, but a transposed convolution costs 2·A per position of its *output*: too much by the
      product of its strides; and what is done without parameters, attention and sampling, is left out. These are
      the published numbers of E2ENet, and of UNETR beside it.

    Weights that are not zero outside their masks count as active, and a warning says so; a model on the meta
    device has no values, so there the masks alone count. Where values choose among matrices, as routers do
    among experts, the mean of these counts.

    Raises:
        SettingError: no such convention.
        SelectionError: a mask belongs to no parameter, or is not of its shape.
        DataError: the model does not run on these inputs, or not without storage.
        DstlibError: whatever a network of dstlib raises itself, in its own words.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024) for "paper". Evci et al. 2020 (RigL) count as "exact" does,
    with a bias everywhere.

    >>> convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    >>> profile(convolution, (1, 3, 32, 32)).flops == 2 * (3 * 8 * 9) * (32 * 32)
    True
    >>> bag = nn.EmbeddingBag(10, 4)
    >>> profile(nn.Sequential(bag, nn.Linear(4, 2)), torch.zeros(5, 3, dtype=torch.long)).flops
    90
    """
    known, remedy = get_args(Convention), "They differ in transposed convolutions."
    allowed, given = " or ".join(known), repr(convention)
    require(convention in known, "convention", _WHERE, allowed=allowed, given=given, remedy=remedy)
    model = unwrap(model)
    masks = dict(sparsifier.masks) if sparsifier is not None else {}
    if held := held_weights(model):  # what is stored is what is active
        masks = {name: each.mask for name, each in held.items()} | masks
        model = without_data(model)
    active = _find_active(model, masks)
    replica, seen = _run(model, input_shape, active, convention)
    layers = tuple(_rows(replica, seen, _num_active(replica, active)))
    return Profile(
        params=sum(layer.params for layer in layers),
        flops=sum(layer.flops or 0 for layer in layers),
        layers=layers,
        uncounted=tuple(sorted({*_uncounted(replica, seen)})),
        flops_per_entry={n: seen.dense[id(p)] / p.numel() for n, p in _named(replica).items() if id(p) in seen.dense},
        convention=convention,
    )


def _find_active(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the active entries of each masked parameter, those outside the mask that are not zero among them."""
    weights = find_masked(model, masks, _WHERE)
    found = find_outside(weights, masks)
    if found:
        given = f"weights of {_WHERE}: {describe_outside(found)} outside their masks count as active. {BELONGING}"
        warnings.warn(given, stacklevel=3)
    return {name: mask.bool() | (weights[name] != 0) if name in found else mask.bool() for name, mask in masks.items()}


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def _num_active(model: nn.Module, active: Mapping[str, Tensor]) -> dict[int, int]:
    """Counts the active elements of all parameters, by the identity of these."""
    named = _named(model)
    masked = {id(named[name]): int(entries.count_nonzero()) for name, entries in active.items()}
    return {id(p): p.numel() for p in named.values()} | masked


def _run(
    model: nn.Module, given: Any, active: Mapping[str, Tensor], convention: Convention
) -> tuple[nn.Module, "_Pass"]:
    """Returns a copy of a model, and what it did in one forward pass, without storage if it can be."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def tensor(x: Any) -> Any:
        is_shape = isinstance(x, tuple | list) and bool(x) and all(type(extent) is int for extent in x)
        return torch.empty(torch.Size(x), dtype=dtype, device="meta") if is_shape else x

    inputs = replace_parts(given, tensor)
    shapes = ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in tensors_in(inputs)) or type(given).__name__
    try:
        replica = _copy(model, _bare)
        # the device is for tensors that a forward creates
        with torch.device("meta"):
            return replica, _record(replica, _map(inputs, lambda x: x.to("meta")), active, convention)
    except Exception as error:  # the forward is anyone's code, which a tensor without values may break in any way
        if any(x.is_meta for x in tensors_in(inputs)):
            if isinstance(error, DstlibError):
                raise  # a network of ours says itself what it does not take
            allowed = f"one that runs without storage on inputs of {shapes}"
            remedy = (
                "Check shapes and types: whole numbers, such as token ids, are given as a tensor of them. A forward "
                "that reads values (.item()) or names a device needs example tensors in place of all shapes."
            )
            raise DataError.of("forward", _WHERE, allowed=allowed, given=_told(error), remedy=remedy) from error
    try:
        replica = _copy(model, lambda x: x if isinstance(x, nn.Parameter) else x.detach().clone())
        with torch.random.fork_rng(devices=[]):
            return replica, _record(replica, _map(inputs, lambda x: x.detach().clone()), active, convention)
    except DstlibError:
        raise
    except Exception as error:
        allowed, remedy = f"one that runs on inputs of {shapes}", "Pass what model(...) takes, on the model's device."
        raise DataError.of("forward", _WHERE, allowed=allowed, given=_told(error), remedy=remedy) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _map(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns inputs with other tensors."""
    return replace_parts(inputs, lambda x: function(x) if isinstance(x, Tensor) else x)


def _copy(model: nn.Module, other: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copies a model deeply, with other tensors, in eval mode; ties stay ties, as the memo goes by identity."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = other(value)
    return copy.deepcopy(model, memo).eval()


def _bare(x: Tensor) -> Tensor:
    """Returns a tensor of the same kind without storage."""
    bare = torch.empty_like(x, device="meta", requires_grad=False)
    return nn.Parameter(bare, x.requires_grad) if isinstance(x, nn.Parameter) else bare


class _Pass:
    """What the modules of a model do in one forward pass.

    Layers count by their calls. The work of an operator is that of the parameter it multiplies by, or else of the
    innermost module that is being called; what it does for a layer that counts by its calls is not taken again.
    """

    def __init__(self, model: nn.Module, num_active: Mapping[int, int], convention: Convention) -> None:
        self._num_active, self._convention = num_active, convention
        self.shapes: dict[nn.Module, list[tuple[int, ...]]] = defaultdict(list)  # of what each call returned
        self.flops: dict[tuple[nn.Module, str], list[int]] = defaultdict(list)  # by kind, "" where it has parameters
        self.dense: dict[int, int] = defaultdict(int)  # FLOPs of all entries of a parameter, by its identity
        self.used: set[int] = set()  # the parameters that these come from
        self.left_out: set[tuple[nn.Module, str]] = set()
        self._calling = [model]
        self._last = (model, "")  # where the last work went
        self._owners = {id(p): m for m in reversed(list(model.modules())) for p in _own(m).values()}
        self.layers: dict[nn.Module, _Layer] = {
            m: _Layer(
                m.weight.numel(), m.out_channels if isinstance(m, _Transposed) else len(m.weight), m.bias is not None
            )
            for m in model.modules()
            if isinstance(m, _Transposed | _Direct)
        }

    def enter(self, module: nn.Module, args: Any) -> None:
        """Notes that a module is being called."""
        self._calling.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        """Notes what a call returned, and the FLOPs of a layer."""
        self._calling.pop()
        output = next(tensors_in(returned), None)
        self.shapes[module].append(() if output is None else tuple(output.shape))
        if module not in self.layers or output is None:
            return
        num_weights, num_outputs, has_bias = self.layers[module]
        num_positions = output.numel() // num_outputs
        if isinstance(module, _Transposed) and self._convention == "exact":
            num_positions = next(tensors_in([*args, *kwargs.values()])).numel() // module.in_channels
        weight = module._parameters.get("weight")  # a parametrised one is computed anew, so it has no mask
        num = num_weights if weight is None else self._num_active[id(weight)]
        self.flops[module, ""].append(2 * num_positions * num + (output.numel() if has_bias else 0))
        if weight is not None:
            self.dense[id(weight)] += 2 * num_positions * num_weights

    def take(self, work: Work) -> bool:
        """Takes the work of an operator, unless it is a layer's."""
        module = self._calling[-1]
        if (layer := self.layers.get(module)) and work.kind != "bias":
            weight = module._parameters.get("weight")
            if layer.num_weights in work.sizes or (weight is not None and work.parameter is weight):
                return False
        if work.kind in UNPARAMETRISED:
            if self._convention == "paper":
                self.left_out.add((module, work.kind))
                return False
            self._last = (module, work.kind)
        elif work.parameter is not None:
            is_own = any(p is work.parameter for p in _own(module).values())
            self._last = (module if is_own else self._owners[id(work.parameter)], "")
            self.used.add(id(work.parameter))
            if work.kind == "weight":
                self.dense[id(work.parameter)] += work.dense
        self.flops[self._last].append(work.flops)
        return True

    def leave_out(self, name: str) -> None:
        """Notes an operator that is not counted."""
        self.left_out.add((self._calling[-1], name))


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _record(model: nn.Module, inputs: Any, active: Mapping[str, Tensor], convention: Convention) -> _Pass:
    """Runs one forward pass, noting each call of a module and the work of each operator."""
    seen, named = _Pass(model, _num_active(model, active), convention), _named(model)
    operators = Operators(
        model.parameters(),
        {id(named[name]): entries for name, entries in active.items()},
        takes=seen.take,
        leaves_out=seen.leave_out,
        at_output=convention == "paper",
    )
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            module.register_forward_pre_hook(seen.enter, prepend=True)
            module.register_forward_hook(seen.leave, with_kwargs=True, always_call=True)
    args, kwargs = arguments(inputs)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), operators:  # compiled, it would not run the hooks
        model(*args, **kwargs)
    return seen


def _rows(model: nn.Module, seen: _Pass, num_active: Mapping[int, int]) -> Iterator[LayerProfile]:
    tied: set[int] = set()
    for name, module in model.named_modules():
        own, shapes = list(_own(module).values()), seen.shapes.get(module, [])
        weights = [p for p in own if p.ndim >= 2]
        if own:
            counted = seen.flops.get((module, ""))
            yield LayerProfile(
                name=plain_name(name),
                type=type(module).__name__,
                params=sum(num_active[id(p)] for p in own if id(p) not in tied),
                weights=sum(p.numel() for p in weights),
                active=sum(num_active[id(p)] for p in weights),
                calls=len(shapes),
                flops=None if counted is None else sum(counted),
                output_shape=shapes[-1] if shapes else (),
            )
        for kind in UNPARAMETRISED:
            if work := seen.flops.get((module, kind)):
                yield LayerProfile(
                    name=plain_name(name),
                    type=kind,
                    params=0,
                    weights=0,
                    active=0,
                    calls=len(work),
                    flops=sum(work),
                    output_shape=(),
                )
        tied |= {id(p) for p in own}


def _uncounted(model: nn.Module, seen: _Pass) -> Iterator[str]:
    """Yields names of what is not counted, of operators only where their module does not stand for them."""
    counted = {module for module, _ in seen.flops}
    for module in model.modules():
        own, kind = _own(module), type(module).__name__
        if own and module not in counted:
            # a module whose parameters its parent uses directly looks uncalled
            yield kind if module in seen.shapes else f"{kind} (not called)"
        elif module not in seen.layers:
            yield from (f"{kind}.{name}" for name, p in own.items() if id(p) not in seen.used)
    yield from (name for module, name in seen.left_out if module in counted or not _own(module))


class _Profile(ModuleType):
    """The module, callable as the function: imported by its path, it takes the function's place at the door."""

    __call__ = staticmethod(profile)


sys.modules[__name__].__class__ = _Profile
