"""Masks in training: a sparse weight with its mask and its counters."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from dstlib.masking import Granularity, PackedMask, best_scale, folded_shape, harden, soften
from dstlib.masking.update import zero_outside_
from dstlib.methods.method import GrownState
from dstlib.sparsifier.optimizer_state import Kept
from dstlib.targets import MatrixView, Weight

_LARGE = 1 << 14  # entries of a weight from which a glance is less than a look at all
_TENSORS = ("trace", "hidden", "young")  # of a MaskedWeight, beside its masks


@dataclass(eq=False)
class SavedWeight:
    """What a saved state says of a sparse weight: fields of ``MaskedWeight``, masks as tensors of truth values."""

    weight: Weight
    mask: Tensor
    step: int
    updated_at: int
    trace: Tensor | None
    traced_at: int
    hidden: Tensor | None
    reach: Tensor | None
    densities: tuple[float, ...]
    settled: tuple[bool, ...]
    young: Tensor | None
    starts: tuple[float, ...]
    scales: tuple[float, ...]
    is_output: bool | None = None
    is_to_fill: bool = False


@dataclass(eq=False)
class MaskedWeight:
    """A sparse weight in training: its mask, and what has happened to it.

    ``packed`` is the mask, of one bit for each entry; ``mask`` makes truth values of it each time.

    ``step`` counts the steps that its optimizer has taken, ``begun`` those that have begun; ``updated_at`` is the
    step of the last mask update. ``trace`` is what the method's trace has gathered, ``traced_at`` the step it has
    come to. ``hidden`` are the values under the mask, zero inside it, and ``reach`` marks what receives gradients:
    both under dense storage only. While ``is_revealed``, the parameter itself holds the hidden values. If they are
    ``soft``, by the groups of this granularity, it holds the softened values else, times ``scales``, one for each
    matrix view, and ``hidden`` are the values inside the mask, too.
    ``densities`` are those of the matrix views that came of a look at the model, where the method's ``init`` takes
    one, or of the masks it was given, and ``starts`` those that a ramp leads from then. ``settled`` says of which of
    them the method's ``early_stop`` has ended the updates; empty: of none. ``young`` marks what the last update has
    grown, as long as it warms up; ``before`` is what it was, in the parameter and in copies of it, before the step that
    has begun. ``is_output`` says whether outputs of the model come from it, or may; None as long as nobody has
    looked, while ``is_to_fill`` says that an output which its first mask left without a weight is to have one.

    ``version`` is the parameter's when it was last seen to be zero outside the mask, ``lost_at`` the last step
    that found something else's non-zeros there. ``left`` are what optimizers keep for it and the versions of these when
    they were last as at birth there; where a step begins with all of that, entries outside the mask ``is_alike``.
    """

    weight: Weight
    packed: PackedMask
    step: int = 0
    begun: int = 0
    updated_at: int = 0
    trace: Tensor | None = None
    traced_at: int = 0
    hidden: Tensor | None = None
    reach: PackedMask | None = None
    soft: Granularity | None = None
    scales: tuple[float, ...] = ()
    is_revealed: bool = False
    densities: tuple[float, ...] = ()
    settled: tuple[bool, ...] = ()
    young: Tensor | None = None
    before: list[Tensor] = field(default_factory=list)
    starts: tuple[float, ...] = ()
    is_output: bool | None = None
    is_to_fill: bool = False
    version: tuple[int, int] | None = None
    lost_at: int = -1
    is_alike: bool = False
    left: list[tuple["ref[Tensor]", tuple[int, int]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "before": [], "left": None, "is_alike": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes masks as copies: tensors that were sent to another process share their memory with the sender."""
        self.__dict__.update(state)
        self.packed, self.reach = self.packed.copy(), None if self.reach is None else self.reach.copy()
        for name in _TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.clone())

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as it was when it was made sparse."""
        return self.weight.parameter

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight with all its zeros."""
        return self.weight.shape

    @property
    def has_zeros(self) -> bool:
        """Whether the parameter has entries outside the mask, to be written to after each step."""
        return True

    @property
    def mask(self) -> Tensor:
        """The mask as truth values of the parameter's shape, to be read; it is written to by ``write_mask``."""
        return self.packed.current()

    @property
    def held_mask(self) -> "PackedMask | Callable[[], PackedMask]":
        """The mask, or what makes it."""
        return self.packed

    def write_mask(self, view: MatrixView, mask: Tensor) -> None:
        """Writes the mask of one matrix view."""
        with self.packed.opened() as whole:
            view.write(whole, mask)

    @property
    def learns(self) -> PackedMask | None:
        """What receives gradients: the mask, or what dense storage lets learn; None: everything."""
        return self.packed if self.hidden is None else self.reach

    @property
    def fits(self) -> bool:
        """Whether mask and parameter have one shape; ``p.data`` may be set to another, which the next step refuses."""
        return self.parameter.shape == self.packed.shape

    @property
    def is_stepping(self) -> bool:
        """Whether a step has begun that is not yet done."""
        return self.begun > self.step

    @property
    def is_written(self) -> bool:
        """Whether something else may have written to the parameter since it was seen to be zero outside the mask.

        Versions do not tell of all; so the first step looks in any case.
        """
        return not self.is_revealed and (self.begun == 0 or self.version != _version(self.parameter))

    def begin_step(self) -> None:
        """Counts a step as begun, and moves all that belongs to the weight to where it is now."""
        self.begun, self.is_alike = self.step + 1, False
        has_moved = self.packed.bits.device != (device := self.parameter.device)
        for mask in (self.packed, self.reach):
            if mask is not None:
                mask.follow(self.parameter)
        if not has_moved:
            return
        self.before = []
        for name in _TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))

    def note_alike(self, kept: Iterable[Kept]) -> None:
        """Notes, as a step begins, whether nothing has been written since all outside of the mask was cleared."""
        self.is_alike = False
        if self.left is None or self.hidden is not None or self.version != _version(self.parameter):
            return
        now = [k.values for k in kept]
        self.is_alike = len(now) == len(self.left) and all(
            x is left() and _version(x) == version for x, (left, version) in zip(now, self.left, strict=True)
        )

    def clear(self, kept: Iterable[Kept]) -> None:
        """Writes zeros outside the mask, and makes what optimizers keep for the weight there as it is at birth."""
        self.is_alike = False
        clear_all([(self, kept)])

    def rescale(self, kept: Iterable[Kept], factor: Callable[[Tensor], Tensor]) -> None:
        """Multiplies the weight, and the copies of it that optimizers keep, by factors of its masks."""
        mask = self.mask
        for x in self._moving(kept):
            for view in self.weight.views:
                view.write(x, (view.of(x).float() * factor(view.of(mask)).to(x.device)).to(x.dtype))

    def start_grown(self, kept: Iterable[Kept], old: PackedMask, grad: Tensor, how: GrownState) -> None:
        """Starts what optimizers keep for the weight where it has grown since an old mask, if not as at birth."""
        kept = [k for k in kept if how != "birth" or k.is_started]
        if self.hidden is not None or not kept:
            return
        mask, before = self.mask, old.current()
        grown, stayed = mask & ~before, mask & before
        for k in kept:
            k.start(grown, self.parameter.detach(), grad)
            if how != "birth":
                for view in self.weight.views:
                    k.start_beside(view, grown, stayed, grad if how == "gradient" else None)

    def note_young(self, kept: Iterable[Kept], warmup: int) -> None:
        """Notes, as a step begins, where it begins from for what has grown and warms up; forgets what has warmed up."""
        if self.young is None or self.begun - self.updated_at + 1 >= warmup:  # at full length from this step on
            self.young, self.before = None, []
            return
        young = self.young & self.mask  # zeros that something else wrote may have moved it
        if self.before and torch.equal(young, self.young):
            return  # begun before: a closure that is called again looks from where the weight does not stay
        self.young = young
        self.note_before(kept)

    def note_before(self, kept: Iterable[Kept]) -> None:
        """Notes where what warms up is now, in the parameter and in copies of it."""
        assert self.young is not None
        self.before = [x[self.young.to(x.device)] for x in self._moving(kept)]

    def slow_young(self, kept: Iterable[Kept], warmup: int) -> None:
        """Takes back, after a step, what moves of weights that warm up have in excess of their share."""
        share = (self.begun - self.updated_at + 1) / warmup
        for x, before in zip(self._moving(kept), self.before, strict=False):  # copies may be born in the step
            assert self.young is not None
            young = self.young.to(x.device)
            x[young] = torch.lerp(before, x[young], share)
        self.before = []

    def _moving(self, kept: Iterable[Kept]) -> list[Tensor]:
        """Returns the weight and the copies of it that optimizers keep."""
        copies = (k.values for k in kept if k.meaning.kind == "weights" and k.values.shape == self.packed.shape)
        return [self.parameter.detach(), *copies]

    def num_outside(self) -> int:
        """Counts the non-zeros outside the mask; there are none unless revealed, or something else wrote them."""
        from dstlib.engine.ops.masked import count_outside  # not before it is needed: see dstlib.__getattr__

        return count_outside(self.parameter, self.packed) if self.fits else int(self.parameter.count_nonzero())

    def num_hidden_outside(self) -> int:
        """Counts the non-zeros outside the mask that are what is hidden there, so that nothing is lost of them."""
        if self.hidden is None:
            return 0
        return int(((self.parameter == self.hidden) & (self.hidden != 0) & ~self.mask).count_nonzero())

    def reveal(self) -> bool:
        """Puts the hidden values back into the parameter; returns False if they are there already."""
        if self.is_revealed:
            return False
        assert self.hidden is not None
        inside = self.parameter if self.soft is None or not self.scales else self._hardened(self.soft, self.hidden)
        self.parameter.copy_(torch.where(self.mask, inside, self.hidden))
        self.is_revealed = True
        return True

    def _hardened(self, soft: Granularity, hidden: Tensor) -> Tensor:
        """Returns the active values: those put aside, but where something else has written what is shown since."""
        mask = self.mask
        shown, values = self._softened(soft, hidden), torch.zeros_like(hidden)
        for view, scale in zip(self.weight.views, self.scales, strict=True):
            written = view.of(self.parameter.detach()) / scale
            view.write(values, harden(written, view.of(mask), view.of(hidden), soft))
        return torch.where(self.parameter == shown, hidden, values)

    def _softened(self, soft: Granularity, values: Tensor) -> Tensor:
        """Returns what is shown of the values."""
        shown, mask = torch.zeros_like(values), self.mask
        for view, scale in zip(self.weight.views, self.scales, strict=True):
            view.write(shown, scale * soften(view.of(values), view.of(mask), soft))
        return shown

    def undo_out_of_reach(self) -> None:
        """Takes back what weight decay did to revealed values that were not to learn."""
        if self.reach is not None:
            assert self.hidden is not None
            self.parameter.copy_(torch.where(self.reach.current(), self.parameter, self.hidden))

    def hide(self) -> None:
        """Puts aside what the mask covers, if it was revealed; the parameter is the caller's to clear."""
        if not self.is_revealed:
            return
        self.hidden, self.is_revealed = self.parameter.detach().clone(), False
        mask = self.mask
        if self.soft is None:
            zero_outside_(self.hidden, ~mask)
            return
        if not self.scales:
            views = [(view.of(self.hidden), view.of(mask)) for view in self.weight.views]
            self.scales = tuple(best_scale(values, soften(values, part, self.soft)) for values, part in views)
        self.parameter.copy_(self._softened(self.soft, self.hidden))

    def restore(self, saved: SavedWeight) -> None:
        """Takes over what was saved, on the weight's device."""
        device = self.parameter.device
        self.packed.write(saved.mask)
        self.reach = None if saved.reach is None else self.packed.like(saved.reach)
        self.step = self.begun = saved.step
        self.updated_at, self.traced_at = saved.updated_at, saved.traced_at
        self.densities, self.starts, self.settled = saved.densities, saved.starts, saved.settled
        self.scales = saved.scales
        self.is_output, self.is_to_fill = saved.is_output, saved.is_to_fill
        for name in _TENSORS:
            tensor = getattr(saved, name)
            setattr(self, name, None if tensor is None else tensor.detach().clone().to(device))
        self.before = []
        self.is_revealed = False


