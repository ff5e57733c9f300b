"""The tables and figures of the E2ENet paper, each by one command: every row trained where it is missing, then shown
beside what the paper prints.

    python examples/e2enet_paper.py --table 8                           # phantoms, tiny: to see that it all runs
    python examples/e2enet_paper.py --table 1 --data amos22             # small networks on real scans
    python examples/e2enet_paper.py --table 2 4 --data Task01_BrainTumour --scale paper --folds 0 1 2 3 4
    python examples/e2enet_paper.py --table 6 --data amos22 --mri amos22                        # from CT to MRI
    python examples/e2enet_paper.py --table 1 --figure 7 --recipe hippocampus --data Task04_Hippocampus \\
        --rows e2enet-0.8 nnunet unetr --folds 0 1 --cpu-minutes 3      # any set, any rows, equal CPU time

A run is one system, fold and seed, in a folder of its own under --runs, and every table and figure that needs it takes
it from there. A finished one is not trained again and a stopped one is continued: the command may be stopped at any
time and given again. Tables stay there as text and as JSON.
"""

import sys

from dstlib.command_line import run_command
from dstlib.zoo.e2enet.cli import read_config
from dstlib.zoo.e2enet.paper.command import run_paper

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_paper(__doc__, read_config)))
