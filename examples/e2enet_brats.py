"""Train a sparse E2ENet on brain tumours in four MRI sequences (Medical Segmentation Decathlon, Task01).

    python examples/e2enet_brats.py                                         # phantoms: minutes on 2 cores
    python examples/e2enet_brats.py --data Task01_BrainTumour --preset quick            # a small network, real scans
    python examples/e2enet_brats.py --data Task01_BrainTumour --preset paper --fold 0   # the paper's training

--data wants the folder with dataset.json, imagesTr and labelsTr (http://medicaldecathlon.com).
"""

import sys

from dstlib.command_line import run_command
from dstlib.zoo.e2enet.cli import parser
from dstlib.zoo.e2enet.recipes import BRATS_RECIPE
from dstlib.zoo.e2enet.run import follow


def main() -> None:
    follow(BRATS_RECIPE, parser(__doc__, BRATS_RECIPE).parse_args())


if __name__ == "__main__":
    sys.exit(run_command(main))
