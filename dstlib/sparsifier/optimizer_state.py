"""What a torch optimizer, known or not, keeps for a weight, and what is written to it where the weight is masked.

Each tensor has a meaning: stated by the user, known by its key (``known_optimizers.py``), or observed. To observe:
outside the mask weight and gradient have always been zero, so what an optimizer keeps entry by entry has one value
there, its value at birth, while inside it has many; and what varies there is of no single entry.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import is_
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from dstlib.errors import SettingError, require
from dstlib.masking.packed import PackedMask
from dstlib.masking.update import zero_outside_
from dstlib.sparsifier.known_optimizers import ELEMENTWISE, MOMENT, MOMENTS, OTHER, Kind, Meaning, known
from dstlib.targets import MatrixView

_MOMENTA = ("momentum_buffer", "exp_avg")  # SGD, RMSprop, Muon · Adam and its kin
_SHELVES = ("trac",)  # names under which state is kept by parameter: pytorch_optimizer's TRAC
_COUNTS = {"step": 0, "mu_product": 1}  # what Adam and NAdam correct by, as it is before the first step
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # numbers that are no codes of others
_CONTAINERS = (Mapping, list, tuple, deque)
_WORDS = {
    "moment": "moments",
    "accumulator": "accumulators",
    "weights": "copies of the weights",
    "other": "left alone:",
}


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Returns the identities of the parameters an optimizer steps on, as of now: groups may be added at any time."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def momentum_of(optimizers: Iterable[Optimizer], parameter: nn.Parameter) -> Tensor | None:
    """Returns the first moment of the gradient that the first of these keeps; None where none does (yet)."""
    states = (optimizer.state.get(parameter, {}) for optimizer in optimizers)
    found = (state[key] for state in states for key in _MOMENTA if isinstance(state.get(key), Tensor))
    momentum = next((value for value in found if value.shape == parameter.shape), None)
    return momentum.dequantize() if momentum is not None and hasattr(momentum, "codes") else momentum


@dataclass(frozen=True)
class Kept:
    """Something that an optimizer keeps for each entry of a weight.

    ``values`` are numbers or their codes, of the weight's shape or several times that, in the optimizer's memory;
    outside the mask they are ``birth``. Two codes of four bits share one of the values if they are ``packed``.
    """

    key: str
    values: Tensor
    meaning: Meaning
    birth: float
    packed: bool = False

    @property
    def is_started(self) -> bool:
        """Whether an entry that grows starts as something of its weight, or of its first gradient."""
        return self.meaning.kind == "weights" or self.meaning.first is not None

    def write_outside(self, mask: Tensor) -> None:
        """Writes the value at birth wherever the mask is False; the rest keeps its bits.

        >>> step_size = torch.tensor([0.5, 0.6])
        >>> Kept("step_size", step_size, MOMENT, 0.01).write_outside(torch.tensor([True, False])); step_size
        tensor([0.5000, 0.0100])
        """
        if self.packed:
            high, low = mask.reshape(-1, 2).to(self.values.device, torch.uint8).unbind(dim=1)
            inside, outside = high * 0xF0 | low * 0x0F, int(self.birth) * 0x11
            self.values.copy_(self.values & inside | outside & ~inside)
        elif self.birth:
            self.values.masked_fill_(~mask.to(self.values.device), self.birth)
        else:
            zero_outside_(self.values, mask)

    def start(self, where: Tensor, parameter: Tensor, grad: Tensor | None) -> None:
        """Starts what is made of the weight, or of its first gradient, where a boolean tensor of its shape is True.

        >>> slow, weight = torch.zeros(2), torch.tensor([0.5, 0.6])
        >>> Kept("slow", slow, Meaning("weights"), 0.0).start(torch.tensor([True, False]), weight, None); slow
        tensor([0.5000, 0.0000])
        """
        if self.meaning.kind == "weights":
            first = parameter
        elif self.meaning.first is not None and grad is not None:
            first = self.meaning.first(grad)
        else:
            return
        self.values.copy_(torch.where(where, first.to(self.values.dtype), self.values))

    def start_beside(self, view: MatrixView, grown: Tensor, stayed: Tensor, grad: Tensor | None) -> None:
        """Starts what steps are divided by, in one matrix of the weight, as large as it is where weights stayed.

        That is its mean over them, times the size of the own gradient to the ``power``, over the mean of theirs, where
        that is more than 1; without a gradient, the mean. All boolean and other tensors have the weight's shape. What
        is kept in codes, or not of the weight's shape, starts as at birth, and so does all where no weight stayed.

        >>> squares, stayed = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[True, False, False]])
        >>> kept = Kept("exp_avg_sq", squares, Meaning("moment", power=2), 0.0)
        >>> kept.start_beside(MatrixView("weight"), ~stayed, stayed, torch.tensor([[1.0, 0.5, 3.0]])); squares
        tensor([[ 4.,  4., 36.]])
        """
        if self.meaning.power is None or self.values.shape != grown.shape or self.values.dtype not in _PLAIN:
            return
        device, values = self.values.device, view.parts(self.values)
        at_grown, at_stayed = (view.parts(x.to(device)).nonzero(as_tuple=True) for x in (grown, stayed))
        if not len(at_stayed[0]):
            return
        typical = values[at_stayed].mean(dtype=torch.float32)
        if grad is not None:
            parts = view.parts(grad.to(device))  # few of which are looked at
            of_grown, of_stayed = (parts[at].float().abs().pow(self.meaning.power) for at in (at_grown, at_stayed))
            relative = of_grown / of_stayed.mean()
            typical = typical * torch.where(relative.isfinite(), relative, 1.0).clamp(min=1.0)
        values[at_grown] = typical.to(values.dtype)


class StateMeanings:
    """Tells what optimizers keep for weights, and remembers what it has observed.

    ``stated`` maps globs over keys ("exp_avg"; nested keys are joined by dots: "momentum_buffer.*") to one of the
    words moment, accumulator, weights, other.

    >>> weight = nn.Parameter(torch.zeros(2, 2)); optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=1)
    >>> kept, = StateMeanings({}).kept(optimizer, weight, PackedMask.of(torch.eye(2, dtype=torch.bool)))
    >>> kept.key, kept.meaning.kind, kept.birth
    ('sum', 'accumulator', 1.0)
    """

    def __init__(self, stated: Mapping[str, Kind]) -> None:
        self._stated = dict(stated)
        self._used: set[str] = set()  # of the globs, those that a key was found for
        self._seen: WeakKeyDictionary[Optimizer, _Seen] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what the user stated: optimizers are met again when they step."""
        return {"_stated": self._stated, "_used": self._used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _seen=WeakKeyDictionary())

    def meet(self, optimizer: Optimizer, weights: Iterable[tuple[nn.Parameter, PackedMask | None]]) -> None:
        """Looks, before its first step, at what an optimizer keeps already for weights under these masks."""
        seen = self._seen.setdefault(optimizer, _Seen())
        if not seen.is_met:
            for parameter, mask in weights:
                if mask is not None:
                    self.kept(optimizer, parameter, mask)
            seen.is_met = True

    def kept(self, optimizer: Optimizer, parameter: nn.Parameter, mask: PackedMask) -> tuple[Kept, ...]:
        """Returns what an optimizer keeps for each entry of a weight: what is to be written to outside the mask."""
        state = _state_of(optimizer, parameter)
        values = tuple(state.values())
        seen = self._seen.get(optimizer)
        if seen is None:
            seen = self._seen[optimizer] = _Seen()
        last = seen.last.get(id(parameter))
        if last is not None and last.is_of(values):
            return last.kept
        kept, group, is_complete = [], None, not any(isinstance(value, _CONTAINERS) for value in values)
        for key, value, siblings in _leaves(state):
            entries = _entries(key, value, siblings, parameter.shape)
            decided = None if entries is None else self._decide(optimizer, parameter, key, entries, mask)
            if entries is None or decided is None:
                is_complete = is_complete and entries is None
                continue
            meaning, how = decided
            seen.said[key, meaning.kind] = how
            birth = meaning.birth
            if callable(birth):
                group = group or _group_of(optimizer, parameter)
                birth = birth(group)
            if meaning.kind != "other":
                kept.append(Kept(key, entries.values, meaning, entries.zero or birth, entries.packed))
        found = _Found(tuple(kept), values, group)
        if is_complete:  # what is in containers may be another each time
            seen.last[id(parameter)] = found
        return found.kept

    def lines(self) -> tuple[str, ...]:
        """Returns a line for each class of optimizers that was met: which keys mean what, and how that is known."""
        said: dict[str, dict[tuple[Kind, str], list[str]]] = {}
        for optimizer, seen in self._seen.items():
            for (key, kind), how in seen.said.items():
                keys = said.setdefault(type(optimizer).__name__, {}).setdefault((kind, how), [])
                keys.extend([key] if key not in keys else [])
        return tuple(
            f"state of {name}: "
            + "; ".join(f"{_WORDS[kind]} {', '.join(keys)} ({how})" for (kind, how), keys in groups.items())
            for name, groups in said.items()
        )

    def warn_of_unused(self) -> None:
        """Warns of stated globs that no optimizer has kept anything under, once it has had the time."""
        unused = [pattern for pattern in self._stated if pattern not in self._used]
        if unused:
            keys = sorted({key for seen in self._seen.values() for key, _ in seen.said})
            warnings.warn(
                f"state= of sparsify(): {', '.join(unused)} matches nothing that the optimizers keep for each entry of "
                f"a sparse weight: {', '.join(keys) or 'nothing'}. Keys of nested state are joined by dots.",
                stacklevel=2,
            )

    def _decide(
        self, optimizer: Optimizer, parameter: nn.Parameter, key: str, entries: "_Entries", mask: PackedMask
    ) -> tuple[Meaning, str] | None:
        """Returns the meaning of a key, and whether it is stated, known or observed; None if there is nothing yet."""
        pattern = next((pattern for pattern in self._stated if fnmatchcase(key, pattern)), None)
        if pattern is not None:
            self._used.add(pattern)
        word = None if pattern is None else self._stated[pattern]
        classes: list[type] = [type(layer) for layer in _layers(optimizer)]
        table = next((meaning for cls in classes if (meaning := known(cls, key)) is not None), None)
        if table is None and entries.zero is not None:
            table = MOMENT  # nobody quantises anything else
        if table is not None and word in (None, table.kind):
            return table, "known" if word is None else "stated"
        if word is not None and word != "accumulator":
            return Meaning(word), "stated"
        if not entries.values.is_floating_point():
            return OTHER, "whole numbers"
        seen = self._seen[optimizer].observe(id(parameter), key, entries.values, mask)
        if seen is None or word is None:
            return None if seen is None else (seen, "observed")
        return Meaning("accumulator", seen.birth), "stated"


