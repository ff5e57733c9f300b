"""The command ``dstlib-nnunet``: lets nnU-Net find the trainers, and hands what they trained to the stock one.

What needs torch is imported by the command that needs it, once its options are read.
"""

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dstlib.command_line import make_parser
from dstlib.errors import DstlibError, StateError

VARIABLE = "nnUNet_extTrainer"
SHIM = Path(__file__).with_name("nnunet_shim")
_ABOUT = """Dynamic sparse training inside nnU-Net v2.

  eval "$(dstlib-nnunet env)"                               once per shell: nnU-Net finds the trainers
  dstlib-nnunet check                                       does it?
  nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDST_90     train sparse, as any other trainer
  dstlib-nnunet export fold_0/checkpoint_final.pth OUT.pth  the same weights for the stock trainer

Trainers: nnUNetTrainerDST (the planned U-Net, sparse), nnUNetTrainerE2ENet (dense), nnUNetTrainerE2ENetDST
(its fusion sparse). Parts of the name set the rest: _90 the sparsity, _rigl the method, _250epochs the length."""


def search_path(present: str | None) -> str:
    """Returns the value for ``nnUNet_extTrainer``: dstlib's folder, after those that the variable names already."""
    folders = [folder for folder in (present or "").split(os.pathsep) if folder and Path(folder) != SHIM]
    return os.pathsep.join([*folders, str(SHIM)])


def check(names: Sequence[str]) -> str:
    """Asks nnU-Net for the trainers as ``nnUNetv2_train`` would, and says where each was found.

    Raises:
        StateError: nnU-Net is missing, too old or broken, or does not find one.
    """
    try:
        installed = version("nnunetv2")
    except PackageNotFoundError as error:
        raise _failure("nnU-Net", "this Python", "v2.8 or later", "none", "pip install 'dstlib[nnunet]'") from error
    if tuple(int(part) for part in installed.split(".")[:2]) < (2, 8):
        raise _failure("nnU-Net", "this Python", "v2.8 or later", installed, "pip install -U 'nnunetv2>=2.8'")
    lines = [f"nnU-Net {installed}", f"{VARIABLE}={os.environ.get(VARIABLE, '')}"]
    return "\n".join(lines + [f"{name}: found in {_find(name)}" for name in names])


def _find(name: str) -> str:
    from dstlib.integrations.nnunet import TRAINERS, name_settings

    if name.startswith(TRAINERS):
        try:
            name_settings(name)
        except AttributeError as error:
            raise _failure("name", "the trainer", "one of dstlib's", str(error), "See dstlib-nnunet --help.") from error
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

        with contextlib.redirect_stdout(io.StringIO()):
            return str(find(name).__module__)
    except Exception as error:  # nnU-Net imports all of its trainers, and with them whatever they stand on
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = f'Run eval "$(dstlib-nnunet env)" in this shell, if {VARIABLE} is not set.'
        if "torchvision" in told:
            remedy = "Install the torchvision that belongs to your torch: its binary does not match."
        raise _failure("trainer", name, "one that nnU-Net finds", told, remedy) from error


def _failure(what: str, where: str, allowed: str, given: str, remedy: str) -> StateError:
    return StateError.of(what, where, allowed=allowed, given=given, remedy=remedy)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(_ABOUT, prog="dstlib-nnunet")
    parser.formatter_class = argparse.RawTextHelpFormatter  # nor are the lines on the commands wrapped
    commands = parser.add_subparsers(dest="command", required=True, metavar="env | check | export")
    commands.add_parser("env", help="print the line that makes nnU-Net find the trainers")
    checking = commands.add_parser("check", help="ask nnU-Net whether it finds them")
    checking.add_argument("trainers", nargs="*", help="names to look for (default: all three)")
    exporting = commands.add_parser("export", help="write a checkpoint for the stock trainer, and verify its weights")
    exporting.add_argument("checkpoint", type=Path, help="of a sparse trainer, fold_0/checkpoint_final.pth, say")
    exporting.add_argument(
        "out",
        type=Path,
        help="a new file; nnUNetv2_predict wants it as nnUNetTrainer__PLANS__CONFIGURATION/fold_0/"
        "checkpoint_final.pth, beside copies of plans.json and dataset.json",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; an error is one line, and exit status 1."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "env":
            print(f"export {VARIABLE}={shlex.quote(search_path(os.environ.get(VARIABLE)))}")
        elif args.command == "check":
            from dstlib.integrations.nnunet import TRAINERS

            print(check(args.trainers or TRAINERS))
        else:
            from dstlib.integrations.nnunet_checkpoint import STOCK, export_checkpoint

            counts = export_checkpoint(args.checkpoint, args.out)
            print(
                f"{args.out}: for {STOCK}; {counts.num_active:,} of {counts.num_total:,} entries active in "
                f"{counts.num_weights} sparse weights, every weight verified"
            )
    except DstlibError as error:
        sys.exit(f"dstlib-nnunet: {error}")


if __name__ == "__main__":
    main()
