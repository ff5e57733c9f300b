"""The verdict on one parameter, from its module: sparse as which matrices, or dense for which reason.

Masking in place is sound where the forward multiplies by the parameter as it is. It is not where the weight
is computed from the parameter anew each time, or where something adds to it behind the optimizer's back.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from dstlib.targets.views import Slot, chunks, fused_parts

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRICES = (nn.Linear, *_CONVS, *_TRANSPOSED)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_CONTAINERS = (nn.Module, nn.ParameterList, nn.ParameterDict)
_STATISTICS = {"batch_norm", "mean", "var_mean", "std_mean", "var", "std", "weight_standardization"}
_FACTOR = re.compile(r"lora_(embedding_)?(a|b|down|up)", re.IGNORECASE)  # of peft, loralib, torchtune and kohya
_BY_NAME = "sparse only if included by name"


@dataclass(frozen=True)
class Seat:
    """A parameter in its module; ``owner`` is the module that holds that one, None for the model itself."""

    module_name: str
    key: str
    parameter: nn.Parameter
    module: nn.Module
    owner: nn.Module | None

    @property
    def name(self) -> str:
        """The qualified name of the parameter."""
        return f"{self.module_name}.{self.key}" if self.module_name else self.key

    @property
    def names(self) -> frozenset[str]:
        """By which a user may mean it: its own and its module's."""
        return frozenset({self.name, self.module_name} - {""})


@dataclass(frozen=True)
class Verdict:
    """``reason`` says why it stays dense, empty if it does not; naming one of ``on_request`` in full overrules it.

    ``can_split`` is whether the user may choose how many matrices it is; ``stands_for`` are further names, of
    what is computed from it.
    """

    slots: tuple[Slot, ...]
    reason: str = ""
    on_request: frozenset[str] = frozenset()
    can_split: bool = True
    stands_for: frozenset[str] = frozenset()


def judge(seat: Seat) -> Verdict:
    """The verdict of the first rule that applies.

    >>> judge(Seat("head", "weight", (head := nn.Linear(4, 2)).weight, head, None))
    Verdict(slots=(Slot(name='head.weight', rows=None, transposed=False),), reason='', on_request=frozenset(), \
can_split=True, stands_for=frozenset())
    """
    rules = (_computed, _unusable, _factor, _adapted, _attention, _recurrent, _other, _matrix)
    return next(verdict for rule in rules if (verdict := rule(seat)) is not None)


def _dense(seat: Seat, reason: str, *, on_request: frozenset[str] = frozenset()) -> Verdict:
    return Verdict((Slot(seat.name),), reason, on_request)


def _computed(seat: Seat) -> Verdict | None:
    """What the real weight is computed from, by parametrize or by a hook before each forward."""
    if isinstance(seat.module, ParametrizationList):
        owner, _, weight = seat.module_name.rpartition("parametrizations.")
        maker, owner = " and ".join(type(m).__name__ for m in seat.module), owner.rstrip(".")
    else:
        weight = re.sub("_(orig|g|v|raw|bar)$", "", seat.key)
        if weight == seat.key or not isinstance(vars(seat.module).get(weight), Tensor):
            return None
        hooks = seat.module._forward_pre_hooks.values()
        makers = [type(h).__name__ for h in hooks if weight in (getattr(h, n, "") for n in ("name", "_tensor_name"))]
        maker, owner = " and ".join(makers) or "a hook", seat.module_name
    reason = f"{weight} is computed from it at each forward, by {maker}"
    stands_for = frozenset({f"{owner}.{weight}" if owner else weight, owner} - {""})
    return Verdict((Slot(seat.name),), reason, stands_for=stands_for)


def _unusable(seat: Seat) -> Verdict | None:
    """What no optimizer trains, or no mask fits."""
    parameter = seat.parameter
    kind = type(parameter.data).__name__
    if not isinstance(parameter, nn.Parameter):
        return _dense(seat, "a computed tensor, no parameter")
    if kind == "DTensor":
        return _dense(seat, "sharded (DTensor): not supported yet")
    if not parameter.is_floating_point() or parameter.layout != torch.strided or kind not in ("Tensor", "Parameter"):
        return _dense(seat, f"{kind} of {parameter.dtype}, {parameter.layout}: not a plain float tensor")
    if not parameter.numel():
        return _dense(seat, "empty")
    return None if parameter.requires_grad else _dense(seat, "frozen (requires_grad is False)")


def _factor(seat: Seat) -> Verdict | None:
    """A or B of B·A, as a layer of its own (peft) or as a parameter of the layer (loralib)."""
    if not any(_FACTOR.fullmatch(part) for part in seat.name.split(".")):
        return None
    is_layer = isinstance(seat.module, (nn.Linear, *_CONVS)) and seat.key == "weight"
    if not (is_layer or _is_own(seat)):
        return None
    reason = f"low-rank factor, whose zeros leave the product dense: {_BY_NAME}"
    return _dense(seat, reason, on_request=seat.names if is_layer else frozenset({seat.name}))


def _adapted(seat: Seat) -> Verdict | None:
    """The weight beside low-rank factors, in the same module or in the only layer that their module wraps."""
    if not isinstance(seat.module, _MATRICES) or seat.key != "weight":
        return None
    holder = seat.module if _has_factors(seat.module) else seat.owner
    if holder is None or not _has_factors(holder):
        return None
    layers = [m for n, m in holder.named_children() if isinstance(m, _MATRICES) and not _FACTOR.fullmatch(n)]
    if holder is not seat.module and layers != [seat.module]:
        return None
    if any("train" in vars(cls) for cls in type(holder).__mro__ if not _is_torch(cls)):
        return _dense(seat, "train() and eval() merge a low-rank product into it, which would undo the zeros")
    reason = f"adapted by low-rank factors, and merging them would undo the zeros: {_BY_NAME}"
    return _dense(seat, reason, on_request=seat.names)


