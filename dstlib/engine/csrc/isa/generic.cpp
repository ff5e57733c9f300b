// The kernels for any machine, in vectors of four that every compiler lowers to what there is (SSE2, NEON, scalars).
#define ENGINE_ISA generic
#define ENGINE_LANES 4
#include "isa.inc"
