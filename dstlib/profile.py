"""What a model costs: its parameters and the FLOPs of one forward pass, dense or sparse.

Counted are the FLOPs of Linear, Conv1d to 3d and ConvTranspose1d to 3d, grouped ones too, and of what other
libraries have in place of a Linear, such as the Conv1D of transformers. Not counted: normalisation, activation,
pooling, the matrix products of attention, recurrent layers, and parameters that a module uses by itself. Their
parameters count, and :attr:`Profile.uncounted` names them.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dstlib.errors import DataError, require
from dstlib.inputs import arguments, replace_parts, tensors_in
from dstlib.report import align
from dstlib.targets import BELONGING, Masked, describe_outside, find_masked, find_outside, plain_name, unwrap
from dstlib.targets.layouts import layout_of

Convention = Literal["exact", "paper"]

_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Direct = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_WHERE = "profile()"


class _Call(NamedTuple):
    """What one call of a module came to; its FLOPs are None where they are not counted."""

    flops: int | None
    per_entry: int
    output_shape: tuple[int, ...]


_Calls = dict[nn.Module, list[_Call]]


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One module that has parameters of its own; those tied to an earlier module's count there.

    ``weights`` and ``active`` are the elements of its weight, all and unmasked; ``params`` the unmasked
    elements of all its parameters. ``flops`` is None where they are not counted, ``flops_per_entry`` what each
    active element of the weight adds to them. ``output_shape`` is that of the last of its ``calls``, of the first
    tensor where there are several, empty if there is none.
    """

    name: str
    type: str
    params: int
    weights: int
    active: int
    calls: int
    flops: int | None
    flops_per_entry: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Parameters and FLOPs, in total and per module; ``print`` shows the table.

    ``uncounted`` are the types of modules with parameters whose FLOPs are in no number here.
    """

    params: int
    flops: int
    layers: tuple[LayerProfile, ...]
    uncounted: tuple[str, ...]
    convention: Convention

    def __str__(self) -> str:
        """Returns the table: a row per module, the totals, and what is not counted.

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
      which scatters A products. Multiplying by padding, or into what is cropped, counts as done.
    - "paper": the same, but a transposed convolution costs 2·A per position of its *output*: too much by the
      product of its strides. These are the published numbers of E2ENet.

    Weights that are not zero outside their masks count as active, and a warning says so; a model on the meta
    device has no values, so there the masks alone count.

    Raises:
        SettingError: no such convention.
        SelectionError: a mask belongs to no parameter, or is not of its shape.
        DataError: the model does not run on these inputs, or not without storage.

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
    active = _count_active(model, sparsifier.masks if sparsifier is not None else {})
    replica, calls = _run(model, input_shape, active, convention)
    layers = tuple(_rows(replica, calls, _by_id(replica, active)))
    # a layer whose weight its parent uses directly looks uncalled
    uncounted = {f"{row.type}{'' if row.calls else ' (not called)'}" for row in layers if row.flops is None}
    return Profile(
        params=sum(layer.params for layer in layers),
        flops=sum(layer.flops or 0 for layer in layers),
        layers=layers,
        uncounted=tuple(sorted(uncounted)),
        convention=convention,
    )


