"""The engine on a GPU: only active blocks of channels are computed, on matrix units, with few passes over memory.

By kernels in CUDA for the common case (``tiles.cu``), in Triton for every other. What compiles them, cuda-core and
Triton, are extras (``pip install dstlib[gpu]``), loaded when the first kernel runs, never by an import. Train with
``replace(dstlib.DSFF, granularity=dstlib.Block(16, 16))``, say; :func:`dstlib.accelerate` then puts units, fusion nodes
and convolutions (as :class:`BlockConv`) on these kernels where that is faster.
"""

from dstlib.engine.gpu.blocks import Blocks
from dstlib.engine.gpu.conv import block_conv
from dstlib.engine.gpu.layers import BlockConv
from dstlib.engine.gpu.problem import Launch

__all__ = ["BlockConv", "Blocks", "Launch", "block_conv"]
