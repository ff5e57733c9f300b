// The kernels of tiles.cu and feature_map.cu on a CPU: each thread of a program is a fiber, and those of a warp meet
// where they exchange.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#define EMULATED
#define SHARED alignas(16) static
#define __device__
#define __global__
#define __launch_bounds__(...)

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

constexpr unsigned MOST = 256, STACK = 1 << 16;
struct Dim {
    unsigned x, y;
};
static Dim threadIdx, blockIdx, gridDim;
static ucontext_t fibers[MOST], scheduler;
static bool done[MOST];

static void yield() { swapcontext(&fibers[threadIdx.x], &scheduler); }

struct Meeting {
    unsigned arrived, round;

    void meet(unsigned size) {
        const unsigned mine = round;
        if (++arrived == size)
            arrived = 0, ++round;
        else
            while (round == mine) yield();
    }
};
static Meeting everyone, warps[MOST / 32];
static unsigned num_threads;
inline void __syncthreads() { everyone.meet(num_threads); }

// What the lanes of each warp tell one another.
struct Told {
    const char* row;
    unsigned a[4], b[2];
};
static Told told[MOST];
inline Told* warp() { return told + threadIdx.x / 32 * 32; }
inline void meet_warp() { warps[threadIdx.x / 32].meet(32); }

inline void start_copy(char* to, const void* from, bool there) {
    if (there)
        memcpy(to, from, 16);
    else
        memset(to, 0, 16);
}
inline void end_group() {}
inline void wait_for_all() {}
inline void wait_for_first() {}

inline void load_matrices(unsigned (&to)[4], const char* row) {
    const unsigned lane = threadIdx.x % 32;
    told[threadIdx.x].row = row;
    meet_warp();
    for (int i = 0; i < 4; ++i) memcpy(&to[i], warp()[8 * i + lane / 4].row + lane % 4 * 4, 4);
    meet_warp();
}
inline void load_transposed(unsigned (&to)[4], const char* row) {
    const unsigned lane = threadIdx.x % 32;
    told[threadIdx.x].row = row;
    meet_warp();
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) memcpy(&pair[j], warp()[8 * i + lane % 4 * 2 + j].row + lane / 4 * 2, 2);
        to[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
    meet_warp();
}

#ifdef BFLOAT16
inline float number(uint16_t bits) {
    const unsigned whole = static_cast<unsigned>(bits) << 16;
    float x;
    memcpy(&x, &whole, 4);
    return x;
}
inline unsigned bits(float x) {
    unsigned whole;
    memcpy(&whole, &x, 4);
    return (whole + 0x7fff + (whole >> 16 & 1)) >> 16;  // to the nearest, ties to even
}
#else
inline float number(uint16_t bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return x;
}
inline unsigned bits(float x) {
    const _Float16 half = x;
    uint16_t whole;
    memcpy(&whole, &half, 2);
    return whole;
}
#endif
inline unsigned rounded(float first, float second) { return bits(first) | bits(second) << 16; }

inline void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const int lane = threadIdx.x % 32;
    Told& mine = told[threadIdx.x];
    memcpy(mine.a, a, sizeof a);
    mine.b[0] = b0, mine.b[1] = b1;
    meet_warp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned x = warp()[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const unsigned y = warp()[column * 4 + k % 8 / 2].b[k / 8];
            sum[i] += number(x >> k % 2 * 16) * number(y >> k % 2 * 16);
        }
    }
    meet_warp();
}

#include "tiles.cu"
#include "feature_map.cu"

static void (*body)();

static void enter() {
    body();
    done[threadIdx.x] = true;
    yield();
}

// Runs all programs of a grid, one after the other.
static void run(unsigned wide, unsigned high, unsigned threads, void (*kernel)()) {
    const std::unique_ptr<char[]> stacks(new char[MOST * STACK]);
    body = kernel, num_threads = threads, gridDim = {wide, high};
    for (unsigned program = 0; program < wide * high; ++program) {
        blockIdx = {program % wide, program / wide};
        for (unsigned i = 0; i < threads; ++i) {
            done[i] = false;
            getcontext(&fibers[i]);
            fibers[i].uc_stack.ss_sp = &stacks[i * STACK];
            fibers[i].uc_stack.ss_size = STACK;
            makecontext(&fibers[i], enter, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (unsigned i = 0; i < threads; ++i)
                if (!done[i]) {
                    threadIdx.x = i;
                    swapcontext(&scheduler, &fibers[i]);
                    left = left || !done[i];
                }
        }
    }
}

// An argument, as the kernel takes it.
struct Argument {
    Int bits;

    template <class T>
    operator T*() const { return reinterpret_cast<T*>(bits); }
    operator Int() const { return bits; }
    operator double() const {
        double x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
};
static const Argument* given;

template <auto KERNEL>
struct Call;
template <class... Types, void (*KERNEL)(Types...)>
struct Call<KERNEL> {
    template <size_t... I>
    static void with(std::index_sequence<I...>) { KERNEL(static_cast<Types>(given[I])...); }
    static void now() { with(std::index_sequence_for<Types...>()); }
};

#define EMULATE(kernel)                                                                                           \
    extern "C" void emulate_##kernel(unsigned wide, unsigned high, unsigned threads, const Argument* arguments) { \
        given = arguments;                                                                                        \
        run(wide, high, threads, Call<kernel>::now);                                                              \
    }

EMULATE(conv)
EMULATE(pack_weights)
EMULATE(conv_backward_weights)
EMULATE(move)
EMULATE(sum_squares)
EMULATE(finish_norm)
EMULATE(apply_norm)
EMULATE(sum_grads)
EMULATE(finish_sums)
EMULATE(apply_grads)
