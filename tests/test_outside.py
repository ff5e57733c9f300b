"""Weights that came without their masks: counted, named, and told which state belongs to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dstlib.errors import SelectionError, StateError
from dstlib.targets import find_masked, find_outside, refuse_outside


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8))
def test_all_are_counted_and_named(counts: list[int]) -> None:
    masks = {f"{i}.weight": torch.arange(12).view(3, 4) >= n for i, n in enumerate(counts)}
    weights = dict.fromkeys(masks, torch.ones(3, 4))
    found = find_outside(weights, masks)
    assert found == {f"{i}.weight": n for i, n in enumerate(counts) if n}
    if not found:
        refuse_outside(found, "here", "")
        return
    with pytest.raises(StateError) as caught:
        refuse_outside(found, "here", "Or else.")
    message = str(caught.value)
    assert f"weights of here: expected zeros outside their masks, got {sum(counts)} that are not zero, in " in message
    assert all(name in message for name in list(found)[:5])
    assert (f" and {len(found) - 5} more. " in message) == (len(found) > 5)
    assert "sparsifier.load_state_dict(state)" in message
    assert message.endswith(" Or else.")
    assert "apply_masks" not in message  # which would erase what was loaded


def test_what_has_no_values_is_not_counted() -> None:
    masks = {"weight": torch.zeros(2, 3, dtype=torch.bool)}
    assert (
        find_outside(dict(nn.Linear(3, 2, device="meta").named_parameters()), masks | {"bias": masks["weight"]}) == {}
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)
        self.other.weight = self.one.weight


def test_masks_find_their_parameters_under_any_name_and_in_wrappers() -> None:
    model, mask = Tied(), torch.ones(3, 3, dtype=torch.bool)
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        found = find_masked(wrapped, {"other.weight": mask, "one.weight": mask}, "here")
        assert found["other.weight"] is found["one.weight"] is model.one.weight
    with pytest.raises(SelectionError, match=r"mask of here: expected the name of a parameter, got 'on\.weight'"):
        find_masked(model, {"on.weight": mask}, "here")
    with pytest.raises(SelectionError, match=r"mask one\.weight of here: expected shape \(3, 3\), got \(3,\)"):
        find_masked(model, {"one.weight": mask[0]}, "here")


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3),
        torch.ones(2, 3, dtype=torch.uint8),
        torch.full((2, 3), 2, dtype=torch.uint8).view(torch.bool),  # as a damaged file may hold it
        torch.ones(2, 3, dtype=torch.bool).to_sparse(),
    ],
    ids=["numbers", "bytes", "bytes of no truth value", "sparse"],
)
def test_what_is_no_mask_is_refused_where_masks_enter(mask) -> None:
    with pytest.raises(SelectionError, match=r"mask weight of here: expected a dense tensor of truth values"):
        find_masked(nn.Linear(3, 2), {"weight": mask}, "here")
