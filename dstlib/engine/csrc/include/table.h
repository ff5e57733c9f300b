// How the library tells Python which kernels it has. Plain C, read by Python as problems.h is.
#pragma once
#include <stdint.h>

// A line of kernels.def. Returns 0, or 1 where memory is out.
typedef struct {
    const char* name;
    const char* problem;  // the struct of problems.h that it takes
    int64_t problem_size;
    int (*run)(const void* problem, int num_threads);
} Kernel;

typedef struct {
    const char* name;
    int64_t lanes;  // floats in a vector
    const Kernel* kernels;
    int64_t num_kernels;
} InstructionSet;
