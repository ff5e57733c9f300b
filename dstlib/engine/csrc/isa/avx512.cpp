// The kernels for AVX-512: sixteen lanes.
#define ENGINE_ISA avx512
#define ENGINE_LANES 16
#define ENGINE_TARGET "avx512f,avx512vl,avx2,fma"
#if defined(__x86_64__)
#include "isa.inc"
#endif
