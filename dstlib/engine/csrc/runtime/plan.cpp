// Networks as files, run without torch and without Python: see dstlib/include/dstlib.h. A plan is the steps of a forward
// pass, which know no size, and the active weights that they read. For an image of a size, steps become calls of
// kernels, whose maps share an arena.
//
// The file, little-endian: Header, Step of each step, View of each output, then words of 4 bytes, int32 or float, that
// steps point into; dstlib/export/plan.py writes it. Map 0 is the image, map i + 1 what step i makes.
#include "../../../include/dstlib.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../include/problems.h"
#include "../include/table.h"
#include "export.h"

extern "C" const InstructionSet* engine_instruction_set(const char* name);

namespace {

constexpr char MAGIC[8] = {'d', 's', 't', 'p', 'l', 'a', 'n', '1'};
constexpr int64_t MOST_STEPS = 1 << 14, MOST_STRIDE = 16;
constexpr double MOST_FLOATS = 1LL << 40;  // of a map: no machine has as many, and no sum of a few overflows
constexpr int64_t LARGE = 1 << 24;         // floats of a map from which memory is spared
constexpr int64_t LINE = 16;               // floats of a line of the cache, or of the longest vector

struct Header {
    char magic[8];
    int64_t bytes;  // of the file
    uint32_t checksum, zero;  // of all that follows these two
    int64_t channels, num_steps, num_outputs, num_words;
};
static_assert(sizeof(Header) == 56, "as it is written");

// A map as it is read: with the norm that was found of it, if any, then max(x, slope * x).
struct View {
    int64_t map, is_normed;
    double slope;
};

enum Kind : int64_t { CONV, CONV_TRANSPOSE, MAX_POOL };

// Where something lies is told in words; -1 where there is nothing.
struct Step {
    int64_t kind, num_views;
    View views[MAX_SOURCES];
    int64_t outputs;  // channels
    HW kernel;        // of a convolution
    DHW stride;       // or the kernel of a transposed convolution, or the window of a pooling
    int64_t num_active, row_ptr, col_idx, values;  // active kernels in compressed rows, and the taps of each
    int64_t bias, shifts, gamma, beta;             // norms have the last two
    double eps;
};
static_assert(sizeof(Step) == 208, "as it is written");

struct Refusal {
    std::string what, allowed, given;
};

using std::to_string;

void require(bool holds, const char* what, const std::string& allowed, const std::string& given) {
    if (!holds) throw Refusal{what, allowed, given};
}

// CRC-32 as of zlib, eight bytes at a time.
uint32_t checksum(const unsigned char* data, size_t bytes) {
    static const auto table = [] {
        std::array<std::array<uint32_t, 256>, 8> made{};
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
            made[0][i] = value;
        }
        for (int k = 1; k < 8; ++k)
            for (int i = 0; i < 256; ++i) made[k][i] = made[k - 1][i] >> 8 ^ made[0][made[k - 1][i] & 255];
        return made;
    }();
    uint32_t found = ~0u;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint32_t near, far;
        memcpy(&near, data, 4);
        memcpy(&far, data + 4, 4);
        near ^= found;
        found = 0;
        for (int k = 0; k < 4; ++k)
            found ^= table[7 - k][near >> 8 * k & 255] ^ table[3 - k][far >> 8 * k & 255];
    }
    for (; bytes; --bytes) found = found >> 8 ^ table[0][(found ^ *data++) & 255];
    return ~found;
}

bool in_range(int64_t value, int64_t from, int64_t to) { return from <= value && value <= to; }

// Memory of floats, or of words; aligned to lines of the cache, and to huge pages where it fills some.
class Memory {
  public:
    void take(int64_t count) {
        constexpr size_t huge = size_t(2) << 20;
        data.reset();
        if (!count) return;
        const size_t wanted = static_cast<size_t>(count) * 4, grain = wanted < huge ? LINE * 4 : huge;
        const size_t bytes = (wanted + grain - 1) / grain * grain;
        data.reset(aligned_alloc(grain, bytes));
        if (!data) throw std::bad_alloc();
#if defined(__linux__)
        if (grain == huge) madvise(data.get(), bytes, MADV_HUGEPAGE);  // advice: where there are none, nothing is lost
#endif
    }
    float* floats(int64_t at = 0) const { return static_cast<float*>(data.get()) + at; }
    const int32_t* words(int64_t at = 0) const { return static_cast<const int32_t*>(data.get()) + at; }

