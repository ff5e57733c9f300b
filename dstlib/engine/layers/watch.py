"""What a fast layer computes with, found anew whenever anything has changed that it was made of.

A layer looks in each call, so that nothing else has to remember to tell it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dstlib.engine.ops.prepared import PreparedCalls
from dstlib.engine.runtime.fingerprint import fingerprint, num_bytes, reader
from dstlib.errors import StateError
from dstlib.targets import find_outside, refuse_outside

Told = Callable[[str], bool]  # something about a parameter, by its name
OTHERWISE = "Without masks, dstlib.accelerate(model, example) computes with all that is not zero."
T = TypeVar("T")


class Place(NamedTuple):
    """Where the plain model had a module, a parameter or a buffer when it was accelerated, and what was there.

    ``ours`` is the same place of the fast model, with what was there: once that is another, the fast model goes its
    own way.
    """

    owned: dict[str, Any]  # the modules, parameters or buffers of a module of the plain model
    key: str
    held: object
    ours: dict[str, Any]
    our_held: object
    name: str


class Origin:
    """The places of the plain model that a part of the fast one was made of."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self._held = [place[:3] for place in places]  # all that is compared in each call

    def check(self) -> None:
        """Refuses to go on with what is no longer that of the plain model.

        Raises:
            StateError: The plain model has something else in such a place, the fast model has not.
        """
        for owned, key, held in self._held:
            if owned.get(key) is not held:
                self._refuse()
                return

    def _refuse(self) -> None:
        for place in self.places:
            if place.owned.get(place.key) is not place.held and place.ours.get(place.key) is place.our_held:
                allowed = "the layers, parameters and buffers that it was accelerated with"
                given = f"another {place.name!r}"
                remedy = "After load_state_dict(assign=True) and what else replaces some, call accelerate() again."
                raise StateError.of("model", "accelerate()", allowed=allowed, given=given, remedy=remedy)


class LiveMask(Protocol):
    """A mask that may change: ``version`` is another one then, and ``seen`` the tensor in which that shows, too."""

    @property
    def version(self) -> int:
        """What tells of changes."""
        ...

    @property
    def seen(self) -> Tensor:
        """The tensor that is changed."""
        ...

    def dense(self) -> Tensor:
        """Returns the mask as truth values."""
        ...


@dataclass(frozen=True, eq=False)
class TensorMask:
    """A mask as a tensor that may be written to."""

    seen: Tensor

    @property
    def version(self) -> int:
        """What torch counts writes by."""
        return self.seen._version

    def dense(self) -> Tensor:
        """Returns the mask as truth values."""
        return self.seen


@dataclass(frozen=True, eq=False)
class Link:
    """What ties the weight of a fast layer to a plain model, and to the masks of its training.

    ``original`` is the weight that they belong to and ``mask`` its own, ``weights`` and ``masks`` are all of the model
    that have masks; ``wants_all`` says whether a pass is to give the gradients of a weight's inactive part too,
    ``holds`` whether it is known to be still as its mask left it.
    """

    name: str
    original: Tensor
    origin: Origin
    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    mask: LiveMask | None
    wants_all: Told
    holds: Told

    def check_outside(self, weight: Tensor) -> None:
        """Refuses a weight that is not zero outside its mask, and says which of the others are not.

        Raises:
            StateError: It is not.
        """
        assert self.mask is not None
        if found := find_outside({self.name: weight}, {self.name: self.mask.dense()}):
            refuse_outside(found | find_outside(self.weights, self.masks), "accelerate()", OTHERWISE)


@dataclass(frozen=True, eq=False)
class Seen(Generic[T]):
    """What there is to compute with for as long as a look finds the same.

    ``active`` is the pattern of what is active, ``graded`` that of what is to get gradients; ``calls`` are prepared of
    these values.
    """

    weight: Tensor
    state: tuple[object, ...]
    span: int  # bytes of the weight in memory, 0 where a look cannot read them
    fingerprint: int
    mask_fingerprint: int
    active: T
    graded: T
    read: Callable[[int, int, Tensor], int] = field(default_factory=reader)
    calls: PreparedCalls[Any] = field(default_factory=PreparedCalls)


class _Checked(NamedTuple):
    """A weight that was zero outside its mask, and what was compared then."""

    weight: Tensor
    version: int
    values: tuple[int, int]  # address and fingerprint
    mask_version: int
    mask_fingerprint: int
    training: bool | None  # None where the mode has changed since


