"""Fast layers follow what is active: masks that change, or weights that become zero."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import FollowsMask
from dstlib.errors import StateError
from dstlib.targets import find_masked, find_outside, plain_name, refuse_outside

Told = Callable[[str], bool]  # something about a parameter, by its name
OTHERWISE = "Without masks, dstlib.accelerate(model, example) computes with all that is not zero."


def never(name: str) -> bool:
    """Tells nothing of any parameter."""
    return False


@dataclass(eq=False)
class _Followed:
    """A layer, its weight, and the mask it follows; without one, the zeros of the weight.

    ``owner`` is the module of the plain model that has the weight as its parameter ``key``.
    """

    name: str
    layer: FollowsMask
    weight: Tensor
    mask: Tensor | None
    owner: ref[nn.Module] | None
    key: str
    seen: int | None = -1  # the version of what tells the pattern; None where all is active
    checked: tuple[int, int] | None = None  # the versions of mask and weight when nothing was outside

    @property
    def is_lost(self) -> bool:
        """Whether the plain model has another parameter in the weight's place."""
        owner = None if self.owner is None else self.owner()
        return owner is not None and owner._parameters.get(self.key) is not self.weight

    def refresh(self, *, wants_all: bool, again: bool) -> None:
        """Tells the layer where the pattern has changed since, and which gradients this pass is to give.

        ``again``, the zeros of a weight are looked for even if it has no new version.
        """
        self.layer.dense_gradient = wants_all
        trains = self.mask is None and torch.is_grad_enabled() and self.weight.requires_grad
        state = None if trains else (self.weight if self.mask is None else self.mask)._version
        if state == self.seen and (state is None or self.mask is not None or not again):
            return
        if trains:
            self.layer.set_mask(torch.ones_like(self.weight, dtype=torch.bool))
        else:
            self.layer.set_mask(self.weight.detach() != 0 if self.mask is None else self.mask)
        self.seen = state

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but the owner: a copy of an accelerated model has weights of its own."""
        return {**vars(self), "owner": None}


@dataclass(eq=False)
class _Following:
    """The look at all that is followed, before each forward pass; an object, so that a copied model has its own."""

    followed: Sequence[_Followed]
    wants_all: Told
    holds: Told
    was_training: bool | None
    seen: list[int] | None = None  # all versions at the last pass, if nobody recorded it

    def __call__(self, fast: nn.Module, _: object = ()) -> None:
        """Lets each layer follow what has changed.

        Raises:
            StateError: A weight is not zero outside its mask, or is no longer that of the plain model.
        """
        records = torch.is_grad_enabled()
        versions = [x._version for each in self.followed for x in (each.weight, each.mask) if x is not None]
        if lost := [each.name for each in self.followed if each.is_lost]:
            allowed, given = "the parameters that it was accelerated with", f"another {lost[0]}"
            remedy = "After load_state_dict(assign=True) and what else replaces parameters, call accelerate() again."
            raise StateError.of("model", "accelerate()", allowed=allowed, given=given, remedy=remedy)
        # what is written through weight.data has no new version: all is looked at when training begins or ends
        is_switched = fast.training is not self.was_training
        if records or is_switched or versions != self.seen:
            self.seen = self.was_training = None  # until all is known to be right
            self._check(again=is_switched)
            for each in self.followed:
                each.refresh(wants_all=self.wants_all(each.name), again=is_switched)
        self.seen, self.was_training = None if records else versions, fast.training

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but what is known of the original weights."""
        return {**vars(self), "holds": never}

    def _check(self, *, again: bool) -> None:
        """Counts what is not zero outside masks where that may have changed; ``again``, even if no version did."""
        if any(x.weight.is_cuda for x in self.followed) and torch.cuda.is_current_stream_capturing():
            return  # into a CUDA graph, in which no value can be looked at
        masked = {each: each.mask for each in self.followed if each.mask is not None}
        versions = {each: (mask._version, each.weight._version) for each, mask in masked.items()}
        unsure = [each for each, v in versions.items() if again or (each.checked != v and not self.holds(each.name))]
        weights, masks = {x.name: x.weight for x in unsure}, {x.name: masked[x] for x in unsure}
        refuse_outside(find_outside(weights, masks), "accelerate()", OTHERWISE)
        for each, state in versions.items():
            each.checked = state


def follow(fast: nn.Module, model: nn.Module, masks: Mapping[str, Tensor], wants_all: Told, holds: Told) -> None:
    """Lets every fast layer look, before each forward pass, whether its pattern has changed.

    ``masks`` are by the names of parameters of ``model``, the plain one, to which those of ``fast`` belong.
    ``wants_all`` says of a parameter whether this pass is to give the gradients of its inactive weights too,
    ``holds`` whether it is known to be zero outside its mask; else that is counted whenever one of them has changed.
    """
    mask_of = {id(p): (name, masks[name]) for name, p in find_masked(model, masks, "accelerate()").items()}
    homes = {id(p): (ref(m), key) for m in model.modules() for key, p in m._parameters.items()}
    names = {id(p): plain_name(name) for name, p in fast.named_parameters()}
    followed = []
    for layer in fast.modules():
        if isinstance(layer, FollowsMask):
            key = id(layer.weight)
            name, mask = mask_of.get(key, (names[key], None))
            followed.append(_Followed(name, layer, layer.weight, mask, *homes[key]))
    following = _Following(followed, wants_all, holds, fast.training)
    fast.register_forward_pre_hook(following)
    following(fast)
