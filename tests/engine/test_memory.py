"""Memory of large maps: used again when nobody can see it any more, and never before."""

import copy
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from strategies import examples
from test_as_torch import forced
from test_trains_as_torch import Levels
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import Follows
from dstlib.engine.ops import max_pool
from dstlib.engine.ops.feature_map import Layout, empty_depth_last
from dstlib.engine.ops.prepared import MOST_LAYOUTS
from dstlib.engine.runtime import memory
from dstlib.engine.runtime.memory import GRAIN, HUGE, SMALLEST, buffer, release_memory

NUM = SMALLEST // 4  # the fewest numbers whose memory is kept


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gc.collect()
    release_memory()
    yield
    release_memory()


def test_memory_is_used_again():
    x = buffer(2 * NUM)
    place = x.data_ptr()
    del x
    assert buffer(2 * NUM).data_ptr() == place
    assert buffer(NUM).data_ptr() == place  # a smaller one lies there as well


def test_two_at_once_do_not_share():
    x, y = buffer(NUM), buffer(NUM)
    assert abs(x.data_ptr() - y.data_ptr()) >= SMALLEST


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[5:],
        lambda x: x.view(4, -1)[2],
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
        lambda x: memoryview(x.numpy()),
    ],
    ids=["slice", "row", "detached", "numpy", "storage", "memoryview"],
)
def test_a_view_keeps_the_memory(view):
    x = buffer(NUM)
    place, kept = x.data_ptr(), view(x)
    del x
    assert buffer(NUM).data_ptr() != place
    del kept
    gc.collect()
    assert place in {buffer(NUM).data_ptr(), (buffer(NUM), buffer(NUM))[1].data_ptr()}


def test_autograd_keeps_the_memory_it_saved():
    weight = torch.ones(1, requires_grad=True)
    x = buffer(NUM).fill_(3)
    y = (x * weight).sum()
    del x
    buffer(NUM).fill_(7)
    y.backward()
    assert weight.grad.item() == 3 * NUM


