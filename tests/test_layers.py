"""The shifts, fixed and learned, against their definitions; Unit and fusion node against their parts, one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dstlib.errors import SettingError
from dstlib.layers import FusionNode, LearnedShift, Shift, Unit, learned_shift, shift


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


# ---- learned ----


# x is 1, 2, 4; an offset of 1/4 gives 3/4 of each voxel and 1/4 of the one before. All numbers are exact.
@pytest.mark.parametrize(
    ("offset", "interpolated", "rounded"),
    [
        (0.0, [1, 2, 4], [1, 2, 4]),
        (0.25, [0.75, 1.75, 3.5], [1, 2, 4]),
        (0.5, [0.5, 1.5, 3], [1, 2, 4]),
        (0.75, [0.25, 1.25, 2.5], [0, 1, 2]),
        (1.25, [0, 0.75, 1.75], [0, 1, 2]),
        (-0.25, [1.25, 2.5, 3], [1, 2, 4]),
        (-0.5, [1.5, 3, 2], [2, 4, 0]),
        (-0.75, [1.75, 3.5, 1], [2, 4, 0]),
        (2.5, [0, 0, 0.5], [0, 0, 1]),
        (-2.5, [2, 0, 0], [0, 0, 0]),
        (3.0, [0, 0, 0], [0, 0, 0]),
        (1e9, [0, 0, 0], [0, 0, 0]),
        (-1e9, [0, 0, 0], [0, 0, 0]),
    ],
)
def test_learned_shift_worked_by_hand(offset: float, interpolated: list[float], rounded: list[float]) -> None:
    x = torch.tensor([1.0, 2.0, 4.0]).expand(1, 2, 3)
    for is_rounded, expected in ((False, interpolated), (True, rounded)):
        moved = learned_shift(x, torch.tensor([offset, 0.0]), axis=2, rounded=is_rounded)
        assert moved.tolist() == [[expected, [1, 2, 4]]]


@given(shifts())
@settings(deadline=None)
def test_whole_offsets_are_the_fixed_shift(case: tuple[Tensor, tuple[int, ...], int]) -> None:
    x, sizes, axis = case
    for rounded in (False, True):
        module = LearnedShift(sizes, axis=axis, rounded=rounded)
        assert torch.equal(module(x), shift(x, sizes, axis=axis))
        assert torch.equal(learned_shift(x, module.offsets, axis=axis - x.ndim, rounded=rounded), module(x))


@given(shifts(), st.lists(st.integers(0, 3), min_size=5, max_size=5))
@settings(deadline=None)
def test_learned_shift_is_its_definition(case: tuple[Tensor, tuple[int, ...], int], quarters: list[int]) -> None:
    """Between two whole shifts by the fraction; exact, as quarters of small whole numbers are."""
    x, sizes, axis = case
    parts = [quarter / 4 for quarter in quarters[: len(sizes)]]
    offsets = torch.tensor(sizes) + torch.tensor(parts)
    per_channel = torch.tensor(parts).repeat_interleave(-(-x.shape[1] // len(sizes)))[: x.shape[1]]
    part = per_channel.view(-1, *[1] * (x.ndim - 2))
    near, far = (shift_by_definition(x, tuple(size + more for size in sizes), axis) for more in (0, 1))
    assert torch.equal(learned_shift(x, offsets, axis=axis), (1 - part) * near + part * far)
    nearest = tuple(size + (part > 0.5) for size, part in zip(sizes, parts, strict=True))
    assert torch.equal(learned_shift(x, offsets, axis=axis, rounded=True), shift_by_definition(x, nearest, axis))


@pytest.mark.parametrize(("offsets", "axis"), [((-1.3, 0.2, 0.9), 2), ((2.5, -2.5), 3), ((0.4, 0.1, 0.2, 0.3, 0.6), 4)])
def test_gradient_of_the_interpolated_shift_passes_gradcheck(offsets: tuple[float, ...], axis: int) -> None:
    x = torch.randn(2, 4, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    learned = torch.tensor(offsets, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, o: learned_shift(x, o, axis=axis), (x, learned))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("offset", "gradient"),
    [
        (0.0, -1 - 1 - 2),  # to the side of higher offsets: x[i - 1] - x[i] at 1, 2, 4
        (0.5, -1 - 1 - 2),
        (1.0, 0 - 1 - 1),
        (-1.0, -1 - 2 + 4),
        (2.9, 0 + 0 - 1),
        (3.0, 0),  # gone, and nothing calls it back
        (-2.5, 4),
        (-3.0, 4),  # all zeros, but on the side of higher offsets the last voxel comes in
        (-3.5, 0),
    ],
)
def test_gradient_of_an_offset_worked_by_hand(offset: float, gradient: float, rounded: bool) -> None:
    x = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3)
    learned = torch.tensor([offset], requires_grad=True)
    learned_shift(x, learned, axis=2, rounded=rounded).sum().backward()
    assert learned.grad is not None
    assert learned.grad.tolist() == [gradient]


@given(shifts(), st.floats(-0.5, 0.5, exclude_min=True, width=16))
@settings(deadline=None)
def test_rounded_is_exact_in_x_and_straight_through_in_the_offsets(
    case: tuple[Tensor, tuple[int, ...], int], part: float
) -> None:
    x, sizes, axis = case
    weights = torch.arange(2.0, 2.0 + x.numel()).view_as(x)
    grads = {}
    for rounded in (True, False):
        x, offsets = x.detach().clone().requires_grad_(), (torch.tensor(sizes) + part).requires_grad_()
        out = learned_shift(x, offsets, axis=axis, rounded=rounded)
        (out * weights).sum().backward()
        grads[rounded] = offsets.grad
        if rounded:
            assert torch.equal(out, shift_by_definition(x, sizes, axis))
            assert torch.equal(x.grad, shift_by_definition(weights, tuple(-size for size in sizes), axis))
    assert torch.equal(grads[True], grads[False])


@pytest.mark.parametrize("rounded", [False, True])
def test_offsets_find_how_far_something_has_moved(rounded: bool) -> None:
    """Descent from (-1, 0, 1) to what the data was moved by, through a signal that is smooth enough."""
    x = torch.linspace(0, 9, 60).sin().view(1, 1, 60).repeat(1, 3, 1)
    target = shift(x, (2, -3, 4), axis=2)
    module = LearnedShift((-1, 0, 1), axis=2, rounded=rounded)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 5 * (1 - step / 300)
        optimizer.zero_grad()
        (module(x) - target)[..., 6:-6].square().mean().backward()  # away from where zeros flow in
        optimizer.step()
    assert module.offsets.detach().round().tolist() == [2, -3, 4]


@pytest.mark.parametrize("rounded", [False, True])
def test_learned_shift_compiles_and_exports(rounded: bool) -> None:
    module = LearnedShift((-1, 0.25, 2), axis=2, rounded=rounded)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.rand(2, 5, 4, 3, 3)
    for offset in (0.0, 1.75, -3.0):  # one graph for all values: none of them is a constant of it
        with torch.no_grad():
            module.offsets[0] = offset
        grads = []
        for call in (compiled, module):
            module.zero_grad()
            out = call(x)
            out.square().sum().backward()
            grads.append((out, module.offsets.grad.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {2: torch.export.Dim("depth", min=2)}}).module()
    longer = torch.rand(2, 5, 7, 3, 3)
    assert torch.equal(exported(longer), module(longer))


def test_learned_shift_keeps_the_type_of_its_input() -> None:
    module = LearnedShift((-1, 0.5, 1), axis=2)
    assert module(torch.rand(1, 3, 4).bfloat16()).dtype == torch.bfloat16
    assert module.double()(torch.rand(1, 3, 4).double()).dtype == torch.float64


def test_an_offset_that_is_no_number_shows() -> None:
    moved = learned_shift(torch.ones(1, 2, 3), torch.tensor([float("nan"), 0.0]), axis=2)
    assert moved[0, 0].isnan().all()
    assert moved[0, 1].tolist() == [1, 1, 1]


def test_units_of_a_node_learn_offsets_of_their_own() -> None:
    node = FusionNode(
        4, coarser=(5, (1, 2, 2)), kernel_size=(1, 3, 3), num_units=2, shift=LearnedShift((-1, 0, 1), axis=2)
    )
    node(torch.randn(1, 4, 4, 4, 4), torch.randn(1, 5, 4, 2, 2)).square().sum().backward()
    first, second = (p for name, p in node.named_parameters() if name.endswith("offsets"))
    assert first is not second
    assert first.grad is not None
    assert second.grad is not None


@pytest.mark.parametrize("sizes", [(), (float("nan"),), (0.0, float("inf"))])
def test_learned_shift_refuses_sizes(sizes: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match=r"^sizes of LearnedShift: expected one finite number or more, got "):
        LearnedShift(sizes, axis=2)


def test_learned_shift_refuses_axes_and_no_offsets() -> None:
    with pytest.raises(SettingError, match=r"^axis of learned_shift\(\): expected a spatial axis"):
        LearnedShift((0,), axis=1)(torch.rand(1, 2, 3))
    with pytest.raises(SettingError, match=r"^sizes of learned_shift\(\): expected at least one"):
        learned_shift(torch.rand(1, 2, 3), torch.zeros(0), axis=2)


# ---- Unit and fusion node ----


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
