// Tasks shared by threads. No share is settled beforehand: each thread takes the next few tasks that nobody has taken,
// so one that runs late does less. Where programs beside this one take the cores in turns, that is not enough: OpenMP
// ends a region when all of its threads have come, though nothing is left to do, and E2ENet at 32^3 then took up to
// five times as long. There the engine uses a pool that waits for those alone that have begun.
#include <stdint.h>

#include <atomic>
#include <chrono>
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
#include <string.h>
#include <sys/resource.h>
#endif

#include "export.h"
#include "runtime.h"

namespace {

using Clock = std::chrono::steady_clock;
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

int64_t nanoseconds(const timeval& time) { return (time.tv_sec * 1000000LL + time.tv_usec) * 1000; }

// Whether others take the cores from this process: its threads were stopped more than 60 times in each second that they
// ran, of late. Beside one busy program per core that is once in 3 to 12 ms, by the system; dstlib/cores.py has it too.
bool is_crowded() {
    constexpr int64_t SECOND = 1'000'000'000, OFTEN = 60;
    static std::atomic<bool> found{false};
    static std::mutex looking;
    static Clock::time_point due;
    static int64_t ran_before = 0, stopped_before = 0;
    std::unique_lock<std::mutex> alone(looking, std::try_to_lock);
    const auto now = Clock::now();
    rusage used;
    if (!alone || now < due || getrusage(RUSAGE_SELF, &used)) return found.load(std::memory_order_relaxed);
    due = now + std::chrono::milliseconds(10);
    const int64_t ran = nanoseconds(used.ru_utime) + nanoseconds(used.ru_stime) - ran_before;
    if (ran < SECOND / 20) return found.load(std::memory_order_relaxed);
    found.store((used.ru_nivcsw - stopped_before) * SECOND > OFTEN * ran, std::memory_order_relaxed);
    ran_before += ran;
    stopped_before = used.ru_nivcsw;
    return found.load(std::memory_order_relaxed);
}
#else
Parallel openmp() { return nullptr; }
bool is_crowded() { return false; }
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

// Looks again and again whether something holds, for as long as it takes to wake a thread that sleeps.
template <class Holds>
void await_shortly(Holds&& holds) {
    const auto until = Clock::now() + std::chrono::microseconds(30);
    while (!holds() && Clock::now() < until) continue;
}

// Threads of the engine's own. They sleep between regions, and keep their scratch memory.
// A region waits for those alone that have begun to work on it.
class Pool {
  public:
    // Takes tasks with up to so many other threads; alone, where they work for another region.
    void take_tasks_with(int others, Team& team) {
        if (is_taken.exchange(true, std::memory_order_acquire)) return take_tasks(&team);
        {
            std::lock_guard<std::mutex> held(lock);
            while (size < others && add()) ++size;
            current = &team;
            wanted = others;
        }
        wake.notify_all();
        take_tasks(&team);
        {
            std::lock_guard<std::mutex> held(lock);
            wanted = 0;
        }
        await_shortly([this] { return working == 0; });
        {
            std::unique_lock<std::mutex> held(lock);
            done.wait(held, [this] { return working == 0; });
        }
        is_taken.store(false, std::memory_order_release);
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
        while (true) {
            await_shortly([this] { return wanted > 0; });
            std::unique_lock<std::mutex> held(lock);
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

    std::atomic<bool> is_taken{false};
    std::mutex lock;
    std::condition_variable wake, done;
    Team* current = nullptr;
    int size = 0;
    std::atomic<int> wanted{0}, working{0};  // written under the lock
};

Pool* pool = new Pool;  // never deleted: its threads, of which it has none at first, sleep until the process ends
bool is_forked = false;

#if !defined(_WIN32)
// A forked process has none of the threads, which OpenMP would wait for for ever.
void start_anew() {
    is_forked = true;
    pool = new Pool;
}

__attribute__((constructor)) void watch_forks() { pthread_atfork(nullptr, nullptr, start_anew); }
#endif

}  // namespace

void parallel(int64_t num_tasks, int num_threads, void (*work)(void*, int64_t), void* context) {
    Team team{work, context, num_tasks, 1};
    const int threads = static_cast<int>(num_tasks < num_threads ? num_tasks : num_threads);
    if (threads <= 1) return take_tasks(&team);
    // neighbours read much the same memory, so a thread takes some at a time, where enough are left for the others
    const int64_t share = num_tasks / (16 * threads);
    team.run = share < 1 ? 1 : share > 4 ? 4 : share;
    Parallel run = is_forked ? nullptr : openmp();
    if (run && !is_crowded()) return run(take_tasks, &team, static_cast<unsigned>(threads), 0);
    pool->take_tasks_with(threads - 1, team);
}

extern "C" EXPORT const char* engine_threads() { return openmp() ? "torch's OpenMP" : "threads of its own"; }
