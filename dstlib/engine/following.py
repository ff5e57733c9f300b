"""What ties the layers of a fast model to the plain one that it was made of: its weights, their masks, its layers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import Follows, FollowsMask, is_compiled, uncompiled
from dstlib.engine.layers.watch import Link, LiveMask, Origin, Place, Seen, TensorMask, Told, Watch
from dstlib.masking import Masks
from dstlib.targets import find_masked, plain_name

_TABLES = ("_modules", "_parameters", "_buffers")  # of a module


def never(name: str) -> bool:
    """Tells nothing of any parameter."""
    return False


@dataclass(eq=False)
class Looking:
    """The look at what is followed inside of a layer that does not look itself, before each of its calls."""

    followed: Sequence[tuple[FollowsMask, Watch[Tensor]]]

    def __call__(self, layer: nn.Module, _: object = ()) -> None:
        """Tells each layer of a mask that has changed, and which gradients this pass is to give.

        Raises:
            StateError: A weight is not zero outside its mask, or no longer that of the plain model.
        """
        if is_compiled():
            uncompiled(self, layer)
            return
        for each, watch in self.followed:
            before = watch.seen
            seen = watch.look(each.weight, training=layer.training)
            each.dense_gradient = bool(seen.state[-1])
            if before is None or _is_to_be_told(before, seen):
                each.set_mask(seen.active)


@dataclass(eq=False)
class Unchanged:
    """The look, before each pass, whether the plain model still has the layers that the fast one was made of."""

    origin: Origin

    def __call__(self, fast: nn.Module, _: object = ()) -> None:
        """Refuses a pass where it has not.

        Raises:
            StateError: It has others.
        """
        if is_compiled():
            uncompiled(self, fast)
        elif not torch.compiler.is_exporting():
            self.origin.check()

    def __getstate__(self) -> dict[str, Any]:
        """Returns none of them: a copy of a fast model goes its own way."""
        return {"origin": Origin(())}


def _is_to_be_told(before: Seen[Tensor], now: Seen[Tensor]) -> bool:
    """Tells whether a pattern has changed, or the mode, or values in a way that no version tells of."""
    (version, address, _, training, *_), state = before.state, now.state
    if now.active is not before.active or now.weight is not before.weight or training is not state[3]:
        return True
    return version == state[0] and (address, before.fingerprint) != (state[1], now.fingerprint)


def follow(fast: nn.Module, model: nn.Module, masks: Mapping[str, Tensor], wants_all: Told, holds: Told) -> None:
    """Ties each fast layer to what it was made of, so that its calls follow all changes, or refuse to.

    ``masks`` are by the names of parameters of ``model``, the plain one, to which those of ``fast`` belong.
    ``wants_all`` says of a parameter whether this pass is to give the gradients of its inactive weights too,
    ``holds`` whether it is known to be zero outside its mask; else that is counted whenever one of them has changed.
    """
    weights = find_masked(model, masks, "accelerate()")
    live: Mapping[str, LiveMask]
    if isinstance(masks, Masks):
        live = masks.packed
    else:
        masks = {name: _looked_at(mask) for name, mask in masks.items()}
        live = {name: TensorMask(mask) for name, mask in masks.items()}
    names = {id(p): plain_name(name) for name, p in fast.named_parameters()} | {id(p): n for n, p in weights.items()}
    plain, places = dict(model.named_modules(remove_duplicate=False)), _places(fast, model)
    covered: set[str] = set()
    looking: defaultdict[str, list[tuple[FollowsMask, Watch[Tensor]]]] = defaultdict(list)
    for path, layer in fast.named_modules():
        if isinstance(layer, Follows):
            weight, watch = layer.followed(), layer.watch
        elif hasattr(layer, "dense_gradient") and isinstance(layer, FollowsMask):  # a weight may be computed when asked
            weight, watch = layer.weight, Watch(_as_it_is)
            looking[_host(path, fast, plain)].append((layer, watch))
        else:
            continue
        own = _places_of(path, plain, places)
        covered |= {place.name for place in own}
        name = names[id(weight)]
        watch.tie(Link(name, weight, Origin(own), weights, masks, live.get(name), wants_all, holds))
    for path, followed in looking.items():
        fast.get_submodule(path).register_forward_pre_hook(Looking(followed))
    others = [place for place in chain.from_iterable(places.values()) if place.name not in covered]
    fast.register_forward_pre_hook(Unchanged(Origin(others)))


def _as_it_is(mask: Tensor) -> Tensor:
    return mask.detach()  # another tensor each time that it has changed


def _looked_at(mask: Tensor) -> Tensor:
    """Returns a mask whose changes can be noticed; one that was made in inference mode has none."""
    return mask.clone() if mask.is_inference() else mask


def _host(path: str, fast: nn.Module, plain: Mapping[str, nn.Module]) -> str:
    """Returns the outermost module on the way to a layer that is of another class than in the plain model."""
    for each in _way(path):
        if type(fast.get_submodule(each)) is not type(plain.get(each)):
            return each
    return path


def _way(path: str) -> list[str]:
    """Returns the paths of the modules on the way to one, itself the last.

    >>> _way("a.b.c")
    ['a', 'a.b', 'a.b.c']
    """
    return [*accumulate(path.split("."), "{}.{}".format)]


def _places(fast: nn.Module, model: nn.Module) -> dict[str, list[Place]]:
    """Returns, by the path of each module of the plain model, the places of its modules and of its state."""
    ours = dict(fast.named_modules(remove_duplicate=False))
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path in ours:
            here, twin = f"{path}." if path else "", ours[path]
            found[path] = [
                Place(owned, key, held, own, own.get(key), f"{here}{key}")
                for owned, own in ((getattr(module, table), getattr(twin, table)) for table in _TABLES)
                for key, held in owned.items()
                if key not in module._non_persistent_buffers_set  # caches, which forward passes may replace
            ]
    return found


def _places_of(path: str, plain: Mapping[str, nn.Module], places: Mapping[str, Sequence[Place]]) -> list[Place]:
    """Returns the places on the way to a layer, and inside of it."""
    way = _way(path)
    leading = [each for above in ("", *way[:-1]) for each in places.get(above, ()) if each.name in way]
    inside = [name for name, _ in plain[path].named_modules(prefix=path)] if path in plain else []
    return [*leading, *chain.from_iterable(places.get(name, ()) for name in inside)]
