"""A fusion node's flows and its first unit as one operation, which keeps for its gradients none of what it joins.

Shapes: N batch, C channels, D, H, W depth, height, width. The maps that the flows make, finer than the coarse map and
coarser than the fine one, are as large as all that a network of such nodes has to keep; to compute them once more, from
maps that are kept anyway, takes a small share of a training step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from dstlib.engine.ops.conv import (
    CONV,
    CONV_BACKWARD_INPUT,
    CONV_BACKWARD_WEIGHTS,
    Affine,
    ConvProblem,
    Geometry,
    Triple,
    backward_of_norm,
    plain_conv,
    stated,
    unit,
)
from dstlib.engine.ops.conv_transpose import (
    CONV_TRANSPOSE,
    CONV_TRANSPOSE_BACKWARD_INPUT,
    CONV_TRANSPOSE_BACKWARD_WEIGHTS,
    ConvTransposeProblem,
    conv_transpose,
    parameters_of,
    plain_conv_transpose,
)
from dstlib.engine.ops.feature_map import FeatureMap, empty_depth_last, flat
from dstlib.engine.ops.max_pool import MAX_POOL, MAX_POOL_BACKWARD, MaxPoolProblem, max_pool, plain_max_pool
from dstlib.engine.ops.operator import Item, Operator, Tensors, by_torch, groups, is_recorded, stand_in
from dstlib.engine.ops.patterns import Weights

NUM_UPWARD = 5  # tensors at the end: the weight of the upward flow, row_ptr and col_idx of active and of graded kernels


@dataclass(frozen=True)
class FusionProblem(ConvProblem):
    """A unit of what two or three maps flow into: the same level's, the coarser, and the finer one.

    Tensors are those of a unit of these maps, then those of the upward flow.
    """

    name = "fusion_node"
    upward: tuple[int, ...] = ()  # the stride of the transposed convolution
    window: tuple[int, ...] = ()  # of the pooling, () where no finer map comes in

    def check(self, tensors: Tensors) -> None:
        """Refuses nothing: each part looks at what it is given."""

    def parts(self, given: Sequence[Item]) -> tuple[list[list[Item]], Sequence[Item], Sequence[Item]]:
        """Cuts what there is of each tensor into that of each map and its norm, the unit, and the upward flow."""
        num, num_norms = len(self.normed), 2 * sum(self.normed)
        raw, norms, unit, upward = groups(given, num, num_norms, len(given) - num - num_norms - NUM_UPWARD)
        rest = iter(norms)
        maps = [[x, next(rest), next(rest)] if has else [x] for x, has in zip(raw, self.normed, strict=True)]
        return maps, unit, upward

    def join(self, tensors: Tensors, others: Tensors) -> list[Tensor]:
        """Returns the unit's tensors, with these for what the other levels' maps flow into."""
        ((same, *norm), *_), unit, _ = self.parts(tensors)
        return [same, *others, *norm, *unit]

    def flows(self, tensors: Tensors) -> list[Tensor]:
        """Computes what the other levels' maps flow into; nobody records it."""
        (_, coarser, *finer), _, upward = self.parts(tensors)
        found = CONV_TRANSPOSE.compute(self.of_upward, [*coarser, *upward])
        return [*found, *(MAX_POOL.compute(self.of_downward, each)[0] for each in finer)]

    def outlines(self, tensors: Tensors) -> list[Tensor]:
        """Returns tensors of the sizes of the flows, for who reads no value."""
        ((same, *_), _, *finer), _, (weight, *_) = self.parts(tensors)
        channels = weight.shape[1], *(x.shape[1] for x, *_ in finer)
        return [stand_in((len(same), num, *same.shape[2:]), same.dtype) for num in channels]

    @property
    def of_unit(self) -> ConvProblem:
        """That of the unit, of the maps that come together."""
        num = len(self.normed) - 1
        normed, slopes = (self.normed[0], *[False] * num), (self.slopes[0], *[1.0] * num)
        return ConvProblem(normed, slopes, self.stride, self.has_bias, True, self.eps, self.slope, self.compact)

    @property
    def of_upward(self) -> ConvTransposeProblem:
        """That of the transposed convolution."""
        return ConvTransposeProblem(self.normed[1:2], self.slopes[1:2], self.upward)

    @property
    def of_downward(self) -> MaxPoolProblem:
        """That of the pooling."""
        return MaxPoolProblem(self.normed[2:], self.slopes[2:], self.window)