  private:
    struct Free {
        void operator()(void* memory) const { free(memory); }
    };
    std::unique_ptr<void, Free> data;
};

// Where a map lies, depth last, see problems.h, and where the scale, offset, mean and deviation of its norm.
struct Map {
    DstlibSize size{};
    NCHW strides{};
    int64_t floats = 0;
    int64_t at = 0, norm = 0;
    int64_t over = -1;  // the map that it overwrites, or -1

    int64_t channels_in_all() const { return size.n * size.c; }
};

// Memory from the first moment to the last at which it is written or read.
struct Range {
    int64_t floats, first, last, at = 0;
};

// What is computed, and where, for an image of a size.
struct Layout {
    std::vector<Map> maps, written;  // written: activated outputs on their way to the order of images
    std::vector<char> by_winograd;   // of each step
    std::vector<char> is_sliced;     // of each step: whether it goes slab by slab
    std::vector<int64_t> within;     // of each step: the one that makes it, slab by slab, or -1
    int64_t arena = 0;               // floats
    int64_t made = 0;                // floats that weights take in the forms that kernels read
    int64_t ones = 0;                // channels in all of the largest map that is activated without a norm
};

// A kernel and its problem.
struct Call {
    int (*run)(const void*, int);
    std::vector<int64_t> problem;
};

std::string shown(const DstlibSize& size) {
    std::string text = "(";
    for (int64_t each : {size.n, size.c, size.d, size.h, size.w}) text += (text == "(" ? "" : ", ") + to_string(each);
    return text + ")";
}

bool same(const DstlibSize& a, const DstlibSize& b) { return !memcmp(&a, &b, sizeof(DstlibSize)); }

int64_t in_lines(int64_t floats) { return (floats + LINE - 1) / LINE * LINE; }

// between: floats that are left free behind each channel.
Map placed_depth_last(const DstlibSize& size, int64_t between = 0) {
    double all = 1;
    for (int64_t each : {size.n, size.c, size.d, size.h, size.w}) {
        require(each >= 1, "size of a map", "one voxel at least", shown(size));
        all *= static_cast<double>(each);
    }
    require(all < MOST_FLOATS, "size of a map", "fewer than 2^40 numbers", shown(size));
    int64_t row = size.w * size.d;
    const bool is_padded = row % ROW_PAGE == 0;
    row += is_padded ? ROW_PADDING : 0;
    const int64_t channel = size.h * row + (is_padded ? ROW_PADDING / 2 : 0) + between;
    Map map;
    map.size = size;
    map.strides = {size.c * channel, channel, row, size.d};
    map.floats = in_lines(size.n * size.c * channel);
    return map;
}

// How far before a map the one lies that overwrites it: a slab, and the row that the next slab reads once more.
int64_t step_back(const Map& map) { return in_lines((SLAB_ROWS + 1) * map.strides.h); }

// The memory for as much of a map as a slab reads, which a transposed convolution makes.
Map slab_of(const Map& map, int64_t stride) {
    DstlibSize size = map.size;
    size.n = 1;
    size.h = SLAB_ROWS + 2 * stride;
    return placed_depth_last(size);
}

// Gives ranges places so that none overlap which are needed at one time, and returns the floats in all. The widest come
// first: one map of the finest level that found no gap took a quarter more memory for an image of 128^3.
int64_t place(std::vector<Range>& ranges) {
    std::vector<Range*> by_width(ranges.size()), placed;  // placed: in the order of their places
    for (size_t i = 0; i < ranges.size(); ++i) by_width[i] = &ranges[i];
    std::stable_sort(by_width.begin(), by_width.end(), [](Range* a, Range* b) { return a->floats > b->floats; });
    int64_t size = 0;
    for (Range* range : by_width) {
        for (const Range* other : placed) {
            if (other->last < range->first || range->last < other->first) continue;
            if (other->at - range->at >= range->floats) break;  // it fits before that one
            range->at = std::max(range->at, other->at + other->floats);
        }
        const auto is_before = [](const Range* a, const Range* b) { return a->at < b->at; };
        placed.insert(std::upper_bound(placed.begin(), placed.end(), range, is_before), range);
        size = std::max(size, range->at + range->floats);
        require(static_cast<double>(size) < MOST_FLOATS, "maps", "fewer than 2^40 numbers", "more");
    }
    return size;
}

