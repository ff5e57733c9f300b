"""The networks of examples/shift_plugin.py, and what is done to them."""

import argparse
from dataclasses import replace

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet, UNet
from torch import Tensor, nn
from tqdm import tqdm

import dstlib
from dstlib.layers import add_depth_shift
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS
from dstlib.zoo.e2enet.data.phantoms.ct import phantoms
from dstlib.zoo.e2enet.data.preprocessing.normalization import ZScoreNormalization

NUM_CLASSES = len(AMOS_ORGANS) + 1  # with the background
WIDTHS = (12, 24, 48)
SHAPE = (32, 40, 40)


def dynunet() -> nn.Module:
    return DynUNet(3, 1, NUM_CLASSES, [3, 3, 3], [1, 2, 2], [2, 2], filters=WIDTHS)


def monai_unet() -> nn.Module:
    return UNet(3, 1, NUM_CLASSES, WIDTHS, (2, 2), num_res_units=2)


def plain_conv_unet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    model = PlainConvUNet(
        input_channels=1,
        n_stages=len(WIDTHS),
        features_per_stage=WIDTHS,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=(1, 2, 2),
        n_conv_per_stage=2,
        num_classes=NUM_CLASSES,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return model.apply(model.initialize)


NETWORKS = {"dynunet": dynunet, "unet": monai_unet, "plainconvunet": plain_conv_unet}


def scans(num_scans: int) -> tuple[Tensor, Tensor]:
    """Draws normalised phantoms: images (N, 1, D, H, W), labels (N, 1, D, H, W)."""
    drawn = phantoms(num_scans, shape=SHAPE)
    normalize = ZScoreNormalization()  # to mean 0 and deviation 1, which is all that a demonstration needs
    images = torch.stack([torch.from_numpy(normalize.apply(case.image[0]))[None] for case in drawn.cases])
    return images, torch.stack([torch.from_numpy(case.label)[None] for case in drawn.cases]).long()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, steps: int) -> None:
    """Trains on one scan per step, in turn; prints the mean loss of each fifth of the run."""
    criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    losses: list[float] = []
    for step in tqdm(range(steps), desc="train", unit="it"):
        i = step % len(images)
        loss = criterion(model(images[i : i + 1]), labels[i : i + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    size = max(steps // 5, 1)
    for first in range(0, steps - steps % size, size):
        part = losses[first : first + size]
        print(f"steps {first + 1:>3} to {first + len(part):>3}: loss {sum(part) / len(part):.3f}")


def cost(title: str, model: nn.Module, sparsifier: dstlib.Sparsifier | None = None) -> None:
    counted = dstlib.profile(model, (1, 1, *SHAPE), sparsifier=sparsifier)
    print(f"{title:<20} {counted.params:>9,} parameters  {counted.flops / 1e9:>7.3f} GFLOPs")


def compare(options: argparse.Namespace) -> None:
    """Shows what a network costs as it was, flat and shifted, and sparse, and trains the last."""
    torch.manual_seed(options.seed)
    model = NETWORKS[options.network]()
    cost("as it was", model)
    report = add_depth_shift(model, (-1, 0, 1), axis=options.axis)
    cost("flat and shifted", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    sparsifier = dstlib.sparsify(
        model,
        optimizer,
        sparsity=options.sparsity,
        method=replace(dstlib.DSFF, interval=options.interval),
        total_steps=options.steps,
        include=[f"{name}.weight" for name in report.shifted],  # the first layer and the heads stay dense
        seed=options.seed,
    )
    cost("and sparse", model, sparsifier)
    print(report)
    images, labels = scans(options.scans)
    train(model, optimizer, images, labels, steps=options.steps)
    print(sparsifier.summary().totals())
