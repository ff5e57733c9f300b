"""What wraps a model: the names that it adds, and the user's own module within."""

from torch import nn
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """Returns a qualified name without what torch.compile and activation checkpointing add to it.

    >>> plain_name("_orig_mod.stem._orig_mod.weight")
    'stem.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the user's own module from DistributedDataParallel, DataParallel, AveragedModel and torch.compile."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model
