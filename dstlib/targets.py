"""Which parameters can be sparse, and how each is seen as (outputs, inputs, *kernel taps).

Selection is by module type, never by the number of axes, which would catch position embeddings, bias tables
and layer scales. Every parameter with two axes or more gets a verdict, so that nothing is left out in
silence.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dstlib.errors import SelectionError, StateError, explain, similar

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_RECURRENT_REASON = "recurrent: sparse only if included by name"
_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}  # stacked in one parameter
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_STATISTICS = {"batch_norm", "mean", "var_mean", "std_mean", "var", "std", "weight_standardization"}


@dataclass(frozen=True)
class Slot:
    """One matrix within a parameter, as a view of (O, I, *K); ``rows`` of the parameter, from and up to."""

    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def view(self, x: Tensor) -> Tensor:
        """The part of ``x``, a tensor of the parameter's shape, sharing its memory."""
        part = x if self.rows is None else x[slice(*self.rows)]
        return part.transpose(0, 1) if self.transposed else part


@dataclass(frozen=True, eq=False)
class Weight:
    """The verdict on one parameter: ``reason`` says why it stays dense, and is empty where it is sparse."""

    name: str
    kind: str
    parameter: nn.Parameter
    slots: tuple[Slot, ...]
    reason: str = ""
    on_request: bool = False
    aliases: frozenset[str] = frozenset()

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches a name of the parameter, or of a module that owns it."""
        return any(fnmatchcase(name, pattern) for name in self.aliases)


def plain_name(name: str) -> str:
    """A qualified name without what torch.compile and activation checkpointing add to it.

    >>> plain_name("_orig_mod.stem._orig_mod.weight")
    'stem.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, DataParallel, AveragedModel and torch.compile."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model


