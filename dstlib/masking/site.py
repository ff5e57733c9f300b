"""Sites: one sparse weight at one moment, as a criterion sees it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Site:
    """A sparse weight, its dense gradient, and what else a criterion may look at.

    Tensors are (O, I, *K): outputs, inputs, kernel taps; transposed convolutions are turned that way round,
    and each of the three matrices of an attention's in_proj is a site of its own. ``mask`` marks the active
    entries; where growth is scored, those that the update keeps, as it drops first, and ``mask_before`` marks
    those that were active until then. ``grad`` is the full gradient of the step, reduced over ranks, accumulated
    and unscaled; None at initialisation. ``momentum`` is the optimizer's first moment, None where it keeps none.
    ``trace`` is what the method's ``trace`` has gathered over the steps before; None where it gathers nothing.
    ``step`` is the optimizer step, from 1; 0 at initialisation. ``progress`` is the share of the time in which
    masks change, in [0, 1].
    ``num_target`` is how many entries are to be active, known where a first mask is chosen; None elsewhere.
    ``generator`` depends on the seed, the step and the name alone, so ranks, devices and resumed runs draw
    alike.
    """

    name: str
    weight: Tensor
    mask: Tensor
    grad: Tensor | None
    momentum: Tensor | None
    step: int
    generator: torch.Generator
    trace: Tensor | None = None
    progress: float = 0.0
    num_target: int | None = None
    mask_before: Tensor | None = None

    def __repr__(self) -> str:
        return f"Site({self.name!r}, step {self.step}, shape {tuple(self.weight.shape)})"

    def rand(self) -> Tensor:
        """Draws uniform numbers in [0, 1) of the weight's shape, on the CPU in float32 whatever the defaults."""
        return torch.rand(self.weight.shape, generator=self.generator, dtype=torch.float32, device="cpu").to(
            self.weight.device
        )


Criterion = Callable[[Site], Tensor]


def site_generator(seed: int, step: int, name: str) -> torch.Generator:
    """Returns a CPU generator that is a function of (seed, step, name).

    >>> draws = [torch.rand(3, generator=site_generator(0, 7, "fc")) for _ in range(2)]
    >>> torch.equal(*draws)
    True
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{name}".encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
