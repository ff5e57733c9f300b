"""The history of the masks of a run: how they moved, and how much of the dense network they have seen.

An observer that changes nothing: it is told of each mask update, and keeps whole numbers.

>>> import torch, dstlib
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
>>> sparsifier = dstlib.sparsify(model, sparsity=0.75, method="set", total_steps=400)
>>> history = History(sparsifier)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> for _ in range(400):
...     optimizer.zero_grad(); model(torch.ones(8, 64)).square().sum().backward(); optimizer.step()
>>> history.arrays()["step"]
array([  0, 100, 200, 300])
>>> 0.25 < history.explored < 1
True
"""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dstlib.errors import StateError
from dstlib.masking import MaskUpdate, Site
from dstlib.report import align
from dstlib.sparsifier import Sparsifier
from dstlib.torch_files import check_seal, checksum

VERSION = 2  # of version 1, changes did not yet tell of idle groups
_FIRST = 3  # a mark: 0 never active, 1 was active at some time, 3 also in the first mask


class Change(NamedTuple):
    """One mask update of one layer in whole numbers, entries of the mask; the first is the mask at attachment.

    ``explored`` entries have been active at some time, ``from_first`` are active now and were in the first
    mask. ``dead_outputs`` have no active input, ``dead_inputs`` are read by no output. ``idle`` groups of units stood
    still, as all their growth scores were equal.
    """

    step: int
    active: int
    dropped: int
    grown: int
    explored: int
    from_first: int
    dead_outputs: int
    dead_inputs: int
    idle: int


@dataclass(frozen=True, eq=False)
class DeadChannels:
    """Outputs without an active input, (O,), and inputs that no output reads, (I,); True = dead.

    Of a grouped convolution, inputs are counted within a group, shared by all groups, as its weight has them.
    """

    outputs: Tensor
    inputs: Tensor


def dead_channels(mask_OIK: Tensor) -> DeadChannels:
    """Finds the dead channels of one mask, (O, I, *K).

    >>> dead = dead_channels(torch.tensor([[True, False], [False, False]]))
    >>> dead.outputs, dead.inputs
    (tensor([False,  True]), tensor([False,  True]))
    """
    live_OI = mask_OIK.flatten(2).any(dim=2) if mask_OIK.dim() > 2 else mask_OIK
    return DeadChannels(outputs=~live_OI.any(dim=1), inputs=~live_OI.any(dim=0))


def explored_by_chance(density: float, drop_fractions: Iterable[float]) -> float:
    """Computes the explored share of a layer to expect of random growth, for one drop fraction per update.

    Of n entries A = d·n are active, and an update grows k = f·A of the n - A + k that it did not keep, all
    alike. An entry that was never active is one of them, so it stays unseen with probability 1 - q for
    q = k / (n - A + k) = f·d / (1 - d + f·d), whatever the drop criterion is and whatever came before. Exact
    for whole k: as an update drops floor(f·A), pass floor(f·A) / A where the difference matters.

    Reference: the share is R_s of Liu et al. 2021 (ITOP); the closed form is ours, and benchmarks/explored.py
    measures it.

    >>> round(explored_by_chance(0.1, [0.3] * 10), 4)
    0.3516
    """
    unseen = 1 - density
    for fraction in drop_fractions if unseen else ():
        unseen *= (1 - density) / (1 - density + fraction * density)
    return 1 - unseen


class Track:
    """One layer's past: integers per mask update, and one byte per weight."""

    def __init__(self, mask: Tensor, step: int) -> None:
        self.marks = mask.to(torch.uint8) * _FIRST
        self._numbers = array("q")  # a change after the other
        nothing = torch.zeros_like(mask)
        self._note(MaskUpdate(mask, dropped=nothing, grown=nothing, idle_G=mask.new_zeros(1)), step)

    def record(self, update: MaskUpdate, step: int) -> None:
        """Adds a mask update."""
        self.marks = self.marks.to(update.mask.device)
        # also what was dropped: a mask that was loaded in between counts as seen; True is the mark 1
        self.marks |= update.mask | update.dropped
        self._note(update, max(step, self.last.step))

    @property
    def changes(self) -> NDArray[np.int64]:
        """All that was recorded, (updates + 1, fields of :class:`Change`)."""
        return np.array(self._numbers, dtype=np.int64).reshape(-1, len(Change._fields))

    @property
    def last(self) -> Change:
        """The latest change."""
        return Change(*self._numbers[-len(Change._fields) :])

    def replace(self, changes: Tensor, marks: Tensor) -> None:
        """Takes over what another track has kept, with zeros for what it did not yet count."""
        changes = nn.functional.pad(changes, (0, len(Change._fields) - changes.shape[1]))
        self._numbers = array("q", changes.flatten().tolist())
        self.marks = marks.to(self.marks.device, copy=True)

    def _note(self, update: MaskUpdate, step: int) -> None:
        mask, dead = update.mask, dead_channels(update.mask)
        from_first = mask & (self.marks == _FIRST)
        channels = (dead.outputs, dead.inputs)
        counted = (mask, update.dropped, update.grown, self.marks != 0, from_first, *channels, update.idle_G)
        # one wait for the device
        self._numbers.extend([step, *torch.stack([x.count_nonzero() for x in counted]).tolist()])


