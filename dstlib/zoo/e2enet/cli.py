"""The command line that the four recipes share."""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from dstlib.command_line import make_parser
from dstlib.methods import METHODS
from dstlib.zoo.e2enet.recipes import Recipe
from dstlib.zoo.e2enet.training.settings import OPTIMIZERS, PRECISIONS

HELP = {
    "epochs": "number of epochs; after each the learning rate falls and a checkpoint is written",
    "iterations": "optimizer steps per epoch",
    "optimizer": "the paper's sgd, or adamw for a short run",
    "learning_rate": "at the start; the paper's is 0.01, of SGD and for a far longer run",
    "momentum": "of SGD, with Nesterov; the paper's is 0.99",
    "weight_decay": "on all weights",
    "clip": "gradients of a larger norm are scaled down to this one",
    "poly_exponent": "the learning rate falls by epoch as (1 - epoch / epochs) to this power",
    "sparsity": "share of the fusion's connections that stay off, in [0, 1); 0 trains a dense network",
    "method": "how the sparse connections are chosen; 'dense' is the same as --sparsity 0",
    "interval": "iterations between mask updates, for the methods that have any",
    "block": "channels on each side of what is connected or not: 1 as in the paper, 16 to compute less on a GPU",
    "val_iterations": "batches of the held-out cases to validate on after each epoch; 0 for none",
    "seed": "of the weights, the batches and the masks",
}
CHOICES = {"method": ("dense", *METHODS), "optimizer": OPTIMIZERS}


def parser(description: str | None, recipe: Recipe) -> argparse.ArgumentParser:
    """A command line whose defaults are those of the recipe's presets."""
    lines = make_parser(description)
    lines.add_argument(
        "--preset", choices=recipe.presets, help="the scale (default: quick on --data, demo on phantoms)"
    )
    lines.add_argument("--model", default="e2enet", help="the network: e2enet, or a baseline such as nnunet")
    lines.add_argument("--width", type=float, default=1.0, help="multiplies the channels of a baseline (default: 1)")
    _add_data(lines.add_argument_group("data"), recipe)
    _add_run(lines.add_argument_group("run"), recipe)
    _add_execution(lines.add_argument_group("execution"))
    _add_training(lines.add_argument_group("training; without a value, the preset's"), recipe)
    return lines


def _add_data(group: argparse._ArgumentGroup, recipe: Recipe) -> None:
    kind, number = recipe.phantoms
    group.add_argument(
        "--data", type=Path, metavar="DIR", help=f"folder of the data set (default: procedural {kind} phantoms)"
    )
    group.add_argument("--layout", help="decathlon, amos, btcv or nnunet (default: recognised)")
    group.add_argument(
        "--modality", choices=recipe.modalities, default=recipe.modalities[0], help="(default: %(default)s)"
    )
    group.add_argument(
        "--fold",
        default="0",
        help="which fifth to hold out, 0 to 4, or 'all': train on every case and hold out the set's own "
        "validation cases, if it has any (default: 0)",
    )
    group.add_argument(
        "--cache", type=Path, metavar="DIR", help="where prepared scans are kept (default: runs/prepared/NAME)"
    )
    group.add_argument(
        "--scans", type=int, default=number, metavar="N", help="phantoms to draw, at least 5 (default: %(default)s)"
    )
    group.add_argument("--patch-size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels of a training patch")
    group.add_argument("--batch-size", type=int, metavar="N", help="patches per iteration, over all processes")


def _add_run(group: argparse._ArgumentGroup, recipe: Recipe) -> None:
    group.add_argument(
        "--run-dir",
        type=Path,
        dest="run",
        metavar="DIR",
        help=f"folder for the results (default: runs/{recipe.name}-DATE-TIME)",
    )
    group.add_argument("--resume", action="store_true", help="continue the run in --run-dir, with the same settings")
    group.add_argument(
        "--from", type=Path, dest="begin_from", metavar="DIR", help="begin with the weights and masks of this run"
    )
    group.add_argument(
        "--freeze-topology", action="store_true", help="keep the masks of --from as they are: only weights train"
    )
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard scalars too")


def _add_execution(group: argparse._ArgumentGroup) -> None:
    on_gpu = torch.cuda.is_available()
    group.add_argument("--device", help="(default: cuda if there is one, else cpu)")
    group.add_argument(
        "--precision", choices=PRECISIONS, help="of the forward pass (default: fp16 on a GPU, else float32)"
    )
    group.add_argument("--channels-last", action="store_true", help="lay features out as a GPU's tensor cores like")
    group.add_argument("--compile", action="store_true", help="compile the network by torch.compile")
    group.add_argument("--engine", action="store_true", help="compute on dstlib's engine, which is faster")
    group.add_argument(
        "--workers",
        type=int,
        default=8 if on_gpu else 0,
        metavar="N",
        help="processes that draw and augment the batches ahead (default: %(default)s)",
    )


def _add_training(group: argparse._ArgumentGroup, recipe: Recipe) -> None:
    presets = {name: asdict(preset.training) for name, preset in recipe.presets.items()}
    for name, value in asdict(recipe.presets["demo"].training).items():
        defaults = {preset: values[name] for preset, values in presets.items()}
        shown = ", ".join(f"{preset} {default}" for preset, default in defaults.items())
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            choices=CHOICES.get(name),
            metavar=None if name in CHOICES else "N",
            help=f"{HELP[name]} (default: {value if len(set(defaults.values())) == 1 else shown})",
        )
