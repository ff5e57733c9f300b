"""What sparse training costs per step: time and memory of the controller on a ResNet-50, side by side.

    python benchmarks/overhead.py [--threads 2] [--repeats 7]

Prints, as medians over interleaved repeats: the bare optimizer step and the same step under the controller, of a
ResNet-50 and of many small layers;
an update of all masks; one forward and backward pass dense, masked in place (ours) and masked by
torch.nn.utils.parametrize; and the memory that masks and updates take.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from _measure import cpu, medians, own, wall
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dstlib
from dstlib.command_line import make_parser


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with a residual, as in He et al. 2016."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(into, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        layers: list[nn.Module] = []
        for i, o, k, s in sizes:
            layers += [nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or into != 4 * width:
            self.skip = nn.Sequential(nn.Conv2d(into, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet50() -> nn.Sequential:
    """ResNet-50: 25,502,912 weights in 54 tensors."""
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    into = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            layers.append(Bottleneck(into, width, stride if i == 0 else 1))
            into = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000))


class Masked(nn.Module):
    """Masking as torch.nn.utils.parametrize does it: weight = original · mask at each forward."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def peak_bytes(action: Callable[[], object]) -> int:
    """The most bytes of tensors that the action holds at once, beyond those that were there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes), default=0)


def fill_gradients(model: nn.Module) -> None:
    """Gradients as a dense backward pass leaves them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def step_costs(repeats: int) -> None:
    """The bare optimizer step, the same step under the controller, and an update of every mask."""
    bare, sparse = resnet50(), resnet50()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4) for m in (bare, sparse)]
    method = replace(dstlib.RIGL, interval=1)
    sparsifier = dstlib.sparsify(sparse, optimizers[1], sparsity=0.9, method=method, total_steps=10_000)
    for model in (bare, sparse):
        fill_gradients(model)
    num_weights = sum(mask.numel() for mask in sparsifier.masks.values())
    mask_bytes = sum(mask.bits.nbytes for mask in sparsifier.masks.packed.values())
    largest = max(mask.numel() for mask in sparsifier.masks.values())

    optimizers[1].step()
    update_peak = peak_bytes(optimizers[1].step)
    fill_gradients(sparse)
    update = medians({"update": lambda: (fill_gradients(sparse), optimizers[1].step())}, 3)["update"]
    update -= medians({"fill": lambda: fill_gradients(sparse)}, 3)["fill"]
    sparsifier.freeze()
    step_peak = peak_bytes(optimizers[1].step)
    dense = [parameter.grad.clone() for parameter in bare.parameters() if parameter.grad is not None]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """Milliseconds of a step on gradients as a backward pass leaves them, which is no part of it."""
        for parameter, grad in zip(model.parameters(), dense, strict=True):
            parameter.grad = grad.clone()
        return wall(optimizer.step)

    pairs = {"bare": partial(step, bare, optimizers[0]), "sparse": partial(step, sparse, optimizers[1])}
    times = medians(pairs, repeats, clock=own)
    extra = times["sparse"] - times["bare"]
    print(f"{num_weights:,} sparse weights, sparsity 0.9, SGD with momentum and weight decay")
    print(f"bare optimizer step        {times['bare']:8.1f} ms")
    print(f"step under the controller  {times['sparse']:8.1f} ms")
    print(f"  of it the controller     {extra:8.1f} ms   {extra / times['bare']:.2f} × the bare step")
    print(f"step with a mask update    {update:8.1f} ms   RigL, all {len(sparsifier.masks)} tensors")
    sizes = {
        "masks": (mask_bytes, f"{mask_bytes / num_weights:.3f} bytes per sparse weight"),
        "transient, ordinary step": (step_peak, "one copy of the largest tensor is SGD's own"),
        "transient, update": (update_peak, f"{update_peak / largest:.0f} bytes per weight of the largest tensor"),
    }
    for what, (size, remark) in sizes.items():
        print(f"{what:26} {size / 1e6:8.1f} MB   {remark}")
    sparsifier.detach()


def layer_costs(repeats: int) -> None:
    """The step of many small layers, whose cost is that of the calls: bare, and under the controller."""
    for num_layers in (50, 3200):
        optimizers = []
        for _ in range(2):
            model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(num_layers)])
            optimizers.append(torch.optim.AdamW(model.parameters(), foreach=True))
            fill_gradients(model)
        sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
        times = medians({"bare": optimizers[0].step, "sparse": optimizers[1].step}, repeats, clock=cpu)
        shown = f"{times['bare']:7.1f} ms bare, {times['sparse']:7.1f} ms under the controller"
        print(
            f"AdamW step, {num_layers:5,} layers of 8 × 8: {shown}, {times['sparse'] / times['bare']:.2f} × (CPU time)"
        )
        sparsifier.detach()


def pass_costs(repeats: int) -> None:
    """Forward and backward: dense, masked in place, masked by a parametrization."""
    dense, in_place, parametrized = (resnet50() for _ in range(3))
    masks = dstlib.sparsify(in_place, sparsity=0.9, method="static").masks
    for name, mask in masks.items():
        owner, _, key = name.rpartition(".")
        parametrize.register_parametrization(parametrized.get_submodule(owner), key, Masked(mask))
    x = torch.randn(8, 3, 96, 96)
    models = {"dense": dense, "masked in place (ours)": in_place, "torch parametrize": parametrized}
    times = medians({name: lambda m=m: m(x).sum().backward() for name, m in models.items()}, repeats)
    print("forward and backward, batch 8 of 96²")
    for name, taken in times.items():
        print(f"  {name:24} {taken:8.1f} ms   {taken / times['dense']:.2f} × dense")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each action, median taken (default 7)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, medians of {args.repeats}")
    step_costs(args.repeats)
    layer_costs(args.repeats)
    pass_costs(args.repeats)


if __name__ == "__main__":
    main()
