"""What a model costs: its parameters and the FLOPs of one forward pass, dense or sparse.

Counted are the FLOPs of Linear, Conv1d to 3d and ConvTranspose1d to 3d, grouped ones too. Not counted:
normalisation, activation, pooling, the matrix products of attention, recurrent layers, and parameters that
a module uses by itself. Their parameters count, and :attr:`Profile.uncounted` names them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dstlib.errors import DataError, SelectionError, SettingError, require, similar
from dstlib.report import align
from dstlib.targets import Masked, plain_name, unwrap

Convention = Literal["exact", "paper"]
Shape = Sequence[int]

_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Counted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | _Transposed
_WHERE = "profile()"

_Calls = dict[nn.Module, list[tuple[int | None, tuple[int, ...]]]]  # FLOPs and output shape of each call


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One module that has parameters of its own; those tied to an earlier module's count there.

    ``weights`` and ``active`` are the elements of its weight, all and unmasked; ``params`` the unmasked
    elements of all its parameters. ``flops`` is None where they are not counted. ``output_shape`` is that of
    the last of its ``calls``, empty if the output is no tensor.
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
    input_shape: Shape | Sequence[Shape],
    *,
    sparsifier: Masked | None = None,
    convention: Convention = "exact",
) -> Profile:
    """Counts the parameters of a model and the FLOPs of one forward pass on an input of this shape.

    A copy of the model without storage runs once, in eval mode and without gradients; no activation is
    allocated, and the model itself is not touched (its own forward hooks do run, on the copy).
    ``input_shape`` includes the batch dimension, as in (1, 1, 128, 128, 128), and FLOPs grow with it; for a
    model of several inputs it is a tuple of such shapes. The inputs have the type of the model's first
    floating parameter.

    Params are the active weights and all parameters without a mask. A parameter under two names counts once;
    a module called twice costs FLOPs twice. With A active of the weights of a layer:

    - "exact": two FLOPs for each multiply-add that is done, 2·A per position, and one per output for a bias.
      The positions are those of the output, but for a transposed convolution those of the input, each of
      which scatters A products. Multiplying by padding, or into what is cropped, counts as done.
    - "paper": the same, but a transposed convolution costs 2·A per position of its *output*: too much by the
      product of its strides. These are the published numbers of E2ENet.

    Raises:
        SettingError: no such convention, or an input shape that is none.
        SelectionError: a mask belongs to no parameter, or is not of its shape.
        DataError: the model does not run on an input of this shape without storage.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024) for "paper". Evci et al. 2020 (RigL) count as "exact" does,
    with a bias everywhere.

    >>> convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    >>> profile(convolution, (1, 3, 32, 32)).flops == 2 * (3 * 8 * 9) * (32 * 32)
    True
    """
    known, remedy = get_args(Convention), "They differ in transposed convolutions."
    allowed, given = " or ".join(known), repr(convention)
    require(convention in known, "convention", _WHERE, allowed=allowed, given=given, remedy=remedy)
    replica = _meta_copy(unwrap(model)).eval()
    active = _active(replica, sparsifier.masks if sparsifier is not None else {})
    calls = _run(replica, _shapes(input_shape), active, convention)
    layers = tuple(_rows(replica, calls, active))
    # a layer whose weight its parent uses directly looks uncalled
    uncounted = {f"{row.type}{'' if row.calls else ' (not called)'}" for row in layers if row.flops is None}
    return Profile(
        params=sum(layer.params for layer in layers),
        flops=sum(layer.flops or 0 for layer in layers),
        layers=layers,
        uncounted=tuple(sorted(uncounted)),
        convention=convention,
    )


def _meta_copy(model: nn.Module) -> nn.Module:
    """Copies a model deeply, without storage for its tensors; ties stay ties, as the memo goes by identity."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                bare = torch.empty_like(value, device="meta", requires_grad=False)
                is_parameter = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(bare, value.requires_grad) if is_parameter else bare
    return copy.deepcopy(model, memo)


