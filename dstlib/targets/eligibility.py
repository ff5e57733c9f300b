"""Whether one parameter may be sparse, by its module: as which matrices, or why it stays dense.

Masking in place is sound where the forward multiplies by the parameter as it is. It is not where the weight
is computed from the parameter anew each time, or where something adds to it behind the optimizer's back.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod

from dstlib.targets.fused import fused
from dstlib.targets.held import HoldsActive
from dstlib.targets.layouts import is_turned_by_owner, layout_of, overriding
from dstlib.targets.views import MatrixView, chunks, stacked, transposed_groups

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GRIDS = (*_CONVS, *_TRANSPOSED)
_MATRICES = (nn.Linear, *_GRIDS)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_CONTAINERS = (nn.Module, nn.ParameterList, nn.ParameterDict)
_STATISTICS = {"batch_norm", "mean", "var_mean", "std_mean", "var", "std", "weight_standardization"}
_FACTOR = re.compile(r"lora_(embedding_)?(a|b|down|up|layer)", re.IGNORECASE)  # of peft, loralib, kohya, diffusers ...
_BY_NAME = "sparse only if included by name"
_RAW = "raw parameter of"
_STANDARDISED = "its forward standardises the weight, which would undo the zeros"


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that is sparse, or dense for a ``reason``, which is empty where it is sparse.

    ``views`` are the matrices in it; ``can_split`` is whether the user may choose how many, ``knows_axes`` whether
    it is known which axis counts their outputs. ``aliases`` are all names that mean it; those in ``on_request``
    make it sparse in spite of the reason. ``compact_of`` is the shape of the matrix of which the parameter holds the
    active values alone; None: it holds all.
    """

    name: str
    kind: str
    parameter: nn.Parameter
    views: tuple[MatrixView, ...]
    reason: str = ""
    on_request: frozenset[str] = frozenset()
    can_split: bool = True
    knows_axes: bool = True
    aliases: frozenset[str] = frozenset()
    compact_of: torch.Size | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape with all zeros, which that of the parameter is unless it is compact."""
        return self.parameter.shape if self.compact_of is None else self.compact_of

    def shape_of(self, view: MatrixView) -> torch.Size:
        """The shape (O, I, *K) of one of its matrices."""
        return view.of(torch.empty(self.shape, device="meta")).shape

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches a name of the parameter, or of a module that owns it."""
        return any(fnmatchcase(name, pattern) for name in self.aliases)

    @property
    def waits_for_axes(self) -> bool:
        """Whether it is dense only until somebody names its axes; a low-rank factor is so for its zeros' sake."""
        return bool(self.on_request) and not self.knows_axes and _RAW in self.reason


@dataclass(frozen=True)
class Candidate:
    """A parameter in its module, which may or may not be sparse.

    ``owner`` is the module that holds that module; None where it is the model itself.
    """

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
        """Its own name and its module's: a user may mean it by either."""
        return frozenset({self.name, self.module_name} - {""})

    def weight(
        self,
        reason: str = "",
        *,
        views: tuple[MatrixView, ...] = (),
        on_request: frozenset[str] = frozenset(),
        can_split: bool = True,
        knows_axes: bool = True,
        stands_for: frozenset[str] = frozenset(),
    ) -> Weight:
        """Returns the weight that it is, one matrix unless ``views`` are given.

        ``stands_for`` are further names, of what is computed from it.
        """
        kind, views = type(self.module).__name__, views or (MatrixView(self.name),)
        aliases = self.names | stands_for
        return Weight(self.name, kind, self.parameter, views, reason, on_request, can_split, knows_axes, aliases)


def weight_of(candidate: Candidate) -> Weight:
    """Returns a parameter as a weight, sparse or dense and why, by the first rule that applies.

    >>> table = nn.Embedding(4, 2)
    >>> weight_of(Candidate("table", "weight", table.weight, table, None)).reason
    'weight of Embedding: no weight of Linear, Conv or attention'
    """
    rules = (_held, _computed, _unusable, _factor, _adapted, _attention, _recurrent, _foreign, _other, _matrix)
    return next(found for rule in rules if (found := rule(candidate)) is not None)


def _held(candidate: Candidate) -> Weight | None:
    """Recognises the active values alone of a weight in compact storage."""
    if not isinstance(candidate.module, HoldsActive) or candidate.key not in candidate.module.held:
        return None
    begin_anew = "to begin anew, load the sparsifier's dense_state_dict() into the plain model"
    return candidate.weight(f"sparse already, in compact storage; {begin_anew}")


