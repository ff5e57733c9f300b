"""What the axes of a volume are called, and what has a number for each of them."""

from typing import Literal, get_args

Axis = Literal["depth", "height", "width"]
AXES: tuple[Axis, ...] = get_args(Axis)
Triple = tuple[int, int, int]  # (depth, height, width)
