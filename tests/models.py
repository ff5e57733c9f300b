"""Small models and loops that the controller's tests share."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dstlib


class Small(nn.Module):
    """A convolution, a transposed one, a norm and a linear layer: (B, 2, 6, 6) → (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.up = nn.ConvTranspose2d(4, 6, 2, bias=False)
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.conv(x).relu()).relu()).mean(dim=(2, 3)))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """The batch of a step: a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 6, 6, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def backward(model: nn.Module, step: int, size: int = 4, scale: float = 1.0) -> float:
    x, y = batch(step, size)
    loss = nn.functional.cross_entropy(model(x), y) * scale
    loss.backward()
    return float(loss.detach())


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        losses.append(backward(model, step))
        optimizer.step()
    return losses


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[tuple[Tensor, float]]:
    """Same-shape tensors of one of torch's optimizers with their values at birth, found without the library's help."""
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    births = {"sum": group.get("initial_accumulator_value"), "step_size": group.get("lr")}
    for key, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield value, births.get(key, 0.0)


def assert_zero_outside(model: nn.Module, masks: dict[str, Tensor], *optimizers: Optimizer) -> None:
    """Weights are exactly zero wherever a mask is False, and what one of torch's optimizers keeps is as at birth."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameter = parameters[name]
        tensors = [(parameter.detach(), 0.0)]
        for optimizer in optimizers:
            tensors += state_of(optimizer, parameter)
        for tensor, birth in tensors:
            if not torch.equal(tensor[~mask], torch.full_like(tensor[~mask], birth)):
                raise AssertionError(f"{name}: not as at birth outside the mask")


def assert_same(first: dict, second: dict, where: str = "") -> None:
    """Two nested states are equal bit for bit; raises with the path of the first difference."""
    assert first.keys() == second.keys(), f"{where}: {first.keys()} != {second.keys()}"
    for key, a in first.items():
        b, path = second[key], f"{where}.{key}"
        if isinstance(a, dict):
            assert_same(a, b, path)
        elif isinstance(a, Tensor):
            assert a.dtype == b.dtype, f"{path}: {a.dtype} != {b.dtype}"
            assert torch.equal(a, b), f"{path} differs"
        else:
            assert a == b, f"{path}: {a} != {b}"


def units_of(sparsifier: dstlib.Sparsifier) -> dict[str, Tensor]:
    """Which units of each matrix view are active, (groups, units), from the masks alone."""
    fold, units = sparsifier.plan.method.granularity.fold, {}
    for weight in sparsifier.weights:
        for view in weight.views:
            folded = fold(view.of(sparsifier.masks[weight.name]))
            assert (folded == folded[..., :1]).all(), "a unit is all on or all off"
            units[view.name] = folded[..., 0]
    return units


def check_counts(sparsifier: dstlib.Sparsifier) -> None:
    """Every group as the plan says for the latest update; where units are shared out, all weights together."""
    plan, units, total, num_planned = sparsifier.plan, units_of(sparsifier), 0, 0
    weights = sparsifier.state_dict()["weights"]
    latest = max(saved["updated_at"] for saved in weights.values())
    for name, saved in weights.items():
        num_groups, size = units[name].shape
        counts = units[name].sum(dim=1).tolist()
        quota = plan.num_target(name, size, saved["updated_at"])
        total, num_planned = total + sum(counts), num_planned + quota * num_groups
        if plan.method.allocate is None:
            assert counts == [quota] * num_groups
        elif plan.method.name == "srigl":
            alive = [num for num in counts if num]
            assert len(set(alive)) == 1, "constant fan-in"
            assert quota * num_groups - len(alive) < sum(alive) <= quota * num_groups
    if plan.method.allocate is not None and plan.method.name != "srigl" and total != num_planned:
        # one that waited comes to a dense phase later than the others, and is full before the total is met
        assert total < num_planned
        assert all(bool(units[name].all()) for name, saved in weights.items() if saved["updated_at"] == latest)