def _computed(candidate: Candidate) -> Weight | None:
    """Recognises a parameter from which the real weight is computed: by parametrize, or a hook before each forward."""
    if isinstance(candidate.module, ParametrizationList):
        owner, _, weight = candidate.module_name.rpartition("parametrizations.")
        maker, owner = " and ".join(type(m).__name__ for m in candidate.module), owner.rstrip(".")
    else:
        weight = re.sub("_(orig|g|v|raw|bar)$", "", candidate.key)
        if weight == candidate.key or not isinstance(vars(candidate.module).get(weight), Tensor):
            return None
        hooks = candidate.module._forward_pre_hooks.values()
        makers = [type(h).__name__ for h in hooks if weight in (getattr(h, n, "") for n in ("name", "_tensor_name"))]
        maker, owner = " and ".join(makers) or "a hook", candidate.module_name
    reason = f"{weight} is computed from it at each forward, by {maker}"
    if any(isinstance(hook, BasePruningMethod) for hook in candidate.module._forward_pre_hooks.values()):
        reason += f' (torch.nn.utils.prune.remove(layer, "{weight}") makes it plain, zeros and all)'
    stands_for = frozenset({f"{owner}.{weight}" if owner else weight, owner} - {""})
    return candidate.weight(reason, stands_for=stands_for)


def _unusable(candidate: Candidate) -> Weight | None:
    """Recognises a parameter that no optimizer trains, or no mask fits."""
    parameter = candidate.parameter
    kind = type(parameter.data).__name__
    if not isinstance(parameter, nn.Parameter):
        return candidate.weight("a computed tensor, no parameter")
    if kind == "DTensor":
        return candidate.weight("sharded (DTensor): not supported yet")
    if not parameter.is_floating_point() or parameter.layout != torch.strided or kind not in ("Tensor", "Parameter"):
        return candidate.weight(f"{kind} of {parameter.dtype}, {parameter.layout}: not a plain float tensor")
    if not parameter.numel():
        return candidate.weight("empty")
    return None if parameter.requires_grad else candidate.weight("frozen (requires_grad is False)")


def _factor(candidate: Candidate) -> Weight | None:
    """Recognises a low-rank factor, A or B of B·A: a layer of its own (peft) or a parameter of the layer (loralib)."""
    if not any(_FACTOR.fullmatch(part) for part in candidate.name.split(".")):
        return None
    is_layer = isinstance(candidate.module, (nn.Linear, *_CONVS)) and candidate.key == "weight"
    if not (is_layer or _is_own(candidate)):
        return None
    reason = f"low-rank factor, whose zeros leave the product dense: {_BY_NAME}"
    on_request = candidate.names if is_layer else frozenset({candidate.name})
    return candidate.weight(reason, on_request=on_request, knows_axes=is_layer)


