"""What tests of the engine share."""

import pytest

from dstlib.engine import calls, library


@pytest.fixture(params=[*library.INSTRUCTION_SETS, "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that uses it runs by each path that this machine has."""
    found = None
    if request.param != "torch":
        binary = library._library()
        found = binary and library._kernels(binary, request.param)
        if not found:
            pytest.skip(f"no kernels for {request.param} here")
    monkeypatch.setattr(calls, "kernels", lambda: found)
    return request.param
