"""Masks at initialisation from one look at the model: SNIP, GraSP, SynFlow.

Each makes an ``init`` for any method, so that training may go on as static or by moving masks:

>>> import dstlib
>>> from dataclasses import replace
>>> torch.manual_seed(0)  # doctest: +ELLIPSIS
<torch._C.Generator object at ...>
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
>>> x, y = torch.randn(32, 8), torch.randint(0, 2, (32,))
>>> init = snip(model, lambda: nn.functional.cross_entropy(model(x), y))
>>> sparsifier = dstlib.sparsify(model, sparsity=0.9, method=replace(dstlib.STATIC, init=init))
>>> [int(mask.sum()) for mask in sparsifier.masks.values()]  # of 16·8 + 2·16 entries, a tenth
[4, 12]
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dstlib.errors import ScoreError, require
from dstlib.masking import AtInit
from dstlib.targets import unwrap

Loss = Callable[[], Tensor]


def snip(model: nn.Module, loss: Loss, *, rounds: int = 1) -> AtInit:
    """Makes first masks by SNIP: |w · ∂L/∂w|, over all weights together.

    ``loss`` runs the model on a batch and returns the loss. The model's buffers, such as batch statistics, are put
    back afterwards, and no gradient is left behind; what ``loss`` draws, for dropout say, it takes from torch's
    generators.
    With more ``rounds`` the density falls step by step, as in Verdenius et al. 2020 (SNIP-it) and de Jorge et
    al. 2021 (iterative SNIP).

    Raises:
        SettingError: ``rounds`` is no whole number from 1.
        ScoreError: The loss is no finite number, at the time of the call of ``sparsify``.

    Reference: Lee et al. 2019, SNIP: single-shot network pruning, ICLR, equation 5.
    """

    def scores(parameters: Sequence[Tensor]) -> list[Tensor | None]:
        with _as_it_was(model), torch.enable_grad():
            grads = _gradients(_checked(loss(), "SNIP"), parameters)
        return [None if g is None else (w.detach() * g).abs() for w, g in zip(parameters, grads, strict=True)]

    return AtInit("snip", scores, _checked_rounds(rounds))


def grasp(model: nn.Module, loss: Loss) -> AtInit:
    """Makes first masks by GraSP: w · Hg, highest kept, what contributes most to the flow of gradients.

    ``loss`` is as for :func:`snip`, and so are errors. Takes a second derivative: memory as for two backward passes.

    Reference: Wang et al. 2020, Picking winning tickets before training by preserving gradient flow, ICLR,
    equation 8: S = -w · Hg, of which the *highest* are pruned. Deviates: the same loss serves for both
    derivatives, without the temperature of the published code.
    """

    def scores(parameters: Sequence[Tensor]) -> list[Tensor | None]:
        with _as_it_was(model), torch.enable_grad():
            grads = _gradients(_checked(loss(), "GraSP"), parameters, create_graph=True)
            flow = sum(((g * g.detach()).sum() for g in grads if g is not None), torch.zeros(()))
            hg = _gradients(flow, parameters)
        return [None if h is None else w.detach() * h for w, h in zip(parameters, hg, strict=True)]

    return AtInit("grasp", scores)


def synflow(model: nn.Module, *inputs: Tensor, rounds: int = 100) -> AtInit:
    """Makes first masks by SynFlow, which needs no data: w · ∂R/∂w, over all weights together.

    R is the output on ones of the network with all its weights made positive. ``inputs`` are examples of the model's
    arguments, of which only shapes count. Each round removes a share of the weights and looks again, so that no layer
    is cut through. In double precision, as products over many layers overflow a float; in eval mode, so that batch
    norms are linear. Biases and running means count as zero, as in the paper's R: else flow would begin in the middle,
    and layers before it could be cut off.

    Raises:
        SettingError: ``inputs`` are no tensors, or ``rounds`` is no whole number from 1.

    Reference: Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic
    flow, NeurIPS, Algorithm 1: 100 rounds.
    """
    bare = unwrap(model)
    are_tensors, given = bool(inputs) and all(isinstance(x, Tensor) for x in inputs), [type(x).__name__ for x in inputs]
    remedy = "Pass what the model takes: synflow(model, torch.empty(1, 3, 32, 32)), say."
    require(are_tensors, "inputs", "synflow()", allowed="tensors", given=given, remedy=remedy)

    def scores(parameters: Sequence[Tensor]) -> list[Tensor | None]:
        positive = {name: _without_offset(name, p.detach()) for name, p in bare.named_parameters()}
        for name, parameter in bare.named_parameters():
            positive[name].requires_grad_(any(parameter is p for p in parameters))
        buffers = dict(bare.named_buffers())
        state = positive | {n: _without_offset(n, b) if b.is_floating_point() else b for n, b in buffers.items()}
        names = {id(p): name for name, p in bare.named_parameters()}
        weights = [positive[names[id(p)]] if id(p) in names else None for p in parameters]
        with _as_it_was(model, training=False), torch.enable_grad():
            ones = tuple(torch.ones_like(x, dtype=torch.float64) for x in inputs)
            output = torch.func.functional_call(bare, state, ones)
            grads = _gradients(_checked(output.sum(), "SynFlow"), weights)
        return [None if w is None or g is None else w.detach() * g for w, g in zip(weights, grads, strict=True)]

    return AtInit("synflow", scores, _checked_rounds(rounds))


def _without_offset(name: str, x: Tensor) -> Tensor:
    return torch.zeros_like(x).double() if name.endswith(("bias", "running_mean")) else x.abs().double()


@contextmanager
def _as_it_was(model: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Puts buffers and modes back at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _gradients(
    value: Tensor, tensors: Sequence[Tensor | None], *, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Differentiates a value by tensors; None for each that it does not depend on."""
    known = [x for x in tensors if x is not None]
    if not value.requires_grad or not known:
        return [None] * len(tensors)
    found = iter(torch.autograd.grad(value, known, create_graph=create_graph, allow_unused=True))
    return [None if x is None else next(found) for x in tensors]


def _checked(loss: object, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
        given = f"a tensor of shape {tuple(loss.shape)}: {loss.detach()}" if isinstance(loss, Tensor) else repr(loss)
        where, remedy = f"{name} at initialisation", "Return one finite number that depends on the weights."
        raise ScoreError.of("loss", where, allowed="a number", given=given, remedy=remedy)
    return loss


def _checked_rounds(rounds: int) -> int:
    allowed, remedy = "a whole number from 1", "1 looks once; SynFlow takes 100."
    require(type(rounds) is int and rounds >= 1, "rounds", "AtInit", allowed=allowed, given=rounds, remedy=remedy)
    return rounds