_COUNTS = Change._fields[1:]


class History:
    """Records what the mask updates of a sparsifier change, from now until :meth:`close`.

    Nothing of the run depends on it. Memory: 72 bytes per update of a layer, and one byte per weight of the
    sparse layers, which holds what has ever been active. Layers are matrix views: the three matrices of
    an attention's in_proj are three. To go on after a resumption, save ``state_dict`` beside the sparsifier's.

    ``print`` shows a row per layer; :meth:`arrays` has all numbers; :mod:`dstlib.plot` draws them.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self.sparsifier = sparsifier
        self._tracks = {name: Track(mask, sparsifier.step) for name, mask in _masks_now(sparsifier).items()}
        sparsifier.observers.append(self._observe)

    def close(self) -> None:
        """Stops recording; what was recorded stays. A second call changes nothing."""
        if self._observe in self.sparsifier.observers:
            self.sparsifier.observers.remove(self._observe)

    @property
    def explored(self) -> float:
        """R_s: entries of the sparse layers that have been active since the attachment, over all of them.

        Reference: Liu et al. 2021 (ITOP), the in-time over-parameterization rate.
        """
        tracks = self._tracks.values()
        return sum(track.last.explored for track in tracks) / sum(track.marks.numel() for track in tracks)

    def changes(self) -> dict[str, NDArray[np.int64]]:
        """Returns per layer all that was recorded, (updates + 1, fields of :class:`Change`)."""
        return {name: track.changes for name, track in self._tracks.items()}

    def dead_channels(self) -> dict[str, DeadChannels]:
        """Finds per layer the channels that are dead at this moment, from the masks."""
        return {name: dead_channels(mask) for name, mask in _masks_now(self.sparsifier).items()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns all numbers on one time axis, for plotting: L layers; T steps, of the attachment and of updates.

        - "name", "size", "num_outputs", "num_inputs" (L,): the layers, their entries and channels; "step" (T,).
        - counts (L, T): "active", "dropped", "grown", "explored", "from_first", "dead_outputs", "dead_inputs", "idle",
          as in :class:`Change`; "updated": whether the layer was updated at that step. Where it was not, nothing is
          dropped or grown, no group idle, and the rest is as before.
        - shares (L, T): "density"; "explored_share", R_s; of a mask and the one before, "churn" = exchanged over
          active before, min(dropped, grown) / A, "overlap" = |A∩B| / |A|, and "jaccard" = |A∩B| / |A∪B|;
          "first_overlap" = |A∩B| / |A| with A the mask at attachment. At attachment, churn is 0, the overlaps 1.
        - the same shares of all layers together (T,): "total_density", "total_churn", and so on.
        """
        tracks = [track.changes for track in self._tracks.values()]
        step = np.unique(np.concatenate([changes[:, 0] for changes in tracks]))
        index = [np.searchsorted(changes[:, 0], step, side="right") - 1 for changes in tracks]
        counts = {
            name: np.stack([c[i, column] for c, i in zip(tracks, index, strict=True)])
            for column, name in enumerate(_COUNTS, 1)
        }
        updated = np.stack([np.isin(step, changes[1:, 0]) for changes in tracks])
        for name in ("dropped", "grown", "idle"):
            counts[name] = counts[name] * updated
        shapes = [track.marks.shape for track in self._tracks.values()]
        size = np.array([shape.numel() for shape in shapes])
        total = _shares({name: values.sum(axis=0) for name, values in counts.items()}, size.sum())
        return {
            "name": np.array(list(self._tracks)),
            "size": size,
            "num_outputs": np.array([shape[0] for shape in shapes]),
            "num_inputs": np.array([shape[1] for shape in shapes]),
            "step": step,
            "updated": updated,
            **counts,
            **_shares(counts, size[:, None]),
            **{f"total_{name}": values for name, values in total.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns all that was recorded, as tensors: ``torch.load`` reads it with ``weights_only=True``."""
        layers = {
            n: {"changes": torch.from_numpy(t.changes), "marks": t.marks.clone()} for n, t in self._tracks.items()
        }
        return {"version": VERSION, "layers": layers, "checksum": checksum(layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what another history of the same layers had recorded, forgetting its own.

        Before or after ``Sparsifier.load_state_dict``, it makes no difference.

        Raises:
            StateError: The state is damaged, or of other layers; nothing has changed then.
        """
        layers = _checked(state, self._tracks)
        for name, track in self._tracks.items():
            track.replace(layers[name]["changes"], layers[name]["marks"])

    def __str__(self) -> str:
        """Returns a row per layer: how it is now, its mean churn per update, what has become of its first mask.

        Idle are the updates in which units stood still, as no growth score gave a reason to exchange them.
        """
        a = self.arrays()
        titles = (
            "layer",
            "size",
            "density",
            "updates",
            "idle",
            "churn",
            "first kept",
            "explored",
            "dead out",
            "dead in",
        )
        cells = [titles]
        num_updates, num_idle = ([int(n) for n in x.sum(axis=1)] for x in (a["updated"], a["idle"] > 0))
        for i, (name, size) in enumerate(zip(a["name"], a["size"], strict=True)):
            churn = a["churn"][i].sum() / max(num_updates[i], 1)
            shares = (a["density"][i, -1], churn, a["first_overlap"][i, -1], a["explored_share"][i, -1])
            density, *others = (f"{share:.4f}" for share in shares)
            dead = (f"{a[key][i, -1]:,}" for key in ("dead_outputs", "dead_inputs"))
            cells.append((name, f"{size:,}", density, f"{num_updates[i]:,}", f"{num_idle[i]:,}", *others, *dead))
        first, last = a["step"][0], a["step"][-1]
        total = (
            f"all: density {a['total_density'][-1]:.4f}, explored {a['total_explored_share'][-1]:.4f}, "
            f"of the first mask {a['total_first_overlap'][-1]:.4f} still active"
        )
        title = f"{self.sparsifier.plan.method.name}, masks of steps {first:,} to {last:,}"
        return "\n".join([title, *align(cells, left=(0,)), total])

    def __repr__(self) -> str:
        num_updates = sum(len(changes) - 1 for changes in self.changes().values())
        return f"History({len(self._tracks)} layers, {num_updates:,} mask updates, explored {self.explored:.4f})"

    def _observe(self, site: Site, update: MaskUpdate) -> None:
        self._tracks[site.name].record(update, site.step)


def _masks_now(sparsifier: Sparsifier) -> dict[str, Tensor]:
    """Returns the masks of this moment by layer, (O, I, *K), in the model's order."""
    masks = sparsifier.masks
    return {view.name: view.of(masks[weight.name]) for weight in sparsifier.weights for view in weight.views}


def _shares(counts: Mapping[str, NDArray[np.int64]], size: Any) -> dict[str, NDArray[np.float64]]:
    """Turns counts (..., T) and numbers of entries into shares (..., T); nothing of nothing is all of it."""

    def share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.divide(part, whole, out=np.ones(part.shape), where=whole > 0)

    active, dropped, grown = counts["active"], counts["dropped"], counts["grown"]
    before, both = active - grown + dropped, active - grown
    return {
        "density": active / size,
        "explored_share": counts["explored"] / size,
        "churn": np.minimum(dropped, grown) / np.maximum(before, 1),
        "overlap": share(both, before),
        "jaccard": share(both, active + dropped),
        "first_overlap": share(counts["from_first"], np.broadcast_to(active[..., :1], active.shape)),
    }


def _checked(state: Any, tracks: Mapping[str, Track]) -> Mapping[str, Mapping[str, Tensor]]:
    """Returns the layers of a saved state, if every one fits."""
    version = state.get("version") if isinstance(state, Mapping) else None
    layers = state.get("layers") if type(version) is int and 1 <= version <= VERSION else None
    where = "the saved history"
    if not isinstance(layers, Mapping):
        raise _misfit("contents", where, f"those of state_dict(), version {VERSION}", type(state).__name__)
    if odd := sorted(map(str, set(layers) ^ set(tracks))):
        raise _misfit("layers", where, f"the {len(tracks)} at hand", f"others ({', '.join(odd[:3])})")
    for name, track in tracks.items():
        _check_layer(layers[name], name, track.marks.shape, len(Change._fields) - (version == 1))
    check_seal(state, layers, where=where)
    return layers


def _check_layer(saved: Any, name: str, shape: torch.Size, width: int) -> None:
    """Checks that all that was recorded of a layer can have been."""
    saved = saved if isinstance(saved, Mapping) else {}
    changes, marks = saved.get("changes"), saved.get("marks")
    if not (_is_plain(changes, torch.int64) and changes.shape[1:] == (width,) and len(changes)):
        raise _misfit("changes", name, f"whole numbers of shape (updates, {width})", changes)
    if not (_is_plain(marks, torch.uint8) and marks.shape == shape):
        raise _misfit("marks", name, f"bytes of shape {tuple(shape)}", marks)
    counts, size = changes[:, 1:], shape.numel()
    if bool(((counts < 0) | (counts > size)).any()) or bool((changes[:, 0].diff() < 0).any()):
        raise _misfit("changes", name, f"steps in order, and counts of {size} entries", "others")
    explored = int(changes[-1, Change._fields.index("explored")])
    known = (marks == 0) | (marks == 1) | (marks == _FIRST)
    if int(marks.count_nonzero()) != explored or not bool(known.all()):
        raise _misfit("marks", name, f"{explored} entries that were active, as the last change counts", "others")


def _is_plain(x: Any, dtype: torch.dtype) -> bool:
    return isinstance(x, Tensor) and x.dtype == dtype and x.layout == torch.strided and not x.is_meta


def _misfit(what: str, where: str, allowed: str, given: object) -> StateError:
    shown = (tuple(given.shape), given.dtype) if isinstance(given, Tensor) else given
    remedy = "Load it into a history of the same model, sparsified alike."
    return StateError.of(what, where, allowed=allowed, given=shown, remedy=remedy)
