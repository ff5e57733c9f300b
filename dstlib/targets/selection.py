"""Which parameters of a model are to be sparse, of those that can be.

Selection is by module type, never by the number of axes, which would catch position embeddings, bias tables
and layer scales. Every parameter with two axes or more is named, sparse or dense and why, so that
nothing is left out in silence.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from dstlib.errors import SelectionError, StateError, require, similar
from dstlib.targets.eligibility import Candidate, Weight, overlaps, weight_of
from dstlib.targets.held import HoldsActive
from dstlib.targets.views import MatrixView, along_axes, chunks
from dstlib.targets.wrappers import plain_name, unwrap

NOT_INCLUDED, EXCLUDED, WITHOUT_MASK = "not included", "excluded", "no zeros in the masks given"  # reasons of the user
_NO_SPLIT: Mapping[str, int] = MappingProxyType({})
_NO_AXES: Mapping[str, str] = MappingProxyType({})


class Masked(Protocol):
    """Anything with masks: the parameter's qualified name → a boolean tensor of its shape, True = active."""

    @property
    def masks(self) -> Mapping[str, Tensor]: ...


def find_weights(model: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model under these names, also inside wrappers that keep it as their ``module``.

    Raises:
        StateError: One is missing or of another shape.
    """
    named = _named(model)
    while not shapes.keys() <= named.keys() and isinstance(inner := getattr(unwrap(model), "module", None), nn.Module):
        model, named = inner, _named(inner)  # timm's ModelEmaV2 and V3, and their kind
    for name, shape in shapes.items():
        require(
            name in named and named[name].shape == shape,
            "model",
            "mask_model()",
            allowed=f"a weight {name} of shape {tuple(shape)}",
            given=tuple(named[name].shape) if name in named else f"none of that name in {type(model).__name__}",
            remedy="Pass a copy of the model that was sparsified.",
            error=StateError,
        )
    return {name: named[name] for name in shapes}


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    require(
        isinstance(model, nn.Module),
        "model",
        "mask_model()",
        allowed="an nn.Module",
        given=type(model).__name__,
        remedy="Pass the averaged module itself, often its .ema or .module.",
        error=StateError,
    )
    return {plain_name(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}


def select(
    model: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    split: Mapping[str, int] = _NO_SPLIT,
    axes: Mapping[str, str] = _NO_AXES,
) -> tuple[Weight, ...]:
    """Returns every parameter with two axes or more, sparse or dense, in the model's order; tied ones once.

    Globs match whole qualified names of parameters ("head.weight") or of their modules ("head"). A name
    written out in full asks for that weight, and turns on those that are dense only by default; so does a glob
    whose last part is written out ("*.experts.up_proj"), if it matches no others. ``axes`` maps globs to the axes
    of raw parameters, and asks for all of these that ``include`` and ``exclude`` let in: as in einops, "o" are
    outputs, "i" inputs, "..." at the end the taps of a kernel, and every other name counts matrices ("e i o": several
    matrices, each inputs × outputs). ``split`` maps globs to the number of matrices of equal height that are stacked
    in a weight, each to compete for itself. Of several globs that match, the last wins. By default the well-known
    fused projections are split into queries, keys and values; 1 keeps them together.

    Raises:
        SelectionError: A glob matches nothing, or of ``split`` and ``axes`` nothing sparse, a weight asked for by its
            full name cannot be sparse, one cannot be split so or has other axes, or nothing is left to be sparse.
    """
    weights = list(_all_weights(model))
    for pattern in (*include, *exclude) if weights else ():
        check_matches(pattern, weights, "the model")
    for pattern in include:
        _check_possible(pattern, weights)
    asking = [pattern for pattern in include if asks_for(pattern, weights)]
    chosen = [_choose(_asked_by_axes(weight, axes), include, exclude, asking) for weight in weights]
    if all(weight.reason for weight in chosen):
        reasons = "; ".join(f"{w.name}: {w.reason}" for w in chosen[:8]) or "no parameter has two axes"
        allowed = "at least one Linear, Conv, ConvTranspose or attention weight to make sparse"
        remedy = "Look at include= and exclude=."
        raise SelectionError.of("weights", "the model", allowed=allowed, given=f"none ({reasons})", remedy=remedy)
    for kind, patterns in {"split": split, "axes": axes}.items():
        for pattern in patterns:
            check_matches_sparse(pattern, chosen, f"the sparse weights, by {kind}=")
    return tuple(weight if weight.reason else _split(_turned(weight, axes), split) for weight in chosen)


def check_matches(pattern: str, weights: Iterable[Weight], where: str) -> None:
    """Checks that a glob matches one of these weights.

    Raises:
        SelectionError: It matches none.
    """
    if any(w.matches(pattern) for w in weights):
        return
    allowed = "a match with the name of a weight or of its module"
    remedy = _hint(pattern, sorted({name for w in weights for name in w.aliases}))
    raise SelectionError.of(f"glob {pattern!r}", where, allowed=allowed, given="no match", remedy=remedy)


def check_matches_sparse(pattern: str, weights: Iterable[Weight], where: str) -> None:
    """Checks that a glob matches one of these weights that is sparse.

    Raises:
        SelectionError: It matches none, or only what stays dense.
    """
    weights = list(weights)
    dense = next((weight for weight in weights if weight.reason and weight.matches(pattern)), None)
    sparse = [weight for weight in weights if not weight.reason]
    if dense is None or any(weight.matches(pattern) for weight in sparse):
        check_matches(pattern, sparse, where)
        return
    remedy = "Take the glob out"
    if dense.reason == EXCLUDED:
        remedy += ", or narrow exclude="
    elif dense.reason == NOT_INCLUDED or dense.on_request:
        remedy += f", or add {dense.name!r} to include="
    given = f"{dense.name}, which stays dense: {dense.reason}"
    raise SelectionError.of(
        f"glob {pattern!r}", where, allowed="a match with a sparse weight", given=given, remedy=f"{remedy}."
    )


def _hint(pattern: str, known: Sequence[str]) -> str:
    """Says what a glob without a match may have meant."""
    if any(name.startswith(f"{pattern}.") for name in known):
        return f"Globs match whole names: write {pattern + '.*'!r} for all below it."
    return f"Names here: {similar(pattern, known)}."


def _check_possible(name: str, weights: Iterable[Weight]) -> None:
    """Checks that a weight of exactly this name, or of the module of this name, may be sparse."""
    named = [weight for weight in weights if name in weight.aliases]
    if named and all(weight.reason and name not in weight.on_request for weight in named):
        allowed = "one that can be masked in place"
        remedy = "Take its name out of include=."
        raise SelectionError.of("weight", named[0].name, allowed=allowed, given=named[0].reason, remedy=remedy)


def asks_for(pattern: str, weights: Iterable[Weight]) -> bool:
    """Whether a glob turns on what it matches: its last part is written out, and all are dense only by default."""
    matched = [weight for weight in weights if weight.matches(pattern)]
    is_named = not set("*?[") & set(pattern.rpartition(".")[2])
    return is_named and bool(matched) and all(_requests(pattern, weight) for weight in matched)


def _requests(pattern: str, weight: Weight) -> bool:
    return any(fnmatchcase(name, pattern) for name in weight.on_request)


def _asked_by_axes(weight: Weight, axes: Mapping[str, str]) -> Weight:
    """Returns a weight that is dense only until its axes are named as sparse, where they are."""
    is_asked = weight.waits_for_axes and any(map(weight.matches, axes))
    return replace(weight, reason="") if is_asked else weight


def _choose(weight: Weight, include: Sequence[str], exclude: Sequence[str], asking: Sequence[str]) -> Weight:
    is_asked = weight.on_request.intersection(include) or any(_requests(pattern, weight) for pattern in asking)
    reason = "" if is_asked else weight.reason
    if not any(weight.matches(pattern) for pattern in include):
        reason = NOT_INCLUDED
    if any(weight.matches(pattern) for pattern in exclude):
        reason = EXCLUDED
    return replace(weight, reason=reason)


def _turned(weight: Weight, axes: Mapping[str, str]) -> Weight:
    """Returns the weight as the matrices along its axes, which a user names."""
    matching = [pattern for pattern in axes if weight.matches(pattern)]
    if not matching:
        return weight
    stated, num_axes = axes[matching[-1]], weight.parameter.ndim
    names = str(stated).split()
    has_taps = names[-1:] == ["..."]
    names = names[: len(names) - has_taps]
    fits = (
        len(names) + has_taps <= num_axes
        and (has_taps or len(names) == num_axes)
        and len(set(names)) == len(names)
        and {"o", "i"} <= set(names)
        and all(name.isidentifier() for name in names)
    )
    unknown = f"a name for each of its {num_axes} axes: o, i, and others that count matrices"
    require(
        isinstance(stated, str) and fits and not weight.knows_axes,
        f"axes {matching[-1]!r}",
        weight.name,
        allowed="none, as its axes are known" if weight.knows_axes else unknown,
        given=repr(stated),
        remedy='Write "i o" for inputs × outputs, "e o i" for several of outputs × inputs, "o i ..." for a kernel.',
        error=SelectionError,
    )
    views = along_axes(weight.name, weight.parameter.shape, names)
    return replace(weight, views=views, knows_axes=True, can_split=len(views) == 1)


def _split(weight: Weight, split: Mapping[str, int]) -> Weight:
    """Returns the weight as so many matrices, each of as many rows."""
    matching = [pattern for pattern in split if weight.matches(pattern)]
    if not matching:
        return weight
    num, turned = split[matching[-1]], weight.views[0].transposed
    require(
        not isinstance(num, str),
        f"split {matching[-1]!r}",
        weight.name,
        allowed="a number of matrices",
        given=repr(num),
        remedy=f"State axes by axes={{{matching[-1]!r}: {num!r}}}.",
        error=SelectionError,
    )
    if len(weight.views) == num > 1 and not weight.can_split:
        return weight
    num_rows = weight.parameter.shape[1 if turned else 0]
    made = f"{weight.kind} is {len(weight.views)} matri{'ces' if len(weight.views) > 1 else 'x'} by its making"
    require(
        weight.can_split and type(num) is int and 0 < num <= num_rows and num_rows % num == 0,
        f"split {matching[-1]!r}",
        weight.name,
        allowed=f"a divisor of its {num_rows} rows" if weight.can_split else f"no split, as {made}",
        given=repr(num),
        remedy="Count the matrices stacked in it, or narrow the glob.",
        error=SelectionError,
    )
    parts = chunks(weight.name, range(num), num_rows, transposed=turned)
    return replace(weight, views=parts if num > 1 else (MatrixView(weight.name, transposed=turned),))


def _all_weights(model: nn.Module) -> Iterator[Weight]:
    """Yields each distinct parameter once; one with several owners is as dense as the densest."""
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    owners: dict[int, list[Weight]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            require(
                not isinstance(parameter, nn.parameter.UninitializedParameter),
                "weight",
                module_name,
                allowed="a known shape",
                given="a lazy module",
                remedy="Run one forward pass first.",
                error=SelectionError,
            )
            is_held = isinstance(module, HoldsActive) and key in module.held  # its values may have one axis
            if parameter.ndim >= 2 or is_held:
                name = plain_name(module_name)
                owner = modules.get(name.rpartition(".")[0]) if name else None
                weight = weight_of(Candidate(name, key, parameter, module, owner))
                owners.setdefault(id(parameter), []).append(weight)
    shared = overlaps(dict(model.named_parameters()))
    for weights in owners.values():
        weight = _tied(weights)
        if other := shared.get(id(weight.parameter)):
            reason = f"a view of the memory of {plain_name(other)}, whose zeros a mask would be written through to"
            weight = replace(weight, reason=reason, on_request=frozenset())
        yield weight


def _tied(weights: Sequence[Weight]) -> Weight:
    """Returns one weight from those of all modules that hold the parameter."""
    dense = [weight for weight in weights if weight.reason]
    reason = weights[0].reason or (f"tied to {dense[0].name}, {dense[0].reason}" if dense else "")
    return replace(
        weights[0],
        reason=reason,
        on_request=frozenset().union(*(w.on_request for w in dense if all(v.on_request for v in dense))),
        can_split=all(weight.can_split for weight in weights),
        knows_axes=all(w.knows_axes and w.views[0].transposed == weights[0].views[0].transposed for w in weights),
        aliases=frozenset().union(*(weight.aliases for weight in weights)),
    )
