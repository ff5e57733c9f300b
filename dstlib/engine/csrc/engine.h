// What the engine's Python side and its kernels agree on: plain C structs, no torch, no Python.
//
// Feature maps are "depth-last": logically (N, C, D, H, W), in memory N, C, H, W, D with D contiguous. Consecutive
// depths are then the lanes of a vector, and no kernel ever shuffles within one. All numbers are float32, all strides
// count elements. dstlib/engine/structs*.py mirror these structs field by field; tests compare their sizes.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

// A feature map to read. With `scale`, what is read is activation(scale[n, c] * x + offset[n, c]), where activation(y)
// is max(y, slope * y): the instance norm and the leaky ReLU that precede, applied while loading. 0 <= slope <= 1.
struct Source {
    const float* data;
    const float* scale;   // (N, channels) contiguous, or null: read as it is
    const float* offset;  // (N, channels) contiguous, or null together with scale
    int64_t channels;
    int64_t stride_n, stride_c, stride_h, stride_w;  // depth has stride 1
    float slope;
};

// A feature map to write.
struct Target {
    float* data;
    int64_t stride_n, stride_c, stride_h, stride_w;  // depth has stride 1
};

// Which connections exist: for row r (an output channel, say) the columns cols[rows[r]] .. cols[rows[r + 1] - 1], in
// rising order.
struct Pattern {
    const int32_t* rows;  // (num_rows + 1)
    const int32_t* cols;  // (nnz)
    int64_t num_rows, num_cols, nnz;
};

enum { MAX_SOURCES = 3 };

// The affine instance norm that follows a convolution, as its readers apply it: y * scale + offset.
struct InstanceNorm {
    const float *gamma, *beta;  // (num_rows) each
    double eps;
    float* found;  // (4, N, num_rows): scale, offset, mean, 1 / sqrt(variance + eps); or null: no norm follows
};

// y[n, o, d, h, w] = bias[o] + sum over active (o, c) and taps (i, j) of
//     weights[i, j, (o, c)] * x[n, c, d * stride_d - shifts[c], h * stride_h + i - pad_h, w * stride_w + j - pad_w]
// where x is the concatenation of the sources, and zero outside.
struct Conv {
    Source sources[MAX_SOURCES];
    Target out;
    Pattern pattern;
    const float* weights;   // as Prepare makes them for the form
    const float* bias;      // (num_rows) or null
    const int32_t* shifts;  // (num_cols): by how many voxels a channel moves towards higher depths
    const int32_t* out_shifts;  // (num_rows) or null: the same for channels of y, as the gradient of x needs it
    InstanceNorm norm;
    int64_t batch, depth, height, width;              // of the input
    int64_t out_depth, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_d, stride_h, stride_w, pad_h, pad_w;
    const int64_t* index;  // gradient of the weights only: (nnz), where each connection lies in weights_grad
    float* weights_grad;   // (connections, kernel_h, kernel_w); there `out` is the gradient of y, which is read
    float* bias_grad;      // (num_rows) or null
};

// How a convolution is computed: Winograd's F(4x4, 3x3), or tap by tap.
enum { FORM_SQUARES = 0, FORM_TAPS = 1 };

enum { MAX_TAPS = 64 };

// Takes the active kernels out of a weight (connections, taps) and transforms them for a form.
struct Prepare {
    const float* weight;
    const int64_t* index;  // (nnz): the connection of each, in the order of the pattern
    float* out;            // (6, nnz, 6) or (nnz, taps)
    int64_t nnz, taps, form, reflected;  // reflected: taps in reverse order, as the gradient of the input needs them
};
}
