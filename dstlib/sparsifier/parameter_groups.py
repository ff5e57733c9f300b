"""Learning rates over density: groups for an optimizer, in which each sparse weight has the rate of its density."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dstlib.errors import require
from dstlib.targets import find_weights, held_weights, unwrap


def density_groups(model: nn.Module, masks: Mapping[str, Tensor], *, lr: float) -> list[dict[str, Any]]:
    """Returns parameter groups for Adam and its kin: ``lr`` for all that is dense, ``lr`` / density for sparse weights.

    Adam moves every weight by about the learning rate. An output hears of its active inputs only, so that a step
    changes it by density times what it would in the dense layer. The higher rate makes up for that, so that rates
    tuned on a dense network do for sparse ones. ``masks`` are those of a sparsifier that was made before the optimizer,
    by parameter name and of its shape. Densities are theirs of now: meant for methods that keep them.

    Reference: Dey et al. 2024, Sparse maximal update parameterization, NeurIPS (SμPar): the rate of hidden weights
    under Adam goes with 1 / (width · density), their start is ``sparsify(..., init_scale="density")``. Xiao et al.
    2026 (SMET) divide by the density, too.

    Raises:
        SettingError: The learning rate is not above 0.
        StateError: A mask fits no parameter of the model.

    >>> import torch, dstlib
    >>> model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> sparsifier = dstlib.sparsify(model, sparsity=0.9, method="static", exclude="2.*", init_scale="density")
    >>> optimizer = torch.optim.AdamW(density_groups(model, sparsifier.masks, lr=1e-3))
    >>> [(round(group["lr"], 4), len(group["params"])) for group in optimizer.param_groups]
    [(0.001, 3), (0.01, 1)]
    """
    allowed, remedy = "a number above 0", "Pass the rate of the dense network."
    require(0 < lr < float("inf"), "lr", "density_groups()", allowed=allowed, given=lr, remedy=remedy)
    model = unwrap(model)
    held = held_weights(model)  # whose parameters are of other shapes than their masks
    plain = find_weights(model, {name: mask.shape for name, mask in masks.items() if name not in held})
    weights: dict[str, Tensor] = {**plain, **{name: each.values for name, each in held.items()}}
    density = {id(weights[name]): float(mask.float().mean()) for name, mask in masks.items()}
    by_rate: dict[float, list[nn.Parameter]] = {lr: []}
    for parameter in model.parameters():
        share = density.get(id(parameter), 1.0)
        by_rate.setdefault(lr / share if share else lr, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items() if parameters]
