/* Runs networks that dstlib.export.save_plan() has written, without torch and without Python.
 *
 * Link with the library that dstlib's installation holds: `python -c "from dstlib import runtime; print(runtime.library_file())"`
 * says where. examples/run_plan.c is a whole program.
 *
 * Images are (N, C, D, H, W): batch, channels, depth, height, width, in float32, the width side by side in memory. A
 * plan computes on images of any size that its network takes. One thread at a time may use a plan; several plans may be
 * used at once.
 */
#ifndef DSTLIB_H
#define DSTLIB_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct DstlibPlan DstlibPlan;

typedef struct {
    int64_t n, c, d, h, w;
} DstlibSize;

/* Why something could not be done: "`what`: expected `allowed`, got `given`". */
typedef struct {
    char what[64], allowed[128], given[128];
} DstlibRefusal;

/* Returns the plan that a file of so many bytes holds, with memory of its own; null, and why, where it holds none. All
 * that is in the file is checked. `isa` is an instruction set ("avx512", "avx2", "generic"), the best there is for null. */
DstlibPlan* dstlib_open(const void* content, int64_t bytes, const char* isa, DstlibRefusal* refusal);

/* Gives the memory of a plan back; nothing for null. */
void dstlib_close(DstlibPlan* plan);

/* How many channels images have, and how many outputs there are. */
int64_t dstlib_num_channels(const DstlibPlan* plan);
int64_t dstlib_num_outputs(const DstlibPlan* plan);

/* Finds out the size of each output for an image, and how many bytes of memory running takes at most, beside the image
 * and the outputs. Returns 0, or 1, and why, where the network takes no such image. */
int dstlib_measure(const DstlibPlan* plan, const DstlibSize* image, DstlibSize* outputs, int64_t* bytes,
                   DstlibRefusal* refusal);

/* Computes all outputs, each into memory of its size, on so many threads. Returns 0, or 1, and why. Memory for what is
 * between the layers is kept for the next image of the same size. */
int dstlib_run(DstlibPlan* plan, const DstlibSize* size, const float* image, float* const* outputs, int num_threads,
               DstlibRefusal* refusal);

#ifdef __cplusplus
}
#endif
#endif