def _has_factors(module: nn.Module) -> bool:
    return any(_FACTOR.fullmatch(name) for name in (*module._parameters, *module._modules))


def _attention(seat: Seat) -> Verdict | None:
    if not isinstance(seat.module, nn.MultiheadAttention):
        return None
    if seat.key == "in_proj_weight":
        return Verdict(chunks(seat.name, "qkv", len(seat.parameter)), can_split=False)
    return Verdict((Slot(seat.name),)) if re.fullmatch("[qkv]_proj_weight", seat.key) else None


def _recurrent(seat: Seat) -> Verdict | None:
    """Gates are stacked in one parameter."""
    is_weight = re.fullmatch(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?", seat.key)
    if not isinstance(seat.module, _RECURRENT) or not is_weight:
        return None
    num_gates = 1 if is_weight[1] == "hr" else len(seat.parameter) // seat.module.hidden_size
    slots = chunks(seat.name, range(num_gates), len(seat.parameter))
    return Verdict(slots, f"recurrent: {_BY_NAME}", on_request=seat.names, can_split=False)


def _other(seat: Seat) -> Verdict | None:
    """All that is no weight of Linear or Conv."""
    if seat.key == "weight" and isinstance(seat.module, _MATRICES):
        return None
    if isinstance(seat.module, nn.Bilinear) and seat.key == "weight":
        return _dense(seat, f"bilinear: {_BY_NAME}", on_request=seat.names)
    if not _is_own(seat):
        return _dense(seat, f"{seat.key} of {type(seat.module).__name__}: no weight of Linear, Conv or attention")
    if seat.key == "weight" and _standardizes_weight(type(seat.module)):
        return _dense(seat, "its forward standardises the weight, which would undo the zeros")
    kind = type(seat.owner if isinstance(seat.module, _CONTAINERS[1:]) else seat.module).__name__
    return _dense(seat, f"raw parameter of {kind}: {_BY_NAME}", on_request=frozenset({seat.name}))


def _is_own(seat: Seat) -> bool:
    """Whether a user's code, rather than torch's, made this parameter."""
    base = next(cls for cls in type(seat.module).__mro__ if _is_torch(cls))
    return base in _CONTAINERS or seat.key not in ("weight", "bias_k", "bias_v")


def _matrix(seat: Seat) -> Verdict:
    module, slot = seat.module, Slot(seat.name)
    if _standardizes_weight(type(module)):
        return _dense(seat, "its forward standardises the weight, which would undo the zeros")
    if isinstance(module, _TRANSPOSED):
        reason = "grouped transposed convolution" if module.groups > 1 else ""
        return Verdict((Slot(seat.name, transposed=True),), reason, can_split=False)
    if isinstance(module, _CONVS) and module.groups > 1 and module.weight.shape[1] == 1:
        return Verdict((slot,), f"depthwise: {_BY_NAME}", on_request=seat.names)
    parts = fused_parts(seat.module_name, seat.parameter, seat.owner) if isinstance(module, nn.Linear) else ""
    return Verdict(chunks(seat.name, parts, len(seat.parameter)) if parts else (slot,))


def _standardizes_weight(cls: type) -> bool:
    """Whether a subclass's own forward takes statistics of something, as weight standardisation does.

    It re-centres the zeros: a stored density of 0.2 becomes 1.0 inside the convolution (timm's StdConv2d,
    ScaledStdConv2d and their kind). Judged by the names that the code uses, so that a model on the meta
    device can be judged too.
    """
    own = [base for base in cls.__mro__ if not _is_torch(base)]
    return any(
        _takes_statistics(vars(base).get(method), cls)
        for base in own
        for method in ("forward", "_conv_forward", "get_weight")
    )


def _takes_statistics(function: object, cls: type, depth: int = 2) -> bool:
    """By the names in its code, or in that of methods and functions it may call."""
    function = inspect.unwrap(function.fget if isinstance(function, property) else function)  # type: ignore[arg-type]
    if not inspect.isfunction(function) or _is_torch(function):
        return False
    names = set(function.__code__.co_names)
    if names & _STATISTICS:
        return True
    called = (inspect.getattr_static(cls, name, function.__globals__.get(name)) for name in names)
    return depth > 0 and any(_takes_statistics(helper, cls, depth - 1) for helper in called)


def _is_torch(thing: type | Callable[..., object]) -> bool:
    return (thing.__module__ or "").split(".")[0] == "torch"


def overlaps(parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """By the identity of each parameter that shares memory with another one: the name of that one.

    Such as a view of an encoder's weight that is a decoder's: a mask of the one would be written through to
    the other.
    """
    plain = [
        (p.device, p.data_ptr(), p.data_ptr() + _num_bytes(p), name)
        for name, p in parameters.items()
        if type(p.data) is Tensor and p.layout == torch.strided and not p.is_meta and p.data_ptr()
    ]
    found: dict[int, str] = {}
    last = None
    for span in sorted(plain, key=lambda span: (str(span[0]), span[1])):
        if last is not None and span[0] == last[0] and span[1] < last[2]:
            found[id(parameters[span[3]])] = last[3]
            found.setdefault(id(parameters[last[3]]), span[3])
        if last is None or span[0] != last[0] or span[2] > last[2]:
            last = span
    return found


def _num_bytes(x: Tensor) -> int:
    """From the first entry to the last."""
    steps = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (sum(steps) + 1) * x.element_size()
