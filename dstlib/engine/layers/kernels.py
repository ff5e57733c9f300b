"""The part of a fast convolution that follows which of its kernels are active."""

from functools import partial
from typing import Any

from torch import Tensor, nn

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
        weight, bias, kept = parameters["weight"], parameters["bias"], self.watch.made
        seen = self.watch.look(weight, training=self.training)
        if kept is None or kept[0] is not seen or kept[1].bias is not bias:
            kept = self.watch.made = seen, Weights(weight, bias, seen.active, seen.graded, seen.calls)
        weights: Weights = kept[1]
        return weights


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
