"""Sparse training as a handler of MONAI's trainers; MONAI and ignite are imported when it is attached."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from dstlib.errors import SettingError, require
from dstlib.integrations.training import Adapter, Settings

if TYPE_CHECKING:
    from monai.engines import SupervisedTrainer


class SparseTraining(Adapter):
    """Trains the network of a MONAI trainer sparse: a handler to attach, or to name among ``train_handlers``.

    The settings are those of :func:`dstlib.sparsify`; ``total_steps`` is by itself the number of optimizer steps of
    ``max_epochs``. The network becomes sparse when the run starts. Named in the ``save_dict`` of a CheckpointSaver,
    the handler brings masks and counters; named in the ``load_dict`` of a CheckpointLoader, it takes them back.
    """

    _network: nn.Module | None = None  # once the run has started
    _averages: tuple[nn.Module, ...] = ()

    def attach(self, engine: "SupervisedTrainer") -> None:
        """Attaches the handler to a trainer, before what clips its gradients.

        Under ``amp``, gradients are unscaled from here on: what clips them must not do so again.
        """
        from ignite.engine import Events
        from monai.engines.utils import IterationEvents

        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._mask_gradients)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._mask_averages)

    def mask_average(self, average: nn.Module) -> None:
        """Keeps an average of the network as sparse as the network: ``EMAHandler.ema_model``, say."""
        self._averages = (*self._averages, average)

    def state_dict(self) -> dict[str, Any]:
        """Returns settings, masks and counters, for a checkpoint; nothing before the run has started."""
        return {} if self._network is None else self._training.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks and counters back, now or when the run starts; the weights may be loaded before or after.

        Raises:
            StateError: The state is damaged, or of another model or other settings.
        """
        self._training.load_state_dict(state, self._network, where="the checkpoint")

    def _start(self, engine: "SupervisedTrainer") -> None:
        network, optimizer = (getattr(engine, name, None) for name in ("network", "optimizer"))
        if network is None or optimizer is None:
            raise SettingError.of(
                "trainer",
                "SparseTraining.attach()",
                allowed="one with a network and an optimizer, as SupervisedTrainer",
                given=type(engine).__name__,
                remedy="Call dstlib.sparsify() for each network before the run, and save the sparsifiers it returns.",
            )
        self._training.begin(network, optimizer, total_steps=_count_steps(engine, self._training.settings))
        self._network = network
        self._mask_averages(engine)
        engine.logger.info(f"dstlib: {self.sparsifier.summary()}")

    def _mask_gradients(self, engine: "SupervisedTrainer") -> None:
        """Masks the gradients that the optimizer is about to step with: what clips them then sees their norm."""
        if _is_stepping(engine):
            if engine.scaler is not None:
                engine.scaler.unscale_(engine.optimizer)
            self.sparsifier.before_step(engine.optimizer)

    def _mask_averages(self, engine: "SupervisedTrainer") -> None:
        for average in self._averages:
            self.sparsifier.mask_model(average)


def _count_steps(engine: "SupervisedTrainer", settings: Settings) -> int | None:
    """Counts the optimizer steps of a run: the last one of an epoch takes what gradients are left."""
    epoch_length = engine.state.epoch_length
    if epoch_length is None:
        require(
            settings.total_steps is not None,
            "epoch_length",
            type(engine).__name__,
            allowed="a number",
            given=None,
            remedy="Pass total_steps= to SparseTraining, or epoch_length= to the trainer.",
        )
        return None
    return engine.state.max_epochs * math.ceil(epoch_length / engine.accumulation_steps)


def _is_stepping(engine: "SupervisedTrainer") -> bool:
    """Whether the optimizer steps in this iteration, as MONAI decides it after this event."""
    epoch_length, iteration = engine.state.epoch_length, engine.state.iteration
    done = iteration if epoch_length is None else (iteration - 1) % epoch_length + 1
    return done % engine.accumulation_steps == 0 or done == epoch_length
