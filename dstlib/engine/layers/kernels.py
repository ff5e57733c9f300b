"""The part of a fast convolution that follows which of its kernels are active."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import Follows, is_readable
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
        weight = parameters["weight"]
        seen = self.watch.look(weight, training=self.training)
        return Weights(weight, parameters["bias"], seen.active, seen.graded, seen.calls)


def watch_kernels(*, transposed: bool = False) -> Watch[Pattern]:
    """Returns the look at a weight whose kernels are active where any of their taps is."""
    return Watch(partial(_pattern, transposed=transposed))


def _pattern(mask: Tensor, *, transposed: bool) -> Pattern:
    pairs = mask.flatten(2).any(dim=2)
    return Pattern.of(pairs.T if transposed else pairs)


def state_of_conv(conv: Any) -> tuple[object, ...]:
    """Returns what of a convolution its fast form depends on besides values."""
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    return (
        weight.shape if is_readable(weight) else None,
        bias is None or is_readable(bias),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.padding_mode,
        conv.kernel_size,
    )
