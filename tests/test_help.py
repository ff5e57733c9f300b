"""A command line answers ``--help``, and a wrong option, before anything heavy is loaded.

Seconds differ from machine to machine; what is loaded does not. torch alone takes one or two.
"""

from pathlib import Path

import pytest
from commands import run_each

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
    [str(EXAMPLES / "e2enet_paper.py"), "--table", "99"],
    [str(EXAMPLES / "e2enet_paper.py"), "--table", "1", "--rows", "nobody"],
    ["dstlib.integrations.nnunet_cli", "--help"],
    ["dstlib.integrations.nnunet_cli", "env"],
]


@pytest.fixture(scope="module")
def told():
    """What a command loads is there for the next: the first to blame is named."""
    return dict(zip(map(tuple, COMMANDS), run_each(COMMANDS, watched=HEAVY), strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command).replace(f"{EXAMPLES}/", ""))
def test_nothing_heavy_is_loaded_before_a_command_line_is_read(told, command):
    code, output, errors, loaded = told[tuple(command)]
    assert not loaded, "by this command, or one before it"
    if command[-1] in ("--help", "env"):
        assert (code, errors) == (0, "")
        assert "usage: " in output or output.startswith("export ")
    else:
        assert (code, output) == (2, "")
        assert "error: " in errors
