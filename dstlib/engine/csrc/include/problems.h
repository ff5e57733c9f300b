// The problems that kernels solve: what the engine's Python side and its kernels agree on. Plain C, no torch, no Python.
//
// dstlib/engine/runtime/structs.py reads this file and offers the same structs to Python: scalars, pointers, structs
// within structs, arrays and enum constants; a line that it does not understand is an error. Here each is a typedef.
//
// Feature maps are "depth-last": logically (N, C, D, H, W), in memory N, C, H, W, D with D contiguous. Consecutive
// depths are then the lanes of a vector, and no kernel ever shuffles within one. All numbers are float32, all strides
// count elements.
#pragma once
#include <stdint.h>

enum { MAX_SOURCES = 3, MAX_TAPS = 64, LINEAR_PART = 96, LINEAR_STRETCH = 160 };

// Rows of maps that would begin a multiple of so many numbers apart are padded by so many.
enum { ROW_PAGE = 1024, ROW_PADDING = 32 };

// Rows of outputs that a convolution by Winograd computes together, where it goes slab by slab: whole blocks of tiles.
enum { SLAB_ROWS = 16 };

// Of planes with at most so many voxels the direct form of a convolution is the faster one.
enum { DIRECT_PLANE = 4 };

// Sizes or strides along these axes: batch n, channels c, depth d, height h, width w.
typedef struct { int64_t h, w; } HW;
typedef struct { int64_t d, h, w; } DHW;
typedef struct { int64_t n, d, h, w; } NDHW;
typedef struct { int64_t n, c, h, w; } NCHW;
typedef struct { int64_t n, c, d, h, w; } NCDHW;

// A feature map to read. With `scale`, what is read is activation(scale[n, c] * x + offset[n, c]), where activation(y)
// is max(y, slope * y): the instance norm and the leaky ReLU that precede, applied while loading. 0 <= slope <= 1.
typedef struct {
    const float* data;
    const float* scale;   // (N, channels) contiguous, or null: read as it is
    const float* offset;  // (N, channels) contiguous, or null together with scale
    int64_t channels;
    NCHW strides;  // depth has stride 1
    float slope;
} Source;

// A feature map to write.
typedef struct {
    float* data;
    NCHW strides;  // depth has stride 1
} Target;

// A sparse pattern in compressed rows: of row r (an output channel, say) the columns col_idx[row_ptr[r]] ..
// col_idx[row_ptr[r + 1] - 1] are active, in rising order.
typedef struct {
    const int32_t* row_ptr;  // (num_rows + 1)
    const int32_t* col_idx;  // (nnz)
    int64_t num_rows, num_cols, nnz;
} Pattern;

// The affine instance norm that follows a convolution, as its readers apply it: y * scale + offset.
typedef struct {
    const float* gamma;  // (num_rows)
    const float* beta;   // (num_rows)
    double eps;
    float* statistics;  // (4, N, num_rows): scale, offset, mean, 1 / sqrt(variance + eps); or null: no norm follows
} InstanceNorm;

// Rows of the output from `from` on that lie on memory of their own, in the order of rows; from = 0: none. Strides along h
// and w are those of the rows before.
typedef struct {
    Target out;
    int64_t from;
} Rows;

// Transposed convolution whose kernel is its stride, so that no two inputs meet in an output voxel:
//     y[n, o, d * stride.d + i, h * stride.h + j, w * stride.w + k] =
//         sum over active (o, c) of weights[c, o, i, j, k] * x[n, c, d, h, w]
// forward reads the input x, backward_input the gradient of y; both write out. backward_weights reads both, and writes
// weights_grad at the active connections. Rows of the pattern are output channels.
typedef struct {
    Source input, grad;
    Target out;
    Pattern pattern;
    const float* weights;  // the taps of a connection lie together, at row * strides[0] + column * strides[1]
    float* weights_grad;
    int64_t weight_strides[2];
    NDHW size;  // of the input
    DHW stride;
} ConvTranspose;

