"""What models are called with: by place, by name, in any nesting."""

from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dstlib.inputs import arguments, replace_parts, tensors_in

Pair = namedtuple("Pair", "first second")


class NoUpdate(OrderedDict[str, Any]):
    """As the outputs of transformers are: a mapping that takes items one by one alone."""

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("not that way")


tensors = st.builds(torch.full, st.just((2,)), st.floats(-9, 9))
leaves = tensors | st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2)
names = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(names, inner, max_size=3)
        | st.dictionaries(names, inner, max_size=3).map(UserDict)
    ),
    max_leaves=8,
)


def shown(value: Any) -> str:
    """A value as text, with its types; tensors by their numbers."""
    return repr(value) + str(type(value))


@given(values)
def test_new_parts_stand_where_the_old_ones_did(value: Any) -> None:
    before = shown(value)
    other = replace_parts(value, lambda x: x + 1 if isinstance(x, Tensor) else x)
    assert shown(value) == before
    assert [float(x[0]) for x in tensors_in(other)] == [float(x[0] + 1) for x in tensors_in(value)]
    back = replace_parts(other, lambda x: x - 1 if isinstance(x, Tensor) else x)
    assert [x.shape for x in tensors_in(back)] == [x.shape for x in tensors_in(value)]
    assert shown(replace_parts(value, lambda x: 0 if isinstance(x, Tensor) else x)) == shown(
        replace_parts(other, lambda x: 0 if isinstance(x, Tensor) else x)
    )


def test_a_part_that_is_replaced_is_not_looked_into() -> None:
    assert replace_parts([(1, 2), 3], lambda x: "shape" if x == (1, 2) else x) == ["shape", 3]


def test_mappings_keep_their_type_where_they_can_be_written() -> None:
    output = replace_parts(NoUpdate(a=1, b=(2,)), lambda x: -x if isinstance(x, int) else x)
    assert (type(output), dict(output)) == (NoUpdate, {"a": -1, "b": (-2,)})
    assert replace_parts(MappingProxyType({"a": 1}), lambda x: -x if isinstance(x, int) else x) == {"a": -1}


def test_a_call_is_by_name_by_place_or_of_one_argument() -> None:
    x = torch.ones(2)
    assert arguments(UserDict(x=x, flag=None)) == ((), {"x": x, "flag": None})
    assert arguments((x, None)) == ((x, None), {})
    assert arguments(({"x": x},)) == (({"x": x},), {})
    assert arguments([x]) == (([x],), {})
    assert arguments(x) == ((x,), {})
    assert arguments(()) == ((), {})
