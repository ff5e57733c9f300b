"""Pages of documentation as programs: their Python runs, block after block, and prints what they say."""

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch


def run_page(path: Path, namespace: dict[str, Any], *, least: int, host: str | None = None) -> None:
    """Runs the Python blocks of a page, at least so many; a text block shows what the one before it printed.

    A page that warns fails, but for warnings by the package ``host``, in which all of the page takes place.
    """
    blocks = re.findall(r"```(python|text)\n(.*?)```", path.read_text(), flags=re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") >= least
    printed = ""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if host is not None:
            warnings.filterwarnings("ignore", module=host)
        for kind, text in blocks:
            if kind == "text":
                assert printed.strip() == text.strip()
                continue
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, path.name, "exec"), namespace)
            printed = out.getvalue()
