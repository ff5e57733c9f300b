// The kernels of one instruction set.
#pragma once
#include "engine.h"
#include "linear.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

// Each kernel returns 0, or 1 where memory is out.
extern "C" struct Kernels {
    const char* name;
    int64_t lanes;
    int (*conv_winograd)(const Conv*, int num_threads);
    int (*conv_direct)(const Conv*, int num_threads);
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_generic;

#define STRUCT_SIZES {"Source", sizeof(Source)}, {"Target", sizeof(Target)}, {"Pattern", sizeof(Pattern)}, \
    {"Conv", sizeof(Conv)}, {"Kernels", sizeof(Kernels)}