int64_t taps_of(const Step& step) {
    return step.kind == CONV ? step.kernel.h * step.kernel.w : step.stride.d * step.stride.h * step.stride.w;
}

}  // namespace

struct DstlibPlan {
    const InstructionSet* isa = nullptr;
    std::vector<Step> steps;
    std::vector<View> outputs;
    std::vector<int64_t> widths;  // channels of each map
    Memory data;
    int64_t num_words = 0;

    // Of the size that was run last.
    bool is_ready = false;
    std::unique_ptr<Layout> layout;
    Memory arena, ones, made;
    std::vector<int32_t> still;  // as many zeros as the widest step has inputs: shifts
    std::vector<Call> calls;
    std::vector<size_t> gives;  // of each output, the call that writes it

    void read(const char* content, int64_t bytes);
    Layout lay_out(const DstlibSize& image) const;
    void prepare(const DstlibSize& image, int num_threads);
    void run(const float* image, float* const* into, int num_threads);

  private:
    bool is_there(int64_t at, int64_t count) const { return count <= num_words && in_range(at, 0, num_words - count); }
    void check(const View& view, int64_t map) const;
    void check(const Step& step, int64_t number) const;
    void check_pattern(const Step& step, int64_t number, int64_t inputs) const;
    int64_t inputs_of(const Step& step) const;
    DstlibSize size_after(const Step& step, const Layout& found) const;
    void find_slabs(Layout& found, std::vector<int64_t>& last) const;
    void place_maps(Layout& found, const std::vector<int64_t>& last) const;
    Source source(const View& view) const;
    Target target(const Map& map) const { return {arena.floats(map.at), map.strides}; }
    Pattern pattern(const Step& step) const;
    const float* floats(int64_t at) const { return at < 0 ? nullptr : data.floats(at); }
    Conv conv(const Step& step, int64_t number, const ConvTranspose* flow, float* taps, int num_threads);
    ConvTranspose conv_transpose(const Step& step, int64_t number, float* taps);

    const Kernel* kernel(const char* name) const {
        const Kernel* each = isa->kernels;
        while (strcmp(each->name, name)) ++each;  // kernels.def has all that are named here
        return each;
    }

    template <class Problem>
    void call(const char* name, const Problem& problem) {
        static_assert(sizeof(Problem) % sizeof(int64_t) == 0, "whole words");
        Call made{kernel(name)->run, std::vector<int64_t>(sizeof(Problem) / sizeof(int64_t))};
        memcpy(made.problem.data(), &problem, sizeof(Problem));
        calls.push_back(std::move(made));
    }
};

// ---- what is in a file

void DstlibPlan::read(const char* content, int64_t bytes) {
    const char* file = "file";
    Header header;
    require(bytes >= static_cast<int64_t>(sizeof(Header)), file, "a plan of save_plan()", "another, or a part of one");
    memcpy(&header, content, sizeof(Header));
    require(!memcmp(header.magic, MAGIC, sizeof(MAGIC)), file, "a plan of version 1 of save_plan()", "another");
    require(header.bytes == bytes, file, to_string(header.bytes) + " bytes", to_string(bytes));
    const size_t sealed = offsetof(Header, channels);
    const uint32_t found = checksum(reinterpret_cast<const unsigned char*>(content) + sealed, bytes - sealed);
    require(header.checksum == found && !header.zero, file, "the contents that were written",
            "others: the file is damaged");
    // each at most what the file has room for: no product overflows
    const int64_t room = bytes - sizeof(Header);
    const bool fits = in_range(header.num_steps, 0, MOST_STEPS) && in_range(header.num_outputs, 1, MOST_STEPS) &&
                      in_range(header.num_words, 0, room / 4) && in_range(header.channels, 1, 1 << 20) &&
                      header.num_steps * static_cast<int64_t>(sizeof(Step)) +
                              header.num_outputs * static_cast<int64_t>(sizeof(View)) + header.num_words * 4 == room;
    require(fits, file, "as many steps, outputs and words as it has room for", "other numbers of them");
    steps.resize(header.num_steps);
    outputs.resize(header.num_outputs);
    num_words = header.num_words;
    data.take(num_words);
    const char* at = content + sizeof(Header);
    if (header.num_steps) memcpy(steps.data(), at, steps.size() * sizeof(Step));
    at += steps.size() * sizeof(Step);
    memcpy(outputs.data(), at, outputs.size() * sizeof(View));
    if (num_words) memcpy(data.floats(), at + outputs.size() * sizeof(View), num_words * 4);
    widths.push_back(header.channels);
    int64_t widest = 0;
    for (const Step& step : steps) {
        check(step, static_cast<int64_t>(widths.size()) - 1);
        widths.push_back(step.outputs);
        widest = std::max(widest, inputs_of(step));
    }
    for (const View& view : outputs) check(view, static_cast<int64_t>(widths.size()));
    still.assign(widest, 0);
}

