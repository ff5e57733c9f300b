// Maps in one pass over memory: concatenated and shifted, normalised and activated, and the same backwards.
//
// Maps lie channels last: of each voxel, `channels` numbers, which threads read eight at a time. Sums are of float32.

#include "half.cuh"

constexpr int THREADS = 256;

__device__ inline void read(const Half* from, float (&to)[PIECE]) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    const unsigned pairs[4] = {four.x, four.y, four.z, four.w};
    for (int i = 0; i < PIECE; ++i) to[i] = number(static_cast<Half>(pairs[i / 2] >> 16 * (i % 2)));
}

__device__ inline void write(Half* to, const float (&from)[PIECE]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(rounded(from[0], from[1]), rounded(from[2], from[3]),
                                               rounded(from[4], from[5]), rounded(from[6], from[7]));
}

__device__ inline void load(const float* from, float (&to)[PIECE]) {
    for (int i = 0; i < PIECE; ++i) to[i] = from[i];
}

// The voxels that a thread visits of those of its program, which are a share of all, and its eight channels of each.
struct Walk {
    Int voxel, end;
    int step, channel;

    __device__ Walk(Int voxels, int pieces) : step(THREADS / pieces), channel(threadIdx.x % pieces * PIECE) {
        const Int share = (voxels + gridDim.x - 1) / gridDim.x, begin = share * blockIdx.x;
        end = begin + share < voxels ? begin + share : voxels;
        voxel = static_cast<int>(threadIdx.x) < step * pieces ? begin + threadIdx.x / pieces : end;
    }
};

// to[plane, voxel, to_first + c] = from[plane - sign · shifts[c], voxel, from_first + c], zeros from outside the map, for
// `count` channels c. Planes of a sample are `depth`; a program is a share of the voxels of a plane.
extern "C" __global__ __launch_bounds__(THREADS) void move(
    const Half* from, Half* to, const int* shifts, Int from_channels, Int from_first, Int to_channels, Int to_first,
    Int count, Int sign, Int depth, Int voxels) {
    const Walk walk(voxels, static_cast<int>((count + PIECE - 1) / PIECE));
    const int there = count - walk.channel < PIECE ? static_cast<int>(count) - walk.channel : PIECE;
    const Int plane = blockIdx.y;
    bool together = (from_channels | from_first | to_channels | to_first | there) % PIECE == 0, inside[PIECE];
    Int planes[PIECE];
    for (int i = 0; i < there; ++i) {
        const Int move = sign * shifts[walk.channel + i], d = plane % depth - move;
        inside[i] = d >= 0 && d < depth;
        planes[i] = (plane - move) * voxels * from_channels;
        together = together && planes[i] == planes[0];
    }
    from += from_first + walk.channel;
    to += plane * voxels * to_channels + to_first + walk.channel;
#pragma unroll 4
    for (Int voxel = walk.voxel; voxel < walk.end; voxel += walk.step) {
        const Half* in = from + voxel * from_channels;
        Half* out = to + voxel * to_channels;
        if (together)
            *reinterpret_cast<uint4*>(out) =
                inside[0] ? *reinterpret_cast<const uint4*>(in + planes[0]) : make_uint4(0, 0, 0, 0);
        else
            for (int i = 0; i < there; ++i) out[i] = inside[i] ? in[planes[i] + i] : 0;
    }
}

