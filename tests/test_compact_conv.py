"""Compact storage of convolutions: the masks, losses and state of masked storage, kernel for kernel."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dstlib
from dstlib import masking
from dstlib.engine.layers.compact import make_compact, obstacle_to_compact
from dstlib.engine.layers.compact_conv import CompactConv
from dstlib.engine.layers.compact_conv_transpose import CompactConvTranspose
from dstlib.schedules import Constant
from dstlib.sparsifier import by_tiles

KINDS = CompactConv, CompactConvTranspose
Optimize = Callable[[nn.Module], torch.optim.Optimizer]

SGD: Optimize = lambda model: torch.optim.SGD(model.parameters(), lr=2**-6, momentum=0.5)  # noqa: E731
ADAM: Optimize = lambda model: torch.optim.Adam(model.parameters(), lr=2**-6)  # noqa: E731


def _images(*, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Module:
    half = kernel // 2
    layers = nn.Conv2d(4, 8, kernel, stride, half, bias=bias), nn.Conv2d(8, 8, kernel, 1, half, bias=bias)
    return _whole(nn.Sequential(layers[0], nn.Tanh(), layers[1]))


def _volumes(*, stride: int = 1) -> nn.Module:
    first = nn.Conv3d(4, 8, (1, 3, 3), stride, (0, 1, 1))
    return _whole(nn.Sequential(first, nn.Tanh(), nn.Conv3d(8, 4, (1, 3, 3), 1, (0, 1, 1))))


def _upward(*, bias: bool = True) -> nn.Module:
    """As the finer levels of a U-Net are reached."""
    first = nn.ConvTranspose2d(4, 8, 2, 2, bias=bias)
    return _whole(nn.Sequential(first, nn.Tanh(), nn.ConvTranspose2d(8, 4, (1, 2), (1, 2))))


def _upward_volumes() -> nn.Module:
    first = nn.ConvTranspose3d(4, 8, (1, 2, 2), (1, 2, 2), bias=False)
    return _whole(nn.Sequential(first, nn.Tanh(), nn.ConvTranspose3d(8, 8, 2, 2)))


def _upward_by_ones() -> nn.Module:
    return _whole(nn.Sequential(nn.ConvTranspose2d(4, 8, 1), nn.Tanh(), nn.ConvTranspose2d(8, 12, 1)))


def _whole(model: nn.Module) -> nn.Module:
    """Returns the model with weights in sixteenths, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.data = sign * torch.randint(1, 9, parameter.shape, generator=generator) / 16
    return model


