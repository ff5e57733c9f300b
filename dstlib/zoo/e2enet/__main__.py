"""``python -m dstlib.zoo.e2enet``: the commands of :mod:`dstlib.zoo.e2enet.cli`."""

import sys

from dstlib.zoo.e2enet.cli import main

if __name__ == "__main__":
    sys.exit(main())