// y[n, o, d, h, w] = bias[o] + sum over active (o, c) and taps (i, j) of weights[i, j, (o, c)] *
//     x[n, c, d * stride.d - shifts[c], h * stride.h + i - padding.h, w * stride.w + j - padding.w]
// where x is the concatenation of the sources, and zero outside.
typedef struct {
    Source sources[MAX_SOURCES];
    Target out;
    Pattern pattern;
    const float* weights;       // packed for the form
    const float* bias;          // (num_rows) or null
    const int32_t* shifts;      // (num_cols): by how many voxels a channel moves towards higher depths
    const int32_t* out_shifts;  // (num_rows) or null: the same for channels of y, as the gradient of x needs it
    InstanceNorm norm;
    NDHW input_size;
    DHW output_size;
    HW kernel_size;
    DHW stride;
    HW padding;
    const int64_t* index;  // gradient of the weights only: (nnz), where each connection lies in weights_grad
    float* weights_grad;   // (connections, kernel_size); there `out` is the gradient of y, which is read
    float* bias_grad;      // (num_rows) or null
    Rows rest[2];          // MAX_SOURCES - 1; the gradient of the input only: where that of further sources lies
    // Forward by Winograd only. With is_sliced, all of a slab of SLAB_ROWS rows is computed before the next: `out` may then
    // lie in a source of as many channels, more than SLAB_ROWS rows before it, which it overwrites as far as it was read.
    // Where upward has rows, it makes sources[1], as much as a slab reads at a time: its `out` is the memory for that, of
    // SLAB_ROWS + 2 * upward.stride.h rows of one sample, and has the strides of sources[1].
    int64_t is_sliced;
    ConvTranspose upward;
} Conv;

// The forms of a convolution: Winograd's F(4x4, 3x3), or tap by tap.
enum { FORM_WINOGRAD, FORM_DIRECT };

// Takes the active kernels out of a weight (connections, taps) and transforms them for a form.
typedef struct {
    const float* weight;
    const int64_t* index;  // (nnz): the connection of each, in the order of the pattern
    float* out;            // (6, nnz, 6) or (nnz, taps)
    int64_t nnz, taps, form, reflected;  // reflected: taps in reverse order, as the gradient of the input needs them
} PackWeights;

// Maximum over windows that lie side by side; what is left at the end of an axis is in no window. forward reads the
// input and writes out; backward, the gradient of the activated input, reads both the input and grad.
typedef struct {
    Source input, grad;
    Target out;
    NDHW size;  // of the input
    DHW window;
} MaxPool;

// Gradient of an instance norm and the activation behind it: input is the map before both, with its scale, offset and
// slope, grad is the gradient of what is behind both.
typedef struct {
    Source input, grad;
    Target out;
    const float* mean;   // (N, C)
    const float* rstd;   // (N, C): 1 / standard deviation
    const float* gamma;  // (C)
    double* sums;        // (N, C, 2), written: the gradients of beta and of gamma
    NDHW size;
} InstanceNormBackward;

// Writes the activated map.
typedef struct {
    Source input;
    Target out;
    NDHW size;
} Activation;

// Copies between a map whose columns lie side by side (stride 1 along W) and one whose depths do.
typedef struct {
    const float* input;
    float* out;
    NCDHW input_strides, out_strides, size;
} Reorder;

// A stretch of neighbouring inputs of a group of rows of a linear layer.
typedef struct {
    int32_t group;
    int32_t begin, end;  // into col_idx
} Segment;

