"""Files of safetensors, read whole, in memory of their own, or refused by name."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dstlib.bounds import available_memory
from dstlib.errors import StateError
from dstlib.files import read_whole
from dstlib.typed_json import parse_json

MAX_HEADER = 100_000_000  # bytes, as of the safetensors package


def read_safetensors(path: Path, *, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file, on the CPU, and the texts that it holds beside them.

    The format knows no checksum: what it holds is for the caller to check.

    Raises:
        StateError: There is no such file, it is larger than the memory that is left, damaged or of another kind;
            the error ends with ``remedy``.

    >>> read_safetensors(Path("model.safetensors"), remedy="Copy it again.")
    Traceback (most recent call last):
    dstlib.errors.StateError: file of model.safetensors: expected a whole safetensors file, got No such file or \
directory. Copy it again.
    """
    from safetensors import SafetensorError  # when first used: importing dstlib loads torch, numpy and einops alone
    from safetensors.torch import load

    where = str(path)
    try:
        # not mapped: what happens to the file later is no longer of interest. Half, as the tensors are copied.
        content = read_whole(path, max_bytes=available_memory() // 2)
        tensors = load(content)
    # Of a type or a shape that torch does not have, which error that is depends.
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        given = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
        allowed = "a whole safetensors file"
        raise StateError.of("file", where, allowed=allowed, given=given, remedy=remedy) from error
    of_header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    del content
    header = parse_json(of_header, dict[str, Any], where=where, remedy=remedy, max_bytes=MAX_HEADER)
    return tensors, header.get("__metadata__") or {}
