// Threads, scratch memory, and the choice of the instruction set.
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#endif

#include "../include/table.h"

#if defined(__x86_64__) && !defined(ENGINE_GENERIC_ONLY)
#define ENGINE_X86
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

extern const InstructionSet isa_avx512, isa_avx2, isa_generic;

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
// Two OpenMP runtimes in one process fight for the cores: threads of the one spin while the other's work. So the
// engine borrows the one that torch has loaded; GNU's, Intel's and LLVM's all have this entry point.
int find_openmp(dl_phdr_info* library, size_t, void* found) {
    const char* name = library->dlpi_name;
    if (!name || !(strstr(name, "libgomp") || strstr(name, "libiomp5") || strstr(name, "libomp"))) return 0;
    void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    void* entry = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
    if (!entry) return 0;
    *static_cast<void**>(found) = entry;
    return 1;
}

int count_loads(dl_phdr_info* library, size_t, void* found) {
    *static_cast<unsigned long long*>(found) = library->dlpi_adds;
    return 1;
}

// Looked for again where libraries were loaded since: plans run before torch is imported, and after it.
Parallel openmp() {
    static std::atomic<Parallel> known{nullptr};
    static std::atomic<unsigned long long> looked_at{0};
    if (Parallel found = known.load(std::memory_order_relaxed)) return found;
    unsigned long long loads = 0;
    dl_iterate_phdr(count_loads, &loads);
    if (looked_at.exchange(loads, std::memory_order_relaxed) == loads) return nullptr;
    void* entry = nullptr;
    dl_iterate_phdr(find_openmp, &entry);
    known.store(reinterpret_cast<Parallel>(entry), std::memory_order_relaxed);
    return reinterpret_cast<Parallel>(entry);
}
#else
Parallel openmp() { return nullptr; }
#endif

struct Team {
    void (*work)(void*, int64_t);
    void* context;
    int64_t num_tasks, run;  // tasks, and how many in a row a thread takes
    std::atomic<int64_t> next{0};
};

void take_tasks(void* argument) {
    Team& team = *static_cast<Team*>(argument);
    for (int64_t from; (from = team.next.fetch_add(team.run, std::memory_order_relaxed)) < team.num_tasks;)
        for (int64_t task = from; task < from + team.run && task < team.num_tasks; ++task)
            team.work(team.context, task);
}

// Threads of the engine's own, for processes without OpenMP. They sleep between regions, and keep their scratch memory.
// A region waits for those alone that have begun to work on it.
class Pool {
  public:
    // Takes tasks with up to so many other threads; alone, where they work for another thread of the process.
    void take_tasks_with(int others, Team& team) {
        std::unique_lock<std::mutex> alone(busy, std::try_to_lock);
        if (!alone) return take_tasks(&team);
        {
            std::lock_guard<std::mutex> held(lock);
            while (size < others && add()) ++size;
            current = &team;
            wanted = others;
        }
        wake.notify_all();
        take_tasks(&team);
        std::unique_lock<std::mutex> held(lock);
        wanted = 0;
        done.wait(held, [this] { return working == 0; });
    }

  private:
    bool add() {
        try {
            std::thread(&Pool::serve, this).detach();
            return true;
        } catch (const std::system_error&) {  // the system gives no more: fewer will do
            return false;
        }
    }

    void serve() {
        std::unique_lock<std::mutex> held(lock);
        while (true) {
            wake.wait(held, [this] { return wanted > 0; });
            --wanted;
            ++working;
            Team* team = current;
            held.unlock();
            take_tasks(team);
            held.lock();
            if (--working == 0) done.notify_one();
        }
    }

    std::mutex busy, lock;
    std::condition_variable wake, done;
    Team* current = nullptr;
    int size = 0, wanted = 0, working = 0;
};

Pool* pool = nullptr;  // never deleted: its threads sleep until the process ends
bool is_forked = false;

#if !defined(_WIN32)
// A forked process has none of the threads, which OpenMP would wait for for ever.
void start_anew() {
    is_forked = true;
    pool = new Pool;
}

__attribute__((constructor)) void watch_forks() { pthread_atfork(nullptr, nullptr, start_anew); }
#endif

Pool& pool_of_process() {
    static std::once_flag made;
    std::call_once(made, [] {
        if (!pool) pool = new Pool;
    });
    return *pool;
}