def fusion_node(
    maps: Sequence[FeatureMap],
    upward: tuple[Weights, Triple],
    window: Triple | None,
    weights: Weights,
    geometry: Geometry,
    affine: Affine,
    slope: float,
) -> FeatureMap:
    """Computes the unit of the same level's map, the coarser one transposed-convolved, and the finer one max-pooled.

    ``maps`` are these two, or three where there is a ``window``. The gradient of the result is that of the activated
    map, and so are those of the maps.

    Raises:
        InputError: The maps do not fit each other, a weight, or the norm.
    """
    if not is_recorded(*(x.tensor for x in maps), upward[0].weight, weights.weight, weights.bias, *affine[:2]):
        flows = [maps[0], conv_transpose(maps[1], *upward)]
        if window is not None:
            flows.append(max_pool(maps[2], window))
        return unit(flows, weights, geometry, affine, slope)
    tensors, normed, slopes = flat(maps)
    of_unit, (_, *own) = stated([FeatureMap(maps[0].raw)], weights, geometry, affine, slope)
    settings = normed, slopes, of_unit.stride, of_unit.has_bias, True, of_unit.eps, slope, of_unit.compact
    problem = FusionProblem(*settings, upward[1], window or ())
    return problem.result(FUSION_NODE(problem, [*tensors, *own, *parameters_of(upward[0])]))


def _by_parts(problem: FusionProblem, tensors: Tensors) -> list[Tensor]:
    return CONV.compute(problem.of_unit, problem.join(tensors, problem.flows(tensors)))


def _empty(problem: FusionProblem, tensors: Tensors) -> list[Tensor]:
    weight = problem.parameters(tensors)[0]
    y = empty_depth_last(problem.output_size(tensors[0], weight), weight)
    return [y, y.new_empty(4, *y.shape[:2])]


def _backward(
    problem: FusionProblem, kept: list[Tensor], grads: Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    outputs, tensors = [kept.pop(0), kept.pop(0)], kept
    grad, *of_norm = backward_of_norm(problem, outputs, problem.parameters(tensors)[-2], grads[0])
    maps, _, upward = problem.parts(tensors)
    wants_maps, wants_unit, wants_upward = problem.parts(wanted)
    of_weight: Sequence[Tensor | None] = [None] * (1 + problem.has_bias)
    if any(wants_unit[: 1 + problem.has_bias]):
        of_weight = CONV_BACKWARD_WEIGHTS(problem.of_unit, [*problem.join(tensors, problem.flows(tensors)), grad])
    of_maps: list[Tensor | None] = [None] * len(maps)
    of_upward = None
    if any(chain(*wants_maps, wants_upward)):
        joined = problem.join(tensors, problem.outlines(tensors))
        of_maps[0], fine, *coarse = CONV_BACKWARD_INPUT(problem.of_unit, [*joined, grad])
        del grad  # it takes as much memory as the map, as what follows does
        given = [*maps[1], *upward, fine]
        of_maps[1] = CONV_TRANSPOSE_BACKWARD_INPUT(problem.of_upward, given)[0] if wants_maps[1][0] else None
        of_upward = CONV_TRANSPOSE_BACKWARD_WEIGHTS(problem.of_upward, given)[0] if wants_upward[0] else None
        for i, dy in enumerate(coarse, 2):
            of_maps[i] = MAX_POOL_BACKWARD(problem.of_downward, [*maps[i], dy])[0] if wants_maps[i][0] else None
    num_norms, num_fixed = 2 * sum(problem.normed), len(wants_unit) - len(of_weight) - len(of_norm)
    return [*of_maps, *[None] * num_norms, *of_weight, *of_norm, *[None] * num_fixed, of_upward]


def _plain(problem: FusionProblem, tensors: Tensors) -> Tensor:
    (_, coarser, *finer), _, upward = problem.parts(tensors)
    flows = [plain_conv_transpose(problem.of_upward, [*coarser, *upward])]
    flows += [plain_max_pool(problem.of_downward, each) for each in finer]
    return plain_conv(problem.of_unit, problem.join(tensors, flows))


FUSION_NODE = Operator(
    "fusion_node",
    FusionProblem,
    (by_torch(_by_parts),),
    fake=_empty,
    backward=_backward,
    keep=lambda problem, tensors, outputs: [*outputs, *tensors],
    plain=_plain,
)
