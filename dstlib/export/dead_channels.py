"""A smaller network that computes the same: without the channels that nobody reads, and those that are always zero."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dstlib.export.channels import TRANSPOSED, ChannelFlow, Layer
from dstlib.export.trace import trace
from dstlib.inputs import tensors_in
from dstlib.layers.shift import Shift, channel_groups, shift
from dstlib.report import align
from dstlib.targets import unwrap


class Smaller(NamedTuple):
    """How many outputs and inputs a layer has, and had."""

    outputs: int
    outputs_before: int
    inputs: int
    inputs_before: int


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What :func:`remove_dead_channels` did: the layers that became smaller by name, and why others, or parts, stayed.

    ``parameters`` counts them before and after; ``difference`` is the largest one between the outputs for the example,
    as a part of the largest output.
    """

    smaller: Mapping[str, Smaller]
    left: Mapping[str, str]
    parameters: tuple[int, int]
    difference: float

    def __str__(self) -> str:
        """Returns the table."""
        rows = [("layer", "outputs", "inputs")]
        for name, s in self.smaller.items():
            rows.append((name, f"{s.outputs} of {s.outputs_before}", f"{s.inputs} of {s.inputs_before}"))
        before, after = self.parameters
        lines = align(rows, left=(0,)) if self.smaller else ["nothing to remove"]
        lines += [f"left: {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join([*lines, f"{after:,} of {before:,} parameters, largest difference {self.difference:.1e}"])


class ShiftedGroups(nn.Module):
    """A :class:`~dstlib.layers.Shift` of which channels are gone: the group of ``counts[g]`` moves by ``sizes[g]``.

    >>> ShiftedGroups((-1, 1), (2, 1), axis=2)(torch.ones(1, 3, 2)).tolist()
    [[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], *, axis: int) -> None:
        super().__init__()
        kept = [(size, count) for size, count in zip(sizes, counts, strict=True) if count]
        self.sizes = tuple(size for size, _ in kept)
        self.counts = tuple(count for _, count in kept)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        groups = x.split(self.counts, dim=1)
        moved = [shift(group, (size,), axis=self.axis) for group, size in zip(groups, self.sizes, strict=True)]
        return torch.cat(moved, dim=1)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, counts={self.counts}, axis={self.axis}"


def remove_dead_channels(model: nn.Module, example: Tensor | Sequence[Tensor]) -> tuple[nn.Module, Removal]:
    """Copies the model, in eval mode, without its dead channels, and says what was done; ``print`` the latter.

    Removed are the outputs of ungrouped (transposed) convolutions and linear layers that no weight reads, those that
    are exactly zero wherever they are read, whatever the input, and then what only those had read. Every product that
    goes has a factor of exactly zero, so for finite activations the outputs are the same sums without some zeros:
    equal, but for the order in which a backend adds, which may depend on how many there are.

    Channels are followed through batch and instance norms, activations, pooling, upsampling, dstlib's shift,
    concatenation, addition, subtraction, multiplication and flattening. What else reads a channel keeps it, and so does
    a forward that asks for the shape of an activation. A constant that is not zero stays as well. ``left`` names these.
    The example is one input, or several, of any size that the model takes.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     model[2].weight[:, 1] = 0
    >>> smaller, removal = remove_dead_channels(model, torch.ones(1, 2))
    >>> smaller
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    >>> print(removal)
    layer  outputs  inputs
    ----------------------
    0       2 of 3  2 of 2
    2       2 of 2  2 of 3
    12 of 17 parameters, largest difference 0.0e+00
    """
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    original = unwrap(model)
    smaller = deepcopy(original).eval()
    with torch.no_grad():
        before = smaller(*(x.clone() for x in examples))
    counts = _num_parameters(smaller)
    try:
        traced = trace(deepcopy(original).eval(), examples)
    except Exception as error:  # the forward is anyone's code, which a symbol may break in any way
        left = {"(model)": f"its forward cannot be traced: {type(error).__name__}: {error}".partition("\n")[0]}
        return smaller, Removal(smaller={}, left=left, parameters=(counts, counts), difference=0.0)
    flow = ChannelFlow(traced)
    for name, ids in flow.followers:
        _shrink_follower(smaller, name, flow.kept[ids])
    sizes = {
        layer.name: _shrink_layer(smaller.get_submodule(layer.name), flow.kept[layer.outputs], flow.kept[layer.inputs])
        for layer in flow.layers
    }
    with torch.no_grad():
        after = smaller(*(x.clone() for x in examples))
    return smaller, Removal(
        smaller={name: size for name, size in sizes.items() if size is not None},
        left=flow.left | {layer.name: why for layer in flow.layers if (why := _why_left(layer, flow))},
        parameters=(counts, _num_parameters(smaller)),
        difference=_difference(before, after),
    )


def _shrink_layer(layer: Any, outputs: Tensor, inputs: Tensor) -> Smaller | None:
    """Keeps these outputs (O) and inputs (I) of a layer; None where that is all of them."""
    if outputs.all() and inputs.all():
        return None
    first, second = (inputs, outputs) if type(layer) in TRANSPOSED else (outputs, inputs)
    _replace(layer, "weight", layer.weight[first][:, second])
    if layer.bias is not None:
        _replace(layer, "bias", layer.bias[outputs])
    kind = "features" if type(layer) is nn.Linear else "channels"
    setattr(layer, f"out_{kind}", int(outputs.sum()))
    setattr(layer, f"in_{kind}", int(inputs.sum()))
    return Smaller(int(outputs.sum()), len(outputs), int(inputs.sum()), len(inputs))


def _shrink_follower(model: nn.Module, name: str, kept: Tensor) -> None:
    if kept.all():
        return
    module: Any = model.get_submodule(name)
    if isinstance(module, Shift):
        counts = [int(group.sum()) for group in channel_groups(kept[None], len(module.sizes))]
        model.set_submodule(name, ShiftedGroups(module.sizes[: len(counts)], counts, axis=module.axis))
        return
    for key in ("weight", "bias", "running_mean", "running_var"):
        if (x := getattr(module, key)) is not None:
            _replace(module, key, x[kept])
    module.num_features = int(kept.sum())


def _replace(module: nn.Module, key: str, value: Tensor) -> None:
    old, value = getattr(module, key), value.detach().contiguous()
    setattr(module, key, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _why_left(layer: Layer, flow: ChannelFlow) -> str:
    """Says why outputs stay that look dead or could not be looked into; empty if there are none."""
    pinned = [reason for ids, reason in flow.pins if torch.isin(layer.outputs, ids).any()]
    if reason := next(filter(None, pinned), ""):
        return f"all its outputs stay: {reason}"
    constant = int((~layer.constant.isnan() & flow.kept[layer.outputs]).sum())
    if not constant:
        return ""
    if pinned:
        return f"{constant} constant outputs are the model's"
    return f"{constant} constant outputs stay: read as another number than 0, or the one that a layer needs"


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _difference(before: object, after: object) -> float:
    pairs = list(zip(tensors_in(before), tensors_in(after), strict=True))
    largest = max((float(x.abs().max()) for x, _ in pairs if x.numel()), default=0.0)
    return max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0) / (largest or 1.0)
