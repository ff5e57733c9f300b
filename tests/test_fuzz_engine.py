"""Random networks and lives of them on the engine, beside plain torch: a few here, thousands by ``fuzz_engine.py``."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import fuzz_engine
import pytest
from fuzz.events import EVENTS
from fuzz.worlds import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstlib.engine.runtime.library import INSTRUCTION_SETS, _kernels, _library

few = settings(max_examples=12, suppress_health_check=[*HealthCheck])
random_sources = st.randoms(use_true_random=False)


def _check(case: Case) -> None:
    _, fault = fuzz_engine.tried(case)
    assert fault is None or fuzz_engine.is_ill_conditioned(case, fault), f"{fault}\n{case}"


@given(random_sources)
@few
def test_networks_train_and_evaluate_as_in_torch(r: Random):
    _check(fuzz_engine.draw("network", r, fuzz_engine.PASSES))


@given(random_sources)
@few
def test_lives_go_as_in_torch(r: Random):
    _check(fuzz_engine.draw("life", r, sorted(EVENTS)))


@pytest.mark.long
@pytest.mark.parametrize("path", [*INSTRUCTION_SETS, "torch"])
def test_many_networks_and_lives_end_no_process_and_differ_nowhere(path: str):
    binary = _library()
    if path != "torch" and not (binary and _kernels(binary, path)):
        pytest.skip(f"no kernels for {path} here")
    command = [sys.executable, fuzz_engine.__file__, "--networks", "500", "--lives", "200", "--slow"]
    environment = os.environ | {"DSTLIB_ENGINE": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout[-2000:]
