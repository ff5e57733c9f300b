"""Every optimizer of the packages that are installed: how each is made and called, and what comes of it when sparse.

A recipe says what differs from ``cls(model.parameters())`` and ``loss.backward(); optimizer.step()``. Run as a script,
it prints the table of docs/optimizers.md.
"""

import contextlib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

import dstlib
from dstlib import SettingError
from dstlib.methods.method import Method

# "sam": gradients before the step, and a closure for those at the point that it goes to; "graph": create_graph=True;
# "value": a closure that returns the loss as a number
Call = Literal["plain", "closure", "value", "sam", "graph"]
PACKAGES = {
    "torch": "torch.optim",
    "timm": "timm.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "torch_optimizer": "torch_optimizer",
    "schedulefree": "schedulefree",
    "bitsandbytes": "bitsandbytes.optim",
    "torchao": "torchao.optim",
    "heavyball": "heavyball",
    "prodigyopt": "prodigyopt",
    "lion_pytorch": "lion_pytorch",
    "galore_torch": "galore_torch",
    "came_pytorch": "came_pytorch",
    "adabelief_pytorch": "adabelief_pytorch",
    "dadaptation": "dadaptation",
}
# where the name of the distribution is another
DISTRIBUTIONS = {
    "lion_pytorch": "lion-pytorch",
    "came_pytorch": "came-pytorch",
    "adabelief_pytorch": "adabelief-pytorch",
}


@dataclass(frozen=True)
class Recipe:
    """How an optimizer is made of a model, and called."""

    make: Callable[[type, nn.Module], Optimizer] = lambda cls, model: cls(model.parameters())
    call: Call = "plain"


def options(call: Call = "plain", **settings: Any) -> Recipe:
    return Recipe(lambda cls, model: cls(model.parameters(), **settings), call)


