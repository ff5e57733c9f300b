// Structs of the linear kernels: y = x Wᵀ + bias with W (outputs, inputs) sparse, float32, strides in elements.
//
// The rows of W are taken in groups of `group` neighbours (1 to 4) that have the same active columns: 1 for scattered
// weights, 4 for blocks of 16 x 16, say. A group's columns ascend, and its values lie column by column, `group`
// together. Segments cut the groups into stretches of neighbouring inputs; a part of the outputs is computed stretch by
// stretch, so that the inputs of a stretch stay in the cache meanwhile, and within it segments are sorted by length, so
// that the processor can foresee where they end.
#pragma once
#include "engine.h"

extern "C" {

struct Segment {
    int32_t group;
    int32_t begin, end;  // into cols
};

struct LinearPattern {
    const int32_t* cols;    // (num_cols): the input of each column of each group
    const int32_t* source;  // (num_cols * group): where in the weights each value comes from
    const Segment* segments;
    const int32_t* parts;  // (num_parts + 1): the first segment of each part
    int64_t outputs, inputs, group, num_cols, num_parts;  // a part is LINEAR_PART outputs, the last one maybe fewer
};

enum { LINEAR_PART = 96 };

struct Linear {
    LinearPattern pattern;
    float* x;        // (batch, inputs)
    float* y;        // (batch, outputs)
    float* weights;  // what `source` counts in; null: the values are there already
    float* values;   // (num_cols * group): the weights in the order of the pattern
    const float* bias;  // (outputs) or null
    int64_t batch, stride_x, stride_y;
};
}
