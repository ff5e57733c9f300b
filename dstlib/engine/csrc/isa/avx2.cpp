// The kernels for AVX2 with FMA: eight lanes.
#define ENGINE_ISA avx2
#define ENGINE_LANES 8
#define ENGINE_TARGET "avx2,fma"
#if defined(__x86_64__)
#include "isa.inc"
#endif