def _adapted(candidate: Candidate) -> Weight | None:
    """Recognises a weight beside low-rank factors, in its module or in the only layer that their module wraps."""
    if not _is_layer(candidate.module) or candidate.key != "weight":
        return None
    holder = candidate.module if _has_factors(candidate.module) else candidate.owner
    if holder is None or not _has_factors(holder):
        return None
    layers = [m for n, m in holder.named_children() if _is_layer(m) and not _FACTOR.fullmatch(n)]
    if holder is not candidate.module and layers != [candidate.module]:
        return None
    if any("train" in vars(cls) for cls in type(holder).__mro__ if not _is_torch(cls)):
        return candidate.weight("train() and eval() merge a low-rank product into it, which would undo the zeros")
    found = _foreign(candidate) or _matrix(candidate)
    if found.reason and not found.on_request:
        return found
    reason = f"adapted by low-rank factors, and merging them would undo the zeros: {_BY_NAME}"
    return replace(found, reason=reason, on_request=candidate.names)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, torch's or another library's."""
    weight = module._parameters.get("weight")
    return isinstance(module, _MATRICES) or (weight is not None and layout_of(module, "weight", weight) is not None)


def _has_factors(module: nn.Module) -> bool:
    return any(_FACTOR.fullmatch(name) for name in (*module._parameters, *module._modules))


def _attention(candidate: Candidate) -> Weight | None:
    if not isinstance(candidate.module, nn.MultiheadAttention):
        return None
    if candidate.key == "in_proj_weight":
        return candidate.weight(views=chunks(candidate.name, "qkv", len(candidate.parameter)), can_split=False)
    return candidate.weight() if re.fullmatch("[qkv]_proj_weight", candidate.key) else None


def _recurrent(candidate: Candidate) -> Weight | None:
    """Recognises a recurrent weight, in which the gates are stacked."""
    is_weight = re.fullmatch(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?", candidate.key)
    if not isinstance(candidate.module, _RECURRENT) or not is_weight:
        return None
    num_gates = 1 if is_weight[1] == "hr" else len(candidate.parameter) // candidate.module.hidden_size
    views = chunks(candidate.name, range(num_gates), len(candidate.parameter))
    return candidate.weight(f"recurrent: {_BY_NAME}", views=views, on_request=candidate.names, can_split=False)


def _foreign(candidate: Candidate) -> Weight | None:
    """Recognises a parameter of a layer of another library, whose matrices lie as a table says."""
    module, parameter = candidate.module, candidate.parameter
    layout = layout_of(module, candidate.key, parameter)
    if layout is None:
        return None
    if _standardizes_weight(overriding(module), type(module)):
        return candidate.weight(_STANDARDISED)
    if parameter.ndim > 2:
        views = stacked(candidate.name, parameter.shape, transposed=layout.transposed)
        if module._parameters.get(layout.mixer) is None:
            return candidate.weight(views=views, can_split=False)
        reason = f"mixed by {layout.mixer}, where zeros of one stay dense: {_BY_NAME}"
        return candidate.weight(reason, views=views, on_request=frozenset({candidate.name}), can_split=False)
    return candidate.weight(views=_projections(candidate, transposed=layout.transposed))


def _other(candidate: Candidate) -> Weight | None:
    """Recognises a parameter that is no weight of Linear or Conv."""
    if candidate.key == "weight" and isinstance(candidate.module, _MATRICES):
        return None
    if isinstance(candidate.module, nn.Bilinear) and candidate.key == "weight":
        return candidate.weight(f"bilinear: {_BY_NAME}", on_request=candidate.names)
    if not _is_own(candidate):
        kind = type(candidate.module).__name__
        return candidate.weight(f"{candidate.key} of {kind}: no weight of Linear, Conv or attention")
    if candidate.key == "weight" and _standardizes_weight(type(candidate.module).__mro__, type(candidate.module)):
        return candidate.weight(_STANDARDISED)
    kind = type(candidate.owner if isinstance(candidate.module, _CONTAINERS[1:]) else candidate.module).__name__
    reason = f"{_RAW} {kind}: {_BY_NAME}"
    return candidate.weight(reason, on_request=frozenset({candidate.name}), knows_axes=False)


def _is_own(candidate: Candidate) -> bool:
    """Whether a user's code, rather than torch's, made this parameter."""
    base = next(cls for cls in type(candidate.module).__mro__ if _is_torch(cls))
    return base in _CONTAINERS or candidate.key not in ("weight", "bias_k", "bias_v")


def _matrix(candidate: Candidate) -> Weight:
    module = candidate.module
    if _standardizes_weight(type(module).__mro__, type(module)):
        return candidate.weight(_STANDARDISED)
    if isinstance(module, _GRIDS) and module.in_channels == module.groups > 1 == module.weight.shape[1]:
        return candidate.weight(f"depthwise: {_BY_NAME}", on_request=candidate.names)
    if isinstance(module, _TRANSPOSED):
        views = transposed_groups(candidate.name, module.groups, module.in_channels)
        reason = f"grouped transposed convolution: {_BY_NAME}" if module.groups > 1 else ""
        on_request = candidate.names if reason else frozenset()
        return candidate.weight(reason, views=views, on_request=on_request, can_split=False)
    if not isinstance(module, nn.Linear):
        return candidate.weight()
    is_turned = is_turned_by_owner(candidate.owner, candidate.module_name.rpartition(".")[2])
    return candidate.weight(views=_projections(candidate, transposed=is_turned))


def _projections(candidate: Candidate, *, transposed: bool) -> tuple[MatrixView, ...]:
    """Returns the projections that a linear layer holds, or its one matrix."""
    matrix = MatrixView(candidate.name, transposed=transposed)
    weight, owner = matrix.of(candidate.parameter), candidate.owner
    return fused(candidate.name, candidate.module_name, weight, owner, transposed=transposed) or (matrix,)


def _standardizes_weight(bases: Iterable[type], cls: type) -> bool:
    """Whether the forward of one of these bases of a class takes statistics, as weight standardisation does.

    It re-centres the zeros: a stored density of 0.2 becomes 1.0 inside the convolution (timm's StdConv2d,
    ScaledStdConv2d and their kind). Told by the names that the code uses, so that it can be told of a model on
    the meta device too.
    """
    own = [vars(base) for base in bases if not _is_torch(base)]
    methods = ("forward", "_conv_forward", "get_weight")
    return any(_takes_statistics(names.get(method), cls) for names in own for method in methods)


def _takes_statistics(function: object, cls: type, depth: int = 2) -> bool:
    """Whether a function takes statistics, by the names in its code or in that of what it may call."""
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
    """Returns, by the identity of each parameter that shares memory with another one, the name of that one.

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
    """Counts the bytes from the first entry to the last."""
    steps = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (sum(steps) + 1) * x.element_size()