def _count_active(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Counts the active elements of each masked parameter, those outside the mask that are not zero among them."""
    found = find_outside(find_masked(model, masks, _WHERE), masks)
    if found:
        given = f"weights of {_WHERE}: {describe_outside(found)} outside their masks count as active. {BELONGING}"
        warnings.warn(given, stacklevel=3)
    return {name: int(mask.count_nonzero()) + found.get(name, 0) for name, mask in masks.items()}


def _by_id(model: nn.Module, active: Mapping[str, int]) -> dict[int, int]:
    """Returns the numbers of active elements of all parameters by their identity."""
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    return {id(p): p.numel() for p in named.values()} | {id(named[name]): num for name, num in active.items()}


def _run(model: nn.Module, given: Any, active: Mapping[str, int], convention: Convention) -> tuple[nn.Module, _Calls]:
    """Returns a copy of a model, and the calls of its modules in one forward pass, without storage if it can be."""
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
            allowed = f"one that runs without storage on inputs of {shapes}"
            remedy = (
                "Check shapes and types: whole numbers, such as token ids, are given as a tensor of them. A forward "
                "that reads values (.item()) or names a device needs example tensors in place of all shapes."
            )
            raise DataError.of("forward", _WHERE, allowed=allowed, given=_named(error), remedy=remedy) from error
    try:
        replica = _copy(model, lambda x: x if isinstance(x, nn.Parameter) else x.detach().clone())
        with torch.random.fork_rng(devices=[]):
            return replica, _record(replica, _map(inputs, lambda x: x.detach().clone()), active, convention)
    except Exception as error:
        allowed, remedy = f"one that runs on inputs of {shapes}", "Pass what model(...) takes, on the model's device."
        raise DataError.of("forward", _WHERE, allowed=allowed, given=_named(error), remedy=remedy) from error


def _named(error: Exception) -> str:
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


def _record(model: nn.Module, inputs: Any, active: Mapping[str, int], convention: Convention) -> _Calls:
    """Runs one forward pass, noting each call of a module with parameters of its own."""
    calls: _Calls = {m: [] for m in model.modules() if any(p is not None for p in m._parameters.values())}
    num_active = _by_id(model, active)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        output = next(tensors_in(returned), None)
        if output is None:
            calls[module].append(_Call(None, 0, ()))
            return
        num = _num_positions(module, [*args, *kwargs.values()], output, convention)
        flops = None
        if num is not None:
            # a parametrised weight is computed anew, so it has no mask
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor)
            flops = 2 * num * num_active.get(id(weight), weight.numel()) + (0 if bias is None else output.numel())
        calls[module].append(_Call(flops, 2 * (num or 0), tuple(output.shape)))

    for module in calls:
        module.register_forward_hook(note, with_kwargs=True)
    args, kwargs = arguments(inputs)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a compiled forward would not run the hooks
        model(*args, **kwargs)
    return calls


def _num_positions(layer: nn.Module, inputs: Sequence[Any], output: Tensor, convention: Convention) -> int | None:
    """Counts the positions at which every active weight of a layer multiplies and adds once; None of other modules."""
    if isinstance(layer, _Transposed):
        is_exact = convention == "exact"
        return inputs[0].numel() // layer.in_channels if is_exact else output.numel() // layer.out_channels
    if isinstance(layer, _Direct):
        return output.numel() // layer.weight.shape[0]
    weight = layer._parameters.get("weight")
    layout = layout_of(layer, "weight", weight) if weight is not None and weight.ndim == 2 else None
    return None if layout is None or weight is None else output.numel() // weight.shape[layout.transposed]


def _rows(model: nn.Module, calls: _Calls, active: Mapping[int, int]) -> Iterator[LayerProfile]:
    seen: set[int] = set()
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    for module, noted in calls.items():
        own = list(module.parameters(recurse=False))
        weights = [p for p in own if p.ndim >= 2]
        counted = [call.flops for call in noted if call.flops is not None]
        yield LayerProfile(
            name=plain_name(names[module]),
            type=type(module).__name__,
            params=sum(active[id(p)] for p in own if id(p) not in seen),
            weights=sum(p.numel() for p in weights),
            active=sum(active[id(p)] for p in weights),
            calls=len(noted),
            flops=sum(counted) if counted else None,
            flops_per_entry=sum(call.per_entry for call in noted),
            output_shape=noted[-1].output_shape if noted else (),
        )
        seen |= {id(p) for p in own}


class _Profile(ModuleType):
    """The module, callable as the function: imported by its path, it takes the function's place at the door."""

    __call__ = staticmethod(profile)


sys.modules[__name__].__class__ = _Profile
