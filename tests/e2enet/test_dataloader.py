"""Batches drawn ahead: the same by any number of workers, errors in one line, nothing left behind."""

import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstlib.errors import DataError, DstlibError, SettingError
from dstlib.zoo.e2enet.data.dataloading import dataloader
from dstlib.zoo.e2enet.data.dataloading.dataloader import batches
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import draw_batch
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.data.phantoms.ct import phantoms

PATCHES = PatchSettings(patch_size=(8, 12, 12), batch_size=3)


@pytest.fixture(scope="module")
def cases():
    return phantoms(2, shape=(32, 40, 40)).cases


def assert_same(drawn, expected):
    assert len(drawn) == len(expected)
    for (image, label), (expected_image, expected_label) in zip(drawn, expected, strict=True):
        assert torch.equal(image, expected_image)
        assert torch.equal(label, expected_label)
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)


@settings(max_examples=6)
@given(
    workers=st.integers(1, 2),  # torch warns of more than there are cores
    start=st.integers(0, 100),
    num=st.integers(0, 4),
    ranks=st.sampled_from([(0, 1), (0, 3), (2, 3)]),
)
def test_any_number_of_workers_draws_the_same(cases, workers, start, num, ranks):
    drawing = {"seed": 4, "start": start, "stop": start + num, "ranks": ranks}
    expected = [draw_batch(cases, PATCHES, seed=4, iteration=i, ranks=ranks) for i in range(start, start + num)]
    assert_same(list(batches(cases, PATCHES, **drawing)), expected)
    assert_same(list(batches(cases, PATCHES, **drawing, workers=workers)), expected)
    assert not multiprocessing.active_children()


def test_a_training_that_goes_on_meets_the_batches_it_would_have_met(cases):
    whole = list(batches(cases, PATCHES, seed=0, start=0, stop=6, workers=2))
    assert_same(list(batches(cases, PATCHES, seed=0, start=4, stop=6, workers=1)), whole[4:])


def test_workers_leave_the_global_generators_alone(cases):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(batches(cases, PATCHES, seed=0, start=0, stop=2, workers=1))
    assert torch.equal(state, torch.get_rng_state())


def test_closing_ends_the_workers(cases):
    drawn = batches(cases, PATCHES, seed=0, start=0, stop=1000, workers=2)
    next(drawn)
    assert len(multiprocessing.active_children()) == 2
    drawn.close()
    assert not multiprocessing.active_children()


def test_workers_survive_what_the_parent_is_to_decide_on(cases):
    drawn = batches(cases, PATCHES, seed=0, start=0, stop=8, workers=2)
    seen = [next(drawn), next(drawn)]  # one of each worker: both have begun
    for child in multiprocessing.active_children():
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)  # Ctrl-C addresses the parent's group
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(child.pid, number)
    seen += drawn
    assert_same(seen, list(batches(cases, PATCHES, seed=0, start=0, stop=8)))


def test_an_error_in_a_worker_arrives_in_one_line():
    for workers in (0, 1):
        with pytest.raises(DataError, match="cases of a batch") as caught:
            list(batches([], PATCHES, seed=0, start=0, stop=1, workers=workers))
        assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_an_error_comes_after_the_batches_before_it(cases, monkeypatch):
    def draw(*args, iteration, **settings):
        if iteration == 2:
            raise DstlibError("no such luck")
        return draw_batch(*args, iteration=iteration, **settings)

    monkeypatch.setattr(dataloader, "draw_batch", draw)
    drawn = batches(cases, PATCHES, seed=0, start=0, stop=5, workers=2)
    assert len(list(itertools.islice(drawn, 2))) == 2
    with pytest.raises(DstlibError, match=r"^no such luck$"):
        next(drawn)


def test_workers_draw_from_memory_mapped_cases(cases, tmp_path):
    mapped = []
    for case in cases:
        arrays = {}
        for part in ("image", "label"):
            np.save(tmp_path / "array.npy", getattr(case, part))
            (tmp_path / "array.npy").rename(tmp_path / f"{case.name}-{part}.npy")
            arrays[part] = np.load(tmp_path / f"{case.name}-{part}.npy", mmap_mode="r")
        mapped.append(type(case)(case.name, **arrays, spacing=case.spacing))
    expected = list(batches(cases, PATCHES, seed=0, start=0, stop=3))
    assert_same(list(batches(mapped, PATCHES, seed=0, start=0, stop=3, workers=2)), expected)


def test_fewer_than_no_workers_are_refused(cases):
    with pytest.raises(SettingError, match=r"workers of the batches: expected a whole number from 0 up, got -1"):
        batches(cases, PATCHES, seed=0, start=0, stop=1, workers=-1)