// Before a map there are so many others.
void DstlibPlan::check(const View& view, int64_t before) const {
    require(in_range(view.map, 0, before - 1), "map that is read", "one of " + to_string(before) + " that are made before",
            to_string(view.map));
    const bool has_norm = view.map > 0 && steps[view.map - 1].gamma >= 0;
    require(view.is_normed == 0 || (view.is_normed == 1 && has_norm), "norm of a map", "one that was found", "none");
    require(view.slope >= 0 && view.slope <= 1, "slope of an activation", "0 to 1", to_string(view.slope));
}

int64_t DstlibPlan::inputs_of(const Step& step) const {
    int64_t inputs = 0;
    for (int64_t i = 0; i < step.num_views; ++i) inputs += widths[step.views[i].map];
    return inputs;
}

void DstlibPlan::check(const Step& step, int64_t number) const {
    const std::string name = "step " + to_string(number);
    require(in_range(step.kind, CONV, MAX_POOL), name.c_str(), "a kind that is known", to_string(step.kind));
    const int64_t most = step.kind == CONV ? MAX_SOURCES : 1;
    require(in_range(step.num_views, 1, most), name.c_str(), "1 to " + to_string(most) + " maps", to_string(step.num_views));
    for (int64_t i = 0; i < step.num_views; ++i) check(step.views[i], static_cast<int64_t>(widths.size()));
    for (int64_t each : {step.stride.d, step.stride.h, step.stride.w})
        require(in_range(each, 1, MOST_STRIDE), name.c_str(), "strides of 1 to " + to_string(MOST_STRIDE), to_string(each));
    const int64_t inputs = inputs_of(step), others[] = {step.bias, step.shifts, step.gamma, step.beta};
    const bool is_alone = std::all_of(others, others + 4, [](int64_t each) { return each == -1; });
    require(step.kind == CONV || is_alone, name.c_str(), "neither bias, norm nor shifts", "one of them");
    if (step.kind == MAX_POOL) {
        require(step.outputs == inputs, name.c_str(), to_string(inputs) + " outputs", to_string(step.outputs));
        return;
    }
    const bool is_square = step.kernel.h == step.kernel.w && (step.kernel.h == 1 || step.kernel.h == 3);
    const bool is_known = step.kind != CONV || is_square;  // before the taps are counted, whose number might overflow
    require(is_known, name.c_str(), "kernels of 1 x 1 or 3 x 3", to_string(step.kernel.h) + " x " + to_string(step.kernel.w));
    check_pattern(step, number, inputs);
    if (step.kind == CONV_TRANSPOSE) return;
    require(step.bias == -1 || is_there(step.bias, step.outputs), name.c_str(), "a bias in the file", to_string(step.bias));
    require(step.shifts == -1 || is_there(step.shifts, inputs), name.c_str(), "shifts in the file", to_string(step.shifts));
    const bool has_none = step.gamma == -1 && step.beta == -1;
    const bool has_norm = is_there(step.gamma, step.outputs) && is_there(step.beta, step.outputs);
    require(has_none || has_norm, name.c_str(), "a norm in the file, or none", to_string(step.gamma));
    require(has_none || (step.eps >= 0 && step.eps <= 1e30), name.c_str(), "an eps that is not negative", to_string(step.eps));
}

