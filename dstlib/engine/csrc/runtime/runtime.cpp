// Scratch memory, and the choice of the instruction set.
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../include/table.h"
#include "export.h"

#if defined(__x86_64__) && !defined(ENGINE_GENERIC_ONLY)
#define ENGINE_X86
#endif

extern const InstructionSet isa_avx512, isa_avx2, isa_generic;

namespace {

struct Scratch {
    float* data = nullptr;
    size_t size = 0;
    ~Scratch() { free(data); }
};

}  // namespace

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
}