def _sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def _matrices(cls: type, model: nn.Module, **settings: Any) -> Optimizer:
    """Muon and its kin: matrices in one group, vectors in another."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    return cls([{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}], **settings)


def _only_matrices(cls: type, model: nn.Module) -> Optimizer:
    return cls([p for p in model.parameters() if p.ndim == 2])


WRAPPER = Recipe(lambda cls, model: cls(_sgd(model)))
SAM = Recipe(lambda cls, model: cls(model.parameters(), torch.optim.SGD, lr=0.01), "sam")
MUON = Recipe(_matrices)
RECIPES = {
    "torch.LBFGS": options("closure"),
    "torch.Muon": Recipe(_only_matrices),
    "torch.SGD": options(lr=0.01, momentum=0.9),
    "torch.RMSprop": options(momentum=0.9, centered=True),
    "torch.Adagrad": options(initial_accumulator_value=0.1),
    "torch.Adam": options(amsgrad=True),
    "timm.Lookahead": WRAPPER,
    "timm.Lars": options(lr=0.01, momentum=0.9),
    "timm.SGDP": options(lr=0.01, momentum=0.9),
    "timm.SGDW": options(lr=0.01, momentum=0.9),
    "timm.MADGRAD": options(lr=0.01, momentum=0.9),
    "timm.Adahessian": options("graph"),
    "timm.Lamb": options(lr=0.01),
    "torch_optimizer.Adahessian": options("graph"),
    "torch_optimizer.Lookahead": WRAPPER,
    "torch_optimizer.A2GradExp": options(lips=10.0),
    "torch_optimizer.LARS": options(lr=0.01, momentum=0.9),
    "torch_optimizer.PID": options(lr=0.01, momentum=0.9),
    "torch_optimizer.QHM": options(lr=0.01, momentum=0.9),
    "torch_optimizer.SGDP": options(lr=0.01, momentum=0.9),
    "torch_optimizer.SGDW": options(lr=0.01, momentum=0.9),
    "torch_optimizer.Shampoo": options(lr=0.1, momentum=0.5),
    "pytorch_optimizer.AdaLOMO": Recipe(lambda cls, model: cls(model)),
    "pytorch_optimizer.LOMO": Recipe(lambda cls, model: cls(model)),
    "pytorch_optimizer.AdamMini": Recipe(lambda cls, model: cls(model, lr=1e-3)),
    "pytorch_optimizer.AdaHessian": options("graph"),
    "pytorch_optimizer.SophiaH": options("graph", update_period=2),
    "pytorch_optimizer.AliG": options("value", max_lr=0.1, momentum=0.9),
    "pytorch_optimizer.BSAM": options("sam", num_data=64),
    "pytorch_optimizer.FriendlySAM": SAM,
    "pytorch_optimizer.SAM": SAM,
    "pytorch_optimizer.LookSAM": Recipe(
        lambda cls, model: cls(model.parameters(), torch.optim.SGD, lr=0.01, k=3), "sam"
    ),
    "pytorch_optimizer.WSAM": Recipe(
        lambda cls, model: cls(model, model.parameters(), torch.optim.SGD, lr=0.01), "closure"
    ),
    "pytorch_optimizer.Lookahead": WRAPPER,
    "pytorch_optimizer.OrthoGrad": WRAPPER,
    "pytorch_optimizer.PCGrad": WRAPPER,
    "pytorch_optimizer.ScheduleFreeWrapper": WRAPPER,
    "pytorch_optimizer.TRAC": WRAPPER,
    "pytorch_optimizer.Magma": WRAPPER,
    "pytorch_optimizer.LBFGS": options("closure"),
    "pytorch_optimizer.LARS": options(lr=0.01, momentum=0.9),
    "pytorch_optimizer.PID": options(lr=0.01, momentum=0.9),
    "pytorch_optimizer.ASGD": options(lr=0.01),
    "pytorch_optimizer.SGD": options(lr=0.01, momentum=0.9),
    "pytorch_optimizer.SGDP": options(lr=0.01, momentum=0.9),
    "pytorch_optimizer.SGDW": options(lr=0.01, momentum=0.9),
    "pytorch_optimizer.SM3": options(momentum=0.9),
    "pytorch_optimizer.Shampoo": options(lr=0.01, momentum=0.5),
    "pytorch_optimizer.Ranger21": options(num_iterations=100, lr=0.01),
    "pytorch_optimizer.MADGRAD": options(lr=0.01, momentum=0.9),
    "pytorch_optimizer.EmoNavi": options(use_shadow=True),
    "pytorch_optimizer.EmoLynx": options(use_shadow=True),
    "pytorch_optimizer.EmoFact": options(use_shadow=True),
    "pytorch_optimizer.SpectralSphere": Recipe(_only_matrices),
    **{f"pytorch_optimizer.{name}": MUON for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")},
    "pytorch_optimizer.SaRA": options(lr=1e-3, threshold=0.05),
    "pytorch_optimizer.SPAM": options(density=0.5),
    "schedulefree.ScheduleFreeWrapper": WRAPPER,
    "schedulefree.ScheduleFreeWrapperReference": WRAPPER,
    **{f"schedulefree.{name}ScheduleFreeClosure": options("closure") for name in ("AdamW", "RAdam", "SGD")},
    **{
        f"bitsandbytes.{name}{bits}": options(lr=0.01, momentum=0.9)
        for name in ("LARS", "SGD")
        for bits in ("", "32bit", "8bit")
    },
    "bitsandbytes.PytorchLARS": options(lr=0.01, momentum=0.9),
    "came_pytorch.CAME": options(lr=1e-3),
    "heavyball.SAMWrapper": options("closure"),
}
# what is an optimizer for Python only, or needs what is not here
LEFT_OUT = {
    "torch.SparseAdam": "takes sparse gradients only",
    "pytorch_optimizer.DeMo": "needs a process group",
    "pytorch_optimizer.DistributedMuon": "needs a process group",
    "pytorch_optimizer.GSAM": "needs a scheduler and a closure of its own kind",
    "pytorch_optimizer.SafeFP16Optimizer": "no torch optimizer: it holds a copy of all weights in single precision",
    "heavyball.PSGDBase": "a base class",
    "heavyball.SOAPBase": "a base class",
    "heavyball.SplitOpt": "only calls other optimizers",
    "bitsandbytes.AdEMAMix32bit": "fails on a CPU, dense too",
    "bitsandbytes.PagedAdEMAMix32bit": "fails on a CPU, dense too",
    "torchao._AdamW": "private, for tests of the others",
    "torchao.CPUOffloadOptimizer": "needs a GPU; refused by its name",
    "galore_torch.GaLoreAdamW8bit": "needs a GPU",
}


def every(package: str) -> dict[str, type]:
    """The optimizers of a package by name, without those that it passes on from another."""
    module = importlib.import_module(PACKAGES[package])
    classes = {name: getattr(module, name) for name in dir(module)}
    return {
        f"{package}.{name}": cls
        for name, cls in classes.items()
        if isinstance(cls, type)
        and (issubclass(cls, Optimizer) or name.startswith("ScheduleFreeWrapper"))
        and cls.__module__.split(".")[0] in (PACKAGES[package].split(".")[0], "pytorch_ranger")
        and cls is not Optimizer
        and f"{package}.{name}" not in LEFT_OUT
    }


# A loss is a float32 number near 1, and two sums that differ in their order, or in zeros of another sign, may differ
# by some units of its last place.
TOLERANCE = 1e-6
USES = {
    "torch_optimizer.Lookahead": "pass it to sparsify(): nobody hears of its steps",
    **{name: "call sparsifier.before_step() before its step" for name, r in RECIPES.items() if r.call == "sam"},
}
HESSIAN = "its Hessian is estimated with noise of all weights; method static only"
HELD = {
    "timm.Adahessian": HESSIAN,
    "torch_optimizer.Adahessian": HESSIAN,
    "pytorch_optimizer.AdaHessian": HESSIAN,
    "pytorch_optimizer.SophiaH": HESSIAN,
    "pytorch_optimizer.BSAM": "takes gradients with noise on all weights; "
    "call sparsifier.before_step() before its step",
    "pytorch_optimizer.LoRARite": "its step depends on all weights of a matrix",
    "pytorch_optimizer.Nero": "keeps the norm of each row, of which the inactive weights are no part",
    "pytorch_optimizer.SpectralSphere": "keeps the norm of a matrix, of which the inactive weights are no part",
    "pytorch_optimizer.Ranger21": "divides by a norm of centralised gradients, which the inactive weights have too",
}
X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3].sum(1) > 0).long() + 2 * (X[:, 3:6].sum(1) > 0).long()


class Net(nn.Module):
    """Three layers, one of them square. With ``masks`` it is the reference: they are multiplied in, in forward.

    tanh, as a dead unit has gradients of zero, by which ADOPT divides by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(32, 128), nn.Linear(128, 128), nn.Linear(128, 4)
        self.masks: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            mask = self.masks.get(f"{name}.weight")
            x = F.linear(x, layer.weight if mask is None else layer.weight * mask, layer.bias)
            x = x if name == "c" else x.tanh()
        return x


