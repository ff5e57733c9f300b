"""Give another 3D network the shift and the sparse training of E2ENet: a minute on one CPU core, no download.

    python examples/shift_plugin.py                            # MONAI's DynUNet
    python examples/shift_plugin.py --network plainconvunet    # the network of nnU-Net
    python examples/shift_plugin.py --network unet             # MONAI's UNet
    python examples/shift_plugin.py --sparsity 0.9 --axis height

Its 3×3×3 convolutions become flat ones with a shift before each, and 80 % of their connections stay off, chosen
and changed by DSFF. The scans are procedural phantoms: they show that it works, not how well.
"""

import argparse
import sys

from dstlib.axes import AXES
from dstlib.command_line import make_parser, run_command
from dstlib.errors import require

NETWORKS = ("dynunet", "unet", "plainconvunet")


def checked(options: argparse.Namespace) -> argparse.Namespace:
    for name in ("steps", "scans", "interval"):
        given, remedy = getattr(options, name), "Leave it out for the default."
        require(given >= 1, f"--{name}", "the command line", allowed="a number from 1 up", given=given, remedy=remedy)
    return options


def main() -> None:
    lines = make_parser(__doc__)
    defaults = "(default: %(default)s)"
    option = lines.add_argument
    option("--network", choices=NETWORKS, default="dynunet", help=f"whose convolutions to change {defaults}")
    option("--axis", choices=AXES, default="depth", help=f"along which to shift {defaults}")
    option("--sparsity", type=float, default=0.8, help=f"share of connections that stay off {defaults}")
    option("--interval", type=int, default=10, help=f"steps between mask updates {defaults}")
    option("--steps", type=int, default=60, help=f"optimizer steps, one scan each {defaults}")
    option("--scans", type=int, default=8, help=f"how many phantoms to draw {defaults}")
    option("--seed", type=int, default=0, help=f"of weights and masks {defaults}")
    options = checked(lines.parse_args())

    from shift_plugin_training import compare

    compare(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
