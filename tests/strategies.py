"""What the laws are tried on: shapes, granularities, masks, scores, and the textual masks of the tables.

Shapes: O out, I in, K kernel taps; G groups, U units per group, E elements per unit.
"""

from fractions import Fraction

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dstlib.masking import (
    NM,
    Block,
    Channel,
    Diagonal,
    Element,
    FanIn,
    Granularity,
    Kernel,
    SharedFanIn,
    unit_mask,
    update_mask,
)

seeds = st.integers(0, 2**32 - 1)
percents = st.sampled_from([0, 1, 10, 29, 30, 50, 57, 58, 99, 100]) | st.integers(0, 100)
near_ends = st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.29, 0.5, 0.9, 0.99, 0.999])
densities = near_ends | st.floats(0.001, 1.0)
kernel_taps = st.lists(st.integers(1, 3), max_size=3).map(tuple)
shapes = st.tuples(st.tuples(st.integers(1, 5), st.integers(1, 5)), kernel_taps).map(lambda s: s[0] + s[1])


def examples(few: int, many: int, **others: object) -> settings:
    """How many examples a law is tried on that is slow, or needs more than others: many where the long tests run."""
    return settings(max_examples=many if settings.get_current_profile_name() == "many" else few, **others)


def grid(text: str) -> Tensor:
    """A mask as it is drawn: a row per word, x for active. grid("x. .x") is the 2 × 2 identity."""
    return torch.tensor([[character == "x" for character in row] for row in text.split()])


def drawn(mask: Tensor) -> str:
    """The inverse of ``grid``."""
    return " ".join("".join("x" if active else "." for active in row) for row in mask.tolist())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def folds(draw: st.DrawFn) -> tuple[Granularity, torch.Size]:
    """Any granularity, with a shape of 2 to 5 axes that it divides."""
    out, into = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    taps = draw(kernel_taps)
    p, q = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    granularity, shape = draw(
        st.sampled_from(
            [
                *((plain, (out, into)) for plain in (Element(), Kernel(), Channel(), FanIn())),
                (Block(p, q), (out * p, into * q)),
                (SharedFanIn(p), (out * p, into)),
                (Diagonal(), (out, into * q)),
                (Diagonal(), (out * p, into)),
                (NM(1, q), (out, into * q)),
            ]
        )
    )
    return granularity, torch.Size((*shape, *taps))


def tied_scores(shape: torch.Size, seed: int, num_values: int) -> Tensor:
    """Whole numbers from -1 up, ``num_values`` different ones: all tied at 1, and full of zeros."""
    return torch.randint(-1, num_values - 1, shape, generator=generator(seed)).float()


def distinct_scores(granularity: Granularity, shape: torch.Size, seed: int) -> Tensor:
    """No two units of a group have the same mean; all sums are exact in single precision."""
    num_groups, num_units, num_elements = granularity.fold(torch.zeros(shape)).shape
    rank_GU = torch.rand(num_groups, num_units, generator=generator(seed)).argsort(dim=1).float()
    below_one = torch.randint(0, 64, (num_groups, num_units, num_elements), generator=generator(seed + 1)) / 64
    return granularity.unfold(rank_GU[..., None] + below_one, shape)


def random_mask(granularity: Granularity, shape: torch.Size, seed: int, density: float) -> Tensor:
    """Each unit on or off by itself, so the counts of the groups differ."""
    active_GU = torch.rand(granularity.fold(torch.zeros(shape)).shape[:2], generator=generator(seed)) < density
    return unit_mask(active_GU, granularity, shape).clone()


def units(granularity: Granularity, mask: Tensor) -> Tensor:
    """(O, I, *K) → (G, U), having made sure that each unit is all on or all off."""
    mask_GUE = granularity.fold(mask)
    assert torch.equal(mask_GUE.all(dim=-1), mask_GUE.any(dim=-1)), "a unit is partly on"
    return mask_GUE[..., 0]


def exact(decimal: float) -> Fraction:
    """The number that the digits say: 0.29 is 29/100, not the nearest binary fraction."""
    return Fraction(repr(decimal))


def initial_mask(score: Tensor, *, granularity: Granularity, num_target: int | Tensor) -> Tensor:
    """The highest-scoring units per group: an update that starts from nothing."""
    nothing = torch.zeros_like(score, dtype=torch.bool)
    return update_mask(nothing, score, score, granularity=granularity, num_target=num_target, drop_fraction=0.0).mask


def in_order_of_growth(
    active: list[bool], kept: list[int], drop: list[float], grow: list[float], *, regrow: bool = True
) -> list[int]:
    """The units of one group that were not kept, in the order in which they are taken to meet a target.

    First those with a reason, the best first, which are all but the ones that tie for the lowest growth score; then
    what was active, by its drop score; then the rest. Without regrowth, what was not active comes before them all if
    it has a reason. Ties go to the lower index.
    """
    others = [u for u in range(len(active)) if u not in kept]
    lowest = [u for u in others if grow[u] == min(grow[v] for v in others)]
    without = set(lowest) if len(lowest) > 1 else set()

    def place(u: int) -> tuple[int, float, int]:
        if u not in without:
            return (0 if regrow or not active[u] else 1), -grow[u], u
        return (2, -drop[u], u) if active[u] else (3, 0, u)

    return sorted(others, key=place)
