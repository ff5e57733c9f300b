"""All that happens between convolutions on depth-last maps: up-sampling, pooling, norm, activation, layout."""

from dstlib.engine.layouts import materialise, to_channels_first, to_depth_last
from dstlib.engine.norms import norm_backward
from dstlib.engine.pooling import max_pool
from dstlib.engine.upsampling import upsample

__all__ = ["materialise", "max_pool", "norm_backward", "to_channels_first", "to_depth_last", "upsample"]