void DstlibPlan::check_pattern(const Step& step, int64_t number, int64_t inputs) const {
    const std::string name = "pattern of step " + to_string(number);
    const int64_t active = step.num_active, taps = taps_of(step);
    const bool fits = in_range(step.outputs, 1, num_words) && in_range(active, 0, num_words) &&
                      is_there(step.row_ptr, step.outputs + 1) && is_there(step.col_idx, active) &&
                      active <= num_words / taps && is_there(step.values, active * taps);
    require(fits, name.c_str(), "rows, columns and values in the file", "some beyond it");
    const int32_t *row_ptr = data.words(step.row_ptr), *col_idx = data.words(step.col_idx);
    require(row_ptr[0] == 0 && row_ptr[step.outputs] == active, name.c_str(),
            "rows from 0 to " + to_string(active), to_string(row_ptr[0]) + " to " + to_string(row_ptr[step.outputs]));
    for (int64_t row = 0; row < step.outputs; ++row) {
        require(row_ptr[row] <= row_ptr[row + 1] && row_ptr[row + 1] <= active, name.c_str(), "rows in order", "others");
        for (int64_t k = row_ptr[row]; k < row_ptr[row + 1]; ++k) {
            const bool ascends = k == row_ptr[row] || col_idx[k - 1] < col_idx[k];
            require(ascends && in_range(col_idx[k], 0, inputs - 1), name.c_str(),
                    "rising columns below " + to_string(inputs), to_string(col_idx[k]));
        }
    }
}

// ---- what is computed for an image of a size

DstlibSize DstlibPlan::size_after(const Step& step, const Layout& found) const {
    DstlibSize size = found.maps[step.views[0].map].size;
    for (int64_t i = 1; i < step.num_views; ++i) {
        DstlibSize other = found.maps[step.views[i].map].size;
        other.c = size.c;
        require(same(size, other), "size of the image", "one whose maps fit each other on all levels",
                shown(found.maps[0].size));
    }
    const auto along = [&](int64_t extent, int64_t stride) {
        return step.kind == CONV ? (extent + stride - 1) / stride : step.kind == MAX_POOL ? extent / stride : extent * stride;
    };
    return {size.n, step.outputs, along(size.d, step.stride.d), along(size.h, step.stride.h), along(size.w, step.stride.w)};
}

Layout DstlibPlan::lay_out(const DstlibSize& image) const {
    require(image.c == widths[0], "channels of the image", to_string(widths[0]), to_string(image.c));
    Layout found;
    const int64_t num_steps = static_cast<int64_t>(steps.size());
    std::vector<int64_t> last(num_steps + 1);
    const auto reads = [&](const View& view, int64_t now) {
        last[view.map] = now;
        if (!view.is_normed && view.slope != 1)
            found.ones = std::max(found.ones, found.maps[view.map].channels_in_all());
    };
    found.maps.push_back(placed_depth_last(image));
    for (int64_t i = 0; i < num_steps; ++i) {
        const Step& step = steps[i];
        for (int64_t k = 0; k < step.num_views; ++k) reads(step.views[k], i + 1);
        found.maps.push_back(placed_depth_last(size_after(step, found)));
        const DstlibSize &in = found.maps[step.views[0].map].size, &out = found.maps.back().size;
        require(step.gamma < 0 || out.d * out.h * out.w > 1, "size of the image", "more than one voxel for each norm",
                shown(image));
        const bool is_whole = step.stride.d == 1 && step.stride.h == 1 && step.stride.w == 1;
        found.by_winograd.push_back(step.kind == CONV && step.kernel.h == 3 && is_whole && in.h * in.w > DIRECT_PLANE);
        const int64_t of_each = found.by_winograd.back() ? 36 * step.num_active : 0;
        const double of_all = step.kind == CONV_TRANSPOSE ? double(step.outputs) * inputs_of(step) * taps_of(step) : 0;
        require(of_all < MOST_FLOATS, "weights", "fewer than 2^40 numbers", "more");
        found.made += (of_each + static_cast<int64_t>(of_all) + LINE - 1) / LINE * LINE;
        require(static_cast<double>(found.made) < MOST_FLOATS, "weights", "fewer than 2^40 numbers", "more");
    }
    for (size_t i = 0; i < outputs.size(); ++i) reads(outputs[i], num_steps + 1 + i);
    find_slabs(found, last);
    place_maps(found, last);
    return found;
}

