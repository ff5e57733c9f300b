"""What a fast layer is: a layer type, its fast form, and what stands in the way.

The engine's own fast form of a layer is that very layer with another class: all that the layer carries stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, NoReturn, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules import module as every_module

from dstlib.engine.layers.feature_map import Pending, write_out
from dstlib.engine.layers.watch import Watch
from dstlib.engine.ops.operator import is_followed
from dstlib.errors import SettingError
from dstlib.targets import is_hooked

_KINDS = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class FastLayer:
    """A layer type and its fast form.

    ``obstacle`` says of a layer of this ``kind`` why it has none, in words that follow "plain: ", and returns None of
    one that ``make`` can make it of. The fast form takes what the layer takes, and holds its very parameters under the
    same names; it gets the layer's hooks. ``make`` may return the layer itself, changed: it is given one of a copy.
    """

    kind: type[nn.Module] | UnionType
    obstacle: Callable[[Any], str | None]
    make: Callable[[Any], nn.Module]


@runtime_checkable
class FollowsMask(Protocol):
    """A fast layer that computes with the active part of a weight alone.

    ``weight`` is the parameter; ``set_mask`` takes a mask of its shape, True = active, each time that it has changed,
    and where the weight was written in a way that its version does not tell of; ``dense_gradient`` is set before each
    pass: whether it is to give the gradients of the inactive part too.
    """

    dense_gradient: bool

    @property
    def weight(self) -> Tensor:
        """The weight whose mask the layer follows."""
        ...

    def set_mask(self, mask: Tensor) -> None:
        """Follows a mask of the weight that has changed."""
        ...


class Fast(nn.Module):
    """A layer of the engine, whose class stands before that of the plain layer: ``super().forward`` computes as that.

    That is the way where the engine cannot tell all that is to happen: under torch's traces, modes and transforms, and
    where somebody has changed the layer so that it has an obstacle. So looked at in each call is what the layer is.
    """

    settled: tuple[tuple[object, ...], Any] | None = None  # what the layer was when it was looked at, and its plan then

    def state(self) -> tuple[object, ...]:
        """Returns what the plan depends on; compared by ``==`` in each call."""
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Tells why the engine cannot compute the layer as it is now; None where it can."""
        raise NotImplementedError

    def make_plan(self) -> Any:
        """Returns what the engine computes by, of a layer without an obstacle."""
        raise NotImplementedError

    def compute(self, plan: Any, *inputs: Any) -> Any:
        """Computes on the engine."""
        raise NotImplementedError

    def plan(self) -> Any:
        """Returns what the engine computes by now, None where the layer has an obstacle."""
        kept, state = self.settled, self.state()
        if kept is None or kept[0] != state:
            with torch.inference_mode(False):  # what is made now may serve a training later
                kept = state, None if self.obstacle() else self.make_plan()
            self.forget()  # first: another thread that finds the new plan finds nothing of the old one
            self.settled = kept
        return kept[1]

    def forget(self) -> None:
        """Forgets what was prepared by another plan."""

    def takes(self, *inputs: Any) -> bool:
        """Tells whether the engine computes on inputs with so many axes: by default on maps (N, C, D, H, W)."""
        return all(x is None or type(x) is Pending or (x.ndim == 5 and len(x) > 0) for x in inputs)

    def run(self, *inputs: Any) -> Any:
        """Computes on the engine where that can be now, else as the plain layer."""
        if is_compiled():
            return uncompiled(self.run, *inputs)
        if inputs[0] is None or is_traced(*inputs) or not self.takes(*inputs) or (plan := self.plan()) is None:
            return self.as_plain(*inputs)
        return self.compute(plan, *inputs)

    def as_plain(self, *inputs: Any) -> Any:
        """Computes as the plain layer does."""
        return super().forward(*inputs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses to be scripted, as ``torch.jit.script`` asks each module for what it is to compile instead.

        Raises:
            SettingError: Always.
        """
        allowed, given = "plain layers", f"a {type(self).__name__} of dstlib's engine"
        remedy = "Script the model that accelerate() was given, or use torch.jit.trace()."
        raise SettingError.of("layer", "torch.jit.script()", allowed=allowed, given=given, remedy=remedy)


class Follows(Fast):
    """A layer of the engine that looks, in each call, at its weight and at which of it is active."""

    watch: Watch[Any]

    def forget(self) -> None:
        """Forgets what was prepared by another plan."""
        self.watch.seen = None

    def train(self, mode: bool = True) -> Self:
        """As of any module; the next call looks at all anew where that changes the mode."""
        if mode is not self.training:
            self.watch.change_mode()
        return super().train(mode)

    def followed(self) -> Any:
        """Returns the weight whose mask, or zeros, the layer follows; None where somebody has taken it away."""
        return self._parameters.get("weight")


L = TypeVar("L", bound=nn.Module)


def become(layer: nn.Module, kind: type[L], watch: Watch[Any] | None = None) -> L:
    """Gives a layer another class, which computes the same, and what it looks by; all else of the layer stays."""
    layer.__class__ = kind
    assert isinstance(layer, kind)
    if watch is not None:
        layer.watch = watch  # type: ignore[assignment]  # it is neither a tensor nor a module
    return layer


def is_readable(weight: object) -> bool:
    """Tells whether the engine's layers on a CPU can look at a weight."""
    if not isinstance(weight, Tensor) or type(weight) not in _KINDS or is_functorch_wrapped_tensor(weight):
        return False  # functional_call leaves what torch.func has wrapped in the place of tied parameters
    return weight.is_cpu and not weight.is_inference()


def is_traced(*given: Tensor | None) -> bool:
    """Tells whether anything but autograd records what becomes of tensors: torch's traces, modes and transforms.

    Or whether a tensor is of another kind than the engine reads: on another device, sparse, of a class of its own. A
    fast layer then computes as the plain one does, whose operations they all know.
    """
    for x in given:
        if x is None or type(x) is Pending:
            continue
        if type(x) not in _KINDS or not x.is_cpu or x.layout is not torch.strided:
            return True
    return is_recorded()


def is_recorded() -> bool:
    """Tells whether anything but autograd records what is computed: torch's traces, modes and transforms."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, make_fx, torch.export
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or is_followed()  # vmap, grad, forward mode
    )


def is_compiled() -> bool:
    """Tells whether torch.compile makes a graph of what is called, which is to leave the engine out."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


# calls a function outside of the graphs of torch.compile
uncompiled = torch.compiler.disable(
    _call, reason="a layer of dstlib's engine looks at its weight in each call, which no graph can hold"
)


def give_out(model: object, inputs: object, outputs: Any) -> None:
    """Writes out what a model returns, as a hook behind its forward pass: whoever calls it gets plain tensors."""
    if type(outputs) is not Tensor:
        uncompiled(write_out, outputs) if is_compiled() else write_out(outputs)


def has_hooks(*modules: nn.Module | None) -> bool:
    """Tells whether calling modules does other things than their classes say: hooks, or a ``forward`` of their own."""
    for each in modules:  # a loop, and a dict: this is asked in each call
        if each is not None:
            own = each.__dict__
            if (
                (own["_forward_hooks"] and is_hooked(each))
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return True
    return False


def state_of_parameters(weight: Any, bias: Any) -> tuple[object, ...]:
    """Returns what tells whether the engine can read parameters, of which there must be the first."""
    if weight is None:
        return (None,)
    wrapped = weight.__class__ is not nn.Parameter and is_functorch_wrapped_tensor(weight)
    # plain values: this is asked in each call
    return weight.__class__, wrapped, weight.is_cpu, weight.is_inference(), weight.shape, bias is None or bias.is_cpu


def has_global_hooks() -> bool:
    """Tells whether there are hooks on the calls of all modules."""
    return bool(
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )


def obstacle_of_parts(*parts: nn.Module | None) -> str | None:
    """Tells what calling the parts of a layer does that computing them as one would leave out; None where nothing."""
    return "a part of it has a hook, or a forward of its own" if has_global_hooks() or has_hooks(*parts) else None


def obstacle_of_its_own(layer: nn.Module) -> str | None:
    """Tells what a layer, or a module inside of it, carries that no fast form can keep; None where there is nothing.

    Hooks on the layer itself are kept.

    >>> layer = nn.Sequential(nn.ReLU())
    >>> _ = layer[0].register_forward_hook(lambda module, args, output: None)
    >>> obstacle_of_its_own(layer)
    "its part '0' has a hook, or a forward of its own"
    """
    if "forward" in vars(layer):
        return "its forward was replaced"
    parts = (name for name, part in layer.named_modules() if part is not layer and has_hooks(part))
    return next((f"its part {name!r} has a hook, or a forward of its own" for name in parts), None)


def obstacle_to_weight(layer: nn.Module) -> str | None:
    """Tells why a layer's weight cannot be looked at by the engine on a CPU; None where it can.

    >>> obstacle_to_weight(nn.utils.weight_norm(nn.Linear(2, 2)))
    'its weight is computed from others, as by weight_norm, spectral_norm or prune'
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed from others, as by weight_norm, spectral_norm or prune"
    for each in layer._parameters.values():
        if each is not None and not is_readable(each):
            return f"it has a {type(each).__name__} on {each.device.type}"
    return None


def three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    """Returns sizes along depth, height and width, of what has one for all, or two, being flat along depth.

    >>> three(2), three((2, 2))
    ((2, 2, 2), (1, 2, 2))
    """
    depth, height, width = (sizes,) * 3 if isinstance(sizes, int) else ([1] * 3 + list(sizes))[-3:]
    return depth, height, width
