"""Layers that hold the active values of some of their weights alone.

Shapes: O outputs, I inputs, *K kernel taps, none of a matrix; A active entries of the (O, I) matrix, whole kernels.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from dstlib.engine.layers.active_weight import ActiveWeight
from dstlib.engine.layers.fast_layer import is_compiled, uncompiled
from dstlib.errors import StateError
from dstlib.targets import HoldsActive, mask_key, plain_kind
from dstlib.targets.compact_state import pack

R = TypeVar("R")


class CompactLayer(HoldsActive):
    """A layer of whose weights those in ``held`` are active values (A, *K) alone, by the keys of their parameters.

    Its class stands before that of the plain layer. No dense weight, and no dense gradient of it, exists at any time.
    The ``state_dict`` has the values and, packed to bits, the masks; that of the plain layer can be loaded, too.
    """

    kind: ClassVar[type[ActiveWeight]]  # of what is held
    held: dict[str, ActiveWeight]  # type: ignore[assignment]  # narrower than that of any layer in compact storage

    def alone(self, compute: Callable[..., R], *inputs: Any) -> R:
        """Computes outside of the graphs of torch.compile, from values that are where they belong."""
        if is_compiled():
            return uncompiled(self.alone, compute, *inputs)  # type: ignore[no-any-return]
        for each in self.held.values():
            each.check_order()
        return compute(*inputs)

    def become_plain(self) -> None:
        """Takes the plain layer's class, and weights without data, of the whole shapes."""
        held = self.__dict__.pop("held")
        self.__class__ = plain_kind(self)  # type: ignore[assignment]
        for key, each in held.items():
            weight = torch.empty(each.dense_shape, dtype=each.values.dtype, device="meta")
            setattr(self, key, nn.Parameter(weight, each.values.requires_grad))

    def extra_repr(self) -> str:
        """What the plain layer says, and how many of its weights are active."""
        num_active = sum(each.pattern.num_active for each in self.held.values())
        return ", ".join(filter(None, (super().extra_repr(), f"active={num_active}")))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for each in self.held.values():
            each.pattern = each.pattern.to(each.values.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, each in self.held.items():
            each.check_order()
            destination[mask_key(prefix + key)] = pack(each.active())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *more: Any
    ) -> None:
        """Takes values with the masks that they belong to, or the weights of a plain layer."""
        *_, error_msgs = more
        own = dict(state_dict)
        for key, each in self.held.items():
            given, bits = state_dict.get(name := prefix + key), own.pop(mask_key(name), None)
            if isinstance(given, Tensor):
                try:
                    each.load(given, bits, name)
                except StateError as error:
                    error_msgs.append(str(error))
                own[name] = each.values.detach()
        super()._load_from_state_dict(own, prefix, local_metadata, *more)
