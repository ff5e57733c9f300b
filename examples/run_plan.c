/* Runs a network that dstlib.export.save_plan() has written, in a program without Python.
 *
 *     LIBRARY=$(python -c "from dstlib import runtime; print(runtime.library_file())")
 *     INCLUDE=$(python -c "from dstlib import runtime; print(runtime.library_file().parents[1] / 'include')")
 *     cc -I $INCLUDE examples/run_plan.c $LIBRARY -Wl,-rpath,$(dirname $LIBRARY) -o run_plan
 *     ./run_plan network.plan image.f32 1 32 64 64 outputs.f32 2
 *
 * image.f32 holds 1 × channels × 32 × 64 × 64 numbers of float32, such as numpy's image.tofile() writes; of outputs.f32
 * all outputs follow each other. The last number is that of the threads.
 */
#include <dstlib.h>
#include <stdio.h>
#include <stdlib.h>

static int refused(const DstlibRefusal* why) {
    fprintf(stderr, "%s: expected %s, got %s\n", why->what, why->allowed, why->given);
    return 1;
}

static void* read_file(const char* path, int64_t* bytes) {
    FILE* file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) || (*bytes = ftell(file)) < 0) return NULL;
    rewind(file);
    void* content = malloc(*bytes + 1);
    const int whole = content && fread(content, 1, *bytes, file) == (size_t)*bytes;
    fclose(file);
    return whole ? content : NULL;
}

static int64_t count(const DstlibSize* size) { return size->n * size->c * size->d * size->h * size->w; }

int main(int argc, char** argv) {
    if (argc != 9) {
        fprintf(stderr, "%s PLAN IMAGE N D H W OUTPUTS THREADS\n", argv[0]);
        return 2;
    }
    DstlibRefusal why;
    int64_t bytes, between;
    void* content = read_file(argv[1], &bytes);
    DstlibPlan* plan = content ? dstlib_open(content, bytes, NULL, &why) : NULL;
    if (!content) return perror(argv[1]), 1;
    if (!plan) return refused(&why);
    free(content);

    const DstlibSize size = {atoll(argv[3]), dstlib_num_channels(plan), atoll(argv[4]), atoll(argv[5]), atoll(argv[6])};
    const int64_t num_outputs = dstlib_num_outputs(plan);
    DstlibSize* sizes = malloc(num_outputs * sizeof *sizes);
    float** outputs = malloc(num_outputs * sizeof *outputs);
    if (dstlib_measure(plan, &size, sizes, &between, &why)) return refused(&why);
    for (int64_t i = 0; i < num_outputs; ++i) outputs[i] = malloc(count(&sizes[i]) * sizeof(float));

    float* image = read_file(argv[2], &bytes);
    if (!image || bytes != count(&size) * (int64_t)sizeof(float)) {
        fprintf(stderr, "%s: not an image of this size\n", argv[2]);
        return 1;
    }
    if (dstlib_run(plan, &size, image, outputs, atoi(argv[8]), &why)) return refused(&why);

    FILE* file = fopen(argv[7], "wb");
    if (!file) return perror(argv[7]), 1;
    int is_whole = 1;
    for (int64_t i = 0; i < num_outputs; ++i) {
        const size_t numbers = count(&sizes[i]);
        is_whole &= fwrite(outputs[i], sizeof(float), numbers, file) == numbers;
        free(outputs[i]);
    }
    is_whole &= !fclose(file);  // the last numbers are written here
    if (!is_whole) perror(argv[7]);
    free(outputs);
    free(sizes);
    free(image);
    dstlib_close(plan);
    return !is_whole;
}
