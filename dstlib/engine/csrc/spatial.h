// Structs of what happens between convolutions: up-sampling, pooling, norm, activation, changes of layout.
#pragma once
#include "engine.h"

extern "C" {

// Transposed convolution whose kernel is its stride, so that no two inputs meet in an output voxel:
//     fine[n, o, d * stride_d + i, h * stride_h + j, w * stride_w + k] =
//         sum over active (o, c) of weights[c, o, i, j, k] * coarse[n, c, d, h, w]
// Three kernels: the output (reads coarse, writes out), the gradient of coarse (reads fine, writes out) and that of the
// weights (reads both; writes weights_grad at the active connections). Rows of the pattern are output channels.
struct Upsample {
    Source coarse, fine;
    Target out;
    Pattern pattern;
    const float* weights;  // the taps of a connection lie together, at row * weight_row + column * weight_column
    float* weights_grad;
    int64_t weight_row, weight_column;
    int64_t batch, depth, height, width;  // of the coarse map
    int64_t stride_d, stride_h, stride_w;
};

// Maximum over windows that lie side by side; what is left at the end of an axis is in no window. Two kernels: the
// output (reads in, writes out) and the gradient of the activated input (reads in and grad, writes out).
struct Pool {
    Source in, grad;
    Target out;
    int64_t batch, depth, height, width;  // of the input
    int64_t window_d, window_h, window_w;
};

// Gradient of an instance norm and the activation behind it: in is the map before both, with its scale, offset and
// slope, grad is the gradient of what is behind both.
struct NormBackward {
    Source in, grad;
    Target out;
    const float* mean;   // (N, C)
    const float* rstd;   // (N, C): 1 / standard deviation
    const float* gamma;  // (C)
    double* sums;        // (N, C, 2), written: the gradients of beta and of gamma
    int64_t batch, depth, height, width;
};

// Writes the activated map.
struct Activation {
    Source in;
    Target out;
    int64_t batch, depth, height, width;
};

// Copies between a map whose columns lie side by side (stride 1 along W) and one whose depths do. Strides count N, C,
// D, H, W.
struct Relayout {
    const float* in;
    float* out;
    int64_t in_strides[5], out_strides[5];
    int64_t batch, channels, depth, height, width;
};
}
