"""Distributions: hand-worked shares, exact integer totals, and the published numbers of two networks."""

import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import exact, shapes

from dstlib.masking import Distribution, er, erk, num_units, uniform, uniform_dense_first

Shapes = Mapping[str, tuple[int, ...]]
models = st.lists(shapes, min_size=1, max_size=8).map(lambda found: {f"layer{i}": s for i, s in enumerate(found)})
thousandths = st.integers(1, 1000)


def counts(shapes: Shapes, densities: Mapping[str, float]) -> dict[str, int]:
    """The whole numbers n·d, which they must be: the nearest double to k/n gives k back when multiplied."""
    active = {name: densities[name] * math.prod(shape) for name, shape in shapes.items()}
    for name, number in active.items():
        # n·(k/n) takes two roundings of 1.1e-16 each
        assert number == pytest.approx(round(number), rel=3e-16, abs=0), name
    return {name: round(number) for name, number in active.items()}


# Tables


def test_uniform() -> None:
    assert uniform({"a": (8, 4), "b": (2, 8)}, 0.3) == {"a": 0.3, "b": 0.3}
    assert uniform_dense_first({"a": (8, 4), "b": (2, 8), "c": (1, 1)}, 0.3) == {"a": 1.0, "b": 0.3, "c": 0.3}


def test_erdos_renyi_by_hand() -> None:
    """Of 100 + 200 + 600 weights 90 stay, divided as out + in: 20 : 30 : 50."""
    shapes = {"a": (10, 10), "b": (10, 20), "c": (20, 30)}
    assert counts(shapes, er(shapes, 0.1)) == {"a": 18, "b": 27, "c": 45}


def test_kernel_taps_count_in_erk_only() -> None:
    """Of 140 + 720 weights 100 stay. ERK divides them as the sums of extents, 26 : 24; ER as 24·1 : 18·9."""
    shapes = {"pointwise": (10, 14, 1, 1), "square": (10, 8, 3, 3)}
    density = 100 / 860
    assert counts(shapes, erk(shapes, density)) == {"pointwise": 52, "square": 48}
    assert counts(shapes, er(shapes, density)) == {"pointwise": 13, "square": 87}


def test_what_exceeds_its_size_is_dense_and_the_others_share_the_rest() -> None:
    shapes = {"tiny": (2, 2), "a": (10, 10), "b": (10, 30)}  # 4 + 100 + 300 weights, of which 64 stay
    # 4 : 20 : 40 of 64 would be 4, 20 and 40, of which tiny is just full; of 124, 7.75 exceeds it
    assert counts(shapes, erk(shapes, 64 / 404)) == {"tiny": 4, "a": 20, "b": 40}
    assert counts(shapes, erk(shapes, 124 / 404)) == {"tiny": 4, "a": 40, "b": 80}


def test_at_least_one_in_each() -> None:
    shapes = {"a": (3, 3), "b": (100, 100), "c": (3, 3)}
    assert counts(shapes, erk(shapes, 0.0)) == {"a": 1, "b": 1, "c": 1}
    assert counts(shapes, er(shapes, 0.0005)) == {"a": 1, "b": 4, "c": 1}  # n - floor(0.9995 · 10018) = 6


def test_equal_layers_saturate_together() -> None:
    shapes = {"first": (4, 4), "wide": (50, 50), "last": (4, 4), "turned": (2, 8)}
    active = counts(shapes, erk(shapes, 0.1))
    assert active["first"] == active["last"] == active["turned"] == 16
    assert sum(active.values()) == math.ceil(0.1 * 2548)


# Laws