// Finds what goes slab by slab, so that of large maps fewer are there at one time: a transposed convolution whose only
// reader makes of it what a slab reads, and a convolution that overwrites what nobody reads after it. last: the moment at
// which each map is read last; that of step i is i + 1.
void DstlibPlan::find_slabs(Layout& found, std::vector<int64_t>& last) const {
    const int64_t num_steps = static_cast<int64_t>(steps.size());
    std::vector<int64_t> readers(num_steps + 1);
    for (const View& view : outputs) ++readers[view.map];
    for (const Step& step : steps)
        for (int64_t k = 0; k < step.num_views; ++k) ++readers[step.views[k].map];
    found.within.assign(num_steps, -1);
    for (int64_t i = 0; i < num_steps; ++i) {
        const Map& out = found.maps[i + 1];
        found.is_sliced.push_back(found.by_winograd[i] && out.size.h >= 2 * SLAB_ROWS && out.floats >= LARGE);
        if (!found.is_sliced[i] || steps[i].num_views < 2) continue;
        const View& view = steps[i].views[1];
        if (view.map == 0 || view.slope != 1 || readers[view.map] > 1 || steps[view.map - 1].kind != CONV_TRANSPOSE) continue;
        found.within[view.map - 1] = i;
        int64_t& until = last[steps[view.map - 1].views[0].map];
        until = std::max(until, i + 1);
    }
    std::vector<char> is_moved(num_steps + 1);
    for (int64_t i = 0; i < num_steps; ++i) {
        Map& out = found.maps[i + 1];
        for (int64_t k = 0; k < steps[i].num_views && found.is_sliced[i]; ++k) {
            const int64_t map = steps[i].views[k].map;
            const bool is_whole = map == 0 || found.within[map - 1] < 0;
            if (out.over < 0 && is_whole && last[map] == i + 1 && same(found.maps[map].size, out.size)) out.over = map;
        }
        if (out.over >= 0) is_moved[out.over] = is_moved[i + 1] = 1;
    }
    for (int64_t i = 0; i <= num_steps; ++i) {
        Map& map = found.maps[i];
        const int64_t over = map.over;
        if (is_moved[i]) map = placed_depth_last(map.size, step_back(map));
        map.over = over;
        if (i && found.within[i - 1] >= 0) map = slab_of(map, steps[i - 1].stride.h);
    }
}

// Gives maps, norms and activated outputs places in the arena.
void DstlibPlan::place_maps(Layout& found, const std::vector<int64_t>& last) const {
    const int64_t num_maps = static_cast<int64_t>(found.maps.size()), num_outputs = static_cast<int64_t>(outputs.size());
    std::vector<Range> ranges;
    const auto take = [&ranges](int64_t floats, int64_t first, int64_t last) {
        ranges.push_back({in_lines(floats), first, last});
    };
    std::vector<int64_t> range(num_maps);  // of each map; of those that overwrite each other the same
    for (int64_t i = 0; i < num_maps; ++i) {
        const Map& map = found.maps[i];
        const int64_t first = i && found.within[i - 1] >= 0 ? found.within[i - 1] + 1 : i, until = std::max(first, last[i]);
        range[i] = map.over < 0 ? static_cast<int64_t>(ranges.size()) : range[map.over];
        if (map.over < 0) {
            take(map.floats, first, until);
        } else {
            ranges[range[i]].floats += step_back(map);
            ranges[range[i]].last = until;
        }
    }
    const int64_t norms = static_cast<int64_t>(ranges.size());
    for (int64_t i = 0; i < num_maps; ++i)
        take(i && steps[i - 1].gamma >= 0 ? 4 * found.maps[i].channels_in_all() : 0, i, std::max(i, last[i]));
    for (int64_t i = 0; i < num_outputs; ++i) {
        const bool is_activated = outputs[i].is_normed || outputs[i].slope != 1;
        const int64_t now = num_maps + i;
        take(is_activated ? found.maps[outputs[i].map].floats : 0, now, now);
    }
    found.arena = place(ranges);
    for (int64_t i = num_maps - 1; i >= 0; --i) {  // the last of those that overwrite each other lies first
        Map& map = found.maps[i];
        Range& taken = ranges[range[i]];
        map.at = taken.at;
        map.norm = ranges[norms + i].at;
        if (map.over >= 0) taken.at += step_back(map);
    }
    for (int64_t i = 0; i < num_outputs; ++i) {
        Map map = found.maps[outputs[i].map];
        if (const Range& taken = ranges[norms + num_maps + i]; taken.floats) map.at = taken.at;
        found.written.push_back(map);
    }
}

Source DstlibPlan::source(const View& view) const {
    const Map& map = layout->maps[view.map];
    Source found{arena.floats(map.at), nullptr, nullptr, map.size.c, map.strides, static_cast<float>(view.slope)};
    if (view.is_normed) {
        found.scale = arena.floats(map.norm);
        found.offset = found.scale + map.channels_in_all();
    } else if (view.slope != 1) {
        found.scale = ones.floats();
        found.offset = ones.floats(layout->ones);
    }
    return found;
}