@contextmanager
def opened(masked: Iterable[MaskedWeight]) -> Iterator[None]:
    """Packs masks of several matrix views once, when all of them are written."""
    with ExitStack() as stack:
        for m in masked:
            if len(m.weight.views) > 1:
                stack.enter_context(m.packed.opened())
        yield


def clear_all(weights: Iterable[tuple[MaskedWeight, Iterable[Kept]]]) -> None:
    """Does as ``MaskedWeight.clear`` for weights with what optimizers keep for each, in one call for all.

    Where a step began with entries outside the mask that were all alike, and has done alike to all, one of them tells
    of the others.
    """
    from dstlib.engine.ops.masked import fill_outside_each, glance_outside  # as in num_outside

    weights = [(m, tuple(kept)) for m, kept in weights]
    triples = {m: _outside(m, kept) if m.has_zeros else [] for m, kept in weights}
    alike = [(m, triple) for m, _ in weights if m.is_alike for triple in triples[m]]
    changed = glance_outside(triple for _, triple in alike)
    written = {m for (m, _), is_other in zip(alike, changed, strict=True) if is_other}
    fill_outside_each(each for m, _ in weights if not m.is_alike or m in written for each in triples[m])
    for m, kept in weights:
        m.is_alike = False
        if not m.has_zeros:
            continue
        if not m.is_revealed:
            m.version = _version(m.parameter)
        m.left = [(ref(k.values), _version(k.values)) for k in kept] if m.packed.numel >= _LARGE else None