def find_weights(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, nn.Parameter]:
    """The parameters of a model under these names; a StateError if one is missing or of another shape."""
    named = {plain_name(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}
    for name, shape in shapes.items():
        if name not in named or named[name].shape != shape:
            raise StateError(
                explain(
                    "model",
                    "mask_model()",
                    allowed=f"a weight {name} of shape {tuple(shape)}",
                    given=tuple(named[name].shape) if name in named else "none of that name",
                    remedy="Pass a copy of the model that was sparsified.",
                )
            )
    return {name: named[name] for name in shapes}


def select(model: nn.Module, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> tuple[Weight, ...]:
    """A verdict on each parameter with two axes or more, in the model's order; tied ones once.

    Globs match whole qualified names of parameters ("head.weight") or of their modules ("head"). A name
    written out in full asks for that weight, and turns on those that are dense only by default.

    Errors: SelectionError for a glob that matches nothing, for a weight asked for by its full name that
    cannot be sparse, and where nothing is left to be sparse.
    """
    weights = list(_verdicts(model))
    for pattern in (*include, *exclude) if weights else ():
        check_matches(pattern, weights, "the model")
    for pattern in include:
        _check_possible(pattern, weights)
    chosen = tuple(_choose(weight, include, exclude) for weight in weights)
    if all(weight.reason for weight in chosen):
        reasons = "; ".join(f"{w.name}: {w.reason}" for w in chosen[:8]) or "no parameter has two axes"
        raise SelectionError(
            explain(
                "weights",
                "the model",
                allowed="at least one Linear, Conv, ConvTranspose or attention weight to make sparse",
                given=f"none ({reasons})",
                remedy="Look at include= and exclude=.",
            )
        )
    return chosen


def check_matches(pattern: str, weights: Iterable[Weight], where: str) -> None:
    """Raises a SelectionError if the glob matches none of these weights."""
    if not any(w.matches(pattern) for w in weights):
        known = sorted({name for w in weights for name in w.aliases})
        raise SelectionError(
            explain(
                f"glob {pattern!r}",
                where,
                allowed="a match with the name of a weight or of its module",
                given="no match",
                remedy=_hint(pattern, known),
            )
        )


def _hint(pattern: str, known: Sequence[str]) -> str:
    if any(name.startswith(f"{pattern}.") for name in known):
        return f"Globs match whole names: write {pattern + '.*'!r} for all below it."
    return f"Names here: {similar(pattern, known)}."


def _check_possible(name: str, weights: Iterable[Weight]) -> None:
    """A SelectionError if all weights of exactly this name, or of the module of this name, must stay dense."""
    named = [weight for weight in weights if name in weight.aliases]
    if named and all(weight.reason and not weight.on_request for weight in named):
        raise SelectionError(
            explain(
                "weight",
                named[0].name,
                allowed="one that can be masked in place",
                given=named[0].reason,
                remedy="Take its name out of include=.",
            )
        )


def _choose(weight: Weight, include: Sequence[str], exclude: Sequence[str]) -> Weight:
    asked_for = any(pattern in weight.aliases for pattern in include)
    reason = weight.reason if not (weight.on_request and asked_for) else ""
    if not any(weight.matches(pattern) for pattern in include):
        reason = "not included"
    if any(weight.matches(pattern) for pattern in exclude):
        reason = "excluded"
    return replace(weight, reason=reason)


def _verdicts(model: nn.Module) -> Iterator[Weight]:
    """One verdict per distinct parameter; a parameter with several owners is as dense as the densest."""
    owners: dict[int, list[Weight]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                remedy = "Run one forward pass first."
                raise SelectionError(
                    explain("weight", module_name, allowed="a known shape", given="a lazy module", remedy=remedy)
                )
            if parameter.ndim >= 2:
                owners.setdefault(id(parameter), []).append(_verdict(module_name, module, key, parameter))
    for verdicts in owners.values():
        aliases = frozenset().union(*(v.aliases for v in verdicts))
        tied = next((v for v in verdicts if v.reason), None)
        reason = verdicts[0].reason or (f"tied to {tied.name}, {tied.reason}" if tied else "")
        yield replace(verdicts[0], reason=reason, aliases=aliases)


def _verdict(module_name: str, module: nn.Module, key: str, parameter: nn.Parameter) -> Weight:
    module_name = plain_name(module_name)
    name = f"{module_name}.{key}" if module_name else key
    slots, reason, on_request = _judge(module, key, name)
    if not parameter.is_floating_point() or parameter.layout != torch.strided:
        reason, on_request = f"{parameter.dtype}, {parameter.layout}: not a plain float tensor", False
    elif type(parameter.data).__name__ == "DTensor":
        reason, on_request = "sharded (DTensor): not supported yet", False
    elif not parameter.numel():
        reason, on_request = "empty", False
    elif not parameter.requires_grad:
        reason, on_request = "frozen (requires_grad is False)", False
    aliases = frozenset({name, module_name} - {""})
    return Weight(name, type(module).__name__, parameter, slots, reason, on_request, aliases)


def _judge(module: nn.Module, key: str, name: str) -> tuple[tuple[Slot, ...], str, bool]:
    """(slots, why dense or "", whether asking for it by name helps), from the module alone."""
    whole = (Slot(name),)
    if isinstance(module, nn.MultiheadAttention) and key == "in_proj_weight":
        return _chunks(name, "qkv", module.in_proj_weight), "", False
    if isinstance(module, nn.MultiheadAttention) and re.fullmatch("[qkv]_proj_weight", key):
        return whole, "", False
    if isinstance(module, _RECURRENT) and key.startswith("weight_"):
        num_gates = 1 if key.startswith("weight_hr") else _GATES.get(type(module).__name__, 1)
        return _chunks(name, map(str, range(num_gates)), module._parameters[key]), _RECURRENT_REASON, True
    if key != "weight" or not isinstance(module, (nn.Linear, *_CONVS, *_TRANSPOSED)):
        return whole, f"{key} of {type(module).__name__}: no weight of Linear, Conv or attention", False
    if _standardizes_weight(module):
        return whole, "its forward standardises the weight, which would undo the zeros", False
    if isinstance(module, _TRANSPOSED):
        reason = "grouped transposed convolution" if module.groups > 1 else ""
        return (Slot(name, transposed=True),), reason, False
    if isinstance(module, _CONVS) and module.groups > 1 and module.weight.shape[1] == 1:
        return whole, "depthwise: sparse only if included by name", True
    return whole, "", False


def _chunks(name: str, parts: Iterable[str], parameter: Tensor | None) -> tuple[Slot, ...]:
    """Matrices of equal height, stacked in one parameter: each competes for itself, so that none is starved."""
    assert parameter is not None
    names = [f"{name}.{part}" for part in parts]
    height = len(parameter) // len(names)
    return tuple(Slot(n, (i * height, (i + 1) * height)) for i, n in enumerate(names))


def _standardizes_weight(module: nn.Module) -> bool:
    """Whether a subclass's own forward takes statistics of something, as weight standardisation does.

    It re-centres the zeros: a stored density of 0.2 becomes 1.0 inside the convolution (timm's StdConv2d,
    ScaledStdConv2d and their kind). Judged by the names that the code uses, so that a model on the meta
    device can be judged too.
    """
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            return False
        for method in ("forward", "_conv_forward", "get_weight"):
            code = getattr(cls.__dict__.get(method), "__code__", None)
            if code is not None and _STATISTICS & set(code.co_names):
                return True
    return False
