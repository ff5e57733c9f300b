"""Sparse training inside a trainer of someone else: what the adapters share. Knows no trainer."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.errors import StateError, few, require
from dstlib.methods import find_method
from dstlib.methods.method import Method
from dstlib.sparsifier import Sparsifier, saved, sparsify
from dstlib.sparsifier.plan import check_sparsity
from dstlib.torch_files import check_seal, checksum

VERSION = 1
_SEALED = ("version", "settings", "total_steps")  # the sparsifier's state has a checksum of its own
_BY_THE_TRAINER = "It is made when the trainer begins to train, in the very processes that train."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of :func:`dstlib.sparsify`, kept until there is a model; no ``total_steps``: the trainer's own.

    Raises:
        SettingError: The sparsity is out of range, or there is no such method.
    """

    sparsity: float
    method: str | Method = "rigl"
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    overrides: Mapping[str, float] | None = None
    seed: int = 0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "SparseTraining")
        find_method(self.method)

    def sparsify(self, model: nn.Module, *optimizers: Optimizer, total_steps: int | None) -> Sparsifier:
        """Makes a model sparse by these settings."""
        return sparsify(
            model,
            *optimizers,
            sparsity=self.sparsity,
            method=self.method,
            total_steps=total_steps,
            include=self.include,
            exclude=self.exclude,
            overrides=self.overrides,
            seed=self.seed,
        )

    def plain(self) -> dict[str, Any]:
        """Returns, as plain values, what a resumed training must share with the one that was saved.

        >>> Settings(sparsity=0.9, include="encoder.*").plain()["include"]
        ['encoder.*']
        """
        method = find_method(self.method)
        return {
            "sparsity": self.sparsity,
            "method": method.name,
            "granularity": repr(method.granularity),
            "interval": method.interval,
            "include": [self.include] if isinstance(self.include, str) else list(self.include),
            "exclude": [self.exclude] if isinstance(self.exclude, str) else list(self.exclude),
            "overrides": dict(self.overrides or {}),
            "seed": self.seed,
        }


class HostedTraining:
    """A sparse training that a trainer hosts: it begins once optimizers exist, and travels in the checkpoints."""

    def __init__(self, settings: Settings, *, begins: str = _BY_THE_TRAINER) -> None:
        self.settings = settings
        self._begins = begins
        self._sparsifier: Sparsifier | None = None
        self._total_steps: int | None = None
        self.loaded: Mapping[str, Any] | None = None  # a state that waits for its training to begin

    @property
    def sparsifier(self) -> Sparsifier:
        """The sparsifier of the training.

        Raises:
            StateError: The training has not begun in this process.
        """
        if self._sparsifier is None:
            raise StateError.of(
                "sparsifier",
                "SparseTraining",
                allowed="a training that has begun in this process",
                given="none",
                remedy=self._begins,
            )
        return self._sparsifier

    def is_of(self, model: nn.Module) -> bool:
        """Whether the training has begun, with this very model."""
        if self._sparsifier is None:
            return False
        return len(self._shared_with(model)) == len(self._sparsifier.weights)

    def refuse_replaced(self, model: nn.Module, where: str) -> None:
        """Refuses a model in which layers were replaced since the training began.

        Raises:
            StateError: Some of the sparse weights are its parameters, and others are not.
        """
        shared = self._shared_with(model)
        gone = [weight.name for weight in self.sparsifier.weights if weight.name not in shared]
        if shared and gone:
            raise StateError.of(
                "sparse weights",
                where,
                allowed="the parameters that the training began with",
                given=f"others in the place of {few(gone, most=3)}",
                remedy="Replace layers before the training begins, or between two of them.",
            )

    def begin(self, model: nn.Module, *optimizers: Optimizer, total_steps: int | None) -> None:
        """Makes the model sparse, or continues a training of it: the state that was loaded, or the masks it has.

        Weights that belong to such a state keep their values. ``total_steps`` is the trainer's count of optimizer
        steps, None where it has no end; the settings' own number, if any, comes first.

        Raises:
            SettingError: A setting is out of range.
            SelectionError: Weights do not exist, cannot be sparse or are sparse already.
            StateError: The loaded state is damaged or of another model.
        """
        total_steps = self.settings.total_steps if self.settings.total_steps is not None else total_steps
        state, self.loaded = self.loaded, None
        goes_on = False
        if self.is_of(model):
            if total_steps == self._total_steps:
                if state is not None:
                    self._restore(state)
                return
            goes_on = state is None
        observers = self.leave(model)
        with torch.no_grad(), warnings.catch_warnings():
            if goes_on:  # with weights that may have been loaded since: the first step finds masks for them, or says so
                warnings.filterwarnings("ignore", message=r"(load_)?state_dict\(\): .* non-zeros of")
                state = self.state_dict()
            self._total_steps = total_steps
            if state is None:
                self._sparsifier = self.settings.sparsify(model, *optimizers, total_steps=total_steps)
            else:
                weights = [(p, p.detach().clone()) for p in model.parameters() if p.ndim > 1]
                self._begin_with(state, model, weights)
                if goes_on:
                    _put_back(weights)
        self.sparsifier.observers.extend(observers)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a trainer's checkpoint is to hold beside model and optimizers: plain values and tensors."""
        state = {"version": VERSION, "settings": self.settings.plain(), "total_steps": self._total_steps}
        return {**state, "checksum": checksum(state), "sparsifier": self.sparsifier.state_dict()}

    def load_state_dict(self, state: Any, model: nn.Module | None, *, where: str) -> None:
        """Takes a state from ``state_dict``, now if it is of the model that is trained, or else when that begins.

        The weights of the model are loaded by then. ``model`` is None where there is none yet, ``where`` names the
        checkpoint in messages.

        Raises:
            StateError: There is none, it is damaged, or it was saved under other settings; nothing has changed then.
        """
        allowed = f"the masks of a sparse training, version {VERSION}"
        given = "none" if state is None else type(state).__name__
        if isinstance(state, Mapping):
            given = f"version {state.get('version')}"
        remedy = "Continue from a checkpoint that SparseTraining was there to write."
        is_ours = isinstance(state, Mapping) and state.get("version") == VERSION
        require(is_ours, "masks", where, allowed=allowed, given=given, remedy=remedy, error=StateError)
        _check_contents(state, where, remedy)
        refuse_other_settings(state["settings"], self.settings.plain(), where)
        check_seal(state, {name: state.get(name) for name in _SEALED}, where=where)
        if model is not None and self.is_of(model):
            self._restore(state)
        else:
            self.loaded = state

    def _begin_with(
        self, state: Mapping[str, Any], model: nn.Module, weights: Sequence[tuple[nn.Parameter, Tensor]]
    ) -> None:
        """Begins with a state, and the weights that belong to it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"sparsify\(\): .*already held zeros")  # these will not train
            # without the optimizers: the first masks are not those that their state and the weights belong to
            self._sparsifier = self.settings.sparsify(model, total_steps=self._total_steps)
        _put_back(weights)
        try:
            self._restore(state)
        except StateError:
            self._sparsifier.detach()  # or else its masks, the first ones, would hold
            raise

    def _restore(self, state: Mapping[str, Any]) -> None:
        ours = state["sparsifier"]
        if state["total_steps"] != self._total_steps:
            ours = saved.of_length(ours, self._total_steps)
        self.sparsifier.load_state_dict(ours)
        if state["total_steps"] != self._total_steps and self.sparsifier.step > 0:
            warnings.warn(
                f"The masks were saved in a training of {state['total_steps']} optimizer steps, which now has "
                f"{self._total_steps}: from here on, they change by the schedule of the new one.",
                stacklevel=3,
            )

    def leave(self, model: nn.Module) -> list[Any]:
        """Ends a training of this model, or of what is left of it, and returns who observed it; lets another be."""
        if self._sparsifier is None or not self._shared_with(model):
            return []
        self._sparsifier.detach()
        return self._sparsifier.observers

    def _shared_with(self, model: nn.Module) -> list[str]:
        """Returns the names of the sparse weights that are parameters of a model."""
        ours = {id(parameter) for parameter in model.parameters()}
        return [weight.name for weight in self.sparsifier.weights if id(weight.parameter) in ours]


def at_step_0(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state of ``HostedTraining`` with its masks, but with the clock of a training that begins.

    Raises:
        StateError: The state is damaged.
    """
    return {**state, "sparsifier": saved.at_step_0(state.get("sparsifier"))}