def _outside(m: MaskedWeight, kept: Iterable[Kept]) -> list[tuple[Tensor, PackedMask, float]]:
    """Returns what is to be something outside a mask, with the mask and what it is to be; writes what shares bytes."""
    found: list[tuple[Tensor, PackedMask, float]] = [] if m.is_revealed else [(m.parameter, m.packed, 0.0)]
    if (learns := m.learns) is None:
        return found
    for k in kept:
        if m.hidden is not None and k.meaning.kind == "weights":
            continue  # copies of hidden weights live with them
        if k.packed:
            k.write_outside(learns.current())
        else:
            found.append((k.values, learns, k.birth))
    return found


def _version(x: Tensor) -> tuple[int, int]:
    """Returns where a tensor's memory is, which ``x.data = y`` changes, and what torch counts other writes by.

    Nothing tells of writes to ``x.data``. Inference tensors have no count, and take no step.
    """
    return x.data_ptr(), 0 if x.is_inference() else x._version


def groups_of(masked: Iterable[MaskedWeight], granularity: Granularity) -> dict[str, torch.Size]:
    """Returns the number of groups, and of units in each, of every matrix view by name."""
    shapes = {m: torch.empty(m.shape, device="meta") for m in masked}
    views = ((view.name, view.of(shape).shape) for m, shape in shapes.items() for view in m.weight.views)
    return {name: folded_shape(granularity, shape)[:2] for name, shape in views}
