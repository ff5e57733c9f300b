"""Writes what dstlib computes today, for tests/test_golden.py to hold later changes to it, bit for bit.

    python tests/golden/write.py           # all files, in about a minute
    python tests/golden/write.py runs      # one part of them

To be run where results are meant to change, and only there; the commit then says which, and why. The files are
described in tests/golden/__init__.py, together with what may differ between machines.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `golden` is a package of the tests

from golden.engine import print_engine, write_engine
from golden.recipe import write_recipe
from golden.runs import write_runs, write_states

PARTS = {"runs": write_runs, "states": write_states, "engine": write_engine, "recipe": write_recipe}


def main() -> None:
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument(
        "part",
        nargs="?",
        choices=(*PARTS, "print-engine"),
        help="default: all but print-engine, which writes nothing and prints what this process's kernels compute",
    )
    chosen = lines.parse_args().part
    torch.set_num_threads(1)
    if chosen == "print-engine":
        print_engine()
    else:
        for write in [PARTS[chosen]] if chosen else PARTS.values():
            write()


if __name__ == "__main__":
    main()