@dataclass
class _Seen:
    """What is remembered of an optimizer: what it kept for each parameter, what was observed, and what to say of it.

    What was observed of a key is a word as long as there was nothing to be seen: whether it can still be.
    """

    is_met: bool = False
    last: dict[int, "_Found"] = field(default_factory=dict)
    observed: dict[tuple[int, str], Meaning | Literal["new", "old"]] = field(default_factory=dict)
    said: dict[tuple[str, Kind], str] = field(default_factory=dict)

    def observe(self, parameter: int, key: str, values: Tensor, packed: PackedMask) -> Meaning | None:
        """Returns what the values show, now or earlier; None as long as they show nothing."""
        before = self.observed.get((parameter, key))
        if isinstance(before, Meaning):
            return before
        mask = packed.current()
        before = before or ("new" if self.is_met and not bool(mask.all()) else "old")
        meaning = observe(values, mask.to(values.device))
        if meaning is OTHER and before == "old":  # kept under another mask, or none: only its name tells
            others = (m for (_, k), m in self.observed.items() if k == key and isinstance(m, Meaning))
            meaning = next(others, MOMENTS.get(key, OTHER))
        self.observed[parameter, key] = before if meaning is None else meaning
        return meaning


class _Found(NamedTuple):
    """What was kept for a parameter, and the state in which it was found; its group, if births depend on it."""

    kept: tuple[Kept, ...]
    values: tuple[Any, ...]
    group: Mapping[str, Any] | None

    def is_of(self, values: tuple[Any, ...]) -> bool:
        """Whether the state holds the same tensors, and births are what they were."""
        if len(values) != len(self.values):
            return False
        if not all(map(is_, self.values, values)):
            pairs = zip(self.values, values, strict=True)
            if not all(a is b or not isinstance(b, (Tensor, *_CONTAINERS)) for a, b in pairs):  # numbers may differ
                return False
        group = self.group
        return group is None or all(k.birth == k.meaning.birth(group) for k in self.kept if callable(k.meaning.birth))


