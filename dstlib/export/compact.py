"""Sparse models on disk in the room that their active weights need, bit for bit.

A compact file is a safetensors file. Each weight is stored as its active units only, in order, and a pattern that says
where they belong. A unit is what follows the first axes of a weight: an element, a kernel, a row; the file says how
many axes that is. What does not become smaller so, and every vector, is stored as it is; tied tensors are stored once.

Shapes: U units, E elements of a unit.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dstlib.bounds import require_memory
from dstlib.errors import StateError, require, shown
from dstlib.files import write_whole
from dstlib.masking.update import count_outside
from dstlib.safetensors_files import MAX_HEADER, read_safetensors
from dstlib.targets import Held, Masked, held_weights, mask_key, plain_name, refuse_outside, unwrap
from dstlib.typed_json import parse_json

FORMAT = "dstlib.compact/1"
_ENTRY = 128  # bytes that one more tensor takes in the header of a file, about
_TYPES = (  # that the format has
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float8_e5m2, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64),
)
_COPY_AGAIN = "Copy the file again from where it was written."
_NUM_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # of each byte
_MAX_AXES = 64  # of torch


@dataclass(frozen=True)
class _Whole:
    """A tensor that is stored as it is."""


@dataclass(frozen=True)
class _Alias:
    """A tensor that is another one, which comes before it."""

    same_as: str


@dataclass(frozen=True)
class _Units:
    """A tensor of which the active units are stored, with the pattern that says where they belong."""

    shape: tuple[int, ...]
    axes: int  # how many axes count units
    is_mask: bool

    @property
    def num_units(self) -> int:
        return prod(self.shape[: self.axes])

    @property
    def unit_size(self) -> int:
        return prod(self.shape[self.axes :])


_Entry = _Alias | _Units | _Whole  # in this order: the last has no field


@dataclass(frozen=True)
class _Description:
    """What a file says of itself, beside its tensors."""

    format: str
    entries: str  # JSON again, as the checksum is that of its text
    checksum: int


def save_compact(model: nn.Module, path: str | Path, *, sparsifier: Masked | None = None) -> None:
    """Writes the ``state_dict`` of a model, of which inactive weights take no room.

    Without a sparsifier inactive is what is +0.0, so a model that was loaded or pruned elsewhere will do. Every bit
    comes back, that of -0.0 too, which is stored as an active weight is: ``weight += 0.0`` makes +0.0 of what
    ``weight * mask`` left. With a sparsifier, the file holds its masks as well (:func:`load_masks`), and active
    weights that happen to be zero are among the stored ones.

    The file appears whole or not at all. It is a safetensors file, though one that names weights in its own way: load
    it by :func:`load_compact`.

    Raises:
        StateError: The model holds a state that is no tensor, or weights outside the masks that are not zero.

    >>> import tempfile
    >>> layer = nn.Linear(100, 100)
    >>> with torch.no_grad():
    ...     layer.weight[:, 10:] = 0
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compact(layer, f"{folder}/layer.safetensors")
    ...     kilobytes = Path(f"{folder}/layer.safetensors").stat().st_size // 1000
    ...     same = torch.equal(load_compact(f"{folder}/layer.safetensors")["weight"], layer.weight)
    >>> kilobytes, same
    (6, True)
    """
    from safetensors.torch import save  # when first used: importing dstlib loads torch, numpy and einops alone

    masks = dict(sparsifier.masks) if sparsifier is not None else {}
    named, held = _named_state(model), held_weights(unwrap(model))
    entries: dict[str, _Entry] = {}
    stored: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    found: dict[str, int] = {}
    for name, tensor in named.items():
        if (twin := first.setdefault(id(tensor), name)) != name:
            entries[name] = _Alias(twin)
            continue
        mask = next((masks.pop(n) for n, other in named.items() if other is tensor and n in masks), None)
        form = _Active.of(held[name]) if name in held else _Dense(tensor.detach().cpu())
        if mask is not None and (count := _count_outside(name, form, mask)):
            found[name] = count
        if (packed := _pack(form, mask)) is None:
            entries[name], stored[f"values/{name}"] = _Whole(), form.whole()
        else:
            entries[name] = _Units(tuple(form.shape), packed.axes, mask is not None)
            stored[f"values/{name}"], stored[f"pattern/{name}"] = packed.values, packed.pattern
    refuse_outside(found, "save_compact()", "Without a sparsifier, save_compact(model, path) stores all of them.")
    allowed, remedy = "weights of the model alone", "Pass the sparsifier of this model."
    given = ", ".join(masks)
    require(not masks, "masks", "save_compact()", allowed=allowed, given=given, remedy=remedy, error=StateError)
    text = json.dumps({name: asdict(entry) for name, entry in entries.items()})
    described = json.dumps(asdict(_Description(FORMAT, text, _checksum(text, stored))))
    # copies, as the package refuses tensors that share memory, and views of one buffer do
    copies = {name: _in_order(x).clone() for name, x in stored.items()}
    write_whole(Path(path), save(copies, {"dstlib": described}))


def load_compact(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Returns the ``state_dict`` that :func:`save_compact` was given, and puts it into a model, if one is passed.

    The tensors are on the CPU; those of the model stay where they are.

    Raises:
        StateError: The file is missing, cut off, damaged or of another format, or it belongs to a model of other
            names, shapes or types. The model has not been changed then.
    """
    entries, stored = _read(Path(path))
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if isinstance(entry, _Alias):
            state[name] = state[entry.same_as]
        elif isinstance(entry, _Units):
            values = stored[f"values/{name}"]
            units_UE = values.new_zeros(entry.num_units, entry.unit_size)
            active = _active_units(stored[f"pattern/{name}"], entry.num_units)
            units_UE.view(torch.uint8)[active] = values.view(torch.uint8)  # not all types can be indexed
            state[name] = units_UE.reshape(entry.shape)
        else:
            state[name] = stored[f"values/{name}"]
    if model is not None:
        _put(state, model, Path(path))
    return state


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Returns the masks of the sparsifier that :func:`save_compact` was given, by parameter name; none without one.

    Raises:
        StateError: The file is missing, cut off, damaged or of another format.
    """
    entries, stored = _read(Path(path))
    masks = {}
    for name, entry in entries.items():
        if isinstance(entry, _Units) and entry.is_mask:
            active = _active_units(stored[f"pattern/{name}"], entry.num_units)
            masks[name] = active.reshape(-1, 1).expand(-1, entry.unit_size).reshape(entry.shape)
    return masks


class _Packed(NamedTuple):
    """A tensor as its active units, and where they belong."""

    axes: int  # how many axes count units
    values: Tensor  # active units × elements of each
    pattern: Tensor  # a bit per unit in uint8, or the indices of the active ones in int32 or int64


@dataclass(frozen=True)
class _Dense:
    """A tensor, as one that is to be packed."""

    x: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def alive(self) -> Tensor:
        """Returns where it is anything but +0.0, as a column."""
        return _has_bits(self.x)

    def units(self, active_U: Tensor) -> Tensor:
        """Returns the active ones of its units (U), (active, E)."""
        return self.x.reshape(len(active_U), -1)[active_U]

    def whole(self) -> Tensor:
        return self.x

    def count_outside(self, mask: Tensor) -> int:
        return count_outside(self.x, mask.cpu())


@dataclass(frozen=True)
class _Active:
    """A tensor of which the values (A) at rising places exist, as one that is to be packed."""

    values: Tensor
    places: Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @classmethod
    def of(cls, held: Held) -> "_Active":
        places, order = held.places().cpu().sort()
        taps = torch.arange(held.dense_shape[2:].numel())
        values = held.values.detach().cpu()[order].flatten()
        return cls(values, (places[:, None] * len(taps) + taps).flatten(), held.dense_shape)

    def alive(self) -> Tensor:
        """Returns where it is anything but +0.0, as a column."""
        alive = torch.zeros(self.shape.numel(), dtype=torch.bool)
        return alive.index_copy_(0, self.places, _has_bits(self.values).flatten())[:, None]

    def units(self, active_U: Tensor) -> Tensor:
        """Returns the active ones of its units (U), (active, E)."""
        size = self.shape.numel() // len(active_U)
        unit, number = self.places.div(size, rounding_mode="floor"), active_U.cumsum(0) - 1
        is_in = active_U[unit]
        found = self.values.new_zeros(int(active_U.sum()) * size)
        found[(number[unit] * size + self.places % size)[is_in]] = self.values[is_in]
        return found.view(-1, size)

    def whole(self) -> Tensor:
        return self.units(torch.ones(1, dtype=torch.bool)).view(self.shape)

    def count_outside(self, mask: Tensor) -> int:
        return int((self.values[~mask.cpu().flatten()[self.places]] != 0).sum())


def _pack(x: _Dense | _Active, mask: Tensor | None) -> _Packed | None:
    """Finds the smallest form of x, None where that is x as it is; the pattern is the mask where there is one."""
    shape, num_total = x.shape, x.shape.numel()
    if len(shape) < 2 or num_total == 0:
        return None
    alive = mask.cpu().reshape(-1, 1) if mask is not None else x.alive()
    forms: list[tuple[int, int, Tensor, Tensor]] = []  # bytes, axes, active units, pattern
    for axes in sorted({1, 2, len(shape)}):
        num_units = prod(shape[:axes])
        alive_UE = alive.reshape(num_units, -1)
        active_U = alive_UE.any(dim=1)
        if mask is not None and not torch.equal(active_U, alive_UE.all(dim=1)):
            continue  # a mask is to come back as it was
        index = active_U.nonzero().flatten().to(torch.int32 if num_units < 2**31 else torch.int64)
        bits = torch.from_numpy(np.packbits(active_U.numpy(), bitorder="little"))
        pattern = min(bits, index, key=lambda pattern: pattern.numel() * pattern.element_size())
        num_bytes = len(index) * (num_total // num_units) * x.dtype.itemsize + pattern.numel() * pattern.element_size()
        forms.append((num_bytes, axes, active_U, pattern))
    num_bytes, axes, active_U, pattern = min(forms, key=lambda form: form[0])
    pays = num_bytes + _ENTRY < num_total * x.dtype.itemsize
    return _Packed(axes, x.units(active_U), pattern) if pays or mask is not None else None


def _has_bits(x: Tensor) -> Tensor:
    """Returns where x is anything but +0.0, as a column; NaN and -0.0 are."""
    return x.contiguous().reshape(-1, 1).view(torch.uint8).any(dim=1).bool()


def _active_units(pattern: Tensor, num_units: int) -> Tensor:
    """Returns which units (U) are active by a stored pattern, of bits or of indices."""
    if pattern.dtype == torch.uint8:
        return torch.from_numpy(np.unpackbits(pattern.numpy(), count=num_units, bitorder="little").astype(bool))
    active = torch.zeros(num_units, dtype=torch.bool)
    active[pattern.long()] = True
    return active


def _named_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns all that a ``state_dict`` holds, by its names without wrappers; tied tensors are one object."""
    state = {plain_name(name): value for name, value in unwrap(model).state_dict(keep_vars=True).items()}
    for name in held_weights(unwrap(model)):
        del state[mask_key(name)]  # a tensor of its own, made of the places that are written anyway
    for name, value in state.items():
        if not isinstance(value, Tensor):
            allowed, remedy = "a tensor", "Save a model without extra state, or use torch.save."
            raise StateError.of(name, "the model", allowed=allowed, given=type(value).__name__, remedy=remedy)
        if value.dtype not in _TYPES or value.layout != torch.strided:
            allowed, given = "a dense tensor of " + ", ".join(map(str, _TYPES)), f"{value.dtype} ({value.layout})"
            remedy = "Convert it before saving."
            raise StateError.of(f"tensor {name}", "the model", allowed=allowed, given=given, remedy=remedy)
    return state