def _shapes(given: Shape | Sequence[Shape]) -> list[torch.Size]:
    several = not all(isinstance(extent, int) for extent in given)
    try:
        return [torch.Size(shape) for shape in (given if several else [given])]  # type: ignore[arg-type]
    except TypeError as error:
        allowed, remedy = "a shape, or a tuple of them", "Include the batch, as in (1, 1, 128, 128, 128)."
        raise SettingError.of("input_shape", _WHERE, allowed=allowed, given=given, remedy=remedy) from error


def _active(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[int, int]:
    """Counts the active elements of each parameter, by its identity."""
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    active = {id(p): p.numel() for p in named.values()}
    for name, mask in masks.items():
        if name not in named:
            remedy = f"Profile the model that the masks were made for. Similar: {similar(name, named)}."
            raise SelectionError.of("mask", _WHERE, allowed="the name of a parameter", given=repr(name), remedy=remedy)
        if mask.shape != named[name].shape:
            allowed, remedy = f"shape {tuple(named[name].shape)}", "A mask has the shape of its parameter."
            raise SelectionError.of(f"mask {name}", _WHERE, allowed=allowed, given=tuple(mask.shape), remedy=remedy)
        active[id(named[name])] = int(mask.count_nonzero())
    return active


def _run(model: nn.Module, shapes: Sequence[torch.Size], active: Mapping[int, int], convention: Convention) -> _Calls:
    """Runs one forward pass, noting FLOPs and output shape of each call of a module with parameters of its own."""
    calls: _Calls = {m: [] for m in model.modules() if any(p is not None for p in m._parameters.values())}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        flops = None
        if isinstance(module, _Counted):
            flops = _flops(module, [*args, *kwargs.values()][0], output, active, convention)
        calls[module].append((flops, tuple(output.shape) if isinstance(output, Tensor) else ()))

    for module in calls:
        module.register_forward_hook(note, with_kwargs=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    try:
        # the device is for tensors that a forward creates; a compiled forward would not run the hooks
        with torch.no_grad(), torch.device("meta"), torch.compiler.set_stance("force_eager"):
            model(*inputs)
    except RuntimeError as error:
        allowed = f"one that runs without storage on inputs of {', '.join(str(tuple(s)) for s in shapes)}"
        remedy = "Check the shape. A forward that reads values (.item()) or names a device cannot be profiled."
        raise DataError.of("forward", _WHERE, allowed=allowed, given=error, remedy=remedy) from error
    return calls


def _flops(layer: _Counted, x: Tensor, output: Tensor, active: Mapping[int, int], convention: Convention) -> int:
    """Counts the FLOPs of one call: at each position of the grid, every active weight multiplies and adds once."""
    if isinstance(layer, _Transposed):
        positions = x.numel() // layer.in_channels if convention == "exact" else output.numel() // layer.out_channels
    else:
        positions = output.numel() // layer.weight.shape[0]
    # a parametrised weight is computed anew, so it has no mask
    num_active = active.get(id(layer.weight), layer.weight.numel())
    return 2 * num_active * positions + (0 if layer.bias is None else output.numel())


def _rows(model: nn.Module, calls: _Calls, active: Mapping[int, int]) -> Iterator[LayerProfile]:
    seen: set[int] = set()
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    for module, noted in calls.items():
        own = list(module.parameters(recurse=False))
        weights = [p for p in own if p.ndim >= 2]
        counted = [flops for flops, _ in noted if flops is not None]
        yield LayerProfile(
            name=plain_name(names[module]),
            type=type(module).__name__,
            params=sum(active[id(p)] for p in own if id(p) not in seen),
            weights=sum(p.numel() for p in weights),
            active=sum(active[id(p)] for p in weights),
            calls=len(noted),
            flops=sum(counted) if counted else None,
            output_shape=noted[-1][1] if noted else (),
        )
        seen |= {id(p) for p in own}