// out (2, channels) = what the threads of a program have summed up.
__device__ inline void add_threads(const float (&first)[PIECE], const float (&second)[PIECE], float* out,
                                   int channels) {
    SHARED float memory[THREADS][2 * PIECE + 1];  // one more, so that neighbours lie in different banks
    const int pieces = channels / PIECE;
    for (int i = 0; i < PIECE; ++i) {
        memory[threadIdx.x][i] = first[i];
        memory[threadIdx.x][PIECE + i] = second[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * channels; i += THREADS) {
        const int channel = i % channels;
        float sum = 0;
        for (int thread = channel / PIECE; thread < THREADS / pieces * pieces; thread += pieces)
            sum += memory[thread][i / channels * PIECE + channel % PIECE];
        out[i] = sum;
    }
}

// Where the sums (2, channels) of a program are.
__device__ inline float* own_part(float* parts, Int channels) {
    return parts + (blockIdx.y * gridDim.x + blockIdx.x) * 2 * channels;
}

// parts (B, shares, 2, C) = sums of x - p and of its squares, where p is the first voxel's number, so that what all
// voxels have in common does not cost digits.
extern "C" __global__ __launch_bounds__(THREADS) void sum_squares(const Half* x, float* parts, Int voxels,
                                                                  Int channels) {
    const Walk walk(voxels, static_cast<int>(channels / PIECE));
    x += blockIdx.y * voxels * channels + walk.channel;
    float pivot[PIECE], sums[PIECE] = {}, squares[PIECE] = {};
    read(x, pivot);
#pragma unroll 4
    for (Int voxel = walk.voxel; voxel < walk.end; voxel += walk.step) {
        float at[PIECE];
        read(x + voxel * channels, at);
        for (int i = 0; i < PIECE; ++i) {
            const float difference = at[i] - pivot[i];
            sums[i] += difference;
            squares[i] += difference * difference;
        }
    }
    add_threads(sums, squares, own_part(parts, channels), static_cast<int>(channels));
}

// The sums over all shares, for one channel of a sample; true for the one thread that has them.
struct Total {
    float sums[2];
    int channel;
    bool here;

    __device__ Total(const float* parts, Int shares, Int channels)
        : channel(blockIdx.x * PIECE + threadIdx.x % PIECE) {
        SHARED float memory[2][THREADS];
        const int row = threadIdx.x / PIECE;
        sums[0] = sums[1] = 0;
        if (channel < channels)
            for (Int share = row; share < shares; share += THREADS / PIECE)
                for (int k = 0; k < 2; ++k)
                    sums[k] += parts[((blockIdx.y * shares + share) * 2 + k) * channels + channel];
        for (int k = 0; k < 2; ++k) memory[k][threadIdx.x] = sums[k];
        __syncthreads();
        here = row == 0 && channel < channels;
        for (int other = 1; here && other < THREADS / PIECE; ++other)
            for (int k = 0; k < 2; ++k) sums[k] += memory[k][threadIdx.x + PIECE * other];
    }
};

// stats (B, 4, C) = mean, 1 / deviation, and the scale and offset that a number is multiplied by and added to.
extern "C" __global__ __launch_bounds__(THREADS) void finish_norm(
    const float* parts, const Half* x, const float* weight, const float* bias, float* stats, Int shares, Int voxels,
    Int channels, double eps) {
    const Total total(parts, shares, channels);
    if (!total.here) return;
    const int c = total.channel;
    const float mean = total.sums[0] / voxels, square = total.sums[1] / voxels - mean * mean;
    const float inverse = 1 / sqrtf((square > 0 ? square : 0) + static_cast<float>(eps));
    const float whole = number(x[blockIdx.y * voxels * channels + c]) + mean, scale = weight[c] * inverse;
    float* to = stats + blockIdx.y * 4 * channels + c;
    to[0] = whole, to[channels] = inverse, to[2 * channels] = scale, to[3 * channels] = bias[c] - whole * scale;
}

// y = leaky ReLU of scale · x + offset.
extern "C" __global__ __launch_bounds__(THREADS) void apply_norm(
    const Half* x, const float* stats, Half* y, Int voxels, Int channels, double slope) {
    const Walk walk(voxels, static_cast<int>(channels / PIECE));
    stats += blockIdx.y * 4 * channels + walk.channel;
    const Int first = blockIdx.y * voxels * channels + walk.channel;
    const float leak = static_cast<float>(slope);
    float scale[PIECE], offset[PIECE];
    load(stats + 2 * channels, scale);
    load(stats + 3 * channels, offset);
#pragma unroll 4
    for (Int voxel = walk.voxel; voxel < walk.end; voxel += walk.step) {
        float at[PIECE];
        read(x + first + voxel * channels, at);
        for (int i = 0; i < PIECE; ++i) {
            const float z = at[i] * scale[i] + offset[i];
            at[i] = z > 0 ? z : leak * z;
        }
        write(y + first + voxel * channels, at);
    }
}

// What the backward pass knows of eight channels of a sample.
struct Norm {
    float mean[PIECE], inverse[PIECE], scale[PIECE], offset[PIECE], leak;

    __device__ Norm(const float* stats, Int channels, int channel, double slope) : leak(static_cast<float>(slope)) {
        stats += blockIdx.y * 4 * channels + channel;
        load(stats, mean);
        load(stats + channels, inverse);
        load(stats + 2 * channels, scale);
        load(stats + 3 * channels, offset);
    }

    // Replaces x by its normal form, and the gradient of the activation by that of its argument.
    __device__ void turn(float (&x)[PIECE], float (&grad)[PIECE]) const {
        for (int i = 0; i < PIECE; ++i) {
            if (!(x[i] * scale[i] + offset[i] > 0)) grad[i] *= leak;
            x[i] = (x[i] - mean[i]) * inverse[i];
        }
    }
};

// parts (B, shares, 2, C) = sums of the gradients of the norm's results, and of their products with the normal form.
extern "C" __global__ __launch_bounds__(THREADS) void sum_grads(
    const Half* x, const Half* grad, const float* stats, float* parts, Int voxels, Int channels, double slope) {
    const Walk walk(voxels, static_cast<int>(channels / PIECE));
    const Norm norm(stats, channels, walk.channel, slope);
    const Int first = blockIdx.y * voxels * channels + walk.channel;
    float sums[PIECE] = {}, products[PIECE] = {};
#pragma unroll 2
    for (Int voxel = walk.voxel; voxel < walk.end; voxel += walk.step) {
        float at[PIECE], g[PIECE];
        read(x + first + voxel * channels, at);
        read(grad + first + voxel * channels, g);
        norm.turn(at, g);
        for (int i = 0; i < PIECE; ++i) {
            sums[i] += g[i];
            products[i] += g[i] * at[i];
        }
    }
    add_threads(sums, products, own_part(parts, channels), static_cast<int>(channels));
}

// sums (B, 2, C) = the sums of `sum_grads` over all shares.
extern "C" __global__ __launch_bounds__(THREADS) void finish_sums(const float* parts, float* sums, Int shares,
                                                                  Int channels) {
    const Total total(parts, shares, channels);
    if (!total.here) return;
    for (int k = 0; k < 2; ++k) sums[(blockIdx.y * 2 + k) * channels + total.channel] = total.sums[k];
}

// The gradient of x.
extern "C" __global__ __launch_bounds__(THREADS) void apply_grads(
    const Half* x, const Half* grad, const float* stats, const float* sums, Half* x_grad, Int voxels, Int channels,
    double slope) {
    const Walk walk(voxels, static_cast<int>(channels / PIECE));
    const Norm norm(stats, channels, walk.channel, slope);
    const Int first = blockIdx.y * voxels * channels + walk.channel;
    float mean[PIECE], product[PIECE];
    load(sums + blockIdx.y * 2 * channels + walk.channel, mean);
    load(sums + (blockIdx.y * 2 + 1) * channels + walk.channel, product);
    for (int i = 0; i < PIECE; ++i) mean[i] /= voxels, product[i] /= voxels;
#pragma unroll 2
    for (Int voxel = walk.voxel; voxel < walk.end; voxel += walk.step) {
        float at[PIECE], g[PIECE];
        read(x + first + voxel * channels, at);
        read(grad + first + voxel * channels, g);
        norm.turn(at, g);
        for (int i = 0; i < PIECE; ++i) g[i] = norm.scale[i] * (g[i] - mean[i] - at[i] * product[i]);
        write(x_grad + first + voxel * channels, g);
    }
}
