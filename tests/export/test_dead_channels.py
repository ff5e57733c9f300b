"""Dead channels: what goes, what stays and why, and that the outputs are the same.

Where weights, inputs and statistics are small whole numbers in float64, every sum is exact in any order, so outputs
have to be equal to the last bit.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generator, seeds
from torch import Tensor, nn

import dstlib
from dstlib.export.dead_channels import ShiftedGroups, remove_dead_channels
from dstlib.layers import Shift
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

CONVOLUTIONS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Branches(nn.Module):
    """Everything that is followed: (B, 2, 8, 8) → (B, 3) and (B, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, eps=0.0)
        self.relu = nn.ReLU(inplace=True)
        self.one = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.two = nn.Conv2d(6, 5, 1)
        self.pool = nn.MaxPool2d(2)
        self.deep = nn.Conv2d(5, 7, 3, padding=1)
        self.up = nn.ConvTranspose2d(7, 4, 2, stride=2, bias=False)
        self.shift = Shift((-1, 0, 1), axis=2)
        self.joint = nn.Conv2d(9, 4, 3, padding=1)
        self.flat = nn.Linear(9 * 16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.one(x))
        y += self.two(x)
        z = self.up(torch.relu(self.deep(self.pool(y))))
        both = torch.cat([y, z], dim=1)
        features = torch.flatten(self.pool(both), 1)
        return self.head(self.flat(features).relu()), self.joint(self.shift(both))


def whole_numbers(model: nn.Module, seed: int, *, density: float, dead: float, biased: float) -> nn.Module:
    """The model in float64 with whole weights under random masks; a part of rows and columns is all zero."""
    rng = generator(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, CONVOLUTIONS):
                first, second = module.weight.shape[:2]
                alive = (torch.rand(first, 1, generator=rng) >= dead) & (torch.rand(1, second, generator=rng) >= dead)
                alive = alive & (torch.rand(first, second, generator=rng) < density)
                values = torch.randint(1, 4, module.weight.shape, generator=rng).double()
                values *= torch.randint(0, 2, module.weight.shape, generator=rng) * 2 - 1
                module.weight.copy_(values * alive.reshape(*alive.shape, *[1] * (module.weight.ndim - 2)))
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randint(-1, 2, module.running_mean.shape, generator=rng))
            if (bias := getattr(module, "bias", None)) is not None:
                has_bias = torch.rand(bias.shape, generator=rng) < biased
                bias.copy_(torch.randint(-2, 3, bias.shape, generator=rng) * has_bias)
    return model


def assert_same(model: nn.Module, *examples: Tensor) -> tuple[nn.Module, dstlib.export.dead_channels.Removal]:
    """The outputs are equal to the last bit, for the example and for other inputs; the model is as it was."""
    state = copy.deepcopy(model.state_dict())
    smaller, removal = remove_dead_channels(model, examples)
    assert removal.difference == 0.0
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    others = [torch.randint(-3, 4, x.shape).to(x) for x in examples]
    with torch.no_grad():
        for inputs in (examples, others):
            ours = smaller(*(x.clone() for x in inputs))
            theirs = copy.deepcopy(model).eval()(*(x.clone() for x in inputs))
            for a, b in zip(*((y,) if isinstance(y, Tensor) else y for y in (ours, theirs)), strict=True):
                assert torch.equal(a, b)
    return smaller, removal


@settings(max_examples=60)
@given(seeds, st.floats(0.05, 1.0), st.floats(0, 0.8), st.sampled_from([0.0, 0.5, 1.0]))
def test_outputs_are_equal_whatever_is_dead(seed, density, dead, biased):
    model = whole_numbers(Branches(), seed, density=density, dead=dead, biased=biased)
    smaller, removal = assert_same(model, torch.randint(-3, 4, (2, 2, 8, 8), generator=generator(seed)).double())
    assert removal.parameters == (count(model), count(smaller))
    assert not removal.left.keys() & {"shift", "norm", "(model)"}


@settings(max_examples=40)
@given(seeds, st.floats(0.05, 0.7), st.floats(0, 0.6))
def test_nothing_dead_is_left_in_a_perceptron(seed, density, dead):
    """By hand: a unit lives if something live reads it, and if it is not always zero."""
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    whole_numbers(model, seed, density=density, dead=dead, biased=0.0)
    first, second, third = (model[i].weight != 0 for i in (0, 2, 4))
    varies_1 = first.any(1)
    varies_2 = (second & varies_1).any(1)
    read_2 = (third & varies_2).any(0)
    read_1 = (second[read_2] & varies_1).any(0)
    smaller, _ = assert_same(model, torch.randint(-3, 4, (4, 5), generator=generator(seed)).double())
    assert smaller[2].out_features == max(1, int(read_2.sum()))
    if read_2.any():
        assert smaller[0].out_features == max(1, int(read_1.sum()))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize("shift_kind", ["fixed", "rounded"])
