"""Sparse training in scripts of timm's kind, in the place of their loss scaler; timm is imported when it clips."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.integrations.training import Adapter
from dstlib.sparsifier import Sparsifier


class LossScaler(Protocol):
    """What timm's scripts call to go backward and to step: ``NativeScaler``, say."""

    def __call__(
        self,
        loss: Tensor,
        optimizer: Optimizer,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> None:
        """Goes backward, and steps if ``need_update``."""

    def state_dict(self) -> dict[str, Any]:
        """Returns its state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes its state back."""


class SparseTraining(Adapter):
    """Trains the model of a timm script sparse, as the ``loss_scaler`` that the script calls, saves and resumes.

    That is the one object of such a script that sees gradients before they are clipped, and has a field in timm's
    checkpoints, ``state_dict_key``. The settings are those of :func:`dstlib.sparsify`.
    """

    state_dict_key = "dstlib"

    _begins = "Call begin(model, optimizer, total_steps=...) before the first step."
    _is_noticed = False
    _scaler: LossScaler | None = None
    _model: nn.Module | None = None  # once the training has begun
    _averages: tuple[nn.Module, ...] = ()

    def around(self, scaler: LossScaler | None) -> Self:
        """Hands the work on to the script's own loss scaler, if it has one, and returns itself."""
        self._scaler = scaler
        return self

    def begin(self, model: nn.Module, optimizer: Optimizer, *, total_steps: int | None = None) -> Sparsifier:
        """Makes the model sparse, before or after a checkpoint is resumed; ``total_steps`` as in ``sparsify``.

        Raises:
            SettingError: A setting is out of range.
            SelectionError: Weights do not exist, cannot be sparse or are sparse already.
            StateError: The resumed checkpoint is of another model or other settings.
        """
        self._training.begin(model, optimizer, total_steps=total_steps)
        self._model = model
        optimizer.register_step_pre_hook(self._notice)
        return self.sparsifier

    def _notice(self, *_: Any) -> None:
        """Warns, once, of an optimizer step that the script takes by itself."""
        if not self._is_noticed:
            self._is_noticed = True
            warnings.warn(
                "SparseTraining: the optimizer steps, but not through it. The weights stay sparse all the same, but "
                "clipping sees dense gradients, averages are not masked, and checkpoints have no masks. Call it in the "
                "place of the script's loss_scaler: loss_scaler = sparse.around(loss_scaler).",
                stacklevel=2,
            )

    def mask_average(self, average: nn.Module) -> None:
        """Keeps an average of the model as sparse as the model: a ``ModelEmaV3``, say."""
        self._averages = (*self._averages, average)

    def __call__(
        self,
        loss: Tensor,
        optimizer: Optimizer,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> None:
        """Does as timm's scalers do, but masks gradients before they are clipped.

        Raises:
            StateError: ``begin`` was not called.
        """
        sparsifier, self._is_noticed = self.sparsifier, True
        masked = None if parameters is None else _masked(parameters, optimizer, sparsifier)
        if self._scaler is not None:
            self._scaler(loss, optimizer, clip_grad, clip_mode, masked, create_graph, need_update)
        else:
            loss.backward(create_graph=create_graph)
            if need_update:
                if clip_grad is not None:
                    from timm.utils import dispatch_clip_grad

                    dispatch_clip_grad(masked, clip_grad, mode=clip_mode)
                optimizer.step()
        for average in self._averages:
            sparsifier.mask_model(average)  # then an update of it stays inside the masks

    def state_dict(self) -> dict[str, Any]:
        """Returns settings, masks and counters, and the state of the script's own loss scaler."""
        scaler = None if self._scaler is None else self._scaler.state_dict()
        return {"training": self._training.state_dict(), "scaler": scaler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks and counters back, now or in ``begin``; the weights are loaded before.

        Raises:
            StateError: The state is damaged, or of another model or other settings.
        """
        self._training.load_state_dict(state["training"], self._model, where="the checkpoint")
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])


def _masked(parameters: Iterable[Tensor], optimizer: Optimizer, sparsifier: Sparsifier) -> Iterator[Tensor]:
    """Masks the gradients at the moment when clipping asks for them: they are complete and unscaled then."""
    sparsifier.before_step(optimizer)
    yield from parameters