class _Entries(NamedTuple):
    """One value per entry, viewed in the weight's shape; if they are codes, the one of ``zero``."""

    values: Tensor
    zero: int | None = None
    packed: bool = False


def observe(values: Tensor, mask: Tensor) -> Meaning | None:
    """Returns what is seen of values that have been kept since the weight was masked; None if they tell nothing yet.

    With one value outside the mask and others inside they are of single entries, born with the value outside; if they
    vary outside they are not. If all are the same, or nothing is outside, there is nothing to be seen.

    >>> mask = torch.tensor([True, True, False, False])
    >>> observe(torch.tensor([0.3, 0.2, 1.0, 1.0]), mask)
    Meaning(kind='accumulator', birth=1.0, first=None, power=None)
    >>> observe(torch.tensor([0.3, 0.2, 0.0, 0.1]), mask).kind, observe(torch.zeros(4), mask)
    ('other', None)
    """
    if bool(mask.all()):
        return None
    lowest = torch.where(mask, torch.inf, values).amin()
    if bool(lowest != torch.where(mask, -torch.inf, values).amax()):
        return OTHER
    if not bool(((values != lowest) & mask).any()):
        return None
    birth = float(lowest)
    return Meaning("accumulator", birth) if birth else MOMENT


def reset_state(optimizer: Optimizer, parameter: nn.Parameter, kept: Iterable[Kept], grad: Tensor | None) -> None:
    """Starts what an optimizer keeps for a weight afresh, entry by entry, and the steps that Adam corrects by."""
    everywhere = torch.ones_like(parameter, dtype=torch.bool)
    for k in kept:
        k.write_outside(~everywhere)
        k.start(everywhere, parameter.detach(), grad)
    state = optimizer.state.get(parameter, {})
    for key, first in _COUNTS.items():
        if isinstance(state.get(key), Tensor):
            state[key].fill_(first)
        elif key in state:
            state[key] = first


