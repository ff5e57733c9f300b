// The kernels of one instruction set.
#pragma once
#include "engine.h"
#include "linear.h"
#include "spatial.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

// Each kernel returns 0, or 1 where memory is out.
extern "C" struct Kernels {
    const char* name;
    int64_t lanes;
    int (*conv_squares)(const Conv*, int num_threads);
    int (*conv_taps)(const Conv*, int num_threads);
    int (*conv_weights_grad)(const Conv*, int num_threads);
    int (*conv_prepare)(const Prepare*, int num_threads);
    int (*linear_multiply)(const Linear*, int num_threads);
    int (*linear_weight_gradient)(const Linear*, int num_threads);
    int (*upsample)(const Upsample*, int num_threads);
    int (*upsample_input_grad)(const Upsample*, int num_threads);
    int (*upsample_weights_grad)(const Upsample*, int num_threads);
    int (*max_pool)(const Pool*, int num_threads);
    int (*max_pool_grad)(const Pool*, int num_threads);
    int (*norm_backward)(const NormBackward*, int num_threads);
    int (*activation)(const Activation*, int num_threads);
    int (*to_depth_last)(const Relayout*, int num_threads);
    int (*to_channels_first)(const Relayout*, int num_threads);
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_generic;

#define STRUCT_SIZES {"Source", sizeof(Source)}, {"Target", sizeof(Target)}, {"Pattern", sizeof(Pattern)}, \
    {"InstanceNorm", sizeof(InstanceNorm)}, {"Conv", sizeof(Conv)}, {"Prepare", sizeof(Prepare)}, \
    {"Upsample", sizeof(Upsample)}, {"Pool", sizeof(Pool)}, {"NormBackward", sizeof(NormBackward)}, \
    {"Activation", sizeof(Activation)}, {"Relayout", sizeof(Relayout)}, {"LinearPattern", sizeof(LinearPattern)}, \
    {"Linear", sizeof(Linear)}, {"Kernels", sizeof(Kernels)}
