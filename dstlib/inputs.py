"""What a forward is called with, and what it returns: arguments, and the tensors that lie in them."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any

from torch import Tensor


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call, by place and by name: a mapping is those by name, a tuple those by place.

    Anything else is the only argument; a tuple or a mapping that is itself the only one is passed as ``(example,)``.

    >>> arguments({"input_ids": 1, "use_cache": False}), arguments((1, 2)), arguments([1, 2])
    (((), {'input_ids': 1, 'use_cache': False}), ((1, 2), {}), (([1, 2],), {}))
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def replace_parts(value: Any, replaced: Callable[[Any], Any]) -> Any:
    """Returns a value with other parts: what ``replaced`` makes of it, or, if that is the very value, of its parts.

    Parts are those of tuples, lists and mappings, which keep their types.

    >>> replace_parts({"ids": [1, 2], "mask": None}, lambda x: x + 1 if isinstance(x, int) else x)
    {'ids': [2, 3], 'mask': None}
    """
    if (new := replaced(value)) is not value:
        return new
    if isinstance(value, Mapping):
        parts = {name: replace_parts(part, replaced) for name, part in value.items()}
        if not isinstance(value, MutableMapping):
            return parts
        other = copy(value)
        for name, part in parts.items():  # one by one: a ModelOutput of transformers has no update()
            other[name] = part
        return other
    if isinstance(value, tuple | list):
        items = [replace_parts(part, replaced) for part in value]
        is_named = hasattr(value, "_fields")  # a named tuple is made of its parts, any other one of a list of them
        return type(value)(*items) if is_named else type(value)(items)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in tuples, lists and mappings, in order.

    >>> import torch
    >>> [tuple(x.shape) for x in tensors_in({"logits": torch.ones(2, 3), "states": (torch.ones(4), None)})]
    [(2, 3), (4,)]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
