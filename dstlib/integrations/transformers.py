"""Sparse training as a callback of Hugging Face's Trainer.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[SparseTraining(sparsity=0.9, method="rigl")])
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))

Needs ``transformers`` and ``accelerate``.
"""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState, PartialState
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dstlib.errors import SettingError, StateError
from dstlib.integrations.backward import AfterBackward
from dstlib.integrations.training import Adapter, HostedTraining, at_step_0, masks_of
from dstlib.masking.update import count_outside
from dstlib.sparsifier import Sparsifier
from dstlib.targets import find_weights
from dstlib.torch_files import read_torch, write_torch

FILE = "dstlib_state.pt"  # in each folder of a checkpoint


class SparseTraining(Adapter, TrainerCallback):
    """Keeps the model of a Trainer sparse from the first step to the last, and in its checkpoints.

    The settings are those of :func:`dstlib.sparsify`; without ``total_steps``, the Trainer's own count of steps is
    taken. The model becomes sparse when ``train()`` begins. From then on, ``sparsifier`` tells what is sparse.

    >>> SparseTraining(sparsity=0.9, method="rigl", exclude="lm_head").sparsifier
    Traceback (most recent call last):
    dstlib.errors.StateError: sparsifier of SparseTraining: expected a training that has begun in this process, got \
none. It is made when the trainer begins to train, in the very processes that train.
    """

    _after_backward: AfterBackward | None = None
    _has_begun_step = _has_masked = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        **others: Any,
    ) -> None:
        """Makes the model sparse, or takes the masks of the checkpoint that is resumed.

        Model and optimizer are there, loaded and on their device, and no step was taken. A second ``train()`` is a
        training of its own, of the weights that the first one left.

        Raises:
            SettingError: A setting is out of range, or the weights are sharded.
            SelectionError: Weights do not exist, cannot be sparse or are sparse already.
            StateError: The checkpoint has no masks, or others than its weights; nothing has changed then.
        """
        _refuse_sharding()
        folder = _resumed_from()
        training = HostedTraining(self._training.settings)
        if folder is not None:
            saved = _read(folder)
            training.load_state_dict(saved, None, where=str(folder))
            if num_outside := _count_outside(model, masks_of(saved)):
                raise _mixed_up(folder, num_outside)
        elif self._training.is_of(model) and self.sparsifier.plan.method.allocate is not None:
            # budgets have moved between weights, which the plan of a new training cannot know
            training.load_state_dict(at_step_0(self._training.state_dict()), model, where="the training before")
        self._leave(model)
        inner = _inner(optimizer)
        training.begin(model, inner, total_steps=state.max_steps)
        self._training = training
        _save_with(state, training)

        def mask_gradients() -> None:
            self._refuse_second_pass()
            _mask_gradients(training.sparsifier, inner, optimizer.scaler)

        self._after_backward = AfterBackward(model.parameters(), is_wanted=self._is_last_pass, call=mask_gradients)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Waits for the gradients of a step, which are masked before the Trainer clips them."""
        self._has_begun_step, self._has_masked = True, False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Waits no more: other backward passes are none of the Trainer's."""
        self._has_begun_step = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **others: Any
    ) -> None:
        """Takes the masks of the best checkpoint, if the Trainer has loaded its weights.

        Raises:
            StateError: That checkpoint has no masks, or was loaded in part.
        """
        if self._after_backward is not None:
            self._after_backward.remove()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            folder = Path(state.best_model_checkpoint)
            saved = _read(folder)
            num_outside = _count_outside(model, masks_of(saved))
            if not num_outside:
                self._training.load_state_dict(saved, model, where=str(folder))
            elif _count_outside(model, self.sparsifier.masks):  # or else nothing was loaded: a pruned trial, say
                raise _mixed_up(folder, num_outside)

    def _leave(self, model: nn.Module) -> None:
        if self._after_backward is not None:
            self._after_backward.remove()
        self._training.leave(model)

    def _is_last_pass(self) -> bool:
        """Whether the gradients of a pass are all that the optimizer will step with."""
        return self._has_begun_step and bool(GradientState().sync_gradients)

    def _refuse_second_pass(self) -> None:
        if self._has_masked:
            raise SettingError.of(
                "backward passes",
                "the last batch of a step",
                allowed="one, which completes the gradients that masks are updated and clipped by",
                given="another",
                remedy="Checkpoint activations with use_reentrant=False; add losses up before backward().",
            )
        self._has_masked = True


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Returns the last checkpoint of a folder that is whole, to resume from; None without one.

    A process that is killed while it saves leaves a folder without ``trainer_state.json``, which is written last.
    ``train(resume_from_checkpoint=True)`` takes the folder of the highest number, and fails there.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     print(last_checkpoint(folder))
    None
    """
    folders = sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step_of, reverse=True)
    return next((str(folder) for folder in folders if _step_of(folder) >= 0 and _is_whole(folder)), None)


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError, RecursionError):  # not there yet, half of it, or of nobody that trains
        return False
    return (folder / FILE).is_file()


def _refuse_sharding() -> None:
    kind = str(PartialState().distributed_type.value)
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise SettingError.of(
            "distributed training",
            "Trainer with SparseTraining",
            allowed="one process, or several that each hold whole weights (DistributedDataParallel)",
            given=kind,
            remedy="Launch it by torchrun without fsdp and deepspeed.",
        )


def _inner(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _resumed_from() -> Path | None:
    """Returns the folder that the Trainer resumes from: it tells its callbacks everything but that.

    Raises:
        StateError: This release of transformers does not keep it where the last one did.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_inner_training_loop":
        frame = frame.f_back
    if frame is None or "resume_from_checkpoint" not in frame.f_locals:
        raise StateError.of(
            "checkpoint to resume",
            "Trainer with SparseTraining",
            allowed="resume_from_checkpoint in the Trainer's _inner_training_loop, as in transformers 5.24",
            given=f"none in transformers {transformers.__version__}",
            remedy="Use a release that dstlib was tested with, or train in a loop of your own.",
        )
    folder = frame.f_locals["resume_from_checkpoint"]
    return None if folder is None else Path(folder)