def test_small_ones_are_torchs_own():
    used = memory._bytes["used"]
    x = buffer(SMALLEST // 4 - GRAIN // 4)
    assert x.shape == (SMALLEST // 4 - GRAIN // 4,)
    assert memory._bytes["used"] == used
    assert buffer(0).shape == (0,)


def test_release_memory_gives_back_what_is_idle_alone():
    kept, gone = buffer(NUM).fill_(1), buffer(8 * NUM)
    del gone
    assert memory._bytes["kept"] >= 8 * SMALLEST
    release_memory()
    assert memory._bytes["kept"] == HUGE
    assert kept.sum() == NUM
    del kept
    release_memory()
    assert memory._bytes["kept"] == 0
    assert not memory._stretches


def test_a_wide_map_takes_the_place_of_narrow_ones():
    maps = [buffer(NUM) for _ in range(4)]
    place = maps[1].data_ptr()
    del maps[1], maps[1]
    assert buffer(2 * NUM).data_ptr() == place
    assert buffer(NUM).data_ptr() == place


def test_what_is_kept_is_hardly_more_than_what_was_of_use_at_one_time():
    """Of sizes that rise, each would otherwise lie behind all before it."""
    before = memory._bytes["used"]
    last: list[Tensor] = []
    for factor in range(1, 24):
        last = [buffer(factor * NUM)]
    assert memory._bytes["peak"] == before + (22 + 23) * SMALLEST
    assert memory._bytes["kept"] <= memory.MOST * memory._bytes["peak"] + HUGE
    del last


def test_sizes_that_take_turns_touch_no_fresh_memory():
    for _ in range(3):
        small, large = buffer(NUM), buffer(3 * NUM)
        del small
        other = buffer(2 * NUM)
        kept = memory._bytes["kept"]
        del large, other
    assert memory._bytes["kept"] == kept <= 6 * SMALLEST + HUGE


def test_sizes_no_longer_wanted_make_room():
    old = [buffer(NUM) for _ in range(4)]
    del old
    for _ in range(2):
        new = [buffer(3 * NUM // 2) for _ in range(4)]
        places = {x.data_ptr() for x in new}
        del new
    assert {buffer(3 * NUM // 2).data_ptr()} <= places
    assert memory._bytes["kept"] <= memory.MOST * memory._bytes["peak"] + HUGE


def test_what_was_of_use_long_ago_is_forgotten():
    """A large image of a validation, once, and small ones from then on: its memory goes back to the system."""
    before = memory._bytes["used"]
    large = [buffer(8 * NUM) for _ in range(4)]
    del large
    for i in range(2 * memory.SPAN):
        x = buffer(NUM + i % 5 * GRAIN)
        del x
    gc.collect()
    used = memory._bytes["used"]
    assert used == before
    assert memory._bytes["peak"] - used <= SMALLEST + 5 * 4 * GRAIN
    assert memory._bytes["kept"] <= memory.MOST * memory._bytes["peak"] + HUGE


def test_a_forked_process_waits_for_nobody():
    """Somebody else holds the lock at the moment at which it begins."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    holds, done = threading.Event(), threading.Event()

    def hold() -> None:
        with memory._lock:
            holds.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    child = os.fork()
    if not child:
        os._exit(0 if buffer(NUM).numel() == NUM else 1)
    deadline = time.monotonic() + 30
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    thread.join()
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_maps_use_it():
    like = torch.zeros(1)
    x = empty_depth_last((1, 4, 32, 64, 64), like)
    place = x.data_ptr()
    del x
    assert empty_depth_last((1, 4, 32, 64, 64), like).data_ptr() == place
    assert empty_depth_last((1, 8, 16, 64, 64), like.double()).dtype == torch.float64


def test_rows_of_maps_do_not_share_their_places_in_the_caches():
    like = torch.zeros(1)
    row, channel = 64 * 32 + 32, 64 * (64 * 32 + 32) + 16
    assert empty_depth_last((2, 4, 32, 64, 64), like).stride() == (4 * channel, channel, 1, row, 32)
    assert empty_depth_last((2, 4, 31, 64, 63), like).permute(0, 1, 3, 4, 2).is_contiguous()


@examples(10, 25, stateful_step_count=20)
class Owners(RuleBasedStateMachine):
    """Tensors come and go in any order; each holds a number of its own that nobody else may write over."""

    tensors = Bundle("tensors")

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Tensor] = {}
        self.count = 0

    @rule(target=tensors, grains=st.integers(0, 4), short=st.integers(0, 100))
    def make(self, grains: int, short: int) -> int:
        self.count += 1
        self.alive[self.count] = buffer(NUM + grains * GRAIN // 4 - short).fill_(self.count)
        return self.count

    @rule(key=consumes(tensors))
    def forget(self, key: int) -> None:
        del self.alive[key]

    @rule(key=tensors, start=st.integers(0, NUM - 200))
    def keep_a_part(self, key: int, start: int) -> None:
        self.alive[key] = self.alive[key][start:][:100] if self.alive[key].numel() > NUM - 200 else self.alive[key]

    @rule()
    def release(self) -> None:
        release_memory()

    @invariant()
    def everyone_has_his_own(self) -> None:
        assert all(bool((x == key).all()) for key, x in self.alive.items())
        _is_all_there()


TestOwners = Owners.TestCase


def test_threads_do_not_share():
    wrong: list[int] = []

    def work(number: int) -> None:
        for i in range(60):
            x, y = buffer(NUM).fill_(number), buffer(NUM + i % 3 * GRAIN).fill_(-number)
            if not (x == number).all() or not (y == -number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory._bytes["used"] == 0


def test_memory_may_come_back_at_any_time():
    """The collector of garbage runs wherever objects are made, also while a thread looks for memory."""

    def work() -> None:
        for _ in range(300):
            cycle: list[object] = [buffer(NUM)]
            cycle.append(cycle)

    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(timeout=60)
    finally:
        gc.set_threshold(*before)
    assert not thread.is_alive()
    gc.collect()
    assert memory._bytes["used"] == 0
    _is_all_there()


def _is_all_there() -> None:
    """Each byte is of a map or idle, neighbours that are idle are one range, and pages that were touched are kept."""
    used = 0
    for stretch in memory._stretches:
        lent = [loan.range for loan in memory._loans.values() if loan.stretch is stretch]
        used += sum(end - begin for begin, end in lent)
        ranges = sorted([*lent, *stretch.idle])
        assert ranges[0][0] == 0
        assert ranges[-1][1] == len(stretch.touched) * HUGE
        assert all(before[1] == after[0] for before, after in pairwise(ranges))
        assert all(before[1] < after[0] for before, after in pairwise(stretch.idle))
        assert all(stretch.num_fresh(*each) == 0 for each in lent)
    assert memory._bytes["used"] == used
    assert memory._bytes["kept"] == HUGE * sum(stretch.touched.count(1) for stretch in memory._stretches)


def _entries(fast: nn.Module) -> int:
    """How many prepared calls, layouts and looks are kept for a model."""
    kept = sum(len(m.watch.seen.calls._known[1]) for m in fast.modules() if isinstance(m, Follows) and m.watch.seen)
    pooled = sum(len(max_pool._calls(window)._known[1]) for window in ((1, 1, 1), (2, 2, 2)))
    return kept + pooled + Layout.of.cache_info().currsize


@pytest.mark.parametrize("size", ["every size once", "sizes that come back"])
def test_memory_does_not_grow_with_the_sizes_that_were_seen(size: str):
    """Hundreds of sizes: what is kept of each is bounded, and so is the memory of their maps."""
    model = Levels().eval()
    fast = forced(copy.deepcopy(model), torch.randn(1, 3, 8, 8, 8))
    numbers = random.Random(0)
    entries: list[int] = []
    with torch.no_grad():
        for i in range(240):
            n, *extents = [numbers.randint(1, 2), *(4 * numbers.randint(1, 6) for _ in range(3))]
            if size != "every size once":
                n, extents = 1, [8, 8, 4 * (1 + i % 5)]
            fast(torch.randn(n, 3, *extents))
            entries.append(_entries(fast))
    num_layers = sum(isinstance(m, Follows) for m in fast.modules())
    assert max(entries) - Layout.of.cache_info().currsize <= (num_layers + 2) * (MOST_LAYOUTS + 1)
    assert Layout.of.cache_info().currsize <= Layout.of.cache_info().maxsize
    gc.collect()
    assert memory._bytes["kept"] <= memory.MOST * memory._bytes["peak"] + HUGE * len(memory._loans)
