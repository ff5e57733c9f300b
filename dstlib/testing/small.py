"""A small training with every kind of weight that can be sparse, to try a method on."""

import copy
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.masking import AtInit, Criterion, InTurn, MaskUpdate, Site
from dstlib.methods.method import Method
from dstlib.sparsifier.api import sparsify
from dstlib.testing.laws import world

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.005),
}
NUM_STEPS = 30
HALFWAY = 17  # between two updates, so that what is gathered in between has to be saved too


class SmallModel(nn.Module):
    """A convolution, a transposed one, an attention and a linear layer: (B, width, 4, 4) → (B, width).

    The norm bounds the logits, so that a method whose grown weights are large does not diverge here.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3)
        self.up = nn.ConvTranspose2d(width, width, 2)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.up(self.conv(x).relu()).relu().flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.attention(x, x, x, need_weights=False)[0].mean(dim=1)))
        return logits


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is made from; the model's first weights and the batches are always the same.

    Each run takes a copy of the method as it is before all of them, as a new process would.
    """

    method: Method
    sparsity: float
    width: int
    optimizer: str = "SGD with momentum"
    seed: int = 0

    def __str__(self) -> str:
        return f"a small model of width {self.width} under {self.optimizer}, sparsity {self.sparsity:g}"


class Run:
    """A training under way."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.num_steps, s = setting, 0, setting
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model = SmallModel(s.width)
        self.optimizer = OPTIMIZERS[s.optimizer](self.model.parameters())
        method = copy.deepcopy(s.method)
        self.sparsifier = sparsify(
            self.model, self.optimizer, sparsity=s.sparsity, method=method, total_steps=NUM_STEPS, seed=s.seed
        )

    def steps(self, until: int = NUM_STEPS) -> Iterator[int]:
        """Trains, and stops after each optimizer step to tell its number."""
        while self.num_steps < until:
            x, y = _batch(self.num_steps, self.setting.width)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.num_steps += 1
            yield self.num_steps

    def train(self, until: int = NUM_STEPS) -> "Run":
        """Trains without a stop."""
        for _ in self.steps(until):
            pass
        return self

    def saved_and_loaded(self) -> "Run":
        """Made anew, with the three states through a file."""
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self._parts], file)
        file.seek(0)
        fresh = Run(self.setting)
        fresh.num_steps = self.num_steps
        for part, state in zip(fresh._parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        return fresh

    def end(self) -> None:
        """Lets go of the optimizers' hooks."""
        self.sparsifier.detach()

    def masks(self) -> dict[str, Tensor]:
        """The masks as they are now."""
        return {name: mask.clone() for name, mask in self.sparsifier.masks.items()}

    def difference(self, other: "Run") -> str:
        """The first tensor or number in which two runs differ, by name; empty where they agree bit for bit."""
        parts = ("model", "optimizer", "sparsifier")
        found = (_difference(getattr(self, p).state_dict(), getattr(other, p).state_dict(), p) for p in parts)
        return next((path for path in found if path), "")

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.sparsifier


@dataclass(frozen=True)
class Moment:
    """What could be seen of a run after one of its steps."""

    run: Run
    num_steps: int
    masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]  # of the optimizer, in the weight's shape

    @classmethod
    def of(cls, run: Run) -> "Moment":
        """The present moment."""
        masks, parameters = run.masks(), dict(run.model.named_parameters())
        states: dict[str, dict[str, Tensor]] = {}
        for name, mask in masks.items():
            state = run.optimizer.state.get(parameters[name], {})
            found = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == mask.shape}
            states[name] = {k: v.clone() for k, v in found.items()}
        return cls(run, run.num_steps, masks, {name: parameters[name].detach().clone() for name in masks}, states)

    def __str__(self) -> str:
        return f"{self.run.setting}, after step {self.num_steps}"

    def folded(self) -> Iterator[tuple[str, Tensor]]:
        """(name of a matrix view, its mask as (G, U, E)) of each."""
        for weight in self.run.sparsifier.weights:
            for view in weight.views:
                yield view.name, self.run.setting.method.granularity.fold(view.of(self.masks[weight.name]))


