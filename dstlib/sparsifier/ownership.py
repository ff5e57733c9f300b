"""Whether a model still computes with its sparse weights as they are: who owns each of them, and what came instead."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import ref

from torch import Tensor, nn

from dstlib.targets import plain_name

_Links = tuple[tuple[ref[nn.Module], str, ref[nn.Module]], ...]  # a parent, the name it has for a child, the child
_Way = tuple[list[tuple[nn.Module, str, nn.Module]], nn.Module, str]  # a path whose modules are held


@dataclass(frozen=True, eq=False)
class _Path:
    """The way from the model to a module that holds a weight under ``key``.

    Modules are held weakly, as it is the user who decides how long they live.
    """

    links: _Links
    owner: ref[nn.Module]
    key: str

    def leads_to(self, parameter: nn.Parameter) -> bool:
        for parent, key, child in self.links:
            module = parent()
            if module is None or module._modules.get(key) is not child():
                return False
        return self.is_owned(parameter)

    def is_owned(self, parameter: nn.Parameter) -> bool:
        owner = self.owner()
        return owner is not None and owner._parameters.get(self.key) is parameter


@dataclass(frozen=True)
class Loss:
    """What became of a weight that the model no longer computes with as it is.

    It is "replaced" where its module now holds something else, and "gone" where its module is no longer in the
    model. ``stand_in`` is what the model has under its name instead, None if nothing.
    """

    kind: Literal["replaced", "gone"]
    story: str
    stand_in: Tensor | None


class Ownership:
    """Knows by which modules of a model its sparse weights are held, and tells when one no longer is.

    Looking costs some dictionary lookups a weight, and a walk through the model only once something has changed.
    Layers may move, be wrapped or renamed: what counts is that the parameter is still one of the model's.
    """

    def __init__(self, model: nn.Module | None, weights: Mapping[str, nn.Parameter]) -> None:
        self._model = None if model is None else ref(model)
        self._weights = dict(weights)
        wanted = {id(p) for p in weights.values()}
        self._paths = dict.fromkeys(wanted, ()) if model is None else _paths(model, wanted)
        # of whose loss nothing is to be said: without a model, nobody can know
        self._forgotten = set(weights) if model is None else set()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the modules themselves, so that a copy has the ways through the copied model.

        It cannot look for them: a model that holds its own sparsifier is still empty when this is copied.
        """
        by_name = {name: self._paths[id(parameter)] for name, parameter in self._weights.items()}
        ways = {name: [way for path in paths if (way := _strong(path)) is not None] for name, paths in by_name.items()}
        model = self.model
        forgotten = set(self._weights) if model is None else self._forgotten
        return {"model": model, "weights": self._weights, "ways": ways, "forgotten": forgotten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = None if state["model"] is None else ref(state["model"])
        self._weights = state["weights"]
        self._paths = {id(self._weights[name]): tuple(map(_weak, ways)) for name, ways in state["ways"].items()}
        self._forgotten = state["forgotten"]

    @property
    def model(self) -> nn.Module | None:
        """The model that was made sparse, while it lives."""
        return None if self._model is None else self._model()

    @property
    def owners(self) -> list[nn.Module]:
        """The modules that hold the weights, or did when last seen, while they live."""
        return [owner for paths in self._paths.values() for path in paths if (owner := path.owner()) is not None]

    def changed(self, names: Iterable[str]) -> list[str]:
        """Returns those of the weights to whom not every path leads any more, by a quick look."""
        return [name for name in names if name not in self._forgotten and not self._is_found(self._weights[name])]

    def losses(self, names: Iterable[str]) -> dict[str, Loss]:
        """Returns which of the weights are lost and how; learns the new paths to those that have only moved."""
        model = self.model
        if model is None:  # a wrapper that nobody kept: its layers may live on
            return {name: loss for name in names if (loss := self._replaced(name, None)) is not None}
        new, present = _paths(model, {id(p) for p in self._weights.values()}), set(map(id, model.modules()))
        found = {name: self._loss(name, model, new, present) for name in names}
        moved = {id(self._weights[name]) for name, loss in found.items() if loss is None}
        self._paths |= {key: paths for key, paths in new.items() if key in moved}
        return {name: loss for name, loss in found.items() if loss is not None}

    def forget(self, name: str) -> None:
        """Looks for a weight no more: its loss has been told."""
        self._forgotten.add(name)

    def _is_found(self, parameter: nn.Parameter) -> bool:
        """Whether all paths lead to a weight; a copied model may have lost one before, and has none then."""
        paths = self._paths[id(parameter)]
        return bool(paths) and all(path.leads_to(parameter) for path in paths)

    def _loss(
        self, name: str, model: nn.Module, new: Mapping[int, tuple[_Path, ...]], present: set[int]
    ) -> Loss | None:
        replaced = self._replaced(name, present)
        if replaced is not None:
            return replaced
        if new[id(self._weights[name])]:
            return None
        stand_in = _named(model, name)
        story = "its module is no longer in the model"
        if stand_in is not None:
            story += f"; in its place is a dense one of shape {tuple(stand_in.shape)}"
        return Loss("gone", story, stand_in)

    def _replaced(self, name: str, present: set[int] | None) -> Loss | None:
        """Returns the loss of a weight whose module is there and holds another, or none, under its key."""
        parameter = self._weights[name]
        for path in self._paths[id(parameter)]:
            owner = path.owner()
            if owner is None or (present is not None and id(owner) not in present) or path.is_owned(parameter):
                continue
            instead = getattr(owner, path.key, None)
            if not isinstance(instead, Tensor):
                return Loss("replaced", "none of that name in its module", None)
            kind = "another" if isinstance(instead, nn.Parameter) else "a tensor computed from another"
            return Loss("replaced", f"{kind} in its place, which no mask fits", instead)
        return None


def _strong(path: _Path) -> _Way | None:
    """Returns a path with the modules themselves; None if one of them is no more."""
    links = [(parent(), key, child()) for parent, key, child in path.links]
    owner = path.owner()
    found = [(parent, key, child) for parent, key, child in links if parent is not None and child is not None]
    return None if owner is None or len(found) < len(links) else (found, owner, path.key)


def _weak(way: _Way) -> _Path:
    links, owner, key = way
    return _Path(tuple((ref(parent), name, ref(child)) for parent, name, child in links), ref(owner), key)


def _paths(model: nn.Module, wanted: set[int]) -> dict[int, tuple[_Path, ...]]:
    """Returns, by identity, one path to each module that holds a wanted parameter."""
    found: dict[int, list[_Path]] = {key: [] for key in wanted}
    seen = {id(model)}
    waiting: list[tuple[nn.Module, _Links]] = [(model, ())]
    while waiting:
        module, links = waiting.pop()
        for key, parameter in module._parameters.items():
            if id(parameter) in wanted:
                found[id(parameter)].append(_Path(links, ref(module), key))
        for key, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append((child, (*links, (ref(module), key, ref(child)))))
    return {key: tuple(paths) for key, paths in found.items()}


def _named(model: nn.Module, name: str) -> Tensor | None:
    """Returns the tensor that a model has under the name of a weight, wrappers left out; None without one."""
    owner_name, _, key = name.rpartition(".")
    for other, module in model.named_modules():
        if plain_name(other) == owner_name and isinstance(instead := getattr(module, key, None), Tensor):
            return instead
    return None
