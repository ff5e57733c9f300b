"""The shift for other 3D networks: their own convolutions, made flat and shifted where they stand.

Shapes: B batch, C channels, O out, I in, D, H, W depth, height, width in voxels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.axes import AXES, Axis, Triple
from dstlib.errors import SelectionError, number_of, require
from dstlib.layers.shift import channel_groups, shift

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_WHERE = "add_depth_shift()"


class ShiftedConv3d(nn.Conv3d):
    """A Conv3d whose input is shifted first: the same parameters under the same names, no more.

    The shift comes before the stride: with stride 2, output i of a group that moves by s sees voxel 2·i - s.

    Shapes: (B, C, D, H, W) or (C, D, H, W), as for Conv3d. See :func:`dstlib.layers.shift.shift` for ``sizes``.

    >>> ShiftedConv3d(4, 8, (1, 3, 3), padding=(0, 1, 1), sizes=(-1, 0, 1))
    ShiftedConv3d(4, 8, kernel_size=(1, 3, 3), stride=(1, 1, 1), padding=(0, 1, 1), sizes=(-1, 0, 1), axis='depth')
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple,
        *,
        stride: Triple = (1, 1, 1),
        padding: Triple = (0, 0, 0),
        sizes: Sequence[int],
        axis: Axis = "depth",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.sizes = tuple(sizes)
        self.axis: Axis = axis

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 4:
            return self.forward(input[None])[0]
        return super().forward(shift(input, self.sizes, axis=AXES.index(self.axis) - len(AXES)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sizes={self.sizes}, axis={self.axis!r}"


@dataclass(frozen=True, kw_only=True)
class Shifting:
    """What :func:`add_depth_shift` did: by name, how the kernels changed, and why the others were left."""

    shifted: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        parts = []
        for title, rows in (("shifted", self.shifted), ("left as they are", self.left)):
            names = {name: name or "(model)" for name in rows}
            width = max(map(len, names.values()), default=0)
            parts += [f"{title}: {len(rows)}", *(f"  {names[n]:<{width}}  {text}" for n, text in rows.items())]
        return "\n".join(parts)


def add_depth_shift(
    model: nn.Module,
    sizes: Sequence[int] = (-1, 0, 1),
    *,
    axis: Axis = "depth",
    flatten: bool = True,
    include: str | Sequence[str] = "*",
) -> Shifting:
    """Shifts before the convolutions of any 3D network, in place, and makes them flat along the axis.

    ``print`` the result to see every convolution: what became of it, or why it was left. Shifted are plain
    Conv3d that reach across the axis (3×3×3, 1×3×3, ...), padded by half their kernel along it. Left are
    1×1×1, transposed, grouped and dilated ones, subclasses, and those with fewer input channels than sizes,
    such as the first one of a network for CT: there would be no other channel to tell what was moved.
    ``include`` is one or several globs over qualified names ("encoder.*"). Stride, bias and state-dict keys
    stay; so do shapes of outputs. A convolution that is shifted already is not shifted again.

    ``flatten`` cuts a kernel of k taps along the axis to one: for each input channel the tap that saw what the
    shift now brings (of -1, 0, 1 in 3 taps: the last, the middle, the first; the nearest one for sizes beyond
    the kernel), times √k. So a converted layer does what the original did with the other taps at zero, and
    fresh weights keep the variance that their initialisation gave the output. Trained ones need more training.
    Without ``flatten`` kernels and weights stay, and the shift is put before them.

    Call it before ``sparsify``: masks made for the old shape do not fit. An optimizer may exist already but
    must not have stepped: the parameters are the same objects, in a new shape, without gradients.

    Raises:
        SettingError: ``sizes`` or ``axis`` are out of range.
        SelectionError: A glob matches no convolution, or there is none to shift. Nothing is changed then.

    Reference: the restricted depth-shift of Wu et al., *E2ENet* (NeurIPS 2024), which shifts before every
    convolution, the first one too.

    >>> model = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 9, 3, stride=2, padding=1))
    >>> print(add_depth_shift(model))
    shifted: 1
      1  3×3×3 → 1×3×3
    left as they are: 1
      0  1 input channel for 3 sizes
    """
    are_whole = len(sizes) > 0 and all(type(size) is int for size in sizes)
    allowed, remedy = "one whole number of voxels or more", "The paper's are (-1, 0, 1)."
    require(are_whole, "sizes", _WHERE, allowed=allowed, given=sizes, remedy=remedy)
    allowed, remedy = " or ".join(AXES), "Name the axis to shift along."
    require(axis in AXES, "axis", _WHERE, allowed=allowed, given=repr(axis), remedy=remedy)
    names = _names(model)
    globs = (include,) if isinstance(include, str) else tuple(include)
    _check_globs(globs, [name for aliases in names.values() for name in aliases])
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    reasons = {}
    for conv, aliases in names.items():
        included = any(fnmatchcase(name, glob) for name in aliases for glob in globs)
        reason = _reason(conv, sizes, axis, flatten=flatten) if included else "not included"
        shared = flatten and any(p.ndim > 1 and owners[id(p)] > 1 for p in conv.parameters(recurse=False))
        reasons[aliases[0]] = reason or ("its weight belongs to another module too" if shared else "")
    _check_any(reasons, names)
    shifted = {}
    for conv, (name, *_) in names.items():
        if not reasons[name]:
            before = conv.kernel_size
            _convert(conv, tuple(sizes), axis, flatten=flatten)
            shifted[name] = " → ".join(dict.fromkeys(map(_times, (before, conv.kernel_size))))
    return Shifting(shifted=shifted, left={name: reason for name, reason in reasons.items() if reason})


def _names(model: nn.Module) -> dict[Any, list[str]]:
    """Lists every convolution, once, with all names it has: networks hold the same module in several places."""
    names: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _CONVOLUTIONS):
            names.setdefault(module, []).append(name)
    return names


def _reason(conv: nn.Module, sizes: Sequence[int], axis: Axis, *, flatten: bool) -> str:
    """Says why a convolution cannot be shifted; empty if it can."""
    if isinstance(conv, ShiftedConv3d):
        return f"shifted already, by {conv.sizes} along {conv.axis}"
    if isinstance(conv, _TRANSPOSED):
        return "transposed"
    if type(conv) is not nn.Conv3d:
        return f"a {type(conv).__name__}, not a plain Conv3d"
    kernel, at = conv.kernel_size, AXES.index(axis)
    padding = kernel[at] // 2 if conv.padding == "same" else 0 if conv.padding == "valid" else conv.padding[at]
    across = [extent for i, extent in enumerate(kernel) if i != at]
    few, is_half = conv.in_channels < len(sizes), kernel[at] % 2 == 1 and padding == kernel[at] // 2
    checks = (
        (max(across) == 1, f"{_times(kernel)}: no reach across the {axis}"),
        (conv.groups > 1, f"grouped: {conv.groups} groups of channels that do not meet"),
        (max(conv.dilation) > 1, f"dilated: by {_times(conv.dilation)}"),
        (conv.padding_mode != "zeros", f"padded by {conv.padding_mode!r}, where a shift lets zeros in"),
        (few, f"{number_of(conv.in_channels, 'input channel')} for {len(sizes)} sizes"),
        ("weight" not in conv._parameters, "its weight is computed from other parameters"),
        (flatten and not is_half, f"{_times(kernel)}, padded by {padding} along {axis}: not half an odd kernel"),
    )
    return next((text for refused, text in checks if refused), "")


@torch.no_grad()
def _convert(conv: Any, sizes: tuple[int, ...], axis: Axis, *, flatten: bool) -> None:
    """Changes the class of the module rather than the module: whoever holds it, under any name, has it."""
    at = AXES.index(axis)
    if flatten and conv.kernel_size[at] > 1:
        flat = _flatten(conv.weight, sizes, dim=2 + at)
        conv.weight.grad = None
        # By way of another type: it makes autograd forget the old shape, which a graph that is still alive
        # (DynUNet keeps its last outputs) would expect the gradient to have.
        conv.weight.data = flat.to(torch.float32 if flat.dtype == torch.float64 else torch.float64)
        conv.weight.data = flat
        conv.kernel_size = (*conv.kernel_size[:at], 1, *conv.kernel_size[at + 1 :])
        if not isinstance(conv.padding, str):
            conv.padding = (*conv.padding[:at], 0, *conv.padding[at + 1 :])
    conv.__class__ = ShiftedConv3d
    conv.sizes, conv.axis = sizes, axis


def _flatten(weight_OIK: Tensor, sizes: tuple[int, ...], *, dim: int) -> Tensor:
    """Keeps one tap along ``dim``: of each input channel the one that saw what the shift brings, rescaled."""
    taps = weight_OIK.shape[dim]
    half = taps // 2
    groups = zip(channel_groups(weight_OIK, len(sizes)), sizes, strict=False)
    kept = [group.narrow(dim, half - max(-half, min(half, size)), 1) for group, size in groups]
    return torch.cat(kept, dim=1) * sqrt(taps)


def _times(extents: Sequence[int]) -> str:
    return "×".join(map(str, extents))


def _check_globs(globs: Sequence[str], known: Sequence[str]) -> None:
    allowed, remedy = "a match with the name of a convolution", f"Names here: {', '.join(known[:5])}."
    for glob in globs:
        if known and not any(fnmatchcase(name, glob) for name in known):
            raise SelectionError.of(f"glob {glob!r}", _WHERE, allowed=allowed, given="no match", remedy=remedy)


def _check_any(reasons: Mapping[str, str], names: Mapping[nn.Module, Sequence[str]]) -> None:
    holds = not all(reasons.values()) or any(isinstance(conv, ShiftedConv3d) for conv in names)
    listed = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in list(reasons.items())[:8])
    allowed, given = "a model with a convolution that can be shifted", f"none ({listed or 'no convolution'})"
    remedy = "Plain Conv3d with kernels such as 3×3×3 or 1×3×3 can."
    require(holds, "model", _WHERE, allowed=allowed, given=given, remedy=remedy, error=SelectionError)