def check_stated(state: Mapping[str, Kind]) -> None:
    """Checks that each meaning is one of the four words.

    Raises:
        SettingError: One is not.
    """
    for key, word in state.items():
        require(
            word in get_args(Kind),
            f"state of {key}",
            "sparsify()",
            allowed=f"one of {', '.join(get_args(Kind))}",
            given=repr(word),
            remedy='Pass {"exp_avg": "moment"}, say; keys are globs, those of nested state joined by dots.',
        )


def overflowed(optimizer: Optimizer) -> bool:
    """Whether this step does nothing because of an AMP overflow.

    ``GradScaler`` does not call the step of an ordinary optimizer then; it does call that of a fused one and
    leaves word of the overflow in ``found_inf`` for the length of the call.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def takes_no_step(optimizer: Optimizer) -> bool:
    """Whether this call of ``step`` is none of the training: an AMP overflow, or a rehearsal.

    ``torch.distributed.checkpoint`` steps an optimizer to have its state made, with zero gradients and rates.
    """
    if overflowed(optimizer):
        return True
    rates = [group.get("lr") for group in optimizer.param_groups]
    # a rate on another device would have to be waited for at each step, and torch's rehearsal has none there
    if any(rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) for rate in rates):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(grad.any()) for grad in grads)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether a step does the same to entries that are the same, by what is known of its very class."""
    return type(optimizer) in ELEMENTWISE