def test_e2enet_becomes_smaller_and_takes_all_sizes(sparsity, shift_kind):
    torch.manual_seed(0)
    config = E2ENetConfig(
        channels=(8, 16, 32, 32), strides=((2, 2, 2),) * 3, heads=2, num_classes=3, shift_kind=shift_kind
    )
    network = E2ENet(config).double().eval()
    dstlib.sparsify(network, sparsity=sparsity, method="dsff", total_steps=100_000, include=E2ENet.FUSION)
    smaller, removal = remove_dead_channels(network, torch.randn(1, 1, 16, 16, 16).double())
    x = torch.randn(2, 1, 16, 32, 24).double()
    with torch.no_grad():
        for ours, theirs in zip(smaller(x), network(x), strict=True):
            # the same sums without their zeros, added in another order; some 15 layers
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if shift_kind == "fixed":
        assert count(smaller) < 0.9 * count(network)
        assert removal.smaller["fusion.stage1_level1.upward"].outputs < 8
    else:
        assert "units.0.shift reads them, a LearnedShift" in removal.left["fusion.stage1_level1.upward"]


def test_a_dead_row_goes_where_its_constant_becomes_zero():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=0.0), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    whole_numbers(model, 0, density=1.0, dead=0.0, biased=0.0)
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias.copy_(torch.tensor([1.0, 1.0, 2.0, 0.0]))
        model[1].bias.copy_(torch.tensor([-3.0, 3.0, 0.0, 0.0]))  # after the ReLU: 0, not 0, not 0
        model[1].running_mean.zero_()
    smaller, removal = assert_same(model, torch.ones(1, 1, 6, 6).double())
    assert smaller[0].out_channels == smaller[1].num_features == smaller[3].in_channels == 3
    assert removal.left == {
        "0": "2 constant outputs stay: read as another number than 0, or the one that a layer needs"
    }


def test_a_zero_that_an_activation_makes_a_half_stays():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    _, removal = assert_same(model, torch.ones(1, 2).double())
    assert not removal.smaller
    assert "nothing to remove" in str(removal)


class Other(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between) -> None:
        super().__init__()
        self.a, self.b, self.other = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(2, 4, 1)
        self.grouped, self.last = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(3, 2, 1)
        self.between = between
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def add_under_another_name(m, x):
    y = m.a(x)
    z = y
    z += m.other(x)
    return m.b(y)


def fill_a_view(m, x):
    y = m.a(x)
    y[:, :2].fill_(1.0)
    return m.last(m.b(y))


def saturate_after_relu(m, x):
    y = m.a(x)  # constant -4
    torch.relu_(y)  # 0 now
    return m.b(nn.functional.relu6(y + 4) * y.sigmoid())


STAY = {
    "a view": (lambda m, x: m.b(m.a(x).view(1, 4, 3, 3)), "view reads them"),
    "its shape": (lambda m, x: m.b((y := m.a(x)) / y.shape[1]), "the forward reads their number"),
    "another axis": (lambda m, x: m.b(m.a(x).transpose(1, 2).transpose(1, 2)), "transpose reads them"),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(1)), "softmax reads them"),
    "groups": (lambda m, x: m.b(m.grouped(m.a(x))), "grouped reads them, a Conv2d"),
    "twice": (lambda m, x: m.b(m.a(x)) + m.b(m.other(x)), "b reads them, a Conv2d"),
    "its weight": (lambda m, x: m.b(m.a(x)) * m.b.weight.sum(), "b reads them, a Conv2d"),
    "a buffer": (
        lambda m, x: m.b(nn.functional.batch_norm(m.a(x), m.mean, m.mean + 1, eps=0.0)),
        "batch_norm reads them",
    ),
    "fill": (fill_a_view, "getitem reads them"),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_not_known_keeps_all_and_is_named(name):
    between, reason = STAY[name]
    model = whole_numbers(Other(between), 1, density=1.0, dead=0.0, biased=0.0)
    with torch.no_grad():
        model.a.weight[1:3] = 0
        model.b.weight[:, 3] = 0
        model.grouped.weight.fill_(1.0)
    smaller, removal = assert_same(model, torch.randint(-3, 4, (1, 2, 3, 3)).double())
    assert smaller.a.out_channels == 4
    assert removal.left["a"] == f"all its outputs stay: {reason}"