struct Scratch {
    float* data = nullptr;
    size_t size = 0;
    ~Scratch() { free(data); }
};

}  // namespace

void parallel(int64_t num_tasks, int num_threads, void (*work)(void*, int64_t), void* context) {
    Team team{work, context, num_tasks, 1};
    const int threads = static_cast<int>(num_tasks < num_threads ? num_tasks : num_threads);
    if (threads <= 1) return take_tasks(&team);
    // neighbours read much the same memory, so a thread takes some at a time, where enough are left for the others
    const int64_t share = num_tasks / (16 * threads);
    team.run = share < 1 ? 1 : share > 4 ? 4 : share;
    Parallel run = is_forked ? nullptr : openmp();
    if (run) return run(take_tasks, &team, static_cast<unsigned>(threads), 0);
    pool_of_process().take_tasks_with(threads - 1, team);
}

float* scratch(size_t floats) {
    thread_local Scratch mine;
#if defined(__SANITIZE_ADDRESS__)
    // no byte more than was asked for, so that the sanitizer sees what reaches past it
    free(mine.data);
    void* exact = nullptr;
    mine.data = posix_memalign(&exact, 64, floats * sizeof(float)) ? nullptr : static_cast<float*>(exact);
    return mine.data;
#endif
    if (mine.size < floats) {
        constexpr size_t huge = size_t(2) << 20;  // a multiple of the size of a huge page
        const size_t bytes = (floats * sizeof(float) + huge - 1) / huge * huge;
        free(mine.data);
        mine.size = 0;
        mine.data = static_cast<float*>(aligned_alloc(huge, bytes));
        if (!mine.data) return nullptr;
        mine.size = bytes / sizeof(float);
#if defined(__linux__)
        madvise(mine.data, bytes, MADV_HUGEPAGE);  // advice: where the system has none, nothing is lost
#endif
    }
    return mine.data;
}

namespace {

const InstructionSet* const all[] = {
#if defined(ENGINE_X86)
    &isa_avx512,
    &isa_avx2,
#endif
    &isa_generic,
};

bool runs_here(const InstructionSet* isa) {
#if defined(ENGINE_X86)
    if (isa == &isa_avx512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    if (isa == &isa_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == &isa_generic;
}

}  // namespace

extern "C" {

// The kernels of an instruction set ("avx512", "avx2", "generic"), null if this machine or build lacks it; the best
// there are for null.
EXPORT const InstructionSet* engine_instruction_set(const char* name) {
    for (const InstructionSet* isa : all)
        if (runs_here(isa) && (!name || !strcmp(name, isa->name))) return isa;
    return nullptr;
}

// A number that is another one, but by chance, where any word that was looked at has changed: of all there are or, where
// that is more, of `most` pieces of 128 bytes that lie evenly spread (pairs of lines, which caches fetch together).
EXPORT uint64_t engine_fingerprint(const void* data, int64_t bytes, int64_t most) {
    constexpr int64_t PIECE = 128;
    constexpr int WORDS = PIECE / sizeof(uint64_t);
    constexpr uint64_t odd = 0x9E3779B97F4A7C15u;
    const char* start = static_cast<const char*>(data);
    uint64_t found[WORDS] = {}, piece[WORDS];
    const int64_t whole = bytes / PIECE, looked_at = whole < most ? whole : most;
    for (int64_t i = 0; i < looked_at; ++i) __builtin_prefetch(start + i * whole / looked_at * PIECE);
    for (int64_t i = 0; i < looked_at; ++i) {
        memcpy(piece, start + i * whole / looked_at * PIECE, PIECE);
        for (int k = 0; k < WORDS; ++k) found[k] = ((found[k] ^ piece[k]) * odd) ^ (found[k] >> 29);
    }
    memset(piece, 0, PIECE);
    if (bytes > whole * PIECE) memcpy(piece, start + whole * PIECE, static_cast<size_t>(bytes - whole * PIECE));
    uint64_t all = static_cast<uint64_t>(bytes);
    for (int k = 0; k < WORDS; ++k) all = (all ^ (found[k] + piece[k] * odd) ^ (all >> 31)) * odd;
    return all;
}

EXPORT const char* engine_threads() { return openmp() ? "torch's OpenMP" : "threads of its own"; }
}
