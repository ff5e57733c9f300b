"""The state of a training: all that it changes, how it starts, and how it is saved and continued."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dstlib.errors import SettingError, StateError, require
from dstlib.masking.distribution import erk
from dstlib.masking.site import Site
from dstlib.masking.update import MaskUpdate
from dstlib.schedules import Constant, Every
from dstlib.sparsifier import Sparsifier
from dstlib.sparsifier.api import sparsify
from dstlib.sparsifier.plan import Settings, make_plan
from dstlib.sparsifier.saved import at_step_0
from dstlib.torch_files import load_weights
from dstlib.zoo.e2enet.baselines.dints import Supernet
from dstlib.zoo.e2enet.data.layouts.labels import ORDINARY, Labels
from dstlib.zoo.e2enet.network import E2ENet, flow_counts
from dstlib.zoo.e2enet.training.execution import Execution
from dstlib.zoo.e2enet.training.methods import kernel_method
from dstlib.zoo.e2enet.training.ranks import Ranks
from dstlib.zoo.e2enet.training.saved import check_saved
from dstlib.zoo.e2enet.training.search import MEMORY_BUDGET, Search, start_search
from dstlib.zoo.e2enet.training.settings import TrainSettings


@dataclass
class Training:
    """A network in training.

    ``model`` is a segmenter: with its ``deep_supervision`` on it gives a tuple of logits, finest first, and else
    the first of them. ``labels`` says what these mean; by default the background and one class each. ``metrics``
    has one row per finished epoch. ``updates`` has one row per mask update: the iteration, and over all sparse
    weights how many were active and how many of them had just grown. ``flows`` has, of a sparse E2ENet, one row per
    finished epoch and one before, of epoch 0: the connections that each flow brings into each fusion node.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    sparsifier: Sparsifier | None
    settings: TrainSettings
    execution: Execution
    ranks: Ranks
    labels: Labels = ORDINARY
    iteration: int = 0
    loss_sum: float = 0.0  # over the epoch under way
    metrics: list[dict[str, float]] = field(default_factory=list)
    updates: list[dict[str, int]] = field(default_factory=list)
    flows: list[dict[str, int]] = field(default_factory=list)
    search: Search | None = None  # of an architecture, beside the weights
    on_engine: nn.Module | None = None  # the model there, of the same parameters, where the execution asks for it

    @property
    def predictor(self) -> nn.Module:
        """The module that predicts as the model does, the faster way."""
        return self.model if self.on_engine is None else self.on_engine

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """Returns what :meth:`load_state_dict` continues from, bit for bit on a CPU."""
        search = {"search": self.search.optimizer.state_dict()} if self.search else {}
        return {
            **search,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else None,
            "iteration": self.iteration,
            "loss_sum": self.loss_sum,
            "metrics": self.metrics,
            "updates": self.updates,
            "flows": self.flows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the training where the one stood that ``state`` was taken from.

        Raises:
            StateError: It was taken from another network, or is damaged.
        """
        check_saved(state, self.settings, self.model, self.optimizer, self.search.optimizer if self.search else None)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.search:
            self.search.optimizer.load_state_dict(state["search"])
        if state["scaler"] and self.scaler.is_enabled():  # a run may go on in another precision
            self.scaler.load_state_dict(state["scaler"])
        if self.sparsifier:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self.iteration, self.loss_sum = state["iteration"], state["loss_sum"]
        self.metrics, self.updates = list(state["metrics"]), list(state["updates"])
        self.flows = list(state.get("flows", ()))  # trainings of before have none, and count from here on

    def observe(self, site: Site, update: MaskUpdate) -> None:
        """Counts one weight's share of a mask update."""
        if not self.updates or self.updates[-1]["iteration"] != site.step:
            self.updates.append({"iteration": site.step, "active": 0, "grown": 0})
        self.updates[-1]["active"] += int(update.mask.sum())
        self.updates[-1]["grown"] += int(update.grown.sum())

    def count_flows(self) -> None:
        """Adds the row of ``flows`` for the masks of this moment, where there are masks and flows."""
        if self.sparsifier is None or not isinstance(self.model, E2ENet):
            return
        nodes = flow_counts(self.model, self.sparsifier.masks)
        counts = {f"{node}.{flow}": count for node, flows in nodes.items() for flow, count in flows.items()}
        self.flows.append({"epoch": self.iteration // self.settings.iterations, **counts})


def start(
    model: nn.Module,
    settings: TrainSettings,
    execution: Execution | None = None,
    ranks: Ranks | None = None,
    labels: Labels = ORDINARY,
    memory_budget: float | None = None,
) -> Training:
    """Puts a model on its device with an optimizer, and with a sparsifier where ``sparsity`` is not 0.

    ``labels`` says what the outputs of the model mean; by default the background and one class each.
    Of an E2ENet the fusion is sparse; of any other network every weight that dstlib selects, at ERK's densities.
    Beside the weights of a supernet its architecture is searched, by default on the published ``memory_budget``.

    Raises:
        SettingError: The settings leave no mask update; a budget for a network that is no supernet; see also
            :func:`dstlib.sparsify`.
    """
    execution = execution or Execution()
    allowed, remedy = "none, as its architecture is not searched", "Leave --memory-budget out, or pass dints_search."
    fits = memory_budget is None or isinstance(model, Supernet)
    require(fits, "memory_budget", "the network", allowed=allowed, given=memory_budget, remedy=remedy)
    model.to(execution.device)
    if execution.recompute:
        model.recompute = True  # type: ignore[assignment]  # an E2ENet's
    if execution.channels_last:
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = _optimizer(model, settings)
    kind = torch.device(execution.device).type
    scaler = torch.amp.GradScaler(kind, enabled=execution.precision == "fp16")
    sparsifier = _sparsify(model, optimizer, settings) if settings.sparsity > 0 else None
    training = Training(model, optimizer, scaler, sparsifier, settings, execution, ranks or Ranks(), labels)
    if isinstance(model, Supernet):
        training.search = start_search(model, MEMORY_BUDGET if memory_budget is None else memory_budget)
    if sparsifier:
        sparsifier.observers.append(training.observe)
    return training


def _optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    parameters, lr, decay = model.parameters(), settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, nesterov=True, weight_decay=decay)


def _sparsify(model: nn.Module, optimizer: Optimizer, settings: TrainSettings) -> Sparsifier:
    method = kernel_method(settings.method, settings.interval, settings.block)
    clock = method.clock(settings.num_iterations)
    if isinstance(clock, Every) and clock.last == clock.start:  # in the words of the command line, not sparsify()'s
        given = f"{settings.interval}, in a training of {settings.num_iterations} iterations"
        allowed, remedy = f"at most {int(clock.stop or 0)}", "Lower --interval, or raise --epochs or --iterations."
        raise SettingError.of("interval", f"method {method.name}", allowed=allowed, given=given, remedy=remedy)
    include = E2ENet.FUSION
    if not isinstance(model, E2ENet):
        method, include = replace(method, distribution=erk), "*"
    sparsity, total, seed = settings.sparsity, settings.num_iterations, settings.seed
    return sparsify(model, optimizer, sparsity=sparsity, method=method, total_steps=total, include=include, seed=seed)


def refuse_denser(model: nn.Module, settings: TrainSettings, *, what: str, where: str) -> None:
    """Refuses an E2ENet with more active connections than its training ends with.

    Where the density moves in the course of the training, or a part of the network may go without gradients, as in
    baselines, nothing is known for sure.

    Raises:
        StateError: It has more.
    """
    method = kernel_method(settings.method, settings.interval, settings.block)
    is_constant = method.ramp == Constant(1.0) and method.surplus == Constant(0.0)
    if settings.sparsity == 0 or not isinstance(model, E2ENet) or not is_constant:
        return
    asked = Settings(
        sparsity=settings.sparsity, total_steps=settings.num_iterations, include=(E2ENet.FUSION,), seed=settings.seed
    )
    plan = make_plan(model, method, asked)
    num_active = num_planned = 0
    views = ((weight.parameter, view) for weight in plan.weights if not weight.reason for view in weight.views)
    for parameter, view in views:
        units_GU = method.granularity.fold(view.of(parameter.detach()) != 0).any(dim=-1)
        num_active += int(units_GU.sum())
        num_planned += len(units_GU) * plan.num_target(view.name, units_GU.shape[1], settings.num_iterations)
    if num_active > num_planned:
        allowed = f"at most {num_planned} connections in the fusion, by the run's sparsity of {settings.sparsity:g}"
        remedy = "The file is of another run, or was changed since: restore it, or train anew."
        raise StateError.of(what, where, allowed=allowed, given=num_active, remedy=remedy)


def parallel(training: Training, example: Tensor) -> nn.Module:
    """Returns what the forward pass goes through: the model, compiled or on the engine if asked for, or under DDP.

    The model's own type, names and state stay as they are. The engine is measured with ``example``, a batch.
    """
    network = training.model
    if training.execution.compile:
        network.compile()
    if training.execution.engine:
        network = training.on_engine = _accelerated(training, example)
    if training.ranks.num == 1:
        return network
    devices = [training.device] if training.device.type == "cuda" else None
    has_unused = not isinstance(training.model, E2ENet)  # UNETR of MONAI has some
    return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=has_unused)


def as_trained(model: nn.Module) -> None:
    """Puts a segmenter into the mode in which it is trained."""
    model.train()
    model.deep_supervision = True  # type: ignore[assignment]


def autocast(training: Training) -> torch.autocast:
    """Returns the context in which the model computes in the training's precision."""
    dtype = training.execution.autocast_dtype
    return torch.autocast(training.device.type, dtype=dtype, enabled=dtype is not None)


def _accelerated(training: Training, example: Tensor) -> nn.Module:
    from dstlib.engine.accelerate import accelerate  # not before it is asked for

    as_trained(training.model)
    with autocast(training):
        if training.sparsifier:
            return training.sparsifier.accelerate(training.model, example)
        return accelerate(training.model, example)


def begin_from(
    training: Training, state: Mapping[str, Any], *, freeze: bool, has_same_classes: bool = True
) -> list[str]:
    """Starts from the weights and masks of another training, and returns the names of weights that it does not have.

    Heads for other classes start afresh, also where there are as many, and so do the optimizer and the clock. With
    ``freeze`` the topology stays as it is, as in the paper's transfer from CT to MRI.

    Raises:
        StateError: The other training is of another network, or is dense while this one is sparse.
    """
    own, theirs = training.model.state_dict(), state.get("model")
    if not isinstance(theirs, Mapping) or "sparsifier" not in state:
        allowed, remedy = "the state of a training", "Pass --from the folder of a run that a recipe has written."
        raise StateError.of("checkpoint", "--from", allowed=allowed, given="something else", remedy=remedy)
    shapes = {name: value.shape for name, value in theirs.items() if isinstance(value, Tensor)}
    fresh = [name for name, value in own.items() if shapes.get(name) != value.shape]
    if not has_same_classes:
        fresh += [name for name in own if "head" in name and name not in fresh]
    foreign = sorted(map(str, set(theirs) - set(own)))
    if foreign or not all("head" in name for name in fresh):
        allowed, given = "those of this network", ", ".join([*fresh[:3], *foreign[:3]])
        remedy = "Begin from a run of the same network: the same model, channels, strides and kernels."
        raise StateError.of("weights", "--from", allowed=allowed, given=given, remedy=remedy)
    weights = {name: own[name] if name in fresh else theirs[name] for name in own}
    load_weights(training.model, weights, what="weights", where="--from", remedy="Restore the checkpoint of that run.")
    if training.sparsifier:
        saved = state["sparsifier"]
        if saved is None:
            remedy = "Pass --sparsity 0, or begin from a sparse run."
            raise StateError.of("masks", "--from", allowed="a sparse run", given="a dense one", remedy=remedy)
        training.sparsifier.load_state_dict(at_step_0(saved, frozen=freeze))
    return fresh
