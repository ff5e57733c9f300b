"""Command lines that all parse, refuse and stop alike: the scripts of the zoo, the examples and the benchmarks."""

import argparse
import sys
from collections.abc import Callable

from dstlib.errors import DstlibError


def make_parser(
    description: str | None, *, prog: str | None = None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Returns a parser that shows its description as it is written, and takes options by their whole names only."""
    as_written = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog, description=description, epilog=epilog, formatter_class=as_written, allow_abbrev=False
    )


def run_command(main: Callable[[], int | None], *, interrupted: str = "Interrupted.") -> int:
    """Runs a script and returns its exit code; an error is one line on stderr, and no traceback.

    What ``main`` returns is the code, None being 0: done. 2 stands for something given that cannot be used, 130 for
    an interruption, of which the message of the ``KeyboardInterrupt`` is shown, or else ``interrupted``.

    >>> run_command(lambda: None)
    0
    """
    try:
        return main() or 0
    except DstlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\n{interruption if interruption.args else interrupted}", file=sys.stderr)
        return 130
