// What kernels use of the machine: threads, scratch memory. One copy of it, whatever the instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Calls work(context, task) for each task below num_tasks, on up to num_threads threads, first come first served.
void parallel(int64_t num_tasks, int num_threads, void (*work)(void* context, int64_t task), void* context);

// This thread's memory for intermediate results, at least that many floats, aligned to 64 bytes; what an earlier call
// returned is no longer valid. Null when memory is out.
float* scratch(size_t floats);

template <class Work>
void parallel(int64_t num_tasks, int num_threads, Work& work) {
    parallel(num_tasks, num_threads, [](void* context, int64_t task) { (*static_cast<Work*>(context))(task); }, &work);
}