Pattern DstlibPlan::pattern(const Step& step) const {
    return {data.words(step.row_ptr), data.words(step.col_idx), step.outputs, inputs_of(step), step.num_active};
}

Conv DstlibPlan::conv(const Step& step, int64_t number, const ConvTranspose* flow, float* taps, int num_threads) {
    const Map &in = layout->maps[step.views[0].map], &out = layout->maps[number + 1];
    Conv job{};
    for (int64_t i = 0; i < step.num_views; ++i) job.sources[i] = source(step.views[i]);
    job.out = target(out);
    job.pattern = pattern(step);
    job.weights = floats(step.values);
    if (layout->by_winograd[number]) {
        std::vector<int64_t> index(step.num_active);
        for (int64_t i = 0; i < step.num_active; ++i) index[i] = i;
        const PackWeights pack{job.weights, index.data(), taps, step.num_active, 9, FORM_WINOGRAD, 0};
        if (kernel("conv_pack_weights")->run(&pack, num_threads)) throw std::bad_alloc();
        job.weights = taps;
    }
    job.bias = floats(step.bias);
    job.shifts = step.shifts < 0 ? still.data() : data.words(step.shifts);
    if (step.gamma >= 0) job.norm = {floats(step.gamma), floats(step.beta), step.eps, arena.floats(out.norm)};
    job.input_size = {in.size.n, in.size.d, in.size.h, in.size.w};
    job.output_size = {out.size.d, out.size.h, out.size.w};
    job.kernel_size = step.kernel;
    job.stride = step.stride;
    job.padding = {step.kernel.h / 2, step.kernel.w / 2};
    job.is_sliced = layout->is_sliced[number];
    if (flow) job.upward = *flow;
    return job;
}

ConvTranspose DstlibPlan::conv_transpose(const Step& step, int64_t number, float* dense) {
    const Map &in = layout->maps[step.views[0].map], &out = layout->maps[number + 1];
    const int64_t taps = taps_of(step), inputs = in.size.c;
    ConvTranspose job{};
    job.input = source(step.views[0]);
    job.out = target(out);
    job.pattern = pattern(step);
    for (int64_t row = 0; row < step.outputs; ++row)  // the kernel reads no others
        for (int64_t k = job.pattern.row_ptr[row]; k < job.pattern.row_ptr[row + 1]; ++k)
            memcpy(dense + (row * inputs + job.pattern.col_idx[k]) * taps, floats(step.values) + k * taps, taps * 4);
    job.weights = dense;
    job.weight_strides[0] = inputs * taps;
    job.weight_strides[1] = taps;
    job.size = {in.size.n, in.size.d, in.size.h, in.size.w};
    job.stride = step.stride;
    return job;
}

namespace {

NCDHW strides_of_image(const DstlibSize& size) {
    const int64_t plane = size.h * size.w, channel = size.d * plane;
    return {size.c * channel, channel, plane, size.w, 1};
}

NCDHW strides_of(const Map& map) { return {map.strides.n, map.strides.c, 1, map.strides.h, map.strides.w}; }

NCDHW as_sizes(const DstlibSize& size) { return {size.n, size.c, size.d, size.h, size.w}; }

}  // namespace