def masks_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the masks in a state of ``HostedTraining`` by the names of their weights.

    Raises:
        StateError: The state is damaged.
    """
    return saved.masks_of(state.get("sparsifier"))


def _check_contents(state: Mapping[str, Any], where: str, remedy: str) -> None:
    """Checks the parts of a state but the sparsifier's, which is checked when it is taken back."""
    steps = state.get("total_steps")
    if not isinstance(state.get("settings"), Mapping) or not (steps is None or (type(steps) is int and steps > 0)):
        allowed = "settings, and total_steps as a whole number or None"
        raise StateError.of("contents", where, allowed=allowed, given=", ".join(map(str, state)), remedy=remedy)


def _put_back(weights: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, weight in weights:
        parameter.copy_(weight)


class Adapter:
    """What adapters have in common: the settings of :func:`dstlib.sparsify`, and the sparsifier once there is one."""

    _begins = _BY_THE_TRAINER

    def __init__(
        self,
        *,
        sparsity: float,
        method: str | Method = "rigl",
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        overrides: Mapping[str, float] | None = None,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        settings = Settings(
            sparsity=sparsity,
            method=method,
            include=include,
            exclude=exclude,
            overrides=overrides,
            seed=seed,
            total_steps=total_steps,
        )
        self._training = HostedTraining(settings, begins=self._begins)

    @property
    def sparsifier(self) -> Sparsifier:
        """The sparsifier of the latest training.

        Raises:
            StateError: None has begun in this process.
        """
        return self._training.sparsifier


def refuse_other_settings(saved: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Refuses a training that differs from the one that was saved, naming each setting that does.

    Raises:
        StateError: A setting differs.

    >>> refuse_other_settings({"sparsity": 0.8, "seed": 0}, {"sparsity": 0.9, "seed": 0}, "checkpoint_latest.pth")
    Traceback (most recent call last):
        ...
    dstlib.errors.StateError: settings of checkpoint_latest.pth: expected sparsity 0.8, got sparsity 0.9. Continue \
with the trainer and the settings that it was saved with.
    """
    names = [name for name in sorted({*saved, *settings}) if saved.get(name) != settings.get(name)]
    allowed, given = (", ".join(f"{name} {side.get(name)}" for name in names) for side in (saved, settings))
    remedy = "Continue with the trainer and the settings that it was saved with."
    require(not names, "settings", where, allowed=allowed, given=given, remedy=remedy, error=StateError)
