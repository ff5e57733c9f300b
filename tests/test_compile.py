"""Masks under torch.compile: in place, so one graph and no recompilation over updates (METHODS.md, trap 7)."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from models import assert_zero_outside, batch, small
from torch import nn

import dstlib
from dstlib import RIGL


@pytest.mark.parametrize("compile_first", [True, False], ids=["compiled before", "compiled after"])
def test_one_graph_and_no_recompilation(compile_first):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = small()
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = replace(RIGL, interval=2)
    target = compiled if compile_first else model
    sparsifier = dstlib.sparsify(target, optimizer, sparsity=0.7, method=method, total_steps=12)
    assert list(sparsifier.masks) == ["conv.weight", "up.weight", "head.weight"]
    first = sparsifier.masks["conv.weight"].clone()
    for step in range(8):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        assert_zero_outside(model, sparsifier.masks, optimizer)
    assert not torch.equal(first, sparsifier.masks["conv.weight"])
    assert counter.frame_count == 1