def _save_with(state: TrainerState, training: HostedTraining) -> None:
    """Has the Trainer's state bring the masks into each folder that it is saved to, before itself.

    No event would do: ``on_save`` comes when the checkpoint seems whole, and older ones have been deleted.
    """
    save_to_json = state.save_to_json

    def save(json_path: str | os.PathLike[str]) -> None:
        write_torch(Path(json_path).parent / FILE, training.state_dict())
        save_to_json(json_path)

    state.save_to_json = save


def _read(folder: Path) -> dict[str, Any]:
    where, allowed = f"checkpoint {folder}", f"{FILE} beside {TRAINER_STATE_NAME}"
    remedy = "Take a checkpoint that was saved with SparseTraining among the callbacks; this one was left as it is."
    if not (folder / FILE).is_file():
        given = f"only {', '.join(sorted(path.name for path in folder.iterdir()))}"
        raise StateError.of("masks", where, allowed=allowed, given=given, remedy=remedy)
    allowed = "the masks of a sparse training"
    saved = read_torch(folder / FILE, where=where, allowed=allowed, remedy=remedy)
    if not isinstance(saved, dict):
        raise StateError.of(FILE, where, allowed=allowed, given=type(saved).__name__, remedy=remedy)
    return saved


def _mixed_up(folder: Path, num_outside: int) -> StateError:
    """Makes an error of a model in which masks and weights of a checkpoint do not meet."""
    return StateError.of(
        "weights",
        f"the model and checkpoint {folder}",
        allowed=f"zeros outside the masks of {FILE}",
        given=f"{num_outside:,} non-zeros",
        remedy="Either the files are of different runs, or the Trainer has not loaded all weights: its log names "
        "missing keys then, as with experts in transformers 5.24. Make the model by from_pretrained() of that folder.",
    )


def _count_outside(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Counts the non-zeros of a model outside masks."""
    weights = find_weights(model, {name: mask.shape for name, mask in masks.items()})
    return sum(count_outside(weights[name], mask.to(weights[name].device)) for name, mask in masks.items())


def _mask_gradients(sparsifier: Sparsifier, optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Changes the masks if an update is due, and masks the gradients, which may carry the loss scale."""
    grads = [w.parameter.grad for w in sparsifier.weights if w.parameter.grad is not None]
    scale = 1.0 if scaler is None else scaler.get_scale()
    if scale != 1:  # a power of two, unless the user chose another: no digit is lost on the way there and back
        torch._foreach_div_(grads, scale)
    sparsifier.before_step(optimizer)
    if scale != 1:
        torch._foreach_mul_(grads, scale)