// The active weights of W (outputs, inputs). Its rows are taken in groups of `group` neighbours (1 to 4) that have the
// same active columns: 1 for scattered weights, 4 for blocks of 16 x 16, say. A group's columns ascend, and its values
// lie column by column, `group` together. Segments cut the groups into stretches of neighbouring inputs; a part of the
// outputs is computed stretch by stretch, so that the inputs of a stretch stay in the cache meanwhile, and within it
// segments are sorted by length, so that the processor can foresee where they end.
typedef struct {
    const int32_t* col_idx;  // (num_cols): the input of each column of each group
    const int32_t* index;    // (num_cols * group): where in the weights each value comes from
    const Segment* segments;
    const int32_t* part_ptr;  // (num_parts + 1): the first segment of each part
    int64_t outputs, inputs, group, num_cols, num_parts;  // a part is LINEAR_PART outputs, the last one maybe fewer
} LinearPattern;

// y = x W^T + bias with W sparse.
typedef struct {
    LinearPattern pattern;
    float* x;        // (batch, inputs)
    float* y;        // (batch, outputs)
    float* weights;  // what `index` counts in; null: the values are there already
    float* values;   // (num_cols * group): the weights in the order of the pattern
    const float* bias;  // (outputs) or null
    int64_t batch, stride_x, stride_y;
} Linear;

// Numbers of any type, `width` bytes each (1, 2, 4 or 8), one after the other as they lie in memory, with a mask of a bit
// each, the first in the lowest bit of the first byte.
typedef struct {
    void* data;
    const uint8_t* bits;
    int64_t num, width;
    int64_t value;       // what is to stand outside the mask, as bits
    int64_t counts;      // the bits of a number in which it may differ from that
    int64_t found;       // written: how many numbers outside differ; where they are set, 0 if none did
    int64_t first_task;  // the kernel's own
} Masked;

typedef struct {
    Masked* tensors;
    int64_t num_tensors;
} MaskedEach;

// The order of a linear layer's active weights, as LinearPattern has it; lengths of both are counted in them.
typedef struct {
    int32_t* places;    // (nnz) of the flattened matrix, in rising order
    int32_t* numbers;   // (nnz): what index is to say of each; or null: there is no index
    int32_t* order;     // (nnz): where the value of each lies; or null
    int32_t* col_idx;   // (num_cols)
    int32_t* index;     // (nnz) or null
    Segment* segments;  // (num_segments), of which there are (num_cols) at most
    int32_t* part_ptr;  // (num_parts + 1)
    int64_t rows, cols, nnz, group, num_segments;
} LinearOrder;

// Rising places of a matrix (rows, cols), and those of the same entries of its transpose, rising again; the numbers of
// entries go along.
typedef struct {
    const int32_t* places;     // (nnz)
    const int32_t* numbers;    // (nnz)
    int32_t* turned;           // (nnz), written
    int32_t* turned_numbers;   // (nnz), written
    int64_t rows, cols, nnz;
} Turned;

// Two rising lists without an entry in common, as one.
typedef struct {
    const int32_t* a;  // (num_a)
    const int32_t* b;  // (num_b)
    int32_t* out;      // (num_a + num_b), written
    int64_t num_a, num_b;
} Merged;

// Where values were before: source[order[j]] is before_order[i] where places[j] is before[i], -1 where it is in none.
typedef struct {
    const int32_t* before;        // (num_before), rising
    const int32_t* before_order;  // (num_before)
    const int32_t* places;        // (num), rising
    const int32_t* order;         // (num)
    int32_t* source;              // (num), written
    int64_t num_before, num;
} Sources;

// Units of which those above a score are wanted, and of the others what the lowest is; NaN is nobody's score.
typedef struct {
    const float* scores;  // (num), of the units from number `first` on
    int32_t* units;       // (num), written: those above, rising
    float* found;         // (num), written: their scores
    int64_t num, first, num_found;  // num_found: written
    float least;
    float lowest;        // of all that were looked at before, and now
    int64_t num_lowest;  // how many have it
} Offer;

// The `num_best` best of scores, of several alike the first; no NaN.
typedef struct {
    float* scores;    // (num)
    int32_t* units;   // (num), or null; else the best and their units are moved to the front
    uint8_t* chosen;  // (num), written: 1 of the best, 0 of the others; or null
    int64_t num, num_best;
    float least;  // written: of the best, where there are any
} Best;
