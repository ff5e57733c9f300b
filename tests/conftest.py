"""What all tests share: one thread per process, Hypothesis without deadlines, and where the real scans lie."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # pytest runs several processes, and results must not depend on the number of cores
# Some tests press Ctrl-C, which shells let background jobs ignore; processes started by a test inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No deadlines, as a shared machine misses them. CI tries the same examples each time, so that a change is judged
# by what it changed; every other run looks for new ones. Of each law many are tried where the long tests run.
settings.register_profile("few", deadline=None, print_blob=True, derandomize="CI" in os.environ, max_examples=25)
settings.register_profile("many", settings.get_profile("few"), max_examples=100)


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the profile before any test is read, as settings take from it what they do not say."""
    settings.load_profile("few" if config.option.markexpr == "not long" else "many")


# torchvision's binary may not match the torch build, and `import timm` then fails for want of these operators.
# Declaring them lets the timm tests really run; the library itself never does this.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    with contextlib.suppress(RuntimeError):  # declared already, by a torchvision that matches
        _TORCHVISION.define(schema)


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """The folder of real scans, from DSTLIB_DATA or beside the repository; the test skips without it."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DSTLIB_DATA", beside)) / "Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip(f"the real scans are not here: no folder {folder.name} in $DSTLIB_DATA or ../shared/data")
    return folder


@pytest.fixture(autouse=True)
def _without_accelerators_of_other_tests() -> None:
    """Lets each test begin without the settings of Accelerate, which a process keeps for all its accelerators."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
