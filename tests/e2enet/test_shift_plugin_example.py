"""The plug-in's example as a user runs it: what it prints, refuses, and how its loss falls."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "shift_plugin.py"
TINY = ("--steps", "5", "--scans", "1", "--interval", "2")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script in this process: its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as of any script
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("network", ["dynunet", "unet", "plainconvunet"])
def test_a_network_becomes_flat_shifted_and_sparse_and_learns(example: Run, network: str) -> None:
    code, output, errors = example("--network", network, *TINY)
    assert code == 0, errors
    params = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters  ", output)]
    flops = [float(number) for number in re.findall(r"([\d.]+) GFLOPs", output)]
    assert params == sorted(params, reverse=True)
    assert flops == sorted(flops, reverse=True)
    assert len(set(params)) == len(set(flops)) == 3
    num_shifted = int(re.search(r"^shifted: (\d+)$", output, re.MULTILINE)[1])
    assert output.count("3×3×3 → 1×3×3") == num_shifted
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)$", output, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    last = re.search(rf"^{num_shifted} sparse weights: ([\d,]+) of ([\d,]+) entries", output, re.MULTILINE)
    active, total = (int(number.replace(",", "")) for number in last.groups())
    assert abs(active - 0.2 * total) <= 9 * num_shifted / 2  # each weight to the nearest whole kernel of 9 taps
    assert "train: 100%" in errors


def test_another_axis(example: Run) -> None:
    code, output, _ = example("--network", "unet", "--axis", "width", "--steps", "1", "--scans", "1", "--interval", "1")
    assert code == 0
    assert "3×3×3 → 3×3×1" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "error: --steps of the command line: expected a number from 1 up, got 0."),
        (("--scans", "-1"), "error: --scans of the command line"),
        (("--interval", "0"), "error: --interval of the command line"),
        (("--sparsity", "1.5"), "error: sparsity of sparsify()"),
    ],
)
def test_what_cannot_be_used_is_one_line(example: Run, arguments: tuple[str, ...], message: str) -> None:
    code, _, errors = example(*arguments)
    assert code == 2
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_help_names_every_option_and_its_default(example: Run) -> None:
    code, output, _ = example("--help")
    assert code == 0
    for name in ("network", "axis", "sparsity", "interval", "steps", "scans", "seed"):
        assert f"--{name}" in output
    assert output.count("(default:") == 7
    assert "python examples/shift_plugin.py" in output