def _count_outside(name: str, x: _Dense | _Active, mask: Tensor) -> int:
    """Counts what is not zero outside the mask of a tensor; where nothing is, that is +0.0, which comes back."""
    where = "save_compact()"
    if mask.shape != x.shape:
        allowed, remedy = f"the shape of its mask, {tuple(mask.shape)}", "Pass the sparsifier of this model."
        raise StateError.of(name, where, allowed=allowed, given=tuple(x.shape), remedy=remedy)
    count = x.count_outside(mask)
    if not count and bool(x.alive()[~mask.cpu().flatten()].any()):
        remedy = "weight += 0.0, under torch.no_grad(), makes +0.0 of it."
        raise StateError.of(name, where, allowed="+0.0 outside its mask", given="-0.0", remedy=remedy)
    return count


def _checksum(text: str, stored: Mapping[str, Tensor]) -> int:
    """Computes a number of all that is in a file: nothing else would notice a flipped bit in a weight."""
    total = zlib.crc32(text.encode())
    for name, tensor in sorted(stored.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(_in_order(tensor).reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _in_order(x: Tensor) -> Tensor:
    """Returns x on the CPU with its entries as they are, one after the other: views, lazy conjugates written out."""
    return x.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _read(path: Path) -> tuple[dict[str, _Entry], dict[str, Tensor]]:
    """Reads a compact file: its entries, and the tensors as they were written, each with memory of its own.

    Raises:
        StateError: It is no compact file, is damaged, or its entries do not fit its tensors, or not the memory.
    """
    where = str(path)
    stored, texts = read_safetensors(path, remedy=_COPY_AGAIN)
    described = _described(texts.get("dstlib", "{}"), where)
    if _checksum(described.entries, stored) != described.checksum:
        allowed, given = "the contents that were written", "others: the file is damaged"
        raise StateError.of("file", where, allowed=allowed, given=given, remedy=_COPY_AGAIN)
    text = described.entries.encode()
    entries = parse_json(text, dict[str, _Entry], where=where, remedy=_COPY_AGAIN, max_bytes=MAX_HEADER)
    _check_entries(entries, stored, where)
    return entries, stored


def _described(text: str, where: str) -> _Description:
    """Reads what a file says of itself, if it is one of this format."""
    remedy = "Load it the way it was saved; save_compact() writes compact files."
    found = parse_json(text.encode(), dict[str, Any], where=where, remedy=remedy, max_bytes=MAX_HEADER)
    if (version := found.get("format")) != FORMAT:
        given = "a file of another kind" if version is None else shown(version)
        raise StateError.of("file", where, allowed=FORMAT, given=given, remedy=remedy)
    return parse_json(text.encode(), _Description, where=where, remedy=_COPY_AGAIN, max_bytes=MAX_HEADER)


def _check_entries(entries: Mapping[str, _Entry], stored: Mapping[str, Tensor], where: str) -> None:
    """Checks that what was stored is what the entries speak of, before any of it is unpacked."""
    needed = {f"values/{name}" for name, entry in entries.items() if not isinstance(entry, _Alias)}
    needed |= {f"pattern/{name}" for name, entry in entries.items() if isinstance(entry, _Units)}
    if differing := sorted(needed ^ stored.keys()):
        allowed = f"{differing[0]} stored" if differing[0] in needed else f"an entry for {differing[0]}"
        raise StateError.of("tensors", where, allowed=allowed, given="none", remedy=_COPY_AGAIN)
    whole: set[str] = set()
    for name, entry in entries.items():
        if isinstance(entry, _Alias) and entry.same_as not in whole:
            allowed, what = "the same as a tensor before it", f"tensor {name}"
            raise StateError.of(what, where, allowed=allowed, given=shown(entry.same_as), remedy=_COPY_AGAIN)
        if isinstance(entry, _Units):
            wrong = _misfit(entry, stored[f"values/{name}"], stored[f"pattern/{name}"])
            if wrong is not None:
                allowed = "units that fit the pattern"
                raise StateError.of(f"tensor {name}", where, allowed=allowed, given=wrong, remedy=_COPY_AGAIN)
        if not isinstance(entry, _Alias):
            whole.add(name)
    units = {name: entry for name, entry in entries.items() if isinstance(entry, _Units)}
    sizes = {n: e.num_units * (e.unit_size * stored[f"values/{n}"].element_size() + 1) for n, e in units.items()}
    largest = max(sizes, key=sizes.__getitem__, default=None)
    require_memory(
        sum(sizes.values()), f"tensors such as {largest}", where, remedy="Load it where there is more memory."
    )


def _misfit(entry: _Units, values: Tensor, pattern: Tensor) -> str | None:
    """Says what keeps values from being the units (U) of an entry that a pattern names; None where nothing does."""
    shape, axes = entry.shape, entry.axes
    if not 2 <= len(shape) <= _MAX_AXES or min(shape) < 1 or not 1 <= axes <= len(shape):
        return f"{axes} axes of units of the shape {shown(shape)}"
    if values.ndim != 2 or values.shape[1] != entry.unit_size or pattern.ndim != 1:
        return f"values {tuple(values.shape)} and a pattern {tuple(pattern.shape)} for units of {shown(shape[axes:])}"
    if pattern.dtype == torch.uint8:
        num_bytes, rest = -(-entry.num_units // 8), entry.num_units % 8
        if len(pattern) != num_bytes:
            return f"{len(pattern)} bytes of bits for {entry.num_units} units"
        if rest and int(pattern[-1]) >> rest:
            return f"bits beyond its {entry.num_units} units"
        count = int(_NUM_BITS[pattern.numpy()].sum(dtype=np.int64))
    elif pattern.dtype in (torch.int32, torch.int64):
        count = len(pattern)
        if count and not (int(pattern[0]) >= 0 and int(pattern[-1]) < entry.num_units):
            return f"indices beyond its {entry.num_units} units"
        if bool((pattern[1:] <= pattern[:-1]).any()):
            return "indices out of order"
    else:
        return f"a pattern of {pattern.dtype}"
    return None if count == len(values) else f"{len(values)} values for {count} active units"


def _put(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Loads a state into a model, if it has these tensors and no others."""
    inner = unwrap(model)
    own = inner.state_dict()
    held = held_weights(inner)
    masks = {mask_key(name) for name in held}
    names = {plain_name(name): name for name in own if plain_name(name) not in masks}
    theirs = {name: (tuple(x.shape), x.dtype) for name, x in state.items()}
    shapes = {plain: held[plain].dense_shape if plain in held else own[name].shape for plain, name in names.items()}
    here = {plain: (tuple(shapes[plain]), own[name].dtype) for plain, name in names.items()}
    if theirs != here:
        n, *others = sorted(n for n in theirs.keys() | here.keys() if theirs.get(n) != here.get(n))
        given = f"{len(others) + 1} that differ, such as {n}: {theirs.get(n, 'missing')} in the file"
        allowed = f"the names, shapes and types of {type(inner).__name__}, {n}: {here.get(n, 'none of that name')}"
        remedy = "Build the model as it was when it was saved."
        raise StateError.of("tensors", str(path), allowed=allowed, given=given, remedy=remedy)
    inner.load_state_dict({names[plain]: x for plain, x in state.items()})