void DstlibPlan::prepare(const DstlibSize& image, int num_threads) {
    if (is_ready && same(layout->maps[0].size, image)) return;
    auto found = std::make_unique<Layout>(lay_out(image));
    is_ready = false;
    calls.clear();
    gives.clear();
    arena.take(found->arena);
    made.take(found->made);
    ones.take(2 * found->ones);
    std::fill_n(ones.floats(), found->ones, 1.f);
    std::fill_n(ones.floats(found->ones), found->ones, 0.f);
    layout = std::move(found);
    float* weights = made.floats();
    std::vector<std::unique_ptr<ConvTranspose>> flows(steps.size());  // of the steps that make one slab by slab
    const Map& first = layout->maps[0];
    call("reorder_to_depth_last", Reorder{nullptr, arena.floats(first.at), strides_of_image(image), strides_of(first),
                                          as_sizes(image)});
    for (size_t i = 0; i < steps.size(); ++i) {
        const Step& step = steps[i];
        int64_t taken = 0;
        if (step.kind == CONV) {
            const char* form = layout->by_winograd[i] ? "conv_winograd" : "conv_direct";
            call(form, conv(step, i, flows[i].get(), weights, num_threads));
            taken = layout->by_winograd[i] ? 36 * step.num_active : 0;
        } else if (step.kind == CONV_TRANSPOSE) {
            const ConvTranspose flow = conv_transpose(step, i, weights);
            if (layout->within[i] < 0)
                call("conv_transpose_forward", flow);
            else
                flows[layout->within[i]] = std::make_unique<ConvTranspose>(flow);
            taken = step.outputs * inputs_of(step) * taps_of(step);
        } else {
            MaxPool job{};
            const DstlibSize& in = layout->maps[step.views[0].map].size;
            job.input = source(step.views[0]);
            job.out = target(layout->maps[i + 1]);
            job.size = {in.n, in.d, in.h, in.w};
            job.window = step.stride;
            call("max_pool_forward", job);
        }
        weights += (taken + LINE - 1) / LINE * LINE;
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
        const Map& map = layout->written[i];
        const DstlibSize& size = map.size;
        if (outputs[i].is_normed || outputs[i].slope != 1)
            call("activation_forward", Activation{source(outputs[i]), target(map), {size.n, size.d, size.h, size.w}});
        gives.push_back(calls.size());
        call("reorder_to_channels_first",
             Reorder{arena.floats(map.at), nullptr, strides_of(map), strides_of_image(size), as_sizes(size)});
    }
    is_ready = true;
}

void DstlibPlan::run(const float* image, float* const* into, int num_threads) {
    reinterpret_cast<Reorder*>(calls[0].problem.data())->input = image;
    for (size_t i = 0; i < gives.size(); ++i)
        reinterpret_cast<Reorder*>(calls[gives[i]].problem.data())->out = into[i];
    for (const Call& each : calls)
        if (each.run(each.problem.data(), num_threads)) throw std::bad_alloc();
}

// ---- the door

namespace {

void copy_text(const std::string& text, char* into, size_t room) {
    strncpy(into, text.c_str(), room - 1);
    into[room - 1] = 0;
}

// Does what may be refused, or run out of memory: nothing else is thrown.
template <class Do>
int tried(DstlibRefusal* refusal, Do&& act) {
    Refusal why;
    try {
        act();
        return 0;
    } catch (const Refusal& found) {
        why = found;
    } catch (const std::exception&) {
        why = {"memory", "enough for what is between the layers", "less"};
    }
    if (refusal) {
        copy_text(why.what, refusal->what, sizeof refusal->what);
        copy_text(why.allowed, refusal->allowed, sizeof refusal->allowed);
        copy_text(why.given, refusal->given, sizeof refusal->given);
    }
    return 1;
}

}  // namespace

extern "C" {

EXPORT DstlibPlan* dstlib_open(const void* content, int64_t bytes, const char* isa, DstlibRefusal* refusal) {
    std::unique_ptr<DstlibPlan> plan;
    const int failed = tried(refusal, [&] {
        plan = std::make_unique<DstlibPlan>();
        plan->isa = engine_instruction_set(isa);
        require(plan->isa, "instruction set", "one of this processor", isa ? isa : "none");
        plan->read(static_cast<const char*>(content), bytes);
    });
    return failed ? nullptr : plan.release();
}

EXPORT void dstlib_close(DstlibPlan* plan) { delete plan; }

EXPORT int64_t dstlib_num_channels(const DstlibPlan* plan) { return plan->widths[0]; }

EXPORT int64_t dstlib_num_outputs(const DstlibPlan* plan) { return static_cast<int64_t>(plan->outputs.size()); }

EXPORT int dstlib_measure(const DstlibPlan* plan, const DstlibSize* image, DstlibSize* outputs, int64_t* bytes,
                          DstlibRefusal* refusal) {
    return tried(refusal, [&] {
        const Layout found = plan->lay_out(*image);
        for (size_t i = 0; i < plan->outputs.size(); ++i) outputs[i] = found.written[i].size;
        *bytes = 4 * (found.arena + found.made + 2 * found.ones);
    });
}

EXPORT int dstlib_run(DstlibPlan* plan, const DstlibSize* size, const float* image, float* const* outputs,
                      int num_threads, DstlibRefusal* refusal) {
    return tried(refusal, [&] {
        const int threads = std::max(num_threads, 1);
        plan->prepare(*size, threads);
        plan->run(image, outputs, threads);
    });
}
}
