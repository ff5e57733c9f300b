"""Checkpoints: networks that were trained, read back from their run directories to predict."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dstlib.errors import StateError
from dstlib.torch_files import load_weights, read_torch
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.inference.predict import Trained
from dstlib.zoo.e2enet.inference.sliding_window import predicting
from dstlib.zoo.e2enet.training.records import (
    MODEL,
    RESULT,
    ConfigRecord,
    ResultRecord,
    config_of,
    result_of,
    sha256_of,
)
from dstlib.zoo.e2enet.training.state import refuse_denser


def load_trained(runs: Sequence[Path], *, device: str = "cpu") -> Trained:
    """Reads the networks of some runs as one ensemble: their folds, say.

    A class is post-processed if every run found that it helps on the cases that it held out.

    Raises:
        StateError: A run is not finished, is damaged, or was not trained on the same data as the first.
    """
    configs = [config_of(run) for run in runs]
    first = configs[0]
    for run, config in zip(runs, configs, strict=True):
        for name in ("channels", "classes", "labels", "geometry", "preparation"):
            if getattr(config.data, name) != getattr(first.data, name):
                allowed, remedy = f"a run on the same data as {runs[0]}", "Average the folds of one data set."
                raise StateError.of("data", f"run {run}", allowed=allowed, given=f"other {name}", remedy=remedy)
    results = [result_of(run) if (run / RESULT).exists() else None for run in runs]  # none where none was held out
    read = zip(runs, configs, results, strict=True)
    processed = [set(result.postprocessing) for result in results if result is not None]
    return Trained(
        models=tuple(_network(run, config, result, device) for run, config, result in read),
        preparation=first.data.preparation,
        patch_size=first.patches.patch_size,
        mirror=first.patches.mirror,
        channels=first.data.channels,
        classes=first.data.classes,
        labels=first.data.meaning,
        geometry=first.data.rule,
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


def _network(run: Path, config: ConfigRecord, result: ResultRecord | None, device: str) -> nn.Module:
    network = config.network
    model = build_model(
        config.model,
        in_channels=network.in_channels,
        num_classes=network.num_classes,
        patch_size=config.patches.patch_size,
        config=network,
        width=config.width,
        architecture=config.architecture,
    )
    where, remedy = f"run {run}", "It is written at the end of a training: continue this one with --resume."
    state = read_torch(run / MODEL, where=where, allowed="the weights of this run", remedy=remedy)
    load_weights(model, state, what=MODEL, where=where, remedy=remedy)
    if result is not None and result.model_sha256 not in (None, given := sha256_of(run / MODEL)):
        allowed = f"the file with the SHA-256 {result.model_sha256}, which {RESULT} tells of"
        remedy = "One of the two is of another run, or older: continue this one with --resume, which writes both."
        raise StateError.of(MODEL, where, allowed=allowed, given=given, remedy=remedy)
    refuse_denser(model, config.training, what=MODEL, where=where)
    return model.to(device)
