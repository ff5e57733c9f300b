"""The threads of the engine's own: each task is done once, whoever else works, and in forked processes too.

A library of its own has ``csrc/runtime/threads.cpp`` and what calls it. It finds no OpenMP, since it looks for
libraries by a function that finds none, and so uses the pool; or it finds a stand-in, and is told how often it was
stopped.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from dstlib.engine.runtime import structs

RUNTIME = structs.INCLUDE.parent / "runtime"
CALLER = """
#include <stdint.h>
#include <atomic>
#include <thread>
#include <vector>
#include "runtime.h"

extern "C" {
__attribute__((visibility("hidden"))) int dl_iterate_phdr(int (*)(void*, size_t, void*), void*) { return 0; }

// Adds 1 to each number, and by each task, where `inner` is set, `inner` tasks more of its own: each adds 1 to another.
__attribute__((visibility("default"))) void add_one(int64_t* numbers, int64_t num, int64_t inner, int threads) {
    auto outer = [&](int64_t task) {
        int64_t* mine = numbers + task * (1 + inner);
        ++mine[0];
        auto each = [&](int64_t i) { ++mine[1 + i]; };
        parallel(inner, threads, each);
    };
    parallel(num, threads, outer);
}
}

int main() {
    std::atomic<int64_t> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&wrong, caller] {
            for (int64_t turn = 0; turn < 400; ++turn) {
                const int64_t num = (turn * 7 + caller) % 130, inner = turn % 3;
                std::vector<int64_t> numbers(num * (1 + inner));
                add_one(numbers.data(), num, inner, 1 + turn % 5);
                for (int64_t each : numbers) wrong += each != 1;
            }
        });
    for (std::thread& caller : callers) caller.join();
    return wrong != 0;
}
"""

STAND_IN = """
#include <dlfcn.h>
#include <link.h>
#include <stdint.h>
#include <sys/resource.h>
#include "runtime.h"

static int64_t seconds, stopped, regions;

static void run_alone(void (*work)(void*), void* context, unsigned, unsigned) { ++regions; work(context); }

extern "C" {
#pragma GCC visibility push(hidden)
int dl_iterate_phdr(int (*look)(dl_phdr_info*, size_t, void*), void* found) {
    dl_phdr_info library{};
    library.dlpi_name = "libgomp.so.1";
    library.dlpi_adds = 1;
    return look(&library, sizeof(library), found);
}
void* dlopen(const char*, int) noexcept { return &regions; }
void* dlsym(void*, const char*) noexcept { return reinterpret_cast<void*>(run_alone); }
int getrusage(__rusage_who_t, rusage* used) noexcept {
    *used = {};
    used->ru_utime.tv_sec = seconds;
    used->ru_nivcsw = stopped;
    return 0;
}
#pragma GCC visibility pop

// Runs a region after so many seconds more, in which the process was stopped so often; returns whether OpenMP ran it.
__attribute__((visibility("default"))) int uses_openmp(int64_t more_seconds, int64_t more_stops) {
    const int64_t before = regions;
    seconds += more_seconds;
    stopped += more_stops;
    auto nothing = [](int64_t) {};
    parallel(8, 2, nothing);
    return regions > before;
}
}
"""


def _build(folder: Path, out: str, *options: str, caller: str = CALLER) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    (folder / "caller.cpp").write_text(caller)
    sources = [folder / "caller.cpp", RUNTIME / "threads.cpp"]
    command = [compiler, "-O1", "-std=gnu++17", "-fPIC", "-fvisibility=hidden", f"-I{RUNTIME}", *options]
    subprocess.run([*command, *sources, "-lpthread", "-ldl", "-o", folder / out], check=True)
    return folder / out


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build(tmp_path_factory.mktemp("pool"), "pool.so", "-shared")))
    library.engine_threads.restype = ctypes.c_char_p
    assert library.engine_threads() == b"threads of its own"
    return library


def _counts(pool: ctypes.CDLL, num: int, inner: int, threads: int) -> list[int]:
    numbers = (ctypes.c_int64 * (num * (1 + inner)))()
    pool.add_one(numbers, ctypes.c_int64(num), ctypes.c_int64(inner), threads)
    return list(numbers)


@examples(50, 500)
@given(st.integers(0, 300), st.integers(0, 3), st.integers(-1, 9))
def test_each_task_is_done_once(pool: ctypes.CDLL, num: int, inner: int, threads: int):
    """By any number of threads, also where tasks have tasks of their own."""
    assert _counts(pool, num, inner, threads) == [1] * (num * (1 + inner))


def test_many_callers_at_once(pool: ctypes.CDLL):
    """One of them has the threads, the others work alone meanwhile."""
    found: dict[int, bool] = {}

    def call(number: int) -> None:
        found[number] = all(_counts(pool, 50 + number, 1, 3) == [1] * (100 + 2 * number) for _ in range(50))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == dict.fromkeys(range(8), True)


def test_a_forked_process_has_threads_of_its_own(pool: ctypes.CDLL):
    """Also where it was forked while another thread was at work."""
    is_over = threading.Event()

    def keep_busy() -> None:
        while not is_over.is_set():
            _counts(pool, 64, 0, 3)

    worker = threading.Thread(target=keep_busy)
    worker.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                os._exit(0 if _counts(pool, 200, 1, 4) == [1] * 400 else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        is_over.set()
        worker.join()


def test_openmp_is_borrowed_where_nobody_else_takes_the_cores(tmp_path: Path):
    library = ctypes.CDLL(str(_build(tmp_path, "stand_in.so", "-shared", caller=STAND_IN)))
    seen = []
    for seconds, stops in ((1, 10), (1, 400), (0, 0), (1, 61), (1, 60), (0, 3), (1, 400)):
        time.sleep(0.02)  # it looks every 10 ms
        seen.append(library.uses_openmp(ctypes.c_int64(seconds), ctypes.c_int64(stops)))
    # more than 60 stops in a second that it ran: they are others'; too short a time tells nothing
    assert seen == [1, 0, 0, 0, 1, 1, 0]


@pytest.mark.long
def test_no_two_threads_touch_the_same_memory_at_once(tmp_path: Path):
    """As g++'s sanitizer of threads sees it, where four threads call at once."""
    program = _build(tmp_path, "laws", "-g", "-fsanitize=thread")
    # the sanitizer wants the places of memory as they were before systems made them more random
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), program]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
