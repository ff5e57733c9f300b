"""Two ranks hold equal masks, and equal one process with the doubled batch (METHODS.md, trap 4)."""

import socket
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import batch, small
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import dstlib
from dstlib import RIGL, SettingError, StateError
from dstlib.sparsifier import distributed

STEPS = 9
TRIED = ["rigl", "snfs", "granet", "topkast"]
LAYERS = ["conv", "up", "head"]


def tried(name):
    return replace(dstlib.METHODS[name], interval=2)


def loss(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def one_process(name):
    model = small().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=tried(name), total_steps=STEPS)
    for step in range(STEPS):
        x, y = batch(step, 8)
        optimizer.zero_grad()
        loss(model, x.double(), y).backward()
        optimizer.step()
    return model, sparsifier


def train_rank(rank, wrap_first, name, folder):
    model = small(seed=rank if wrap_first else 0).double()
    replica = DistributedDataParallel(model) if wrap_first else model  # takes the weights of rank 0
    if wrap_first:
        model.load_state_dict(small().double().state_dict())
    sparsifier = dstlib.sparsify(replica, sparsity=0.7, method=tried(name), total_steps=STEPS)
    replica = replica if wrap_first else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(step, 8)
        half = slice(0, 4) if rank == 0 else slice(4, 8)
        optimizer.zero_grad()
        loss(replica, x[half].double(), y[half]).backward()
        optimizer.step()
    torch.save((model.state_dict(), sparsifier.state_dict()), f"{folder}/{rank}.pt")


def diverge(rank, folder):
    """Gradients that nobody reduces: the ranks must not part in silence."""
    model = small()
    dstlib.sparsify(model, sparsity=0.7, method=replace(RIGL, interval=1), total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch(rank)
    loss(model, x, y).backward()
    try:
        optimizer.step()
        message = "no error"
    except StateError as error:
        message = str(error)
    torch.save(message, f"{folder}/{rank}.pt")


def train_from_masks(rank, differ, folder):
    """Each rank reads its masks from a file; DDP sees to the weights, but not to masks."""
    model, rng = small(), torch.Generator().manual_seed(rank if differ else 0)
    masks = {
        f"{name}.weight": torch.rand(model.get_submodule(name).weight.shape, generator=rng) < 0.4 for name in LAYERS
    }
    torch.save(masks, f"{folder}/masks-{rank}.pt")
    replica = DistributedDataParallel(model)
    sparsifier = dstlib.sparsify(replica, masks=f"{folder}/masks-{rank}.pt", method=tried("rigl"), total_steps=STEPS)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
    message = ""
    try:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(replica, *batch(2 * step + rank)).backward()
            optimizer.step()
    except StateError as error:
        message = str(error)
    torch.save((masks, first, sparsifier.masks, sparsifier.step, message), f"{folder}/{rank}.pt")


def train_unevenly(rank, folder):
    """Rank 1 has four batches more, and ``Join`` lets rank 0 answer DDP meanwhile, but no mask check."""
    distributed.PATIENCE = 0.5
    replica = DistributedDataParallel(small())
    sparsifier = dstlib.sparsify(replica, sparsity=0.7, method=tried("rigl"), total_steps=40)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
    with Join([replica]), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(6 + 4 * rank):
            optimizer.zero_grad()
            loss(replica, *batch(step)).backward()
            optimizer.step()
    said = [str(w.message) for w in told if "did not come to compare" in str(w.message)]
    torch.save((sparsifier.step, said), f"{folder}/{rank}.pt")


def train_alone(rank, says_so, folder):
    """Rank 0 trains a model of its own beside the other rank, which waits for it in vain or not at all."""
    distributed.PATIENCE = 0.5
    alone = dist.new_group([0])
    told = []
    if rank == 0:
        model, group = small(), alone if says_so else None
        sparsifier = dstlib.sparsify(model, sparsity=0.7, method=tried("rigl"), total_steps=STEPS, process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(STEPS):
                optimizer.zero_grad()
                loss(model, *batch(step)).backward()
                optimizer.step()
        assert sparsifier.step == STEPS
    dist.barrier()
    torch.save([str(w.message) for w in told], f"{folder}/{rank}.pt")


def as_rank(target, rank, port, *args):
    """Runs in one of the two processes, in a group that is the target's alone."""
    address, patience = f"tcp://127.0.0.1:{port}", distributed.PATIENCE
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    try:
        target(rank, *args)
    finally:
        distributed.PATIENCE = patience
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def run():
    """Runs a target on two ranks: in two processes, which load torch once for all tests."""
    with ProcessPoolExecutor(2, mp.get_context("spawn")) as pool:

        def both(target, tmp_path, *args):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            # a rank waits for the other in its group, so that each is in a process of its own
            ranks = [pool.submit(as_rank, target, rank, port, *args, str(tmp_path)) for rank in (0, 1)]
            for rank in as_completed(ranks):
                rank.result()
            return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

        yield both


@pytest.mark.parametrize(
    ("wrap_first", "method"),
    [(True, "rigl"), *((False, name) for name in TRIED)],
    ids=["wrapped before", *(f"wrapped after, {name}" for name in TRIED)],
)
def test_two_ranks_equal_one_process_with_the_doubled_batch(run, wrap_first, method, tmp_path):
    (weights, masks), (other_weights, other_masks) = run(train_rank, tmp_path, wrap_first, method)
    model, sparsifier = one_process(method)
    for name, saved in sparsifier.state_dict()["weights"].items():
        assert torch.equal(masks["weights"][name]["mask"], other_masks["weights"][name]["mask"])
        assert torch.equal(masks["weights"][name]["mask"], saved["mask"])
        assert masks["weights"][name]["step"] == STEPS
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], other_weights[name])
        # the mean of two half-batch gradients is summed in another order; double precision, 9 steps
        torch.testing.assert_close(weights[name], weight, rtol=1e-12, atol=1e-14)


