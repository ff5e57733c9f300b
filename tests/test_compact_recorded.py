"""Models in compact storage under what records or transforms a pass: torch's compiler, exports, traces and modes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dstlib
from dstlib.targets.outputs import PassWatch


def small() -> nn.Module:
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Tanh())
    image.append(nn.ConvTranspose2d(8, 8, 2, 2))
    return nn.Sequential(*image, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16))


def compact(model: nn.Module) -> dstlib.Sparsifier:
    method = replace(dstlib.RIGL, interval=2, stop=1.0, granularity=dstlib.Kernel())
    # named, as what is compiled as a whole does not show which weight comes last
    return dstlib.sparsify(
        model, sparsity=0.5, method=method, total_steps=40, storage="compact", keep_neurons=["7"], seed=1
    )


def train(wrap, steps: int = 7):
    """Losses, and the last masks, of a training whose passes go through what ``wrap`` makes of the model."""
    model = small()
    sparsifier = compact(model)
    optimizer, called = torch.optim.Adam(model.parameters(), 1e-2), wrap(model)
    x, losses = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = called(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, sparsifier.masks


def counted(model):
    def call(x):
        with FlopCounterMode(display=False):
            return model(x)

    return call


def test_compiled_training_is_the_same_through_mask_updates():
    losses, masks = train(lambda model: model)
    again, same = train(lambda model: torch.compile(model, backend="aot_eager"))
    assert again == losses
    assert all(torch.equal(same[name], mask) for name, mask in masks.items())


def test_a_mode_that_counts_operations_sees_those_of_the_plain_layers_and_masks_move_as_without():
    losses, masks = train(lambda model: model)
    again, same = train(counted)
    assert again == pytest.approx(losses, rel=1e-4)  # the plain layers' kernels round otherwise
    assert all(torch.equal(same[name], mask) for name, mask in masks.items())
    with FlopCounterMode(display=False) as counter:
        model = small()
        compact(model)
        model(torch.randn(2, 4, 6, 6))
    first, second, third, last = 2 * 36 * 8 * 4 * 9, 2 * 36 * 8 * 8, 2 * 36 * 8 * 8 * 4, 2 * 32 * 16  # of one sample
    assert counter.get_total_flops() == 2 * (first + second + third + last)


def test_outputs_are_found_behind_values_that_are_put_among_zeros():
    torch.manual_seed(0)
    values, last = (nn.Parameter(torch.randn(4)) for _ in range(2))
    places = torch.tensor([0, 3, 4, 8])

    class Placed(nn.Module):
        def __init__(self, values, put):
            super().__init__()
            self.values, self.put = values, put

        def forward(self, x):
            return nn.functional.linear(x, self.put(torch.zeros(9), self.values).view(3, 3), torch.zeros(3))

    for put in (
        lambda zeros, values: zeros.index_copy(0, places, values),
        lambda zeros, values: zeros.index_put((places,), values),
        lambda zeros, values: zeros.scatter(0, places, values),
    ):
        model = nn.Sequential(Placed(values, put), nn.Tanh(), Placed(last, put))
        watch = PassWatch(model, [values, last])
        model(torch.ones(1, 3))
        assert watch.outputs() == {id(values): False, id(last): True}
        watch.stop()


@pytest.mark.parametrize("made", ["export", "trace"])
@pytest.mark.parametrize("steps", range(3))  # also when the next step is one of an update
def test_programs_made_of_it_compute_the_same(made, steps):
    model = small()
    compact(model)
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(2, 4, 6, 6)
    for _ in range(steps):
        model(x).sum().backward()
        optimizer.step()
    model.train()
    program = torch.export.export(model, (x,)).module() if made == "export" else torch.jit.trace(model, x)
    # the plain layers' kernels add up in another order, over 36 products at most
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-6)


def test_transforms_of_torch_func_go_through():
    model = small()
    compact(model)
    x = torch.randn(2, 4, 6, 6)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(dim=0), parameter.grad, rtol=1e-4, atol=1e-5)  # sums of 72 products
