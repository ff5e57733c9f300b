"""Train a sparse E2ENet on abdominal CT, fifteen organs (AMOS22).

    python examples/e2enet_amos.py                                      # phantoms: minutes on 2 cores, no download
    python examples/e2enet_amos.py --data amos22 --preset quick         # a small network on real scans
    python examples/e2enet_amos.py --data amos22 --preset paper --fold 0            # the paper's training, one fold
    torchrun --nproc-per-node 2 examples/e2enet_amos.py --data amos22 --preset paper    # on two GPUs
    python examples/e2enet_amos.py --method static                      # a random mask that never moves
    python examples/e2enet_amos.py --sparsity 0 --model nnunet          # a baseline, dense

From CT to MRI, as in the paper, with the topology kept:

    python examples/e2enet_amos.py --data amos22 --preset paper --modality mri --from runs/ct --freeze-topology \\
        --epochs 250

--data wants the folder with dataset.json, imagesTr and labelsTr (https://amos22.grand-challenge.org). The default is
procedural phantoms in the same layout: they show that everything works, not how well it does on patients.
"""

import sys

from dstlib.zoo.e2enet.cli import run_script
from dstlib.zoo.e2enet.recipes import AMOS_RECIPE

if __name__ == "__main__":
    sys.exit(run_script(AMOS_RECIPE, __doc__))