def test_ranks_that_part_say_so(run, tmp_path):
    for message in run(diverge, tmp_path):
        assert "conv.weight" in message
        assert "step 1: expected the same on all 2 ranks" in message


def test_ranks_start_from_the_masks_of_a_file_and_stay_equal(run, tmp_path):
    (given, first, last, step, message), (_, *other) = run(train_from_masks, tmp_path, False)
    assert not message
    assert step == STEPS
    for theirs, ours in zip(other[:2], (first, last), strict=True):
        assert all(torch.equal(mask, theirs[name]) for name, mask in ours.items())
    assert all(torch.equal(mask, given[name]) for name, mask in first.items())
    assert any(not torch.equal(mask, last[name]) for name, mask in first.items()), "else masks do not move"


def test_ranks_with_masks_of_different_files_say_so(run, tmp_path):
    for *_, step, message in run(train_from_masks, tmp_path, True):
        assert step == 0
        assert "step 1: expected the same on all 2 ranks" in message
        assert "conv.weight, up.weight, head.weight" in message
        assert "masks=" in message


def test_a_rank_without_data_keeps_nobody_waiting(run, tmp_path):
    (early, _), (late, said) = run(train_unevenly, tmp_path)
    assert (early, late) == (6, 10)
    assert [line.partition(" did")[0] for line in said] == ["masks at step 8: rank 0"]


@pytest.mark.parametrize("says_so", [True, False], ids=["a group of one", "the default group"])
def test_a_rank_may_train_a_model_of_its_own(run, says_so, tmp_path):
    said, _ = run(train_alone, tmp_path, says_so)
    assert [line.partition(" did")[0] for line in said] == ([] if says_so else ["masks at step 1: rank 1"])


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5)).double()


def train_compact(replica, model, sparsifier, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        replica(x[rows]).square().mean().backward()
        optimizer.step()
    return model.state_dict(), dict(sparsifier.masks)


def train_compact_rank(rank, name, folder):
    """Counts what is on the wire, by a hook that reduces as DDP does."""
    model = perceptron()
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method=tried(name), total_steps=STEPS, storage="compact")
    replica, sent = DistributedDataParallel(model), []

    def reduce(_, bucket):
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    replica.register_comm_hook(None, reduce)
    message, found = "", None
    try:
        found = train_compact(replica, model, sparsifier, slice(0, 4) if rank == 0 else slice(4, 8))
    except SettingError as error:
        message = str(error)
    num = sum(p.numel() for p in model.parameters())
    torch.save((found, sent, num, message), f"{folder}/{rank}.pt")


def test_ranks_with_compact_weights_equal_one_process_and_send_what_is_active(run, tmp_path):
    (found, sent, num, message), (other, _, _, _) = run(train_compact_rank, tmp_path, "rigl")
    assert not message
    model = perceptron()
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method=tried("rigl"), total_steps=STEPS, storage="compact")
    state, masks = train_compact(model, model, sparsifier, slice(None))
    for name, mask in masks.items():
        assert torch.equal(found[1][name], mask)
        assert torch.equal(other[1][name], mask)
    for name, x in state.items():
        assert torch.equal(found[0][name], other[0][name])
        # the mean of two half-batch gradients is summed in another order; double precision, 9 steps
        torch.testing.assert_close(found[0][name], x, rtol=1e-12, atol=1e-14)
    assert sum(sent) == num * STEPS
    assert num < 0.3 * sum(p.numel() for p in perceptron().parameters())


def test_ranks_with_compact_weights_that_change_size_say_so(run, tmp_path):
    for _, _, _, message in run(train_compact_rank, tmp_path, "gmp"):
        assert message.startswith('storage of sparsify(), 0.weight: expected "masked"')
