"""Files of named tensors in the safetensors format, byte for byte as that package writes them.

A file is the length of a header in 8 bytes, the header in JSON, then the tensors' raw bytes without gaps; all numbers
are little-endian. Nothing in it is ever executed. See https://github.com/huggingface/safetensors.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstlib.errors import StateError
from dstlib.files import write_whole

_DTYPES = {  # in the order of the package, which puts the last ones first in a file: so all tensors are aligned
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the tensors, of any device and layout in memory, and text beside them; whole or not at all.

    Raises:
        StateError: A tensor is of a type that the format does not know, or the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/two.safetensors", {"two": torch.tensor([1.5, 2.0])}, {"why": "to show"})
    ...     read_tensors(f"{folder}/two.safetensors")
    ({'two': tensor([1.5000, 2.0000])}, {'why': 'to show'})
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            allowed, given = "a dense tensor of " + ", ".join(_DTYPES), f"{tensor.dtype} ({tensor.layout})"
            remedy = "Convert it before saving."
            raise StateError.of(f"tensor {name}", path.name, allowed=allowed, given=given, remedy=remedy)
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = bytearray(len(text).to_bytes(8, "little") + text)
    for name in order:
        content += raw_bytes(tensors[name]).data
    write_whole(path, memoryview(content))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, each with memory of its own, and the text beside them.

    Raises:
        StateError: The file is missing, cut off, damaged in its header, or of another format.
    """
    path = Path(path)
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise _not_one(path, error.strerror or str(error)) from error
    length = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or length > len(content) - 8:
        raise _not_one(path, f"{len(content)} bytes, which end within the header")
    data = content[8 + length :]
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
        metadata = {str(key): str(text) for key, text in header.pop("__metadata__", {}).items()}
        spans = {name: _span(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _not_one(path, f"a header that cannot be read ({type(error).__name__})") from error
    end = 0
    for start, stop in sorted(spans.values()):
        if start != end:
            raise _not_one(path, f"a gap or an overlap of tensors at byte {end}")
        end = stop
    if end != len(data):
        raise _not_one(path, f"{len(data)} bytes of tensors where its header promises {end}")
    tensors = {}
    for name, (start, stop) in spans.items():
        tensor = torch.empty(header[name]["shape"], dtype=_DTYPES[header[name]["dtype"]])
        tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(data[start:stop]))
        tensors[name] = tensor
    return tensors, metadata


def raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, in the order of its entries, as a numpy array of uint8.

    >>> raw_bytes(torch.tensor([1, 256], dtype=torch.int16)).tolist()
    [1, 0, 0, 1]
    """
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    """From which byte to which the tensor lies; ValueError if that does not fit its type and shape."""
    start, stop = entry["data_offsets"]
    shape = entry["shape"]
    numbers = (start, stop, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("no whole numbers")
    if stop - start != prod(shape) * _DTYPES[entry["dtype"]].itemsize:
        raise ValueError("another size than its shape has")
    return start, stop


def _not_one(path: Path, given: str) -> StateError:
    remedy = "Copy the file again from where it was written."
    return StateError.of("file", str(path), allowed="a whole safetensors file", given=given, remedy=remedy)
