"""Commands run one after the other in one process: one of its own for each would load torch as often."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

_SCRIPT = """
import contextlib, io, json, os, runpy, sys
watched, commands = json.loads(sys.argv[1])
told = []
for command in commands:
    sys.argv = command
    sys.path[0] = os.path.dirname(command[0])  # as of any script
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            by = runpy.run_path if command[0].endswith(".py") else runpy.run_module
            by(command[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    told.append([code or 0, out.getvalue(), errors.getvalue(), [name for name in watched if name in sys.modules]])
print(json.dumps(told))
"""


class Told(NamedTuple):
    """How a command ended; ``loaded`` are the modules that were watched for and are there by now."""

    code: int
    output: str
    errors: str
    loaded: list[str]


def run_each(commands: Sequence[Sequence[str]], *, watched: Sequence[str] = ()) -> list[Told]:
    """Runs the scripts, or modules, that the commands name, with what follows as their arguments."""
    asked = json.dumps([list(watched), [list(command) for command in commands]])
    done = subprocess.run([sys.executable, "-c", _SCRIPT, asked], capture_output=True, text=True, check=True)
    return [Told(*each) for each in json.loads(done.stdout)]
