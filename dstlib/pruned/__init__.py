"""Sparse checkpoints that other tools wrote: their masks, and their weights as any model loads them.

>>> import torch
>>> from torch import nn
>>> from torch.nn.utils import prune
>>> layer = prune.l1_unstructured(nn.Linear(8, 4), "weight", amount=24)
>>> weights = read_weights(layer.state_dict())
>>> sorted(weights), int(weights["weight"].count_nonzero())
(['bias', 'weight'], 8)
"""

from dstlib.pruned.content import FoundMasks, find_masks, read_weights
from dstlib.pruned.tools import Tool

__all__ = ["FoundMasks", "Tool", "find_masks", "read_weights"]
