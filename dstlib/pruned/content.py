"""What a file, a folder or a state holds: masks of a known tool, plain masks, or weights with zeros."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.errors import SelectionError, StateError, few
from dstlib.export.compact import load_compact, load_masks
from dstlib.pruned.compressed_tensors import FORMATS
from dstlib.pruned.tools import TOOLS, State, Tool
from dstlib.pruned.values import as_mask
from dstlib.safetensors_files import read_safetensors
from dstlib.torch_files import read_torch
from dstlib.typed_json import read_json

_COPY_AGAIN = "Copy it again from where it was written."
_KNOWN = (
    "tensors of masks by the names of weights, a state of torch.nn.utils.prune, rigl-torch, NNCF or compressed-tensors"
)


@dataclass(frozen=True)
class FoundMasks:
    """Masks by name as they were saved; ``of_zeros``: they say where weights are not zero, of all weights in a file."""

    masks: Mapping[str, Tensor]
    where: str
    of_zeros: bool = False


def find_masks(source: str | Path | State, model: nn.Module, *, tools: Sequence[Tool] = TOOLS) -> FoundMasks:
    """Returns the masks in a file or folder, or in what was loaded of one, as truth values.

    Of a file that holds weights alone, the masks are where these are not zero.

    Raises:
        StateError: There is no such file, it is damaged, or of another model.
        SelectionError: It holds no masks.
    """
    where = "masks" if isinstance(source, Mapping) else f"masks {source}"
    content = source if isinstance(source, Mapping) else _read(Path(source))
    if isinstance(content, _Compact):
        saved = load_masks(content.path)
        zeros = {} if saved else {name: x != 0 for name, x in load_compact(content.path).items()}
        return FoundMasks(saved or zeros, where, of_zeros=not saved)
    tool, state = _part(content, tools, where)
    if tool is not None:
        found = tool.masks(state, model)
        return FoundMasks({name: as_mask(x, name, where) for name, x in found.items()}, f"{where}, of {tool.name}")
    if isinstance(source, Mapping) or all(isinstance(x, Tensor) and _is_of_truth(x) for x in state.values()):
        return FoundMasks({name: as_mask(x, name, where) for name, x in state.items()}, where)
    return FoundMasks({n: x != 0 for n, x in state.items() if isinstance(x, Tensor)}, where, of_zeros=True)


def read_weights(source: str | Path | State) -> dict[str, Tensor]:
    """Returns the weights of a sparse checkpoint as ``load_state_dict`` of the plain model takes them, zeros and all.

    Read are files of ``torch.save`` and safetensors, folders as the transformer library saves them, and the state dicts
    of models that ``torch.nn.utils.prune`` or NNCF 3.4 has pruned; the formats ``sparse-bitmask`` and
    ``sparse-24-bitmask`` of compressed-tensors 0.12 are unpacked; and so are compact files of dstlib. ``source`` is a
    path or what was loaded of it. Nothing in a file runs code.

    Raises:
        StateError: There is no such file, it is damaged, or it holds no weights, or more than tensors.
        SelectionError: A mask in it is none, or of another shape than its weight.

    >>> read_weights({"0.weight_orig": torch.tensor([3.0, 4.0]), "0.weight_mask": torch.tensor([0.0, 1.0])})
    {'0.weight': tensor([0., 4.])}
    """
    where = "read_weights()" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else _read(Path(source))
    if isinstance(content, _Compact):
        return load_compact(content.path)
    tool, state = _part(content, TOOLS, where)
    weights = state if tool is None else {} if tool.weights is None else dict(tool.weights(state))
    if not weights:
        allowed, given = "weights", f"masks of {tool.name} alone" if tool else "none"
        remedy = "Load the weights from the file of the model, and pass these masks to sparsify()."
        raise StateError.of("content", where, allowed=allowed, given=given, remedy=remedy)
    for name, x in weights.items():
        if not isinstance(x, Tensor) or x.is_quantized:
            remedy = "Load it, and pass the tensors in it, dequantized if they hold codes."
            given = f"one of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise StateError.of(name, where, allowed="a tensor of numbers", given=given, remedy=remedy)
    masks = {} if tool is None else tool.masks(state, nn.Module())
    return {name: x if name not in masks else _masked(x, masks[name], name, where) for name, x in weights.items()}


def _masked(weight: Tensor, value: Any, name: str, where: str) -> Tensor:
    mask = as_mask(value, name, where)
    if weight.shape != mask.shape:
        allowed = f"a weight of the shape of its mask, {tuple(mask.shape)}"
        raise SelectionError.of(name, where, allowed=allowed, given=tuple(weight.shape), remedy=_COPY_AGAIN)
    return torch.where(mask.to(weight.device), weight.detach(), torch.zeros_like(weight))


def _is_of_truth(x: Tensor) -> bool:
    return x.dtype == torch.bool or not bool(((x != 0) & (x != 1)).any())


# ---- which part of it


def _part(content: Any, tools: Sequence[Tool], where: str) -> tuple[Tool | None, State]:
    """Returns the state in some content that a tool saved, or else the only one of tensors: itself, or one below it."""
    candidates = [(name, state) for name, state in (("", content), *_below(content)) if _is_named(state)]
    pruned = [(name, tool, state) for name, state in candidates for tool in tools if tool.is_pruned(state)]
    plain = [(name, None, state) for name, state in candidates if _is_plain(state)]
    found: Sequence[tuple[str, Tool | None, State]] = pruned or plain
    if len(found) != 1:
        given = f"several, {few([name or 'itself' for name, _, _ in found])}" if found else _described(content)
        remedy = "Load it, and pass the part with the masks, or with the sparse weights."
        raise SelectionError.of("content", where, allowed=_KNOWN, given=given, remedy=remedy)
    return found[0][1:]


def _below(content: Any) -> Iterator[tuple[str, State]]:
    if isinstance(content, Mapping):
        yield from ((str(name), part) for name, part in content.items())


def _is_named(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(name, str) for name in state)


def _is_plain(state: State) -> bool:
    return any(isinstance(x, Tensor) for x in state.values())


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    parts = [f"{str(key)[:60]} ({type(part).__name__})" for key, part in content.items()]
    return f"{type(content).__name__} with {few(parts, most=5) or 'nothing in it'}"


# ---- files and folders


@dataclass(frozen=True)
class _Compact:
    """A compact file of dstlib, which has a reader of its own."""

    path: Path


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" and not path.is_dir()


def _read(path: Path) -> Any:
    """Reads a file of safetensors or of torch, or a folder as the transformer library saves one."""
    if path.is_dir():
        return _read_folder(path)
    if _is_safetensors(path):
        _check_format(path.parent / "config.json")
        tensors, texts = read_safetensors(path, remedy=_COPY_AGAIN)
        return _Compact(path) if "dstlib" in texts else tensors
    return read_torch(path, where=f"folder {path.parent}", allowed="tensors and plain values", remedy=_COPY_AGAIN)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    _check_format(folder / "config.json")
    if whole.exists() or not index.exists():
        return read_safetensors(whole, remedy="Pass the folder that save_pretrained() wrote, or a file.")[0]
    table = read_json(index, dict[str, Any], remedy=_COPY_AGAIN).get("weight_map")
    names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    if not names or any(re.fullmatch(r"[\w.-]+\.safetensors", name) is None for name in names):
        allowed = "a weight_map to files of safetensors beside it"
        raise StateError.of("index", str(index), allowed=allowed, given=few(names, most=3), remedy=_COPY_AGAIN)
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_safetensors(folder / name, remedy=_COPY_AGAIN)[0]
    return state


def _check_format(config: Path) -> None:
    """Checks that sparse weights, if a configuration tells of any, are stored in a format that is known here."""
    if not config.exists():
        return
    content: Any = read_json(config, dict[str, Any], remedy=_COPY_AGAIN)
    for key in ("quantization_config", "sparsity_config"):
        content = content.get(key) if isinstance(content, dict) else None
    if isinstance(content, dict) and content.get("format") not in FORMATS:
        allowed, remedy = " or ".join(FORMATS), "Unpack the weights by the release that wrote them."
        given = str(content.get("format"))[:60]
        raise StateError.of("sparsity_config.format", str(config), allowed=allowed, given=given, remedy=remedy)
