"""Checkpoints: networks that were trained, read back from their run directories to predict."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dstlib.errors import StateError
from dstlib.torch_files import load_weights, read_torch
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.inference.predict import Trained
from dstlib.zoo.e2enet.inference.sliding_window import predicting
from dstlib.zoo.e2enet.training.run_directory import read_left_by_run


def load_trained(runs: Sequence[Path], *, device: str = "cpu") -> Trained:
    """Reads the networks of some runs as one ensemble: their folds, say.

    A class is post-processed if every run found that it helps on the cases that it held out.

    Raises:
        StateError: A run is not finished, is damaged, or was not trained on the same data as the first.
    """
    configs = [read_left_by_run(run / "config.json", "model", "width", "network", "patches", "data") for run in runs]
    first = configs[0]
    for run, config in zip(runs, configs, strict=True):
        for name in ("channels", "classes", "preparation"):
            if config["data"][name] != first["data"][name]:
                allowed, remedy = f"a run on the same data as {runs[0]}", "Average the folds of one data set."
                raise StateError.of("data", f"run {run}", allowed=allowed, given=f"other {name}", remedy=remedy)
    results = [run / "result.json" for run in runs]
    processed = [set(read_left_by_run(file, "postprocessing")["postprocessing"]) for file in results if file.exists()]
    patches = first["patches"]
    return Trained(
        models=tuple(_network(run, config, device) for run, config in zip(runs, configs, strict=True)),
        preparation=Preparation.from_json(first["data"]["preparation"]),
        patch_size=tuple(patches["patch_size"]),
        mirror=tuple(patches["mirror"]),
        channels=tuple(first["data"]["channels"]),
        classes=tuple(first["data"]["classes"]),
        postprocessing=tuple(sorted(set.intersection(*processed))) if len(processed) == len(runs) else (),
    )


def on_engine(trained: Trained) -> Trained:
    """Puts the networks on the engine by :func:`dstlib.accelerate`, which measures for some passes."""
    from dstlib.engine.accelerate import accelerate  # not before it is asked for

    def fast(model: nn.Module) -> nn.Module:
        device = next(model.parameters()).device
        example = torch.zeros(1, len(trained.channels), *trained.patch_size, device=device)
        # in the precision in which probabilities() will call it
        with predicting(model), torch.autocast(device.type, enabled=device.type == "cuda"):
            return accelerate(model, example)

    return replace(trained, models=tuple(map(fast, trained.models)))


def network_config(values: dict[str, Any]) -> E2ENetConfig:
    """Reads the configuration of a network, whose tuples JSON has made lists.

    >>> network_config({"channels": [8, 16], "strides": [[1, 2, 2]], "heads": 1}).strides
    ((1, 2, 2),)
    """
    return E2ENetConfig(**{name: _tupled(value) for name, value in values.items()})


def _network(run: Path, config: dict[str, Any], device: str) -> nn.Module:
    network, width, size = network_config(config["network"]), config["width"], tuple(config["patches"]["patch_size"])
    channels, classes = network.in_channels, network.num_classes
    model = build_model(
        config["model"], in_channels=channels, num_classes=classes, patch_size=size, config=network, width=width
    )
    where, remedy = f"run {run}", "It is written at the end of a training: continue this one with --resume."
    state = read_torch(run / "model.pt", where=where, allowed="the weights of this run", remedy=remedy)
    load_weights(model, state, what="model.pt", where=where, remedy=remedy)
    return model.to(device)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
