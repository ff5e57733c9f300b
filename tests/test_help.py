"""A command line answers ``--help``, and a wrong option, before anything heavy is loaded.

Seconds differ from machine to machine; what is loaded does not. torch alone takes one or two.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HEAVY = ("torch", "monai", "scipy", "nibabel", "matplotlib", "SimpleITK", "dynamic_network_architectures", "nnunetv2")
ZOO = "dstlib.zoo.e2enet"
COMMANDS = [
    *(
        [ZOO, *command, option]
        for command in ([], ["check"], ["predict"], ["evaluate"])
        for option in ("--help", "--no")
    ),
    *([ZOO, command, "--help"] for command in ("compare", "phantoms")),
    [ZOO, "check", "/nowhere/at/all"],
    *([str(script), "--help"] for script in sorted(EXAMPLES.glob("e2enet_*.py"))),
    *([str(EXAMPLES / name), "--help"] for name in ("cifar10.py", "shift_plugin.py")),
    *([str(EXAMPLES / name), "--no"] for name in ("e2enet_amos.py", "cifar10.py", "shift_plugin.py")),
    ["dstlib.integrations.nnunet_cli", "--help"],
    ["dstlib.integrations.nnunet_cli", "env"],
]
# In one process, one after the other: what a command loads is there for the next, and the first to blame is named.
SCRIPT = """
import contextlib, io, json, os, runpy, sys
heavy, commands = json.loads(sys.argv[1])
told = {}
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
    loaded = [name for name in heavy if name in sys.modules]
    told[" ".join(command)] = code, loaded, out.getvalue(), errors.getvalue()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told():
    asked = json.dumps([HEAVY, COMMANDS])
    done = subprocess.run([sys.executable, "-c", SCRIPT, asked], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command).replace(f"{EXAMPLES}/", ""))
def test_nothing_heavy_is_loaded_before_a_command_line_is_read(told, command):
    code, loaded, output, errors = told[" ".join(command)]
    assert not loaded, "by this command, or one before it"
    if command[-1] in ("--help", "env"):
        assert (not code, errors) == (True, "")
        assert "usage: " in output or output.startswith("export ")
    else:
        assert (code, output) == (2, "")
        assert "error: " in errors
