"""Compact storage of convolutions: the masks, losses and state of masked storage, kernel for kernel."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dstlib
from dstlib import masking
from dstlib.engine.layers.compact import make_compact
from dstlib.engine.layers.compact_conv import CompactConv
from dstlib.schedules import Constant
from dstlib.sparsifier import by_tiles

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


def _whole(model: nn.Module) -> nn.Module:
    """Returns the model with weights in sixteenths, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.data = sign * torch.randint(1, 9, parameter.shape, generator=generator) / 16
    return model


def _data(model: nn.Module, num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (2, 4, 6, 6) if isinstance(model[0], nn.Conv2d) else (2, 4, 3, 5, 4)
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
        if isinstance(layer, CompactConv):
            kernels = layer.mask.flatten(2)[..., 0].sum()
            assert layer.weight.shape == (kernels, *layer.kernel_size)
            sizes = {v.shape for v in optimizer.state[layer.weight].values() if isinstance(v, Tensor) and v.ndim}
            assert sizes == {layer.weight.shape}
    assert sum(isinstance(layer, CompactConv) for layer in compact.modules()) == 2
    dense = sparsifier.dense_state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(dense[key], value, rtol=1e-4, atol=1e-5)  # as the losses


def test_a_run_resumes_bit_for_bit_and_loads_the_state_of_the_plain_model() -> None:
    method = _method("rigl", masking.Kernel())
    model = _images()
    sparsifier, optimizer, _ = _train(model, method, ADAM, "compact", num=3)
    states = [copy.deepcopy(each.state_dict()) for each in (model, sparsifier, optimizer)]
    dense = copy.deepcopy(sparsifier.dense_state_dict())
    data = _data(model, 6)[3:]
    expected = _go_on(model, sparsifier, optimizer, data)
    for weights in (states[0], dense):
        again = _images()
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


def test_a_sample_without_a_batch_is_one_of_a_batch() -> None:
    layer = make_compact(_images()[0], torch.tensor([0, 5, 6, 31]))
    x = _data(_images(), 1)[0][0]
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=0, atol=0)


def test_gradients_of_all_kernels_are_those_of_the_plain_layer_over_its_passes() -> None:
    for plain in (_images()[0], _volumes(stride=2)[0]):
        layer = make_compact(copy.deepcopy(plain), torch.tensor([0, 5, 6, 31]))
        layer.wants_passes = lambda: True
        with torch.no_grad():
            plain.weight.copy_(layer.spread(layer.weight))
        for x in _data([plain], 2):
            for y in (plain(x), layer(x)):
                (y * (torch.arange(y.numel()).view(y.shape) % 3)).sum().backward()
        places = layer.pattern.places()
        assert torch.equal(layer.gradient_of_rows(2, 5), plain.weight.grad[2:5])  # exact: whole numbers
        assert torch.equal(layer.gradient_of_active(), plain.weight.grad.flatten(0, 1)[places])
        assert torch.equal(layer.weight.grad, plain.weight.grad.flatten(0, 1)[places])
