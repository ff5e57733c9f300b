// Convolutions (1, 3, 3) by blocks of 16 × 16 channels on matrix units: a tile of the map lies in shared memory while
// all nine taps read it, and each of its rows, once in registers, is multiplied by the three taps that see it.
//
// Maps lie channels last: of each voxel, `channels` numbers. A plane is one depth of one sample. What the tables say is
// in blocks.py.

#include "half.cuh"

constexpr int RUN = 16;  // channels of a block, on either side
constexpr int TAPS = 9;
constexpr int SHARE = 8;  // rows of the tile that one warp computes, 16 columns wide

#ifndef EMULATED
// Copies 16 bytes to shared memory, or zeros, while computing goes on.
__device__ inline void start_copy(char* to, const void* from, bool there) {
    const unsigned at = __cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of copies, or all but the last.
__device__ inline void wait_for_all() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
__device__ inline void wait_for_first() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// Four matrices of 8 × 8 numbers, whose rows lie where lanes 0-7, 8-15, 16-23 and 24-31 say.
__device__ inline void load_matrices(unsigned (&to)[4], const char* row) {
    const unsigned at = __cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ inline void load_transposed(unsigned (&to)[4], const char* row) {
    const unsigned at = __cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// sum (16 × 8) += a (16 × 16) · b (16 × 8), spread over the lanes of a warp.
__device__ inline void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBER "." NUMBER ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// A map of planes × height × width voxels.
struct Map {
    Half* data;
    Int channels;
};

// One to three maps that stand for their concatenation; such as are not there have no channels.
struct Maps {
    Half *first, *second, *third;
    Int first_channels, second_channels, third_channels;

    // The map in which a channel lies, which becomes the number that it has there.
    __device__ Map of(int& channel) const {
        if (channel < first_channels) return {first, first_channels};
        channel -= static_cast<int>(first_channels);
        if (channel < second_channels) return {second, second_channels};
        channel -= static_cast<int>(second_channels);
        return {third, third_channels};
    }
};

struct Plane {
    Int height, width;
};

// A tile in shared memory, BORDER voxels wider on each side than what is computed from it: 16 channels of each voxel, in
// two pieces that change places every four voxels, so that a matrix is read without conflict.
template <int WARPS, int HIGH, int BORDER>
struct Tile {
    static constexpr int THREADS = 32 * WARPS, WIDE = WARPS / HIGH;
    static constexpr int HEIGHT = SHARE * HIGH + 2 * BORDER, WIDTH = 16 * WIDE + 2 * BORDER;
    static constexpr int PIECES = 2 * HEIGHT * WIDTH, COPIES = (PIECES + THREADS - 1) / THREADS;
    static constexpr int BYTES = 16 * PIECES;

    // Where a piece of a voxel lies.
    __device__ static int place(int voxel, int piece) { return voxel * 32 + ((piece ^ (voxel >> 2 & 1)) << 4); }

    int voxels[COPIES];  // of the pieces that this thread copies, counted in the plane; -1: outside

    __device__ void find_voxels(const Plane& plane, int top, int left) {
        for (int i = 0; i < COPIES; ++i) {
            const int piece = threadIdx.x + i * THREADS, voxel = piece >> 1;
            const int h = top - BORDER + voxel / WIDTH, w = left - BORDER + voxel % WIDTH;
            const bool inside = h >= 0 && h < plane.height && w >= 0 && w < plane.width && piece < PIECES;
            voxels[i] = inside ? static_cast<int>(h * plane.width + w) : -1;
        }
    }

    // Starts to copy 16 channels of the plane that begins at voxel `first`, zeros where they are outside.
    __device__ void start(char* tile, const Map& map, Int first, bool there, int channel) const {
        const int own = channel + static_cast<int>(threadIdx.x & 1) * PIECE, stride = static_cast<int>(map.channels);
        const Half* from = map.data + first * map.channels + own;
        there = there && own < stride;
        char* to = tile + place(threadIdx.x >> 1, threadIdx.x & 1);  // later copies lie a multiple of 8 voxels on
        for (int i = 0; i < COPIES; ++i) {
            const bool inside = there && voxels[i] >= 0;
            if ((i + 1) * THREADS <= PIECES || threadIdx.x + i * THREADS < PIECES)
                start_copy(to + i * THREADS * 16, inside ? from + voxels[i] * stride : map.data, inside);
        }
    }
};

// Numbers the tiles of a map, plane by plane.
struct Place {
    Int plane;
    int top, left;

    __device__ Place(Int tile, const Plane& size, int height, int width) {
        const Int across = (size.width + width - 1) / width, down = (size.height + height - 1) / height;
        left = static_cast<int>(tile % across) * width;
        top = static_cast<int>(tile / across % down) * height;
        plane = tile / across / down;
    }
};

__device__ inline int lane() { return threadIdx.x & 31; }

using Wide = Tile<4, 2, 1>;
constexpr int WEIGHTS = TAPS * 512;  // bytes of a block

// sums += what one block adds to the 8 × 16 outputs of a warp: 16 channels of the tile by all taps.
__device__ inline void add_block(const char* tile, const char* weights, int top, int left, float (&sums)[SHARE][2][4]) {
    for (int j = 0; j < 3; ++j) {
        unsigned taps[3][4];
        for (int i = 0; i < 3; ++i) {
            const uint4 four = *reinterpret_cast<const uint4*>(weights + (3 * i + j) * 512 + lane() * 16);
            taps[i][0] = four.x, taps[i][1] = four.y, taps[i][2] = four.z, taps[i][3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < SHARE + 2; ++r) {
            unsigned row[4];
            load_matrices(row, tile + Wide::place((top + r) * Wide::WIDTH + left + j + (lane() & 15), lane() >> 4));
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                const int out = r - i;
                if (out < 0 || out >= SHARE) continue;
                multiply(sums[out][0], row, taps[i][0], taps[i][1]);
                multiply(sums[out][1], row, taps[i][2], taps[i][3]);
            }
        }
    }
}

// Writes four channels of a voxel, from `channel` on, each at its plane moved back by `moved`; zeros where that is
// outside: such planes then take the places of those that nothing else reaches.
struct Writer {
    Half* data;
    Int channels, planes[4];  // the first number of the plane of each channel
    int channel;
    float bias[4];
    bool inside[4], together;

    // `whole` is the channel in the concatenation, of which biases and moves are.
    __device__ Writer(const Maps& maps, const Plane& size, Int depth, Int plane, int whole, const float* biases,
                      const int* moved)
        : channel(whole), together(true) {
        const Map map = maps.of(channel);
        data = map.data, channels = map.channels;
        for (int i = 0; i < 4; ++i) {
            const bool there = channel + i < channels;
            const Int d = plane % depth - (moved && there ? moved[whole + i] : 0);
            inside[i] = d >= 0 && d < depth;
            planes[i] = (plane / depth * depth + (d % depth + depth) % depth) * size.height * size.width * channels;
            bias[i] = biases && there ? biases[whole + i] : 0;
            together = together && planes[i] == planes[0] && inside[i] == inside[0];
        }
    }

    __device__ void write(Int voxel, const float (&values)[4]) const {
        if (channel >= channels) return;
        Half* to = data + voxel * channels + channel;
        unsigned both[2];
        for (int i = 0; i < 2; ++i)
            both[i] = rounded(values[2 * i] + bias[2 * i], values[2 * i + 1] + bias[2 * i + 1]);
        if (together)
            *reinterpret_cast<uint2*>(to + planes[0]) = inside[0] ? make_uint2(both[0], both[1]) : make_uint2(0, 0);
        else
            for (int i = 0; i < 4; ++i)
                to[planes[i] + i] = inside[i] ? static_cast<Half>(both[i / 2] >> 16 * (i % 2)) : 0;
    }
};

// y[plane, :, :, 16 · row ...] = bias + sum over the blocks of row: x, moved along depth by `shifts`, times weights.
// Both stand for concatenations, in which no block of 16 channels is of two maps. A program is a tile and a row;
// `weights` lie as lanes read them, 9 · 256 numbers a block.
extern "C" __global__ __launch_bounds__(128, 4) void conv(
    Half* first, Half* second, Half* third, const Half* weights, const float* bias, Half* first_y, Half* second_y,
    Half* third_y, const int* row_ptr, const int* col_idx, const int* shifts, const int* moves, Int first_channels,
    Int second_channels, Int third_channels, Int first_width, Int second_width, Int third_width, Int num_rows, Int depth,
    Int height, Int width) {
    SHARED char memory[2][Wide::BYTES + WEIGHTS];
    const Maps x{first, second, third, first_channels, second_channels, third_channels};
    const Maps y{first_y, second_y, third_y, first_width, second_width, third_width};
    const Plane size{height, width};
    const int row = blockIdx.x % num_rows, begin = row_ptr[row] / RUN, end = row_ptr[row + 1] / RUN;
    const Place place(blockIdx.x / num_rows, size, Wide::HEIGHT - 2, Wide::WIDTH - 2);
    Wide tile;
    tile.find_voxels(size, place.top, place.left);
    const int own = place.plane % depth;
    auto start = [&](int block) {
        char* to = memory[(block - begin) & 1];
        const int shift = shifts[block * RUN];
        int channel = col_idx[block * RUN];
        const Map map = x.of(channel);
        tile.start(to, map, (place.plane - shift) * height * width, own >= shift && own < depth + shift, channel);
        for (int i = threadIdx.x; i < WEIGHTS / 16; i += Wide::THREADS)
            start_copy(to + Wide::BYTES + i * 16, weights + static_cast<Int>(block) * TAPS * 256 + i * PIECE, true);
        end_group();
    };
    const int warp = threadIdx.x >> 5, top = warp / Wide::WIDE * SHARE, left = warp % Wide::WIDE * 16;
    float sums[SHARE][2][4] = {};
    if (begin < end) start(begin);
    for (int block = begin; block < end; ++block) {
        if (block + 1 < end) {
            start(block + 1);
            wait_for_first();
        } else {
            wait_for_all();
        }
        __syncthreads();
        const char* from = memory[(block - begin) & 1];
        add_block(from, from + Wide::BYTES, top, left, sums);
        __syncthreads();
    }
    const Writer writer(y, size, depth, place.plane, row * RUN + (lane() & 3) * 4, bias, moves);
#pragma unroll
    for (int r = 0; r < SHARE; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Int h = place.top + top + r, w = place.left + left + (lane() >> 2) + 8 * i;
            const float four[4] = {sums[r][0][2 * i], sums[r][0][2 * i + 1], sums[r][1][2 * i], sums[r][1][2 * i + 1]};
            if (h < height && w < width) writer.write(h * width + w, four);
        }
}

// packed[i] = weight[order[i]]; zeros where that is `most` or more.
extern "C" __global__ __launch_bounds__(256) void pack_weights(
    const Half* weight, const Int* order, Half* packed, Int count, Int most) {
    const Int i = blockIdx.x * static_cast<Int>(256) + threadIdx.x;
    if (i < count) packed[i] = order[i] < most ? weight[order[i]] : 0;
}

using Narrow = Tile<2, 2, 1>;
using Inner = Tile<2, 2, 0>;

// sums += the products of 16 channels of a tile, at each tap, with 16 of the gradient, over a warp's 8 × 16 voxels.
__device__ inline void add_products(const char* tile, const char* grad, int top, float (&sums)[TAPS][2][4]) {
    unsigned rows[3][4];  // of the gradient: the last three
#pragma unroll
    for (int r = 0; r < SHARE + 2; ++r) {
        if (r < SHARE)
            load_transposed(rows[r % 3], grad + Inner::place((top + r) * Inner::WIDTH + (lane() & 15), lane() >> 4));
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            unsigned x[4];
            const int column = (lane() & 7) + (lane() >> 4) * 8;
            load_transposed(x, tile + Narrow::place((top + r) * Narrow::WIDTH + j + column, lane() >> 3 & 1));
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                if (r - i < 0 || r - i >= SHARE) continue;
                const unsigned(&g)[4] = rows[(r - i + 3) % 3];
                multiply(sums[3 * i + j][0], x, g[0], g[1]);
                multiply(sums[3 * i + j][1], x, g[2], g[3]);
            }
        }
    }
}

// out[part, k, tap, n] = sum over a part of the map of x[voxel at tap, channel k] · grad[voxel, 16 · row + n], where k
// are the entries of a block. A program is a block and a share of the tiles; each of its warps writes a part of its own.
extern "C" __global__ __launch_bounds__(64, 5) void conv_backward_weights(
    Half* first, Half* second, Half* third, Half* grad, float* out, const int* blocks, const int* col_idx,
    const int* shifts, Int first_channels, Int second_channels, Int third_channels, Int y_channels, Int num_entries,
    Int planes, Int depth, Int height, Int width) {
    SHARED char memory[2][Narrow::BYTES + Inner::BYTES];
    const Plane size{height, width};
    const int row = blocks[2 * blockIdx.x], entry = blocks[2 * blockIdx.x + 1], shift = shifts[entry];
    int channel = col_idx[entry];
    const Map in = Maps{first, second, third, first_channels, second_channels, third_channels}.of(channel);
    const Map on{grad, y_channels};
    const Int across = (width + Inner::WIDTH - 1) / Inner::WIDTH, down = (height + Inner::HEIGHT - 1) / Inner::HEIGHT;
    const Int tiles = planes * across * down, voxels = height * width;
    Narrow tile;
    Inner inner;
    auto start = [&](Int number, int half) {
        const Place place(number, size, Inner::HEIGHT, Inner::WIDTH);
        const Int from = place.plane % depth - shift;
        tile.find_voxels(size, place.top, place.left);
        tile.start(memory[half], in, (place.plane - shift) * voxels, from >= 0 && from < depth, channel);
        inner.find_voxels(size, place.top, place.left);
        inner.start(memory[half] + Narrow::BYTES, on, place.plane * voxels, true, row * RUN);
        end_group();
    };
    const int warp = threadIdx.x >> 5;
    float sums[TAPS][2][4] = {};
    int half = 0;
    if (blockIdx.y < tiles) start(blockIdx.y, half);
    for (Int number = blockIdx.y; number < tiles; number += gridDim.y, half ^= 1) {
        if (number + gridDim.y < tiles) {
            start(number + gridDim.y, half ^ 1);
            wait_for_first();
        } else {
            wait_for_all();
        }
        __syncthreads();
        add_products(memory[half], memory[half] + Narrow::BYTES, warp * SHARE, sums);
        __syncthreads();
    }
    const Int part = blockIdx.y * 2 + warp;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Int k = entry + (lane() >> 2) + 8 * (i / 2);
            float* to = out + ((part * num_entries + k) * TAPS + tap) * RUN + (lane() & 3) * 2 + 8 * (i % 2);
            *reinterpret_cast<float2*>(to) = make_float2(sums[tap][i % 2][i / 2 * 2], sums[tap][i % 2][i / 2 * 2 + 1]);
        }
}
