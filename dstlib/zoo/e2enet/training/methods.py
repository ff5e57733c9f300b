"""The methods of dstlib as the recipes compare them."""

from dataclasses import replace

from dstlib.masking.granularity import Block
from dstlib.methods import DSFF, METHODS, Method


def kernel_method(name: str, interval: int, block: int = 1) -> Method:
    """Returns a method as the recipes compare it: on whole kernels at one density, as DSFF, whatever its paper did.

    With ``block`` above 1, on blocks of so many output and input channels.

    Two runs that differ in the method then differ in its rule alone.

    >>> kernel_method("static", 50).interval, kernel_method("rigl", 50).interval
    (None, 50)
    >>> kernel_method("rigl", 50).granularity
    Kernel()
    """
    method, granularity = METHODS[name], DSFF.granularity if block == 1 else Block(block, block)
    every = None if method.interval is None else interval
    return replace(method, granularity=granularity, distribution=DSFF.distribution, interval=every)