@pytest.mark.parametrize("distribution", [er, erk])
@given(models, thousandths)
def test_totals_are_exact(distribution: Distribution, shapes: Shapes, sparse: int) -> None:
    """n - floor(S·n) with S as its digits say, and at least one in each."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    for density in (1 - sparse / 1000, (1000 - sparse) / 1000):
        densities = distribution(shapes, density)
        assert list(densities) == list(shapes)
        assert all(0 < d <= 1 for d in densities.values())
        active = counts(shapes, densities)
        assert min(active.values()) >= 1
        assert sum(active.values()) == max(total - math.floor(Fraction(sparse, 1000) * total), len(shapes))
        assert active == {name: num_units(sizes[name], densities[name]) for name in shapes}


@pytest.mark.parametrize("distribution", [uniform, uniform_dense_first, er, erk])
@given(models)
def test_dense_is_dense(distribution: Distribution, shapes: Shapes) -> None:
    assert distribution(shapes, 1.0) == dict.fromkeys(shapes, 1.0)


@pytest.mark.parametrize("distribution", [er, erk])
@given(models, thousandths)
def test_unsaturated_layers_share_one_factor(distribution: Distribution, shapes: Shapes, thousandth: int) -> None:
    """Counts are within one of proportional to the extents, so that of two layers none can be worse by two."""
    active = counts(shapes, distribution(shapes, thousandth / 1000))
    weight = {n: Fraction(sum(s) if distribution is erk else sum(s[:2]) * math.prod(s[2:])) for n, s in shapes.items()}
    free = [n for n in shapes if 1 < active[n] < math.prod(shapes[n])]
    for a in free:
        for b in free:
            assert (active[a] - 1) / weight[a] < (active[b] + 1) / weight[b]


@pytest.mark.parametrize("distribution", [er, erk])
@given(models, thousandths, st.data())
def test_equal_layers_differ_by_the_remainder_at_most(
    distribution: Distribution, shapes: Shapes, thousandth: int, data: st.DataObject
) -> None:
    twin = data.draw(st.sampled_from(sorted(shapes)))
    shapes = {**shapes, "twin": shapes[twin]}
    active = counts(shapes, distribution(shapes, thousandth / 1000))
    assert abs(active[twin] - active["twin"]) <= 1


@pytest.mark.parametrize("distribution", [er, erk])
@given(models, thousandths)
def test_more_density_is_more_in_every_layer(distribution: Distribution, shapes: Shapes, thousandth: int) -> None:
    """To within the one weight that remainders may move."""
    less = counts(shapes, distribution(shapes, thousandth / 1001))
    more = counts(shapes, distribution(shapes, thousandth / 1000))
    assert all(less[name] <= more[name] + 1 for name in shapes)


@given(models, thousandths)
def test_er_is_erk_without_taps(shapes: Shapes, thousandth: int) -> None:
    linear = {name: shape[:2] for name, shape in shapes.items()}
    assert er(linear, thousandth / 1000) == erk(linear, thousandth / 1000)


# ResNet-50 at 224²: name, weight and number of output positions of its 54 tensors. conv1 has 112² of them, but
# the published count has it at 115², padding the padded image (230²) once more; with 112² no published fraction
# but the all-layers-uniform one is met to four digits, and with 115² all are.

CONV1_SIDE = 112
CONV1_SIDE_AS_PUBLISHED = 115


def _resnet50() -> dict[str, tuple[tuple[int, ...], int]]:
    table: dict[str, tuple[tuple[int, ...], int]] = {"conv1": ((64, 3, 7, 7), CONV1_SIDE**2)}
    into, before = 64, 56
    for stage, (width, blocks, size) in enumerate([(64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            table[f"{name}.conv1"] = ((width, into, 1, 1), before**2)  # the 3 × 3 convolution strides
            table[f"{name}.conv2"] = ((width, width, 3, 3), size**2)
            table[f"{name}.conv3"] = ((4 * width, width, 1, 1), size**2)
            if block == 0:
                table[f"{name}.downsample"] = ((4 * width, into, 1, 1), size**2)
            into, before = 4 * width, size
    return {**table, "fc": ((1000, 2048), 1)}


RESNET50 = _resnet50()
RESNET50_SHAPES = {name: shape for name, (shape, _) in RESNET50.items()}
FOUR_DIGITS = 0.5e-4  # the precision to which the values are published
RESNET50_DENSE = {
    0.8: {f"layer1.{b}.conv{c}" for b, c in [(0, 1), (0, 3), (1, 1), (1, 3), (2, 1), (2, 3)]}
    | {"layer1.0.downsample", "layer2.0.conv1"},
    0.9: {"layer1.0.conv1"},
}


def flops(densities: Mapping[str, float], conv1_side: int) -> float:
    """Σ outputs · (2 · fan_in · d + 1)."""
    positions = {name: at for name, (_, at) in RESNET50.items()} | {"conv1": conv1_side**2}
    return sum(
        shape[0] * positions[name] * (2 * math.prod(shape[1:]) * densities[name] + 1)
        for name, shape in RESNET50_SHAPES.items()
    )


def fraction(distribution: Distribution, sparsity: float, conv1_side: int = CONV1_SIDE_AS_PUBLISHED) -> float:
    dense = flops(uniform(RESNET50_SHAPES, 1.0), conv1_side)
    return flops(distribution(RESNET50_SHAPES, 1 - sparsity), conv1_side) / dense


def test_resnet50_is_the_one_of_the_papers() -> None:
    assert len(RESNET50) == 54
    assert sum(math.prod(shape) for shape in RESNET50_SHAPES.values()) == 25_502_912


@pytest.mark.parametrize(
    ("distribution", "sparsity", "published"),
    [
        (erk, 0.8, 0.4153),
        (uniform_dense_first, 0.8, 0.2254),
        (er, 0.8, 0.4546),
        (erk, 0.9, 0.2431),
        (uniform_dense_first, 0.9, 0.1285),
        (uniform, 0.9, 0.1012),
    ],
)
def test_inference_flops_of_resnet50(distribution: Distribution, sparsity: float, published: float) -> None:
    assert fraction(distribution, sparsity) == pytest.approx(published, rel=0, abs=FOUR_DIGITS)


@pytest.mark.parametrize(
    ("distribution", "sparsity"), [(d, s) for d in (erk, er, uniform_dense_first) for s in (0.8, 0.9)]
)
def test_counting_conv1_as_it_is_makes_little_difference(distribution: Distribution, sparsity: float) -> None:
    """It holds 2.9 % of the dense FLOPs, which (115/112)² raises by 5.4 %: 0.16 % of the total."""
    assert abs(fraction(distribution, sparsity, CONV1_SIDE) - fraction(distribution, sparsity)) < 0.0016


@pytest.mark.parametrize(("sparsity", "published"), [(0.8, 0.4172), (0.9, 0.2456)])
def test_training_cost_of_rigl_on_resnet50(sparsity: float, published: float) -> None:
    """(3·f_S·ΔT + 2·f_S + f_D) / (ΔT + 1) over 3·f_D, with ΔT = 100."""
    sparse, interval = fraction(erk, sparsity), 100
    cost = (3 * sparse * interval + 2 * sparse + 1) / (interval + 1) / 3
    assert cost == pytest.approx(published, rel=0, abs=FOUR_DIGITS)


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_dense_layers_of_resnet50(sparsity: float) -> None:
    densities = erk(RESNET50_SHAPES, 1 - sparsity)
    assert {name for name, density in densities.items() if density == 1} == RESNET50_DENSE[sparsity]


def test_densities_of_resnet50() -> None:
    densities = erk(RESNET50_SHAPES, 0.1)
    published = {"conv1": 0.4200, "layer1.0.conv2": 0.1773, "layer4.1.conv2": 0.0213, "fc": 0.0726}
    assert {n: densities[n] for n in published} == pytest.approx(published, rel=0, abs=FOUR_DIGITS)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.965, 0.98, 0.99])
@pytest.mark.parametrize("distribution", [er, erk])
def test_total_of_resnet50(distribution: Distribution, sparsity: float) -> None:
    active = counts(RESNET50_SHAPES, distribution(RESNET50_SHAPES, 1 - sparsity))
    assert sum(active.values()) == 25_502_912 - math.floor(exact(sparsity) * 25_502_912)


# E2ENet on AMOS: (out, in) of its 35 fusion tensors, and how often each occurs

AMOS_FUSION = [
    *[(48, 96)] * 5, *[(96, 240)] * 4, *[(192, 480)] * 3, *[(320, 832)] * 2, (320, 960),  # first Units
    (48, 48), (96, 96), (192, 192), (320, 320), (320, 320),  # second Units, of the last diagonal
    *[(48, 96)] * 5, *[(96, 192)] * 4, *[(192, 320)] * 3, *[(320, 320)] * 3,  # upward
]  # fmt: skip


@pytest.mark.parametrize(("sparsity", "kept"), [(0.7, 621_847), (0.8, 414_569), (0.9, 207_284), (0.0, 2_072_832)])
def test_kept_kernels_of_e2enet(sparsity: float, kept: int) -> None:
    """Each tensor is rounded by itself."""
    shapes = {str(i): (*shape, 1, 3, 3) for i, shape in enumerate(AMOS_FUSION)}
    densities = uniform(shapes, 1 - sparsity)
    assert len(shapes) == 35
    assert sum(num_units(out * into, densities[str(i)]) for i, (out, into) in enumerate(AMOS_FUSION)) == kept
