"""What a plan reaches of the sparsity that was asked for: units are whole, and each group has at least one."""

from collections.abc import Mapping, Sequence

from dstlib.masking import Granularity, folded_shape, num_units
from dstlib.targets import Weight

_TOLERANCE = 0.05  # of the active weights
_NUM_NAMED = 3


def unmet(weights: Sequence[Weight], densities: Mapping[str, float], granularity: Granularity, sparsity: float) -> str:
    """Says what will be reached instead of what was asked for, and by which weights; "" where the counts come near.

    ``densities`` are those that are to be reached by each matrix view.
    """
    asked: dict[str, float] = {}
    reached: dict[str, int] = {}
    lines: dict[str, str] = {}
    for weight in weights:
        for view in () if weight.reason else weight.views:
            num_groups, num_all, num_each = folded_shape(granularity, view.of(weight.parameter).shape)
            num, density, name = num_units(num_all, densities[view.name]), densities[view.name], view.name
            if num * num_groups == 1:  # a distribution gives each weight one unit at least
                density = min(density, 1 - sparsity)
            asked[name] = density * num_groups * num_all * num_each
            reached[name] = num_groups * num * num_each
            of_each = f" in each of {num_groups:,} groups" if num_groups > 1 else ""
            lines[name] = f"  {name}: {num:,} of {num_all:,} units{of_each}, for a density of {density:.3g}"
    num_asked, num_reached = sum(asked.values()), sum(reached.values())
    if abs(num_reached - num_asked) <= _TOLERANCE * num_asked:
        return ""
    num_entries = sum(weight.parameter.numel() for weight in weights if not weight.reason)
    most_first = sorted(lines, key=lambda name: -abs(reached[name] - asked[name]))
    worst = [name for name in most_first if abs(reached[name] - asked[name]) > _TOLERANCE * asked[name]][:_NUM_NAMED]
    return (
        f"A sparsity of {1 - num_asked / num_entries:.4g} was asked for, {1 - num_reached / num_entries:.4g} will be "
        f"reached: {granularity} keeps whole units, at least one in each group. Most by:\n"
        + "".join(f"{lines[name]}\n" for name in worst)
        + "Choose a sparsity that they can have, a finer granularity, or overrides= of their own."
    )
