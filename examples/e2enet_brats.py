"""Train a sparse E2ENet on brain tumours in four MRI sequences (Medical Segmentation Decathlon, Task01).

    python examples/e2enet_brats.py                                         # phantoms: minutes on 2 cores
    python examples/e2enet_brats.py --data Task01_BrainTumour --preset quick            # a small network, real scans
    python examples/e2enet_brats.py --data Task01_BrainTumour --preset paper --fold 0   # the paper's training

--data wants the folder with dataset.json, imagesTr and labelsTr (http://medicaldecathlon.com).
"""

import sys

from dstlib.zoo.e2enet.cli import run_script
from dstlib.zoo.e2enet.recipes import BRATS_RECIPE

if __name__ == "__main__":
    sys.exit(run_script(BRATS_RECIPE, __doc__))
