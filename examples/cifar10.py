"""Train on CIFAR-10 with any method of dstlib: minutes on one CPU core, no download needed to try it.

    python examples/cifar10.py                                         # procedural images, rigl at 90 %
    python examples/cifar10.py --data cifar10 --method set --sparsity 0.95 --seed 1
    python examples/cifar10.py --data cifar10 --optimizer adamw        # with a learning rate and decay of its own
    python examples/cifar10.py --data cifar-10-batches-bin --method dense
    python examples/cifar10.py --data cifar10 --preset published       # WRN-22-2, 97,656 steps: wants a GPU

Presets: quick trains a small network (3.3 million multiply-adds an image, 186 thousand parameters) for 3 passes;
published is the schedule of Evci et al. 2020 for CIFAR-10; vit is AdamW for the vision transformer. Any option
changes one setting of the preset. Without --data the images are procedural shapes: they show that it works, not how
well. For a comparison of methods over seeds see benchmarks/cifar10.py.
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cifar10_settings import CHOICES, PRESETS, UPDATES, Settings, with_optimizer

from dstlib.command_line import make_parser, run_command
from dstlib.errors import SettingError, require
from dstlib.report import align

HELP = {
    "model": "small: five convolutions; wrn: wide residual networks; vit: a vision transformer, by timm",
    "method": "dense, or of dstlib; rigl-cold: Adam's moments of grown weights start at zero; rigl-warm: they warm up",
    "sparsity": "share of the weights that stay off",
    "distribution": "how layers share the density: erk or uniform (default: the method's)",
    "interval": f"steps between mask updates (default: the method's, in steps at most a {UPDATES}th of the run)",
    "epochs": "passes over the training images",
    "batch_size": "images a step",
    "optimizer": "sgd has Nesterov's momentum 0.9; another than the preset's brings its own learning rate and decay",
    "learning_rate": "at its highest",
    "weight_decay": "of all weights",
    "schedule": "cosine: to 0; step: a fifth at each 30.72 %% of the run, which is each 30,000 of 97,656 steps",
    "warmup": "share of the run over which the learning rate rises from 0",
    "crop": "pixels to pad by before a random crop; flips there are always",
    "images": "train on the first N images only (default: all)",
    "seed": "of the weights, the batches and the masks",
}


def parser() -> argparse.ArgumentParser:
    """Returns the command line: every setting, of which those left out are the preset's."""
    lines = make_parser(__doc__)
    lines.add_argument("--preset", choices=PRESETS, help="(default: vit for --model vit, else quick)")
    lines.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of CIFAR-10, as npz or binary (default: procedural images)"
    )
    for field in fields(Settings):
        add_setting(lines, field.name)
    lines.add_argument("--device", help="(default: cuda if there is one, else cpu)")
    lines.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    lines.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the result (default: runs/cifar10/MODEL-METHOD-SPARSITY-seedSEED.json)",
    )
    return lines


def add_setting(lines: argparse.ArgumentParser, name: str) -> None:
    """Adds an option for a setting, with what it is in each preset."""
    values = {preset: getattr(settings, name) for preset, settings in PRESETS.items()}
    first = next(iter(values.values()))
    alike = all(value == first for value in values.values())
    shown = str(first) if alike else ", ".join(f"{preset} {value}" for preset, value in values.items())
    choices = CHOICES.get(name)
    lines.add_argument(
        f"--{name.replace('_', '-')}",
        type={"distribution": str, "interval": int, "images": int}.get(name, type(first)),
        choices=None if choices is None else [choice for choice in choices if choice],
        metavar=None if choices else "N",
        help=HELP[name] + ("" if first is None else f" (default: {shown})"),
    )


def chosen(options: argparse.Namespace) -> Settings:
    """Returns the preset with the settings of the command line."""
    preset = PRESETS[options.preset or ("vit" if options.model == "vit" else "quick")]
    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    preset = with_optimizer(preset, given["optimizer"] or preset.optimizer)
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def prepare(options: argparse.Namespace) -> str:
    """Sets threads, and returns the device, which is checked now rather than when the images are read.

    Raises:
        SettingError: There is no such device, or fewer than one thread.
    """
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads is not None:
        given, remedy = options.threads, "Leave it out for torch's own choice."
        require(options.threads >= 1, "--threads", "the command line", allowed="1 or more", given=given, remedy=remedy)
        torch.set_num_threads(options.threads)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        allowed, given = "a device of this machine", f"{device!r}: {str(error).splitlines()[0]}"
        raise SettingError.of(
            "--device", "the command line", allowed=allowed, given=given, remedy="Pass cpu, or leave it out."
        ) from error
    return device


def table(result: dict[str, Any]) -> str:
    """Returns what a run came to, in a row."""
    s = result["settings"]
    row = (s["model"], s["method"], f"{result['accuracy']:.2%}", f"{result['density']:.4f}", f"{result['params']:,}")
    costs = (f"{result['flops_share']:.1%}", f"{result['seconds']:.0f} s")
    names = ("model", "method", "test accuracy", "density", "params", "FLOPs of dense", "time")
    return "\n".join(align([names, (*row, *costs)], left=(0, 1)))


def main(arguments: list[str] | None = None) -> None:
    """Trains as the command line says, prints what came of it, and writes it down."""
    options = parser().parse_args(arguments)
    settings = chosen(options)
    device = prepare(options)
    from cifar10_data import open_images
    from cifar10_training import train, write_result

    images = open_images(options.data)
    print(f"{images.name}: {len(images.train):,} images to train on, {len(images.test):,} to test on")
    result = train(settings, images, device=device)
    sparsity = 0.0 if settings.method == "dense" else settings.sparsity
    name = f"{settings.model}-{settings.method}-{sparsity:g}-seed{settings.seed}.json"
    out = options.out or Path("runs/cifar10") / name
    write_result(out, result)
    print(f"{table(result)}\nin {out}")


if __name__ == "__main__":
    sys.exit(run_command(main, interrupted="Interrupted; nothing was written."))
