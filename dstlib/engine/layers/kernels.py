"""The part of a fast convolution that follows which of its kernels are active, or holds these alone."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.layers.active_kernels import ActiveKernels
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.layers.fast_layer import Follows, state_of_parameters
from dstlib.engine.layers.watch import Watch
from dstlib.engine.ops.patterns import Pattern, Weights


class FollowsKernels(Follows):
    """A layer that knows the active kernels of a weight (O, C, ...), or (C, O, ...) if it is transposed."""

    watch: Watch[Pattern]

    @property
    def active(self) -> Pattern | None:
        """The kernels that the last call has computed with; None before the first."""
        return None if self.watch.seen is None else self.watch.seen.active

    def weights(self, conv: nn.Module) -> Weights:
        """Returns the weight and the bias of a convolution, and which kernels are active now."""
        parameters: dict[str, Any] = conv._parameters
        weight, bias, kept, held = parameters["weight"], parameters["bias"], self.watch.made, _held(conv)
        if held is not None:
            held.check_order()
            if held.is_noted:
                return held.noted_weights(bias)
            if self.watch.given is not held.kernels:
                self.watch.give(held.kernels)
            if held.is_spread and torch.is_grad_enabled() and weight.requires_grad:
                return held.weights(bias)  # part of what autograd records of this pass
        seen = self.watch.look(weight, training=self.training)
        if kept is None or kept[0] is not seen or kept[1].bias is not bias:
            made = Weights(weight, bias, seen.active, seen.graded, seen.calls) if held is None else held.weights(bias)
            kept = self.watch.made = seen, made
        weights: Weights = kept[1]
        return weights


def _held(conv: nn.Module) -> ActiveKernels | None:
    """Returns the active kernels of a convolution that holds them alone."""
    held = conv.held.get("weight") if isinstance(conv, CompactLayer) else None
    assert held is None or isinstance(held, ActiveKernels)
    return held


def watch_kernels(*, transposed: bool = False) -> Watch[Pattern]:
    """Returns the look at a weight whose kernels are active where any of their taps is."""
    return Watch(partial(_pattern, transposed=transposed))


def _pattern(mask: Tensor, *, transposed: bool) -> Pattern:
    pairs = mask.flatten(2).any(dim=2)
    return Pattern.of(pairs.T if transposed else pairs)


def state_of_conv(conv: Any) -> tuple[object, ...]:
    """Returns what of a convolution its fast form depends on besides values."""
    parameters = conv._parameters
    return (
        *state_of_parameters(parameters.get("weight"), parameters.get("bias")),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.padding_mode,
        conv.kernel_size,
    )