@pytest.mark.parametrize("between", [add_under_another_name, saturate_after_relu])
@pytest.mark.parametrize("bias", [0.0, -4.0])
def test_what_is_overwritten_in_place_is_not_taken_for_what_it_was(between, bias):
    model = whole_numbers(Other(between), 2, density=1.0, dead=0.0, biased=0.0)
    with torch.no_grad():
        model.a.weight[1:] = 0
        model.a.bias[1:] = bias
    with torch.no_grad():
        x = torch.randint(-3, 4, (1, 2, 3, 3)).double()
        expected = copy.deepcopy(model)(x.clone())
        smaller, _ = remove_dead_channels(model, x)
        torch.testing.assert_close(smaller(x.clone()), expected, rtol=1e-14, atol=1e-14)  # a sigmoid is no whole number


def test_what_is_written_through_a_view_is_read():
    model = whole_numbers(Other(fill_a_view), 3, density=1.0, dead=0.0, biased=0.0)
    nn.init.zeros_(model.a.weight)
    smaller, _ = assert_same(model, torch.ones(1, 2, 3, 3).double())
    assert smaller.b.out_channels == 3


def test_a_constant_is_not_trusted_to_be_normed_to_zero():
    """x minus the mean of x need not be zero, and another size of input has another mean."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.InstanceNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)).double()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias.copy_(torch.tensor([0.25, 0.0, 0.0]))
    smaller, _ = assert_same(model, torch.arange(16.0).reshape(1, 1, 4, 4).double())
    assert smaller[0].out_channels == 2


class Crossed(nn.Module):
    """Adds channels along one axis to features along another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x) + self.linear(x))


def test_channels_along_different_axes_are_not_taken_for_the_same():
    model = whole_numbers(Crossed(), 4, density=1.0, dead=0.0, biased=0.0)
    with torch.no_grad():
        model.head.weight[:, :2] = 0
    _, removal = assert_same(model, torch.randint(-3, 4, (1, 4, 4)).double())
    assert "add reads them" in removal.left["conv"]


class Flattened(nn.Module):
    """Adds the positions of channels to features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv1d(2, 3, 1), nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1) + self.linear(x.flatten(1)))


@pytest.mark.parametrize("position", range(4, 8))
def test_a_channel_stays_for_one_of_its_positions_and_takes_the_others_along(position):
    model = whole_numbers(Flattened(), 5, density=1.0, dead=0.0, biased=1.0)
    with torch.no_grad():
        model.head.weight[:, :position] = 0
        model.head.weight[:, position + 1 :] = 0
    smaller, _ = assert_same(model, torch.randint(-3, 4, (2, 2, 4)).double())
    assert (smaller.conv.out_channels, smaller.linear.out_features, smaller.head.in_features) == (1, 4, 4)


def test_hooks_and_parametrizations_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    _, removal = assert_same(model, torch.ones(1, 2).double())
    assert removal.left["1"] == "Linear: it is called twice, shares parameters, or has hooks"
    model = nn.Sequential(nn.Linear(2, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))).double()
    _, removal = assert_same(model, torch.ones(1, 2).double())
    assert not removal.smaller


def test_a_forward_that_looks_at_values_is_left_alone_and_says_so():
    model = whole_numbers(Other(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else x), 1, density=0.1, dead=0.0, biased=0.0)
    smaller, removal = assert_same(model, torch.ones(1, 2, 3, 3).double())
    assert "cannot be traced" in removal.left["(model)"]
    assert count(smaller) == count(model)


def test_tied_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    smaller, _ = assert_same(model, torch.ones(1, 4).double())
    assert smaller[0].weight is smaller[2].weight


def test_features_along_the_last_axis_are_channels_too():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        model[1].weight[:2], model[1].bias[:2] = 0, 0
        model[3].weight[:, 5] = 0
    x = torch.randn(2, 3, 4).double()
    smaller, _ = remove_dead_channels(model, x)
    assert smaller[1].out_features == 5
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-13, atol=1e-14)  # eight products in another order


def test_what_comes_out_is_a_plain_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(6, 6, 1), Shift((-1, 0, 1), axis=2), nn.Conv3d(6, 6, 1)).train()
    with torch.no_grad():
        model[2].weight[:, [0, 1, 3]] = 0
    x = torch.randn(1, 6, 4, 2, 2)
    smaller, removal = remove_dead_channels(model, x)
    assert isinstance(smaller[1], ShiftedGroups)
    assert smaller[1].counts == (1, 2)
    assert smaller[1].sizes == (0, 1)
    assert smaller[0].weight.requires_grad
    assert not smaller.training
    assert model.training
    program = torch.export.export(smaller, (x,)).module()
    assert torch.equal(program(x), smaller(x))
    torch.testing.assert_close(smaller(x), model(x))
    assert removal.smaller["0"] == (3, 6, 6, 6)