def _data(model: nn.Module, num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (2, 4, 6, 6) if isinstance(model[0], nn.Conv2d | nn.ConvTranspose2d) else (2, 4, 3, 5, 4)
    return [torch.randint(-2, 3, size, generator=generator).float() for _ in range(num)]


def _train(
    model: nn.Module, method: dstlib.Method, optimize: Optimize, storage: str, *, num: int = 6
) -> tuple[dstlib.Sparsifier, torch.optim.Optimizer, list[tuple[float, dict[str, Tensor]]]]:
    """Trains; returns with the loss and the masks of each step."""
    keep = () if isinstance(method.granularity, masking.Channel) else None  # no channel is left out, or all are kept
    sparsifier = dstlib.sparsify(
        model, sparsity=0.5, method=method, total_steps=40, seed=3, storage=storage, keep_neurons=keep
    )
    optimizer = optimize(model)
    return sparsifier, optimizer, _go_on(model, sparsifier, optimizer, _data(model, num))


def _go_on(
    model: nn.Module, sparsifier: dstlib.Sparsifier, optimizer: torch.optim.Optimizer, data: list[Tensor]
) -> list[tuple[float, dict[str, Tensor]]]:
    seen = []
    for x in data:
        optimizer.zero_grad()
        loss = model(x).square().sum() * 2**-6
        loss.backward()
        optimizer.step()
        seen.append((float(loss.detach()), {name: mask.clone() for name, mask in sparsifier.masks.items()}))
    return seen


def _method(name: str, granularity: masking.Granularity) -> dstlib.Method:
    method = replace(dstlib.METHODS[name], granularity=granularity, interval=1, stop=1.0)
    return replace(method, drop_fraction=Constant(0.5), distribution=masking.uniform)


CASES = {
    "kernels by gradient": (_images, "rigl", masking.Kernel(), SGD),
    "kernels by chance": (_images, "set", masking.Kernel(), ADAM),
    "blocks": (_images, "rigl", masking.Block(4, 2), ADAM),
    "channels": (_images, "rigl", masking.Channel(), SGD),
    "drop and grow by magnitude and gradient": (_images, "dsff", masking.Kernel(), SGD),
    "entries of 1x1": (lambda: _images(kernel=1), "rigl", masking.Element(), ADAM),
    "fan-in of 1x1": (lambda: _images(kernel=1, stride=2), "rigl", masking.FanIn(), SGD),
    "a stride, no bias": (lambda: _images(stride=2, bias=False), "rigl", masking.Kernel(), SGD),
    "volumes": (_volumes, "rigl", masking.Kernel(), SGD),
    "transposed": (_upward, "rigl", masking.Kernel(), SGD),
    "transposed, by chance": (lambda: _upward(bias=False), "set", masking.Kernel(), ADAM),
    "transposed, in blocks": (_upward, "rigl", masking.Block(4, 2), ADAM),
    "transposed, in channels": (_upward, "rigl", masking.Channel(), SGD),
    "transposed, by magnitude and gradient": (_upward_volumes, "dsff", masking.Kernel(), SGD),
    "transposed volumes": (_upward_volumes, "rigl", masking.Kernel(), ADAM),
    "entries of transposed 1x1": (_upward_by_ones, "rigl", masking.Element(), SGD),
    "fan-in of transposed 1x1": (_upward_by_ones, "rigl", masking.FanIn(), ADAM),
    "volumes by strides": (lambda: _volumes(stride=2), "set", masking.Kernel(), ADAM),
}


@pytest.mark.parametrize(("make", "name", "granularity", "optimize"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("tile", [2**18, 40])  # all rows at once, or one after the other
def test_masks_and_losses_are_those_of_masked_storage(
    monkeypatch: pytest.MonkeyPatch,
    tile: int,
    make: Callable[[], nn.Module],
    name: str,
    granularity: masking.Granularity,
    optimize: Optimize,
) -> None:
    monkeypatch.setattr(by_tiles, "TILE", tile)
    plain, compact = make(), make()
    method = _method(name, granularity)
    masked, _, expected = _train(plain, method, optimize, "masked")
    sparsifier, optimizer, found = _train(compact, method, optimize, "compact")
    for (loss, masks), (loss_found, masks_found) in zip(expected, found, strict=True):
        assert loss_found == pytest.approx(loss, rel=2e-5)  # other orders of sums, in float32, over six steps
        assert masks.keys() == masks_found.keys()
        assert all(torch.equal(masks[key], masks_found[key]) for key in masks)
    assert any(not torch.equal(expected[0][1][key], expected[-1][1][key]) for key in masked.masks)
    for layer in compact.modules():
        if isinstance(layer, KINDS):
            kernels = layer.held["weight"].mask.flatten(2)[..., 0].sum()
            assert layer.weight.shape == (kernels, *layer.kernel_size)
            sizes = {v.shape for v in optimizer.state[layer.weight].values() if isinstance(v, Tensor) and v.ndim}
            assert sizes == {layer.weight.shape}
    assert sum(isinstance(layer, KINDS) for layer in compact.modules()) == 2
    dense = sparsifier.dense_state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(dense[key], value, rtol=1e-4, atol=1e-5)  # as the losses


@pytest.mark.parametrize("make", [_images, _upward])
def test_a_run_resumes_bit_for_bit_and_loads_the_state_of_the_plain_model(make: Callable[[], nn.Module]) -> None:
    method = _method("rigl", masking.Kernel())
    model = make()
    sparsifier, optimizer, _ = _train(model, method, ADAM, "compact", num=3)
    states = [copy.deepcopy(each.state_dict()) for each in (model, sparsifier, optimizer)]
    dense = copy.deepcopy(sparsifier.dense_state_dict())
    data = _data(model, 6)[3:]
    expected = _go_on(model, sparsifier, optimizer, data)
    for weights in (states[0], dense):
        again = make()
        other = dstlib.sparsify(again, sparsity=0.5, method=method, total_steps=40, seed=3, storage="compact")
        other_optimizer = ADAM(again)
        again.load_state_dict(weights)
        other.load_state_dict(states[1])
        other_optimizer.load_state_dict(copy.deepcopy(states[2]))
        found = _go_on(again, other, other_optimizer, data)
        assert [loss for loss, _ in found] == [loss for loss, _ in expected]
        assert all(torch.equal(found[-1][1][key], mask) for key, mask in expected[-1][1].items())


def test_layers_without_data_are_initialised_in_their_turn() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 4, (1, 3, 3), padding=(0, 1, 1)))
    sparsifier = dstlib.sparsify(
        model, sparsity=0.5, method=_method("rigl", masking.Kernel()), total_steps=40, storage="compact"
    )
    assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == sum(
        layer.weight.numel() for layer in model.modules() if isinstance(layer, CompactConv)
    )
    assert not any(p.is_meta for p in model.parameters())


def test_what_cannot_be_compact_says_why() -> None:
    layers = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(*layers, nn.Conv2d(4, 4, 1))
    sparsifier = dstlib.sparsify(
        model, sparsity=0.5, method=_method("rigl", masking.Element()), total_steps=40, storage="compact"
    )
    summary = str(sparsifier.summary())
    assert "its kernel is (5, 5)" in summary
    assert "it has groups, dilation or a padding other than zeros" in summary
    assert "units of Element are no whole kernels" in summary
    assert [isinstance(layer, CompactConv) for layer in model] == [False, False, False, True]


def test_a_weight_whose_places_32_bits_cannot_number_is_not_compact() -> None:
    with torch.device("meta"):  # 2³¹ weights, which nobody holds, and 2³¹ - 2¹⁶
        beyond = nn.Linear(2**16, 2**15), nn.Conv2d(2**16, 2**15, 1), nn.ConvTranspose2d(2**14, 2**15, 2, 2)
        within = nn.Linear(2**16, 2**15 - 1)
    assert all("2,147,483,647 weights" in str(obstacle_to_compact(layer)) for layer in beyond)
    assert obstacle_to_compact(within) is None


def test_a_sample_without_a_batch_is_one_of_a_batch() -> None:
    layer = make_compact(_images()[0], torch.tensor([0, 5, 6, 31])).layer
    x = _data(_images(), 1)[0][0]
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("plain", "size"),
    [
        (nn.Conv2d(4, 8, 3, 2, 1), (0, 4, 7, 6)),
        (nn.Conv3d(4, 8, (1, 3, 3), (2, 1, 2), (0, 1, 1)), (0, 4, 3, 5, 4)),
        (nn.ConvTranspose2d(4, 8, 2, 2), (0, 4, 3, 5)),
        (nn.ConvTranspose3d(4, 8, (1, 2, 2), (1, 2, 2), bias=False), (0, 4, 3, 5, 4)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_no_sample_gives_none_as_in_the_plain_layer(plain: nn.Module, size: tuple[int, ...]) -> None:
    active = make_compact(copy.deepcopy(plain), torch.tensor([0, 5, 6, 31]))
    active.wants_passes, layer = lambda: True, active.layer
    x = torch.zeros(size, requires_grad=True)
    y = layer(x)
    assert y.shape == plain(x).shape
    y.sum().backward()
    assert x.grad.shape == size
    assert all(bool((p.grad == 0).all()) for p in layer.parameters())
    assert not bool(active.gradient_of_rows(0, 2).any())
    assert not bool(active.gradient_of_active().any())


def test_an_output_may_be_larger_by_less_than_a_stride() -> None:
    plain = _whole(nn.ConvTranspose2d(4, 8, 3, 3)).double()
    active = make_compact(copy.deepcopy(plain), torch.tensor([0, 5, 6, 31]))
    active.wants_passes, layer = lambda: True, active.layer
    with torch.no_grad():
        plain.weight.copy_(active.spread(layer.weight))
    x = torch.randn(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in (None, (15, 6), (17, 7)):
        # sums of four products, in any order
        torch.testing.assert_close(layer(x, size), plain(x, size), rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="valid sizes range"):
        layer(x, (18, 6))
    plain(x[None], (17, 7)).square().sum().backward()
    layer(x[None], (17, 7)).square().sum().backward()
    torch.testing.assert_close(active.gradient_of_rows(0, 8), plain.weight.grad.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_gradients_of_all_kernels_are_those_of_the_plain_layer_over_its_passes() -> None:
    for plain in (_images()[0], _volumes(stride=2)[0], _upward()[0], _upward_volumes()[0]):
        active = make_compact(copy.deepcopy(plain), torch.tensor([0, 5, 6, 31]))
        active.wants_passes, layer = lambda: True, active.layer
        with torch.no_grad():
            plain.weight.copy_(active.spread(layer.weight))
        for x in _data([plain], 2):
            for y in (plain(x), layer(x)):
                (y * (torch.arange(y.numel()).view(y.shape) % 3)).sum().backward()
        places = active.pattern.places()
        grad = plain.weight.grad.transpose(0, 1) if isinstance(layer, CompactConvTranspose) else plain.weight.grad
        assert torch.equal(active.gradient_of_rows(2, 5), grad[2:5])  # exact: whole numbers
        assert torch.equal(active.gradient_of_active(), plain.weight.grad.flatten(0, 1)[places])
        assert torch.equal(layer.weight.grad, plain.weight.grad.flatten(0, 1)[places])