@dataclass
class Run:
    """What was seen: losses, non-zeros outside masks, the largest moves of grown weights, and of active ones."""

    losses: list[float] = field(default_factory=list)
    num_outside: int = 0
    grown_moves: list[float] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    is_finite: bool = True


def first_masks(method: Method) -> dict[str, Tensor]:
    sparsifier = dstlib.sparsify(Net(), sparsity=0.7, method=method, total_steps=100, seed=1)
    sparsifier.detach()
    return sparsifier.masks


def run(name: str, cls: type, method: Method | None, *, num_steps: int, masks: dict[str, Tensor] | None = None) -> Run:
    """Trains with a method, or else with masks that are multiplied in, or dense."""
    seen, model, recipe = Run(), Net(), RECIPES.get(name, Recipe())
    optimizer = recipe.make(cls, model)
    sparsifier, grown = None, {}
    if method is not None:
        given = [optimizer] if name in USES else []
        sparsifier = dstlib.sparsify(model, *given, sparsity=0.7, method=method, total_steps=100, seed=1)
        sparsifier.observers.append(lambda site, update: grown.__setitem__(site.name, update.grown.clone()))
    if masks is not None:
        model.masks = masks
        for key, mask in masks.items():
            model.get_parameter(key).data.mul_(mask)
    if ("ScheduleFree" in name and "Closure" not in name) or ".SF" in name:
        optimizer.train()
    torch.manual_seed(1)
    for _ in range(num_steps):
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        _step(model, optimizer, recipe.call, sparsifier, seen)
        if sparsifier is not None:
            _look(model, sparsifier, before, grown, seen)
    seen.is_finite = all(bool(p.isfinite().all()) for p in model.parameters())
    if sparsifier is not None:
        sparsifier.detach()
    return seen


def _step(model: Net, optimizer: Optimizer, call: Call, sparsifier: dstlib.Sparsifier | None, seen: Run) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward(create_graph=call == "graph")
        seen.losses.append(float(loss.detach()))
        return loss

    if call == "closure":
        optimizer.step(closure)
        return
    loss = float(closure().detach())
    if call == "sam":
        if sparsifier is not None:
            sparsifier.before_step()
        optimizer.step(closure)
    elif call == "value":
        optimizer.step(lambda: loss)
    else:
        optimizer.step()


