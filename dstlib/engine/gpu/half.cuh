// What the kernels in CUDA share: numbers of 16 bits, bfloat16 where BFLOAT16 is defined and float16 else.
//
// Compiled when first called; for a CPU, to be tested there, where EMULATED is.
#pragma once

typedef long long Int;
typedef unsigned short Half;

constexpr int PIECE = 8;  // numbers that are copied at once, 16 bytes

#ifndef EMULATED
#define SHARED __shared__ __align__(16) static

#ifdef BFLOAT16
#define NUMBER "bf16"
__device__ inline float number(Half bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
#else
#define NUMBER "f16"
__device__ inline float number(Half bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
#endif
// Two numbers, the first in the lower half.
__device__ inline unsigned rounded(float first, float second) {
    unsigned both;
    asm("cvt.rn." NUMBER "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}
#endif
