"""The shift against its index-by-index definition; Unit and fusion node against their parts, one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dstlib.errors import SettingError
from dstlib.layers import FusionNode, Shift, Unit, shift


def shift_by_definition(x: Tensor, sizes: tuple[int, ...], axis: int) -> Tensor:
    """out[:, c, ..., i, ...] = x[:, c, ..., i - sizes[g], ...], entry by entry."""
    out = torch.zeros_like(x)
    per_group = -(-x.shape[1] // len(sizes))
    for index in itertools.product(*map(range, x.shape)):
        source = list(index)
        source[axis] -= sizes[index[1] // per_group]
        if 0 <= source[axis] < x.shape[axis]:
            out[index] = x[tuple(source)]
    return out


@st.composite
def shifts(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], int]:
    shape = draw(st.lists(st.integers(1, 4), min_size=3, max_size=5))
    shape[1] = draw(st.integers(1, 8))
    sizes = tuple(draw(st.lists(st.integers(-6, 6), min_size=1, max_size=5)))
    axis = draw(st.integers(2, len(shape) - 1))
    numbers = torch.arange(1.0, 1.0 + torch.Size(shape).numel())  # all different, none zero
    return numbers.view(shape), sizes, axis


# Seven channels in three groups are 3, 3, 1: two cases that a floor or torch.chunk's rule would also get
# right, and one (4 in 3: 2, 2, 0) where only ceil leaves a group empty.
@pytest.mark.parametrize(
    ("channels", "sizes", "moved_by"),
    [
        (6, (-1, 0, 1), [-1, -1, 0, 0, 1, 1]),
        (7, (-1, 0, 1), [-1, -1, -1, 0, 0, 0, 1]),
        (4, (-1, 0, 1), [-1, -1, 0, 0]),
        (2, (-1, 0, 1), [-1, 0]),
        (3, (-2, 0, 2), [-2, 0, 2]),
        (3, (-3, 0, 3), [-3, 0, 3]),
    ],
)
def test_shift_moves_each_group_by_its_size(channels: int, sizes: tuple[int, ...], moved_by: list[int]) -> None:
    x = torch.tensor([1.0, 2.0, 3.0]).expand(1, channels, 3)
    rows = {
        -3: [0, 0, 0],
        -2: [3, 0, 0],
        -1: [2, 3, 0],
        0: [1, 2, 3],
        1: [0, 1, 2],
        2: [0, 0, 1],
        3: [0, 0, 0],
    }
    assert shift(x, sizes, axis=2).tolist() == [[rows[size] for size in moved_by]]


@given(shifts())
@settings(deadline=None)
def test_shift_is_its_definition(case: tuple[Tensor, tuple[int, ...], int]) -> None:
    x, sizes, axis = case
    expected = shift_by_definition(x, sizes, axis)
    assert torch.equal(shift(x, sizes, axis=axis), expected)
    assert torch.equal(shift(x, sizes, axis=axis - x.ndim), expected)
    assert torch.equal(Shift(sizes, axis=axis)(x), expected)


@given(shifts())
@settings(deadline=None)
def test_gradient_of_shift_is_the_shift_back(case: tuple[Tensor, tuple[int, ...], int]) -> None:
    """The operation is linear: its adjoint moves each group by minus its size, and exactly so."""
    x, sizes, axis = case
    x = x.clone().requires_grad_()
    out = shift(x, sizes, axis=axis)
    weights = torch.arange(2.0, 2.0 + x.numel()).view_as(x)
    (out * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, shift_by_definition(weights, tuple(-size for size in sizes), axis))


@pytest.mark.parametrize("sizes", [(-1, 0, 1), (-2, 0, 2), (5, -5)])
def test_gradient_of_shift_passes_gradcheck(sizes: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift(x, sizes, axis=2), x)


def test_shift_leaves_its_input_alone() -> None:
    x = torch.rand(1, 3, 2, 2, 2)
    before = x.clone()
    shift(x, (-1, 0, 1), axis=2).zero_()
    shift(x, (0,), axis=2).zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dynamic", [False, True])
def test_shift_traces_without_a_graph_break(dynamic: bool) -> None:
    compiled = torch.compile(shift, backend="eager", fullgraph=True, dynamic=dynamic)
    for depth in (4, 5):
        x = torch.rand(1, 5, depth, 3, 3)
        assert torch.equal(compiled(x, (-1, 0, 2), axis=2), shift(x, (-1, 0, 2), axis=2))


def test_unit_exports() -> None:
    unit = Unit(5, 4, kernel_size=(1, 3, 3), shift=Shift((-1, 0, 1), axis=2)).eval()
    x = torch.rand(2, 5, 4, 4, 4)
    assert torch.equal(torch.export.export(unit, (x,)).module()(x), unit(x))


@pytest.mark.parametrize(
    ("sizes", "axis", "message"),
    [
        ((), 2, "sizes of shift(): expected at least one, got ()"),
        ((1,), 1, "axis of shift(): expected a spatial axis of a tensor of 5 axes, 2 to 4, got 1"),
        ((1,), -4, "got -4"),
        ((1,), 5, "got 5"),
        ((1,), -6, "got -6"),
    ],
)
def test_shift_refuses(sizes: tuple[int, ...], axis: int, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        shift(torch.rand(1, 3, 4, 4, 4), sizes, axis=axis)
    assert message in str(caught.value)


@pytest.mark.parametrize("kernel_size", [(1, 3, 3), (3, 1, 3), (3, 3, 3), (1, 1, 5)])
@pytest.mark.parametrize("sizes", [None, (-1, 0, 1)])
def test_unit_is_shift_conv_norm_leaky_relu(kernel_size: tuple[int, int, int], sizes: tuple[int, ...] | None) -> None:
    unit = Unit(5, 4, kernel_size=kernel_size, stride=(1, 2, 2), shift=sizes and Shift(sizes, axis=2))
    nn.init.normal_(unit.norm.weight)
    nn.init.normal_(unit.norm.bias)
    x = torch.randn(2, 5, 4, 6, 6)
    y = shift_by_definition(x, sizes, 2) if sizes else x
    padding = tuple(extent // 2 for extent in kernel_size)
    y = functional.conv3d(y, unit.conv.weight, unit.conv.bias, (1, 2, 2), padding)
    variance, mean = torch.var_mean(y, dim=(2, 3, 4), correction=0, keepdim=True)
    y = (y - mean) / (variance + 1e-5).sqrt()
    y = y * unit.norm.weight.view(-1, 1, 1, 1) + unit.norm.bias.view(-1, 1, 1, 1)
    # float32: the library's fused normalisation rounds elsewhere than these five lines
    torch.testing.assert_close(unit(x), torch.where(y > 0, y, 0.01 * y), rtol=1e-4, atol=1e-5)
    assert y.shape == (2, 4, 4, 3, 3)


@pytest.mark.parametrize("finer", [None, (3, (2, 2, 1))])
@pytest.mark.parametrize("num_units", [1, 2])
def test_fusion_node_concatenates_forward_upward_downward(
    finer: tuple[int, tuple[int, int, int]] | None, num_units: int
) -> None:
    node = FusionNode(4, coarser=(5, (1, 2, 2)), finer=finer, kernel_size=(1, 3, 3), num_units=num_units)
    same, coarser, fine = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 5, 4, 2, 2), torch.randn(1, 3, 8, 8, 4)
    flows = {"forward": same, "upward": functional.conv_transpose3d(coarser, node.upward.weight, stride=(1, 2, 2))}
    if finer:
        flows["downward"] = functional.max_pool3d(fine, (2, 2, 1))
    joined = torch.cat(list(flows.values()), dim=1)
    assert list(node.flows) == list(flows)
    for name, channels in node.flows.items():
        assert torch.equal(joined[:, channels], flows[name])
    expected = joined
    for unit in node.units:
        expected = unit(expected)
    assert torch.equal(node(same, coarser, fine if finer else None), expected)
    assert len(node.units) == num_units
    assert node.upward.bias is None


def test_silencing_a_flow_in_the_weights_silences_its_map() -> None:
    """The ranges are those of the weight's input axis: this is what figures of active shares rely on."""
    node = FusionNode(4, coarser=(5, (2, 2, 2)), finer=(3, (2, 2, 2)), kernel_size=(1, 3, 3))
    same, coarser, finer = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 5, 2, 2, 2), torch.randn(1, 3, 8, 8, 8)
    others = {
        "forward": (torch.randn_like(same), coarser, finer),
        "upward": (same, torch.randn_like(coarser), finer),
        "downward": (same, coarser, torch.randn_like(finer)),
    }
    weight = node.units[0].conv.weight
    saved = weight.detach().clone()
    for flow, maps in others.items():
        assert not torch.equal(node(*maps), node(same, coarser, finer))
        with torch.no_grad():
            weight[:, node.flows[flow]] = 0
        assert torch.equal(node(*maps), node(same, coarser, finer))
        with torch.no_grad():
            weight.copy_(saved)