def _look(
    model: Net, sparsifier: dstlib.Sparsifier, before: dict[str, Tensor], grown: dict[str, Tensor], seen: Run
) -> None:
    for key, mask in sparsifier.masks.items():
        weight = model.get_parameter(key).detach()
        seen.num_outside = max(seen.num_outside, int(((weight != 0) & ~mask).sum()))
        moved, has_grown = (weight - before[key]).abs(), grown.pop(key, torch.zeros_like(mask)) & mask
        seen.moves.append(float(moved[mask & ~has_grown].max()))
        seen.grown_moves.extend([float(moved[has_grown].max())] if has_grown.any() else [])


@dataclass(frozen=True)
class Verdict:
    """What came of an optimizer; ``faults`` is empty unless something is wrong."""

    name: str
    result: Literal["exact", "held", "refused"]
    remark: str
    faults: tuple[str, ...] = ()


def judge(name: str, cls: type) -> Verdict:
    """Runs an optimizer dense, with static and moving masks, and against the reference that multiplies in forward."""
    try:
        static = run(name, cls, dstlib.METHODS["static"], num_steps=9)
    except SettingError as error:
        return Verdict(name, "refused", str(error).split("(", 2)[-1].split(")")[0])
    except NotImplementedError:  # step() of pytorch_optimizer's LOMO
        return Verdict(name, "refused", "has no step(): it moves each weight inside the backward pass")
    reference = run(name, cls, None, num_steps=9, masks=first_masks(dstlib.METHODS["static"]))
    dense = run(name, cls, None, num_steps=12)
    faults = []
    moving = static
    if RECIPES.get(name, Recipe()).call != "graph":
        moving = run(name, cls, replace(dstlib.RIGL, interval=3), num_steps=12)
        if not any(move > 0 for move in moving.grown_moves):
            faults.append("what has grown never moves")
        # its steps are those of a weight that is born, at the start of the run, or lives: no division by zero
        if max(moving.grown_moves) > 3 * max(moving.moves):
            faults.append(f"what has grown jumps by {max(moving.grown_moves):.2g}, others by {max(moving.moves):.2g}")
    if static.num_outside or moving.num_outside:
        faults.append(f"non-zeros outside the masks: {static.num_outside}, {moving.num_outside}")
    if dense.is_finite and not (static.is_finite and moving.is_finite):
        faults.append("NaN that the dense run does not have")
    pairs = zip(static.losses, reference.losses, strict=True)
    is_exact = all(abs(ours - theirs) <= TOLERANCE * max(1.0, abs(theirs)) for ours, theirs in pairs)
    if is_exact == (name in HELD):
        faults.append("exact, but listed as held" if is_exact else "not exact, and not listed as held")
    return Verdict(name, "exact" if is_exact else "held", HELD.get(name, USES.get(name, "")), tuple(faults))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without compilers, which take minutes for small steps, and without what packages print and warn of."""
    with (
        mock.patch.object(torch, "compile", lambda f=None, **_: f if f is not None else lambda g: g),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def verdicts(package: str) -> list[Verdict]:
    with quietly():
        classes = every(package)
        if package == "heavyball":
            importlib.import_module("heavyball.utils").compile_mode = None
        return [judge(name, cls) for name, cls in classes.items()]


def table(package: str, judged: list[Verdict]) -> list[str]:
    """The rows of a package: optimizers by what came of them, and why."""
    version = importlib.metadata.version(DISTRIBUTIONS.get(package, package)).split("+")[0]
    rows: dict[tuple[str, str], list[str]] = {}
    for v in judged:
        rows.setdefault((v.result, v.remark), []).append(v.name.split(".")[1])
    for name, why in LEFT_OUT.items():
        if name.startswith(f"{package}."):
            rows.setdefault(("not tried", why), []).append(name.split(".")[1])
    order = ["exact", "held", "refused", "not tried"]
    return [
        f"| {package} {version} | {result} | {', '.join(names)} | {remark} |"
        for (result, remark), names in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1]))
    ]


if __name__ == "__main__":
    for package in PACKAGES:
        try:
            judged = verdicts(package)
        except ImportError:
            continue
        for v in judged:
            if v.faults:
                print(f"!! {v.name}: {'; '.join(v.faults)}")
        print("\n".join(table(package, judged)), flush=True)