class Trial:
    """The runs of one setting that laws look at; each is trained once, when it is first asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __str__(self) -> str:
        return str(self.setting)

    @property
    def moments(self) -> list[Moment]:
        """What was seen before the first step and after each, of a run that an error may have ended early."""
        return self._first[1]

    @property
    def run(self) -> Run:
        """The first run, at its end."""
        run, _, error = self._first
        if error:
            raise error
        return run

    @cached_property
    def resumed(self) -> Run:
        """Saved and loaded halfway."""
        with world(0):
            half = Run(self.setting).train(HALFWAY)
            resumed = half.saved_and_loaded()
            half.end()
            resumed.train().end()
        return resumed

    @cached_property
    def copied(self) -> tuple[Run, Run, dict[str, Tensor]]:
        """Copied halfway; another copy, frozen then; and the masks that were frozen."""
        with world(0):
            half = Run(self.setting).train(HALFWAY)
            copied, frozen = copy.deepcopy(half), copy.deepcopy(half)
            half.end()
            copied.train().end()
            frozen.sparsifier.freeze()
            masks = frozen.masks()
            frozen.train().end()
        return copied, frozen, masks

    @cached_property
    def repeated(self) -> Run:
        """The same again, under another global seed."""
        with world(1):
            run = Run(self.setting).train()
            run.end()
        return run

    @cached_property
    def watched(self) -> tuple[Run, set[str]]:
        """With an observer; and which of drop, grow and init drew where it mattered."""
        return _watched(self.setting)

    @cached_property
    def reseeded(self) -> tuple[Run, set[str]]:
        """As ``watched``, from another seed."""
        return _watched(replace(self.setting, seed=self.setting.seed + 1))

    @cached_property
    def _first(self) -> tuple[Run, list[Moment], Exception | None]:
        error = None
        with world(0):
            run = Run(self.setting)
            moments = [Moment.of(run)]
            try:
                moments += (Moment.of(run) for _ in run.steps())
            except Exception as e:  # by then, a law may be seen to be broken, which says more
                error = e
            run.end()
        return run, moments, error


def _watched(setting: Setting) -> tuple[Run, set[str]]:
    drew: set[str] = set()
    m = setting.method
    assert not isinstance(m.init, AtInit | InTurn)
    drop, grow, init = _Spy("drop", m.drop, drew), _Spy("grow", m.grow, drew), _Spy("init", m.init, drew)
    num_changed: dict[str, int] = {"drop": 0, "grow": 0, "init": 0}

    def observe(site: Site, update: MaskUpdate) -> None:
        num_changed["drop"] += int(update.dropped.sum())
        num_changed["grow"] += int(update.grown.sum())

    with world(0):
        run = Run(replace(setting, method=replace(m, drop=drop, grow=grow, init=init)))
        num_changed["init"] = sum(int((~mask).sum()) for mask in run.sparsifier.masks.values())
        run.sparsifier.observers.append(observe)
        run.train().end()
    return run, {part for part in drew if num_changed[part]}


class _Spy:
    """A criterion that notes whether it drew from the site's generator; its copies note it in the same place."""

    def __init__(self, part: str, criterion: Criterion, drew: set[str]) -> None:
        self.part, self.criterion, self.drew = part, criterion, drew

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Spy":
        return _Spy(self.part, copy.deepcopy(self.criterion, memo), self.drew)

    def __call__(self, site: Site) -> Tensor:
        """The scores, unchanged."""
        before = site.generator.get_state()
        scores = self.criterion(site)
        if not torch.equal(before, site.generator.get_state()):
            self.drew.add(self.part)
        return scores


def _batch(step: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(step)
    x = torch.randn(4, width, 4, 4, generator=generator, device="cpu", dtype=torch.float32)
    y = torch.randint(0, width, (4,), generator=generator, device="cpu")
    return x.to(torch.get_default_dtype()), y


def _difference(first: Any, second: Any, path: str) -> str:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
        return "" if same else path
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return next((p for k in first if (p := _difference(first[k], second[k], f"{path} {k}"))), "")
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return next((p for i, (x, y) in pairs if (p := _difference(x, y, f"{path} {i}"))), "")
    return "" if first == second else path
