"""Train a sparse E2ENet on the hippocampus scans of the Medical Segmentation Decathlon (Task04).

    python examples/e2enet_hippocampus.py --data Task04_Hippocampus                      # DSFF, 80 % sparse
    python examples/e2enet_hippocampus.py --data Task04_Hippocampus --method static      # a mask that never moves
    python examples/e2enet_hippocampus.py --data Task04_Hippocampus --sparsity 0         # dense
    python examples/e2enet_hippocampus.py --data Task04_Hippocampus --model nnunet       # nnU-Net's network

Each takes about twenty minutes on two idle CPU cores, and ends with the scores of the held-out fifth of the scans.
--data wants the folder with dataset.json, imagesTr and labelsTr (http://medicaldecathlon.com, 27 MB); without it,
small phantoms show that everything works.
"""

import sys

from dstlib.zoo.e2enet.cli import run_script
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE

if __name__ == "__main__":
    sys.exit(run_script(HIPPOCAMPUS_RECIPE, __doc__))