def loss_scale(optimizer: Optimizer | None) -> float:
    """Returns the loss scale in the gradients, which a fused optimizer divides out only inside its step; else 1."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def refuse_unsupported(optimizer: Optimizer) -> None:
    """Refuses optimizers that move the weights elsewhere than in their step, or several times in one.

    Raises:
        SettingError: The optimizer is one.
    """
    why = ""
    if isinstance(optimizer, LBFGS):
        why = "its line search evaluates several points per step, all of them dense"
    elif hasattr(optimizer, "fused_backward"):  # LOMO, AdaLOMO
        why = "it moves each weight inside the backward pass, before its gradient could be masked"
    elif type(optimizer).__name__ == "CPUOffloadOptimizer":  # torchao
        why = "it moves copies of the weights on the host, by gradients that it takes inside the backward pass"
    if why:
        raise SettingError.of(
            "optimizer",
            "sparsify()",
            allowed="one that moves the weights once, in its step",
            given=f"{type(optimizer).__name__} ({why})",
            remedy="Use SGD or Adam, say.",
        )


def _leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor, Any]]:
    """Yields each tensor of a nested state with its key, and the container that holds it."""
    items = state.items() if isinstance(state, Mapping) else enumerate(state)
    for key, value in items:
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value, state
        elif isinstance(value, _CONTAINERS):
            yield from _leaves(value, f"{prefix}{key}.")


def _layers(optimizer: Optimizer) -> list[Optimizer]:
    """Returns an optimizer and those that it wraps, outermost first: their state is its own, as with Accelerate's."""
    layers: list[Optimizer] = []
    layer: Optimizer | None = optimizer
    while layer is not None:
        layers.append(layer)
        inside = (x for x in vars(layer).values() if isinstance(x, Optimizer) and x not in layers)
        layer = next((x for x in inside if x.state is optimizer.state), None)
    return layers


def _state_of(optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[Any, Any]:
    """Returns what is kept for a parameter, under it or under one of the known names."""
    states: Mapping[Any, Any] = optimizer.state
    state: Mapping[Any, Any] = states.get(parameter) or {}
    for name in _SHELVES:
        shelf = states.get(name)
        if isinstance(shelf, Mapping) and parameter in shelf:
            state = {**state, name: shelf[parameter]}
    return state


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _entries(key: str, value: Tensor, siblings: Any, shape: torch.Size) -> _Entries | None:
    """Returns the values of single entries, by their shape: the weight's, in a row, or several of it; else None."""
    if value.numel() == 1:
        return None
    if hasattr(value, "codes") and hasattr(value, "scale"):  # torchao
        zero = int(value.qmap.abs().argmin()) if hasattr(value, "qmap") else 0  # four bits without sign have no zero
        packed = value.codes.numel() * 2 == value.numel()
        return _Entries(value.codes, zero, packed) if value.shape == shape else None
    if value.shape == (shape.numel(),):
        value = value.view(shape)
    elif value.shape[-len(shape) :] != shape:
        return None
    qmap = siblings.get(f"qmap{key[-1]}") if isinstance(siblings, Mapping) else None  # bitsandbytes
    if qmap is not None and value.dtype == torch.uint8:
        return _Entries(value, int(qmap.abs().argmin()))
    return _Entries(value) if value.dtype != torch.bool else None