class Watch(Generic[T]):
    """The look of a fast layer at its weight, and at which of it is active, as patterns that ``pattern_of`` makes.

    Active is what a pattern says that was ``given``, what the mask of the ``link`` says, or what is not zero. Compared
    are which tensor the weight is, its address, its version and a fingerprint of its values, the version of the mask,
    and the mode of the layer, at whose changes all is found anew. A copy, by ``deepcopy`` or ``pickle``, is tied to no
    model and no mask: it follows what is not zero of the weight of its own layer.
    """

    def __init__(self, pattern_of: Callable[[Tensor], T]) -> None:
        self.pattern_of = pattern_of
        self.given: T | None = None
        self.link: Link | None = None
        self.mask: LiveMask | None = None
        self.seen: Seen[T] | None = None  # values that are replaced, never changed: threads may look at the same time
        self.made: tuple[Seen[T], Any] | None = None  # what the layer has made of what was seen
        self._all: tuple[torch.Size, T] | None = None
        self._checked: _Checked | None = None

    def give(self, pattern: T) -> None:
        """Computes by this pattern from now on, whatever the weight is outside of it."""
        self.given, self.seen = pattern, None

    def tie(self, link: Link) -> None:
        """Follows the weight of a model and its mask from now on."""
        self.link, self.mask, self.seen = link, link.mask, None

    def change_mode(self) -> None:
        """Has the next look find all anew, be the mode by then what it was at the last one."""
        self.seen = None
        if self._checked is not None:
            self._checked = self._checked._replace(training=None)

    def look(self, weight: Tensor, *, training: bool, wants_all: bool = False) -> Seen[T]:
        """Returns what there is to compute with now; ``wants_all`` asks for the gradients of what is not active, too.

        Raises:
            StateError: The weight is not zero outside its mask, or no longer that of the plain model.
        """
        link, seen = self.link, self.seen
        mask_version, records = -1, torch.is_grad_enabled()
        if link is not None:
            link.origin.check()
            if self.mask is not None:
                mask_version = self.mask.version
            wants_all = wants_all or (records and link.wants_all(link.name))
        takes_all = records and mask_version < 0 and self.given is None and weight.requires_grad
        state = (weight._version, weight.data_ptr(), mask_version, training, takes_all, wants_all)
        if (
            seen is None
            or weight is not seen.weight
            or state != seen.state
            or (seen.span and seen.read(state[1], seen.span, weight) != seen.fingerprint)
        ):
            with torch.inference_mode(False), torch.no_grad():  # what is made now may serve a training later
                self.seen = seen = self._find(weight, state)
        return seen

    def _find(self, weight: Tensor, state: tuple[int, int, int, bool, bool, bool]) -> Seen[T]:
        before, mask = self.seen, self.mask
        *_, takes_all, wants_all = state
        found, mask_found = _fingerprint(weight), 0 if mask is None else _fingerprint(mask.seen)
        self._check_outside(weight, state, found, mask_found)
        if self.given is not None:
            active = self.given
        elif takes_all:
            active = self._every(weight)
        elif before is not None and self._has_same_pattern(before, weight, state, (found, mask_found)):
            active = before.active
        else:
            active = self.pattern_of(weight != 0 if mask is None else mask.dense())
        graded = self._every(weight) if wants_all else active
        return Seen(weight, state, num_bytes(weight) if weight.is_cpu else 0, found, mask_found, active, graded)

    def _has_same_pattern(
        self, before: Seen[T], weight: Tensor, state: tuple[object, ...], found: tuple[int, int]
    ) -> bool:
        """Tells whether what was seen before has the pattern of this state: of the same mask, or the same values."""
        if self.mask is not None:
            return (before.state[2], before.mask_fingerprint) == (state[2], found[1])
        return before.weight is weight and (*before.state[:5], before.fingerprint) == (*state[:5], found[0])

    def _every(self, weight: Tensor) -> T:
        """Returns the pattern in which all is active."""
        known = self._all
        if known is None or known[0] != weight.shape:
            known = self._all = weight.shape, self.pattern_of(torch.ones_like(weight, dtype=torch.bool))
        return known[1]

    def _check_outside(self, weight: Tensor, state: tuple[int, int, int, bool, bool, bool], *found: int) -> None:
        """Counts what is not zero outside the mask, unless it is known that there is nothing."""
        link, checked = self.link, self._checked
        if link is None or self.mask is None or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return  # a CUDA graph is captured, in which no value can be looked at
        version, address, mask_version, training, *_ = state
        now = _Checked(weight, version, (address, found[0]), mask_version, found[1], training)
        if checked is not None:
            if checked.weight is weight and checked[1:] == now[1:]:
                return
            is_other = checked.weight is not weight or checked.training is not training
            is_written_unseen = checked.version == version and checked.values != now.values
            is_masked_unseen = checked.mask_version == mask_version and checked.mask_fingerprint != found[1]
            is_sure = not (is_other or is_written_unseen or is_masked_unseen)
        else:
            is_sure = True
        if weight is not link.original or not is_sure or not link.holds(link.name):
            link.check_outside(weight)
        self._checked = now

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but what ties it to a model, to masks, and to addresses."""
        return {**dict.fromkeys(vars(self)), "pattern_of": self.pattern_of, "given": self.given}


def _fingerprint(x: Tensor) -> int:
    """Returns the fingerprint of a tensor on the CPU, 0 of others, for whose values a look would have to wait."""
    return fingerprint(x) if x.is_cpu else 0
