"""Train a sparse E2ENet on abdominal CT, thirteen organs (BTCV, "Beyond the Cranial Vault").

    python examples/e2enet_btcv.py                                      # phantoms: minutes on 2 cores, no download
    python examples/e2enet_btcv.py --data Abdomen --preset quick        # a small network on real scans
    python examples/e2enet_btcv.py --data Abdomen --preset paper --fold 0           # the paper's training, one fold

--data wants the folder Abdomen/RawData as Synapse gives it (syn3193805): Training/img and Training/label.
"""

import sys

from dstlib.zoo.e2enet.cli import run_script
from dstlib.zoo.e2enet.recipes import BTCV_RECIPE

if __name__ == "__main__":
    sys.exit(run_script(BTCV_RECIPE, __doc__))
